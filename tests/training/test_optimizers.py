"""Every optimizer that timm names: it trains, and a run that stops between two epochs ends as one that does not.

One of a kind is tried in the tests, and all names in the sweep: timm gives most optimizers several names, for other
settings of the same code.
"""

import importlib.util
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import torch
from script_runs import write_digits
from test_resume import assert_same
from timm.optim import get_optimizer_info, list_optimizers

# 20 images, two updates an epoch; momentum and averages then differ between the first update and all others.
SMALL = (
    "-b 10 -j 0 --no-prefetcher --img-size 32 --num-classes 10 --warmup-epochs 0 --lr 1e-3 --epochs 2 --device cpu "
    "--model test_efficientnet_ln --experiment run"
)
_FOREIGN = ("apex.", "bitsandbytes.")  # packages that need a GPU


def _class(name: str) -> str:
    owner = get_optimizer_info(name).opt_class
    return owner if isinstance(owner, str) else f"{owner.__module__}.{owner.__name__}"


NAMES = [name for name in list_optimizers() if not _class(name).startswith(_FOREIGN)]
FOREIGN = [name for name in list_optimizers() if _class(name).startswith(_FOREIGN)]
# Of each kind the first by name, but for Kron, which torch compiles for every shape, for minutes.
FIRST = list({_class(name): name for name in reversed(NAMES) if "kron" not in name}.values())


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training images and a validation image of each digit."""
    return write_digits(tmp_path_factory.mktemp("few"), train=2, validation=1)


def run(train: ModuleType, few: Path, output: Path, name: str, *more: str) -> int:
    return train.main(["--data-dir", str(few), "--output", str(output), *shlex.split(SMALL), "--opt", name, *more])


def check(train: ModuleType, few: Path, output: Path, name: str) -> None:
    if name.startswith("kron"):
        pytest.importorskip("opt_einsum")
    assert run(train, few, output / "whole", name) == 0
    first = output / "whole" / "run" / "checkpoint-0.pth.tar"
    assert run(train, few, output / "resumed", name, "--resume", str(first)) == 0
    start = torch.load(first, weights_only=True)
    whole, resumed = (
        torch.load(output / part / "run" / "last.pth.tar", weights_only=True) for part in ("whole", "resumed")
    )
    for checkpoint in (whole, resumed):
        del checkpoint["args"], checkpoint["saver"]  # the folders differ, and with them what is best in them
    assert_same(resumed, whole)
    weights = whole["state_dict"]
    assert all(weight.isfinite().all() for weight in weights.values())
    assert any(not torch.equal(weights[name], weight) for name, weight in start["state_dict"].items())


@pytest.mark.parametrize("name", [*FIRST, "lookahead_adamw"])
def test_one_of_each_kind_goes_on_exactly(train: ModuleType, few: Path, tmp_path: Path, name: str) -> None:
    check(train, few, tmp_path, name)


@pytest.mark.sweep
@pytest.mark.parametrize("name", [name for name in NAMES if name not in FIRST])
def test_every_name_goes_on_exactly(train: ModuleType, few: Path, tmp_path: Path, name: str) -> None:
    check(train, few, tmp_path, name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="they may run on a GPU")
@pytest.mark.parametrize("name", FOREIGN)
def test_optimizers_of_other_packages_are_refused_without_a_gpu(train, few, tmp_path, capsys, name: str) -> None:
    assert run(train, few, tmp_path, name) == 2
    assert f"train.py: error: --opt {name} does not run here: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["kron", "lookahead_kronw"])
def test_kron_is_refused_without_opt_einsum(train, few, tmp_path, capsys, monkeypatch, name: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    assert run(train, few, tmp_path, name) == 2
    assert f"train.py: error: --opt {name} needs opt_einsum, " in capsys.readouterr().err.splitlines()[-1]
