"""Keras on TensorFlow, in an environment of its own: the script of the original question.

    python jobs_keras.py JOB FOLDER [EPOCHS]

`ImageDataGenerator`, VGG16 without its top, frozen, Flatten, Dense(2); only the start weights are
trained ones, and nothing is augmented. Prints one line of JSON.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import keras
import numpy as np
import tensorflow as tf
from keras.src.legacy.preprocessing.image import ImageDataGenerator


def folder_of(place: Path, size: int, batch: int, *, shuffle: bool) -> object:
    plain = ImageDataGenerator(rescale=1 / 255)
    return plain.flow_from_directory(
        str(place),
        target_size=(size, size),
        batch_size=batch,
        class_mode="categorical",
        shuffle=shuffle,
    )


def vgg(size: int, weights: Path | None, num_classes: int, *, flat: bool) -> keras.Model:
    base = keras.applications.VGG16(weights=None, include_top=False, input_shape=(size, size, 3))
    scaled = keras.Input((size, size, 3))
    entered = scaled
    if weights is not None:
        stored = np.load(weights)
        entered = (scaled - float(stored["mean"])) / float(stored["std"])
        convolutions = [layer for layer in base.layers if layer.weights]
        for number, layer in enumerate(convolutions):
            layer.set_weights([stored[f"kernel{number}"], stored[f"bias{number}"]])
        base.trainable = False
    top = keras.layers.Flatten() if flat else keras.layers.GlobalAveragePooling2D()
    out = keras.layers.Dense(num_classes, activation="softmax")(top(base(entered)))
    return keras.Model(scaled, out)


def frozen(place: Path, epochs: int) -> dict[str, object]:
    model = vgg(128, place / "start.npz", 2, flat=True)
    model.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
    train = folder_of(place / "frozen" / "train", 128, 32, shuffle=True)
    test = folder_of(place / "frozen" / "test", 128, 32, shuffle=False)
    began = time.perf_counter()
    model.fit(train, epochs=epochs, validation_data=test, verbose=0)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "accuracy": model.evaluate(test, verbose=0)[1]}


def scratch(place: Path, arch: str) -> dict[str, object]:
    if arch == "vgg16":
        model = vgg(224, None, 3, flat=False)
    else:
        model = keras.applications.ResNet50(weights=None, classes=3, input_shape=(224, 224, 3))
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "categorical_crossentropy")
    images = folder_of(place / "scratch" / "train", 224, 16, shuffle=True)
    model.train_on_batch(*images[0])  # the graph is traced
    began = time.perf_counter()
    model.fit(images, epochs=1, verbose=0)
    return {"seconds": time.perf_counter() - began}


def predict(place: Path) -> dict[str, object]:
    model = vgg(224, None, 3, flat=False)
    images = folder_of(place / "predict", 224, 32, shuffle=False)
    model.predict_on_batch(images[0][0])
    began = time.perf_counter()
    number = len(model.predict(images, verbose=0))
    return {"seconds": time.perf_counter() - began, "images": number}


if __name__ == "__main__":
    tf.config.threading.set_intra_op_parallelism_threads(2)
    job, folder = sys.argv[1], Path(sys.argv[2])
    jobs = {
        "frozen": lambda: frozen(folder, int(sys.argv[3])),
        "scratch-vgg16": lambda: scratch(folder, "vgg16"),
        "scratch-resnet50": lambda: scratch(folder, "resnet50"),
        "predict": lambda: predict(folder),
    }
    print(json.dumps(jobs[job]()))
