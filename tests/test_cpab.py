"""The flow against mpmath and scipy, its properties, and the tessellation, prior and penalty against numpy."""

import functools
import math
from typing import NamedTuple

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import exact_flow, exact_point, knots_of, solve_ivp_flow
from scipy.linalg import sqrtm

from ditac_timm.cpab import Tessellation, flow, sample_prior, smoothness_penalty

DTYPES = [torch.float64, torch.float32]


# --- The cases --------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    velocities: tuple
    domain: tuple = (-3.0, 3.0)
    time: float = 1.0


def random_velocities(sd, cells=10, seed=0, free=False):
    """Normal knot velocities, zero at both ends unless the boundary is free."""
    velocities = np.random.default_rng([seed, cells]).normal(0, sd, cells + 1)
    if not free:
        velocities[[0, -1]] = 0
    return tuple(velocities.tolist())


CASES = {
    "sd 0.01": Case(random_velocities(0.01)),
    "sd 0.1": Case(random_velocities(0.1, seed=1)),
    "sd 1": Case(random_velocities(1, seed=2)),
    "sd 3": Case(random_velocities(3, seed=3)),
    "all zero": Case((0.0,) * 6),
    "zero in one cell": Case((0.0, 1.0, 0.0, 0.0, -0.7, 0.4, 0.0)),
    "zero in the edge cells": Case((0.0, 0.0, 1.0, -0.5, 0.0, 0.0)),
    "slope 0": Case((0.0, 0.6, 0.6, 0.6, -0.4, -0.4, 0.0)),
    "slope 0 and free": Case((0.6, 0.6, 0.6, 0.6)),
    "slope 1e-6": Case((0.0, 0.6, 0.6 + 1e-6, 0.6, -0.4, -0.4 - 1e-6, 0.0)),
    "slope 1e-16": Case((0.0, 0.6, 0.6 + 1.2e-16, 0.6, -0.4, -0.4 - 1e-16, 0.0)),
    "nearly zero velocities": Case((0.0, 1e-8, -1e-30, 0.5, 1e-12, 0.5, 1e-35, 0.0)),
    "free boundary": Case(random_velocities(1, seed=4, free=True)),
    "free boundary, inwards": Case((1.0, 0.5, -0.3, 0.2, -2.0)),
    "free boundary, outwards": Case((-1.0, 0.5, -0.3, 0.2, 2.0)),
    "many crossings": Case((0.0, *(5.0 + v for v in random_velocities(0.5, cells=28)), 0.0)),
    "many crossings, to the left": Case((0.0, *(-5.0 + v for v in random_velocities(0.5, cells=28)), 0.0)),
    "through the whole domain": Case(tuple(7.0 + v for v in random_velocities(0.5, cells=20))),
    "time 0": Case(random_velocities(1, seed=5), time=0.0),
    "time -1": Case(random_velocities(1, seed=6), time=-1.0),
    "time -1, free boundary": Case(random_velocities(1, seed=7, free=True), time=-1.0),
    "time 2": Case(random_velocities(1, seed=8), time=2.0),
    "time 2, free boundary": Case(random_velocities(1, seed=9, free=True), time=2.0),
    "time 2, sd 3, 30 cells": Case(random_velocities(3, 30, seed=131), time=2.0),
    "time -1, sd 3, 30 cells": Case(random_velocities(3, 30, seed=102, free=True), time=-1.0),
    "domain (0, 3)": Case(random_velocities(1, seed=10), domain=(0.0, 3.0)),
    "domain (100, 101.3)": Case(random_velocities(0.3, seed=11, free=True), domain=(100.0, 101.3)),
    **{f"{cells} cells": Case(random_velocities(1, cells, free=cells == 1)) for cells in range(1, 31)},
}
EVERY_CASE = pytest.mark.parametrize("name", CASES)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])


