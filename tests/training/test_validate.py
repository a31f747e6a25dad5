"""`validate.py`: it gives what the training run gave, and refuses what cannot be evaluated."""

import csv
import json
import shlex
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch

from ditac_timm.training.errors import RunError

SMALL = shlex.split("-b 24 -j 0 --img-size 32 --num-classes 10 --warmup-epochs 0 --lr 0.01 --model test_vit --epochs 2")


@pytest.fixture(scope="module")
def finished(train: ModuleType, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, with averaged weights that count from the start."""
    output = tmp_path_factory.mktemp("finished")
    flags = ["--data-dir", str(digits), "--output", str(output), "--experiment", "run", "--model-ema"]
    assert train.main([*flags, *SMALL, "--opt", "adamw", "--model-ema-decay", "0.5", "--crop-pct", "1.0"]) == 0
    return output / "run"


def result(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.partition("--result\n")[2])


@pytest.mark.parametrize("batch_size", ["24", "256", "7"])
def test_last_top1_to_the_last_digit(
    validate: ModuleType, digits: Path, finished: Path, capsys: pytest.CaptureFixture[str], batch_size: str
) -> None:
    argv = ["--data-dir", str(digits), "--checkpoint", str(finished), "--use-ema", "-j", "0", "-b", batch_size]
    assert validate.main(argv) == 0
    found = result(capsys)
    with open(finished / "summary.csv") as stream:
        row = list(csv.DictReader(stream))[-1]
    assert repr(found["top1"]) == row["eval_top1"]
    assert repr(found["top5"]) == row["eval_top5"]
    assert found["loss"] == pytest.approx(float(row["eval_loss"]), rel=1e-6)
    assert found["model"] == "test_vit"
    assert found["img_size"] == 32
    assert found["crop_pct"] == 1.0


def test_weights_without_average(
    validate: ModuleType, digits: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plain accuracy of the same images, counted by hand from the file in plain timm."""
    file = finished / "model_best.pth.tar"
    argv = ["--data-dir", str(digits), "--checkpoint", str(file), "-j", "0", "--no-prefetcher"]
    assert validate.main(argv) == 0
    checkpoint = torch.load(file, weights_only=True)
    model = timm.create_model(checkpoint["arch"], **checkpoint["model_args"]).eval()
    model.load_state_dict(checkpoint["state_dict"])
    dataset = timm.data.create_dataset("", str(digits), split="validation")
    dataset.transform = timm.data.create_transform(**checkpoint["data_config"])
    with torch.inference_mode():
        correct = sum(model(image[None]).argmax().item() == label for image, label in dataset)
    assert result(capsys)["top1"] == 100 * correct / 50


@pytest.mark.parametrize(("name", "extra"), [("r.csv", []), ("r.json", []), ("r.txt", ["--results-format", "json"])])
def test_results_file(
    validate: ModuleType,
    digits: Path,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    extra: list[str],
) -> None:
    file = tmp_path / name
    argv = ["--data-dir", str(digits), "--checkpoint", str(finished), "-j", "0", "--results-file", str(file), *extra]
    assert validate.main(argv) == 0
    printed = result(capsys)
    if name == "r.csv":
        with open(file) as stream:
            (row,) = csv.DictReader(stream)
        assert row == {key: str(value) for key, value in printed.items()}
    else:
        assert json.loads(file.read_text()) == printed


def test_bare_weights_need_a_model(
    validate: ModuleType, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), tmp_path / "weights.pth")
    argv = ["--data-dir", str(digits), "--checkpoint", str(tmp_path / "weights.pth"), "-j", "0", "--img-size", "32"]
    assert validate.main(argv) == 2
    assert "give --model" in capsys.readouterr().err
    assert validate.main([*argv, "--model", "test_resnet"]) == 2
    assert "2 of another shape" in capsys.readouterr().err
    assert validate.main([*argv, "--model", "test_resnet", "--num-classes", "10"]) == 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--model test_resnet", "give --model test_vit"),
        ("--model test_vot", "did you mean test_vit"),
        ("--num-classes 5", "--num-classes 10, not 5"),
        ("--pretrained", "--pretrained"),
        ("--split nothing", "has no folder of that name"),
        ("--in-chans 1", "without --in-chans: leave --in-chans 1 out"),
        ("--num-gpu 2", "torchrun"),
        ("--results-file /no/such/folder/r.csv", "--results-file"),
        ("--results-format xml", "--results-format must be one of"),
        ("--data-dir /no/such/folder", "--data-dir /no/such/folder does not exist"),
        ("--checkpoint /no/such/file", "--checkpoint /no/such/file does not exist"),
        ("--checkpoint /", "holds no last.pth.tar"),
    ],
)
def test_refusals(
    validate: ModuleType, digits: Path, finished: Path, capsys: pytest.CaptureFixture[str], flags: str, sentence: str
) -> None:
    argv = ["--data-dir", str(digits), "--checkpoint", str(finished), "-j", "0", *flags.split()]
    assert validate.main(argv) == 2
    assert sentence in capsys.readouterr().err


def test_a_split_that_is_missing_is_not_another_split(
    validate: ModuleType, digits: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(digits / "train", tmp_path / "train")
    argv = ["--checkpoint", str(finished), "-j", "0"]
    assert validate.main(["--data-dir", str(tmp_path), *argv]) == 2
    assert f"--split validation: {tmp_path} has no folder of that name" in capsys.readouterr().err
    assert validate.main(["--data-dir", str(tmp_path), *argv, "--split", "train"]) == 0


def test_a_flat_folder_of_classes(
    validate: ModuleType, digits: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = tmp_path / "flat"
    shutil.copytree(digits / "validation", flat)
    (flat / "digit_9").rename(flat / "train")  # a class may bear a split's name
    assert validate.main(["--data-dir", str(flat), "--checkpoint", str(finished), "-j", "0"]) == 0
    assert result(capsys)["top1"] >= 0
    assert validate.main(["--data-dir", str(flat), "--checkpoint", str(finished), "-j", "0", "--split", "foo"]) == 2


def test_classes_of_a_checkpoint_are_fixed(
    validate: ModuleType, digits: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(digits / "validation", tmp_path / "validation")
    shutil.rmtree(tmp_path / "validation" / "digit_3")
    assert validate.main(["--data-dir", str(tmp_path), "--checkpoint", str(finished), "-j", "0"]) == 2
    assert capsys.readouterr().err.endswith("'validation' has 9 classes and the model 10\n")


def test_results_of_before_outlive_a_full_disk(
    validate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "results.csv"
    validate.write_results(file, {"top1": 1.0})
    before = file.read_bytes()

    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match="what was there before is whole"):
        validate.write_results(file, {"top1": 2.0})
    assert file.read_bytes() == before
    assert [*tmp_path.iterdir()] == [file]


def test_nothing_to_evaluate(validate: ModuleType, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate.main(["--data-dir", str(digits)]) == 2
    assert "--checkpoint" in capsys.readouterr().err


def test_average_that_is_not_there(
    validate: ModuleType, digits: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = torch.load(finished / "last.pth.tar", weights_only=True)
    del checkpoint["state_dict_ema"]
    torch.save(checkpoint, tmp_path / "last.pth.tar")
    argv = ["--data-dir", str(digits), "--checkpoint", str(tmp_path), "--use-ema", "-j", "0"]
    assert validate.main(argv) == 2
    assert "--model-ema" in capsys.readouterr().err
