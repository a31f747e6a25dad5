"""The Triton kernels against `ops/reference.py`: on a GPU where there is one, else in Triton's interpreter.

The interpreter has to be chosen before Triton is imported and holds for the whole process. So it runs in another one,
which calls the kernels for the tests here.
"""

import importlib.util
import math
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from fields import DOMAINS, FIELDS, VERSIONS, field

from ditac_timm.ops import reference

GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")

INF, NAN = math.inf, math.nan
EXPONENTIALS = 2e-15  # no two libraries agree to the last digit
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

SERVER = textwrap.dedent("""
    import pickle, sys, traceback, warnings
    import torch
    from ditac_timm.ops import triton

    warnings.filterwarnings("ignore", category=RuntimeWarning)  # NumPy's, of overflows that are meant
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    while True:
        try:
            name, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        try:
            answer = getattr(triton, name)(*arguments)
        except Exception:
            answer = traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()
""")


class Interpreted:
    process = None

    def __call__(self, name, *arguments):
        if self.process is None:
            environment = {**os.environ, "TRITON_INTERPRET": "1"}
            command = [sys.executable, "-c", SERVER]
            self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            pickle.dump((name, arguments), self.process.stdin)
            self.process.stdin.flush()
            answer = pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError):
            self.close()
            pytest.fail("The interpreter died, as by an access outside of a tensor.")
        if isinstance(answer, str):
            pytest.fail(answer)
        return answer

    def close(self):
        if self.process is not None:
            self.process.communicate(timeout=60)
            self.process = None


class Native:
    def __call__(self, name, *arguments):
        from ditac_timm.ops import triton

        answer = getattr(triton, name)(*(moved(argument, "cuda") for argument in arguments))
        return tuple(map(self.back, answer)) if isinstance(answer, tuple) else self.back(answer)

    @staticmethod
    def back(answer):
        return moved(answer, "cpu")

    def close(self):
        pass


def moved(argument, device):
    """With its strides, whatever they are."""
    if not isinstance(argument, torch.Tensor):
        return argument
    storage = argument.untyped_storage().to(device=device)
    place = argument.storage_offset(), argument.shape, argument.stride()
    return torch.empty(0, dtype=argument.dtype, device=device).set_(storage, *place)


@pytest.fixture(scope="module")
def kernels():
    kernels = Native() if GPU else Interpreted()
    yield kernels
    kernels.close()


def settings_of(version, bins_per_unit=100):
    a, b = DOMAINS[version]
    return version, (a, b), round((b - a) * bins_per_unit / 10) * 10


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def relative(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30)).item()


def gradient_of_velocities(kernels, x, grad, velocities, settings):
    """By the kernels, and exactly for the same table: in float64, from the same x."""
    table = kernels("tabulate", velocities, *settings)
    _, grad_table = kernels("lookup_backward", grad, x, table, *settings, False, True)
    ours = kernels("tabulate_backward", grad_table, velocities, *settings)
    exact = velocities.double()
    table = reference.tabulate(exact, *settings)
    grad_table = reference.lookup_backward(grad.double(), x.double(), table, *settings, False, True)[1]
    return ours, reference.tabulate_backward(grad_table, exact, *settings)


def assert_like_reference(kernels, x, settings, grad=None, kind="prior", table_dtype=None):
    """Values, both gradients, and theirs of the velocities."""
    velocities = field(kind, settings[1]).to(table_dtype or wide(x.dtype))
    grad = torch.randn(x.shape, dtype=torch.float64).to(x.dtype) if grad is None else grad
    table, plain = kernels("tabulate", velocities, *settings), reference.tabulate(velocities, *settings)
    y, expected = kernels("lookup", x, table, *settings), reference.lookup(x, plain, *settings)
    assert (y.dtype, y.shape, y.stride()) == (x.dtype, x.shape, torch.empty_like(x).stride())
    eps = max(torch.finfo(x.dtype).eps, torch.finfo(table.dtype).eps)
    place = (
        8 * torch.finfo(table.dtype).eps * plain[1].abs().max().item()
    )  # x is known to a rounding on the table's scale
    torch.testing.assert_close(y, expected, rtol=4 * eps, atol=16 * eps + place, equal_nan=True)
    ours = kernels("lookup_backward", grad, x, table, *settings, True, True)
    theirs = reference.lookup_backward(grad, x, plain, *settings, True, True)
    assert (ours[0].dtype, ours[0].shape, ours[0].stride()) == (x.dtype, x.shape, torch.empty_like(x).stride())
    # Where T is steep a bin's derivatives differ much at its ends, and float32 knows the place to a few 1e-5 of a bin.
    torch.testing.assert_close(
        ours[0], theirs[0], rtol=max(8 * eps, 1e-3 if eps > 1e-9 else 1e-12), atol=64 * eps, equal_nan=True
    )
    assert (ours[1].dtype, ours[1].shape) == (table.dtype, table.shape)
    velocity_gradient = kernels("tabulate_backward", ours[1], velocities, *settings)
    assert (velocity_gradient.dtype, velocity_gradient.shape) == (velocities.dtype, velocities.shape)
    exact = velocities.double()
    double_table = reference.tabulate(exact, *settings)
    grad_table = reference.lookup_backward(grad.double(), x.double(), double_table, *settings, False, True)[1]
    expected = reference.tabulate_backward(grad_table, exact, *settings)
    tolerance = 1e-12 if table.dtype == x.dtype == torch.float64 else 1e-5
    assert relative(velocity_gradient, expected) <= tolerance or (velocity_gradient - expected).abs().max() <= 1e-10