def points_of(case, dtype):
    """Points inside and outside of the domain, at knots, and one ulp beside them (in float64 one of float32 too)."""
    (a, b), knots = case.domain, knots_of(case.domain, len(case.velocities) - 1)
    inside = np.random.default_rng(0).uniform(a, b, 8)
    outside = np.array([a - 2, a - 1e-3, b + 1e-3, b + 1.5])
    few = knots if len(knots) <= 8 else knots[[0, 1, 2, len(knots) // 2, -2, -1]]
    few32 = few.astype(np.float32)
    beside = [np.nextafter(few32, np.float32(side)).astype(float) for side in (-np.inf, np.inf)]
    if dtype == torch.float64:
        beside += [few, np.nextafter(few, -np.inf), np.nextafter(few, np.inf)]
    return torch.tensor(np.concatenate([inside, outside, few32.astype(float), *beside]), dtype=dtype)


@functools.cache
def exact(name, dtype):
    """A case's points and velocities in that dtype, and the truth for exactly these numbers."""
    case = CASES[name]
    x, velocities = points_of(case, dtype), torch.tensor(case.velocities, dtype=dtype)
    return x, velocities, exact_flow(x.tolist(), velocities.tolist(), case.domain, case.time)


def jacobians(x, velocities, case):
    """T, dT/dx and dT/dv of the flow under test: one row of velocities for each point, so one backward gives all."""
    x = x[:, None].clone().requires_grad_()
    rows = velocities.repeat(len(x), 1).requires_grad_()
    value = flow(x, rows, case.domain, case.time)
    dx, dv = torch.autograd.grad(value.sum(), (x, rows))
    return value.detach()[:, 0], dx[:, 0], dv


def error(got, true):
    """The error relative to 1 + |true|, as an array."""
    return np.abs(got.double().numpy() - true) / (1 + np.abs(true))


def distance_to_resting_knots(points, case):
    """Of each point to the nearest knot of zero velocity."""
    knots = knots_of(case.domain, len(case.velocities) - 1)[np.array(case.velocities) == 0]
    return np.abs(np.asarray(points)[:, None] - knots).min(1, initial=np.inf)


# --- The witnesses agree ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd 1", "slope 1e-6", "free boundary", "time -1, free boundary", "time 2"])
def test_exact_derivatives_are_those_of_the_exact_value(name):
    case, step = CASES[name], mpmath.mpf(10) ** -30
    for point in np.random.default_rng(1).uniform(-4, 4, 4):
        with mpmath.workdps(100):
            at = [mpmath.mpf(point), *map(mpmath.mpf, case.velocities)]
            truth = exact_point(at[0], at[1:], case.domain, case.time)
            for i, derivative in enumerate([truth.dx, *truth.dv]):
                up, down = ([z + sign * step * (j == i) for j, z in enumerate(at)] for sign in (1, -1))
                ends = [exact_point(z[0], z[1:], case.domain, case.time).value for z in (up, down)]
                assert abs((ends[0] - ends[1]) / (2 * step) - derivative) < 1e-20 * (1 + abs(derivative))


@EVERY_CASE
def test_value_against_solve_ivp(name):
    case, (x, velocities, truth) = CASES[name], exact(name, torch.float64)
    tame = truth.dx < 1e3  # elsewhere the integrator's own error of 1e-10 grows past the tolerance
    some = np.flatnonzero(tame)[:: max(1, tame.sum() // 8)]
    witness = solve_ivp_flow(x[some].tolist(), velocities, case.domain, case.time)
    assert error(torch.tensor(witness), truth.value[some]).max() < 1e-7
    assert error(flow(x[some], velocities, case.domain, case.time), witness).max() < 1e-7


# --- The flow against mpmath ------------------------------------------------------------------------------------------


@EVERY_CASE
@EVERY_DTYPE
def test_value(name, dtype):
    case, (x, velocities, truth) = CASES[name], exact(name, dtype)
    value = flow(x, velocities, case.domain, case.time)
    assert value.shape == x.shape and value.dtype == dtype and value.device == x.device
    rounding = 0.0 if dtype == torch.float64 else truth.dx * np.spacing(np.abs(x.numpy())) / (1 + np.abs(truth.value))
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert (error(value, truth.value) <= tolerance + rounding).all()


@EVERY_CASE
@EVERY_DTYPE
def test_derivatives(name, dtype):
    """Where they exist: at a knot of zero velocity the derivatives are one-sided. There they only have to be finite."""
    case, (x, velocities, truth) = CASES[name], exact(name, dtype)
    value, dx, dv = jacobians(x, velocities, case)
    assert torch.isfinite(dx).all() and torch.isfinite(dv).all()
    assert (error(value, truth.value) <= (1e-9 if dtype == torch.float64 else 1e-5 * (1 + truth.dx))).all()
    asked = distance_to_resting_knots(x, case) > 0
    if dtype == torch.float32:
        asked &= distance_to_resting_knots(truth.value, case) > 1e-5
    tolerance = 1e-7 if dtype == torch.float64 else 1e-4
    assert error(dx, truth.dx)[asked].max(initial=0) <= tolerance
    assert error(dv, truth.dv)[asked].max(initial=0) <= tolerance


@EVERY_CASE
def test_one_field_for_all_points_has_the_gradients_of_a_field_a_point(name):
    case, (x, velocities, _) = CASES[name], exact(name, torch.float64)
    _, dx, dv = jacobians(x, velocities, case)
    x, velocities = x.clone().requires_grad_(), velocities.clone().requires_grad_()
    weight = torch.linspace(-1, 1, len(x), dtype=x.dtype) / (1 + dv.abs().sum(1))
    got_dx, got_dv = torch.autograd.grad(flow(x, velocities, case.domain, case.time), (x, velocities), weight)
    torch.testing.assert_close(got_dx, weight * dx, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got_dv, weight @ dv, rtol=1e-10, atol=1e-10)


@EVERY_DTYPE
def test_zero_velocities_are_the_identity_everywhere(dtype):
    """Exactly so, and with the derivatives of the identity at the knots too, where both sides agree."""
    x, velocities, truth = exact("all zero", dtype)
    value, dx, dv = jacobians(x, velocities, CASES["all zero"])
    assert torch.equal(value, x) and torch.equal(dx, torch.ones_like(dx))
    assert error(dv, truth.dv).max() < (1e-14 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("time", [-1.0, 1.0, 2.0])
def test_derivative_at_a_resting_knot_lies_between_its_two_sides(time):
    velocities, domain = torch.tensor([0.0, 1.0, 0.0, -2.0, 0.0, 0.0, 0.5], dtype=torch.float64), (-3.0, 3.0)
    knots = torch.linspace(*domain, 7, dtype=torch.float64)
    growth = torch.exp(velocities.diff() * time)
    left, right = torch.cat([growth[:1], growth]), torch.cat([growth, growth[-1:]])
    x = knots.clone().requires_grad_()
    dx = torch.autograd.grad(flow(x, velocities, domain, time).sum(), x)[0]
    at = velocities == 0
    assert (dx >= torch.minimum(left, right) - 1e-12)[at].all() and (dx <= torch.maximum(left, right) + 1e-12)[at].all()


@pytest.mark.parametrize("time", [-1.0, 0.0, 1.0, 2.0])
def test_outside_a_zero_boundary_the_edge_cells_field_goes_on(time):
    velocities = torch.tensor(random_velocities(1), dtype=torch.float64)
    slopes = velocities.diff() / 0.6
    beyond = torch.tensor([1e-9, 0.5, 40.0], dtype=torch.float64)
    below, above = (flow(x, velocities, (-3.0, 3.0), time) for x in (-3 - beyond, 3 + beyond))
    torch.testing.assert_close(below, -3 - torch.exp(slopes[0] * time) * beyond, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(above, 3 + torch.exp(slopes[-1] * time) * beyond, rtol=1e-13, atol=1e-13)


# --- Shapes -----------------------------------------------------------------------------------------------------------


@EVERY_DTYPE
@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3), (2, 1, 3, 4)], ids=str)
def test_any_shape_of_x(shape, dtype):
    x = torch.linspace(-4, 4, math.prod(shape), dtype=dtype).reshape(shape)
    velocities = torch.tensor(random_velocities(1), dtype=dtype)
    value = flow(x, velocities, (-3.0, 3.0))
    assert value.shape == x.shape and value.dtype == dtype
    assert torch.equal(value.flatten(), flow(x.flatten(), velocities, (-3.0, 3.0)))


@pytest.mark.parametrize("shape", [(5,), (5, 9), (5, 2, 3), (5, 0)], ids=str)
def test_a_field_a_row_equals_row_by_row(shape):
    rows = torch.tensor(
        [random_velocities(sd, seed=20, free=sd > 1) for sd in (0.0, 0.01, 0.5, 2.0, 3.0)], dtype=torch.float64
    )
    x = torch.linspace(-4, 4, math.prod(shape), dtype=torch.float64).reshape(shape).requires_grad_()
    rows.requires_grad_()
    together = flow(x, rows, (-3.0, 3.0), 1.5)
    apart = torch.stack([flow(x[i], rows[i], (-3.0, 3.0), 1.5) for i in range(5)])
    torch.testing.assert_close(together, apart, rtol=1e-14, atol=1e-14)
    weight = torch.cos(torch.arange(x.numel())).reshape(shape).to(x)
    gradients = [torch.autograd.grad(value, (x, rows), weight) for value in (together, apart)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_strided_input():
    x = torch.linspace(-4, 4, 24, dtype=torch.float64).reshape(4, 6)
    rows = torch.tensor([random_velocities(1, seed=seed) for seed in range(6)], dtype=torch.float64)
    torch.testing.assert_close(flow(x.T, rows, (-3.0, 3.0)), flow(x.T.contiguous(), rows, (-3.0, 3.0)), rtol=0, atol=0)
    wide = torch.stack([rows, rows], dim=-1)[..., 0]
    torch.testing.assert_close(flow(x.T, wide, (-3.0, 3.0)), flow(x.T, rows, (-3.0, 3.0)), rtol=0, atol=0)


def test_nan_stays_nan_and_spoils_no_other_point():
    x = torch.tensor([0.3, math.nan, -1.2, 5.0], dtype=torch.float64)
    velocities = torch.tensor(random_velocities(1), dtype=torch.float64)
    value = flow(x, velocities, (-3.0, 3.0))
    assert value.isnan().tolist() == [False, True, False, False]
    assert torch.equal(value[[0, 2, 3]], flow(x[[0, 2, 3]], velocities, (-3.0, 3.0)))


def test_compiles_in_one_graph_without_looking_at_values():
    compiled = torch.compile(flow, backend="eager", fullgraph=True)
    x, velocities = torch.linspace(-4, 4, 9), torch.tensor(random_velocities(1))
    torch.testing.assert_close(compiled(x, velocities, (-3.0, 3.0)), flow(x, velocities, (-3.0, 3.0)))
    compiled(x, torch.full((11,), math.nan), (-3.0, 3.0))


# --- Properties -------------------------------------------------------------------------------------------------------

# |slope * time| stays below 6: stretched by the flow, a rounding error of 1e-16 is still far below the tolerances.
SPEED = st.floats(-1, 1) | st.sampled_from([0.0, 0.5, 0.5 + 1e-6, -0.5])
ZERO_BOUNDARY = st.lists(SPEED, max_size=7).map(lambda inner: [0.0, *inner, 0.0])
ANY_BOUNDARY = st.lists(SPEED, min_size=2, max_size=9)
TIME = st.floats(-1, 1) | st.sampled_from([-1.0, 0.0, 1.0])
GRID = torch.cat(
    [
        torch.linspace(-4, 4, 81, dtype=torch.float64),
        *(torch.linspace(-3, 3, n, dtype=torch.float64) for n in range(2, 10)),
    ]
)
OFTEN = settings(max_examples=60, deadline=None, derandomize=True)


def move(x, velocities, time):
    return flow(x, torch.tensor(velocities, dtype=torch.float64), (-3.0, 3.0), time)


@OFTEN
@given(velocities=ANY_BOUNDARY, time=TIME)
def test_monotone(velocities, time):
    x = GRID.unique()
    steps, gaps = move(x, velocities, time).diff(), x.diff()
    assert (steps > -1e-13).all()
    assert (steps[gaps > 1e-3] > 0).all()


@OFTEN
@given(velocities=ZERO_BOUNDARY, time=TIME)
def test_ends_are_fixed(velocities, time):
    ends = torch.tensor([-3.0, 3.0], dtype=torch.float64)
    assert torch.equal(move(ends, velocities, time), ends)
    inside = torch.linspace(-3, 3, 50, dtype=torch.float64)
    assert move(inside, velocities, time).abs().max() <= 3


@OFTEN
@given(velocities=ANY_BOUNDARY, first=TIME, second=TIME)
def test_group(velocities, first, second):
    twice, once = move(move(GRID, velocities, first), velocities, second), move(GRID, velocities, first + second)
    torch.testing.assert_close(twice, once, rtol=1e-10, atol=1e-10)


@OFTEN
@given(velocities=ANY_BOUNDARY, time=TIME)
def test_inverse_is_the_flow_of_the_opposite_field(velocities, time):
    back = move(move(GRID, velocities, time), [-v for v in velocities], time)
    torch.testing.assert_close(back, GRID, rtol=1e-10, atol=1e-10)


# --- Gradients of gradients -------------------------------------------------------------------------------------------

SMOOTH = {
    "random": random_velocities(0.7, cells=5),
    "free": random_velocities(0.7, cells=5, seed=1, free=True),
    "all zero": (0.0,) * 6,
    "zero in one cell": (0.0, 0.5, 0.0, 0.0, -0.6, 0.0),
    "slope 0": (0.0, 0.6, 0.6, 0.6, -0.4, 0.0),
    "slope 1e-6": (0.0, 0.6, 0.6 + 1e-6, 0.6, -0.4, 0.0),
    "rest inside a cell": (0.0, 0.6, -0.6, 0.6, 0.3, 0.0),
}


@pytest.mark.parametrize("time", [-1.0, 2.0])
@pytest.mark.parametrize("name", SMOOTH)
def test_gradcheck_and_gradgradcheck(name, time):
    """Away from knots at both ends of the trajectory: there the second derivatives jump."""
    velocities = torch.tensor(SMOOTH[name], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([-4.1, -2.5, -1.13, -0.4, 0.05, 1.5, 3.8], dtype=torch.float64, requires_grad=True)
    knots = torch.linspace(-3, 3, 6, dtype=torch.float64)

    def moved(x, velocities):
        return flow(x, velocities, (-3.0, 3.0), time)

    assert (x[:, None] - knots).abs().min() > 1e-3 and (moved(x, velocities)[:, None] - knots).abs().min() > 1e-3
    assert torch.autograd.gradcheck(moved, (x, velocities))
    assert torch.autograd.gradgradcheck(moved, (x, velocities))


def test_gradgradcheck_with_a_field_a_row():
    x = torch.tensor([[-2.5, 0.1, 3.4], [-3.7, -0.5, 1.5]], dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([SMOOTH["random"], SMOOTH["slope 0"]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, rows: flow(x, rows, (-3.0, 3.0)), (x, rows))


# --- Bad input --------------------------------------------------------------------------------------------------------


def field(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


BAD_FLOW = {
    "no cell": lambda: flow(field(3), field(1), (-3.0, 3.0)),
    "no velocity": lambda: flow(field(3), field(0), (-3.0, 3.0)),
    "scalar velocities": lambda: flow(field(3), torch.tensor(0.0), (-3.0, 3.0)),
    "3-D velocities": lambda: flow(field(3), field(3, 1, 11), (-3.0, 3.0)),
    "rows that do not fit": lambda: flow(field(3, 5), field(2, 11), (-3.0, 3.0)),
    "one row for three": lambda: flow(field(3, 5), field(1, 11), (-3.0, 3.0)),
    "rows for a scalar": lambda: flow(torch.tensor(0.0), field(2, 11), (-3.0, 3.0)),
    "rows of no cell": lambda: flow(field(3, 5), field(3, 1), (-3.0, 3.0)),
    "a > b": lambda: flow(field(3), field(11), (3.0, -3.0)),
    "a = b": lambda: flow(field(3), field(11), (3.0, 3.0)),
    "a is nan": lambda: flow(field(3), field(11), (math.nan, 3.0)),
    "b is infinite": lambda: flow(field(3), field(11), (-3.0, math.inf)),
    "x on another device": lambda: flow(field(3, device="meta"), field(11), (-3.0, 3.0)),
    "velocities on another device": lambda: flow(field(3), field(11, device="meta"), (-3.0, 3.0)),
    "nan velocity": lambda: flow(field(3), torch.tensor([0.0, math.nan, 0.0]), (-3.0, 3.0)),
    "infinite velocity": lambda: flow(field(3), torch.tensor([0.0, -math.inf, 0.0]), (-3.0, 3.0)),
    "nan in one row": lambda: flow(field(2, 3), torch.tensor([[0.0, 0.0], [0.0, math.nan]]), (-3.0, 3.0)),
    "integer x": lambda: flow(field(3, dtype=torch.int64), field(11), (-3.0, 3.0)),
    "integer velocities": lambda: flow(field(3), field(11, dtype=torch.int64), (-3.0, 3.0)),
    "cells = 0": lambda: Tessellation(cells=0),
    "cells = -1": lambda: Tessellation(cells=-1),
    "tessellation, a > b": lambda: Tessellation(domain=(3.0, -3.0)),
    "tessellation, a = b": lambda: Tessellation(domain=(1.0, 1.0)),
    "tessellation, a is nan": lambda: Tessellation(domain=(math.nan, 1.0)),
    "theta of the wrong length": lambda: Tessellation(5).velocities(torch.zeros(5)),
    "penalty of a theta of the wrong length": lambda: smoothness_penalty(torch.zeros(5), Tessellation(5)),
}


@pytest.mark.parametrize("name", BAD_FLOW)
def test_bad_input_is_refused_in_one_sentence(name):
    with pytest.raises(ValueError) as refusal:
        BAD_FLOW[name]()
    message = str(refusal.value)
    assert refusal.type is ValueError and message.strip() and "\n" not in message


# --- Tessellation -----------------------------------------------------------------------------------------------------

CELLS = pytest.mark.parametrize("cells", [2, 3, 10, 30])


def hats(cells):
    """Slope and intercept in each cell of the inner knots' hat functions on [0, 1]: (2 cells, cells - 1)."""
    columns = np.zeros((2 * cells, cells - 1))
    for k in range(1, cells):
        columns[2 * k - 2 : 2 * k + 2, k - 1] = [cells, 1 - k, -cells, 1 + k]
    return columns


def orthonormal_hats(cells):
    return hats(cells) @ np.linalg.inv(sqrtm(hats(cells).T @ hats(cells)).real)


def theta_of(tessellation, *batch, dtype=torch.float64):
    return torch.randn(*batch, tessellation.dim, generator=torch.Generator().manual_seed(0), dtype=dtype)


@CELLS
def test_basis(cells):
    tessellation = Tessellation(cells, (-1.0, 2.5))
    basis = tessellation.basis.double().numpy()
    assert tessellation.dim == cells - 1 and basis.shape == (2 * cells, cells - 1)
    np.testing.assert_allclose(basis, orthonormal_hats(cells), rtol=0, atol=1e-12)
    np.testing.assert_allclose(basis.T @ basis, np.eye(cells - 1), rtol=0, atol=1e-12)


@CELLS
def test_basis_gives_continuous_fields_that_vanish_at_the_ends(cells):
    tessellation = Tessellation(cells)
    slope, intercept = (tessellation.basis.double() @ theta_of(tessellation)).reshape(cells, 2).T
    knots = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
    left, right = slope * knots[:-1] + intercept, slope * knots[1:] + intercept
    torch.testing.assert_close(right[:-1], left[1:], rtol=0, atol=1e-12)
    assert left[0].abs() < 1e-12 and right[-1].abs() < 1e-12


@pytest.mark.parametrize("domain", [(-3.0, 3.0), (0.0, 3.0), (-1.0, 0.5)], ids=str)
@CELLS
def test_velocities_are_the_normalised_field_at_the_knots_in_units_of_x(cells, domain):
    tessellation = Tessellation(cells, domain)
    theta = theta_of(tessellation)
    slope, intercept = (orthonormal_hats(cells) @ theta.numpy()).reshape(cells, 2).T
    at_left_knots = slope * np.arange(cells) / cells + intercept
    velocities = tessellation.velocities(theta)
    assert velocities.dtype == theta.dtype and velocities[0] == 0 and velocities[-1] == 0
    np.testing.assert_allclose(velocities[:-1], (domain[1] - domain[0]) * at_left_knots, rtol=0, atol=1e-11)


def test_tessellation_defaults_and_knots():
    tessellation = Tessellation()
    assert tessellation.dim == 9
    torch.testing.assert_close(
        tessellation.knots.double(), torch.linspace(-3, 3, 11, dtype=torch.float64), rtol=0, atol=1e-15
    )


def test_one_cell_has_no_parameter():
    tessellation = Tessellation(1)
    assert tessellation.dim == 0 and tessellation.basis.shape == (2, 0)
    assert torch.equal(tessellation.velocities(torch.zeros(0)), torch.zeros(2))
    assert sample_prior(tessellation).shape == (0,)
    assert smoothness_penalty(torch.zeros(0), tessellation) == 0


@EVERY_DTYPE
def test_velocities_of_a_batch_of_thetas(dtype):
    tessellation = Tessellation(4)
    theta = theta_of(tessellation, 2, 3, dtype=dtype)
    velocities = tessellation.velocities(theta)
    assert velocities.shape == (2, 3, 5) and velocities.dtype == dtype
    tolerance = 1e-14 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(velocities[1, 2], tessellation.velocities(theta[1, 2]), rtol=tolerance, atol=tolerance)


def test_gradcheck_from_theta_through_the_flow():
    tessellation = Tessellation(5)
    x = torch.tensor([-4.0, -2.0, -0.3, 0.1, 1.4, 3.3], dtype=torch.float64)
    theta = theta_of(tessellation).mul(0.05).requires_grad_()
    assert torch.autograd.gradcheck(lambda theta: flow(x, tessellation.velocities(theta), (-3.0, 3.0)), (theta,))


# --- Prior and penalty ------------------------------------------------------------------------------------------------


def prior_covariance(cells, length_scale, variance):
    """B^T C B, with one covariance among the slopes and among the intercepts and none between them."""
    centres = (np.arange(cells) + 0.5) / cells
    among = variance**2 * np.exp(-np.abs(centres[:, None] - centres) / (2 * length_scale**2))
    return orthonormal_hats(cells).T @ np.kron(among, np.eye(2)) @ orthonormal_hats(cells)


def test_prior_is_reproducible():
    tessellation = Tessellation(7)
    draws = [sample_prior(tessellation, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert draws[0].shape == (6,) and draws[0].is_floating_point()
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    before = torch.random.get_rng_state()
    sample_prior(tessellation, generator=torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.random.get_rng_state()), "a given generator leaves the global one alone"
    torch.manual_seed(3)
    first = sample_prior(tessellation)
    torch.manual_seed(3)
    assert torch.equal(first, sample_prior(tessellation))


@pytest.mark.parametrize("arguments", [{}, {"length_scale": 0.3, "variance": 0.7}], ids=["defaults", "other scales"])
def test_prior_has_the_covariance_of_its_definition(arguments):
    """Draws whitened by the true covariance have mean 0 and covariance 1, within six standard errors."""
    tessellation, generator, count = Tessellation(6), torch.Generator().manual_seed(0), 4000
    draws = (
        torch.stack([sample_prior(tessellation, generator=generator, **arguments) for _ in range(count)])
        .double()
        .numpy()
    )
    scale = np.linalg.cholesky(prior_covariance(6, **{"length_scale": 3.0, "variance": 2.0, **arguments}))
    white = np.linalg.solve(scale, draws.T)
    np.testing.assert_allclose(white.mean(1), 0, atol=6 / math.sqrt(count))
    np.testing.assert_allclose(white @ white.T / count, np.eye(5), atol=6 * math.sqrt(2 / count))


def penalty_matrix(cells, length_scale=5.0, variance=1.0):
    """P = (B^T C B)^-1 in mpmath."""
    centres, basis = np.linspace(-1, 1, 2 * cells), mpmath.matrix(orthonormal_hats(cells))
    among = [[(mpmath.exp(-abs(c - d) / length_scale) * variance * 2 * cells) ** 2 for c in centres] for d in centres]
    inverse = (basis.T * mpmath.matrix(among) * basis) ** -1
    return np.array(inverse.tolist(), dtype=float)


@pytest.mark.parametrize("arguments", [{}, {"length_scale": 0.5, "variance": 2.0}], ids=["defaults", "other scales"])
@pytest.mark.parametrize("cells", [2, 10])
def test_penalty_and_its_gradient(cells, arguments):
    tessellation = Tessellation(cells)
    theta, precision = theta_of(tessellation).requires_grad_(), torch.tensor(penalty_matrix(cells, **arguments))
    penalty = smoothness_penalty(theta, tessellation, **arguments)
    assert penalty.shape == () and penalty.dtype == theta.dtype
    torch.testing.assert_close(penalty, theta @ precision @ theta, rtol=1e-9, atol=0)
    torch.testing.assert_close(torch.autograd.grad(penalty, theta)[0], 2 * precision @ theta, rtol=1e-9, atol=1e-12)


def test_penalty_is_usable_whatever_mode_it_was_first_called_in():
    tessellation = Tessellation(17)
    with torch.inference_mode():
        smoothness_penalty(torch.ones(16), tessellation)
    assert smoothness_penalty(torch.ones(16, device="meta"), tessellation).is_meta
    theta = torch.ones(16, requires_grad=True)
    smoothness_penalty(theta, tessellation).backward()
    rows = torch.func.vmap(lambda row: smoothness_penalty(row, tessellation))(torch.ones(3, 16))
    assert theta.grad.isfinite().all()
    torch.testing.assert_close(rows, smoothness_penalty(theta.detach(), tessellation).expand(3))


def test_penalty_in_float32():
    tessellation = Tessellation()
    theta = theta_of(tessellation, dtype=torch.float32)
    penalty = smoothness_penalty(theta, tessellation)
    assert penalty.dtype == torch.float32
    torch.testing.assert_close(
        penalty.double(), theta.double() @ torch.tensor(penalty_matrix(10)) @ theta.double(), rtol=1e-5, atol=0
    )
