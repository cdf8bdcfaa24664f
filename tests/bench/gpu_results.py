#!/usr/bin/env python3
"""What gpu.sh needs to turn the output of programs into results: each command writes or checks one JSON file.

    gpu_results.py text OUT ROOT...              Python sources below ROOTs: OUT/train, OUT/held_out, OUT/joined
    gpu_results.py benchmark FILE                a google-benchmark result holds figures, and names its GPU
    gpu_results.py tests OUT NAME=FILE...        the JSON reports of test programs
    gpu_results.py sanitizers OUT NAME=LOG...    the logs of compute-sanitizer
    gpu_results.py scaling OUT RUNS PEER         each GPU, both, both with ZeRO, and the same steps on one; the peer
    gpu_results.py losses OUT FP16 FP32 PEER     losses of two runs beside the peer's
    gpu_results.py precision OUT FP16 FP32       two runs on the same tokens
    gpu_results.py curve OUT METRICS             a run's curve, in a few hundred points

Exit code 1 when what it reads is not what must be, with a line that says so; the file is written all the same.
"""

import json
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import zlib


def gpus():
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return {"device": "unknown", "gpus": 0}
    name, driver = lines[0].split(", ")
    return {"device": name, "gpus": len(lines), "driver": driver}


def write(path, result):
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in {**gpus(), **result}.items()]
    pathlib.Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def finish(summary, problems):
    print(f"{summary}{': ' + '; '.join(problems) if problems else ''}")
    return 1 if problems else 0


def text(out, *roots):
    """Packages whose name's checksum is a multiple of 16 are held out whole. joined/ is the text of train/ in files of
    a megabyte, so that nearly every sample is as long as the context."""
    out = pathlib.Path(out)
    shutil.rmtree(out, ignore_errors=True)
    sizes = {"train": 0, "held_out": 0}
    joined, part = bytearray(), 0
    (out / "joined").mkdir(parents=True)
    for root in map(pathlib.Path, roots):
        for source in sorted(root.rglob("*.py")):
            package = source.relative_to(root).parts[0]
            if source.is_symlink() or package in ("site-packages", "dist-packages") or not 200 <= source.stat().st_size <= 1 << 20:
                continue
            split = "train" if zlib.crc32(package.encode()) % 16 else "held_out"
            content = source.read_bytes()
            target = out / split / root.name / source.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            sizes[split] += len(content)
            if split == "held_out":
                continue
            joined += content
            if len(joined) > 1 << 20:
                (out / "joined" / f"{part:05}.py").write_bytes(joined)
                joined, part = bytearray(), part + 1
    (out / "joined" / f"{part:05}.py").write_bytes(joined)
    if not all(sizes.values()):
        return finish(f"Python sources below {', '.join(roots)}", ["none to train on or none to hold out"])
    return finish(", ".join(f"{name}: {size / 1e6:.1f} MB of Python" for name, size in sizes.items()), [])


def benchmark(path):
    result = json.loads(pathlib.Path(path).read_text())
    found = gpus()
    result["context"] = {"gpu": found["device"], "driver": found.get("driver"), **result["context"]}
    for gone in ("executable", "host_name", "load_avg"):
        result["context"].pop(gone, None)
    pathlib.Path(path).write_text(json.dumps(result, indent=1) + "\n")
    rows = [b for b in result["benchmarks"] if b.get("run_type") != "aggregate"]
    problems = sorted({f"{b['name']}: {b['error_message']}" for b in rows if b.get("error_occurred")})
    return finish(f"{path}: {len(rows)} figures", problems or ([] if rows else ["nothing was measured"]))


def pairs(arguments):
    return [argument.split("=", 1) for argument in arguments]


def tests(out, *reports):
    programs, problems = {}, []
    for name, path in pairs(reports):
        if not pathlib.Path(path).exists():
            problems.append(f"{name} ended without a report")
            continue
        report = json.loads(pathlib.Path(path).read_text())
        every = [t for suite in report["testsuites"] for t in suite["testsuite"]]
        count = lambda result: sum(t["result"] == result for t in every)
        programs[name] = {"passed": count("COMPLETED") - report["failures"], "skipped": count("SKIPPED")}
        programs[name]["failed"] = [f"{t['classname']}.{t['name']}" for t in every if t.get("failures")]
        programs[name]["seconds"] = float(report["time"].rstrip("s"))
        problems += programs[name]["failed"]
    passed, skipped = (sum(p[key] for p in programs.values()) for key in ("passed", "skipped"))
    if not passed and not problems:
        problems.append("no test ran")
    write(out, {"programs": programs, "passed": passed, "skipped": skipped, "failed": problems})
    return finish(f"{passed} CUDA tests passed, {skipped} skipped, {len(problems)} failed", problems)


