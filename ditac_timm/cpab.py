"""One-dimensional CPAB: continuous piecewise-affine velocity fields and the diffeomorphisms they integrate to.

A field `v` is piecewise linear between equally spaced knots on a domain `[a, b]`. The flow of `dy/dt = v(y)`,
`y(0) = x` is a strictly increasing map `T(x) = y(1)` with a closed form: exponentials inside a cell, logarithms for
the times at which a trajectory crosses from one cell to the next.

Source: Freifeld, Hauberg, Batmanghelich, Fisher, "Transformations Based on Continuous Piecewise-Affine Velocity
Fields", IEEE TPAMI 2017; priors as in the official DiTAC and difw code. Tensors only: nothing here knows of `nn`.
"""

import math
import numbers
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

__all__ = ["Tessellation", "flow", "sample_prior", "smoothness_penalty"]

_SUPPORTED = (torch.float32, torch.float64)


def flow(x: Tensor, knot_velocities: Tensor, domain: tuple[float, float], time: float = 1.0) -> Tensor:
    """Exact solution at `time` of `dy/dt = v(y), y(0) = x` for a piecewise linear `v`.

    Outside `[a, b]` the field of the edge cell goes on: with `v(a) = 0` that is `a + exp(slope * time) * (x - a)`.
    Differentiable in `x` and `knot_velocities`, twice. At a knot where `v` is zero the derivative in `x` is one-sided.

    Args:
        x: Points, float32 or float64, any shape; `(L, ...)` where `knot_velocities` has two dimensions.
        knot_velocities: `v` at `linspace(a, b, cells + 1)`, in x's unit per unit of time: `(cells + 1,)` for all of
            `x`, or `(L, cells + 1)`, one field for each row of `x`.
        domain: `(a, b)` in x's unit.
        time: How long to integrate; negative runs the flow backwards.

    Returns:
        Tensor of x's shape and dtype, computed in float64 where the device has it. NaN stays NaN.

    Raises:
        ValueError: Shapes, dtypes, devices or the domain do not fit, or a velocity is not finite (the values are
            looked at in eager calls only).
    """
    _check_domain(domain)
    _check_flow_arguments(x, knot_velocities)
    if not torch.compiler.is_compiling() and not knot_velocities.is_meta and not knot_velocities.isfinite().all():
        raise ValueError("knot_velocities must be finite, but has NaN or infinite entries.")
    dtype = internal_dtype(x.device)
    velocities = (knot_velocities.to(dtype) * time).reshape(-1, knot_velocities.shape[-1])
    rows = x.to(dtype).reshape(velocities.shape[0], -1) if x.numel() else x.to(dtype).reshape(velocities.shape[0], 0)
    finite = rows.isfinite()  # infinities stay, NaN stays, and neither spoils the gradient of the velocities
    y, _ = flow_with_slope(torch.where(finite, rows, domain[0]), velocities, domain)
    y = torch.where(finite, y, rows)
    return y.reshape(x.shape).to(x.dtype)


