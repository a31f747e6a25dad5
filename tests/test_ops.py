"""The operators against the closed form: `cpab.flow`, torch.special.ndtr and autograd, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from ditac_timm import cpab, ops
from ditac_timm.ops import reference

INF, NAN = math.inf, math.nan
DOMAINS = {"ditac": (-3.0, 3.0), "ge": (0.0, 3.0), "leaky": (-3.0, 3.0), "inf": (-3.0, 3.0)}
VERSIONS = list(DOMAINS)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SETTINGS = ("ditac", (-3.0, 3.0), 640)


def closed_form(x, velocities, version, domain):
    """Equations 4 to 7 of the paper's supplement, differentiable; x and velocities are float64."""
    a, b = domain
    flowed, gelu = cpab.flow(x, velocities, domain), x * torch.special.ndtr(x)
    inside = (x >= a) & (x <= b)
    if version == "ditac":
        return torch.where(inside, flowed * torch.special.ndtr(x), gelu)
    if version == "ge":
        return torch.where(inside, flowed, torch.where(x < a, gelu, x))
    if version == "leaky":
        return torch.where(inside, flowed, F.leaky_relu(x, 0.01))
    return flowed


def table_error(domain, bins):
    """Measured: at most 4.4e-4 with 1024 bins on (-3, 3), falling with the square of their width.

    A field keeps its shape relative to the domain (its cells, velocities and errors scale with b - a).
    """
    return 4.4e-4 * (1024 / bins) ** 2 * (domain[1] - domain[0]) / 6


def random_field(version, kind, seed=0):
    """Float64 knot velocities: a draw of the prior, or a rough field of sd 0.03 of the domain."""
    generator = torch.Generator().manual_seed(seed)
    tessellation = cpab.Tessellation(10, DOMAINS[version])
    if kind == "prior":
        return tessellation.velocities(cpab.sample_prior(tessellation, generator=generator))
    a, b = DOMAINS[version]
    return F.pad(torch.randn(9, generator=generator, dtype=torch.float64) * 0.03 * (b - a), (1, 1))


def points(n=20000, seed=0, reach=8.0, dtype=torch.float64):
    """Uniform in (-reach, reach)."""
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((uniform * 2 - 1) * reach).to(dtype)


def table_of(settings=SETTINGS, dtype=torch.float32):
    version, domain, bins = settings
    return ops.tabulate(random_field(version, "prior").to(dtype), version, domain, bins)


def run(x, table, settings=SETTINGS, grad=None):
    """y, and the gradients of x and table for `grad` (by default ones)."""
    x, table = x.detach().requires_grad_(), table.detach().requires_grad_()
    y = ops.lookup(x, table, *settings)
    return y.detach(), *torch.autograd.grad(y, [x, table], torch.ones_like(y) if grad is None else grad)


# --- Values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prior", "rough"])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("seed", range(4))
def test_value_and_gradients_match_the_closed_form(version, kind, seed):
    domain = DOMAINS[version]
    bins = round((domain[1] - domain[0]) * 400)
    x = points(seed=seed).requires_grad_()
    velocities = random_field(version, kind, seed).requires_grad_()
    y = ops.lookup(x, ops.tabulate(velocities, version, domain, bins), version, domain, bins)
    expected = closed_form(x, velocities, version, domain)
    assert (y - expected).abs().max() <= table_error(domain, bins)

    weights = points(seed=seed + 100, reach=1.0)
    dx, dv = torch.autograd.grad(y, [x, velocities], weights)
    expected_dx, expected_dv = torch.autograd.grad(expected, [x, velocities], weights)
    # dT/dx has a kink where a trajectory ends in a knot; a bin that holds one errs in the first order.
    error = (dx - expected_dx).abs() / (1 + expected_dx.abs())
    assert error.quantile(0.99) <= 1e-3
    assert error.max() <= 0.1
    inner = slice(None) if version == "inf" else slice(1, -1)  # the ends' velocities reach only inf's tails exactly
    assert (dv - expected_dv)[inner].norm() <= 3e-3 * expected_dv[inner].norm()


