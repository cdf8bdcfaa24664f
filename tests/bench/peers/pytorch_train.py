#!/usr/bin/env python3
"""Tokens per second of one PyTorch training step on CPU cores, for comparison with `foretell train`.

The model is the one Foretell trains: pre-norm blocks with RMSNorm, RoPE, softmax or linear attention (elu+1
with its normaliser, as products of matrices over chunks), SwiGLU, normalised embeddings and an unembedding of its own,
sequential Medusa heads, DeepSeek-style MTP depths, AdamW with clipping. Everything is FP32.

Set-up, from PyPI:

    python3 -m venv peers && peers/bin/pip install torch numpy
    taskset -c 0,1 peers/bin/python tests/bench/peers/pytorch_train.py --threads 2

Prints one JSON object. Compare figures from one machine, in one sitting, at the same number of threads.
"""

import argparse
import json
import math
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn


def arguments():
    parser = argparse.ArgumentParser(description="PyTorch training step, FP32, CPU")
    for name, default, text in [
        ("layers", 4, "transformer blocks"),
        ("width", 256, "channels of the residual stream"),
        ("heads", 4, "query heads"),
        ("kv-heads", 0, "key/value heads; 0: as many as query heads"),
        ("ffn-width", 704, "hidden channels of the feed-forward layer"),
        ("vocabulary", 1024, "tokens of the vocabulary"),
        ("context", 256, "tokens of a sequence"),
        ("micro-batch", 8, "sequences of a step"),
        ("medusa", 3, "Medusa heads"),
        ("mtp", 1, "multi-token prediction depths"),
        ("chunk", 64, "chunk of linear attention"),
        ("threads", 2, "CPU threads"),
        ("steps", 20, "steps to time"),
        ("warmup", 5, "steps before the timed ones"),
    ]:
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--attention", default="linear,softmax", help="kind per layer, repeated (linear,softmax)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    args = parser.parse_args()
    args.kv_heads = args.kv_heads or args.heads
    return args


def rotary_table(context, head_width, theta=10000.0):
    rates = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angles = torch.outer(torch.arange(context, dtype=torch.float64), rates)
    return angles.cos().float(), angles.sin().float()


