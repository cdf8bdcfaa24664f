#!/usr/bin/env python3
"""Writes the README's table of figures from the results under tests/bench/results.

    tests/bench/figures.py            rewrite the table
    tests/bench/figures.py --check    exit with 1 when the README does not say what the results say
"""

import json
import pathlib
import re
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "bench" / "results"
BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->"


def read(name):
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else {}


def benchmark(name, device="cpu"):
    """{benchmark name: its fields} of a google-benchmark result, medians where runs were repeated."""
    rows = {}
    for b in read(f"{device}_{name}.json").get("benchmarks", []):
        if b.get("run_type") == "iteration" or b.get("aggregate_name") == "median":
            rows[b.get("run_name", b["name"])] = b
    return rows


def find(rows, pattern):
    return next((b for name, b in rows.items() if re.search(pattern, name)), None)


def training(rows):
    table, peers = [], {}
    path = RESULTS / "cpu_train_step_pytorch.jsonl"
    if path.exists():
        for line in path.read_text().splitlines():
            peer = json.loads(line)
            peers[peer["config"]["threads"]] = peer
    for threads in (1, 2):
        for compute in ("fp16", "fp32"):
            b = find(rows, f"training_step/{compute}/{threads}/")
            if not b:
                continue
            peer = peers.get(threads)
            text = "not measured"
            if peer:
                ratio = b["tokens_per_second"] / peer["tokens_per_second"]
                text = f"PyTorch {peer['version'].split('+')[0]} fp32: {peer['tokens_per_second']:,.0f} tokens/s; {ratio:.2f}x"
            table.append((f"training step of the quickstart model, {compute}, {threads} thread{'s' * (threads > 1)}",
                          f"{b['tokens_per_second']:,.0f} tokens/s", text))
    return table


def decoding(rows):
    table = []
    for threads in (1, 2):
        step = find(rows, rf"decode_step/model:0/dtype:0/threads:{threads}/rows:1/")
        memory = find(rows, rf"read_memory/MiB:6/threads:{threads}/")
        four = find(rows, rf"decode_step/model:0/dtype:0/threads:{threads}/rows:4/")
        if step and memory:
            speed, limit = step["bytes_per_second"] / 1e9, memory["bytes_per_second"] / 1e9
            table.append((f"weights read in a plain decoding step, {threads} thread{'s' * (threads > 1)}", f"{speed:.1f} GB/s",
                          f"plain reading of as much memory: {limit:.1f} GB/s; {speed / limit:.0%}"))
        if four:
            table.append((f"verifying 4 tokens at once, {threads} thread{'s' * (threads > 1)}",
                          f"{four['T(n)/T(1)']:.2f} x one token", ""))
    return table


def attention(rows):
    table = []
    for length in (256, 1024, 4096, 16384):
        cells = []
        for linear in (1, 0):
            parts = [find(rows, rf"train/linear:{linear}/backward:{b}/sequences:1/length:{length}/") for b in (0, 1)]
            cells.append(sum(p["ns_per_token"] for p in parts) / 1e3 if all(parts) else None)
        if None not in cells:
            table.append((f"linear attention, forward and backward, T = {length}", f"{cells[0]:.1f} µs a token",
                          f"softmax: {cells[1]:.1f} µs a token"))
    return table


def speculation(run, name):
    report = read(f"{run}/report.json")
    if not report:
        return []
    table = [(f"{name}, validation bits per byte", f"{report['validation_bits_per_byte']:.2f}",
              "n-gram models of the same text: " + ", ".join(anchors(report)))]
    # A speedup is over plain decoding at the same temperature.
    plain = {r["temperature"]: r["tokens_per_second"] for r in report["results"] if r["drafter"] in ("plain", "none")}
    for r in report["results"]:
        if r["drafter"] in ("plain", "none"):
            continue
        table.append((f"{name}, {r['drafter']} ({r['shape']}), {r['acceptance']}, temperature {r['temperature']:g}",
                      f"{r['speedup']:.2f}x plain, {r['mean_accepted_length']:.2f} tokens a step",
                      f"plain: {plain[r['temperature']]:,.0f} tokens/s; distinct-4 {r['distinct_4']:.2f}"))
    return table


def anchors(report):
    return [f"{a['model']} {a['bits_per_byte']:.2f}" for a in report.get("anchors", [])]


