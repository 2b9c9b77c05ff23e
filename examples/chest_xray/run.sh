#!/usr/bin/env bash
# Chest X-rays of one kind (class folders) -> chest X-rays of another kind.
#
#   ./run.sh DATASET1 DATASET2 OUT [more options for Dataset2, e.g. --group-regex '^([^_]+)_']
#
# --group-regex keeps the images of one patient together: the first parenthesis is the patient.
set -euo pipefail
dataset1=$1 dataset2=$2 out=$3
shift 3

# 1. Train the whole network on Dataset1, from random weights. Test images stay untouched.
regraft pretrain "$dataset1" --out "$out/source" --arch vgg16_bn --image-size 96 --epochs 30

# 2. Judge it on Dataset1's test images: in order, not augmented.
regraft evaluate "$out/source" "$dataset1"

# 3. Carry the backbone over to Dataset2; what learns, and how fast, is searched for.
regraft finetune "$dataset2" "$@" --start "$out/source" --out "$out/target"
regraft evaluate "$out/target" "$dataset2"

# 4. Did that help? Six seeds, against the same network trained from scratch.
regraft compare "$dataset2" "$@" --start "$out/source" --out "$out/comparison" --seeds 6
