"""DICOM files: the modality's values, and nothing of the patient. The only pydicom.

- The modality LUT or rescale is applied; integers stay integers where slope and intercept are.
- The VOI window is not: it differs from image to image and throws values away. One window for all
  is `--intensity-range`.
- MONOCHROME1 (0 is white) is inverted, so that more is brighter in every image.
- A palette or YBR image becomes RGB. Of several frames the first is read.
- No message holds a value of the file: those may be a patient's.
"""

import hashlib
import io
import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.data.pixels import Header, Pixels, UnreadableImage, held, refuse_size
from regraft.errors import EnvironmentFault

PREAMBLE, MAGIC = 128, b"DICM"
DICOM_START = PREAMBLE + len(MAGIC)
DEFLATED = b"1.2.840.10008.1.2.1.99"  # its whole data set is zipped: it may grow without bound
GREY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
PALETTE = "PALETTE COLOR"
# What pydicom says of pixels, and may be shown: no other text of its is passed on.
SAYINGS = {
    "less than expected": ("truncated", "it has fewer pixel bytes than its header promises"),
    "Unable to decompress": ("damaged", "its compressed pixels cannot be decoded"),
    "plugins are missing": ("codec", "there is no decoder for its compression"),
    "no available": ("codec", "there is no decoder for its compression"),
    "not supported": ("codec", "its compression is not read"),
    "not implemented": ("codec", "its compression is not read"),
}


def is_dicom(start: bytes) -> bool:
    """Whether a file that begins so says that it is DICOM."""
    return start[PREAMBLE:DICOM_START] == MAGIC


def dicom_header(content: bytes) -> Header:
    """Returns what the header tells, with a pseudonym for the patient.

    Raises:
        UnreadableImage: It is damaged, too large, or of a kind without an exact reading.
        EnvironmentFault: `regraft[medical]` is not installed.
    """
    return _header(_dataset(content, whole=False))


def dicom_pixels(content: bytes) -> Pixels:
    """Returns the first frame in the modality's values.

    Raises:
        UnreadableImage: As for `dicom_header`, or its pixels are damaged.
        EnvironmentFault: `regraft[medical]` is not installed.
    """
    from pydicom.pixels import pixel_array

    dataset = _dataset(content, whole=True)
    header = _header(dataset)
    try:
        stored = pixel_array(dataset, index=0)
    except Exception as error:  # codecs and pydicom raise anything on damaged files
        raise _damaged(error) from error
    if stored.shape[:2] != header.size:
        raise UnreadableImage("damaged", "its pixels are of another size than its header says")
    photometric = str(dataset.PhotometricInterpretation)
    if photometric == PALETTE:
        return held(_palette(dataset, stored))
    if photometric in COLOUR:
        return held(stored)
    if photometric == "MONOCHROME1":
        low, high = _stored_range(dataset)
        stored = low + high - stored.astype(np.int64)
    values = _rescaled(dataset, stored)
    ends = np.iinfo(np.int16)
    if header.pixel_type == "int16" and not ends.min <= values.min() <= values.max() <= ends.max:
        raise UnreadableImage("mode", "its rescaled values leave 16 bits")
    return values.astype(header.pixel_type)


def patient_group(identifier: str) -> str:
    """Returns a pseudonym for a patient's id: the same in every dataset."""
    text = b"regraft patient 1\0" + identifier.strip().encode("utf-8", "surrogateescape")
    return f"patient-{hashlib.sha256(text).hexdigest()[:12]}"


def _dataset(content: bytes, *, whole: bool) -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise EnvironmentFault(
            "this image is DICOM, and pydicom is not installed",
            hint="pip install 'regraft[medical]'",
        ) from error

    logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # it repeats values of the file
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    if DEFLATED in content[:1024]:
        raise UnreadableImage("codec", "a deflated DICOM file is not read")
    try:
        return pydicom.dcmread(io.BytesIO(content), stop_before_pixels=not whole)
    except Exception as error:  # pydicom raises anything on damaged files
        raise _damaged(error) from error


