"""`train.py --resume`: a run that was killed ends as the run that was not, to the last bit."""

import contextlib
import multiprocessing
import os
import random
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from script_runs import ROOT
from timm.task.evaluator import ClassificationEvaluator

from ditac_timm.training import checkpoint as checkpoints
from ditac_timm.training.loop import LossMeter

# 120 images: 10 updates an epoch, or 5 with accumulation.
SMALL = (
    "-b 12 -j 0 --img-size 32 --num-classes 10 --warmup-epochs 1 --lr 0.01 --log-interval 3 --epochs 3 "
    "--recovery-interval 3 --experiment run"
)
EVERYTHING = (
    "-j 2 --mixup 0.2 --cutmix 1 --aa rand-m9-mstd0.5-inc1 --reprob 0.5 --remode pixel --drop 0.2 --drop-path 0.1 "
    "--model-ema --model-ema-warmup --amp --grad-accum-steps 2 --clip-grad 1 --opt adamw --sched-on-updates"
)
RUNS = {
    "everything": ("test_efficientnet", EVERYTHING),
    "ditac": (
        "test_resnet_ditac",
        "--opt lookahead_adam --sched plateau --patience-epochs 0 --no-prefetcher --mixup .2",
    ),
    "splits": ("test_resnet", "--aug-splits 2 --jsd-loss --split-bn --aa augmix-m5-w4-d2 --reprob 0.2 --resplit"),
    "vit": (
        "test_vit",
        "--opt sgd -vb 6 --mixup-off-epoch 1 --mixup 0.8 -j 1 --use-multi-epochs-loader --amp-dtype bfloat16",
    ),
}


class Killed(BaseException):
    """Nothing in the script catches it, and nothing is saved on the way out."""


def run(train: ModuleType, digits: Path, output: Path, name: str, *more: str) -> int:
    model, flags = RUNS[name]
    argv = ["--data-dir", str(digits), "--output", str(output), "--model", model, *shlex.split(SMALL), *flags.split()]
    return train.main([*argv, *more])


