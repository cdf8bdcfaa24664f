#!/bin/bash
# gpu.sh [PART...]: everything that is proven and measured on a GPU, with its peers, on an otherwise idle machine.
#   parity         the tests that need a GPU                 sanitize      the same of the operations under compute-sanitizer
#   gemm attention linear elementwise                        operations, beside PyTorch and flash-linear-attention
#   train_124m train_1558m linear_124m decode                steps of the presets, beside the same
#   two            tests and training on two GPUs            losses        50 steps from PyTorch's weights, beside PyTorch
#   text           prepares the text that the following read
#   precision      fp16 with dynamic scaling beside fp32     real          the Python sources of this host: train, stop,
#                                                                          resume on the other number of GPUs, evaluate
# Without names all of them (`two` where there are two GPUs). Each writes tests/bench/results/gpu_*.json and says what it
# found; one that fails does not stop the others, and is named at the end (exit code 1). Environment:
#   SHORT=1      small sizes: every part in a minute or two      RESULTS     folder of the results
#   BUILD        a ready build; otherwise one is made in build-gpu      WORK   folder for data and runs (build-gpu-work)
#   PYTHON       a Python with torch and CUDA (python3); the linear peers need flash-linear-attention
#   VOCABULARY TOKENIZER     of the prepared text: a size (50304), or a SentencePiece model instead of training one
#   TEXT         folders of Python sources; MAX_BYTES of them      STEPS REPEATS    timed steps of peers, repeats of ours
#   SANITIZE     which tests (a gtest filter)      SANITIZE_SECONDS      longest time of one tool
#   SANITIZE_TOOLS    memcheck synccheck initcheck racecheck      SANITIZE_JOBS SANITIZE_BATCH    at a time; tests of one
#   LOSS_STEPS LOSS_BATCH PRECISION_TOKENS PRECISION_GPUS REAL_SECONDS REAL_CONTEXT REAL_BATCH
set -uo pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")/../.."
source launch/mpi_env.sh

short=${SHORT:-0}
sized() { if [ "$short" != 0 ]; then echo "$2"; else echo "$1"; fi; }
results=$(realpath -m "${RESULTS:-tests/bench/results}")
work=$(realpath -m "${WORK:-build-gpu-work}")
python=${PYTHON:-python3}
steps=${STEPS:-$(sized 30 10)}
repeats=${REPEATS:-$(sized 3 1)}
mkdir -p "$results" "$work"
peers_libraries=${LD_LIBRARY_PATH:-}

if [ "$(nvidia-smi -L 2>/dev/null | wc -l)" -eq 0 ]; then
  echo "gpu.sh: nvidia-smi shows no GPU here" >&2
  exit 2
fi
if [ -z "${BUILD:-}" ]; then
  BUILD=build-gpu
  cmake --preset test -B $BUILD -DFORETELL_BENCHMARKS=ON -DFORETELL_CUDA=ON >/dev/null && cmake --build $BUILD || exit 1
fi
BUILD=$(realpath "$BUILD")
if [ -d "$BUILD/lib" ]; then export LD_LIBRARY_PATH=$BUILD/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}; fi