@pytest.mark.parametrize("version", VERSIONS)
def test_error_falls_with_the_square_of_the_bin_width(version):
    domain, x = DOMAINS[version], points(200000, reach=3.0)
    velocities = random_field(version, "rough")
    expected = closed_form(x, velocities, version, domain)

    def error(bins):
        y = ops.lookup(x, ops.tabulate(velocities, version, domain, bins), version, domain, bins)
        return (y - expected).square().mean().sqrt()

    assert 3.3 <= error(300) / error(600) <= 4.7
    assert 3.3 <= error(600) / error(1200) <= 4.7


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(version, dtype):
    """Rounded once, from arithmetic in at least float32: half a unit in the last place beside the table's error."""
    domain = DOMAINS[version]
    settings = (version, domain, round((domain[1] - domain[0]) * 400))
    velocities = random_field(version, "prior")
    x = points(dtype=dtype)
    table = ops.tabulate(velocities.to(torch.float64 if dtype == torch.float64 else torch.float32), *settings)
    y, dx, dtable = run(x, table, settings)
    assert (y.dtype, dx.dtype, dtable.dtype) == (dtype, dtype, table.dtype)
    exact = x.double().requires_grad_()
    expected = closed_form(exact, velocities, version, domain)
    eps = torch.finfo(dtype).eps
    float32_noise = 0 if dtype == torch.float64 else 1e-5
    tolerance = table_error(domain, settings[2]) + float32_noise
    assert ((y.double() - expected).abs() <= tolerance + eps / 2 * expected.abs() + torch.finfo(dtype).tiny).all()
    (expected_dx,) = torch.autograd.grad(expected.sum(), exact)
    knots = torch.linspace(*domain, 11, dtype=torch.float64)  # coarse dtypes hit knots, where dy/dx may jump
    apart = ((x.double()[:, None] - knots).abs() > 1e-9).all(1)
    error = ((dx.double() - expected_dx).abs() / (1 + expected_dx.abs()))[apart]
    assert error.quantile(0.99) <= 1e-3 + eps
    assert error.max() <= 0.1


@pytest.mark.parametrize("version", VERSIONS)
def test_second_derivatives_against_finite_differences(version):
    """The first derivatives are smooth between nodes, so theirs can be checked as any function's."""
    domain, bins = DOMAINS[version], 80
    settings = (version, domain, bins)
    a, b = domain
    width = (b - a) / bins
    x = a + width * (torch.tensor([-1000, -20, -3, 2, 9, 31, 47, 66, 79, 82, 1000], dtype=torch.float64) + 0.4)
    velocities = random_field(version, "rough", 3)
    grad = points(len(x), reach=1.0)

    def first(grad, x, velocities):
        y = ops.lookup(x, ops.tabulate(velocities, *settings), *settings)
        return torch.autograd.grad(y, [x, velocities], grad, create_graph=True)

    inputs = [tensor.requires_grad_() for tensor in (grad, x, velocities)]
    assert torch.autograd.gradcheck(first, inputs, eps=1e-6, atol=1e-6)
    inputs = [tensor.detach().requires_grad_() for tensor in (grad, x, velocities)]
    y = ops.lookup(x, ops.tabulate(velocities, *settings), *settings)
    plain = torch.autograd.grad(y, [x, velocities], grad)
    for differentiable, opaque in zip(first(*inputs), plain, strict=True):
        torch.testing.assert_close(differentiable.detach(), opaque)


@pytest.mark.parametrize("version", VERSIONS)
def test_second_derivatives_match_the_closed_form(version):
    domain = DOMAINS[version]
    settings = (version, domain, round((domain[1] - domain[0]) * 400))
    x, velocities, grad = points().requires_grad_(), random_field(version, "prior", 1).requires_grad_(), points(seed=5)

    def second(y):
        dx, dv = torch.autograd.grad(y, [x, velocities], grad, create_graph=True)
        return torch.autograd.grad(dx.square().sum() / 1000 + dv.square().sum() / 1000, [x, velocities])

    ours = second(ops.lookup(x, ops.tabulate(velocities, *settings), *settings))
    exact = second(closed_form(x, velocities, version, domain))
    # The second derivative in x jumps where a trajectory ends in a knot, so some bins err by O(1) and most by O(width).
    scale = exact[0].abs().mean()
    assert ((ours[0] - exact[0]).abs() / scale).quantile(0.95) <= 0.05
    assert (ours[1] - exact[1])[1:-1].norm() <= 0.02 * exact[1][1:-1].norm()


