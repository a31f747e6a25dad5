"""Fit theta to another activation, by least squares: under a standard normal input, or at given points."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from .activation import DiTAC

__all__ = ["Fit", "fit_points", "match", "on"]

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
        function = on(function, grid.device)
        # Elementwise: of a PReLU with a slope for each channel the mean one counts, for DiTAC has one curve for all.
        target = (function.double().forward if isinstance(function, nn.Module) else function)(grid.clone())
    return _match(target.numpy().tobytes(), act.version, act.cells, act.domain)


def on(function: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function, or a copy of a module in evaluation, whose tensors are on a device.

    A PReLU gets one slope, the mean of its own.
    """
    if not isinstance(function, nn.Module):
        return function
    tensors = [*function.parameters(), *function.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        with torch.device("cpu"):
            function = type(function)()
    else:
        function = copy.deepcopy(function)
    for hooks in (function._forward_hooks, function._forward_pre_hooks, function._backward_hooks):
        hooks.clear()
    if isinstance(function, nn.PReLU):
        function.weight = nn.Parameter(function.weight.detach().mean().reshape(1))
    return function.to(device).eval()


@lru_cache(maxsize=256)
def _match(target_bytes: bytes, version: str, cells: int, domain: tuple[float, float]) -> Fit:
    grid = torch.linspace(-_REACH, _REACH, _POINTS, dtype=torch.float64, device="cpu")
    target = torch.from_numpy(np.frombuffer(target_bytes).copy())
    return fit_points(grid, target, version, cells, domain, torch.exp(-grid.square() / 2))


def fit_points(
    x: Tensor,
    y: Tensor,
    version: str,
    cells: int,
    domain: tuple[float, float],
    weight: Tensor | None = None,
    iterations: int = 200,
) -> Fit:
    """The theta of a DiTAC that takes x to y with the least squared error.

    Args:
        x: `(points,)`, float64, on the CPU.
        y: As x.
        version: The DiTAC's.
        cells: The DiTAC's.
        domain: The DiTAC's.
        weight: Of each point; equal ones where None.
        iterations: Of L-BFGS, at most.

    Returns:
        The fit, its errors at these points and with these weights.
    """
    with torch.inference_mode(False), torch.enable_grad():
        act = DiTAC(version, cells, domain, device="cpu", dtype=torch.float64)
        weight = torch.ones_like(x) if weight is None else weight
        weight = weight / weight.sum()
        optimizer = torch.optim.LBFGS(
            act.parameters(),
            max_iter=iterations,
            tolerance_grad=1e-9,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def closure():
            optimizer.zero_grad()
            loss = (weight * (act(x) - y).square()).sum() + _RIDGE * act.theta.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            error = act(x) - y
            rms = (weight * error.square()).sum().sqrt().item()
            return Fit(tuple(act.theta.tolist()), rms, error.abs().max().item())
