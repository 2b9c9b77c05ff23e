from pathlib import Path

from sklearn.datasets import load_digits

from regraft.data.dataset import Dataset
from regraft.demo import FEW, SOURCE_IMAGES, write_digits


def test_no_image_of_the_demo_is_in_both_datasets(tmp_path: Path) -> None:
    write_digits(tmp_path / "source", tmp_path / "target")
    source, target = Dataset.open(tmp_path / "source"), Dataset.open(tmp_path / "target")
    first = {sample.sha256 for sample in source.samples}
    assert not first & {sample.sha256 for sample in target.samples}
    assert len(source.samples) == SOURCE_IMAGES
    assert len(source.samples) + len(target.samples) == len(load_digits().target)
    assert source.class_names == tuple("0123456789")
    assert target.class_names == ("even", "odd")
    assert len(target.rows("train")) == len(target.rows("val")) == 2 * FEW


def test_the_label_of_a_demo_image_is_its_parity(tmp_path: Path) -> None:
    write_digits(tmp_path / "source", tmp_path / "target")
    truth = load_digits().target
    for file in (tmp_path / "target").rglob("*.png"):
        assert file.parent.name == ("even", "odd")[truth[int(file.stem)] % 2]
