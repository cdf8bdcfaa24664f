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


def benchmark(name):
    """{benchmark name: its fields} of a google-benchmark result, medians where runs were repeated."""
    path = RESULTS / f"cpu_{name}.json"
    if not path.exists():
        return {}
    rows = {}
    for b in json.loads(path.read_text())["benchmarks"]:
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


def speculation():
    path = RESULTS / "quickstart" / "report.json"
    if not path.exists():
        return []
    report = json.loads(path.read_text())
    table = [("quickstart, validation bits per byte", f"{report['validation_bits_per_byte']:.2f}",
              "n-gram models of the same text: " + ", ".join(anchors(report)))]
    for r in report["results"]:
        if r["drafter"] in ("plain", "none"):
            continue
        table.append((f"quickstart, {r['drafter']} ({r['shape']}), {r['acceptance']}, temperature {r['temperature']:g}",
                      f"{r['speedup']:.2f}x plain, {r['mean_accepted_length']:.2f} tokens a step",
                      f"plain: {report['baseline']['tokens_per_second']:,.0f} tokens/s; distinct-4 {r['distinct_4']:.2f}"))
    return table


def anchors(report):
    return [f"{a['model']} {a['bits_per_byte']:.2f}" for a in report.get("anchors", [])]


def render():
    devices = [json.loads(p.read_text())["context"] for p in sorted(RESULTS.glob("cpu_*.json"))]
    lines = ["| what | Foretell | beside it |", "|---|---|---|"]
    rows = training(benchmark("train_step")) + decoding(benchmark("linear")) + attention(benchmark("attention")) + speculation()
    lines += [f"| {a} | {b} | {c} |" for a, b, c in rows]
    names = sorted({d.get("device", d.get("host_name", "")) for d in devices} - {""})
    if names:
        lines += ["", "Measured on: " + "; ".join(names) + "."]
    return "\n".join(lines) + "\n"


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