def test_gradient_of_equal_inputs_is_precise():
    """All of 3e5 weights go into one bin: running sums in float32 would lose three digits."""
    velocities = random_field("ditac", "prior").float().requires_grad_()
    x, grad = torch.full((300_000,), 0.7313), torch.full((300_000,), 0.1)
    (ours,) = torch.autograd.grad(ops.lookup(x, ops.tabulate(velocities, *SETTINGS), *SETTINGS), velocities, grad)
    exact = velocities.detach().double().requires_grad_()
    y = ops.lookup(x[:1].double(), ops.tabulate(exact, *SETTINGS), *SETTINGS)
    (expected,) = torch.autograd.grad(y, exact, grad[:1].double() * len(x))
    assert (ours - expected).norm() <= 1e-5 * expected.norm()


# --- Shapes and layouts -----------------------------------------------------------------------------------------------

LAYOUTS = {
    "1-D": lambda: torch.randn(7),
    "2-D": lambda: torch.randn(3, 5),
    "3-D": lambda: torch.randn(2, 3, 5),
    "4-D": lambda: torch.randn(2, 3, 4, 5),
    "0-d": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0),
    "empty 3-D": lambda: torch.randn(3, 0, 2),
    "transposed": lambda: torch.randn(4, 6).T,
    "permuted": lambda: torch.randn(2, 3, 4, 5).permute(2, 0, 3, 1),
    "strided slice": lambda: torch.randn(9, 10)[::2, 1::3],
    "narrow": lambda: torch.randn(4, 10)[:, 2:5],
    "expanded": lambda: torch.randn(3, 1, 1).expand(3, 4, 5),
    "expanded 0-d": lambda: torch.randn(()).expand(6),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels_last slice": lambda: torch.randn(2, 6, 4, 5).to(memory_format=torch.channels_last)[:, ::2],
    "channels_last_3d": lambda: torch.randn(2, 3, 4, 5, 2).to(memory_format=torch.channels_last_3d),
    "offset": lambda: torch.randn(100)[13:60],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plain_grad", [True, False], ids=["contiguous grad", "grad as y"])
def test_layouts(layout, dtype, plain_grad):
    """The same numbers as for a contiguous copy, in the strides of `torch.empty_like(x)`, whatever grad's are."""
    torch.manual_seed(0)
    x = LAYOUTS[layout]().to(dtype) if dtype != torch.float32 else LAYOUTS[layout]()
    grad = torch.randn(x.shape).to(dtype)
    table = table_of()
    y, dx, dtable = run(x, table, grad=grad if plain_grad else torch.empty_like(x).copy_(grad))
    flat_y, flat_dx, flat_dtable = run(x.reshape(-1).clone(), table, grad=grad.reshape(-1).clone())
    assert y.shape == dx.shape == x.shape
    assert y.stride() == dx.stride() == torch.empty_like(x).stride()
    assert torch.equal(y.reshape(-1), flat_y)
    assert torch.equal(dx.reshape(-1), flat_dx)
    torch.testing.assert_close(dtable, flat_dtable)


