#!/bin/bash
# Installs what building and running Foretell needs and is missing, and what reads its checkpoints (h5ls, h5py). Debian
# 12 and Ubuntu 24.04.
set -euo pipefail

# Headers only; they come as a wheel. With nvcc alone: without it nothing of the CUDA side is compiled.
root=$(cd "$(dirname "$0")/.." && pwd)
lacks_cudnn_frontend() {
  if ! command -v nvcc >/dev/null && [ ! -x /usr/local/cuda/bin/nvcc ]; then return 1; fi
  [ ! -f "$root/.deps/cudnn_frontend/include/cudnn_frontend.h" ]
}
cudnn_frontend=1.32.0
fetch_cudnn_frontend() {
  local wheels
  wheels=$(mktemp -d)
  if ! python3 -m pip download -q --no-deps --only-binary=:all: -d "$wheels" "nvidia-cudnn-frontend==$cudnn_frontend"; then
    rm -rf "$wheels"
    echo "setup: fetching nvidia-cudnn-frontend $cudnn_frontend with pip failed; put its include folder into" \
      "$root/.deps/cudnn_frontend, or build with -DFORETELL_CUDA=OFF" >&2
    exit 1
  fi
  python3 - "$wheels" "$root/.deps/cudnn_frontend" <<'EOF'
import pathlib, sys, zipfile
wheel = zipfile.ZipFile(next(pathlib.Path(sys.argv[1]).glob("*.whl")))
for name in wheel.namelist():
    if name.startswith("include/") and not name.endswith("/"):
        to = pathlib.Path(sys.argv[2], name)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(wheel.read(name))
EOF
  rm -rf "$wheels"
  echo "setup: cudnn-frontend $cudnn_frontend is in .deps"
}

# A tool that is on the PATH is taken as it is, wherever it came from: "command package".
tools=(
  "c++ g++"
  "cmake cmake"
  "ninja ninja-build"
  "pkg-config pkg-config"
  "mpirun openmpi-bin"
  "ccache ccache"
  "git git"
  "h5ls hdf5-tools"
)
libraries=(
  libopenmpi-dev
  libboost-program-options-dev
  libfmt-dev
  nlohmann-json3-dev
  libhdf5-dev
  libhwy-dev
  libxxhash-dev
  libsentencepiece-dev
  libdnnl-dev
  libgtest-dev
  python3-h5py
)

missing=()
for tool in "${tools[@]}"; do
  read -r command package <<<"$tool"
  command -v "$command" >/dev/null || missing+=("$package")
done
if ! command -v dpkg-query >/dev/null; then
  echo "setup: this machine has no dpkg; install by its own means: ${missing[*]} ${libraries[*]}" >&2
  exit 1
fi
for package in "${libraries[@]}"; do
  state=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true)
  [ "$state" = "install ok installed" ] || missing+=("$package")
done
if lacks_cudnn_frontend && ! python3 -m pip --version >/dev/null 2>&1; then missing+=(python3-pip); fi
if [ ${#missing[@]} -eq 0 ]; then
  if lacks_cudnn_frontend; then fetch_cudnn_frontend; fi
  echo "setup: everything is installed"
  exit 0
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null; then
    echo "setup: needs root to install packages, and there is no sudo; as root: apt-get install ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi
# A line now and then: from nothing this takes minutes.
told() {
  local line packages=0
  while read -r line; do
    case $line in
      "Need to get"* | Fetched*) echo "setup: $line" ;;
      "Setting up"*)
        packages=$((packages + 1))
        if [ $((packages % 40)) -eq 0 ]; then echo "setup: $packages packages set up"; fi
        ;;
    esac
  done
}
echo "setup: installing ${missing[*]}"
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}" | told
if lacks_cudnn_frontend; then fetch_cudnn_frontend; fi
echo "setup: done"