program() {
  local found
  found=$(find "$BUILD" -name "$1" -type f -perm -u+x -print -quit)
  [ -n "$found" ] || echo "no program $1 in $BUILD: build with FORETELL_TESTS, FORETELL_BENCHMARKS and FORETELL_CUDA" >&2
  echo "$found"
}
result() { "$python" tests/bench/gpu_results.py "$@"; }
gpu_count() { nvidia-smi -L | wc -l; }
# peer OUT SECTION [OPTION...]: adds lines to OUT. A peer that cannot run fails the part, but only at its end.
peer() {
  local out=$1 start=(env "LD_LIBRARY_PATH=$peers_libraries" "$python") said
  shift
  said=$(mktemp "$work/peer.XXXXXX")  # parts may run beside each other, each on GPUs of its own
  [ -z "${PEER_GPUS:-}" ] || start+=(-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node "$PEER_GPUS")
  if ! "${start[@]}" tests/bench/peers/pytorch_gpu.py "$@" >"$said" 2>"$said.err"; then
    tail -n 3 "$said.err"
    missing_peer=$1
  fi
  sed -n '/^{/p' "$said" >>"$out"
  cut -c 1-300 "$said"
}
# bench NAME PROGRAM FILTER: google-benchmark into gpu_NAME.json
bench() {
  local tool
  tool=$(program "$2")
  [ -n "$tool" ]
  "$tool" --benchmark_filter="$3" --benchmark_out="$results/gpu_$1.json" --benchmark_out_format=json \
    --benchmark_repetitions="$repeats"
  result benchmark "$results/gpu_$1.json"
}
fresh() { rm -f "$results/gpu_$1_pytorch.jsonl"; echo "$results/gpu_$1_pytorch.jsonl"; }
foretell() { "$(program foretell)" "$@"; }
# settings RUN CONFIG KEY=VALUE...: the arguments of a training, in `arguments`.
settings() {
  arguments=(train "configs/presets/$2.cfg" --set log.run="$1" --set log.every=50 --set train.device=cuda)
  shift 2
  local setting
  for setting in "$@"; do arguments+=(--set "$setting"); done
}
on_gpus() {
  local ranks=$1 tool
  shift
  tool=$(program foretell)
  if [ "$ranks" -gt 1 ]; then mpirun --bind-to none -np "$ranks" "$tool" "$@"; else "$tool" "$@"; fi
}
# on_gpu N COMMAND...: with the N-th GPU alone.
on_gpu() {
  local all=(0 1) n=$1
  shift
  [ -z "${CUDA_VISIBLE_DEVICES:-}" ] || IFS=, read -ra all <<<"$CUDA_VISIBLE_DEVICES"
  CUDA_VISIBLE_DEVICES=${all[n]} "$@"
}
# train GPUS RUN CONFIG KEY=VALUE...: a run from its beginning.
train() {
  local ranks=$1
  shift
  settings "$@"
  rm -rf "$1"
  on_gpus "$ranks" "${arguments[@]}"
}

# Text: the Python sources of this host, as files and joined into long ones, with one tokenizer.
prepare() {
  local roots=() tokenizer=${TOKENIZER:-sentencepiece:${VOCABULARY:-50304}} most=${MAX_BYTES:-$(sized 0 60000000)}
  [ -f "$work/joined/dataset.json" ] && return
  if [ -n "${TEXT:-}" ]; then read -ra roots <<<"$TEXT"; else
    mapfile -t roots < <("$python" -c 'from sysconfig import get_path as p; print(p("purelib"), p("stdlib"), sep="\n")')
  fi
  result text "$work/text" "${roots[@]}"
  foretell prepare --input "$work/text/train" --validation-input "$work/text/held_out" --tokenizer "$tokenizer" \
    --max-bytes "$most" --output "$work/files" --overwrite
  foretell prepare --input "$work/text/joined" --val-fraction 0.02 --tokenizer "$work/files" --max-bytes "$most" \
    --output "$work/joined" --overwrite
}

part_text() { prepare; }

part_parity() {
  local reports=() name tool
  for name in kernels comm checkpoints trainer launch; do
    tool=$(program ${name}_test)
    [ -n "$tool" ] || continue
    [ "$("$tool" --gtest_list_tests --gtest_filter='*Cuda*' | grep -c '^  ')" -gt 0 ] || continue
    "$tool" --gtest_filter='*Cuda*' --gtest_brief=1 --gtest_output=json:"$work/$name.json" | tail -n 40 || true
    reports+=("$name=$work/$name.json")
  done
  result tests "$results/gpu_parity.json" "${reports[@]}"
}

