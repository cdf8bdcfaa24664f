#!/bin/bash
# quickstart.sh [section.key=value...]
# From a clone to a report: sets up, builds, prepares text, trains on two ranks, evaluates. Run again, it skips what
# is done and goes on with what was cut short. Arguments replace keys of the preset; data.path and log.run are the folders
# of the prepared text and of the run. Environment:
#   QUICKSTART_PROGRAM         a foretell that is built already; leaves out set-up and building
#   QUICKSTART_TEXT            files and folders to train on instead of the headers, separated by spaces
#   QUICKSTART_HELD_OUT        and to validate on
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/mpi_env.sh

config=configs/presets/quickstart.cfg
prepared=prepared/quickstart
run=runs/quickstart
foretell=${QUICKSTART_PROGRAM:-build/foretell}
settings=()
for setting in "$@"; do
  case $setting in
    data.path=*) prepared=${setting#*=} ;;
    log.run=*) run=${setting#*=} ;;
    *=*) settings+=(--set "$setting") ;;
    *)
      echo "quickstart: '$setting' is not section.key=value" >&2
      exit 2
      ;;
  esac
done

stage() {
  printf '\n== %d:%02d  %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$1"
}

# The text: headers of C and C++ that the set-up brought. Some packages are held out whole, so that validation is on
# code that no training file comes from.
include=/usr/include
training=("$include/c++" "$include/linux" "$include/asm-generic" "$include/x86_64-linux-gnu" "$include/hdf5"
  "$include/hwy" "$include/google" "$include/gtest" "$include"/boost/{asio,beast,math,geometry,spirit,container,intrusive}
  "$include"/boost/{log,hana,graph,numeric,multiprecision,compute,gil,interprocess,units,thread,polygon,test,range,random}
  "$include"/boost/{coroutine,fiber,smart_ptr,variant})
held_out=("$include/fmt" "$include"/boost/{heap,circular_buffer,signals2,unordered})
if [ -n "${QUICKSTART_TEXT:-}" ]; then read -ra training <<<"$QUICKSTART_TEXT"; fi
if [ -n "${QUICKSTART_HELD_OUT:-}" ]; then read -ra held_out <<<"$QUICKSTART_HELD_OUT"; fi

present() {
  for path in "$@"; do
    if [ -e "$path" ]; then echo "$path"; fi
  done
}

if [ -z "${QUICKSTART_PROGRAM:-}" ]; then
  stage "set-up"
  launch/setup.sh

  stage "building into build/"
  # Compiling for GPUs takes longer than all the rest: not on a machine that has none.
  cuda=$(nvidia-smi -L >/dev/null 2>&1 && echo AUTO || echo OFF)
  [ -f build/build.ninja ] || cmake --preset release -DFORETELL_CUDA="$cuda" >/dev/null
  cmake --build --preset release
fi

stage "preparing text"
if [ -f "$prepared/dataset.json" ]; then
  echo "$prepared is there"
else
  mapfile -t training < <(present "${training[@]}")
  mapfile -t held_out < <(present "${held_out[@]}")
  "$foretell" prepare --input "${training[@]}" --validation-input "${held_out[@]}" \
    --tokenizer sentencepiece:1024 --output "$prepared"
fi

stage "training on two ranks"
if grep -qs '"state": "finished"' "$run/status.json"; then
  echo "$run is finished${settings[*]:+; it keeps the settings it was trained with: name another log.run to train with these}"
else
  mpirun -np 2 "$foretell" train $config --set data.path="$prepared" --set log.run="$run" "${settings[@]}" --resume auto
fi

stage "evaluating"
if [ -f "$run/report.html" ] && [ "$run/report.html" -nt "$run/status.json" ]; then
  "$foretell" inspect "$run"
else
  "$foretell" evaluate "$run"
fi

stage "done"
echo "open $(realpath "$run/report.html")"
echo "try  $foretell generate $run --prompt '#include <' --drafter medusa"