def randn(size, dtype, scale=3.0, seed=0):
    return (torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


# --- Lookup -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 31, 4097, 1_000_000 if GPU else 100_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(kernels, size, dtype):
    assert_like_reference(kernels, randn(size, dtype), settings_of("ditac"))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_versions(kernels, version, dtype):
    assert_like_reference(kernels, randn(5003, dtype), settings_of(version))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float64])
def test_any_table_dtype_goes_with_any_input(kernels, dtype, table_dtype):
    assert_like_reference(kernels, randn(1000, dtype), settings_of("ditac"), table_dtype=table_dtype)


LAYOUTS = {
    "0-d": lambda: torch.randn(()),
    "transposed": lambda: torch.randn(41, 63).T,
    "strided slice": lambda: torch.randn(90, 101)[::2, 1::3],
    "expanded": lambda: torch.randn(30, 1, 1).expand(30, 4, 5),
    "channels_last": lambda: torch.randn(2, 3, 14, 15).to(memory_format=torch.channels_last),
    "channels_last slice": lambda: torch.randn(2, 6, 14, 15).to(memory_format=torch.channels_last)[:, ::2],
    "unaligned": lambda: torch.randn(100)[13:60],
    "empty": lambda: torch.randn(3, 0, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(kernels, layout, dtype):
    torch.manual_seed(0)
    x = LAYOUTS[layout]()
    x = x if dtype == torch.float32 else x.to(dtype)
    assert_like_reference(kernels, x, settings_of("ditac"))
    assert_like_reference(kernels, x, settings_of("ditac"), grad=torch.ones((), dtype=dtype).expand(x.shape))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_edge_values(kernels, version, dtype):
    settings = settings_of(version)
    velocities = field("prior", settings[1]).to(wide(dtype))
    ends = torch.tensor([*settings[1], -6.0, 6.0, 0.0], dtype=dtype)
    beside = [torch.nextafter(ends, torch.full_like(ends, side)) for side in (INF, -INF)] if dtype.itemsize > 2 else []
    largest = torch.finfo(dtype).max
    far = [-0.0, 1e4, -1e4, min(1e30, largest), max(-1e30, -largest), largest, -largest, INF, -INF, NAN]
    x = torch.cat([ends, *beside, torch.tensor(far, dtype=dtype)])
    table, plain = kernels("tabulate", velocities, *settings), reference.tabulate(velocities, *settings)
    eps = max(torch.finfo(dtype).eps, EXPONENTIALS)
    y, expected = kernels("lookup", x, table, *settings), reference.lookup(x, plain, *settings)
    jumps = (x - settings[1][0]).abs() <= 4 * eps if version == "leaky" else torch.zeros_like(x, dtype=torch.bool)
    close = {"rtol": max(4 * eps, 1e-6 * (eps > 1e-9)), "atol": 32 * eps, "equal_nan": True}
    torch.testing.assert_close(y[~jumps], expected[~jumps], **close)
    assert ((y - expected)[jumps].abs() <= 32 * eps).logical_or((y - 0.01 * x)[jumps].abs() <= 32 * eps).all()
    one = torch.ones_like(x)
    (ours, _), (theirs, _) = (
        function(one, x, each, *settings, True, False)
        for function, each in ((lambda *a: kernels("lookup_backward", *a), table), (reference.lookup_backward, plain))
    )
    kinks = (x[:, None] - ends[:4]).abs().amin(1) <= 4 * eps  # there an ulp decides
    torch.testing.assert_close(ours[~kinks], theirs[~kinks], **close)


@pytest.mark.parametrize("version", ["ditac", "leaky"])
def test_domain_ends_belong_to_the_domain(kernels, version):
    """A jump or a kink at a: the domain's side holds there, the other one ulp below."""
    a, settings = -3.0, settings_of(version)
    velocities = field("prior", settings[1]).float()
    table = kernels("tabulate", velocities, *settings)
    x = torch.tensor([a, math.nan])
    x[1] = torch.nextafter(x[0], torch.tensor(-INF))
    y = kernels("lookup", x, table, *settings)
    outside = x[1] * (0.01 if version == "leaky" else torch.special.ndtr(x[1]))
    inside = x[0] * (1.0 if version == "leaky" else torch.special.ndtr(x[0]))
    torch.testing.assert_close(y, torch.stack((inside, outside)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("place", [0.7313, -20.0, 20.0, "one bin"])
def test_skewed_inputs(kernels, version, place):
    """All sums go to one place: none of them may stick."""
    x = 0.5 + torch.rand(50_000) / 2000 if place == "one bin" else torch.full((50_000,), place)
    assert_like_reference(kernels, x, settings_of(version), grad=torch.full_like(x, 0.1))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("size", [6, 10_000])
def test_velocities_gradient(kernels, version, size):
    """Of few elements and of many, of one sign and of both, in bins of the usual width."""
    settings = settings_of(version, 400)
    x, grad = randn(size, torch.float32, 1.5), randn(size, torch.float32, 1.0, 1)
    for kind, weights in (("prior", grad), ("rough", grad.abs()), ("open ends", grad)):
        ours, exact = gradient_of_velocities(kernels, x, weights, field(kind, settings[1]).float(), settings)
        assert relative(ours, exact) <= 1e-5


def test_nan_does_not_spread(kernels):
    settings = settings_of("ditac")
    velocities = field("prior", settings[1]).float()
    table = kernels("tabulate", velocities, *settings)
    x, grad = randn(1000, torch.float32), randn(1000, torch.float32, 1.0, 1)
    holed, kept = x.clone(), torch.arange(1000) % 7 > 0
    holed[~kept] = NAN
    y, with_nan = (kernels("lookup", each, table, *settings) for each in (x, holed))
    assert with_nan[~kept].isnan().all()
    assert torch.equal(with_nan[kept], y[kept])
    grad_x, grad_table = kernels("lookup_backward", grad, holed, table, *settings, True, True)
    assert torch.equal(grad_x[kept], kernels("lookup_backward", grad, x, table, *settings, True, False)[0][kept])
    assert grad_x[~kept].isnan().all()
    assert grad_table.isfinite().all()


def test_only_what_is_needed(kernels):
    x, grad, settings = randn(1000, torch.float32), randn(1000, torch.float32), settings_of("inf")
    table = kernels("tabulate", field("prior", settings[1]).float(), *settings)
    both = kernels("lookup_backward", grad, x, table, *settings, True, True)
    only_x, none = kernels("lookup_backward", grad, x, table, *settings, True, False)
    assert torch.equal(only_x, both[0]) and none.numel() == 0
    none, only_table = kernels("lookup_backward", grad, x, table, *settings, False, True)
    assert torch.equal(only_table, both[1]) and none.numel() == 0


@pytest.mark.parametrize("version", VERSIONS)
def test_tables_without_a_jacobian(kernels, version):
    settings = settings_of(version)
    plain = reference.tabulate(field("prior", settings[1]).float(), *settings)
    x, grad = randn(3000, torch.float32), randn(3000, torch.float32, 1.0, 1)
    torch.testing.assert_close(
        kernels("lookup", x, plain, *settings), reference.lookup(x, plain, *settings), rtol=1e-6, atol=4e-6
    )
    for needs in ((True, False), (True, True)):
        ours = kernels("lookup_backward", grad, x, plain, *settings, *needs)
        theirs = reference.lookup_backward(grad, x, plain, *settings, *needs)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_runs_repeat_bit_for_bit(kernels):
    settings = settings_of("inf")
    velocities = field("prior", settings[1]).float()
    x, grad = randn(20_001, torch.float32), randn(20_001, torch.float32, 1.0, 1)

    def run():
        table = kernels("tabulate", velocities, *settings)
        grads = kernels("lookup_backward", grad, x, table, *settings, True, True)
        return table, *grads, kernels("tabulate_backward", grads[1], velocities, *settings)

    assert all(map(torch.equal, run(), run()))


# --- Tabulate ---------------------------------------------------------------------------------------------------------


def assert_table_like_reference(kernels, velocities, settings):
    """The table, and the product of a gradient of it, by the Jacobian that it holds and by the other kernel."""
    table, plain = kernels("tabulate", velocities, *settings), reference.tabulate(velocities, *settings)
    assert table.shape == (2 + velocities.numel(), plain.shape[1])
    torch.testing.assert_close(table[0], plain[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(table[1], plain[1], rtol=1e-9, atol=1e-11)
    grad = torch.randn(plain.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = [
        reference.tabulate_backward(grad * torch.tensor(rows, dtype=torch.float64)[:, None], velocities, *settings)
        for rows in ([1, 0], [0, 1])
    ]
    assert relative(table[2:] @ grad[0], expected[0]) <= 1e-11
    padded, further = torch.zeros_like(table), torch.randn(velocities.numel(), dtype=torch.float64)
    for row in range(2):
        padded[:2] = 0
        padded[row] = grad[row]
        ours = kernels("tabulate_backward", padded, velocities, *settings)
        assert relative(ours, expected[row]) <= 1e-9
    padded[:2], padded[2:, 0] = 0, further
    torch.testing.assert_close(kernels("tabulate_backward", padded, velocities, *settings), further)


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_tables(kernels, version, kind):
    assert_table_like_reference(kernels, field(kind, DOMAINS[version]), (version, DOMAINS[version], 80))


@pytest.mark.parametrize("cells", [1, 2, 3, 7, 16, 40])
@pytest.mark.parametrize("domain", [(-2.0, 5.0), (-2.7, 3.1), (-1.0, 0.5)])
def test_cells_and_domains(kernels, cells, domain):
    velocities = torch.randn(cells + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.2
    settings = ("inf", domain, cells * 4)
    assert_table_like_reference(kernels, velocities * (domain[1] - domain[0]) / 6, settings)
    settings = ("ditac", domain, cells * 20)
    x, grad = randn(1000, torch.float64, 2.0), randn(1000, torch.float64, 1.0, 1)
    ours, exact = gradient_of_velocities(kernels, x, grad, velocities, settings)
    assert relative(ours, exact) <= 1e-11


def test_more_cells_than_the_kernels_take(kernels):
    """Then tables, and so gradients, are the reference's."""
    cells = 300
    velocities, settings = field("rough", (-3.0, 3.0), cells) / 30, ("inf", (-3.0, 3.0), 2 * cells)
    table = kernels("tabulate", velocities, *settings)
    assert torch.equal(table, reference.tabulate(velocities, *settings))
    x = randn(1000, torch.float64)
    torch.testing.assert_close(kernels("lookup", x, table, *settings), reference.lookup(x, table, *settings))
    ours, exact = gradient_of_velocities(kernels, x, x, velocities, settings)
    assert relative(ours, exact) <= 1e-12


def test_gradients_of_the_first_rows_alone(kernels):
    settings = ("inf", (-3.0, 3.0), 80)
    velocities, grad = field("prior", settings[1]), randn((2, 83), torch.float64)
    ours = kernels("tabulate_backward", grad, velocities, *settings)
    torch.testing.assert_close(ours, reference.tabulate_backward(grad, velocities, *settings))


def test_float32_tables_are_rounded_once(kernels):
    settings = ("inf", (-3.0, 3.0), 80)
    velocities = field("prior", settings[1]).float()
    table, exact = (kernels("tabulate", each, *settings) for each in (velocities, velocities.double()))
    torch.testing.assert_close(table, exact.float(), rtol=2e-7, atol=1e-12)


def test_growth_beyond_float32_leaves_no_nan(kernels):
    """A knot at rest from which everything flees: its column overflows, and no gradient goes there."""
    settings = ("inf", (-3.0, 3.0), 80)
    velocities = torch.zeros(11)
    velocities[4], velocities[6] = -300.0, 300.0
    table = kernels("tabulate", velocities, *settings)
    assert not table.isnan().any() and table[2:].isfinite().all()
    x, grad = torch.tensor([-2.9, 2.9]), torch.ones(2)
    ours, exact = gradient_of_velocities(kernels, x, grad, velocities, settings)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


# --- Compiling --------------------------------------------------------------------------------------------------------

COMPILE = textwrap.dedent("""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from ditac_timm.ops import triton as ours

    def compile(name, types, **constants):
        kernel = getattr(ours, name)
        types = dict(zip((name for name in kernel.arg_names if name not in constants), types.split(), strict=True))
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))

    scale, nodes, block = " i32" * 4 + " i64" * 3, " i32" * 4, {"BLOCK": 64, "COLUMNS": 16}
    for x, table, flag in (("*bf16", "*fp32", True), ("*fp16", "*fp64", False)):
        compile("_lookup_kernel", f"{x} {table} {x}{scale}", LEFT_ENDS_IN_0=flag, BLOCK=2048)
        compile("_lookup_backward_kernel", f"{x} {x} {table} {x} {table}{scale}", NODES=4803, KNOTS=11, NEED_X=True,
                NEED_TABLE=True, INF=flag, BLOCK=256, AT_ONCE=16)
    compile("_tabulate_kernel", f"*fp32 *fp64 *fp32{nodes}", **block)
    compile("_tabulate_backward_kernel", f"*fp32 *fp32 *fp64 *fp64{nodes}", **block)
    compile("_table_gradient_kernel", "*fp32 *fp32 i32 i32 i32", INF=True, BLOCK=1024, PROGRAMS=1024)
""")


@pytest.mark.skipif(GPU, reason="the other tests compile")
def test_kernels_compile():
    """The interpreter takes what the compiler refuses: types, and what has to be known when compiling."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
