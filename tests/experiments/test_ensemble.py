"""Many networks as one: each is what torch's own layers and optimizer make of it alone."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ditac_timm import DiTAC, cpab
from ditac_timm.experiments.ensemble import Ensemble, train
from ditac_timm.experiments.tasks import TASKS, Task
from ditac_timm.training.errors import RunError

SHORT = replace(TASKS["sines"], steps=30, evaluations=3, rates=(1e-2, 1e-3))
CLASSES = replace(TASKS["gmm"], steps=30, evaluations=3, rates=(1e-2, 1e-3))


class Swish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.beta * x) / self.beta


class PDELU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x, self.alpha * ((1 + 0.1 * x).clamp(min=0) ** 10 - 1))


ALONE = {
    "ReLU": nn.ReLU,
    "LeakyReLU": nn.LeakyReLU,
    "GELU": nn.GELU,
    "ELU": nn.ELU,
    "Softplus": nn.Softplus,
    "Mish": nn.Mish,
    "Swish": Swish,
    "PReLU": nn.PReLU,
    "PDELU": PDELU,
    "DiTAC": DiTAC,
    "GE-DiTAC": lambda: DiTAC("ge"),
    "L-DiTAC": lambda: DiTAC("leaky"),
    "inf-DiTAC": lambda: DiTAC("inf"),
    "DiTAC-5-cells": lambda: DiTAC(cells=5),
    "DiTAC-domain-6": lambda: DiTAC(domain=(-6, 6)),
    "DiTAC-reg-0.1": DiTAC,
}


def alone(task: Task, activation: str, seed: int, rate: float) -> nn.Sequential:
    """One network, by torch's layers and optimizer; its hidden activations are made by ALONE."""
    split = task.split(seed, task.batch, Path())
    torch.manual_seed(seed)
    linear = [nn.Linear(*pair) for pair in itertools.pairwise(task.sizes)]
    layers: list[nn.Module] = []
    for layer in linear[:-1]:
        layers += [layer, ALONE[activation]()]
    model = nn.Sequential(*layers, linear[-1])
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for step in range(task.steps):
        x, y = (part[0] for part in split.draw(step, 1))
        loss = F.cross_entropy(model(x), y) if task.classes else F.mse_loss(model(x), y)
        if activation == "DiTAC-reg-0.1":
            for act in model:
                if isinstance(act, DiTAC):
                    loss = loss + 0.1 * cpab.smoothness_penalty(act.theta, act.tessellation)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("task", [SHORT, CLASSES], ids=lambda task: task.name)
@pytest.mark.parametrize("activation", ALONE)
def test_each_network_is_trained_as_if_alone(activation: str, task: Task, tmp_path: Path) -> None:
    result = train(task, activation, [0, 1], Path(), tmp_path / "state.pt")
    for rate_index, rate in enumerate(task.rates):
        model, split = alone(task, activation, 1, rate), task.split(1, task.batch, Path())
        assert result["parameters"] == sum(p.numel() for p in model.parameters())
        x, y = split.test
        with torch.no_grad():
            outputs = model(x)
        if task.classes:
            score = (outputs.argmax(1) == y).float().mean().item() * 100
            assert result["test"][-1][rate_index][1] == pytest.approx(score, abs=0.21)  # three points of 1,500
        else:
            mse = F.mse_loss(outputs, y).item()
            assert result["mse"][-1][rate_index][1] == pytest.approx(mse, rel=1e-3)
            score = 100 * (1 - mse / y.var(correction=0).item())
            assert result["test"][-1][rate_index][1] == pytest.approx(score, abs=0.1)


@pytest.mark.parametrize(("activation", "parameters"), [("ReLU", 193), ("Swish", 194), ("PReLU", 194), ("DiTAC", 202)])
def test_parameters_are_those_of_table_8(activation: str, parameters: int) -> None:
    assert Ensemble(TASKS["sines"].sizes, activation, 2, [0, 1, 2]).number_of_parameters() == parameters


@pytest.mark.parametrize("activation", ["PReLU", "DiTAC-prior"])
def test_what_was_interrupted_ends_as_if_it_had_not_been(activation: str, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(share: float) -> None:
        if share > 0.6:
            raise Interrupted

    file = tmp_path / "state.pt"
    with pytest.raises(Interrupted):
        train(SHORT, activation, [0, 1], Path(), file, interrupt)
    assert file.is_file()
    again = train(SHORT, activation, [0, 1], Path(), file)
    assert again == train(SHORT, activation, [0, 1], Path(), tmp_path / "other.pt")


def test_a_seed_does_not_depend_on_those_beside_it(tmp_path: Path) -> None:
    together = train(SHORT, "DiTAC-prior", [0, 1, 2], Path(), tmp_path / "a.pt")
    one = train(SHORT, "DiTAC-prior", [2], Path(), tmp_path / "b.pt")
    for key in ("validation", "test"):
        for many, single in zip(together[key], one[key], strict=True):
            assert [rate[2] for rate in many] == pytest.approx([rate[0] for rate in single], abs=1e-3)


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"")
    with pytest.raises(RunError, match=r"state.pt is damaged: delete it"):
        train(SHORT, "ReLU", [0], Path(), tmp_path / "state.pt")


def test_one_that_diverges_leaves_the_others_alone(tmp_path: Path) -> None:
    wild = replace(SHORT, rates=(1e30, 1e-3))
    result = train(wild, "ReLU", [0, 1], Path(), tmp_path / "a.pt")
    calm = train(SHORT, "ReLU", [0, 1], Path(), tmp_path / "b.pt")
    assert all(math.isnan(score) or score < 0 for score in result["test"][-1][0])
    assert result["test"][-1][1] == pytest.approx(calm["test"][-1][1], abs=1e-3)


@pytest.mark.parametrize(
    ("task", "activation", "steps", "low", "high"),
    [
        ("sines", "DiTAC", 6000, 90, 100),
        ("sines", "GELU", 6000, -1, 25),
        ("sines", "ELU", 2000, -5, 6),
        ("sines", "Softplus", 2000, -5, 6),
        ("sines", "Mish", 2000, -5, 6),
        ("sines", "PReLU", 4000, 10, 96),
        ("sines", "LeakyReLU", 4000, 10, 96),
        ("sines", "ReLU", 6000, 10, 96),
        ("plane", "DiTAC-prior", 4000, 75, 100),
        ("plane", "GELU", 4000, 0, 75),
        ("sinexp", "DiTAC", 4000, 55, 100),
    ],
)
def test_what_the_tables_say_shortened(
    task: str, activation: str, steps: int, low: float, high: float, tmp_path: Path
) -> None:
    """Mean R2 of two seeds at the learning rate 0.01, long before the supplement's 40,000 updates."""
    short = replace(TASKS[task], steps=steps, evaluations=1, rates=(1e-2,))
    result = train(short, activation, [0, 1], Path(), tmp_path / "state.pt")
    assert low <= sum(result["test"][-1][0]) / 2 <= high
