"""Fit theta to another activation, by least squares under a standard normal input."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from .activation import DiTAC

__all__ = ["Fit", "match"]

_REACH = 6.0  # beyond it a standard normal number has a probability of 2e-9
_POINTS = 2401

# Weight of theta's squared norm beside the mean squared error. Where the old activation is out of reach (a ReLU's exact
# 0 wants an infinite velocity) the error would go on falling, imperceptibly, towards a field too steep to train.
_RIDGE = 1e-6


@dataclass(frozen=True)
class Fit:
    """A fitted theta and what it leaves.

    Attributes:
        theta: The parameters.
        rms: Root mean square of new minus old activation under a standard normal input.
        max: Largest difference over |x| <= 6.
    """

    theta: tuple[float, ...]
    rms: float
    max: float


def match(function: Callable[[Tensor], Tensor], act: DiTAC) -> Fit:
    """The theta with which `act` comes closest to `function`; `act` itself is not changed.

    Args:
        function: An elementwise module or function; it is called with float64 numbers on the CPU. A module on the meta
            device, which has no values, is taken as its class makes it.
        act: Gives version, cells and domain.

    Returns:
        The fit, computed once for each different curve and setting.
    """
    with torch.inference_mode(False), torch.no_grad():
        grid = torch.linspace(-_REACH, _REACH, _POINTS, dtype=torch.float64, device="cpu")
        target = _evaluate(function, grid)
    return _fit(target.numpy().tobytes(), act.version, act.cells, act.domain)


def _evaluate(function: Callable[[Tensor], Tensor], grid: Tensor) -> Tensor:
    if isinstance(function, nn.Module):
        tensors = [*function.parameters(), *function.buffers()]
        if any(tensor.is_meta for tensor in tensors):
            with torch.device("cpu"):
                function = type(function)()
        else:
            function = copy.deepcopy(function).cpu()
        if isinstance(function, nn.PReLU):  # one DiTAC for all channels
            function.weight = nn.Parameter(function.weight.detach().mean().reshape(1))
        function = function.double().eval().forward  # without its hooks
    return function(grid.clone())  # it may work in place


@lru_cache(maxsize=256)
def _fit(target_bytes: bytes, version: str, cells: int, domain: tuple[float, float]) -> Fit:
    with torch.inference_mode(False), torch.enable_grad():
        act = DiTAC(version, cells, domain, device="cpu", dtype=torch.float64)
        grid = torch.linspace(-_REACH, _REACH, _POINTS, dtype=torch.float64, device="cpu")
        target = torch.from_numpy(np.frombuffer(target_bytes).copy())
        weight = torch.exp(-grid.square() / 2)
        weight = weight / weight.sum()
        optimizer = torch.optim.LBFGS(
            act.parameters(), max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
        )

        def closure():
            optimizer.zero_grad()
            loss = (weight * (act(grid) - target).square()).sum() + _RIDGE * act.theta.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            error = act(grid) - target
            rms = (weight * error.square()).sum().sqrt().item()
            return Fit(tuple(act.theta.tolist()), rms, error.abs().max().item())
