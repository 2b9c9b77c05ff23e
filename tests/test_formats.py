"""The awkward real files: each is read right, or refused with the reason that the docs name."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regraft.data.decode import (
    UnreadableImage,
    quiet_codecs,
    read_content,
    read_header,
    read_whole,
)

ROOT = Path(__file__).parents[1]
REFUSED = {
    "pillow/16bit.cropped.jp2": "not-an-image",
    "pillow/hopper_16bit.pgm": "not-an-image",
    "pillow/broken_data_stream.png": "damaged",
    "rasterio/float_nan.tif": "non-finite",
    "pillow/separate_planar_extra_samples.tiff": "truncated",  # its second plane is not stored
}  # what Pillow opens, and we refuse
HELD = {"bool": "uint8", "int8": "int16", "uint32": "float32", ">i2": "int16"}
COMPOSITED = {"tiff_16bit_RGBa.tiff", "tiff_strip_cmyk_jpeg.tif"}  # 4 stored channels, 3 colours
UNKNOWN_TO_PILLOW = {"hopper_unknown_pixel_mode.tif", "MR_small_jpeg_ls_lossless.dcm",
                     "AnnualCrop_1.tif", "Forest_1.tif", "RGBA.uint16.tif"}  # fmt: skip


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "EXPECT.csv").open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def reported(row: dict[str, str]) -> tuple[int, str] | None:
    """Returns bands and type that tifffile or pydicom report; None where neither says."""
    if found := re.fullmatch(r"\(([\d, ]+)\) (\w+)", row["tifffile"]):
        shape = [int(part) for part in found[1].split(",")]
        outer = min(shape[0], shape[-1]) if len(shape) == 3 else 1
        return outer, HELD.get(found[2], found[2])
    if row["kind"] == "dicom" and row["dtype_minmax"]:
        kind = row["dtype_minmax"].split()[0]
        grey = row["mode"].startswith("MONO")
        return (1 if grey else 3), HELD.get(kind, kind)
    return None


def test_each_awkward_file_is_read_to_its_bits_and_bands_or_refused(shared_data: Path) -> None:
    folder = shared_data / "awkward"
    read = refused = compared = 0
    for row in rows(folder):
        path = row["path"]
        content = read_content(folder, path)
        try:
            with quiet_codecs():
                header, pixels = read_header(content), read_whole(content)
        except UnreadableImage as error:
            assert row["pillow_or_pydicom_ok"] == "False" or REFUSED[path] == error.reason, path
            assert Path(path).name not in UNKNOWN_TO_PILLOW, path
            refused += 1
            continue
        read += 1
        assert path not in REFUSED
        assert (header.channels, header.pixel_type) == (pixels.shape[2], pixels.dtype.name), path
        if row["mode"].startswith("I;16"):
            assert pixels.dtype == np.uint16, path
        stored = reported(row)
        if stored is None or row["mode"] == "P":
            continue
        bands = 3 if Path(path).name in COMPOSITED else stored[0]
        assert (pixels.shape[2], pixels.dtype.name) == (bands, stored[1]), path
        compared += 1
    assert (read, refused) == (52, 18)
    assert compared >= 27


def test_the_table_of_docs_is_what_the_command_prints(shared_data: Path) -> None:
    docs = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "formats.py"),
        str(shared_data / "awkward"),
    ]
    environment: dict[str, Any] = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=True, timeout=120
    )
    assert docs.endswith(result.stdout)


@pytest.mark.fault("B19")
def test_the_eight_orientations_of_a_real_photograph_are_one_picture(shared_data: Path) -> None:
    folder = shared_data / "awkward" / "pillow"
    found = [
        read_whole(read_content(folder, f"hopper_orientation_{n}.jpg")).astype(int)
        for n in range(2, 9)
    ]
    for other in found[1:]:  # JPEG's blocks lie differently: equal but for its losses
        assert np.abs(other - found[0]).mean() < 5
