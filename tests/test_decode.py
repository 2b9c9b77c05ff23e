"""One file to one array: what is read is exact, and what cannot be read is named for what it is."""

import gzip
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from regraft.data.decode import (
    Header,
    Pixels,
    UnreadableImage,
    encode_png,
    read_content,
    read_header,
    read_idx,
    read_pixels,
)

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (6, 8), dtype=np.uint8)
FEW_COLOURS = RANDOM.integers(0, 2, (6, 8, 3), dtype=np.uint8) * 255
RAMP16 = np.arange(65536, dtype=np.uint16).reshape(256, 256)


def encoded(image: Image.Image | NDArray[Any], kind: str = "PNG", **options: Any) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def saved(array: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def read(content: bytes, channels: int | None = None) -> Pixels:
    """Reads at the image's own size (but for EXIF) and channels."""
    header = read_header(content)
    return read_pixels(content, size=header.size, channels=channels or header.channels)


def refusal(content: bytes) -> str:
    """The reason and detail, which must be the same from the header or from the pixels."""
    with pytest.raises(UnreadableImage) as caught:
        read(content)
    return str(caught.value)


def png(size: tuple[int, int], depth: int, colour: int, raw: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    ihdr = struct.pack(">IIBBBBB", size[1], size[0], depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", ihdr) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("mode", ["L", "LA", "1", "RGB", "RGBA", "P", "CMYK"])
@pytest.mark.fault("B12", "B16", "B18")
def test_each_8_bit_mode_reads_as_its_grey_or_its_colours(mode: str) -> None:
    is_grey = mode in ("L", "LA", "1")
    source = FEW_COLOURS[:, :, :1] if is_grey else FEW_COLOURS
    image = Image.fromarray(source[:, :, 0] if is_grey else source).convert(mode)
    content = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    assert read_header(content) == Header((6, 8), 1 if is_grey else 3)
    pixels = read(content)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, source)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.fault("B13")
def test_16_bit_grey_keeps_every_value(kind: str) -> None:
    content = encoded(RAMP16, kind)
    assert read_header(content) == Header((256, 256), 1, "uint16")
    pixels = read(content)
    assert pixels.dtype == np.uint16
    np.testing.assert_array_equal(pixels[:, :, 0], RAMP16)


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.fault("B19")
def test_all_exif_orientations_give_the_same_array(
    orientation: int, depth: type[np.uint8] | type[np.uint16]
) -> None:
    upright = GREY.astype(depth) * (257 if depth is np.uint16 else 1)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(np.ascontiguousarray(stored), exif=exif)
    pixels = read_pixels(content, size=(6, 8), channels=1)
    np.testing.assert_array_equal(pixels[:, :, 0], upright)


@pytest.mark.parametrize(
    ("mode", "hidden", "options"),
    [
        ("RGBA", (255, 0, 0, 0), {}),
        ("LA", (7, 0), {}),
        ("P", 3, {"transparency": 3}),
        ("L", 7, {"transparency": 7}),
        ("RGB", (255, 0, 0), {"transparency": (255, 0, 0)}),
    ],
)
@pytest.mark.fault("B16", "B17")
def test_transparent_pixels_are_white_whatever_colour_hides_beneath(
    mode: str, hidden: Any, options: dict[str, Any]
) -> None:
    image = Image.new(mode, (4, 4), hidden)
    if mode == "P":
        image.putpalette([200, 10, 10] * 256)
    pixels = read(encoded(image, "PNG", **options))
    assert np.unique(pixels).tolist() == [255]


NOISE = RANDOM.integers(0, 256, (40, 40), dtype=np.uint8)
JPEG, NOISE_PNG = encoded(NOISE, "JPEG"), encoded(NOISE)


@pytest.mark.parametrize(
    "content", [JPEG[: len(JPEG) * 6 // 10], JPEG[:-2], NOISE_PNG[: len(NOISE_PNG) * 6 // 10]]
)
@pytest.mark.fault("B4", "B5")
def test_a_truncated_image_is_refused_though_its_header_is_whole(content: bytes) -> None:
    assert read_header(content).size == (40, 40)
    assert refusal(content).startswith("truncated: ")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "empty-file: 0 bytes"),
        (b"see the other folder", "not-an-image: a text file"),
        (b"\n<!DOCTYPE html><title>404</title>", "not-an-image: an HTML page"),
        (b"<html></html>", "not-an-image: an HTML page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
            "not-an-image: a Git LFS pointer; run `git lfs pull`",
        ),
        (b"%PDF-1.7\n\xff\xfe\x00", "not-an-image: a PDF document"),
    ],
)
@pytest.mark.fault("B1", "B2")
def test_what_is_no_image_is_named_for_what_it_is(content: bytes, told: str) -> None:
    assert refusal(content) == told


@pytest.mark.parametrize("side", [7_100, 10_000, 30_000])
@pytest.mark.fault("B10", "B11")
def test_too_many_pixels_are_refused_from_the_header(side: int) -> None:
    bomb = png((side, side), 8, 0, b"")  # it has no pixels: decoding it would say `truncated`
    assert refusal(bomb).startswith("too-many-pixels: ")


@pytest.mark.parametrize(
    "array", [GREY, FEW_COLOURS, RAMP16[:6, :56].reshape(6, 8, 7)], ids=["2-D", "RGB", "7 channels"]
)
def test_an_array_file_reads_as_it_is(array: NDArray[Any]) -> None:
    pixels = read(saved(array))
    assert pixels.dtype == array.dtype
    np.testing.assert_array_equal(pixels, array.reshape(6, 8, -1))
    assert read_header(saved(array)).bit_depth == array.dtype.itemsize * 8


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.zeros(6, np.uint8), "array: has shape (6,) of uint8; expected (height, width["),
        (np.zeros((6, 8, 3, 1), np.uint8), "array: has shape (6, 8, 3, 1) of uint8; expected"),
        (np.zeros((0, 8), np.uint8), "no-pixels: 0x8 pixels of 1 channels"),
        (np.zeros((4, 4), np.int64), "mode: pixels of type int64 are not read"),
        (np.zeros((4, 4), np.complex64), "mode: pixels of type complex64 are not read"),
        (np.zeros((3, 99, 99), np.uint8), "array: has shape (3, 99, 99) of uint8; expected (hei"),
    ],
)
def test_an_array_of_another_form_is_refused(array: NDArray[Any], told: str) -> None:
    assert refusal(saved(array)).startswith(told)


