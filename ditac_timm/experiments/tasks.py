"""The tasks: what is learned, from what, by which network, for how long (supplement, section A)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from . import sources

__all__ = ["TASKS", "Split", "Task"]

Pair = tuple[Tensor, Tensor]

_BLOCK = 100  # steps whose points are drawn together


@dataclass(frozen=True)
class Split:
    """What one seed learns from and is measured on.

    Attributes:
        draw: `draw(first, number)` gives the batches of so many steps: `(number, batch, features)` and targets.
        validation: On which learning rates are chosen.
        test: What is reported.
        unit: Squared errors of the targets are multiplied by this, to be in the square of their own unit.
        bayes: The accuracy that cannot be exceeded but by luck, in percent.
    """

    draw: Callable[[int, int], Pair]
    validation: Pair
    test: Pair
    unit: float = 1.0
    bayes: float | None = None


@dataclass(frozen=True)
class Task:
    """One line of the paper, as it is run here.

    Attributes:
        name: What results are filed under.
        title: For people.
        split: `split(seed, batch, folder)`.
        sizes: Features, hidden layers, outputs.
        classes: Whether the targets are classes.
        steps: Updates.
        batch: Examples in each.
        rates: Learning rates that are tried.
        more_rates: Those that competitors are tried with besides.
        paper_rate: The one that the supplement names for DiTAC.
        evaluations: How often validation and test are looked at.
        overlap: Test examples for each one learned from, where seeds split the same few examples anew.
        quick_steps: Updates with `--quick`.
    """

    name: str
    title: str
    split: Callable[[int, int, Path], Split]
    sizes: tuple[int, ...]
    classes: bool = False
    steps: int = 40_000
    batch: int = 98
    rates: tuple[float, ...] = (1e-2, 3e-3, 1e-3)
    more_rates: tuple[float, ...] = (3e-2,)
    paper_rate: float = 1e-2
    evaluations: int = 100
    quick_steps: int = 2000
    overlap: float = 0.0

    def shortened(self) -> "Task":
        """For `--quick`: few updates, and the paper's learning rate and one more."""
        other = next(rate for rate in self.rates if rate != self.paper_rate)
        return replace(self, steps=self.quick_steps, rates=(self.paper_rate, other), more_rates=(), evaluations=10)


def _generator(*numbers: int) -> torch.Generator:
    """Of its own for each seed and purpose: what a seed draws does not depend on how many seeds there are."""
    state = 0
    for number in numbers:
        state = (state * 1_000_003 + number + 1) % (1 << 62)
    return torch.Generator().manual_seed(state)


