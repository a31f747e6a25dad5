"""Weights & Biases and TensorBoard: what their own files hold, and what stand-ins for their clients were told."""

import csv
import json
import shlex
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

SMALL = shlex.split("-b 24 -j 0 --img-size 32 --num-classes 10 --warmup-epochs 0 --lr 0.01 --log-interval 9")


class Client(ModuleType):
    """What of `wandb` is used, with a record of it."""

    class Error(Exception):
        """As wandb's."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.settings: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.finished = 0
        self.refusal = ""

    def init(self, **settings: Any) -> SimpleNamespace:
        if self.refusal:
            raise self.Error(self.refusal)
        self.settings.append(settings)
        return SimpleNamespace(log=self.rows.append, finish=self.finish)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Client:
    client = Client()
    monkeypatch.setitem(sys.modules, "wandb", client)
    return client


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What TensorBoard's writer was told."""
    told: list[tuple] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            told.append(("open", Path(folder).name, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.append((name, value, step))

        def flush(self) -> None:
            told.append(("flush",))

        def close(self) -> None:
            told.append(("close",))

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    return told


def run(train: ModuleType, data: Path, output: Path, *flags: str, model: str = "test_resnet") -> tuple[int, Path]:
    argv = ["--data-dir", str(data), "--output", str(output), "--experiment", "run", "--model", model]
    return train.main([*argv, "--epochs", "2", *SMALL, *flags]), output / "run"


def summary(folder: Path) -> list[dict[str, float]]:
    with open(folder / "summary.csv") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def records(file: Path) -> Iterator[Any]:
    """What a file of Weights & Biases holds: records in LevelDB's log format, of 32 KiB blocks, after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left_in_block = 32768 - at % 32768
        if left_in_block < 7:
            at += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole, first, last = 1, 2, 4
        record = (b"" if kind in (whole, first) else record) + content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (whole, last):
            yield Record.FromString(record)


def test_the_real_client_writes_the_summary(
    train: ModuleType, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    code, folder = run(train, digits, tmp_path, *shlex.split("--log-wandb --wandb-project digits --wandb-tags small"))
    assert code == 0
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    found = list(records(file))
    (begun,) = (record.run for record in found if record.WhichOneof("record_type") == "run")
    assert (begun.project, begun.display_name, list(begun.tags)) == ("digits", "run", ["small"])
    assert ("lr", "0.01") in [(item.key, item.value_json) for item in begun.config.update]
    rows = [
        {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.WhichOneof("record_type") == "history"
    ]
    assert [{name: value for name, value in row.items() if name[0] != "_"} for row in rows] == summary(folder)


def test_the_real_writer_writes_the_summary_once(train: ModuleType, digits: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    code, folder = run(train, digits, tmp_path, "--log-tensorboard")
    assert code == 0
    (folder / "checkpoint-1.pth.tar").unlink()
    (folder / "last.pth.tar").unlink()  # as if killed before it was written
    assert train.main(["-c", str(folder / "args.yaml"), "--resume", str(folder / "checkpoint-0.pth.tar")]) == 0
    events = EventAccumulator(str(folder)).Reload()
    rows = summary(folder)
    for name in set(rows[0]) - {"epoch"}:
        scalars = [(event.step, event.value) for event in events.Scalars(name)]
        assert scalars == [(row["epoch"], pytest.approx(row[name], rel=1e-6)) for row in rows]


def test_a_row_an_epoch_as_in_the_summary(train: ModuleType, digits: Path, tmp_path: Path, wandb: Client) -> None:
    flags = shlex.split("--log-wandb --wandb-project digits --wandb-tags small fast")
    code, folder = run(train, digits, tmp_path, *flags)
    assert code == 0
    assert wandb.rows == summary(folder)
    (settings,) = wandb.settings
    config = settings.pop("config")
    assert (config["model"], config["lr"], config["wandb_project"]) == ("test_resnet", 0.01, "digits")
    assert settings == {"project": "digits", "name": "run", "tags": ["small", "fast"], "resume": None, "id": None}
    assert wandb.finished == 1


def test_a_run_is_continued_by_its_id(train: ModuleType, digits: Path, tmp_path: Path, wandb: Client) -> None:
    code, folder = run(train, digits, tmp_path)
    assert code == 0
    assert not wandb.settings  # not asked for
    argv = ["-c", str(folder / "args.yaml"), "--resume", str(folder), "--epochs", "3", "--log-wandb"]
    assert train.main([*argv, "--wandb-resume-id", "abc"]) == 0
    assert (wandb.settings[0]["resume"], wandb.settings[0]["id"]) == ("must", "abc")
    assert [row["epoch"] for row in wandb.rows] == [2]


def test_activations_are_in_the_row(
    train: ModuleType, digits: Path, tmp_path: Path, wandb: Client, board: list[tuple]
) -> None:
    code, folder = run(train, digits, tmp_path, "--log-wandb", "--log-tensorboard", model="test_resnet_ditac")
    assert code == 0
    with open(folder / "activations.csv") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        row = wandb.rows[int(line["epoch"])]
        for column in ("theta_norm", "inside", "max_slope"):
            name = f"activations/{line['layer']}/{column}"
            assert row[name] == float(line[column])
            assert (name, row[name], int(line["epoch"])) in board


def test_tensorboard_gets_the_summary(train: ModuleType, digits: Path, tmp_path: Path, board: list[tuple]) -> None:
    code, folder = run(train, digits, tmp_path, "--log-tensorboard")
    assert code == 0
    assert board[0] == ("open", "run", 0)
    assert board[-1] == ("close",)
    for row in summary(folder):
        step = row.pop("epoch")
        assert all((name, value, step) in board for name, value in row.items())
    board.clear()
    assert train.main(["-c", str(folder / "args.yaml"), "--resume", str(folder), "--epochs", "3"]) == 0
    assert board[0] == ("open", "run", 2)  # an epoch that was not finished is shown once


@pytest.mark.parametrize(("flag", "module"), [("--log-wandb", "wandb"), ("--log-tensorboard", "tensorboard")])
def test_what_is_not_installed_is_named(
    train: ModuleType,
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flag: str,
    module: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert run(train, digits, tmp_path / "output", flag)[0] == 2
    said = capsys.readouterr().err.strip()
    assert said == f"train.py: error: {flag} needs {module}, which is not installed: pip install {module}"
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--log-wandb --wandb-resume-id abc", "give --resume too"),
        ("--wandb-resume-id abc", "--wandb-resume-id needs --log-wandb"),
    ],
)
def test_refusals(
    train: ModuleType,
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    wandb: Client,
    flags: str,
    sentence: str,
) -> None:
    assert run(train, digits, tmp_path, *flags.split())[0] == 2
    assert sentence in capsys.readouterr().err
    assert not wandb.settings


def test_a_refusal_of_the_client_is_one_sentence(
    train: ModuleType, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wandb: Client
) -> None:
    wandb.refusal = "api_key not configured (no-tty). call wandb.login\nand more"
    assert run(train, digits, tmp_path, "--log-wandb")[0] == 1
    assert capsys.readouterr().err.strip().splitlines() == [
        "train.py: error: --log-wandb: api_key not configured (no-tty). call wandb.login"
    ]
