#!/bin/bash
# Sets up, builds everything with its tests (the CUDA side too where nvcc is) and runs them. Arguments go to ctest.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/mpi_env.sh

stage() {
  printf '\n== %d:%02d  %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$1"
}

stage "set-up"
launch/setup.sh

# Versions of clang-format differ in what they write; the project's is 14, Debian 12's.
if clang-format --version 2>/dev/null | grep -q 'version 14\.' && git rev-parse --git-dir >/dev/null 2>&1; then
  stage "format"
  git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs -r clang-format --dry-run -Werror
fi

if command -v python3 >/dev/null; then
  stage "figures of the README, and what reads the results of GPUs"
  tests/bench/figures.py --check
  tests/bench/gpu_results_test.py
fi

stage "building into build-test/"
# Where no GPU can run it, the CUDA side is compiled for one architecture: that it compiles is what can be seen there.
architectures=()
if ! nvidia-smi -L >/dev/null 2>&1; then architectures=(-DFORETELL_CUDA_ARCHITECTURES=90); fi
[ -f build-test/build.ninja ] || cmake --preset test "${architectures[@]}" >/dev/null
cmake --build --preset test

nvcc=$(sed -n 's/^CMAKE_CUDA_COMPILER:[^=]*=//p' build-test/CMakeCache.txt)
if [ -x "$nvcc" ]; then
  echo "the CUDA side was compiled with $("$nvcc" --version | grep -o 'release [0-9.]*')"
else
  echo "no CUDA side in this build: there is no nvcc"
fi
if ! nvidia-smi -L >/dev/null 2>&1; then
  echo "no GPU here: GPU tests are skipped"
fi

# Tests save hundreds of small checkpoints, each one synced: on a busy disk that is minutes of waiting.
if [ -z "${TMPDIR:-}" ] && [ "$(df --output=avail -BM /dev/shm 2>/dev/null | tr -dc 0-9)" -ge 1024 ] 2>/dev/null; then
  TMPDIR=$(mktemp -d /dev/shm/foretell_tests.XXXXXX)
  export TMPDIR
  trap 'rm -rf "$TMPDIR"' EXIT
  echo "their files lie in memory: $TMPDIR"
fi

stage "tests"
ctest --test-dir build-test --output-on-failure --no-tests=error -j "$(nproc)" "$@"
