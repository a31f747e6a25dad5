"""The activations compared, each over many networks at once: a hidden layer is `(rates, seeds, examples, width)`.

Trainable ones have parameters `(rates, seeds, ...)`, a value or a theta for each network.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import cpab, ops
from ..activation import DiTAC
from ..training.errors import UsageError, suggestion

__all__ = ["COMPETITORS", "DITAC", "build", "check_names", "is_ditac"]

FIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "ReLU": F.relu,
    "LeakyReLU": F.leaky_relu,
    "GELU": F.gelu,
    "ELU": F.elu,
    "Softplus": F.softplus,
    "Mish": F.mish,
}


class _OneParameter(nn.Module):
    """A function of the input and of one trained number for each network."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], start: float, networks: tuple[int, int]):
        super().__init__()
        self.function = function
        self.parameter = nn.Parameter(torch.full((*networks, 1, 1), start))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.parameter)


def _swish(x: Tensor, beta: Tensor) -> Tensor:
    """Ramachandran, Zoph, Le, "Searching for Activation Functions", 2017, with a trainable beta."""
    return x * torch.sigmoid(beta * x)


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    """He et al., "Delving Deep into Rectifiers", 2015, one slope a layer."""
    return x.clamp(min=0) + slope * x.clamp(max=0)


def _pdelu(x: Tensor, alpha: Tensor) -> Tensor:
    """Cheng et al., "Parametric Deformable Exponential Linear Units for deep neural networks", 2020.

    With their t = 0.9: `alpha ([1 + (1 - t) x]_+ ^ (1 / (1 - t)) - 1)` left of 0, so a tenth power.
    """
    base = (1 + 0.1 * x.clamp(max=0)).clamp(min=0)
    fifth = base.square().square() * base
    return x.clamp(min=0) + alpha * (fifth.square() - 1)


TRAINABLE = {"Swish": (_swish, 1.0), "PReLU": (_prelu, 0.25), "PDELU": (_pdelu, 1.0)}
COMPETITORS = (*FIXED, *TRAINABLE)

# Name of a variant: what DiTAC is built with.
DITAC: dict[str, dict[str, Any]] = {
    "DiTAC": {},
    "DiTAC-prior": {"init": "prior"},
    "GE-DiTAC": {"version": "ge"},
    "L-DiTAC": {"version": "leaky"},
    "inf-DiTAC": {"version": "inf"},
    "GE-DiTAC-prior": {"version": "ge", "init": "prior"},
    "L-DiTAC-prior": {"version": "leaky", "init": "prior"},
    "inf-DiTAC-prior": {"version": "inf", "init": "prior"},
    "DiTAC-5-cells": {"cells": 5},
    "DiTAC-20-cells": {"cells": 20},
    "DiTAC-domain-1": {"domain": (-1.0, 1.0)},
    "DiTAC-domain-6": {"domain": (-6.0, 6.0)},
    "DiTAC-reg-0.001": {"regularisation": 1e-3},
    "DiTAC-reg-0.1": {"regularisation": 0.1},
}


class EnsembleOfDiTAC(nn.Module):
    """The package's own DiTAC, with a theta for each network."""

    def __init__(self, networks: tuple[int, int], seeds: list[int], regularisation: float = 0.0, **settings: Any):
        super().__init__()
        starts = []
        for seed in seeds:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                act = DiTAC(**settings)
            starts.append(act.theta.detach())
        self.theta = nn.Parameter(torch.stack(starts).expand(networks[0], -1, -1).clone())
        self.regularisation = regularisation
        self.tessellation, self.version, self.bins = act.tessellation, act.version, act.bins

    def forward(self, x: Tensor) -> Tensor:
        rows, thetas = x.flatten(0, 1), self.theta.flatten(0, 1)
        return ops.activate_rows(rows, thetas, self.tessellation, self.version, self.bins).view_as(x)

    def penalty(self) -> Tensor:
        """`(rates, seeds)`: what is added to each network's loss."""
        return self.regularisation * cpab.smoothness_penalty(self.theta, self.tessellation)


class _Fixed(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def build(name: str, networks: tuple[int, int], seeds: list[int]) -> nn.Module:
    """An activation for `networks` (rates, seeds) at once; `seeds` are for what it draws at random."""
    if name in FIXED:
        return _Fixed(FIXED[name])
    if name in TRAINABLE:
        return _OneParameter(*TRAINABLE[name], networks)
    return EnsembleOfDiTAC(networks, seeds, **DITAC[name])


def is_ditac(name: str) -> bool:
    return name in DITAC


def check_names(names: list[str]) -> list[str]:
    """The names as they are spelled above, whatever their case; raises UsageError for one that is none of them."""
    known = {name.lower(): name for name in (*COMPETITORS, *DITAC)}
    also = {
        "lrelu": "LeakyReLU",
        "ge": "GE-DiTAC",
        "leaky": "L-DiTAC",
        "inf": "inf-DiTAC",
    }  # the paper's, and `version`
    for name in names:
        if name.lower() not in known | also:
            near = suggestion(name, known.values())
            raise UsageError(f"--acts {name} is unknown{near}: give some of {', '.join(known.values())}")
    return list(dict.fromkeys((known | also)[name.lower()] for name in names))
