"""DICOM: the modality's values come back, and nothing of the patient ever does."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import Dataset as Tags
from pydicom import FileMetaDataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from regraft import api
from regraft.data.dataset import DataOptions, Dataset
from regraft.data.decode import (
    Header,
    UnreadableImage,
    quiet_codecs,
    read_header,
    read_whole,
)
from regraft.data.dicom import patient_group
from regraft.errors import DataError, EnvironmentFault, UsageError
from regraft.training.recipe import Recipe

RANDOM = np.random.default_rng(0)
RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)  # 12 bits, as detectors have
NAME, IDENTIFIER = "Doe^Jane", "MRN-0042"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_codecs():  # as around all reading
        yield


def dicom(
    pixels: NDArray[Any], *, bits: int | None = None, syntax: str = ExplicitVRLittleEndian,
    patient: str = IDENTIFIER, **tags: Any,
) -> bytes:  # fmt: skip
    """Returns a DICOM file with these stored values; a tag given as None is left out."""
    data = Tags()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "1.2.3"
    data.PatientName, data.PatientID = NAME, patient
    depth = pixels.dtype.itemsize * 8
    colours = 3 if pixels.shape[-1] == 3 else 1
    shape = pixels.shape[: 2 if pixels.ndim == 2 or colours == 3 else 3]
    data.Rows, data.Columns = shape[-2:]
    data.BitsAllocated, data.BitsStored = depth, bits or depth
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.SamplesPerPixel = colours
    data.PhotometricInterpretation = "RGB" if colours == 3 else "MONOCHROME2"
    if colours == 3:
        data.PlanarConfiguration = 0
    for keyword, value in tags.items():
        if value is None:
            delattr(data, keyword)
        else:
            setattr(data, keyword, value)
    big = syntax == ExplicitVRBigEndian
    data.PixelData = pixels.astype(pixels.dtype.newbyteorder(">" if big else "<")).tobytes()
    data["PixelData"].VR = "OW" if depth == 16 else "OB"
    if syntax == RLELossless:
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.compress(RLELossless, pixels)
    stream = io.BytesIO()
    data.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def refusal(content: bytes) -> str:
    with pytest.raises(UnreadableImage) as caught:
        read_whole(content)
    told = str(caught.value)
    assert NAME not in told
    assert IDENTIFIER not in told
    return told


@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless]
)
@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16"])
def test_stored_values_are_exact(kind: str, syntax: str) -> None:
    stored = RANDOM.integers(-(2**15), 2**15 - 1, (9, 12)).astype(kind)
    content = dicom(stored, syntax=syntax)
    header = read_header(content)
    assert (header.size, header.channels, header.pixel_type) == ((9, 12), 1, kind)
    pixels = read_whole(content)
    assert pixels.dtype == kind
    np.testing.assert_array_equal(pixels[:, :, 0], stored)


@pytest.mark.parametrize(
    ("slope", "intercept", "held"),
    [(1, -1024, "int16"), (2, 0, "uint16"), (1, 0, "uint16"), (20, 0, "float32"),
     (0.5, 0, "float32")],
)  # fmt: skip
def test_the_rescale_of_the_modality_is_applied_exactly(
    slope: float, intercept: float, held: str
) -> None:
    content = dicom(RAMP, bits=12, RescaleSlope=slope, RescaleIntercept=intercept)
    assert read_header(content).pixel_type == held
    pixels = read_whole(content)
    assert pixels.dtype == held
    np.testing.assert_array_equal(pixels[:, :, 0], RAMP.astype(float) * slope + intercept)


@pytest.mark.parametrize(("kind", "least"), [("int16", -2000), ("uint16", 0)])
def test_a_ct_in_16_stored_bits_stays_in_16_bits(kind: str, least: int) -> None:
    stored = np.array([[least, 3071], [0, 1024]], kind)
    content = dicom(stored, RescaleSlope=1, RescaleIntercept=-1024)
    assert read_header(content).pixel_type == "int16"
    assert read_whole(content)[:, :, 0].tolist() == [[least - 1024, 2047], [-1024, 0]]
    stored[0, 0] = np.iinfo(kind).max if least == 0 else np.iinfo(kind).min
    beyond = dicom(stored, RescaleSlope=1, RescaleIntercept=-1024)
    assert refusal(beyond) == "mode: its rescaled values leave 16 bits"


def test_a_modality_table_is_applied() -> None:
    table = Tags()
    entries = np.array([7, 70, 700, 7000], "<u2").tobytes()
    table.LUTDescriptor, table.LUTData = [4, 0, 16], entries
    table.ModalityLUTType = "US"
    stored = np.array([[0, 1], [2, 3]], np.uint8)
    content = dicom(stored, ModalityLUTSequence=[table])
    assert read_header(content).pixel_type == "uint16"
    assert read_whole(content)[:, :, 0].tolist() == [[7, 70], [700, 7000]]


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_monochrome1_is_inverted_within_its_bits(bits: int) -> None:
    stored = RANDOM.integers(0, 2**bits, (8, 8)).astype(np.uint16)
    content = dicom(stored, bits=bits, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(read_whole(content)[:, :, 0], 2**bits - 1 - stored)


def test_signed_monochrome1_is_inverted_too() -> None:
    stored = np.array([[-2048, 2047], [0, -1]], np.int16)
    content = dicom(stored, bits=12, PhotometricInterpretation="MONOCHROME1")
    assert read_whole(content)[:, :, 0].tolist() == [[2047, -2048], [-1, 0]]


def test_the_window_of_the_viewer_is_not_applied() -> None:
    plain = read_whole(dicom(RAMP, bits=12))
    windowed = read_whole(dicom(RAMP, bits=12, WindowCenter=40, WindowWidth=80))
    np.testing.assert_array_equal(plain, windowed)


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_colours_are_exact(kind: str) -> None:
    stored = RANDOM.integers(0, np.iinfo(kind).max, (6, 7, 3)).astype(kind)
    content = dicom(stored)
    assert read_header(content).channels == 3
    np.testing.assert_array_equal(read_whole(content), stored)


def test_ybr_becomes_rgb() -> None:
    grey = np.full((4, 4, 3), (90, 128, 128), np.uint8)
    pixels = read_whole(dicom(grey, PhotometricInterpretation="YBR_FULL"))
    assert np.unique(pixels).tolist() == [90]


@pytest.mark.parametrize(
    ("entries", "held", "top"),
    [([0, 257 * 255], "uint8", 255), ([0, 255 << 8], "uint8", 255), ([0, 1234], "uint16", 1234)],
)
def test_a_palette_becomes_colours(entries: list[int], held: str, top: int) -> None:
    table = np.array(entries, "<u2").tobytes()
    tags: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour in ("Red", "Green", "Blue"):
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [2, 0, 16]
        tags[f"{colour}PaletteColorLookupTableData"] = table
    content = dicom(np.array([[0, 1], [1, 9]], np.uint8), **tags)
    assert read_header(content) == Header((2, 2), 3, held, False, patient_group(IDENTIFIER))
    assert read_whole(content)[:, :, 1].tolist() == [[0, top], [top, top]]


def test_of_several_frames_the_first_is_read_and_that_is_known() -> None:
    frames = RANDOM.integers(0, 255, (3, 5, 6)).astype(np.uint8)
    content = dicom(frames, NumberOfFrames=3)
    assert read_header(content).has_frames
    np.testing.assert_array_equal(read_whole(content)[:, :, 0], frames[0])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (dicom(RAMP)[:-600], "truncated: it has fewer pixel bytes than its header promises"),
        (dicom(RAMP)[:400], "no-pixels: a DICOM file without an image, or not a whole one"),
        (dicom(RAMP, Rows=None), "no-pixels: a DICOM file without an image"),
        (dicom(RAMP, Rows=0), "no-pixels: 0x64 pixels of 1 channels"),
        (dicom(RAMP, Rows=30_000, Columns=30_000), "too-many-pixels: 30000x30000, more than"),
        (dicom(RAMP, PhotometricInterpretation="JANE"), "mode: its photometric interpretation"),
        (dicom(RAMP, syntax=DeflatedExplicitVRLittleEndian), "codec: a deflated DICOM file"),
        (dicom(RAMP)[:200], "no-pixels: "),
    ],
    ids=["cut", "cut-header", "no-rows", "none", "bomb", "photometric", "deflated", "start"],
)
def test_what_cannot_be_read_is_refused_without_a_word_of_the_patient(
    content: bytes, told: str
) -> None:
    assert refusal(content).startswith(told)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(EnvironmentFault, match="this image is DICOM, and pydicom is not") as caught:
        read_header(dicom(RAMP))
    assert caught.value.hint == "pip install 'regraft[medical]'"


def patients(root: Path, *, number: int = 6, each: int = 4) -> Path:
    """Writes two classes of patients with several images each, in files without a suffix."""
    for label in ("a", "b"):
        (root / label).mkdir(parents=True)
        for who in range(number):
            for image in range(each):
                stored = RANDOM.integers(0, 4096, (16, 16)).astype(np.uint16)
                content = dicom(stored, bits=12, patient=f"MRN-{label}{who:04d}")
                (root / label / f"IM{who:02d}{image}").write_bytes(content)
    return root


def test_patients_are_offered_as_groups_and_stay_on_one_side(tmp_path: Path) -> None:
    root = patients(tmp_path / "data")
    plain = Dataset.open(root)
    assert (
        "the DICOM files name 12 patients: `--group-by patient` keeps each in one split"
        in plain.notes
    )
    dataset = Dataset.open(root, DataOptions(group_by="patient"))
    sides: dict[str | None, set[str]] = {}
    for sample in dataset.samples:
        sides.setdefault(sample.group, set()).add(sample.split)
    assert len(sides) == 12
    assert all(len(splits) == 1 for splits in sides.values())
    assert patient_group("MRN-a0000") in sides


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda root: np.save(root / "a" / "x.npy", np.zeros((16, 16), np.uint16)), "`a/x.npy`"),
        (
            lambda root: (root / "b" / "x.dcm").write_bytes(dicom(RAMP[:16, :16], patient=" ")),
            "`b/x.dcm`",
        ),
    ],
)
def test_a_file_that_names_no_patient_is_a_problem(
    tmp_path: Path, spoil: Callable[[Path], object], told: str
) -> None:
    root = patients(tmp_path / "data")
    spoil(root)
    with pytest.raises(DataError, match=f"1 file names no patient: {told}"):
        Dataset.open(root, DataOptions(group_by="patient"))


def test_other_groups_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`--group-by doctor` is unknown"):
        Dataset.open(patients(tmp_path / "data"), DataOptions(group_by="doctor"))


def test_no_output_holds_anything_of_a_patient(tmp_path: Path) -> None:
    root = patients(tmp_path / "data")
    told: list[str] = []
    dataset = Dataset.open(root, DataOptions(group_by="patient"))
    recipe = Recipe.scratch().changed({"image_size": 32, "epochs": 1})
    run = api.pretrain(
        dataset,
        out=tmp_path / "run",
        arch="resnet10t",
        recipe=recipe,
        on_progress=lambda record: told.append(repr(record)),
    )
    api.evaluate(run.folder, root, on_progress=lambda record: told.append(repr(record)))
    api.report([run.folder], out=run.folder / "report.html")
    table, broken = api.predict(run.folder, [root])
    assert table is not None
    assert broken == []
    written = [path for path in run.folder.rglob("*") if path.is_file()]
    assert len(written) > 8
    content = b"".join(path.read_bytes() for path in written) + json.dumps(told).encode()
    for secret in (NAME, "Jane", "MRN-"):
        assert secret.encode() not in content
