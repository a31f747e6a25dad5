"""`train.py` under torchrun, on CPUs: several processes compute what one does, and fail and go on together."""

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_resume import assert_same_runs

SCRIPT = Path(__file__).with_name("rank_script.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# 120 images and no batch norm: 10 updates an epoch in each of the layouts.
SMALL = (
    "-j 0 --img-size 32 --num-classes 10 --warmup-epochs 0 --lr 0.01 --log-interval 1 --epochs 2 --model test_vit "
    "--recovery-interval 3 --aa rand-m9-mstd0.5-inc1 --reprob 0.3 --no-prefetcher --opt sgd --experiment run "
    "--device cpu"
)


def start(launcher: list[str], digits: Path, output: Path, act: str, *flags: str) -> subprocess.Popen:
    output.mkdir(exist_ok=True)
    data = ["--data-dir", str(digits), "--output", str(output)]
    return subprocess.Popen(
        [*launcher, str(SCRIPT), *act.split(), str(output / "losses.json"), *data, *shlex.split(SMALL), *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def finish(process: subprocess.Popen, seconds: float = 120) -> tuple[int, str]:
    _, errors = process.communicate(timeout=seconds)
    return process.returncode, errors


def launch(processes: int = 2, restarts: int = 0) -> list[str]:
    return [*TORCHRUN, "--standalone", "--nproc-per-node", str(processes), "--max-restarts", str(restarts)]


@pytest.fixture(scope="module")
def pair(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing happens to."""
    output = tmp_path_factory.mktemp("pair")
    code, errors = finish(start(launch(), digits, output, "nothing 0 0", "-b", "6"))
    assert code == 0, errors
    return output


def test_two_processes_compute_what_one_does(digits: Path, tmp_path: Path, pair: Path) -> None:
    code, errors = finish(start([sys.executable], digits, tmp_path, "nothing 0 0", "-b", "12"))
    assert code == 0, errors
    one, both = (json.loads((output / "losses.json").read_text()) for output in (tmp_path, pair))
    assert len(one) == len(both) == 20
    torch.testing.assert_close(torch.tensor(both), torch.tensor(one), atol=1e-5, rtol=0)


def test_a_rank_that_dies_is_restarted_and_the_run_goes_on_exactly(digits: Path, tmp_path: Path, pair: Path) -> None:
    code, errors = finish(start(launch(restarts=1), digits, tmp_path, "SIGKILL 1 15", "-b", "6"))
    assert code == 0, errors
    assert "another process of the run has ended" in errors or "Signal 9 (SIGKILL)" in errors
    assert_same_runs(tmp_path / "run", pair / "run")


def test_a_rank_that_dies_ends_the_run(digits: Path, tmp_path: Path, pair: Path) -> None:
    code, errors = finish(start(launch(), digits, tmp_path, "SIGKILL 1 5", "-b", "6"), seconds=60)
    assert code != 0
    assert "Signal 9 (SIGKILL)" in errors
    code, errors = finish(
        start(launch(), digits, tmp_path, "nothing 0 0", "-b", "6", "--resume", str(tmp_path / "run"))
    )
    assert code == 0, errors
    assert_same_runs(tmp_path / "run", pair / "run")


def test_a_signal_to_one_rank_stops_all_with_their_state_saved(digits: Path, tmp_path: Path, pair: Path) -> None:
    code, errors = finish(start(launch(), digits, tmp_path, "SIGTERM 1 14", "-b", "6"), seconds=60)
    assert code != 0
    assert "a signal to another process after update 5 of epoch 1" in errors  # the one after it was agreed on
    assert (tmp_path / "run" / "recovery-1-5.pth.tar").is_file()
    code, errors = finish(
        start(launch(), digits, tmp_path, "nothing 0 0", "-b", "6", "--resume", str(tmp_path / "run"))
    )
    assert code == 0, errors
    assert_same_runs(tmp_path / "run", pair / "run")


def test_three_processes_go_on_exactly(digits: Path, tmp_path: Path) -> None:
    """The order in which more than two gradients are summed is the one of the run that was not killed."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs = [(whole, "nothing 0 0"), (killed, "SIGKILL 2 15")]
    for output, act in runs:
        finish(start(launch(3), digits, output, act, "-b", "4", "--ditac-reg", "0.01", "--model", "test_vit_ditac"))
    resumed = start(
        launch(3),
        digits,
        killed,
        "nothing 0 0",
        "-b",
        "4",
        "--ditac-reg",
        "0.01",
        "--model",
        "test_vit_ditac",
        "--resume",
        str(killed / "run"),
    )
    code, errors = finish(resumed)
    assert code == 0, errors
    assert_same_runs(killed / "run", whole / "run")


def test_a_signal_in_validation_stops_all(digits: Path, tmp_path: Path, pair: Path) -> None:
    code, errors = finish(start(launch(), digits, tmp_path, "validation:SIGTERM 1 3", "-b", "6"), seconds=60)
    assert code != 0
    assert "after update 10 of epoch 0" in errors
    assert (tmp_path / "run" / "recovery-0-10.pth.tar").is_file()
    code, errors = finish(
        start(launch(), digits, tmp_path, "nothing 0 0", "-b", "6", "--resume", str(tmp_path / "run"))
    )
    assert code == 0, errors
    assert_same_runs(tmp_path / "run", pair / "run")


def test_two_machines(digits: Path, tmp_path: Path, pair: Path) -> None:
    """Two agents, each with one process, that meet at an address."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "run"]
    launcher += ["--rdzv-endpoint", f"localhost:{port}"]
    agents = [start(launcher, digits, tmp_path, "nothing 0 0", "-b", "6") for _ in range(2)]
    for agent in agents:
        code, errors = finish(agent)
        assert code == 0, errors
    assert_same_runs(tmp_path / "run", pair / "run")
