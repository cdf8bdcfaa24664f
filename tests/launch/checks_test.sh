#!/bin/bash
# checks_test.sh ROOT: the checks of the source tree fail where they should.
set -euo pipefail
here=$1/tests/launch
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir -p "$tree"/{kernels/core,kernels/ops,comm,configs,data,checkpoints,trainer/model,trainer/train,trainer/decode,launch,tests}

# file, line that must be refused
refused() {
  echo "$2" >"$tree/$1"
  if "$here/check_includes.sh" "$tree" >/dev/null; then
    echo "not refused in $1: $2"
    exit 1
  fi
  rm "$tree/$1"
}
"$here/check_includes.sh" "$tree"
refused kernels/ops/a.h '#include "data/dataset.h"'
refused kernels/core/a.cpp '#include "kernels/ops/linear.h"'
refused configs/a.cpp '#include "data/dataset.h"'
refused data/a.h '#include "comm/communicator.h"'
refused trainer/train/a.cpp '#include "trainer/decode/evaluate.h"'
refused trainer/decode/a.h '#include "trainer/train/loop.h"'
refused trainer/model/a.cpp '  #  include "trainer/train/loop.h"'
refused trainer/model/b.cpp '#include <hdf5.h>'
refused data/b.cpp '#include <boost/any.hpp>'
refused launch/a.cpp '#include <mpi.h>'
refused comm/a.h '#include <mpi.h>'
refused launch/a.h '#include <nlohmann/json.hpp>'
refused launch/b.cpp '#include <cuda_runtime.h>'
echo '#include <mpi.h>' >"$tree/comm/a.cpp"
"$here/check_includes.sh" "$tree"

seq 600 >"$tree/data/a.cpp"
"$here/check_sizes.sh" "$tree"
seq 601 >"$tree/data/a.cpp"
if "$here/check_sizes.sh" "$tree" >/dev/null; then
  echo "a file of 601 lines was not refused"
  exit 1
fi
