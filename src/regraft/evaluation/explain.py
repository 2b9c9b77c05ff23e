"""Explain: where in an image the evidence for a class lies (Grad-CAM), laid over the image.

It shows where a network looked, not why it is right; a mistake often looks at the wrong thing.
Source: Selvaraju et al. 2017, arXiv:1610.02391.

B batch, C channels, H height, W width, D features, K classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from regraft.data.batches import normalised
from regraft.data.decode import (
    Pixels,
    UnreadableImage,
    as_shown,
    encode_png,
    map_in_threads,
    read_content,
    read_input,
)
from regraft.engine import evaluating
from regraft.errors import UsageError
from regraft.evaluation.predictions import BATCH_PX
from regraft.evaluation.rows import rows_to_csv
from regraft.models.classifier import Classifier
from regraft.progress import OnProgress, counting
from regraft.storage import committed_folder, make_folder, write_file

LEAST_SIDE = 4  # of the maps that are shown by default: 2 x 2 say little of a place; assumed
LEAST_SHOWN_PX = 224  # smaller images are shown larger; assumed
MOST_HIDDEN = 0.6  # of the image, by the strongest evidence; assumed
COLOURS = np.array([[255, 60, 0], [255, 235, 60]], dtype=np.float64)  # of weak and of strong
TABLE = "explained.csv"
HEAD = ("picture", "path", "class", "probability", "error")


@dataclass(frozen=True)
class Explanation:
    """One image.

    Attributes:
        heat: (height, width), from 0 to 1: the evidence for the class.
        label: The class.
        probability: Of the class.
    """

    pixels: Pixels
    heat: NDArray[np.float32]
    label: str
    probability: float

    def picture(self, intensity_range: tuple[float, float]) -> Pixels:
        """Returns the image with the evidence over it: uint8 RGB."""
        shown = overlay(self.pixels, self.heat, intensity_range)
        times = max(1, LEAST_SHOWN_PX // max(shown.shape[:2]))
        return shown.repeat(times, axis=0).repeat(times, axis=1)


def explain_files(
    classifier: Classifier,
    files: Sequence[tuple[Path, str]],
    label: str | None = None,
    stage: int | None = None,
) -> Iterator[Explanation | UnreadableImage]:
    """Yields for each image where the evidence lies; or why it cannot be read.

    Args:
        classifier: On any device.
        files: (folder, path in it).
        label: The class; None: the likeliest one of each image.
        stage: See `evidence`.

    Raises:
        UsageError: There is no such class or stage.
    """
    names, inputs = classifier.class_names, classifier.inputs
    if label is not None and label not in names:
        raise UsageError(
            f"the model does not know `{label}`", hint=f"use one of {', '.join(names[:20])}"
        )

    def read(file: tuple[Path, str]) -> Pixels | UnreadableImage:
        try:
            return read_input(read_content(*file), inputs)
        except UnreadableImage as error:
            return error

    device = classifier.head.weight.device
    for pixels in map_in_threads(read, files):
        if isinstance(pixels, UnreadableImage):
            yield pixels
            continue
        images_BCHW = normalised(pixels[None], inputs, device)
        place = None if label is None else names.index(label)
        heat, classes, probabilities = evidence(classifier, images_BCHW, place, stage)
        yield Explanation(pixels, heat[0], names[int(classes[0])], float(probabilities[0]))


def write_explanations(
    classifier: Classifier,
    files: Sequence[tuple[Path, str]],
    out: Path,
    label: str | None,
    stage: int | None,
    on_progress: OnProgress,
) -> tuple[int, list[tuple[str, str]]]:
    """Writes a folder of pictures, named by number, never by class or file, and a table of them.

    Returns:
        How many were written, and the broken files with their reasons.
    """
    told, scale = counting(on_progress, "explaining"), classifier.inputs.intensity_range
    rows: list[Sequence[str]] = []
    broken: list[tuple[str, str]] = []
    digits = max(3, len(str(len(files))))
    make_folder(out.parent)
    with committed_folder(out) as folder:
        found = explain_files(classifier, files, label, stage)
        for number, ((root, path), one) in enumerate(zip(files, found, strict=True)):
            told(number + 1, len(files))
            place = str(root / path)
            if isinstance(one, UnreadableImage):
                broken.append((place, str(one)))
                rows.append(("", place, "", "", str(one)))
                continue
            name = f"{number:0{digits}d}.png"
            write_file(folder / name, encode_png(one.picture(scale)))
            rows.append((name, place, one.label, f"{one.probability:.6f}", ""))
        table = rows_to_csv(HEAD, rows)
        write_file(folder / TABLE, table.encode("utf-8", "surrogateescape"))
    return len(files) - len(broken), broken


def heat_of(
    classifier: Classifier, images: NDArray[np.generic], classes: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Returns the evidence for these classes in decoded images, a few at a time."""
    height, width = images.shape[1:3]
    size, found = max(1, BATCH_PX // (height * width)), []
    device = classifier.head.weight.device
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        images_BCHW = normalised(images[part], classifier.inputs, device)
        found.append(evidence(classifier, images_BCHW, torch.from_numpy(classes[part]))[0])
    return np.concatenate(found) if found else np.zeros((0, height, width), np.float32)


def evidence(
    classifier: Classifier,
    images_BCHW: Tensor,
    classes: Tensor | int | None = None,
    stage: int | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
    """Returns the evidence (BHW, from 0 to 1), the classes and their probabilities.

    Computed in single precision, whatever the engine's.

    Args:
        classifier: Put into evaluation mode.
        images_BCHW: Normalised.
        classes: One for each image, or for all; None: the likeliest.
        stage: Whose maps, counted from the stem; None: the last of at least 4 x 4.

    Raises:
        UsageError: There is no such stage, or none has maps.
    """
    with evaluating(classifier), torch.inference_mode(False), torch.enable_grad():
        images_BCHW = images_BCHW.clone().requires_grad_()
        stages, features_BD = classifier.backbone.stage_maps(images_BCHW)
        logits_BK: Tensor = classifier.head(features_BD)
        if classes is None:
            classes = logits_BK.argmax(dim=1)
        places = torch.as_tensor(classes, device=logits_BK.device).expand(len(logits_BK))
        rows = torch.arange(len(logits_BK), device=logits_BK.device)
        output = stages[_chosen(classifier, stages, stage)]
        (gradient,) = torch.autograd.grad(logits_BK[rows, places].sum(), output)
        maps_BCHW = classifier.backbone.as_maps(output)
        weights_BC11 = classifier.backbone.as_maps(gradient).mean(dim=(2, 3), keepdim=True)
        heat_B1HW = functional.relu((weights_BC11 * maps_BCHW).sum(dim=1, keepdim=True))
        size = images_BCHW.shape[2:]
        heat_B1HW = functional.interpolate(heat_B1HW, size, mode="bilinear", align_corners=False)
        heat_B1HW = heat_B1HW / heat_B1HW.amax(dim=(2, 3), keepdim=True).clamp_min(1e-12)
        chances = logits_BK.softmax(dim=1)[rows, places]
    heat: NDArray[np.float32] = heat_B1HW[:, 0].detach().cpu().numpy()
    return heat, places.cpu().numpy(), chances.detach().cpu().numpy()


def _chosen(classifier: Classifier, stages: Sequence[Tensor], stage: int | None) -> int:
    if not stages:
        raise UsageError(
            f"no stage of `{classifier.backbone.arch}` gives maps", hint="explain another network"
        )
    if stage is not None:
        if not 0 <= stage < len(stages):
            raise UsageError(
                f"`--stage {stage}`: the network has stages 0 to {len(stages) - 1}",
                hint="leave it out for the last one whose maps are not too coarse",
            )
        return stage
    sides = [min(classifier.backbone.as_maps(each).shape[2:]) for each in stages]
    fine = [place for place, side in enumerate(sides) if side >= LEAST_SIDE]
    return fine[-1] if fine else int(np.argmax(sides))


def overlay(
    pixels: Pixels, heat_HW: NDArray[np.float32], intensity_range: tuple[float, float]
) -> Pixels:
    """Returns the image in grey with the evidence in colour over it: uint8 RGB."""
    grey = as_shown(pixels, intensity_range).astype(np.float64).mean(axis=2, keepdims=True)
    share = heat_HW.astype(np.float64)[..., None]
    colour = COLOURS[0] + share * (COLOURS[1] - COLOURS[0])
    hidden = MOST_HIDDEN * share
    mixed: Pixels = np.rint((1 - hidden) * grey + hidden * colour).clip(0, 255).astype(np.uint8)
    return mixed
