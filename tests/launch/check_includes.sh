#!/bin/bash
# check_includes.sh ROOT: dependencies between rooms point down only, and each library stays in its room.
set -euo pipefail
cd "$1"
failed=0

complain() {
  echo "$1"
  failed=1
}

# files that match, pattern of #include that they must not hold, why
forbid() {
  local files=$1 pattern=$2 why=$3 hits
  hits=$(find . -regextype posix-extended -regex "\./($files)" -print0 |
    xargs -0 -r grep -HnE "^[[:space:]]*#[[:space:]]*include[[:space:]]*[<\"]($pattern)" || true)
  if [ -n "$hits" ]; then complain "$why:"$'\n'"$hits"; fi
}

any='.*\.(h|cpp|cu|cuh)'
forbid "kernels/$any" '(comm|configs|data|checkpoints|trainer|launch)/' 'kernels includes no other room'
forbid "kernels/core/$any" 'kernels/(ops|cpu)/' 'kernels/core includes no operation'
for room in comm configs data checkpoints; do
  others=$(echo comm configs data checkpoints trainer launch | tr ' ' '\n' | grep -vx $room | paste -sd '|')
  forbid "$room/$any" "($others)/" "$room includes itself and kernels only"
done
forbid "trainer/$any" 'launch/' 'trainer does not include launch'
forbid "trainer/model/$any" 'trainer/(train|decode)/' 'trainer/model includes neither train nor decode'
forbid "trainer/train/$any" 'trainer/decode/' 'trainer/train does not include decode'
forbid "trainer/decode/$any" 'trainer/train/' 'trainer/decode does not include train'
forbid "(kernels|comm|data|checkpoints|trainer)/$any" 'boost/' 'Boost is in configs and launch only'
forbid "(kernels|comm|configs|trainer|launch)/$any" '(hdf5|H5)' 'HDF5 is in checkpoints and data only'
forbid "(kernels|configs|data|checkpoints|trainer|launch)/$any" '(mpi|nccl)\.h' 'MPI and NCCL are in comm only'
forbid 'comm/.*\.h' '(mpi|nccl)\.h' 'MPI and NCCL are in the .cpp files of comm only'
forbid '(kernels|comm|configs|data|checkpoints|trainer|launch)/.*\.h' 'nlohmann/' 'JSON is in .cpp files only'
forbid "(configs|data|checkpoints|trainer|launch)/$any" '(cuda|cublas|cudnn)' 'CUDA is in kernels and comm only'

exit $failed
