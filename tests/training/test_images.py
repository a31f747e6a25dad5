"""Images that do not decode, and some that look as if they would not."""

import io
import json
import shutil
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import refusal, run
from timm.data import create_dataset

from ditac_timm.training.images import CheckedImageDataset


def png(size: tuple[int, int] = (32, 32)) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(stream, "png")
    return stream.getvalue()


def bomb() -> bytes:
    """A small file of more pixels than Pillow takes."""
    stream = io.BytesIO()
    Image.new("1", (20000, 20000)).save(stream, "png")
    return stream.getvalue()


def corrupt() -> bytes:
    content = bytearray(png())
    content[60:90] = bytes(30)
    return bytes(content)


def archive() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("a", "b")
    return stream.getvalue()


BAD = {"truncated": lambda: png()[:1500], "corrupt": corrupt, "empty": bytes, "no image": archive, "bomb": bomb}


@pytest.fixture
def data(digits: Path, tmp_path: Path) -> Path:
    """A copy of the digits that may be harmed."""
    return Path(shutil.copytree(digits, tmp_path / "data"))


@pytest.mark.parametrize("kind", BAD)
def test_bad_images_are_noted_and_the_next_stands_in(data: Path, kind: str) -> None:
    file = data / "train" / "digit_0" / "0.png"
    file.write_bytes(BAD[kind]())
    dataset = CheckedImageDataset(create_dataset("", root=data, split="train"))
    index = next(i for i in range(len(dataset)) if dataset.filename(i, absolute=True) == str(file))
    image, target = dataset[index]
    after, expected = dataset[index + 1]
    assert target == expected
    assert np.array_equal(np.asarray(image), np.asarray(after))
    assert list(dataset.bad()) == [str(file)]


def test_unusual_images_decode(data: Path) -> None:
    folder = data / "train" / "digit_0"
    for file in folder.iterdir():
        file.unlink()
    grey = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(folder / "0.jpg")
    Image.fromarray(grey).save(folder / "1.png")
    frames = [Image.new("P", (32, 32), color) for color in (0, 1)]
    frames[0].save(folder / "2.png", save_all=True, append_images=frames[1:])
    Image.new("LA", (32, 32)).save(folder / "3.png")
    dataset = CheckedImageDataset(create_dataset("", root=data, split="train"))
    images = {Path(dataset.filename(index)).name: dataset[index][0] for index in range(4)}
    assert all(image.mode == "RGB" for image in images.values())
    assert np.array_equal(np.asarray(images["1.png"])[..., 0], grey // 256)  # and not clipped at 255
    assert not dataset.bad()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_training_names_them_and_goes_on(train: ModuleType, data: Path, tmp_path: Path, caplog, workers: str) -> None:
    for index, kind in enumerate(BAD):
        (data / "train" / "digit_3" / f"{index}.png").write_bytes(BAD[kind]())
    assert run(train, data, tmp_path, "-j", workers)[0] == 0
    assert "5 images do not decode" in caplog.text
    for index in range(5):
        assert str(data / "train" / "digit_3" / f"{index}.png") in caplog.text


def test_too_many_stop_training(train: ModuleType, data: Path, tmp_path: Path, capsys) -> None:
    for index in range(3):
        (data / "train" / "digit_3" / f"{index}.png").write_bytes(b"")
    assert run(train, data, tmp_path, "--max-bad-images", "2")[0] == 1
    assert "do not decode" in (sentence := refusal(capsys))
    assert "more than --max-bad-images 2" in sentence


def test_validation_refuses_them_unless_told_to_skip(
    train: ModuleType, validate: ModuleType, data: Path, tmp_path: Path, capsys, caplog
) -> None:
    assert run(train, data, tmp_path)[0] == 0
    (data / "validation" / "digit_3" / "15.png").write_bytes(b"no image")
    argv = ["--data-dir", str(data), "--checkpoint", str(tmp_path / "run"), "-j", "1", "-b", "24", "--device", "cpu"]
    capsys.readouterr()
    assert validate.main(argv) == 1
    assert "1 images do not decode, the first is " in refusal(capsys)
    results = tmp_path / "results.json"
    assert validate.main([*argv, "--skip-bad-images", "--results-file", str(results)]) == 0
    assert "15.png" in caplog.text
    file = data / "validation" / "digit_3" / "15.png"
    whole = tmp_path / "whole.json"
    file.unlink()
    assert validate.main([*argv, "--results-file", str(whole)]) == 0
    skipped, without = (json.loads(path.read_text()) for path in (results, whole))
    assert skipped.pop("loss") == pytest.approx(without.pop("loss"), rel=1e-6)  # other batches
    assert skipped == without


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_folder_that_vanishes_ends_training_with_the_cause(
    train: ModuleType, data: Path, tmp_path: Path, capsys, monkeypatch, workers: str
) -> None:
    backward = torch.Tensor.backward

    def vanish(*arguments, **keywords):
        shutil.rmtree(data / "train", ignore_errors=True)
        return backward(*arguments, **keywords)

    monkeypatch.setattr(torch.Tensor, "backward", vanish)
    assert run(train, data, tmp_path, "-j", workers, "-b", "8")[0] == 1
    assert "No such file" in refusal(capsys)
