"""Two witnesses for the CPAB flow that share no code and no formulas with ditac_timm.

`exact_flow` walks from cell to cell with mpmath; `solve_ivp_flow` integrates the equation numerically with scipy.

Both solve `dy/dt = v(y)`, `y(0) = x`, where v is linear between the knots and goes on as the edge cells' lines outside
of them. The knots are the float64 numbers of `torch.linspace(a, b, cells + 1, dtype=float64)`, taken as exact: one ulp
beside a knot is beside it here too.
"""

from bisect import bisect
from typing import NamedTuple

import mpmath
import numpy as np
import torch
from mpmath import mpf
from scipy.integrate import solve_ivp

DIGITS = 100  # dividing by a slope of 1e-20 twice loses 40 of them, so 50 good ones remain


class Exact(NamedTuple):
    """Position T, dT/dx, and dT/dv for each knot velocity: mpmath numbers, or float64 arrays with one row a point."""

    value: np.ndarray
    dx: np.ndarray
    dv: np.ndarray


def knots_of(domain, cells):
    """The float64 knots, as an array of cells + 1 numbers."""
    return torch.linspace(*domain, cells + 1, dtype=torch.float64).numpy()


def _home(y, velocity_at, knots):
    """The cell that y moves into: at a knot the direction decides, at rest the right one."""
    cell = sum(y >= knot for knot in knots[1:-1])
    if cell > 0 and y == knots[cell] and velocity_at(cell, y) < 0:
        cell -= 1
    return cell


def _walk(x, velocities, knots, time):
    """Forward in time through one cell after the other.

    v is continuous, so sensitivities do not jump at a knot: in a cell of slope s they obey `S' = s S + hat(y)`, which
    has an exact solution too.
    """
    cells = len(knots) - 1
    slopes = [(velocities[i + 1] - velocities[i]) / (knots[i + 1] - knots[i]) for i in range(cells)]

    def velocity_at(cell, y):
        return velocities[cell] + slopes[cell] * (y - knots[cell])

    y, dx, dv, left = x, mpf(1), [mpf(0)] * (cells + 1), time
    cell = _home(y, velocity_at, knots)
    while left > 0:
        slope, width, speed = slopes[cell], knots[cell + 1] - knots[cell], velocity_at(cell, y)
        target = cell + 1 if speed > 0 else cell
        following = cell + 1 if speed > 0 else cell - 1
        stay = left
        if 0 <= following < cells and speed * velocities[target] > 0:
            hit = mpmath.log(velocities[target] / speed) / slope if slope else (knots[target] - y) / speed
            stay = min(hit, left)
        grow = mpmath.exp(slope * stay)
        drift = (grow - 1) / slope if slope else stay  # int_0^stay e^(slope (stay - r)) dr
        bend = (stay * grow - drift) / slope if slope else stay * stay / 2  # the same of e^(slope (stay - r)) drift(r)
        right_hat = (
            (y - knots[cell]) * drift + speed * bend
        ) / width  # the same of the hat function of the right knot along y(r)
        dx *= grow
        dv = [grow * d for d in dv]
        dv[cell] += drift - right_hat
        dv[cell + 1] += right_hat
        left -= stay
        if left > 0:
            y, cell = knots[target], following
        else:
            y += speed * drift
    return Exact(y, dx, dv)


def exact_point(x, velocities, domain, time=1.0, digits=DIGITS):
    """T(x) and its derivatives as mpmath numbers, from floats or mpmath numbers.

    At a knot of zero velocity the derivatives are those of the cell to the right.
    """
    with mpmath.workdps(digits):
        sign = -1 if time < 0 else 1  # back in time is forward along -v
        knots = [mpf(float(k)) for k in knots_of(domain, len(velocities) - 1)]
        value, dx, dv = _walk(mpf(x), [sign * mpf(v) for v in velocities], knots, abs(mpf(time)))
        return Exact(value, dx, [sign * d for d in dv])


def exact_flow(x, velocities, domain, time=1.0):
    """T at each of N points x, and its derivatives, to float64's last digit: arrays (N,), (N,), (N, cells + 1)."""
    rows = [exact_point(float(point), [float(v) for v in velocities], domain, time) for point in x]
    return Exact(*(np.array([np.array(getattr(row, field), dtype=float) for row in rows]) for field in Exact._fields))


def solve_ivp_flow(x, velocities, domain, time=1.0):
    """T at each of the points x, by scipy. Each point on its own, in steps short enough to see every kink."""
    velocities = [float(v) for v in velocities]
    knots = knots_of(domain, len(velocities) - 1).tolist()
    max_step = 0.5 * (knots[1] - knots[0]) / max(1e-9, *map(abs, velocities))

    def field(_, y):
        cell = bisect(knots[1:-1], y[0])
        share = (y[0] - knots[cell]) / (knots[cell + 1] - knots[cell])
        return [velocities[cell] * (1 - share) + velocities[cell + 1] * share]

    def end(start):
        if time == 0:
            return start
        return solve_ivp(field, (0, time), [start], "DOP853", rtol=1e-10, atol=1e-12, max_step=max_step).y[0, -1]

    return np.array([end(float(point)) for point in x])
