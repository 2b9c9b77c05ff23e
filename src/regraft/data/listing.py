"""Which files a dataset holds, and what the folder says of each: no pixels yet."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from regraft.data.decode import IDX_ENTRY, SUFFIXES, UnreadableImage, read_idx
from regraft.data.dicom import DICOM_START, is_dicom
from regraft.errors import DataError, count, shorten

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir"})  # macOS archives, Synology thumbnails
AMBIGUOUS_WORDS = frozenset({"eval", "evaluation"})  # test to some tools, validation to others
LAYOUT = "one folder for each class, with or without train/val/test folders above them"


@dataclass(frozen=True, slots=True)
class Listed:
    """One image as the folder or the CSV names it."""

    path: str
    label: str
    split: str | None = None
    group: str | None = None


@dataclass
class Listing:
    """All images found, everything left out (path, reason), and what is wrong."""

    images: list[Listed] = field(default_factory=list)
    excluded: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def list_folder(root: Path) -> Listing:
    """Lists class folders, or the IDX files of a folder (MNIST's format).

    Raises:
        DataError: There is no such folder, or it has neither class folders nor IDX files.
    """
    if not root.exists():
        raise DataError(f"dataset folder not found: `{root}`", hint="check the path")
    if not root.is_dir():
        raise DataError(
            f"`{root}` is a file; expected a folder",
            hint=f"give {LAYOUT}, or the folder of the images and `--csv FILE`",
        )
    if idx_files := _idx_files(root):
        return _list_idx(root, idx_files)
    listing = Listing()
    folders = _visible_folders(root, root, listing)
    words = {folder.name: folder.name.lower() for folder in folders}
    if ambiguous := [name for name, word in words.items() if word in AMBIGUOUS_WORDS]:
        raise DataError(
            f"`{root / ambiguous[0]}` may mean validation or test: tools disagree",
            hint="rename the folder to `val` or `test`",
        )
    split_names = [name for name, word in words.items() if word in SPLIT_WORDS]
    if not folders:
        _refuse_flat(root)
    if not split_names:
        _exclude_files(root, root, listing)
        _list_classes(root, folders, None, listing)
        return listing
    if others := sorted(set(words) - set(split_names)):
        listing.problems.append(
            f"{shorten(others)} stand beside {shorten(split_names)}: a class or a split?"
        )
    if doubled := len(split_names) - len({SPLIT_WORDS[words[name]] for name in split_names}):
        listing.problems.append(f"{shorten(split_names)}: {count(doubled, 'split')} named twice")
    _exclude_files(root, root, listing)
    for name in split_names:
        _exclude_files(root, root / name, listing)
        inner = _visible_folders(root, root / name, listing)
        _list_classes(root, inner, SPLIT_WORDS[words[name]], listing)
    if "train" not in {SPLIT_WORDS[words[name]] for name in split_names}:
        listing.problems.append(f"there is no `train` folder beside {shorten(split_names)}")
    return listing


def list_images(paths: list[Path]) -> tuple[list[tuple[Path, str]], list[tuple[str, str]]]:
    """Returns (root, relative path) of each image file named or below a folder named, and what
    was left out, with the reason.
    """
    found: list[tuple[Path, str]] = []
    listing = Listing()
    for path in paths:
        if path.is_dir():
            found += [(path, name) for name in walk(path, path, listing)]
        else:
            found.append((path.parent, path.name))
    return found, listing.excluded


def _list_classes(root: Path, folders: list[Path], split: str | None, listing: Listing) -> None:
    empty = []
    for class_folder in folders:
        before = len(listing.images)
        for path in walk(root, class_folder, listing):
            listing.images.append(Listed(path, class_folder.name, split))
        if len(listing.images) == before:
            empty.append(class_folder.relative_to(root).as_posix())
    if empty:
        noun = count(len(empty), "class folder has", "class folders have")
        others = {Path(p).suffix for p, _ in listing.excluded if p.startswith(tuple(empty))} - {""}
        held = f"; files there end in {shorten(sorted(others))}" if others else ""
        listing.problems.append(f"{noun} no images: {shorten(empty)}{held}")


def _exclude_files(root: Path, folder: Path, listing: Listing) -> None:
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            listing.excluded.append((path.relative_to(root).as_posix(), "not in a class folder"))


def walk(root: Path, folder: Path, listing: Listing) -> Iterator[str]:
    """Yields the images below a folder, relative to `root`; what else is there is excluded."""
    # followlinks=False: a link to a parent folder would count every image many times.
    for here, folders, files in os.walk(folder, followlinks=False):
        for name in sorted(folders):
            inner = Path(here, name)
            if reason := _left_out(inner):
                listing.excluded.append((inner.relative_to(root).as_posix(), reason))
                folders.remove(name)
        folders.sort()
        for name in sorted(files):
            path = Path(here, name).relative_to(root).as_posix()
            if name.startswith("."):
                listing.excluded.append((path, "hidden file"))
            elif not may_be_image(Path(here, name)):
                listing.excluded.append((path, "not an image by its suffix"))
            else:
                yield path


def may_be_image(path: Path) -> bool:
    """Whether a name says that a file is an image; without a suffix, or one of digits alone (as
    identifiers of DICOM end), its first bytes must say that it is DICOM.
    """
    suffix = path.suffix.lower()
    if suffix in SUFFIXES or (suffix and not suffix[1:].isdigit()):
        return suffix in SUFFIXES
    try:
        if not path.is_file():  # a pipe would block for ever
            return False
        with path.open("rb") as stream:
            return is_dicom(stream.read(DICOM_START))
    except OSError:
        return False


def _visible_folders(root: Path, folder: Path, listing: Listing) -> list[Path]:
    found = []
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        if reason := _left_out(path):
            listing.excluded.append((path.relative_to(root).as_posix(), reason))
            if path.is_symlink():  # it may have been meant as a class: never drop one silently
                listing.problems.append(
                    f"`{path.relative_to(root)}` is a link to a folder: links are not followed"
                )
        else:
            found.append(path)
    return found


def _left_out(folder: Path) -> str | None:
    if folder.is_symlink():
        return "linked folder"
    is_system = folder.name.startswith(".") or folder.name in SYSTEM_FOLDERS
    return "hidden or system folder" if is_system else None


def _refuse_flat(root: Path) -> None:
    visible = [path for path in root.iterdir() if path.name[0] != "."]
    flat = [path for path in visible if path.suffix.lower() in SUFFIXES]
    found = f"{count(len(flat), 'image')} directly inside, and " if flat else ""
    raise DataError(
        f"`{root}` has {found}no class folders",
        hint=f"expected {LAYOUT}: `{root.name}/cats/1.jpg`, `{root.name}/dogs/2.jpg`",
    )


def _idx_files(root: Path) -> list[Path]:
    """Returns the image files; a zipped one only where it is not unpacked beside it."""
    found = sorted(root.glob("*-images-idx3-ubyte*"))
    return [file for file in found if file.suffix != ".gz" or file.with_suffix("") not in found]


def _list_idx(root: Path, image_files: list[Path]) -> Listing:
    listing = Listing()
    for file in image_files:
        prefix = file.name.split("-images-")[0]
        split = "test" if prefix == "t10k" else SPLIT_WORDS.get(prefix)
        label_file = root / file.name.replace("-images-idx3-", "-labels-idx1-")
        try:
            images = read_idx(file)
            labels = read_idx(label_file) if label_file.is_file() else None
        except UnreadableImage as error:
            listing.problems.append(f"`{file.name}` or its labels: {error}")
            continue
        if split is None:
            listing.problems.append(f"`{file.name}`: `{prefix}` is no split that is known")
        elif labels is None or len(labels) != len(images):
            listing.problems.append(
                f"`{file.name}` has {len(images)} images, `{label_file.name}` "
                f"{'is missing' if labels is None else f'has {len(labels)} labels'}"
            )
        else:
            for row, label in enumerate(labels):
                name = f"{file.name}#{row:06d}"
                assert IDX_ENTRY.match(name)
                listing.images.append(Listed(name, str(label), split))
    return listing