def test_expanded_gradient():
    """`y.sum().backward()` sends a gradient of stride 0."""
    x, table = torch.randn(5, 7), table_of()
    for ours, expected in zip(run(x, table, grad=torch.ones(()).expand(5, 7)), run(x, table), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("size", [0, 1, 31, 4097, 300_001])
def test_chunks(size):
    """Long inputs are walked in pieces: no element may notice."""
    x, grad, table = points(size, dtype=torch.float32), points(size, seed=1, dtype=torch.float32), table_of()
    y, dx, dtable = run(x, table, grad=grad)
    parts = [run(a, table, grad=b) for a, b in zip(x.split(4096), grad.split(4096), strict=True)]
    assert torch.equal(y, torch.cat([part[0] for part in parts]))
    assert torch.equal(dx, torch.cat([part[1] for part in parts]))
    torch.testing.assert_close(dtable, sum(part[2] for part in parts), rtol=1e-4, atol=1e-3)


# --- Edge values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values(version, dtype):
    domain = DOMAINS[version]
    velocities, largest = random_field(version, "rough"), torch.finfo(dtype).max
    settings = (version, domain, 600)
    table = ops.tabulate(velocities.to(torch.float64 if dtype == torch.float64 else torch.float32), *settings)
    finite = torch.tensor([1e4, -1e4, min(1e30, largest), max(-1e30, -largest), largest, -largest], dtype=dtype)

    y, dx, dtable = run(finite, table, settings)
    assert dx.isfinite().all()
    exact = finite.double()
    if version == "inf":  # the edge cells' flow
        (a, b), width = domain, (domain[1] - domain[0]) / 10
        left, right = (velocities[1] / width).exp(), (-velocities[-2] / width).exp()
        expected = torch.where(exact > 0, b + right * (exact - b), a + left * (exact - a))
        expected_dx = torch.where(exact > 0, right, left)
    else:
        left = 0.01 if version == "leaky" else 0.0
        expected_dx = left + (1 - left) * (exact > 0).double()
        expected = exact * expected_dx
        backward = torch.ops.ditac.tabulate_backward.default(dtable, velocities.to(table.dtype), *settings)
        assert backward.isfinite().all()  # theta moves nothing out there
    tolerance = {"rtol": max(2 * torch.finfo(dtype).eps, 1e-6 if dtype != torch.float64 else 1e-12), "atol": 1e-12}
    torch.testing.assert_close(y, expected.to(dtype), **tolerance)
    torch.testing.assert_close(dx, expected_dx.to(dtype), **tolerance)

    y, dx, _ = run(torch.tensor([INF, -INF, NAN], dtype=dtype), table, settings)
    assert y[0] == INF
    assert y[1] == (0 if version in ("ditac", "ge") else -INF)
    assert y[2].isnan()
    torch.testing.assert_close(dx[:2], expected_dx[-2:].to(dtype), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_does_not_spread(dtype):
    x = points(1000, dtype=dtype)
    y, dx, _ = run(x, table_of())
    x[::7] = NAN
    with_nan_y, with_nan_dx, _ = run(x, table_of())
    assert with_nan_y[::7].isnan().all()
    kept = ~x.isnan()
    assert torch.equal(with_nan_y[kept], y[kept])
    assert torch.equal(with_nan_dx[kept], dx[kept])


@pytest.mark.parametrize("version", VERSIONS)
def test_domain_ends_belong_to_the_domain(version):
    domain = DOMAINS[version]
    settings = (version, domain, 600)
    velocities = random_field(version, "rough")
    table = ops.tabulate(velocities, *settings)
    ends = torch.tensor(domain, dtype=torch.float64)
    beside = torch.cat([ends.nextafter(torch.tensor(side, dtype=torch.float64)) for side in (-INF, INF)])
    for x in (ends, beside):
        expected = closed_form(x, velocities, version, domain)
        y = ops.lookup(x, table, *settings)
        if version == "leaky":  # it jumps at a: an ulp may fall on either side
            x, y, expected = x[x > 0], y[x > 0], expected[x > 0]
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)


def test_leaky_slope_is_exact_in_float64():
    """Neither the slope nor the value at a may pass through float32."""
    table = table_of(("leaky", (-3.0, 3.0), 600), torch.float64)
    x = torch.tensor([-1e6, -10.0, -4.0], dtype=torch.float64)
    torch.testing.assert_close(ops.lookup(x, table, "leaky", (-3.0, 3.0), 600), 0.01 * x, rtol=1e-12, atol=0)


# --- From theta to the result in one node, and without a gradient in one operator -------------------------------------


@pytest.mark.parametrize("theta_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("version", VERSIONS)
def test_activate_is_the_chain_of_operators_bit_for_bit(version, dtype, theta_dtype):
    tessellation, x = cpab.Tessellation(10, DOMAINS[version]), points(1000, dtype=dtype).requires_grad_()
    theta = cpab.sample_prior(tessellation, generator=torch.Generator().manual_seed(0)).to(theta_dtype).requires_grad_()
    grad = points(1000, seed=1, reach=1.0, dtype=dtype)
    velocities = tessellation.velocities(theta.to(torch.float64 if dtype == torch.float64 else torch.float32))
    settings = version, tessellation.domain, 640
    chained = ops.lookup(x, ops.tabulate(velocities, *settings), *settings)
    activated = ops.activate(x, theta, tessellation, version, 640)
    with torch.no_grad():
        evaluated = ops.activate(x, theta, tessellation, version, 640)
    assert torch.equal(activated, chained) and torch.equal(evaluated, chained)
    for ours, expected in zip(*(torch.autograd.grad(y, [x, theta], grad) for y in (activated, chained)), strict=True):
        assert ours.dtype == expected.dtype and torch.equal(ours, expected)


@pytest.mark.parametrize("shape", [(8,), (2, 9), ()])
@pytest.mark.parametrize("gradient", [True, False])
def test_activate_refuses_another_theta(shape, gradient):
    theta = torch.zeros(shape, requires_grad=gradient)
    with pytest.raises(ValueError, match=r"theta must have the shape \(9,\)"):
        ops.activate(torch.zeros(3), theta, cpab.Tessellation(), "ditac", 640)


def test_activate_is_one_node():
    tessellation, x = cpab.Tessellation(), points(10, dtype=torch.float32).requires_grad_()
    theta = torch.zeros(9, requires_grad=True)
    y = ops.activate(x, theta, tessellation, "ditac", 640)
    assert [type(function).__name__ for function, _ in y.grad_fn.next_functions if function] == ["AccumulateGrad"] * 2


@pytest.mark.parametrize("needed", ["x", "theta", "both"])
def test_activate_has_the_chains_second_derivative(needed):
    tessellation = cpab.Tessellation()
    x, theta = points(50), cpab.sample_prior(tessellation, generator=torch.Generator().manual_seed(0)).double()
    inputs = {"x": [x], "theta": [theta], "both": [x, theta]}[needed]
    for tensor in inputs:
        tensor.requires_grad_()

    def second(y):
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(part.square().sum() for part in first), inputs)

    chained = ops.lookup(x, ops.tabulate(tessellation.velocities(theta), *SETTINGS), *SETTINGS)
    for ours, expected in zip(second(ops.activate(x, theta, tessellation, "ditac", 640)), second(chained), strict=True):
        torch.testing.assert_close(ours, expected)


# --- Memory -----------------------------------------------------------------------------------------------------------


def test_only_x_and_the_table_are_saved():
    x = points(50000, dtype=torch.bfloat16).requires_grad_()
    velocities = random_field("ditac", "prior").requires_grad_()
    table = ops.tabulate(velocities.float(), *SETTINGS)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        ops.lookup(x, table, *SETTINGS)
    assert sorted(tensor.data_ptr() for tensor in saved) == sorted((x.data_ptr(), table.data_ptr()))


@pytest.mark.parametrize(("needs_x", "needs_table"), [(True, False), (False, True), (False, False)])
def test_gradients_nobody_needs_are_not_computed(needs_x, needs_table):
    x, table = points(100, dtype=torch.float32), table_of().detach()
    both = run(x, table)
    x.requires_grad_(needs_x), table.requires_grad_(needs_table)
    y = ops.lookup(x, table, *SETTINGS)
    assert y.requires_grad == (needs_x or needs_table)
    if y.requires_grad:
        y.backward(torch.ones_like(y))
    for tensor, needed, expected in ((x, needs_x, both[1]), (table, needs_table, both[2])):
        assert torch.equal(tensor.grad, expected) if needed else tensor.grad is None


def test_inputs_are_left_alone():
    x, grad, table = points(100, dtype=torch.float32), points(100, seed=1, dtype=torch.float32), table_of().detach()
    copies = [tensor.clone() for tensor in (x, grad, table)]
    run(x, table, grad=grad)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((x, grad, table), copies, strict=True))