def sanitizers(out, *logs):
    """Errors by the kernel that they are in: only those of the namespace kernels::cuda are ours; what the host did is
    ours too, but for memory refused, which a test asks for. `not_printed` came behind the tool's limit. A log ends with
    the names of the tests that it is of; several may be of the same."""
    tools, asked, ended, problems = {}, {}, {}, []
    for name, path in pairs(logs):
        content = pathlib.Path(path).read_text(errors="replace")
        tool = tools.setdefault(name, {"tests": 0, "failed": [], "not_ended": [], "errors": 0, "of_the_host": 0,
                                       "warnings": 0, "not_printed": 0, "in_libraries": {}})
        of = lambda result: set(re.findall(rf"^\[ +{result} +\] ([^ ,]+).* \(\d+ ms\)$", content, re.M))
        asked.setdefault(name, set()).update(re.findall(r"^asked for: (.+)$", content, re.M)[-1].split(":"))
        ended.setdefault(name, set()).update(of("OK") | of("SKIPPED"))
        tool["failed"] = sorted({*tool["failed"], *of("FAILED")})
        tool["tests"] = len(ended[name])
        tool["not_ended"] = sorted(asked[name] - ended[name] - {*tool["failed"]})
        printed = re.findall(r"^=========     at (.+)|^========= Error: Race reported between \w+ access at (.+)", content, re.M)
        printed = [a or b for a, b in printed]
        for place in (re.sub(r"^void |[<+(].*", "", p) or p for p in printed):
            if "kernels::cuda" in place:
                tool["errors"] += 1
            else:
                tool["in_libraries"][place] = tool["in_libraries"].get(place, 0) + 1
        calls = re.findall(r"========= Program hit (\w+)", content)
        host = content.count("========= Host API memory access error")
        tool["of_the_host"] += host + len(calls) - calls.count("cudaErrorMemoryAllocation")
        tool["warnings"] += content.count("========= Warning: Race")
        found = re.findall(r"ERROR SUMMARY: ([\d,]+) error|RACECHECK SUMMARY: [\d,]+ hazards? displayed \(([\d,]+) error", content)
        counted = sum(int((x or y).replace(",", "")) for x, y in found)
        tool["not_printed"] += max(counted - len(printed) - host - len(calls), 0)
    for name, tool in tools.items():
        for what in ("errors", "of_the_host", "not_printed", "failed", "not_ended"):
            if tool[what]:
                problems.append(f"{name}: {what.replace('_', ' ')}: {tool[what]}")
        if not tool["tests"]:
            problems.append(f"{name}: no test passed")
    write(out, {"tools": tools, "problems": problems})
    return finish("compute-sanitizer, " + ", ".join(f"{n}: {t['tests']} tests" for n, t in tools.items()), problems)


