"""Files as Keras writes them, with Keras' own outputs beside them, to hold imports to.

    KERAS_PYTHON examples/from_keras/reference.py OUT

Needs Keras on TensorFlow, in an environment of its own (`pip install tensorflow-cpu`). For each
network: `NAME.h5` (model.save), `NAME.keras`, `NAME.weights.h5`, `NAME.legacy.h5` (what Keras 2's
save_weights wrote), and `NAME.npz` with images_BHWC (0 to 255), features_BD and logits_BK.
Every value is drawn, also those that are 0 or 1 at birth: a mistake then shows in the outputs.
"""

import os
import sys
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import h5py
import keras
import numpy as np
from keras import layers
from keras.src.legacy.saving.legacy_h5_format import save_weights_to_hdf5_group

SIDE = 64


def application(name: str, side: int = SIDE, **options: object) -> keras.Model:
    """A whole network of Keras' collection, three classes on global average pooling."""
    build = getattr(keras.applications, name)
    return build(weights=None, classes=3, input_shape=(side, side, 3), **options)


def nested(name: str, top: layers.Layer, side: int = SIDE) -> keras.Model:
    """A network without its top inside a Sequential, as most tutorials write it."""
    build = getattr(keras.applications, name)
    inner = build(weights=None, include_top=False, input_shape=(side, side, 3))
    inner.trainable = False
    return keras.Sequential([inner, top, layers.Dense(3, activation="softmax")])


def flat(name: str, top: layers.Layer, side: int = SIDE) -> keras.Model:
    """A network without its top, continued as one graph."""
    build = getattr(keras.applications, name)
    inner = build(weights=None, include_top=False, input_shape=(side, side, 3))
    out = layers.Dense(3, activation="softmax")(top(inner.output))
    return keras.Model(inner.input, out)


def plain() -> keras.Model:
    """A network of one's own: eleven convolutions, so that names sort wrongly as text."""
    return keras.Sequential(
        [
            keras.Input((24, 20, 3)),
            layers.Rescaling(1 / 127.5, offset=-1),
            *(layers.Conv2D(6, 3, padding="same", activation="relu") for _ in range(11)),
            layers.BatchNormalization(),
            layers.MaxPooling2D(),
            layers.Conv2D(5, 3, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dense(8, activation="relu"),
            layers.Dropout(0.5),
            layers.Dense(1, activation="sigmoid"),
        ]
    )


NETWORKS = {
    "vgg16": lambda: flat("VGG16", layers.GlobalAveragePooling2D()),
    "vgg16_nested": lambda: nested("VGG16", layers.GlobalAveragePooling2D()),
    "vgg16_flatten": lambda: nested("VGG16", layers.Flatten()),
    "vgg19": lambda: flat("VGG19", layers.GlobalAveragePooling2D()),
    "densenet121": lambda: application("DenseNet121"),
    "densenet169": lambda: application("DenseNet169"),
    "densenet201": lambda: application("DenseNet201"),
    "densenet121_nested": lambda: nested("DenseNet121", layers.GlobalAveragePooling2D()),
    "mobilenetv2": lambda: application("MobileNetV2"),
    "mobilenetv2_odd": lambda: application("MobileNetV2", 65),
    "efficientnetb0": lambda: application("EfficientNetB0"),
    "resnet50": lambda: application("ResNet50"),
    "plain": plain,
}


def draw(model: keras.Model, seed: int) -> None:
    """Gives every variable drawn values of a size that keeps signals in range."""
    generator = np.random.default_rng(seed)
    for variable in model.weights:
        name, value = variable.path.rpartition("/")[2], variable.numpy()
        if name in ("kernel", "depthwise_kernel"):
            fan = np.prod(value.shape[:3]) if name == "depthwise_kernel" else 0
            fan = fan / value.shape[2] if fan else np.prod(value.shape[:-1])
            drawn = generator.normal(0, np.sqrt(2 / fan), value.shape)
        elif name in ("gamma", "moving_variance", "variance"):
            drawn = generator.uniform(0.5, 1.5, value.shape)
        elif name in ("bias", "beta", "moving_mean", "mean"):
            drawn = generator.normal(0, 0.1, value.shape)
        else:
            continue  # seeds and counters
        variable.assign(drawn)


def write(out: Path, name: str) -> None:
    model = NETWORKS[name]()
    draw(model, seed=len(name))
    height, width = model.input_shape[1:3]
    images_BHWC = np.random.default_rng(1).integers(0, 256, (4, height, width, 3), dtype=np.uint8)
    model.layers[-1].activation = keras.activations.linear  # its outputs are logits
    features = keras.Model(model.inputs, model.layers[-1].input)
    # A network scaled by 1/255, as most scripts do; EfficientNetB0 and `plain` scale inside.
    given = images_BHWC.astype("float32") / (1 if name in ("efficientnetb0", "plain") else 255)
    np.savez(
        out / f"{name}.npz",
        images=images_BHWC,
        features=features.predict(given, verbose=0),
        logits=model.predict(given, verbose=0),
    )
    model.layers[-1].activation = keras.activations.get("sigmoid" if name == "plain" else "softmax")
    model.save(out / f"{name}.h5")
    model.save(out / f"{name}.keras")
    model.save_weights(out / f"{name}.weights.h5")
    with h5py.File(out / f"{name}.legacy.h5", "w") as file:
        save_weights_to_hdf5_group(file, model)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    for chosen in sys.argv[2:] or NETWORKS:
        write(place, chosen)
        print(chosen, flush=True)