# --- Torch's rules for operators --------------------------------------------------------------------------------------


def _opcheck_cases():
    ops_ = torch.ops.ditac
    settings = ("ditac", (-3.0, 3.0), 40)
    velocities = random_field("ditac", "prior")
    table = ops.tabulate(velocities, *settings).float()
    x = torch.linspace(-4, 4, 12).reshape(3, 4)
    leaf = lambda tensor: tensor.clone().requires_grad_()  # noqa: E731
    yield "tabulate", ops_.tabulate.default, (leaf(velocities), *settings)
    yield "tabulate inf", ops_.tabulate.default, (leaf(velocities.float()), "inf", (-3.0, 3.0), 40)
    yield "tabulate_backward", ops_.tabulate_backward.default, (torch.ones_like(table), velocities.float(), *settings)
    yield "lookup", ops_.lookup.default, (leaf(x), leaf(table), *settings)
    yield "lookup bfloat16, transposed", ops_.lookup.default, (leaf(x.bfloat16()).T, leaf(table), *settings)
    yield "lookup, x only", ops_.lookup.default, (leaf(x), table, *settings)
    for need_x, need_table in ((True, True), (True, False), (False, True)):
        arguments = (torch.ones_like(x), x, table, *settings, need_x, need_table)
        yield f"lookup_backward {need_x} {need_table}", ops_.lookup_backward.default, arguments


