"""A VGG16 trained by Keras on class folders, saved in all of Keras' formats.

    KERAS_PYTHON examples/from_keras/train.py DATA OUT [--frozen] [--epochs 4] [--side 64]

DATA holds train/ and test/ with one folder a class. `--frozen` is the way of the question that
regraft answers: random layers, all frozen, then Flatten and Dense. Without it all layers learn and
the head stands on the means of the maps. OUT gets first_try.h5 (as Keras 2's save_weights wrote),
model.h5, model.keras, model.weights.h5, and outputs.npz: 60 test images with Keras' logits.
Needs Keras on TensorFlow in an environment of its own (pip install tensorflow-cpu pillow scipy).
"""

import argparse
import os
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import h5py
import keras
import numpy as np
from keras import layers
from keras.src.legacy.preprocessing.image import ImageDataGenerator
from keras.src.legacy.saving.legacy_h5_format import save_weights_to_hdf5_group


def build(side: int, num_classes: int, *, frozen: bool) -> keras.Model:
    inner = keras.applications.VGG16(weights=None, include_top=False, input_shape=(side, side, 3))
    inner.trainable = not frozen
    if not frozen:  # from Keras' own start (Glorot) plain VGG16 stays at the entropy of the labels
        for layer in inner.layers:
            if layer.weights:
                layer.kernel.assign(keras.initializers.HeNormal()(layer.kernel.shape))
    top = layers.Flatten() if frozen else layers.GlobalAveragePooling2D()
    head = layers.Dense(num_classes, activation="softmax")
    return keras.Sequential([inner, top, head])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--frozen", action="store_true")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--side", type=int, default=64)
    given = parser.parse_args()
    keras.utils.set_random_seed(0)

    plain = ImageDataGenerator(rescale=1 / 255)
    how = {"target_size": (given.side, given.side), "batch_size": 30}
    train = plain.flow_from_directory(given.data / "train", **how, seed=0)
    test = plain.flow_from_directory(given.data / "test", **how, shuffle=False)
    model = build(given.side, train.num_classes, frozen=given.frozen)
    rate = keras.optimizers.Adam() if given.frozen else keras.optimizers.SGD(0.02, 0.9, clipnorm=1)
    model.compile(rate, "categorical_crossentropy", metrics=["accuracy"])
    model.fit(train, epochs=given.epochs, verbose=2)
    print("classes:", ",".join(train.class_indices))
    print(f"test accuracy: {model.evaluate(test, verbose=0)[1]:.3f}")

    given.out.mkdir(parents=True, exist_ok=True)
    model.save(given.out / "model.h5")
    model.save(given.out / "model.keras")
    model.save_weights(given.out / "model.weights.h5")
    with h5py.File(given.out / "first_try.h5", "w") as file:
        save_weights_to_hdf5_group(file, model)
    scaled = np.concatenate([test[0][0], test[len(test) - 1][0]])
    model.layers[-1].activation = keras.activations.linear
    logits = keras.Sequential(model.layers).predict(scaled, verbose=0)
    images = np.round(scaled * 255).astype(np.uint8)
    np.savez(given.out / "outputs.npz", images=images, logits=logits)


if __name__ == "__main__":
    main()
