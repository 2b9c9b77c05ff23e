"""One file to one (height, width, channels) array: the boundary through which every image comes.

Check, training, evaluation, prediction and serving all read through `read_pixels`, so they cannot
differ. A file is taken for what it is, not for what it is called. Values stay as they are stored;
nothing is ever clipped, zero-filled or replaced. Every rule is told in docs/formats.md.
"""

import hashlib
import os
import stat
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np

from regraft.data.arrays import IDX_ENTRY, npy_header, npy_pixels, read_idx
from regraft.data.deep import deep_header, deep_pixels, quiet_tifffile
from regraft.data.dicom import dicom_header, dicom_pixels, is_dicom
from regraft.data.pictures import (
    as_shown,
    encode_png,
    exif_orientation,
    picture_header,
    picture_pixels,
    quiet_pillow,
    resized,
)
from regraft.data.pixels import Header, Pixels, UnreadableImage, upright
from regraft.inputs import InputSpec
from regraft.parallel import parts

__all__ = [
    "CHUNK", "FORMATS", "IDX_ENTRY", "SUFFIXES", "Header", "Pixels", "UnreadableImage",
    "as_shown", "content_hash", "encode_png", "has_frames", "map_in_threads", "quiet_codecs",
    "read_content", "read_header", "read_idx", "read_input", "read_pixels", "read_whole", "sniffed",
]  # fmt: skip

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "NPY", "DICOM")
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".npy", ".dcm",
     ".dicom"}
)  # fmt: skip
MAY_HAVE_FRAMES = ("GIF", "TIFF", "WEBP", "PNG", "DICOM")
GROUP = 8  # images of one task: measured, small ones take a fifth longer one by one
CHUNK = 256  # images in flight while decoding or averaging: bounds memory, not a result
MOST_BYTES = 2**31  # of a file; assumed: above any single image

