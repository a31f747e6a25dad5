"""Many small networks trained as one: every seed and learning rate of one activation on one task."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..training.checkpoint import write_atomically
from ..training.errors import RunError
from . import competitors
from .tasks import Split, Task

__all__ = ["Ensemble", "train"]

_EXAMPLES_AT_ONCE = 2000  # when measuring


class Ensemble(nn.Module):
    """Multilayer perceptrons with shapes `(rates, seeds, ...)`; those of one seed begin alike at every rate.

    Args:
        sizes: Features, hidden layers, outputs.
        activation: A name of `competitors`.
        rates: How many learning rates.
        seeds: Of the networks' initial weights, drawn as `nn.Linear` draws them.
    """

    def __init__(self, sizes: tuple[int, ...], activation: str, rates: int, seeds: list[int]):
        super().__init__()
        layers = [self._linear_layers(sizes, seed) for seed in seeds]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for of_all_seeds in zip(*layers, strict=True):
            weight = torch.stack([layer.weight.detach().T for layer in of_all_seeds])
            bias = torch.stack([layer.bias.detach().unsqueeze(0) for layer in of_all_seeds])
            self.weights.append(nn.Parameter(weight.expand(rates, -1, -1, -1).clone()))
            self.biases.append(nn.Parameter(bias.expand(rates, -1, -1, -1).clone()))
        networks = rates, len(seeds)
        # Other streams than those of the weights, and one for each layer.
        self.activations = nn.ModuleList(
            competitors.build(activation, networks, [1_000_000 + seed * 100 + layer for seed in seeds])
            for layer in range(len(sizes) - 2)
        )

    @staticmethod
    def _linear_layers(sizes: tuple[int, ...], seed: int) -> list[nn.Linear]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]

    def forward(self, x: Tensor) -> Tensor:
        """From `(seeds, examples, features)` to `(rates, seeds, examples, outputs)`."""
        h = x.expand(self.weights[0].shape[0], *x.shape)
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if index:
                h = self.activations[index - 1](h)
            h = h @ weight + bias
        return h

    def penalty(self) -> Tensor | float:
        """`(rates, seeds)`: what is added to each network's loss, if anything."""
        acts = [act for act in self.activations if isinstance(act, competitors.EnsembleOfDiTAC) and act.regularisation]
        return torch.stack([act.penalty() for act in acts]).sum(0) if acts else 0.0

    def number_of_parameters(self) -> int:
        """Of one network."""
        return sum(parameter[0, 0].numel() for parameter in self.parameters())


def train(
    task: Task,
    activation: str,
    seeds: list[int],
    data_dir: Path,
    state_file: Path,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """Train an activation on a task with every learning rate and seed, from where the state file says.

    Args:
        task: What, how long, with which rates.
        activation: A name of `competitors`.
        seeds: Of weights, data and batches.
        data_dir: For tasks whose data are files.
        state_file: Written at each evaluation, and read if it is there.
        progress: Told the share that is done.

    Returns:
        Plain data: `evaluated_at` (updates), `validation` and `test` `(evaluations, rates, seeds)` (R2 or accuracy, in
        percent), `parameters` of one network, `bayes` of each seed; of regressions also `mse` (of the test, likewise)
        and `outputs` (on the test, of the first seed at every rate).
    """
    splits = [task.split(seed, task.batch, data_dir) for seed in seeds]
    model = Ensemble(task.sizes, activation, len(task.rates), seeds)
    # A learning rate's networks are a view of each parameter, so that torch's own Adam serves them all.
    groups = []
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for index, rate in enumerate(task.rates):
        views = [parameter.detach()[index] for parameter in model.parameters()]
        for view, parameter in zip(views, model.parameters(), strict=True):
            assert parameter.grad is not None
            view.grad = parameter.grad[index]
        groups.append({"params": views, "lr": rate})
    optimizer = torch.optim.Adam(groups, fused=True)
    result: dict[str, Any] = {"evaluated_at": [], "validation": [], "test": [], "mse": []}
    step = 0
    if state_file.is_file():
        try:
            state = torch.load(state_file, weights_only=True)
        except Exception as error:  # of torch, pickle or zip
            raise RunError(f"{state_file} is damaged: delete it, and what it is of begins anew") from error
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        result, step = state["result"], state["step"]

    stops = [math.ceil(task.steps * (index + 1) / task.evaluations) for index in range(task.evaluations)]
    for stop in stops:
        while step < stop:
            number = min(stop - step, 100)  # of steps whose batches are made together
            batches = [split.draw(step, number) for split in splits]
            x, y = (torch.stack(parts, 1) for parts in zip(*batches, strict=True))  # (steps, seeds, batch, ...)
            for now in range(number):
                model.zero_grad(set_to_none=False)
                losses = _losses(task, model(x[now]), y[now]) + model.penalty()
                losses.sum().backward()
                optimizer.step()
            step += number
            progress(step / task.steps)
        if stop in result["evaluated_at"]:
            continue
        _evaluate(task, model, splits, result)
        result["evaluated_at"].append(stop)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "result": result, "step": step}
        write_atomically(state_file, partial(torch.save, state))

    result["parameters"] = model.number_of_parameters()
    result["bayes"] = [split.bayes for split in splits]
    if not task.classes:
        outputs = _outputs(model, splits, "test")
        result["outputs"] = [[round(value, 5) for value in row] for row in outputs[:, 0, :, 0].tolist()]
    return result


def _losses(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    """`(rates, seeds)`: each network's own, so that none has a part in another's gradient."""
    if not task.classes:
        return (outputs - targets).square().mean((-2, -1))
    flat = targets.expand(outputs.shape[:-1])
    return F.cross_entropy(outputs.flatten(0, -2), flat.flatten(), reduction="none").view_as(flat).mean(-1)


@torch.no_grad()
def _outputs(model: Ensemble, splits: list[Split], part: str) -> Tensor:
    x = torch.stack([getattr(split, part)[0] for split in splits])
    return torch.cat([model(piece) for piece in x.split(_EXAMPLES_AT_ONCE, 1)], 2)


def _evaluate(task: Task, model: Ensemble, splits: list[Split], result: dict[str, Any]) -> None:
    for part in ("validation", "test"):
        outputs, targets = _outputs(model, splits, part), torch.stack([getattr(split, part)[1] for split in splits])
        if task.classes:
            score = (outputs.argmax(-1) == targets).float().mean(-1) * 100
        else:
            mse = (outputs - targets).double().square().mean((-2, -1))
            score = 100 * (1 - mse / targets.double().var((-2, -1), correction=0))
            if part == "test":
                unit = torch.tensor([split.unit for split in splits], dtype=torch.float64)
                result["mse"].append((mse * unit).tolist())
        finite = outputs.isfinite().all(-1).all(-1)
        result[part].append(torch.where(finite, score.double(), torch.nan).tolist())  # NaN: it diverged