def peers_of(name):
    """Lines of a peer on the GPU that hold figures."""
    path = RESULTS / f"gpu_{name}_pytorch.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def version_of(peer):
    engine, torch = peer.get("engine", peer.get("op", "PyTorch")), peer["versions"]["torch"].split("+")[0]
    return f"{engine}, PyTorch {torch}"


def faster(work, ours, peer, theirs, unit, target, inverse=False):
    """A row of the table: the figure, the peer's in the same run, how many times better ours is, what is asked for."""
    digits = "{:,.0f} " if unit == "tokens/s" else "{:.3f} "
    cells = [(digits + unit).format(x) if x else "not measured" for x in (ours, theirs)]
    if theirs:
        cells[1] = f"{version_of(peer)}: {cells[1]}"
    ratio = f"{(theirs / ours if inverse else ours / theirs):.2f}x" if ours and theirs else ""
    return (work, *cells, ratio, target)


def gpu_training():
    table = []
    for name, work, target in (
        ("train_124m", "GPT-2 124M, FP16 and dynamic scaling, B32 T1024", "1.1x"),
        ("train_1558m", "GPT-2 1.5B, the same, B16 T1024", "1.1x"),
        ("linear_124m", "linear attention 124M, the same, B4 T8192", "540,000 tokens/s"),
    ):
        preset = name.replace("train_", "gpt2_")
        b = find(benchmark(name, "gpu"), rf"gpu_step/{preset}/")
        peer = next((p for p in peers_of(name) if "tokens_per_second" in p), {})
        if b:
            row = faster(work, b["tokens_per_second"], peer, peer.get("tokens_per_second"), "tokens/s", target)
            table.append(row)
    two = read("gpu_two.json")
    if two:
        peer, speed = two.get("peer", {}), two["tokens_per_second"]["both"]
        cell = f"{version_of(peer)}: {peer['scaling']:.3f} x" if peer else "not measured"
        ratio = f"{speed / peer['tokens_per_second'][-1]:.2f}x" if peer else ""
        work = "GPT-2 124M on two GPUs, B32 on each, beside the slower of them alone"
        ours = f"{two['scaling']:.3f} x, {speed:,} tokens/s; comm.zero = 0 {two['replicated_scaling']:.3f} x"
        table.append((work, ours, cell, ratio, "1.92 x"))
    return table


def gpu_memory():
    b = find(benchmark("train_124m", "gpu"), "gpu_step/gpt2_124m/")
    if not b or "planned_gib" not in b:
        return []
    planned, used = b["planned_gib"], b["memory_gib"]
    found, off = f"planned {planned:.2f} GiB, used {used:.2f} GiB", f"within 5%; is {abs(planned / used - 1):.1%}"
    return [("memory of a step of GPT-2 124M", found, "", "", off)]


def gpu_linear_attention():
    """Forward and backward together, at the sizes of the table."""
    place = "gpu_linear_attention_train/sequences:4/length:8192/heads:16/width:128/pass:2/normalised:1/"
    b = find(benchmark("linear", "gpu"), place)
    if not b:
        return []
    ours = b["real_time"] * {"ns": 1e-6, "us": 1e-3, "ms": 1.0}[b["time_unit"]]
    at = lambda p: (p.get("B"), p.get("T"), p.get("H"), p.get("D")) == (4, 8192, 16, 128)
    peer = next((p for p in peers_of("linear") if at(p)), {})
    work = "linear attention, elu + 1 and normaliser, forward and backward, B4 T8192 H16 D128"
    return [faster(work, ours, peer, peer.get("forward_backward_ms"), "ms", "1.6 ms", inverse=True)]


def gpu_decoding():
    rows, peers = benchmark("decode", "gpu"), {p["new_tokens"]: p for p in peers_of("decode") if "ms" in p}
    step = {n: find(rows, rf"gpu_decode/gpt2_124m/rows:{n}/") for n in (1, 32)}
    if not all(step.values()):
        return []
    ours = {n: b["real_time"] for n, b in step.items()}
    one, many = peers.get(1, {}), peers.get(32, {})
    table = [faster("plain decoding, 124M, batch 1", ours[1], one, one.get("ms"), "ms", "0.30 ms", inverse=True)]
    work, own = "verification of 32 tree nodes, 124M", f"1.3 x the plain step; is {ours[32] / ours[1]:.2f}"
    return table + [faster(work, ours[32], many, many.get("ms"), "ms", own, inverse=True)]