def flow_with_slope(x: Tensor, velocities: Tensor, domain: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """`T(x)` and `dT/dx` at time 1, unchecked and in the dtype given: the core of `flow` and of the tables.

    Without a loop over cells: the time that the flow needs across each whole cell is summed up once per field, so a
    trajectory is its first, partial cell, one search in these sums, and its last, partial cell.

    Args:
        x: Points `(L, M)`.
        velocities: `(L, cells + 1)`, one field a row.
        domain: `(a, b)`.

    Returns:
        Two tensors `(L, M)`.
    """
    a, b = domain
    cells = velocities.shape[-1] - 1
    width = (b - a) / cells
    at_rest = math.sqrt(torch.finfo(x.dtype).tiny)  # below this a division by the squared velocity overflows
    knots = torch.linspace(a, b, cells + 1, dtype=x.dtype, device=x.device)
    slopes = velocities.diff() / width

    # The cell, the velocity and the direction at the start. Edge cells reach to infinity.
    cell = torch.searchsorted(knots[1:-1], x.detach().contiguous(), right=True)
    left, right = velocities.gather(1, cell), velocities.gather(1, cell + 1)
    velocity = (left * (knots[cell + 1] - x) + right * (x - knots[cell])) / width
    moving_right = velocity > 0
    direction = moving_right.to(x.dtype) * 2 - 1

    # When the trajectory leaves that cell, if it does within the unit of time.
    exit_knot = cell + moving_right
    exit_velocity = torch.where(moving_right, right, left)
    may_exit = (
        (velocity.abs() > at_rest) & (exit_velocity * direction > at_rest) & (exit_knot > 0) & (exit_knot < cells)
    )
    hit_time = _crossing_time(
        direction * (knots[exit_knot] - x),
        torch.where(may_exit, velocity.abs(), 1.0),
        torch.where(may_exit, exit_velocity.abs(), 1.0),
    )
    exits = may_exit & (hit_time < 1)

    # Where it is at the end: on a clock that shows the crossing times of whole cells, added up from the left. A cell
    # that takes longer than the unit of time, or that no trajectory crosses, counts as 2: it is never left again.
    speeds = velocities.abs()
    crossable = (velocities[:, :-1] * velocities[:, 1:] > 0) & (speeds[:, :-1] > at_rest) & (speeds[:, 1:] > at_rest)
    cell_times = _crossing_time(
        torch.full_like(slopes, width),
        torch.where(crossable, speeds[:, :-1], 1.0),
        torch.where(crossable, speeds[:, 1:], 1.0),
    )
    cell_times = torch.where(crossable & (cell_times < 2), cell_times, 2.0)
    clock = torch.nn.functional.pad(cell_times.cumsum(1), (1, 0))
    end = clock.gather(1, exit_knot) + direction * (1 - hit_time)
    last = torch.searchsorted(clock.detach(), end.detach().contiguous(), right=True) - 1
    last = torch.where(moving_right, last.maximum(exit_knot), last.minimum(exit_knot - 1)).clamp(0, cells - 1)
    entry_knot = torch.where(moving_right, last, last + 1)

    # The last leg, by one formula for both: from x for the whole time, or from the last cell's entry for the rest.
    start = torch.where(exits, knots[entry_knot], x)
    start_velocity = torch.where(exits, velocities.gather(1, entry_knot), velocity)
    duration = torch.where(exits, direction * (end - clock.gather(1, entry_knot)), 1.0)
    last_slope = slopes.gather(1, torch.where(exits, last, cell))
    growth = last_slope * duration
    growth = growth.clamp(max=math.log(torch.finfo(x.dtype).max) - 1)  # 0 * inf at an unstable fixed point
    y = start + start_velocity * _integrated_growth(growth, duration, last_slope)
    slope = growth.exp() * torch.where(exits, start_velocity / torch.where(exits, velocity, 1.0), 1.0)
    return y, slope


def _crossing_time(distance: Tensor, speed: Tensor, exit_speed: Tensor) -> Tensor:
    """`distance * log(exit_speed / speed) / (exit_speed - speed)`, by a series where the speeds are nearly equal."""
    total, difference = speed + exit_speed, exit_speed - speed
    ratio = difference / total
    near = ratio.abs() < 0.02
    square = torch.where(near, ratio, 0.0).square()
    series = 1 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square / 9)))  # artanh(ratio) / ratio
    logarithm = (torch.where(near, 2.0, exit_speed) / torch.where(near, 1.0, speed)).log()
    return distance * torch.where(near, 2 / total * series, logarithm / torch.where(near, 1.0, difference))


def _integrated_growth(growth: Tensor, duration: Tensor, slope: Tensor) -> Tensor:
    """Integral of `exp(slope * t)` over the duration, `growth = slope * duration`.

    By a series where the growth is nearly 0, so no slope is too small. Elsewhere by `exp`: the derivative of torch's
    `expm1` is 0 where `exp` is below rounding, and that error would be multiplied by one over a velocity.
    """
    near = growth.abs() < 0.1
    half = torch.where(near, growth, 0.0) / 2
    square = half.square()
    series = half.exp() * (1 + square / 6 * (1 + square / 20 * (1 + square / 42 * (1 + square / 72))))  # sinh(h) / h
    return torch.where(near, duration * series, (growth.exp() - 1) / torch.where(near, 1.0, slope))