def rotate(x, cosines, sines):
    """x (B, H, T, D), half-split layout."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cosines - x2 * sines, x2 * cosines + x1 * sines), dim=-1)


def before(x):
    """Sums over the chunks before each one: x (B, H, chunks, ...)."""
    total = x.cumsum(dim=2)
    return F.pad(total[:, :, :-1], (0, 0) * (x.dim() - 3) + (1, 0))


def linear_attention(q, k, v, chunk, eps=1e-6):
    """q, k, v (B, H, T, D): o_t = phi(q_t) S_t / (phi(q_t) . z_t + eps), by matrix products over chunks."""
    shape = q.shape
    q, k, v = (x.unflatten(2, (-1, chunk)) for x in (F.elu(q) + 1, F.elu(k) + 1, v))
    scores = (q @ k.transpose(-1, -2)).tril()
    state = before(k.transpose(-1, -2) @ v)
    z = before(k.sum(dim=3))
    numerator = scores @ v + q @ state
    denominator = scores.sum(dim=-1, keepdim=True) + q @ z.unsqueeze(-1) + eps
    return (numerator / denominator).reshape(shape)


class Attention(nn.Module):
    def __init__(self, args, kind):
        super().__init__()
        self.kind, self.heads, self.kv_heads, self.chunk = kind, args.heads, args.kv_heads, args.chunk
        self.head_width = args.width // args.heads
        self.qkv = nn.Linear(args.width, (self.heads + 2 * self.kv_heads) * self.head_width, bias=False)
        self.out = nn.Linear(args.width, args.width, bias=False)

    def forward(self, x, cosines, sines):
        heads = self.qkv(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = rotate(q, cosines, sines), rotate(k, cosines, sines)
        grouped = self.kv_heads != self.heads
        if self.kind == "softmax":
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        else:
            if grouped:
                k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
            o = linear_attention(q, k, v, self.chunk)
        return self.out(o.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, args, kind):
        super().__init__()
        self.attention_norm = nn.RMSNorm(args.width, eps=1e-5)
        self.attention = Attention(args, kind)
        self.mlp_norm = nn.RMSNorm(args.width, eps=1e-5)
        self.gate_up = nn.Linear(args.width, 2 * args.ffn_width, bias=False)
        self.down = nn.Linear(args.ffn_width, args.width, bias=False)

    def forward(self, x, cosines, sines):
        x = x + self.attention(self.attention_norm(x), cosines, sines)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class MtpDepth(nn.Module):
    """hidden^k_i = norm(block(W [norm(E[token i + k]); norm(hidden^{k-1}_i)]))"""

    def __init__(self, args):
        super().__init__()
        self.token_norm = nn.RMSNorm(args.width, eps=1e-5)
        self.hidden_norm = nn.RMSNorm(args.width, eps=1e-5)
        self.projection = nn.Linear(2 * args.width, args.width, bias=False)
        self.block = Block(args, "softmax")
        self.norm = nn.RMSNorm(args.width, eps=1e-5)

    def forward(self, embedded, hidden, cosines, sines):
        joined = torch.cat((self.token_norm(embedded), self.hidden_norm(hidden)), dim=-1)
        return self.norm(self.block(self.projection(joined), cosines, sines))


class MedusaHead(nn.Module):
    """z + SiLU(W z + b), z = hidden + V [norm(E[token i + 1]); ..; norm(E[token i + offset])]"""

    def __init__(self, args, offset):
        super().__init__()
        self.token_norm = nn.RMSNorm(args.width, eps=1e-5)
        self.between = nn.Linear(offset * args.width, args.width, bias=False)
        self.layer = nn.Linear(args.width, args.width)

    def forward(self, embedded, hidden):
        z = hidden + self.between(torch.cat([self.token_norm(e) for e in embedded], dim=-1))
        return z + F.silu(self.layer(z))


class Model(nn.Module):
    def __init__(self, args, loss_weight=0.2, loss_decay=0.8):
        super().__init__()
        kinds = args.attention.split(",")
        self.context = args.context
        self.embedding = nn.Embedding(args.vocabulary, args.width)
        self.embedding_norm = nn.RMSNorm(args.width, eps=1e-5)
        self.unembedding = nn.Linear(args.width, args.vocabulary, bias=False)
        self.blocks = nn.ModuleList(Block(args, kinds[i % len(kinds)]) for i in range(args.layers))
        self.norm = nn.RMSNorm(args.width, eps=1e-5)
        self.medusa = nn.ModuleList(MedusaHead(args, i + 1) for i in range(args.medusa))
        self.mtp = nn.ModuleList(MtpDepth(args) for _ in range(args.mtp))
        self.weight = lambda place: loss_weight * loss_decay**place
        cosines, sines = rotary_table(args.context, args.width // args.heads)
        self.register_buffer("cosines", cosines, persistent=False)
        self.register_buffer("sines", sines, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = 0.02 / math.sqrt(2 * args.layers) if name.endswith(("out.weight", "down.weight")) else 0.02
                nn.init.normal_(parameter, std=std)
        for head in self.medusa:
            for parameter in (head.between.weight, head.layer.weight, head.layer.bias):
                nn.init.zeros_(parameter)

    def loss(self, hidden, tokens, offset):
        targets = tokens[:, 1 + offset : 1 + offset + self.context]
        return F.cross_entropy(self.unembedding(hidden).flatten(0, 1), targets.flatten())

    def forward(self, tokens):
        """tokens (B, context + 1 + the largest offset): every position has every target."""
        furthest = max(len(self.medusa), len(self.mtp))
        embedded = [self.embedding(tokens[:, i : i + self.context]) for i in range(1 + furthest)]
        x = self.embedding_norm(embedded[0])
        for block in self.blocks:
            x = block(x, self.cosines, self.sines)
        hidden = self.norm(x)
        total = self.loss(hidden, tokens, 0)
        for i, head in enumerate(self.medusa):
            total = total + self.weight(i) * self.loss(head(embedded[1 : i + 2], hidden), tokens, i + 1)
        for i, depth in enumerate(self.mtp):
            hidden = depth(embedded[i + 1], hidden, self.cosines, self.sines)
            total = total + self.weight(i) * self.loss(hidden, tokens, i + 1)
        return total


def make_optimizer(model):
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)


def step(run, model, optimizer, tokens):
    loss = run(tokens)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def cpu_name():
    with open("/proc/cpuinfo") as info:
        return next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), "unknown")


def main():
    args = arguments()
    if args.context % args.chunk:
        raise SystemExit(f"--context {args.context} is not a multiple of --chunk {args.chunk}")
    torch.set_num_threads(args.threads)
    torch.set_num_interop_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(1)
    model = Model(args)
    optimizer = make_optimizer(model)
    run = torch.compile(model) if args.compile else model
    length = args.context + 1 + max(args.medusa, args.mtp)
    batches = [torch.randint(args.vocabulary, (args.micro_batch, length)) for _ in range(4)]
    losses, seconds = [], []
    for i in range(args.warmup + args.steps):
        begin = time.perf_counter()
        losses.append(step(run, model, optimizer, batches[i % len(batches)]))
        seconds.append(time.perf_counter() - begin)
    timed = sorted(seconds[args.warmup :])
    tokens = args.micro_batch * args.context
    print(
        json.dumps(
            {
                "engine": "pytorch",
                "version": torch.__version__,
                "device": cpu_name(),
                "precision": "fp32",
                "config": vars(args),
                "parameters": sum(p.numel() for p in model.parameters()),
                "tokens_per_second": round(tokens / statistics.median(timed), 1),
                "tokens_per_second_spread": [round(tokens / timed[-1], 1), round(tokens / timed[0], 1)],
                "step_ms": round(1e3 * statistics.median(timed), 2),
                "loss": {"first": round(losses[0], 4), "last": round(losses[-1], 4)},
            }
        )
    )


if __name__ == "__main__":
    main()
