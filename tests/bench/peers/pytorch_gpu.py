#!/usr/bin/env python3
"""What PyTorch does on one GPU, for comparison with Foretell on the same GPU in the same sitting.

    pytorch_gpu.py train        GPT-2: torch.compile, FP16 autocast + GradScaler, fused AdamW, fused attention
    pytorch_gpu.py linear_train the linear-attention model of flash-linear-attention, FP16 autocast
    pytorch_gpu.py decode       batch 1, static key/value cache, torch.compile with CUDA graphs: 1, 8, 32, 64 new tokens
    pytorch_gpu.py attention    scaled_dot_product_attention, causal, forward and forward + backward
    pytorch_gpu.py linear_op    flash-linear-attention's chunk_linear_attn with elu + 1 and the normaliser
    pytorch_gpu.py gemm         matrix products and the speed of a copy
    pytorch_gpu.py weights      initial weights of GPT-2 as .safetensors under Foretell's names
    pytorch_gpu.py losses       the loss of each step from those weights on given batches

Every figure is one JSON line with the device and the versions. Times are medians by the GPU's clock. Needs torch
with CUDA; the linear sections need flash-linear-attention. Under torchrun, `train` uses every GPU (DDP).
"""

import argparse
import json
import math
import os
import statistics

import torch
import torch.nn.functional as F
from torch import nn

DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
RANKS = int(os.environ.get("WORLD_SIZE", 1))


def report(section, **figures):
    if int(os.environ.get("RANK", 0)):
        return
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    row = {"section": section, **figures, "device": torch.cuda.get_device_name(DEVICE), "versions": versions}
    print(json.dumps(row), flush=True)


def median_ms(call, warmup, count):
    for _ in range(warmup):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(count):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


