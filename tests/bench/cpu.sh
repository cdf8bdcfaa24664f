#!/bin/bash
# Runs every CPU benchmark and its peer, one after the other on an otherwise idle machine, and writes
# tests/bench/results/cpu_*.json. The PyTorch peer needs a Python with torch: PYTHON=/path/to/python tests/bench/cpu.sh
# CORES=0,3 pins it to other cores than the first. Name parts to run only these: linear attention train peer quickstart.
set -euo pipefail
cd "$(dirname "$0")/../.."
source launch/mpi_env.sh
results=tests/bench/results
python=${PYTHON:-python3}
threads=${THREADS:-2}
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(linear attention train peer quickstart)
mkdir -p "$results"

wanted() { [[ " ${parts[*]} " == *" $1 "* ]]; }
# Two cores, as the quickstart is sized for; the same ones for the peer.
on_cores() { taskset -c "${CORES:-0-$((threads - 1))}" "$@"; }

cmake --preset release -DFORETELL_BENCHMARKS=ON >/dev/null
cmake --build --preset release
for name in linear attention; do
  wanted $name || continue
  echo "== $name"
  on_cores build/tests/bench/${name}_bench --benchmark_out="$results/cpu_$name.json" --benchmark_out_format=json
done
if wanted train; then
  echo "== training step"
  on_cores build/tests/bench/train_step_bench --benchmark_out="$results/cpu_train_step.json" --benchmark_out_format=json
fi
if wanted peer; then
  echo "== training step, PyTorch"
  for n in 1 "$threads"; do on_cores "$python" tests/bench/peers/pytorch_train.py --attention softmax,linear --kv-heads 2 --threads "$n"; done |
    tee "$results/cpu_train_step_pytorch.jsonl"
fi
if wanted quickstart; then
  echo "== the quickstart's report"
  on_cores build/foretell evaluate runs/quickstart --output "$results/quickstart"
  rm -f "$results/quickstart/report.html"
fi