# sanitize_one TOOL N TESTS: some tests in a process of their own, so that one that ends badly takes no other with it.
sanitize_one() {
  local left=$((SANITIZE_END - $(date +%s))) only=()
  # Errors of our kernels. The libraries' own fail too: cuDNN's backward stops threads at a barrier that others have
  # left, cuBLASLt's aligned products end with an illegal access under racecheck alone. The other tools have to see
  # what the libraries write.
  case $1 in racecheck | synccheck) only=(--kernel-name kns=kernels4cuda) ;; esac
  if [ "$left" -gt 0 ]; then
    timeout "$left" compute-sanitizer --tool "$1" --print-limit 1000000 --show-backtrace device "${only[@]}" "$SANITIZED" --gtest_filter="$3"
  fi >"$work/sanitize/$1.$2.log" 2>&1
  echo "asked for: $3" >>"$work/sanitize/$1.$2.log"
}

# sanitize_batches TOOL: its tests, as TOOL NUMBER TESTS. Those of decoding come last: they are thousands of launches.
sanitize_batches() {
  local filter=${SANITIZE:-*Cuda*}
  # Under racecheck these end with the library's illegal access even where it is not looked at.
  if [ "$1" = racecheck ]; then
    filter+=":-CudaLinear.*:CudaSoftmax.*:*/linear_add*:*/linear_gelu*:*/linear_aligned*:*/linear_bias*"
  fi
  "$SANITIZED" --gtest_list_tests --gtest_filter="$filter" |
    awk '/^[^ ]/ { suite = $1; next } /^  / { print suite ~ /Decode|Rows|Speculation/, suite $1 }' | sort -s -n -k1,1 |
    awk -v tool="$1" -v most="${SANITIZE_BATCH:-4}" '
      { tests = tests (n ? ":" : "") $2; if (++n == most) { print tool, ++batch, tests; n = 0; tests = "" } }
      END { if (n) print tool, ++batch, tests }'
}

