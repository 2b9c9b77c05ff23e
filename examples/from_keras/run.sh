#!/usr/bin/env bash
# A VGG16 trained by Keras -> regraft -> other images.
#
#   KERAS_PYTHON=... ./run.sh DATASET1 DATASET2 OUT [more options for Dataset2]
#
# KERAS_PYTHON is the python of an environment with tensorflow-cpu, pillow and scipy.
set -euo pipefail
dataset1=$1 dataset2=$2 out=$3
shift 3
here=$(dirname "$0")

# 1. Keras trains, and saves in all of its formats.
"$KERAS_PYTHON" "$here/train.py" "$dataset1" "$out/keras" --epochs 10
classes=$(cd "$dataset1/train" && ls -d */ | tr -d / | paste -sd,)

# 2. Each format is imported; the outputs are Keras' to 1e-4.
for name in model.keras model.weights.h5 model.h5 first_try.h5; do
  regraft import "$out/keras/$name" --arch vgg16 --source "examples/from_keras/train.py" \
    --image-size 64 --classes "$classes" --out "$out/$name"
done
python "$here/compare.py" "$out/keras/outputs.npz" \
  "$out"/{model.keras,model.weights.h5,model.h5,first_try.h5}

# 3. The backbone is carried over.
regraft finetune "$dataset2" "$@" --start "$out/model.keras" --out "$out/target"
regraft evaluate "$out/target" "$dataset2"