SIGNS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),  # BigTIFF
    (b"MM\0+", "TIFF"),
    (b"\x93NUMPY", "NPY"),
)
# What people have among their images that is none, or none that is read.
OTHERS = (
    (b"%PDF", "a PDF document"),
    (b"%!PS", "an EPS or PostScript document"),
    (b"\xc5\xd0\xd3\xc6", "an EPS document"),
    (b"8BPS", "a Photoshop document"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000, which is read inside DICOM only"),
    (b"\xff\x4f\xff\x51", "JPEG 2000, which is read inside DICOM only"),
    (b"SIMPLE  =", "a FITS file"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"version https://git-lfs", "a Git LFS pointer; run `git lfs pull`"),
)
PNM = (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6")

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_content(root: Path, path: str) -> bytes | Pixels:
    """Returns the bytes of a file below `root`, or the pixels of one row of an IDX file.

    Raises:
        UnreadableImage: The file is missing, not a regular file, too large or forbidden.
    """
    if entry := IDX_ENTRY.match(path):
        try:
            image: Pixels = read_idx(root / entry["file"])[int(entry["row"]), ..., None]
            return image
        except (OSError, IndexError) as error:
            raise UnreadableImage("missing", str(error)) from error
    file = root / path
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe or socket would block for ever
            raise UnreadableImage("not-a-file", "a folder, pipe or device")
        if found.st_size > MOST_BYTES:
            raise UnreadableImage("too-large", f"more than {MOST_BYTES:,} bytes")
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # or no name of a file
        raise UnreadableImage("missing", "no such file") from error
    except OSError as error:
        raise UnreadableImage("unreadable-file", error.strerror or str(error)) from error


def content_hash(content: bytes | Pixels) -> bytes:
    """Returns the SHA-256 of what `read_content` gives."""
    return hashlib.sha256(content if isinstance(content, bytes) else content.tobytes()).digest()


def sniffed(content: bytes) -> str:
    """Returns which of `FORMATS` the content is, by its first bytes.

    Raises:
        UnreadableImage: It is none; the detail names what it is instead.
    """
    if is_dicom(content):  # first: its preamble may hold the start of a TIFF
        return "DICOM"
    for sign, kind in SIGNS:
        if content.startswith(sign):
            return kind
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    if not content:
        raise UnreadableImage("empty-file", "0 bytes")
    raise UnreadableImage("not-an-image", _named(content))


def read_header(content: bytes | Pixels) -> Header:
    """Returns size, channels and type of pixels.

    Raises:
        UnreadableImage: The content is no image that this version reads exactly.
    """
    if not isinstance(content, bytes):
        return Header(content.shape[:2], content.shape[2], content.dtype.name)
    kind = sniffed(content)
    if kind == "NPY":
        return npy_header(content)
    if kind == "DICOM":
        return dicom_header(content)
    return picture_header(content, kind) or deep_header(content, kind)


def has_frames(content: bytes | Pixels) -> bool:
    """Whether frames or pages follow the one that is read.

    Raises:
        UnreadableImage: As `read_header`.
    """
    if not isinstance(content, bytes) or sniffed(content) not in MAY_HAVE_FRAMES:
        return False
    return read_header(content).has_frames


def read_whole(content: bytes | Pixels, *, size: tuple[int, int] | None = None) -> Pixels:
    """Returns the image as it is stored, upright: its own size, channels and values.

    Args:
        content: As `read_content` gives it.
        size: If it will be `resized` to this (height, width): it may then come so already.

    Raises:
        UnreadableImage: It cannot be decoded exactly.
    """
    if not isinstance(content, bytes):
        return content
    kind = sniffed(content)
    if kind == "NPY":
        return npy_pixels(content)
    if kind == "DICOM":
        return dicom_pixels(content)
    pixels = picture_pixels(content, kind, size)
    if pixels is not None:
        return pixels
    pixels = deep_pixels(content, kind)
    return upright(pixels, exif_orientation(content)) if kind == "PNG" else pixels


def read_pixels(content: bytes | Pixels, *, size: tuple[int, int], channels: int) -> Pixels:
    """Returns the image at (height, width), shape (height, width, channels), in its own values.

    Grey images are replicated to RGB where that is asked for.

    Raises:
        UnreadableImage: It cannot be decoded, or its channels are others than asked for.
    """
    return with_channels(resized(read_whole(content, size=size), size), channels)


def read_input(content: bytes | Pixels, inputs: InputSpec) -> Pixels:
    """Returns the image as a network expects it, but for `normalised`.

    Raises:
        UnreadableImage: As `read_pixels`, or its values are on another scale than the network's.
    """
    whole = read_whole(content, size=inputs.size)
    refuse_other_scale(whole, inputs)
    return with_channels(resized(whole, inputs.size), inputs.channels)


def with_channels(pixels: Pixels, channels: int) -> Pixels:
    """Returns the pixels with that many channels: grey is replicated to RGB, nothing else.

    Raises:
        UnreadableImage: They have others.
    """
    if pixels.shape[2] == 1 and channels == 3:
        return np.repeat(pixels, 3, axis=2)
    if pixels.shape[2] != channels:
        raise UnreadableImage(
            "channels", f"has {pixels.shape[2]} channels where {channels} are expected"
        )
    return pixels


def refuse_other_scale(pixels: Pixels, inputs: InputSpec) -> None:
    """Refuses an image whose values cannot be on the scale that the network was trained on.

    Raises:
        UnreadableImage: Its bits, or its values, are others, and nobody has given a range.
    """
    if inputs.clips:
        return
    depth = pixels.dtype.itemsize * 8
    if depth != inputs.bit_depth:
        raise UnreadableImage(
            "bit-depth",
            f"has {depth} bits per channel where the network was trained on {inputs.bit_depth}; "
            "`--intensity-range LOW,HIGH` says which values are black and white",
        )
    if depth > 8 and not inputs.reaches(float(pixels.min()), float(pixels.max())):
        low, high = inputs.intensity_range
        raise UnreadableImage(
            "intensity",
            f"has values from {pixels.min():g} to {pixels.max():g} where the network was trained "
            f"on {low:g} to {high:g}",
        )


@contextmanager
def quiet_codecs() -> Iterator[None]:
    """Silences the libraries that decode; for the main thread, around its workers."""
    with quiet_pillow(), quiet_tifffile():
        yield


def map_in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yields the results in order; Pillow releases the interpreter lock, so all cores decode."""
    running: deque[Future[list[Result]]] = deque()
    with quiet_codecs(), ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for rows in parts(len(items), GROUP):
                running.append(pool.submit(_mapped, function, items[rows.start : rows.stop]))
                if len(running) >= CHUNK // GROUP:
                    yield from running.popleft().result()
            while running:
                yield from running.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _mapped(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    return [function(item) for item in items]


def _named(content: bytes) -> str:
    start = content[:256].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if start.startswith(b"<svg") or (start.startswith(b"<?xml") and b"<svg" in content[:2048]):
        return "an SVG drawing"
    for sign, name in OTHERS:
        if content.startswith(sign):
            return name
    if content[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypavif"):
        return "HEIC or AVIF; save it as JPEG or PNG"
    if content[:2] in PNM and content[2:3].isspace():
        return "a Netpbm image (PGM, PPM); save it as PNG or TIFF"
    try:
        content[:512].decode("utf-8")
        return "a text file"
    except UnicodeDecodeError:
        return f"none of {', '.join(FORMATS)}"
