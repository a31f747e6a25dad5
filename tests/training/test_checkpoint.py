"""Checkpoints: what is refused when reading, and what a crash leaves when writing."""

import argparse
import os
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from ditac_timm.training import checkpoint as checkpoints
from ditac_timm.training.errors import RunError, UsageError


class _Malicious:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.file}",)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "args": _Malicious(tmp_path / "ran")}, tmp_path / "bad.pth")
    with pytest.raises(UsageError, match="could run code"):
        checkpoints.read_checkpoint(tmp_path / "bad.pth", "--checkpoint")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"hello",
        b"junk",
        b"this is not a checkpoint",
        b"\x80\x02",
        b"\x80\x02}q\x00",
        b"\0" * 1000,
        b"PK\x03\x04" + b"\0" * 200,
        b"<html>404</html>",
        b'{"a": 1}',
        b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n",
        bytes(range(256)),
    ],
)
@pytest.mark.parametrize("name", ["last.pth.tar", "model.safetensors"])
def test_other_bytes_are_one_sentence(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=r"--resume .* (whole|is no) checkpoint") as raised:
        checkpoints.read_checkpoint(tmp_path / name, "--resume")
    assert "\n" not in str(raised.value)
    assert "weights_only" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"state_dict": None}, "its state_dict is a NoneType, not a dict"),
        ({"state_dict": [1]}, "its state_dict is a list, not a dict"),
        ({"state_dict": {}, "state_dict_ema": 1}, "its state_dict_ema is a int, not a dict"),
        ({"state_dict": {}, "state_dict_ema": {"a": 1}}, "holds no weights"),
        ({1: torch.zeros(1)}, "holds no weights"),
        ({"state_dict": {}, "model_args": [1]}, "its model_args is a list, not a dict"),
        ({"state_dict": {}, "data_config": "x"}, "its data_config is a str, not a dict"),
        ({"state_dict": {}, "arch": 1}, "its arch is a int, not a str"),
    ],
)
def test_parts_of_another_kind(tmp_path: Path, content: dict, sentence: str) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(UsageError, match=sentence):
        checkpoints.read_checkpoint(tmp_path / "odd.pth", "--checkpoint")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated_file(tmp_path: Path, share: float) -> None:
    file = tmp_path / "last.pth.tar"
    torch.save({"state_dict": {"weight": torch.randn(1000)}}, file)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(UsageError) as raised:
        checkpoints.read_checkpoint(file, "--resume")
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "weights_only" not in str(raised.value)


def test_reads_timms_files_bare_weights_and_safetensors(tmp_path: Path) -> None:
    weights = {"weight": torch.randn(3)}
    torch.save(
        {"state_dict": {"_orig_mod.module.weight": weights["weight"]}, "args": argparse.Namespace(lr=1)},
        tmp_path / "timm.pth.tar",
    )
    torch.save(weights, tmp_path / "bare.pth")
    save_file(weights, tmp_path / "model.safetensors")
    for name in ("timm.pth.tar", "bare.pth", "model.safetensors"):
        read = checkpoints.read_checkpoint(tmp_path / name, "--checkpoint")["state_dict"]
        assert torch.equal(read["weight"], weights["weight"])


def test_other_files_hold_no_weights(tmp_path: Path) -> None:
    for content in ([1, 2], {"lr": 0.1}):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(UsageError, match="holds no weights"):
            checkpoints.read_checkpoint(tmp_path / "other.pth", "--checkpoint")


def test_weights_of_another_model_are_refused() -> None:
    weights = timm.create_model("test_resnet", num_classes=10).state_dict()
    with pytest.raises(UsageError, match="2 of another shape"):
        checkpoints.load_weights(timm.create_model("test_resnet", num_classes=5), weights, "--resume")
    with pytest.raises(UsageError, match=r"missing .* unexpected"):
        checkpoints.load_weights(timm.create_model("test_vit", num_classes=10), weights, "--resume")


@pytest.mark.parametrize(
    ("saved", "asked", "sentence"),
    [
        ({"in_chans": 1}, {"in_chans": 3}, "--resume is a checkpoint with --in-chans 1, not 3"),
        ({"in_chans": 1}, {}, "--resume is a checkpoint with --in-chans 1, give --in-chans 1"),
        ({}, {"in_chans": 1}, "--resume is a checkpoint without --in-chans: leave --in-chans 1 out"),
    ],
)
def test_arguments_that_differ(saved: dict, asked: dict, sentence: str) -> None:
    with pytest.raises(UsageError, match=f"^{sentence}$"):
        checkpoints.check_same_model({"arch": "a", "model_args": saved}, "--resume", "a", asked)


def test_saver_keeps_last_best_and_history(tmp_path: Path) -> None:
    saver = checkpoints.CheckpointSaver(tmp_path, decreasing=False, max_history=2)
    for epoch, metric in enumerate([3.0, 5.0, 4.0, 1.0]):
        saver.save({"state_dict": {}}, epoch, metric)
    assert {file.name for file in tmp_path.iterdir()} == {
        "last.pth.tar",
        "model_best.pth.tar",
        "checkpoint-1.pth.tar",
        "checkpoint-2.pth.tar",
    }
    assert torch.load(tmp_path / "model_best.pth.tar")["epoch"] == 1
    last = torch.load(tmp_path / "last.pth.tar")
    assert last["epoch"] == 3
    continued = checkpoints.CheckpointSaver(tmp_path, decreasing=False, max_history=2)
    continued.restore(last)
    assert (continued.best_metric, continued.history) == (5.0, [(1, 5.0), (2, 4.0)])
    continued.save({"state_dict": {}}, 4, 4.5)
    assert not (tmp_path / "checkpoint-2.pth.tar").exists()
    assert torch.load(tmp_path / "model_best.pth.tar")["epoch"] == 1


def test_metric_that_is_not_finite_is_never_best(tmp_path: Path) -> None:
    saver = checkpoints.CheckpointSaver(tmp_path, decreasing=True, max_history=1)
    saver.save({}, 0, float("nan"))
    assert not (tmp_path / "model_best.pth.tar").exists()


@pytest.mark.parametrize("links", [True, False], ids=["links", "copies"])
@pytest.mark.parametrize("call", range(10))
def test_crash_at_any_moment_leaves_whole_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, links: bool
) -> None:
    """The second save dies in one of its system calls; every file under a final name stays readable."""
    saver = checkpoints.CheckpointSaver(tmp_path, decreasing=False, max_history=3)
    saver.save({"weight": torch.ones(100)}, 0, 1.0)
    calls = 0

    def dies(name: str) -> None:
        real = getattr(os, name)

        def wrapped(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls > call:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, wrapped)

    def no_links(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    for name in ("fsync", "replace", "open"):
        dies(name)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    try:
        saver.save({"weight": torch.zeros(100)}, 1, 2.0)
    except RunError as error:
        assert "No space left" in str(error)
    monkeypatch.undo()
    last = torch.load(tmp_path / "last.pth.tar")
    best = torch.load(tmp_path / "model_best.pth.tar")
    assert last["epoch"] in (0, 1)
    assert best["epoch"] >= last["epoch"]
    assert torch.equal(last["weight"], torch.full((100,), float(last["epoch"] == 0)))
