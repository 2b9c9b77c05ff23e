"""Doubt: below which probability a Classifier is unsure, and how far an image may be from those it
has learned from. Both are measured on validation images when a training ends.

N images, K classes, D features, M remembered images.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from regraft.documents import json_content, parse_json
from regraft.errors import ArtefactError, UsageError, shorten
from regraft.manifests import Manifest
from regraft.storage import Content
from regraft.tensors import MOST_BYTES, packed, unpacked

DOUBT, REMEMBERED = "doubt.json", "doubt.safetensors"
MOST_DOUBT_BYTES = 2**16  # of doubt.json: a few numbers; assumed
DEFAULT_RATE = 0.05  # errors among images that are answered; assumed
AT_ONCE = 1024  # images compared with all that are remembered: bounds memory, not a result


class Band(BaseModel):
    """For an error rate that was asked for: above which probability an image is answered.

    Attributes:
        error_rate: Of the images that are answered, at most so many are wrong.
        threshold: Of the largest probability; None: not even the surest images keep to the rate.
        answered: Share of the validation images above it.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    error_rate: float = Field(gt=0, lt=1)
    threshold: float | None = Field(ge=0, le=1)
    answered: float = Field(ge=0, le=1)


class _DoubtFile(BaseModel):
    """The shape of `doubt.json`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    schema_version: int = Field(ge=1, le=1)
    num_images: int = Field(ge=0)
    confidence: float = Field(gt=0, lt=1)
    bands: list[Band] = Field(max_length=100)
    neighbours: int = Field(ge=1, le=1000)
    distance: float | None = Field(ge=0)
    unfamiliar_rate: float = Field(gt=0, lt=1)


@dataclass(frozen=True)
class Doubt:
    """What validation images have taught of a Classifier's limits.

    Attributes:
        num_images: Independent validation images (one of each group).
        confidence: With which the error rates hold for images like those.
        bands: One for each error rate that so few images can tell of.
        neighbours: The distance of an image is that to its so manieth nearest remembered one.
        distance: Above it an image is unfamiliar; None: too few images to tell.
        unfamiliar_rate: Share of images like those that are above it all the same.
        remembered: MxD, of unit length: features of training images.
    """

    num_images: int
    confidence: float
    bands: tuple[Band, ...]
    neighbours: int
    distance: float | None
    unfamiliar_rate: float
    remembered: NDArray[np.float32]

    def band(self, error_rate: float) -> Band | None:
        """Returns the band of this rate; None where too few images were held out for it.

        Raises:
            UsageError: Another rate was measured.
        """
        if not self.bands:
            return None
        found = next((band for band in self.bands if band.error_rate == error_rate), None)
        if found is None and error_rate != DEFAULT_RATE:
            rates = shorten([f"{band.error_rate:g}" for band in self.bands], 10)
            raise UsageError(
                f"`--error-rate {error_rate:g}` was not measured: {self.num_images} independent "
                "validation images tell nothing of it",
                hint=f"use one of {rates}",
            )
        return found

    def unsure(
        self, probabilities_NK: NDArray[np.float64], error_rate: float
    ) -> NDArray[np.bool_] | None:
        """Returns which images are not answered; None where nobody knows."""
        band = self.band(error_rate)
        if band is None:
            return None
        threshold = 1.0 if band.threshold is None else band.threshold
        unsure: NDArray[np.bool_] = probabilities_NK.max(axis=1) <= threshold
        return unsure | (band.threshold is None)

    def unfamiliar(self, features_ND: NDArray[np.float32]) -> NDArray[np.bool_] | None:
        """Returns which images are far from all that was learned; None where nobody knows."""
        if self.distance is None:
            return None
        far: NDArray[np.bool_] = (
            distances(features_ND, self.remembered, self.neighbours) > self.distance
        )
        return far

    def contents(self) -> dict[str, Content]:
        """Returns the files that stand beside the weights."""
        fields: dict[str, Any] = {k: v for k, v in vars(self).items() if k != "remembered"}
        document = _DoubtFile(schema_version=1, **{**fields, "bands": list(self.bands)})
        return {
            DOUBT: json_content(document.model_dump(mode="json")),
            REMEMBERED: packed({"features": torch.from_numpy(self.remembered)}),
        }

    @classmethod
    def read(cls, manifest: Manifest, width: int) -> "Doubt | None":
        """Returns what stands in a Classifier's folder; None where nothing was measured.

        Raises:
            ArtefactError: It is not what was saved.
        """
        if DOUBT not in manifest.entries:
            return None
        path = manifest.folder / DOUBT
        content = parse_json(manifest.read(DOUBT, MOST_DOUBT_BYTES), path)
        tensors = unpacked(manifest.read(REMEMBERED, MOST_BYTES), manifest.folder / REMEMBERED)
        try:
            document = _DoubtFile.model_validate(content)
            remembered = tensors["features"].numpy()
            if remembered.ndim != 2 or remembered.shape[1] != width or not remembered.size:
                raise ValueError(f"features of shape {remembered.shape}")
            if remembered.dtype != np.float32 or not np.isfinite(remembered).all():
                raise ValueError("features that are no finite numbers")
        except (ValidationError, ValueError, KeyError) as error:
            reason = "a field" if isinstance(error, ValidationError) else str(error)
            raise ArtefactError(
                f"`{path}` does not fit its classifier: {reason}",
                hint="restore the folder from a copy, or train again",
            ) from error
        fields = document.model_dump(exclude={"schema_version", "bands"})
        return cls(**fields, bands=tuple(document.bands), remembered=remembered)


def unit(features_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the features at length 1: direction tells classes, length mostly contrast."""
    length = np.linalg.norm(features_ND, axis=1, keepdims=True)
    scaled: NDArray[np.float32] = (features_ND / np.maximum(length, 1e-12)).astype(np.float32)
    return scaled


def distances(
    features_ND: NDArray[np.float32], remembered_MD: NDArray[np.float32], neighbours: int
) -> NDArray[np.float64]:
    """Returns the distance of each image to its so manieth nearest remembered one.

    Source: Sun et al. 2022, arXiv:2204.06507.
    """
    place = min(neighbours, len(remembered_MD)) - 1
    # Sums in double precision: an image must not depend on the others in its table.
    remembered, far = remembered_MD.astype(np.float64), np.empty(len(features_ND))
    for start in range(0, len(far), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        nearness = unit(features_ND[part]).astype(np.float64) @ remembered.T
        squared = np.partition(2 - 2 * nearness, place, axis=1)[:, place]
        far[part] = np.sqrt(np.maximum(squared, 0))
    return far