def lines_of(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def steps_of(path):
    return [line for line in lines_of(path) if "loss" in line]


def furthest(a, b):
    """Largest relative difference between two curves."""
    return max(abs(x - y) / abs(y) for x, y in zip(a, b))


def speed(steps):
    timed = steps[max(1, len(steps) // 4) :]
    return (timed[-1]["tokens"] - timed[0]["tokens"]) / sum(s["step_ms"] for s in timed[1:]) * 1e3


def scaling(out, runs, peer):
    """Ranks add the same micro-batches' gradients in another order: FP32 rounding, which 20 steps of FP16 training
    make no larger than FP16's own 2^-10. GPUs of one kind differ in what their power allows, and two that wait for
    each other go as fast as the slower: that one alone, before and after, is what both are compared with, ours and the
    peer's. `both` is the preset, whose optimizer is sharded; `replicated` is not."""
    names = ("one_0", "one_1", "again_0", "again_1", "both", "replicated", "same")
    steps = {name: steps_of(f"{runs}/{name}/metrics.jsonl") for name in names}
    speeds = {name: speed(steps[name]) for name in names[:-1]}
    result = {"tokens_per_second": {name: round(value) for name, value in speeds.items()}}
    slower = min(speeds[f"one_{gpu}"] + speeds[f"again_{gpu}"] for gpu in (0, 1)) / 2
    result["scaling"] = round(speeds["both"] / slower, 4)
    result["replicated_scaling"] = round(speeds["replicated"] / slower, 4)
    same = [s["loss"] for s in steps["same"]]
    result["difference_to_one_rank"] = {n: furthest([s["loss"] for s in steps[n]], same) for n in ("both", "replicated")}
    rows = [row for row in lines_of(peer) if "tokens_per_second" in row]
    alone = [row["tokens_per_second"] for row in rows if row["gpus"] == 1]  # twice, each time in any order
    both = [row for row in rows if row["gpus"] == 2]
    if alone and both:
        result["peer"] = {"engine": both[0]["engine"], "versions": both[0]["versions"]}
        result["peer"]["tokens_per_second"] = [*alone, both[0]["tokens_per_second"]]
        slower = sum(min(pair) for pair in (alone[:2], alone[2:]) if pair) / len(alone) * 2
        result["peer"]["scaling"] = round(both[0]["tokens_per_second"] / slower, 4)
    write(out, result)
    differences = result["difference_to_one_rank"]
    problems = [f"{n}: the loss differs by {d:.2e} from one rank's" for n, d in differences.items() if d > 2**-10]
    if "peer" not in result:
        problems.append("the peer did not run")
    said = ", ".join(f"{name} {value:,.0f}" for name, value in speeds.items())
    return finish(f"two GPUs: {result['scaling']:.3f} x the slower of them alone; tokens/s: {said}", problems)


def losses(out, half, full, peer):
    """Two FP32 runs differ by the order of sums alone, 1e-7 in a loss, which some fifty updates carry further: by 0.1% at
    the most. FP16 stays within 1% of FP32, as in training: ours of the peer's, which no skipped step shifts. Two FP16
    runs may differ by twice what the peer's own two differ by, since two roundings meet."""
    ours = {"fp16": [s["loss"] for s in steps_of(half)], "fp32": [s["loss"] for s in steps_of(full)]}
    rows = lines_of(peer)
    theirs = {row["precision"]: row["losses"] for row in rows}
    count = min(map(len, [*ours.values(), *theirs.values()]))
    own = furthest(theirs["fp16"][:count], theirs["fp32"][:count])
    allowed = {"fp16": max(2 * own, 1e-3), "fp32": 1e-3, "fp16 beside fp32": 1e-2}
    differences = {p: furthest(ours[p][:count], theirs[p][:count]) for p in ours}
    differences["fp16 beside fp32"] = furthest(ours["fp16"][:count], theirs["fp32"][:count])
    skipped = [s["step"] for s in steps_of(half) if s["skipped"]]
    result = {"steps": count, "allowed": allowed, "largest_relative_difference": differences, "skipped": skipped}
    write(out, {**result, "ours": ours, "peer": theirs, "peer_versions": rows[0]["versions"]})
    problems = [f"{p} differs by {d:.2e}, allowed {allowed[p]:.2e}" for p, d in differences.items() if d > allowed[p]]
    said = ", ".join(f"{p} {d:.2e}" for p, d in differences.items())
    return finish(f"{count} steps, largest relative difference of the loss to PyTorch: {said}", problems)


def validation(path):
    return [line["validation_loss"] for line in lines_of(path) if "validation_loss" in line]


def thinned(path, most=300):
    """Points of a curve, each the mean over as many steps; what was found in validation as it is."""
    steps = steps_of(path)
    width = -(-len(steps) // most)
    groups = [steps[i : i + width] for i in range(0, len(steps), width)]
    mean = lambda group, key: round(statistics.fmean(s[key] for s in group), 5)
    return {
        "steps": len(steps),
        "steps_per_point": width,
        "tokens": [g[-1]["tokens"] for g in groups],
        "loss": [mean(g, "loss") for g in groups],
        "grad_norm": [mean([s for s in g if not s["skipped"]] or g, "grad_norm") for g in groups],
        "loss_scale": [g[-1]["loss_scale"] for g in groups],
        "skipped": sum(s["skipped"] for s in steps),
        "tokens_per_second": round(statistics.median(s["tokens_per_second"] for s in steps)),
        "validation": [line for line in lines_of(path) if "validation_loss" in line],
    }


def precision(out, half, full):
    ends = []
    for path in (half, full):
        last = [s["loss"] for s in steps_of(path)][-20:]
        ends.append({"loss": statistics.fmean(last), "validation_loss": (validation(path) or [None])[-1]})
    differences = {
        key: abs(ends[0][key] - ends[1][key]) / ends[1][key] for key in ends[0] if None not in (ends[0][key], ends[1][key])
    }
    result = {"fp16": ends[0], "fp32": ends[1], "relative_difference": differences}
    write(out, {**result, "curves": {"fp16": thinned(half), "fp32": thinned(full)}})
    problems = [f"{key} differs by {d:.2%}, allowed 1%" for key, d in differences.items() if d > 0.01]
    tokens = steps_of(full)[-1]["tokens"]
    said = ", ".join(f"{key} {d:.3%}" for key, d in differences.items())
    return finish(f"fp16 beside fp32 after {tokens / 1e6:.1f}M tokens, relative difference: {said}", problems)


def curve(out, metrics):
    points = thinned(metrics)
    write(out, points)
    found = validation(metrics)
    said = f", validation loss {found[-1]:.3f}" if found else ""
    return finish(f"{points['steps']} steps, loss {points['loss'][0]:.3f} to {points['loss'][-1]:.3f}{said}", [])


COMMANDS = {f.__name__: f for f in (text, benchmark, tests, sanitizers, scaling, losses, precision, curve)}

if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    sys.exit(COMMANDS[sys.argv[1]](*sys.argv[2:]))
