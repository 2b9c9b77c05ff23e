"""One pass over every file: its hashes, its form and what it looks like, for `checks`."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from regraft.data.dataset import DataOptions
from regraft.data.decode import (
    Header,
    UnreadableImage,
    content_hash,
    quiet_codecs,
    read_content,
    read_header,
    read_whole,
    sniffed,
)
from regraft.data.listing import Listed
from regraft.data.looks import TOGETHER, Looks, Seen
from regraft.data.opening import Reading
from regraft.errors import DataError
from regraft.parallel import map_in_processes, one_thread, parts

ONE_FRAME = ("JPEG", "BMP", "IDX")  # and no patient: their headers tell no more than pixels
OnRead = Callable[[int, int], None]


@dataclass(slots=True)
class Picture:
    """One file that could be read.

    Attributes:
        place: Of its dataset among those surveyed.
        content: Hash of the bytes.
        pixels: Equal for all files that decode to the same pixels, and for no others.
        border: Mean of the outermost pixels, of 1.
        brightness: Mean of all pixels, of 1.
    """

    place: int
    path: str
    label: str
    split: str
    group: str | None
    content: bytes
    pixels: bytes
    size: tuple[int, int] = (0, 0)
    channels: int = 0
    pixel_type: str = ""
    format: str = ""
    brightness: float = 0.0
    border: float = 0.0


Read = tuple[Picture, Header] | tuple[str, UnreadableImage]


@dataclass
class Survey:
    """What was read of several datasets, and what could not be read.

    Attributes:
        pictures: All of them, dataset after dataset; `looks` holds theirs, in this order.
        unreadable: (dataset, path, sha256 or nothing, reason).
        problems: Of each dataset: what is wrong with its folders or its CSV.
        excluded: Of each dataset: files that are no images, with the reason.
        is_split: Of each dataset: whether the folder or the CSV says where each image belongs.
    """

    roots: list[Path]
    options: list[DataOptions]
    pictures: list[Picture] = field(default_factory=list)
    looks: Looks = field(default_factory=lambda: Looks.empty(0))
    unreadable: list[tuple[int, str, str, str]] = field(default_factory=list)
    problems: list[list[str]] = field(default_factory=list)
    excluded: list[list[tuple[str, str]]] = field(default_factory=list)
    is_split: list[bool] = field(default_factory=list)

    @classmethod
    @one_thread
    def read(
        cls, roots: Sequence[Path], options: Sequence[DataOptions], on_read: OnRead | None = None
    ) -> "Survey":
        """Reads and decodes every file once, on all cores.

        Raises:
            DataError: A folder is missing, or holds no class folders.
            UsageError: An option does not fit.
        """
        survey = cls(list(roots), list(options))
        readings = [
            Reading(root, chosen, False) for root, chosen in zip(roots, options, strict=True)
        ]
        for reading in readings:
            reading.list_files()
        total = sum(len(reading.listing.images) for reading in readings)
        survey.looks = Looks.empty(total)
        with quiet_codecs():
            for place, reading in enumerate(readings):
                survey._add(place, reading, total, on_read or (lambda _done, _total: None))
        rows = np.array([picture[0] for picture in survey._rows], np.int64)
        survey.pictures = [picture for _, picture in survey._rows]
        survey.looks = survey.looks.kept(rows)
        survey._compare_pixels()
        return survey

    def _compare_pixels(self) -> None:
        """Hashes the pixels of files that look equal but differ in their bytes.

        Hashing all pixels of all files would cost a fifth of decoding them; few look equal.
        """
        alike: dict[bytes, list[Picture]] = defaultdict(list)
        for row, one in enumerate(self.pictures):
            if not self.looks.flat[row]:
                view = self.looks.thumbs[row].tobytes() + self.looks.discs[row].tobytes()
                alike[hashlib.sha256(view).digest()].append(one)
        for pictures in alike.values():
            first_of = {one.content: one for one in pictures}
            if len(first_of) > 1:
                hashes = {key: self._pixel_hash(one) for key, one in first_of.items()}
                for one in pictures:
                    one.pixels = hashes[one.content]

    def _pixel_hash(self, picture: Picture) -> bytes:
        try:
            pixels = read_whole(read_content(self.roots[picture.place], picture.path))
        except UnreadableImage:  # gone since: its bytes are all that is known
            return picture.content
        form = repr((pixels.shape, pixels.dtype.name)).encode()
        return hashlib.sha256(form + pixels.tobytes()).digest()

    def __post_init__(self) -> None:
        self._rows: list[tuple[int, Picture]] = []
        self._seen = 0

    def _add(self, place: int, reading: Reading, total: int, on_read: OnRead) -> None:
        begin, number = self._seen, len(reading.listing.images)

        def read(rows: range) -> list[Read]:
            return _read(reading, place, rows, looks)

        def died(rows: range) -> list[Read]:
            """Reads them again one by one: it is one of them."""
            if len(rows) == 1:
                return [("", UnreadableImage("decoder-crash", "the decoder died of it"))]
            single = [range(row, row + 1) for row in rows]
            return list(chain.from_iterable(map_in_processes(read, single, died)))

        looks = self.looks.part(begin, number)
        images: list[Listed] = []
        headers: list[Header] = []
        found: list[tuple[int, Picture]] = []
        surveyed = map_in_processes(read, parts(number, TOGETHER), died)
        for row, (one, more) in enumerate(chain.from_iterable(surveyed)):
            self._seen += 1
            on_read(self._seen, total)
            image = reading.listing.images[row]
            sha256 = one.content.hex() if isinstance(one, Picture) else one
            if reading.is_excluded(image.path, sha256):
                continue
            if isinstance(one, Picture):
                assert isinstance(more, Header)
                images.append(image)
                headers.append(more)
                found.append((begin + row, one))
            else:
                self.unreadable.append((place, image.path, one, str(more)))
        try:
            grouped = reading.group(reading.by_patient(images, headers))
        except DataError:  # told among the problems; the images have no groups then
            grouped = images
        problems = list(reading.listing.problems)  # before too few images to split are one of them
        samples = reading.split(grouped, [picture.content.hex() for _, picture in found])
        for (_, picture), sample in zip(found, samples, strict=True):
            picture.split, picture.group = sample.split, sample.group
        self._rows += found
        self.problems.append(problems)
        self.excluded.append(list(reading.listing.excluded))
        self.is_split.append(any(image.split for image in images))


def _read(reading: Reading, place: int, rows: range, looks: Looks) -> list[Read]:
    """Reads files one by one, and stores what they look like together: numpy's calls are few."""
    read: list[Read] = []
    seen: list[Seen] = []
    for row in rows:
        found = _read_one(reading, place, row)
        read.append(found[:2])
        if len(found) == 3:
            seen.append(found[2])
    shown = [row for row, (one, _) in zip(rows, read, strict=True) if isinstance(one, Picture)]
    pictures = [one for one, _ in read if isinstance(one, Picture)]
    means = looks.set(np.array(shown, np.int64), seen).tolist()
    for picture, own, (brightness, border) in zip(pictures, seen, means, strict=True):
        stored = np.dtype(own.pixel_type)
        largest = float(np.iinfo(stored).max) if stored.kind == "u" else 1.0
        picture.brightness, picture.border = brightness / largest, border / largest
    return read


def _read_one(
    reading: Reading, place: int, row: int
) -> tuple[Picture, Header, Seen] | tuple[str, UnreadableImage]:
    image, sha256 = reading.listing.images[row], ""
    try:
        content = read_content(reading.root, image.path)
        digest = content_hash(content)
        sha256 = digest.hex()
        kind = sniffed(content) if isinstance(content, bytes) else "IDX"
        pixels = read_whole(content)
        stored = pixels.dtype.name
        header = Header(pixels.shape[:2], pixels.shape[2], stored)
        if kind not in ONE_FRAME:  # patients and frames stand in the header
            header = read_header(content)
    except UnreadableImage as error:
        return sha256, error
    described = Picture(
        place=place,
        path=image.path,
        label=image.label,
        split=image.split or "train",
        group=image.group,
        content=digest,
        pixels=digest,
        size=pixels.shape[:2],
        channels=pixels.shape[2],
        pixel_type=header.pixel_type,
        format=kind,
    )
    return described, header, Seen.of(pixels, stored)