class _Trap:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.touch, (self.canary,)


def test_a_pickled_array_is_refused_and_not_run(tmp_path: Path) -> None:
    trap = np.array([_Trap(tmp_path / "canary")], dtype=object)
    told = refusal(saved(trap))
    assert told.startswith("not-an-image: not a NumPy array of numbers: ")
    assert "pickled objects, which are never loaded" in told
    assert not (tmp_path / "canary").exists()


def _npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, image=GREY)
    return stream.getvalue()


def _lying_npy() -> bytes:
    stream = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (10**7, 10**7)}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + b"too few"


@pytest.mark.parametrize(
    "content", [_npz(), b"PK\x03\x04 and no archive", _lying_npy()], ids=["npz", "zip", "lie"]
)
def test_other_contents_named_npy_are_unreadable_images(content: bytes) -> None:
    assert refusal(content).split(":")[0] in ("not-an-image", "array", "too-many-pixels")


@pytest.mark.fault("B26")
def test_grey_is_replicated_to_rgb() -> None:
    pixels = read(encoded(GREY), channels=3)
    np.testing.assert_array_equal(pixels, np.stack([GREY] * 3, axis=2))


@pytest.mark.parametrize(
    ("content", "channels", "told"),
    [
        (encoded(FEW_COLOURS), 1, "channels: has 3 channels where 1 are expected"),
        (saved(np.zeros((4, 4, 5), np.uint8)), 3, "channels: has 5 channels where 3"),
    ],
)
@pytest.mark.fault("B26")
def test_other_channels_than_expected_are_refused(content: bytes, channels: int, told: str) -> None:
    with pytest.raises(UnreadableImage) as caught:
        read_pixels(content, size=(4, 4), channels=channels)
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize("size", [(3, 5), (11, 17)])
def test_resizing_16_bit_agrees_with_8_bit_and_stays_in_range(size: tuple[int, int]) -> None:
    extremes = (GREY > 127).astype(np.uint8) * np.uint8(255)
    for image in (GREY, extremes):
        eight = read_pixels(encoded(image), size=size, channels=1)
        wide = image.astype(np.uint16) * np.uint16(257)
        sixteen = read_pixels(encoded(wide), size=size, channels=1)
        assert sixteen.dtype == np.uint16
        assert sixteen.shape == eight.shape == (*size, 1)
        assert np.abs(sixteen / 257 - eight).max() <= 1.0