class Attention(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.heads = args.heads
        self.qkv = nn.Linear(args.width, 3 * args.width)
        self.o = nn.Linear(args.width, args.width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.up = nn.Linear(args.width, 4 * args.width)
        self.down = nn.Linear(4 * args.width, args.width)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(args.width), Attention(args)
        self.mlp_norm, self.mlp = nn.LayerNorm(args.width), Mlp(args)

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Gpt2(nn.Module):
    """Its parameters have Foretell's names, but for attention.qkv, which Foretell keeps as q, k and v."""

    def __init__(self, args):
        super().__init__()
        self.embedding = nn.Embedding(args.vocabulary, args.width)
        self.position_embedding = nn.Embedding(args.context, args.width)
        self.blocks = nn.ModuleList(Block(args) for _ in range(args.layers))
        self.final_norm = nn.LayerNorm(args.width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                narrow = name.endswith(("attention.o.weight", "mlp.down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * args.layers) if narrow else 0.02)

    def forward(self, tokens, targets):
        """tokens, targets (B, T); a target of -1 is not learned."""
        x = self.embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.final_norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)


class Trainer:
    """One optimizer step: forward, backward, clipping, AdamW; decay on matrices only, as Foretell."""

    def __init__(self, model, loss, half=True, lr=6e-4, loss_scale=65536.0):
        self.model, self.loss, self.half = model, loss, half
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
        self.scaler = torch.amp.GradScaler("cuda", init_scale=loss_scale, enabled=half)

    def warm_up(self, step, updates, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / max(updates, 1))

    def step(self, tokens, targets):
        with torch.autocast("cuda", torch.float16, enabled=self.half):
            loss = self.loss(tokens, targets)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


def time_training(section, engine, model, loss, args):
    """Random tokens, new ones in every step, and the presets' 700 updates of warm-up, as in Foretell's benchmark."""
    shape = (args.warmup + args.steps, args.batch, args.context)
    tokens, targets = (torch.randint(min(args.vocabulary, 50257), shape, device=DEVICE) for _ in range(2))
    trainer = Trainer(model, loss, lr=args.lr)
    steps = iter(range(shape[0]))

    def step():
        i = next(steps)
        trainer.warm_up(i, 700, args.lr)
        trainer.step(tokens[i], targets[i])

    torch.cuda.reset_peak_memory_stats()
    ms = median_ms(step, args.warmup, args.steps)
    report(
        section,
        engine=engine,
        precision="fp16 autocast, GradScaler",
        config={k: getattr(args, k) for k in ("layers", "width", "heads", "vocabulary", "batch", "context")},
        parameters=sum(p.numel() for p in model.parameters()),
        gpus=RANKS,
        step_ms=round(ms, 3),
        tokens_per_second=round(RANKS * args.batch * args.context / ms * 1e3),
        memory_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2),
    )


def train(args):
    model = Gpt2(args).to(DEVICE)
    wrapped = model
    if RANKS > 1:
        torch.distributed.init_process_group("nccl", device_id=DEVICE)
        wrapped = nn.parallel.DistributedDataParallel(model, device_ids=[DEVICE.index], gradient_as_bucket_view=True)
    time_training("train", "torch.compile" + (" DDP" if RANKS > 1 else ""), model, torch.compile(wrapped), args)
    if RANKS > 1:
        torch.distributed.destroy_process_group()


def linear_train(args):
    import fla
    from fla.models import LinearAttentionConfig
    from transformers import AutoModelForCausalLM

    config = LinearAttentionConfig(
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_heads=args.heads,
        vocab_size=args.vocabulary,
        attn_mode="chunk",
        feature_map="elu",
        use_cache=False,
        fuse_cross_entropy=True,
    )
    model = AutoModelForCausalLM.from_config(config).to(DEVICE)
    engine = f"flash-linear-attention {fla.__version__}"
    time_training("linear_train", engine, model, lambda x, y: model(input_ids=x, labels=y).loss, args)


class Decoder(nn.Module):
    """GPT-2 at batch 1 with a static cache, one or more new tokens at once; weights FP16."""

    def __init__(self, args):
        super().__init__()
        c, cache = args.width, (args.layers, 1, args.heads, args.context, args.width // args.heads)
        self.embedding, self.positions = nn.Embedding(args.vocabulary, c), nn.Embedding(args.context, c)
        self.blocks = nn.ModuleList(Block(args) for _ in range(args.layers))
        self.final_norm = nn.LayerNorm(c)
        self.register_buffer("keys", torch.zeros(cache))
        self.register_buffer("values", torch.zeros(cache))

    def forward(self, tokens, places):
        x = self.embedding(tokens) + self.positions(places)
        mask = torch.arange(self.keys.shape[3], device=tokens.device)[None, :] <= places[:, None]
        for i, block in enumerate(self.blocks):
            heads = block.attention.qkv(block.attention_norm(x)).unflatten(-1, (3, block.attention.heads, -1))
            q, k, v = heads.permute(2, 0, 3, 1, 4)
            self.keys[i][:, :, places] = k
            self.values[i][:, :, places] = v
            o = F.scaled_dot_product_attention(q, self.keys[i], self.values[i], attn_mask=mask[None, None])
            x = x + block.attention.o(o.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.mlp_norm(x))
        return F.linear(self.final_norm(x), self.embedding.weight).argmax(-1)


@torch.no_grad()
def decode(args):
    model = Decoder(args).to(DEVICE, torch.float16)
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False)
    for count in (1, 8, 32, 64):
        tokens = torch.zeros(1, count, dtype=torch.long, device=DEVICE)
        places = torch.arange(512, 512 + count, device=DEVICE)
        ms = median_ms(lambda: step(tokens, places), 15, 2 * args.steps)
        report("decode", engine="torch.compile reduce-overhead", new_tokens=count, length=512, ms=round(ms, 4))


def operation(section, name, shape, forward, inputs):
    seed = torch.randn_like(inputs[2])
    both = lambda: torch.autograd.grad(forward(), inputs, seed)
    fields = dict(zip("BTHD", shape))
    report(
        section,
        op=name,
        **fields,
        forward_ms=round(median_ms(forward, 5, 20), 4),
        forward_backward_ms=round(median_ms(both, 5, 20), 4),
    )


def shapes_of(args):
    return [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]


def random_inputs(shape, scale):
    return [(torch.randn(shape, device=DEVICE, dtype=torch.float16) * s).requires_grad_() for s in (scale, scale, 1)]


def attention(args):
    for shape in shapes_of(args):
        q, k, v = random_inputs(shape, 1)

        def forward():
            heads = [x.transpose(1, 2) for x in (q, k, v)]
            return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)

        operation("attention", "scaled_dot_product_attention", shape, forward, (q, k, v))


def linear_op(args):
    import fla
    from fla.ops.linear_attn import chunk_linear_attn

    phi = lambda x: F.elu(x) + 1
    name = f"flash-linear-attention {fla.__version__}, chunk_linear_attn"
    for shape in shapes_of(args):
        q, k, v = random_inputs(shape, 0.1)
        operation("linear_op", name, shape, lambda: chunk_linear_attn(phi(q), phi(k), v, normalize=True)[0], (q, k, v))


@torch.no_grad()
def gemm(args):
    source = torch.empty(2 << 30, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source), 5, 20)
    report("copy", bytes_per_second=round(2 * source.numel() / ms * 1e3))
    del source, target
    for dtype in (torch.float16, torch.bfloat16):
        for rows, out, inner in (
            (8192, 8192, 8192),
            (16384, 768, 768),
            (16384, 2304, 768),
            (16384, 3072, 768),
            (16384, 768, 3072),
            (16384, 50304, 768),
            (32768, 8192, 2048),
        ):
            x = torch.randn(rows, inner, device=DEVICE, dtype=dtype)
            w = torch.randn(out, inner, device=DEVICE, dtype=dtype)
            ms = median_ms(lambda: F.linear(x, w), 10, 30)
            rate = round(2 * rows * out * inner / ms * 1e3)
            report("gemm", dtype=str(dtype).split(".")[1], rows=rows, out=out, inner=inner, flops=rate)


def random_model(args):
    """Everything differs from everything else, gains and biases too, so that a mix-up shows."""
    torch.manual_seed(args.seed)
    model = Gpt2(args)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.02)
    return model