@pytest.mark.parametrize(("operator", "arguments"), [pytest.param(*case[1:], id=case[0]) for case in _opcheck_cases()])
def test_opcheck(operator, arguments):
    torch.library.opcheck(operator, arguments)


def test_meta_tensors():
    velocities = torch.empty(11, device="meta")
    x = torch.empty(2, 3, 4, 5, device="meta", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    y = ops.lookup(x, ops.tabulate(velocities, *SETTINGS), *SETTINGS)
    assert (y.device, y.dtype, y.shape, y.stride()) == (x.device, x.dtype, x.shape, x.stride())
    assert ops.tabulate(velocities, *SETTINGS).shape == table_of().shape


# --- Bad arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ((torch.zeros(2, 11), *SETTINGS), "velocities"),
        ((torch.zeros(1), *SETTINGS), "velocities"),
        ((torch.zeros(11, dtype=torch.float16), *SETTINGS), "velocities"),
        ((torch.zeros(11), "gelu", (-3.0, 3.0), 640), "version"),
        ((torch.zeros(11), "ditac", (-3.0, 3.0), 645), "bins"),
        ((torch.zeros(11), "ditac", (-3.0, 3.0), 0), "bins"),
    ],
)
def test_tabulate_refuses(arguments, names):
    with pytest.raises(ValueError, match=names):
        ops.tabulate(*arguments)


@pytest.mark.parametrize("table", [torch.zeros(2, 5), torch.zeros(5), torch.zeros(3, 1283)])
def test_lookup_refuses_a_table_of_another_shape(table):
    with pytest.raises(ValueError, match="table must have the shape"):
        ops.lookup(torch.zeros(3), table, *SETTINGS)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_lookup_refuses_what_is_not_floating(dtype):
    with pytest.raises(TypeError, match="floating"):
        ops.lookup(torch.ones(3, dtype=dtype), table_of(), *SETTINGS)


def test_table_has_the_shape_that_nodes_says():
    for version, domain in DOMAINS.items():
        table = ops.tabulate(torch.zeros(11), version, domain, 600)
        assert table.shape == (2, reference.nodes(version, domain, 600))


@pytest.mark.parametrize("version", VERSIONS)
def test_rows_with_a_theta_of_their_own(version):
    """`activate_rows` is `activate` row by row, to the last bit, and so are its gradients."""
    tessellation = cpab.Tessellation(10, DOMAINS[version])
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(5, 9, generator=generator).requires_grad_()
    x = (torch.randn(5, 7, 3, generator=generator) * 3).requires_grad_()
    weights = torch.randn(5, 7, 3, generator=generator)
    y = ops.activate_rows(x, theta, tessellation, version, 640)
    alone = torch.stack([ops.activate(x[i], theta[i], tessellation, version, 640) for i in range(5)])
    assert torch.equal(y, alone)
    found = torch.autograd.grad((y * weights).sum(), (x, theta))
    expected = torch.autograd.grad((alone * weights).sum(), (x, theta))
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    (only_x,) = torch.autograd.grad(ops.activate_rows(x, theta.detach(), tessellation, version, 640).sum(), (x,))
    (only_theta,) = torch.autograd.grad(
        ops.activate_rows(x.detach(), theta, tessellation, version, 640).sum(), (theta,)
    )
    assert only_x.shape == x.shape
    assert only_theta.shape == theta.shape


def test_rows_and_thetas_must_fit():
    tessellation = cpab.Tessellation()
    for theta in (torch.zeros(4, 9), torch.zeros(9), torch.zeros(5, 8)):
        with pytest.raises(ValueError, match=r"theta must have the shape \(5, 9\)"):
            ops.activate_rows(torch.zeros(5, 2), theta, tessellation, "ditac", 640)
    with pytest.raises(TypeError, match="floating"):
        ops.activate_rows(torch.zeros(5, 2, dtype=torch.int64), torch.zeros(5, 9), tessellation, "ditac", 640)