def assert_same(ours: Any, expected: Any, where: str = "checkpoint") -> None:
    assert type(ours) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert torch.equal(ours, expected), where
    elif isinstance(expected, dict):
        assert ours.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(ours[key], value, f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(ours) == len(expected), where
        for index, value in enumerate(expected):
            assert_same(ours[index], value, f"{where}.{index}")
    else:
        assert ours == expected, where


def assert_same_runs(folder: Path, expected: Path) -> None:
    assert (folder / "summary.csv").read_text() == (expected / "summary.csv").read_text()
    for name in ("last.pth.tar", "model_best.pth.tar"):
        ours, theirs = (torch.load(where / name, weights_only=True) for where in (folder, expected))
        for checkpoint in (ours, theirs):
            del checkpoint["args"]  # --output and --resume differ
        assert_same(ours, theirs)
    assert not list(folder.glob("recovery-*"))


@pytest.fixture(scope="module")
def whole(train: ModuleType, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a run that is never killed, made at first need."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            assert run(train, digits, made[name], name) == 0
        return made[name] / "run"

    return folder


def kill_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    update, done = LossMeter.update, 0

    def count(meter: LossMeter, loss: torch.Tensor, samples: int) -> None:
        nonlocal done
        done += 1
        if done > batches:
            raise Killed
        update(meter, loss, samples)

    monkeypatch.setattr(LossMeter, "update", count)


@pytest.mark.parametrize("name", RUNS)
def test_killed_at_random_batches(train, digits, tmp_path, whole, monkeypatch, name):
    expected, kills = whole(name), random.Random(name)
    resume: tuple[str, ...] = ()
    for _ in range(3):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_after(patch, kills.randint(3, 9))
            run(train, digits, tmp_path, name, *resume)
        resume = ("--resume", str(tmp_path / "run"))
    assert run(train, digits, tmp_path, name, *resume) == 0
    assert_same_runs(tmp_path / "run", expected)


def test_killed_before_the_first_checkpoint_starts_over(train, digits, tmp_path, whole, monkeypatch, caplog):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 2)
        run(train, digits, tmp_path, "splits")
    assert not list((tmp_path / "run").glob("*.pth.tar"))
    with caplog.at_level("INFO"):
        assert run(train, digits, tmp_path, "splits", "--resume", str(tmp_path / "run")) == 0
    assert "has no checkpoint yet: starting over" in caplog.text
    assert_same_runs(tmp_path / "run", whole("splits"))


@pytest.mark.parametrize("workers", ["0", "1", "3"])
def test_workers_change_nothing(train, digits, tmp_path, whole, workers):
    assert run(train, digits, tmp_path, "everything", "-j", workers) == 0
    assert_same_runs(tmp_path / "run", whole("everything"))


@pytest.mark.parametrize("step", ["write", "os.fsync", "os.replace", "os.link"])
def test_a_crash_while_a_checkpoint_is_written_leaves_the_one_before(train, digits, tmp_path, whole, monkeypatch, step):
    """Also the very first file of a run, and within an epoch."""
    calls = {
        "write": (torch, "save"),
        "os.fsync": (os, "fsync"),
        "os.replace": (os, "replace"),
        "os.link": (os, "link"),
    }
    owner, attribute = calls[step]
    real = getattr(owner, attribute)
    for crash in range(1, 10, 3):
        count, output = 0, tmp_path / str(crash)

        def fail(*arguments: Any, crash: int = crash, **keywords: Any) -> Any:
            nonlocal count
            count += 1
            if count == crash:
                raise Killed
            return real(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, fail)
            with contextlib.suppress(Killed):
                assert run(train, digits, output, "splits") == 0
        if (output / "run" / "args.yaml").exists():  # else nothing was begun
            assert run(train, digits, output, "splits", "--resume", str(output / "run")) == 0
            assert_same_runs(output / "run", whole("splits"))


@pytest.mark.parametrize("harm", ["truncated", "a bit flipped", "empty"])
def test_the_newest_whole_checkpoint_is_found(train, digits, tmp_path, whole, monkeypatch, caplog, harm):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 18)  # in the second epoch, after recovery-1-6
        run(train, digits, tmp_path, "splits")
    newest = tmp_path / "run" / "recovery-1-6.pth.tar"
    content = bytearray(newest.read_bytes())
    if harm == "a bit flipped":
        content[len(content) // 2] ^= 1
    newest.write_bytes(bytes(content[: {"truncated": len(content) // 2, "empty": 0}.get(harm)]))
    found = checkpoints.newest_checkpoint(str(tmp_path / "run"), "--resume")
    assert found is not None
    assert found[0].name == "recovery-1-3.pth.tar"
    assert "is not a whole checkpoint" in caplog.text
    assert run(train, digits, tmp_path, "splits", "--resume", str(tmp_path / "run")) == 0
    assert_same_runs(tmp_path / "run", whole("splits"))


def test_another_batch_size_cannot_go_on_within_an_epoch(train, digits, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 5)
        run(train, digits, tmp_path, "splits")
    capsys.readouterr()
    assert run(train, digits, tmp_path, "splits", "--resume", str(tmp_path / "run"), "-b", "6") == 2
    assert "give the same number of processes, --batch-size" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 75), (signal.SIGKILL, -9)])
def test_signals(digits, tmp_path, train, whole, number, code):
    """In a process of its own, with workers, which get the signal too."""
    argv = [sys.executable, str(ROOT / "train.py"), "--data-dir", str(digits), "--output", str(tmp_path)]
    model, flags = RUNS["everything"]
    argv += ["--model", model, *shlex.split(SMALL), *flags.split()]
    process = subprocess.Popen(
        argv, stderr=subprocess.PIPE, text=True, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("Train: 1 "):
            os.killpg(process.pid, number)
            break
    rest = process.stderr.read()
    assert process.wait(timeout=60) == code, rest
    if number != signal.SIGKILL:
        assert rest.strip().splitlines()[-1].startswith(f"train.py: error: {number.name} after update ")
    torch.set_num_threads(1)
    assert run(train, digits, tmp_path, "everything", "--resume", str(tmp_path / "run")) == 0
    assert_same_runs(tmp_path / "run", whole("everything"))


@pytest.mark.parametrize("stage", ["training", "validation"])
def test_a_killed_worker_is_reported_and_the_run_goes_on_from_there(
    train, digits, tmp_path, whole, monkeypatch, capsys, stage
):
    where = {"training": (LossMeter, "update"), "validation": (ClassificationEvaluator, "update")}[stage]
    real, count = getattr(*where), 0

    def kill(*arguments):
        nonlocal count
        count += 1
        for child in multiprocessing.active_children() if count == 5 else ():
            child.kill()
            child.join()
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(*where, kill)
        assert run(train, digits, tmp_path, "vit") == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "a process that loads data has ended" in said
    assert "fewer --workers" in said
    folder = tmp_path / "run"
    assert f"--resume {folder} goes on from update " in said
    assert list(folder.glob("recovery-0-10*" if stage == "validation" else "recovery-0-[5-9]*"))
    assert run(train, digits, tmp_path, "vit", "--resume", str(folder)) == 0
    assert_same_runs(folder, whole("vit"))


@pytest.mark.parametrize("name", ["everything", "ditac"])
def test_a_signal_in_validation_is_heard_there(train, digits, tmp_path, whole, monkeypatch, capsys, name):
    real, count = ClassificationEvaluator.update, 0

    def ask(*arguments):
        nonlocal count
        count += 1
        if count == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        assert count < 9
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ClassificationEvaluator, "update", ask)
        assert run(train, digits, tmp_path, name) == 75
    assert "SIGTERM after update" in capsys.readouterr().err
    assert run(train, digits, tmp_path, name, "--resume", str(tmp_path / "run")) == 0
    assert_same_runs(tmp_path / "run", whole(name))


def test_files_within_an_epoch_load_in_plain_timm(train, digits, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 7)
        run(train, digits, tmp_path, "ditac")
    (file,) = (tmp_path / "run").glob("recovery-0-6.pth.tar")
    saved = torch.load(file, weights_only=True)["state_dict"]
    model = timm.create_model("ditac", base="test_resnet", num_classes=10, checkpoint_path=str(file))
    assert_same(dict(model.state_dict()), dict(saved))