def weights(args):
    from safetensors.torch import save_file

    tensors = {}
    for name, value in random_model(args).state_dict().items():
        if ".qkv." in name:
            for part, piece in zip("qkv", value.chunk(3)):
                tensors[name.replace(".qkv.", f".{part}.")] = piece.clone()
        else:
            tensors[name] = value
    save_file(tensors, args.weights)
    print(f"{args.weights}: {len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} values")


def load_weights(model, path):
    from safetensors.torch import load_file

    stored = load_file(path)
    for name in [name for name in stored if ".q." in name]:
        parts = [stored.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
        stored[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    model.load_state_dict(stored)


def losses(args):
    import numpy

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    shape = (-1, args.batch, args.context + 1)
    batches = torch.from_numpy(numpy.fromfile(args.batches, dtype=numpy.int32).reshape(shape)).long()
    for precision in args.precisions.split(","):
        model = Gpt2(args)
        load_weights(model, args.weights)
        model.to(DEVICE)
        # A scale that skips no step: a skipped one shifts every loss behind it, which is not rounding.
        trainer = Trainer(model, model, half=precision == "fp16", lr=args.lr, loss_scale=1024.0)
        values, scales = [], []
        for step, batch in enumerate(batches[: args.steps]):
            trainer.warm_up(step, args.warm_updates, args.lr)
            batch = batch.to(DEVICE)
            scales.append(trainer.scaler.get_scale())
            values.append(trainer.step(batch[:, :-1].clamp(min=0), batch[:, 1:].contiguous()).item())
        report("losses", engine="eager", precision=precision, losses=values, loss_scales=scales)
        del model, trainer
        torch.cuda.empty_cache()


SECTIONS = {f.__name__: f for f in (train, linear_train, decode, attention, linear_op, gemm, weights, losses)}


def arguments():
    parser = argparse.ArgumentParser(description="PyTorch on a GPU, beside Foretell")
    parser.add_argument("section", choices=SECTIONS)
    for name, default, text in [
        ("layers", 12, "transformer blocks"),
        ("width", 768, "channels of the residual stream"),
        ("heads", 12, "heads"),
        ("vocabulary", 50304, "tokens of the vocabulary"),
        ("batch", 32, "sequences of a step, on each GPU"),
        ("context", 1024, "tokens of a sequence"),
        ("steps", 30, "steps to time, or to train in `losses`"),
        ("warmup", 12, "steps before the timed ones"),
        ("seed", 1, "seed of the initial weights"),
        ("warm-updates", 10, "losses: updates of linear warm-up; constant after them"),
    ]:
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--lr", type=float, default=6e-4, help="peak learning rate (6e-4)")
    parser.add_argument("--shapes", default="4x8192x16x128,16x1024x12x64", help="attention, linear_op: BxTxHxD,...")
    parser.add_argument("--weights", help="weights, losses: the .safetensors file")
    parser.add_argument("--batches", help="losses: int32 (steps, batch, context + 1), padded with -1 (step_batches)")
    parser.add_argument("--precisions", default="fp16,fp32", help="losses: fp16 (autocast), fp32 (TF32 off)")
    return parser.parse_args()


def main():
    args = arguments()
    if args.section != "weights":
        torch.cuda.set_device(DEVICE)
    try:
        SECTIONS[args.section](args)
    except ImportError as e:
        raise SystemExit(f"pytorch_gpu.py {args.section}: {e.name} is not installed") from e


if __name__ == "__main__":
    main()