def _header(dataset: Any) -> Header:
    try:
        rows, columns = int(dataset.Rows), int(dataset.Columns)
        samples, bits = int(dataset.SamplesPerPixel), int(dataset.BitsAllocated)
        photometric = str(dataset.PhotometricInterpretation)
        frames = int(dataset.get("NumberOfFrames") or 1)
        identifier = str(dataset.get("PatientID") or "").strip()
        patient = patient_group(identifier) if identifier else None
        refuse_size(rows, columns, samples, bytes_each=max(1, bits // 8))
        if photometric in GREY and samples == 1:
            return Header((rows, columns), 1, _grey_type(dataset), frames > 1, patient)
        if photometric == PALETTE and samples == 1:
            deep = _palette_table(dataset).dtype.name
            return Header((rows, columns), 3, deep, frames > 1, patient)
        if photometric in COLOUR and samples == 3 and bits in (8, 16):
            return Header((rows, columns), 3, f"uint{bits}", frames > 1, patient)
    except UnreadableImage:
        raise
    except Exception as error:  # a tag is missing, or is of another kind than it should be
        raise _damaged(error) from error
    raise UnreadableImage("mode", "its photometric interpretation has no exact reading")


def _damaged(error: Exception) -> UnreadableImage:
    for sign, told in SAYINGS.items():
        if sign in str(error):
            return UnreadableImage(*told)
    if isinstance(error, AttributeError):
        return UnreadableImage("no-pixels", "a DICOM file without an image, or not a whole one")
    return UnreadableImage("damaged", f"a DICOM file that cannot be read ({type(error).__name__})")


def _stored_range(dataset: Any) -> tuple[int, int]:
    """Returns the smallest and largest value that the stored bits can hold."""
    bits = int(dataset.BitsStored)
    if int(dataset.PixelRepresentation):
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def _grey_type(dataset: Any) -> str:
    """Returns the type that holds every value this header allows."""
    if "FloatPixelData" in dataset or "DoubleFloatPixelData" in dataset:
        return "float32"
    low, high = _stored_range(dataset)
    if "ModalityLUTSequence" in dataset:
        return "uint16"
    slope, intercept = _rescale(dataset)
    if not (slope.is_integer() and intercept.is_integer()):
        return "float32"
    ends = sorted((low * slope + intercept, high * slope + intercept))
    for name in ("uint8", "uint16", "int16"):
        if np.iinfo(name).min <= ends[0] and ends[1] <= np.iinfo(name).max:
            return name
    # A CT in 16 stored bits could reach -33,792, and never does: `dicom_pixels` makes sure.
    return "int16" if ends[0] < 0 else "float32"


def _rescale(dataset: Any) -> tuple[float, float]:
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    return (1.0 if slope is None else float(slope)), float(intercept or 0)


def _rescaled(dataset: Any, stored: NDArray[Any]) -> Pixels:
    from pydicom.pixels import apply_modality_lut

    if "ModalityLUTSequence" in dataset:
        try:
            return held(apply_modality_lut(stored, dataset))
        except Exception as error:  # a damaged table
            raise _damaged(error) from error
    slope, intercept = _rescale(dataset)
    if (slope, intercept) == (1, 0):
        return stored[:, :, None]
    return held(stored.astype(np.float64) * slope + intercept)


def _palette_table(dataset: Any) -> NDArray[Any]:
    """Returns the colours of the palette, entries x 3, in 8 bits where these say all."""
    planes = []
    for colour in ("Red", "Green", "Blue"):
        entries, _, bits = dataset[f"{colour}PaletteColorLookupTableDescriptor"].value
        data = dataset[f"{colour}PaletteColorLookupTableData"].value
        kind = "<u2" if int(bits) == 16 else "u1"
        planes.append(np.frombuffer(data, kind, int(entries) or 65536))
    table = np.stack(planes, axis=1)
    if table.dtype == np.uint8:
        return table
    high, low = table >> 8, table & 255
    is_8_bit = bool((low == 0).all() or (low == high).all())
    return high.astype(np.uint8) if is_8_bit else table.astype(np.uint16)


def _palette(dataset: Any, stored: NDArray[Any]) -> NDArray[Any]:
    table = _palette_table(dataset)
    first = int(dataset.RedPaletteColorLookupTableDescriptor[1])
    # Indices below the first entry show it, those above the last show that (PS3.3 C.7.6.3.1.5).
    places = (stored.astype(np.int64) - first).clip(0, len(table) - 1)
    colours: NDArray[Any] = table[places]
    return colours
