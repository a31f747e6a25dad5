"""Splits and classes that would train or score on the wrong labels are refused."""

import shlex
import shutil
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from script_runs import write_digits
from timm.data.auto_augment import AugmentOp

import ditac_timm.training.data  # noqa: F401  (which sees to posterising)

FLAGS = shlex.split("--model test_resnet --num-classes 3 --img-size 32 -b 4 -j 0 --epochs 1 --warmup-epochs 0 --lr .01")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_digits(tmp_path / "data", classes=3, train=4, validation=2)


def run(train: ModuleType, data: Path, *flags: str) -> int:
    return train.main(["--data-dir", str(data), "--output", str(data.parent / "out"), *FLAGS, *flags])


def test_empty_class(train: ModuleType, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "train" / "digit_00").mkdir()
    assert run(train, data) == 2
    assert "digit_00 holds no images" in capsys.readouterr().err
    assert not (data.parent / "out").exists()


def test_no_images_at_all(train: ModuleType, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(data / "validation")
    (data / "validation" / "digit_0").mkdir(parents=True)
    assert run(train, data) == 2
    assert "--val-split" in capsys.readouterr().err


def test_split_that_is_missing(train: ModuleType, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(data / "validation")
    assert run(train, data) == 2  # timm would validate on the training images
    assert "--val-split" in capsys.readouterr().err
    assert run(train, data, "--val-split", "") == 0


def test_synonyms_of_splits_are_timms(train: ModuleType, data: Path) -> None:
    (data / "validation").rename(data / "val")
    assert run(train, data) == 0


def test_splits_with_different_classes(train: ModuleType, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(data / "validation" / "digit_1")
    assert run(train, data) == 2
    error = capsys.readouterr().err
    assert "'digit_1'" in error
    assert "'validation' has none" in error


def test_class_map_may_leave_classes_out(train: ModuleType, data: Path) -> None:
    (data / "map.txt").write_text("digit_2\ndigit_0\n")
    assert run(train, data, "--class-map", str(data / "map.txt")) == 0


def test_tars(train: ModuleType, data: Path) -> None:
    for split in ("train", "validation"):
        with tarfile.open(data / f"{split}.tar", "w") as tar:
            tar.add(data / split, arcname=".")
    assert run(train, data, "--train-split", "train.tar", "--val-split", "validation.tar") == 0
    assert run(train, data / "train.tar", "--val-split", "") == 0


def test_posterising_to_no_bit_is_black() -> None:
    """As Pillow had it before 13, and as published policies need it."""
    operation = AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=10)
    assert operation(Image.new("RGB", (4, 4), "white")).getextrema() == ((0, 0),) * 3
    kept = AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=5)(Image.new("RGB", (4, 4), "white"))
    assert kept.getextrema() == ((0b11000000, 0b11000000),) * 3