def internal_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it, else float32 (Apple's MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def _check_domain(domain: tuple[float, float]) -> None:
    try:
        a, b = (float(end) for end in domain)
    except (TypeError, ValueError):
        a = b = math.nan
    if not (math.isfinite(a) and math.isfinite(b) and a < b):
        raise ValueError(f"domain must be two finite numbers (a, b) with a < b, but is {domain!r}.")


def _check_flow_arguments(x: Tensor, knot_velocities: Tensor) -> None:
    for name, tensor in (("x", x), ("knot_velocities", knot_velocities)):
        if tensor.dtype not in _SUPPORTED:
            raise ValueError(f"{name} must be float32 or float64, but is {tensor.dtype}.")
    shape = tuple(knot_velocities.shape)
    if knot_velocities.ndim not in (1, 2) or shape[-1] < 2:
        raise ValueError(
            f"knot_velocities must have the shape (cells + 1,) or (L, cells + 1) with cells >= 1, but has {shape}."
        )
    if knot_velocities.ndim == 2 and (x.ndim == 0 or x.shape[0] != shape[0]):
        raise ValueError(
            f"x must have the shape (L, ...) with L = {shape[0]}, one row for each row of knot_velocities, "
            f"but has {tuple(x.shape)}."
        )
    if x.device != knot_velocities.device:
        raise ValueError(
            f"x and knot_velocities must be on one device, but are on {x.device} and {knot_velocities.device}."
        )


@dataclass(frozen=True)
class Tessellation:
    """Equal cells on a domain, and an orthonormal basis of the velocity fields that vanish at its two ends.

    Args:
        cells: How many, at least 1.
        domain: `(a, b)`, a < b.

    Raises:
        ValueError: `cells < 1`, or `a < b` does not hold.
    """

    cells: int = 10
    domain: tuple[float, float] = (-3.0, 3.0)

    def __post_init__(self):
        if isinstance(self.cells, bool) or not isinstance(self.cells, numbers.Integral) or self.cells < 1:
            raise ValueError(f"cells must be a whole number >= 1, but is {self.cells!r}.")
        _check_domain(self.domain)
        object.__setattr__(self, "cells", int(self.cells))
        object.__setattr__(self, "domain", (float(self.domain[0]), float(self.domain[1])))

    @property
    def dim(self) -> int:
        """Number of parameters: one for each inner knot."""
        return self.cells - 1

    @property
    def knots(self) -> Tensor:
        """`(cells + 1,)` float64, in x's unit."""
        return torch.linspace(*self.domain, self.cells + 1, dtype=torch.float64, device="cpu")

    @property
    def basis(self) -> Tensor:
        """`(2 cells, dim)` float64 with orthonormal columns.

        `basis @ theta` are slope and intercept of the first cell, then of the second, and so on, of the field on the
        domain normalised to [0, 1]. `H (H^T H)^(-1/2)`, H the hat functions of the inner knots in these coordinates:
        the symmetric orthonormalisation, so no sign or rotation depends on a linear-algebra library.
        """
        return torch.tensor(
            (_hat_functions(self.cells) @ _orthonormaliser(self.cells)).tolist(), device="cpu", dtype=torch.float64
        ).reshape(2 * self.cells, self.dim)

    def velocities(self, theta: Tensor) -> Tensor:
        """Knot velocities of the field with parameters `theta`, in x's unit per unit of time.

        Args:
            theta: `(..., dim)`, float32 or float64.

        Returns:
            `(..., cells + 1)` of theta's dtype, zero at both ends.

        Raises:
            ValueError: theta's last dimension is not `dim`, or its dtype is another.
        """
        if theta.ndim == 0 or theta.shape[-1] != self.dim or theta.dtype not in _SUPPORTED:
            raise ValueError(
                f"theta must have the shape (..., {self.dim}) and be float32 or float64, "
                f"but has {tuple(theta.shape)} and is {theta.dtype}."
            )
        return velocities_in(self.velocity_basis(theta.dtype, theta.device), theta)

    def velocity_basis(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """`(dim, cells + 1)`: the knot velocities, in x's unit, of each field of the basis. Not to be written to."""
        if torch.compiler.is_compiling() or not plain_eager():
            return self._new_velocity_basis(dtype, device)
        return _kept_velocity_basis(self, dtype, device)

    def _new_velocity_basis(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        rows = _velocity_rows(self.cells, *self.domain)
        return torch.tensor(rows, dtype=dtype, device=device).reshape(self.dim, self.cells + 1)


def velocities_in(basis: Tensor, theta: Tensor) -> Tensor:
    """`theta @ basis` of two tensors of one dtype, unchecked."""
    # A product and a sum rather than a matmul, which autocast would run in half precision.
    return (theta.unsqueeze(-1) * basis).sum(-2)


def plain_eager() -> bool:
    """Whether new tensors are ordinary, so may be kept: no mode or transform makes them fake or functional."""
    return torch._C._len_torch_dispatch_stack() == 0 and torch._C._functorch.peek_interpreter_stack() is None


@cache
def _kept_velocity_basis(tessellation: Tessellation, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor made in inference mode could not be used in training later
        return tessellation._new_velocity_basis(dtype, device)


# The constants are NumPy's, so that no torch mode (meta device, fake tensors, inference) can reach them.


@cache
def _hat_functions(cells: int) -> np.ndarray:
    """H, `(2 cells, cells - 1)`: slope and intercept, in each cell of [0, 1], of each inner knot's hat function."""
    hats = np.zeros((2 * cells, cells - 1))
    for knot in range(1, cells):
        hats[2 * knot - 2 : 2 * knot + 2, knot - 1] = cells, 1 - knot, -cells, 1 + knot
    return hats


@cache
def _orthonormaliser(cells: int) -> np.ndarray:
    """`(H^T H)^(-1/2)`."""
    hats = _hat_functions(cells)
    eigenvalues, eigenvectors = np.linalg.eigh(hats.T @ hats)
    return (eigenvectors / np.sqrt(eigenvalues)) @ eigenvectors.T


@torch.compiler.assume_constant_result  # else every call of a compiled model compares each number with what it was
def _velocity_rows(cells: int, a: float, b: float) -> list[list[float]]:
    """`(cells - 1, cells + 1)`: the knot velocities, in x's unit, of each field of the basis.

    A hat function's coefficient is the value at its knot.
    """
    return np.pad((b - a) * _orthonormaliser(cells), ((0, 0), (1, 1))).tolist()


def sample_prior(
    tessellation: Tessellation,
    length_scale: float = 3.0,
    variance: float = 2.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw theta from the smoothness prior that the official code (difw) initialises with.

    `theta ~ N(0, B^T C B)`, B the basis, `C = variance^2 exp(-|c_i - c_j| / (2 length_scale^2))` among the slopes and
    likewise among the intercepts, c the centres of the cells of [0, 1], and 0 between a slope and an intercept.

    Args:
        tessellation: Gives the basis.
        length_scale: Larger is smoother; > 0.
        variance: Larger is farther from the identity map; > 0. (A standard deviation, by that code's name for it.)
        generator: Source of randomness on the CPU; torch's default one where None.

    Returns:
        `(dim,)` float64 on the CPU.

    Raises:
        ValueError: `length_scale` or `variance` is not positive.
    """
    _check_positive(length_scale=length_scale, variance=variance)
    cells = tessellation.cells
    centres = (np.arange(cells) + 0.5) / cells
    among = variance**2 * np.exp(-np.abs(centres[:, None] - centres) / (2 * length_scale**2))
    covariance = np.zeros((2 * cells, 2 * cells))
    covariance[0::2, 0::2] = covariance[1::2, 1::2] = among
    basis = _hat_functions(cells) @ _orthonormaliser(cells)
    factor = np.linalg.cholesky(basis.T @ covariance @ basis)
    normal = torch.randn(tessellation.dim, dtype=torch.float64, device="cpu", generator=generator)
    return torch.tensor(factor.tolist(), dtype=torch.float64, device="cpu").reshape(factor.shape) @ normal


def smoothness_penalty(
    theta: Tensor, tessellation: Tessellation, length_scale: float = 5.0, variance: float = 1.0
) -> Tensor:
    """`theta^T P theta`, the negative log density (up to factor and constant) that the official code penalises with.

    `P = (B^T C B)^-1`, B the basis, `C = (exp(-|c_i - c_j| / length_scale))^2 (variance D)^2` over all `D = 2 cells`
    coordinates, `c = linspace(-1, 1, D)`. The gradient is `2 P theta`; the official code's own is an elementwise
    product that multiplies the data's gradient by `dim` instead.

    Args:
        theta: `(..., dim)`, float32 or float64.
        tessellation: Gives the basis.
        length_scale: Larger penalises rough fields more; > 0.
        variance: Larger penalises less; > 0.

    Returns:
        `(...)` of theta's dtype, >= 0.

    Raises:
        ValueError: theta's last dimension is not `dim`, or `length_scale` or `variance` is not positive.
    """
    _check_positive(length_scale=length_scale, variance=variance)
    if theta.ndim == 0 or theta.shape[-1] != tessellation.dim:
        raise ValueError(f"theta must have the shape (..., {tessellation.dim}), but has {tuple(theta.shape)}.")
    make = _new_precision if torch.compiler.is_compiling() or not plain_eager() else _kept_precision
    precision = make(tessellation.cells, length_scale, variance, theta.dtype, theta.device)
    return (theta.unsqueeze(-1) * theta.unsqueeze(-2) * precision).sum((-2, -1))


def _new_precision(
    cells: int, length_scale: float, variance: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    rows = _precision(cells, length_scale, variance)
    return torch.tensor(rows, dtype=dtype, device=device).reshape(cells - 1, cells - 1)


@cache
def _kept_precision(
    cells: int, length_scale: float, variance: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    with torch.inference_mode(False):  # as for `_kept_velocity_basis`
        return _new_precision(cells, length_scale, variance, dtype, device)


@cache
def _precision(cells: int, length_scale: float, variance: float) -> list[list[float]]:
    size = 2 * cells
    centres = np.linspace(-1, 1, size)
    covariance = np.exp(-np.abs(centres[:, None] - centres) / length_scale) ** 2 * (variance * size) ** 2
    basis = _hat_functions(cells) @ _orthonormaliser(cells)
    return np.linalg.inv(basis.T @ covariance @ basis).tolist()


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, but is {value}.")