part_sanitize() {
  local tool logs=() log
  SANITIZED=$(program kernels_test)
  [ -n "$SANITIZED" ]
  export work SANITIZED SANITIZE_END
  export -f sanitize_one
  rm -rf "$work/sanitize" && mkdir "$work/sanitize"
  # One tool after another: beside kernels under racecheck or initcheck all others wait.
  for tool in ${SANITIZE_TOOLS:-memcheck synccheck initcheck racecheck}; do
    SANITIZE_END=$(($(date +%s) + ${SANITIZE_SECONDS:-$(sized 3000 240)}))
    sanitize_batches "$tool" | xargs -P "${SANITIZE_JOBS:-$(($(nproc) / 2))}" -L 1 bash -c 'sanitize_one "$@"' sanitize_one
  done
  for log in "$work"/sanitize/*.log; do logs+=("$(basename "${log%%.*}")=$log"); done
  result sanitizers "$results/gpu_sanitize.json" "${logs[@]}"
}

part_gemm() {
  peer "$(fresh gemm)" gemm
  bench gemm gpu_linear_bench "${FILTER:-.}"
}

part_attention() {
  peer "$(fresh attention)" attention --shapes 32x1024x12x64,16x1024x12x64,4x8192x16x128
  bench attention gpu_attention_bench "${FILTER:-.}"
}

part_linear() {
  peer "$(fresh linear)" linear_op --shapes 4x8192x16x128,16x1024x12x64,1x32768x16x128
  bench linear gpu_linear_attention_bench "${FILTER:-.}"
}

part_elementwise() {
  bench elementwise '*elementwise_bench' "${FILTER:-.}"
}

part_train_124m() {
  peer "$(fresh train_124m)" train --steps "$steps"
  bench train_124m train_step_bench gpu_step/gpt2_124m
}

part_train_1558m() {
  peer "$(fresh train_1558m)" train --layers 48 --width 1600 --heads 25 --batch 16 --lr 2e-4 --steps "$steps"
  bench train_1558m train_step_bench gpu_step/gpt2_1558m
}

part_linear_124m() {
  local out
  out=$(fresh linear_124m)
  peer "$out" linear_train --batch 4 --context 8192 --steps "$steps"
  peer "$out" train --batch 4 --context 8192 --steps "$steps"
  bench linear_124m train_step_bench gpu_step/linear_124m
}

part_decode() {
  peer "$(fresh decode)" decode --steps "$steps"
  bench decode gpu_decode_bench "${FILTER:-.}"
}

part_two() {
  local out count comm set gpu
  count=$(gpu_count)
  if [ "$count" -lt 2 ]; then
    echo "needs two GPUs, here is $count"
    return 1
  fi
  comm=$(program comm_test)
  [ -n "$comm" ]
  "$comm" --gtest_filter='*Cuda*' --gtest_brief=1
  prepare
  set=(data.path="$work/joined" train.micro_batch=32 train.steps="$(sized 200 60)" optim.warmup=20 optim.schedule=constant
    train.validate_every=0 checkpoint.every=0)
  # Each GPU alone, both at once: they are not equally fast, and share the host and its cooling in what follows too.
  # Before and after what they do together: chips grow warmer, and slower.
  alone() { for gpu in 0 1; do on_gpu $gpu train 1 "$work/two/$1_$gpu" gpt2_124m "${set[@]}" train.batch=32 & done; wait; }
  alone_peer() { for gpu in 0 1; do on_gpu $gpu peer "$out" train --steps "$steps" & done; wait; }
  alone one
  train 2 "$work/two/both" gpt2_124m "${set[@]}" train.batch=64
  train 2 "$work/two/replicated" gpt2_124m "${set[@]}" train.batch=64 comm.zero=0
  alone again
  # The same steps as both GPUs made, on one.
  train 1 "$work/two/same" gpt2_124m "${set[@]}" train.batch=64 train.steps=20
  out=$(fresh two)
  alone_peer
  PEER_GPUS=2 peer "$out" train --steps "$steps"
  alone_peer
  result scaling "$results/gpu_two.json" "$work/two" "$out"
}

part_losses() {
  local count=${LOSS_STEPS:-50} batch=${LOSS_BATCH:-$(sized 32 8)} compute out folder=$work/losses set vocabulary
  prepare
  mkdir -p "$folder"
  vocabulary=$("$python" -c 'import json, sys; print(json.load(sys.stdin)["tokenizer"]["vocabulary"])' <"$work/joined/dataset.json")
  set=(data.path="$work/joined" train.steps="$count" train.batch="$batch" train.micro_batch="$batch" optim.warmup=10
    optim.schedule=constant train.validate_every=0 checkpoint.every=0)
  peer /dev/null weights --vocabulary "$vocabulary" --weights "$folder/weights.safetensors"
  "$(program step_batches)" configs/presets/gpt2_124m.cfg "$folder/batches.bin" "$count" "${set[@]}"
  for compute in fp16 fp32; do
    train 1 "$folder/$compute" gpt2_124m "${set[@]}" train.init_from="$folder/weights.safetensors" \
      precision.compute=$compute
  done
  out=$(fresh losses)
  peer "$out" losses --vocabulary "$vocabulary" --weights "$folder/weights.safetensors" --batches "$folder/batches.bin" \
    --batch "$batch" --steps "$count"
  result losses "$results/gpu_losses.json" "$folder/fp16/metrics.jsonl" "$folder/fp32/metrics.jsonl" "$out"
  rm -f "$out"
}

part_precision() {
  local tokens=${PRECISION_TOKENS:-$(sized 16777216 1048576)} compute count gpus=${PRECISION_GPUS:-1}
  prepare
  count=$((tokens / 32 / 1024))
  for compute in fp16 fp32; do
    train "$gpus" "$work/precision_$compute" gpt2_124m data.path="$work/joined" precision.compute=$compute \
      train.micro_batch=$((32 / gpus)) train.steps=$count optim.warmup=$((count / 10 + 1)) \
      train.validate_every=$((count / 4 + 1)) checkpoint.every=0
  done
  result precision "$results/gpu_precision.json" "$work/precision_fp16/metrics.jsonl" "$work/precision_fp32/metrics.jsonl"
}

# How many steps fit into REAL_SECONDS, from a short run.
real_steps() {
  train 1 "$work/real_probe" linear_124m "$@" train.steps=30 optim.warmup=10 train.validate_every=0 \
    checkpoint.every=0 >"$work/probe.log"
  "$python" - "$work/real_probe/metrics.jsonl" "${REAL_SECONDS:-$(sized 300 40)}" <<'END'
import json, statistics, sys
times = [line["step_ms"] for line in map(json.loads, open(sys.argv[1])) if "step_ms" in line][10:]
print(max(100, int(float(sys.argv[2]) * 1e3 / statistics.fmean(times))))
END
  rm -rf "$work/real_probe"
}

# The first half, then the run is asked to stop; its exit code.
first_half() {
  local metrics=$1/metrics.jsonl half=$2 pid done=0
  "$(program foretell)" "${arguments[@]}" &
  pid=$!
  while kill -0 $pid 2>/dev/null && [ "${done:-0}" -lt "$half" ]; do
    sleep 0.5
    done=$(grep -cs '"loss"' "$metrics")
  done
  kill -USR1 $pid 2>/dev/null
  wait $pid
}

part_real() {
  local run=$work/real batch=${REAL_BATCH:-16} context=${REAL_CONTEXT:-4096} count set to rc=0 ranks=1
  prepare
  set=(data.path="$work/files" heads.medusa=4 heads.medusa_sequential=true heads.mtp=1 model.context="$context"
    train.batch="$batch" train.micro_batch=$((batch / 2)) decode.prompt_tokens=128 decode.no_repeat=-1 decode.batches="$(sized 200 50)")
  count=$(real_steps "${set[@]}")
  settings "$run" linear_124m "${set[@]}" train.steps="$count" optim.warmup=$((count / 20)) \
    train.validate_every=$((count / 8)) checkpoint.every=$((count / 3))
  rm -rf "$run" "$work/report"
  first_half "$run" $((count / 2)) || rc=$?
  if [ $rc -ne 75 ]; then
    echo "asked to stop, the run ended with exit code $rc instead of 75"
    return 1
  fi
  if [ "$(gpu_count)" -gt 1 ]; then ranks=2; fi
  on_gpus $ranks "${arguments[@]}" --resume auto
  foretell inspect "$run" --verify
  foretell evaluate "$run" --output "$work/report" --set train.device=cuda
  to=$results/gpu_real_$ranks
  mkdir -p "$to"
  cp "$work/report/report.json" "$run/config.resolved.cfg" "$to/"
  echo "half on 1 GPU, the rest on $ranks"
  result curve "$to/curve.json" "$run/metrics.jsonl"
}

parts=("$@")
if [ ${#parts[@]} -eq 0 ]; then
  parts=(parity sanitize gemm attention linear elementwise train_124m train_1558m linear_124m decode losses precision real)
  if [ "$(gpu_count)" -gt 1 ]; then parts+=(two); fi
fi
failed=()
for part in "${parts[@]}"; do
  if ! declare -F "part_$part" >/dev/null; then echo "gpu.sh: there is no part '$part'" >&2; exit 2; fi
done
for part in "${parts[@]}"; do
  echo "== $part"
  begin=$SECONDS
  # Not in a condition: there `set -e` would be ignored.
  (
    set -e
    "part_$part"
    if [ -n "${missing_peer:-}" ]; then
      echo "the peer did not run: $missing_peer"
      exit 1
    fi
  ) 2>&1 | tee "$work/$part.log"
  [ "${PIPESTATUS[0]}" -eq 0 ] || failed+=("$part")
  echo "== $part: $((SECONDS - begin)) s: $(tail -n 1 "$work/$part.log")"
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
