#!/usr/bin/env bash
# CIFAR-10 (10 classes, 32x32 colour) -> MNIST even or odd (2 classes, 28x28 grey).
#
#   ./run.sh CIFAR10_FOLDER MNIST_FOLDER OUT [ARCH]
#
# CIFAR10_FOLDER has class folders below train/ and test/; MNIST_FOLDER has the four IDX files.
# Neither is at hand? `python download.py DATA` fetches both, then: ./run.sh DATA/cifar10 DATA/mnist OUT
set -euo pipefail
cifar10=$1 mnist=$2 out=$3 arch=${4:-resnet10t}
parity=(--relabel even=0,2,4,6,8 --relabel odd=1,3,5,7,9 --per-class 100)

# 1. Train the whole network on Dataset1, from random weights.
regraft pretrain "$cifar10" --out "$out/source" --arch "$arch" --image-size 32 --epochs 30

# 2. How good is it on Dataset1's own test images?
regraft evaluate "$out/source" "$cifar10" --arch "$arch"

# 3. Carry it over to Dataset2: a new head of 2 classes; grey images are replicated to RGB.
regraft finetune "$mnist" "${parity[@]}" --start "$out/source" --arch "$arch" --out "$out/target"
regraft evaluate "$out/target" "$mnist" --arch "$arch"

# 4. Did that help? The same, and from scratch, over 6 seeds, on the same 10,000 test images.
regraft compare "$mnist" "${parity[@]}" --start "$out/source" --arch "$arch" \
    --out "$out/comparison" --seeds 6
