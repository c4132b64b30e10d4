#!/usr/bin/env bash
# The shortest real run: the default recipe's own teachers and steps, on a handful of images.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
sed -e "s#artifacts/#$folder/#" \
  -e 's/train: [0-9]*/train: 16/; s/val: [0-9]*/val: 8/' \
  -e 's/steps: [0-9]*/steps: 4/; s/warmup_steps: [0-9]*/warmup_steps: 1/' \
  -e 's/^tasks: .*/tasks: [segmentation, depth]/' params.yaml > "$folder/params.yaml"
run() { echo "+ sak $*"; sak "$@" --params "$folder/params.yaml"; }
run index
run extract-teachers
sak inspect "$folder/features.zarr"
run train-student distill
run train-student multitask
run train-student baseline
run evaluate
test -s "$folder/report/metrics.json"
echo "quick end-to-end run: done"