def test_resizing_many_channels_treats_each_as_a_grey_image() -> None:
    many = RANDOM.integers(0, 256, (9, 7, 5), dtype=np.uint8)
    together = read_pixels(saved(many), size=(4, 6), channels=5)
    for channel in range(5):
        alone = read_pixels(encoded(many[:, :, channel]), size=(4, 6), channels=1)
        assert np.abs(together[:, :, channel].astype(int) - alone[:, :, 0]).max() <= 1


def idx(array: NDArray[np.uint8]) -> bytes:
    shape = struct.pack(f">{array.ndim}I", *array.shape)
    return b"\x00\x00\x08" + bytes([array.ndim]) + shape + array.tobytes()


STACK = RANDOM.integers(0, 256, (3, 4, 5), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_row_of_an_idx_file_is_an_image(tmp_path: Path, suffix: str) -> None:
    name = f"train-images-idx3-ubyte{suffix}"
    (tmp_path / name).write_bytes(gzip.compress(idx(STACK)) if suffix else idx(STACK))
    content = read_content(tmp_path, f"{name}#000002")
    assert read_header(content) == Header((4, 5), 1)
    pixels = read_pixels(content, size=(4, 5), channels=1)
    np.testing.assert_array_equal(pixels[:, :, 0], STACK[2])


ZIPPED = gzip.compress(idx(STACK))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a-idx3-ubyte", idx(STACK)[:-1], "truncated: holds 59 bytes where (3, 4, 5) are expected"),
        ("a-idx3-ubyte", idx(STACK)[:9], "truncated: "),
        ("a-idx3-ubyte", b"\x00\x00\x0d\x03" + bytes(12), "not-an-image: not an IDX file of uns"),
        ("a-idx3-ubyte", b"", "not-an-image: not an IDX file"),
        ("a-idx3-ubyte.gz", ZIPPED[:-12], "truncated: not a whole gzip file"),
        ("a-idx3-ubyte.gz", ZIPPED[:10] + b"\xff" + ZIPPED[11:], "truncated: "),
        ("a-idx3-ubyte.gz", idx(STACK), "truncated: not a whole gzip file"),
    ],
    ids=["short", "short-header", "floats", "empty", "short-gzip", "corrupt-gzip", "no-gzip"],
)
def test_a_damaged_idx_file_is_named(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableImage) as caught:
        read_idx(tmp_path / name)
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize("path", ["b-images-idx3-ubyte#000000", "a-images-idx3-ubyte#000003"])
def test_an_idx_row_that_does_not_exist_is_missing(tmp_path: Path, path: str) -> None:
    (tmp_path / "a-images-idx3-ubyte").write_bytes(idx(STACK))
    with pytest.raises(UnreadableImage, match=r"^missing: "):
        read_content(tmp_path, path)


@pytest.mark.parametrize(
    ("pixels", "shown"),
    [(FEW_COLOURS, FEW_COLOURS), (RAMP16[..., None], np.rint(RAMP16[..., None] / 257))],
)
def test_an_encoded_image_reads_back_in_8_bits_and_carries_no_metadata(
    pixels: Pixels, shown: Pixels
) -> None:
    content = encode_png(pixels)
    np.testing.assert_array_equal(read(content), shown)
    kinds, position = [], 8
    while position < len(content):
        length = int.from_bytes(content[position : position + 4])
        kinds.append(content[position + 4 : position + 8])
        position += 12 + length
    assert set(kinds) == {b"IHDR", b"IDAT", b"IEND"}


@pytest.mark.parametrize("side", [32, 64, 100])
@pytest.mark.parametrize("turned", [False, True])
def test_a_large_jpeg_read_small_is_nearly_what_it_is_read_whole(side: int, turned: bool) -> None:
    smooth = Image.fromarray(GREY).resize((600, 400), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6  # a quarter turn
    content = encoded(smooth, "JPEG", quality=95, exif=exif)
    found = read_pixels(content, size=(side, side), channels=1)
    whole = (
        Image.open(io.BytesIO(content)).transpose(Image.Transpose.ROTATE_270)
        if turned
        else (Image.open(io.BytesIO(content)))
    )
    expected = np.asarray(whole.resize((side, side), Image.Resampling.BILINEAR))
    assert found.shape == (side, side, 1)
    assert np.abs(found[..., 0].astype(int) - expected).max() <= 3