def gpu_proofs():
    table = []
    older = lambda result: f" ({result['older']})" if "older" in result else ""  # what ran before the latest changes
    parity, sanitized = read("gpu_parity.json"), read("gpu_sanitize.json")
    if parity:
        gpus = f"{parity['gpus']} GPU{'s' * (parity['gpus'] > 1)}"
        passed = f"{parity['passed']} passed, {parity['skipped']} skipped, {len(parity['failed'])} failed{older(parity)}"
        table.append((f"tests that need a GPU, on {gpus}", passed, "", "", "none fails"))
    if sanitized:
        tools = sanitized["tools"]
        found = ", ".join(f"{n} {t['errors'] + t['of_the_host']} in {t['tests']} tests" for n, t in tools.items())
        for what, said in (("failed", "failed"), ("not_ended", "not ended in time")):
            parts = ", ".join(f"{n} {len(tool[what])}" for n, tool in tools.items() if tool[what])
            found += f"; {said}: {parts}" * (parts != "")
        unseen = ", ".join(f"{n} {t['not_printed']:,}" for n, t in tools.items() if t["not_printed"])
        found += f"; not printed, and so of no known kernel: {unseen}" * (unseen != "") + older(sanitized)
        theirs = ", ".join(name for name, tool in tools.items() if tool["in_libraries"])
        cell = f"inside the libraries' own kernels: {theirs}" if theirs else ""
        table.append(("errors of our kernels under compute-sanitizer", found, cell, "", "0"))
    losses, precision = read("gpu_losses.json"), read("gpu_precision.json")
    if losses:
        work = f"losses of {losses['steps']} steps from PyTorch's weights, largest relative difference"
        found = ", ".join(f"{p} {d:.1e}" for p, d in losses["largest_relative_difference"].items())
        torch = losses["peer_versions"]["torch"].split("+")[0]
        half, full = losses["peer"]["fp16"], losses["peer"]["fp32"]
        own = max(abs(a / b - 1) for a, b in zip(half, full))
        allowed = ", ".join(f"{p} {d:.1e}" for p, d in losses["allowed"].items())
        table.append((work, found, f"PyTorch {torch}, its own fp16 beside its fp32: {own:.1e}", "", allowed))
    if precision:
        tokens = precision["curves"]["fp32"]["tokens"][-1]
        half, full = (precision[p]["loss"] for p in ("fp16", "fp32"))
        work = f"loss after {tokens / 1e6:.1f}M tokens, fp16 with dynamic scaling"
        table.append((work, f"{half:.4f}", f"fp32: {full:.4f}", f"{half / full:.4f}x", "within 1%"))
    return table


def render_gpu():
    rows = gpu_training() + gpu_memory() + gpu_linear_attention() + gpu_decoding() + gpu_proofs()
    name = "124M on Python sources"
    two_gpus = speculation("gpu_real_2", f"{name}, stopped on one GPU and finished on two")[:1]
    rows += [(*row, "", "") for row in two_gpus + speculation("gpu_real_1", name)]
    if not rows:
        return []
    contexts = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("gpu_*.json"))]
    names = {c.get("device") or c.get("context", {}).get("gpu") for c in contexts}
    lines = ["", "| on a GPU | Foretell | peer in the same run | ratio | asked for |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return lines + ["", "GPU: " + "; ".join(sorted(names - {None, "unknown"})) + "."]


def render():
    devices = [json.loads(p.read_text())["context"] for p in sorted(RESULTS.glob("cpu_*.json"))]
    lines = ["| what | Foretell | beside it |", "|---|---|---|"]
    rows = training(benchmark("train_step")) + decoding(benchmark("linear")) + attention(benchmark("attention"))
    rows += speculation("quickstart", "quickstart")
    lines += [f"| {a} | {b} | {c} |" for a, b, c in rows]
    names = sorted({d.get("device", d.get("host_name", "")) for d in devices} - {""})
    if names:
        lines += ["", "Measured on: " + "; ".join(names) + "."]
    return "\n".join(lines + render_gpu()) + "\n"


def main():
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, rest = text.split(BEGIN)
    wanted = head + BEGIN + render() + END + rest.split(END)[1]
    if "--check" in sys.argv[1:]:
        if wanted != text:
            sys.exit("README.md: the figures are not those of tests/bench/results; run tests/bench/figures.py")
    else:
        readme.write_text(wanted)


if __name__ == "__main__":
    main()
