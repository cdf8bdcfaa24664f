#!/bin/bash
# check_sizes.sh ROOT: no source file above 600 lines.
set -euo pipefail
cd "$1"
limit=600
long=$(find kernels comm data configs checkpoints trainer launch tests -type f \
  \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.sh' -o -name '*.py' \) \
  -exec awk -v limit=$limit 'END { if (NR > limit) print FILENAME ": " NR " lines" }' {} \;)
if [ -n "$long" ]; then
  echo "above $limit lines; split by what belongs together:"$'\n'"$long"
  exit 1
fi