def _function_split(
    target: Callable[[Tensor], Tensor], low: float, high: float, dimension: int, seed: int, batch: int, _: Path
) -> Split:
    """Points drawn anew for each update; validation at random points, the test on a grid, the same for all seeds."""

    def sample(generator: torch.Generator, *shape: int) -> Pair:
        x = torch.rand(*shape, dimension, generator=generator) * (high - low) + low
        return x, target(x)

    @lru_cache(maxsize=1)
    def block(index: int) -> Pair:
        return sample(_generator(seed, 1, index), _BLOCK, batch)

    def draw(first: int, number: int) -> Pair:
        parts, step = [], first
        while step < first + number:
            end = min(first + number, (step // _BLOCK + 1) * _BLOCK)
            parts.append([t[step % _BLOCK :][: end - step] for t in block(step // _BLOCK)])
            step = end
        x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return x, y

    axes = [torch.linspace(low, high, 2001 if dimension == 1 else 64)] * dimension
    grid = torch.cartesian_prod(*axes).reshape(-1, dimension)
    return Split(draw, sample(_generator(seed, 0), 2000), (grid, target(grid)))


def _epochs(x: Tensor, y: Tensor, batch: int, seed: int) -> Callable[[int, int], Pair]:
    """Shuffled anew in each epoch; a last batch that would be smaller is left out."""
    batch = min(batch, len(x))
    length = len(x) // batch

    @lru_cache(maxsize=2)
    def order(epoch: int) -> Tensor:
        permutation = torch.randperm(len(x), generator=_generator(seed, 2, epoch))
        return permutation[: length * batch].view(length, batch)

    def draw(first: int, number: int) -> Pair:
        chosen = torch.stack([order(step // length)[step % length] for step in range(first, first + number)])
        return x[chosen], y[chosen]

    return draw


def _sine_of_exponential(x: Tensor) -> Tensor:
    return torch.sin(torch.exp(6 * x))


def _sum_of_sines_in_the_plane(xy: Tensor) -> Tensor:
    """Supplement, (1) and (2); the first term as the official code has it, where the supplement prints sin(9xy)."""
    x, y = xy[..., :1], xy[..., 1:]
    return (
        0.4 * torch.sin(9 * x - 7 * y)
        + 0.1 * torch.sin(-9 * x + 11 * y)
        + 0.15 * torch.sin(3 * x + 13 * y)
        + 0.15 * torch.sin(9 * x + 9 * y)
        + 0.1 * torch.sin(13 * x + 5 * y)
        + 0.1 * torch.sin(3 * x + 19 * y)
    )


def _sum_of_sines(x: Tensor) -> Tensor:
    """Supplement, (3)."""
    terms = ((0.4, 19), (0.2, 23), (0.3, 29), (0.1, 31))
    return torch.stack([amplitude * torch.sin(frequency * x) for amplitude, frequency in terms]).sum(0)


def _auto_mpg_split(seed: int, batch: int, folder: Path) -> Split:
    """Cars in shares of 64, 16 and 20 % by the seed; both quantities standardised by the training cars'."""
    x, y = sources.auto_mpg(folder)
    order = torch.randperm(len(x), generator=_generator(seed, 3))
    test, validation, train = order.split([len(x) // 5, len(x) * 4 // 25, len(x) - len(x) // 5 - len(x) * 4 // 25])
    scaled = [((t - t[train].mean()) / t[train].std()).float() for t in (x, y)]
    parts = [(scaled[0][part], scaled[1][part]) for part in (train, validation, test)]
    return Split(_epochs(*parts[0], batch, seed), parts[1], parts[2], unit=y[train].var().item())


def _mixture_split(seed: int, batch: int, _: Path) -> Split:
    """A mixture of its own for each seed: 3,000 points to learn from, 500 to choose by, 1,500 to test on."""
    mixture = sources.draw_mixture(seed)
    train = mixture.x[:3000]
    x = ((mixture.x - train.mean(0)) / train.std(0)).float()
    parts = [(x[a:b], mixture.y[a:b]) for a, b in ((0, 3000), (3000, 3500), (3500, 5000))]
    return Split(_epochs(*parts[0], batch, seed), parts[1], parts[2], bayes=mixture.bayes)


@lru_cache(maxsize=1)
def _mnist(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, labels, test_images, test_labels = sources.ubyte_images("MNIST", folder)
    x, test_x = ((t.flatten(1).float() / 255 - 0.1307) / 0.3081 for t in (images, test_images))
    return x, labels, test_x, test_labels


def _mnist_split(seed: int, batch: int, folder: Path) -> Split:
    """The last twelfth of the training images are kept back to choose by."""
    x, y, test_x, test_y = _mnist(folder)
    held_out = len(x) // 12
    return Split(_epochs(x[:-held_out], y[:-held_out], batch, seed), (x[-held_out:], y[-held_out:]), (test_x, test_y))


_TASKS = (
    Task(
        "sines",
        "Sum of four sines (3), x in (-1, 1)",
        partial(_function_split, _sum_of_sines, -1.0, 1.0, 1),
        (1, 64, 1),
        paper_rate=1e-3,
    ),
    Task(
        "sinexp",
        "sin(exp 6x), x in (-1, 0.5)",
        partial(_function_split, _sine_of_exponential, -1.0, 0.5, 1),
        (1, 30, 1),
    ),
    Task(
        "plane",
        "Sum of six sines (1)-(2), (x, y) in (-1, 1)²",
        partial(_function_split, _sum_of_sines_in_the_plane, -1.0, 1.0, 2),
        (2, 50, 1),
    ),
    Task(
        "autompg",
        "Auto-MPG, horsepower from MPG",
        _auto_mpg_split,
        (1, 100, 100, 1),
        steps=20_000,
        rates=(1e-2, 1e-3),
        more_rates=(),
        quick_steps=500,
        overlap=78 / 252,  # cars
    ),
    Task(
        "mnist",
        "MNIST",
        _mnist_split,
        (784, 128, 64, 10),
        classes=True,
        steps=150 * (55_000 // 64),
        batch=64,
        rates=(1e-3, 1e-4),
        more_rates=(),
        paper_rate=1e-4,
        evaluations=150,
        quick_steps=859,
    ),
    Task(
        "gmm",
        "Ten Gaussians in the plane",
        _mixture_split,
        (2, 100, 100, 10),
        classes=True,
        steps=150 * (3000 // 64),
        batch=64,
        rates=(1e-2, 1e-3, 1e-4),
        paper_rate=1e-4,
        evaluations=150,
        quick_steps=500,
    ),
)
TASKS = {task.name: task for task in _TASKS}
