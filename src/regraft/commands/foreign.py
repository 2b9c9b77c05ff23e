"""The command that takes over what other tools have trained."""

from pathlib import Path

from regraft.errors import UsageError
from regraft.terminal import progress


def import_(
    file: Path,
    /,
    *,
    source: str,
    out: Path,
    arch: str | None = None,
    preprocessing: str | None = None,
    mean: str = "",
    std: str = "",
    scale: float | None = None,
    image_size: int | None = None,
    classes: str = "",
) -> None:
    """Make a start from weights that Keras, torch or timm saved. Code in a file is never run.

    Parameters
    ----------
    file
        .h5, .weights.h5 or .keras; .pt or .pth (a state dict); .safetensors; or a folder of timm.
    source
        Where the weights are from, in words: 'own training on ...'. Kept for ever.
    out
        Folder of the model; new. For --start of `finetune` and `compare`.
    arch
        The network that was trained: a name of timm, or your own as file.py:factory.
    preprocessing
        How its images were scaled: keras-rescale, caffe, tf, torch or none.
    mean
        Subtracted from each channel, as 0.5,0.5,0.5, after --scale.
    std
        Divided by, likewise.
    scale
        What values from 0 to 255 were multiplied by first, as 0.00392.
    image_size
        Side of the square input in pixels.
    classes
        Class names in the order of the outputs, as NORMAL,PNEUMONIA.
    """
    from regraft import api

    numbers = {"mean": _numbers("mean", mean), "std": _numbers("std", std), "scale": scale}
    with progress() as told:
        classifier = api.import_weights(
            file,
            out=out,
            source=source,
            arch=arch,
            preprocessing=preprocessing,
            numbers={name: value for name, value in numbers.items() if value},
            image_size=image_size,
            class_names=tuple(name for name in classes.split(",") if name),
            on_progress=told,
        )
    millions = classifier.backbone.num_parameters / 1e6
    print(f"imported: {out} ({classifier.backbone.arch}, {millions:.3g} million parameters)")
    print(f"weights from elsewhere: {source.strip()}")
    print(f"next: regraft finetune DATA --start {out} --out runs/target")


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UsageError(
            f"`--{option} {text}` is no list of numbers", hint=f"write `--{option} 0.5,0.5,0.5`"
        ) from error
