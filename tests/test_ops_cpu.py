"""The C++ kernels against `ops/reference.py`, and how they are built."""

import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from fields import DOMAINS, FIELDS, VERSIONS, field

from ditac_timm import ops
from ditac_timm.cpab import Tessellation
from ditac_timm.ops import cpu, reference

pytestmark = pytest.mark.skipif(ops.kernel("cpu") != "C++", reason="no compiler, or DITAC_DISABLE_KERNELS is set")

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
KERNELS = torch.ops.ditac


def table_of(version, dtype=torch.float32, bins=640):
    velocities = field("prior", DOMAINS[version])
    return reference.tabulate(velocities, version, DOMAINS[version], bins).to(dtype), (version, DOMAINS[version], bins)


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_like_reference(x, table, settings, grad=None):
    """Values and both gradients; sums are compared by what rounding of each term allows."""
    grad = torch.randn(x.shape, dtype=torch.float64).to(x.dtype) if grad is None else grad
    y, expected = KERNELS.lookup(x, table, *settings), reference.lookup(x, table, *settings)
    assert (y.dtype, y.shape, y.stride()) == (x.dtype, x.shape, torch.empty_like(x).stride())
    # A position may round to either side of a node: both lines meet there, and in float16 a last digit is 1e-3.
    eps = max(torch.finfo(x.dtype).eps, torch.finfo(table.dtype).eps)
    torch.testing.assert_close(y, expected, rtol=4 * eps, atol=16 * eps, equal_nan=True)
    ours = KERNELS.lookup_backward(grad, x, table, *settings, True, True)
    theirs = reference.lookup_backward(grad, x, table, *settings, True, True)
    assert (ours[0].dtype, ours[0].stride()) == (x.dtype, torch.empty_like(x).stride())
    steepest = theirs[0].abs().nan_to_num().max().item() if x.numel() else 0
    torch.testing.assert_close(ours[0], theirs[0], rtol=64 * eps, atol=64 * eps * (1 + steepest), equal_nan=True)
    assert ours[1].dtype == table.dtype
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-5 * (1 + theirs[1].abs().max().item()))


# --- Lookup -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 7, 8, 31, 4097, 1_000_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(size, dtype):
    torch.manual_seed(0)
    table, settings = table_of("ditac", wide(dtype))
    assert_like_reference((torch.randn(size, dtype=torch.float64) * 3).to(dtype), table, settings)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_versions(version, dtype):
    torch.manual_seed(0)
    table, settings = table_of(version, wide(dtype))
    assert_like_reference((torch.randn(5003, dtype=torch.float64) * 4).to(dtype), table, settings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.float64])
def test_any_table_dtype_goes_with_any_input(dtype, table_dtype):
    torch.manual_seed(0)
    table, settings = table_of("ditac", table_dtype)
    assert_like_reference(torch.randn(1000, dtype=torch.float64).to(dtype), table, settings)


LAYOUTS = {
    "transposed": lambda: torch.randn(41, 63).T,
    "strided slice": lambda: torch.randn(90, 101)[::2, 1::3],
    "expanded": lambda: torch.randn(30, 1, 1).expand(30, 4, 5),
    "channels_last": lambda: torch.randn(2, 3, 14, 15).to(memory_format=torch.channels_last),
    "channels_last slice": lambda: torch.randn(2, 6, 14, 15).to(memory_format=torch.channels_last)[:, ::2],
    "unaligned": lambda: torch.randn(100)[13:60],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(layout, dtype):
    torch.manual_seed(0)
    table, settings = table_of("ditac")
    x = LAYOUTS[layout]()
    x = x if dtype == torch.float32 else x.to(dtype)
    assert_like_reference(x, table, settings)
    assert_like_reference(x, table, settings, grad=torch.ones((), dtype=dtype).expand(x.shape))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_edge_values(version, dtype):
    table, settings = table_of(version, wide(dtype))
    a, b = DOMAINS[version]
    ends = torch.tensor([a, b, -6.0, 6.0, 0.0], dtype=dtype)
    inf = torch.full_like(ends, math.inf)
    beside = [torch.nextafter(ends, inf), torch.nextafter(ends, -inf)] if dtype != torch.float16 else []
    far = torch.tensor([-0.0, 1e4, -1e4, 6e4, -6e4], dtype=dtype)
    assert_like_reference(torch.cat([ends, *beside, far]), table, settings)

    largest = torch.finfo(dtype).max
    x = torch.tensor([math.nan, math.inf, -math.inf, min(1e30, largest), max(-1e30, -largest)], dtype=dtype)
    torch.testing.assert_close(
        KERNELS.lookup(x, table, *settings), reference.lookup(x, table, *settings), rtol=1e-2, atol=0, equal_nan=True
    )
    ours, theirs = (
        f(torch.ones_like(x), x, table, *settings, True, False)[0]
        for f in (KERNELS.lookup_backward, reference.lookup_backward)
    )
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("value", [0.7313, 50.0, -50.0, 3.0])
def test_skewed_inputs(value):
    """All elements in one bin, or all outside: also the sums are the reference's."""
    table, settings = table_of("ditac")
    x, grad = torch.full((300_000,), value), torch.full((300_000,), 0.1)
    ours = KERNELS.lookup_backward(grad, x, table, *settings, False, True)[1]
    theirs = reference.lookup_backward(grad, x, table, *settings, False, True)[1]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize("need_table", [True, False])
def test_only_what_is_needed(need_x, need_table):
    table, settings = table_of("ditac")
    x, grad = torch.randn(1000), torch.randn(1000)
    both = KERNELS.lookup_backward(grad, x, table, *settings, True, True)
    some = KERNELS.lookup_backward(grad, x, table, *settings, need_x, need_table)
    for needed, one, full in zip((need_x, need_table), some, both, strict=True):
        assert torch.equal(one, full) if needed else one.numel() == 0


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_repeats_bit_for_bit(threads):
    torch.manual_seed(0)
    table, settings = table_of("ditac")
    x, grad, before = torch.randn(200_003), torch.randn(200_003), torch.get_num_threads()
    one_thread = KERNELS.lookup(x, table, *settings)
    torch.set_num_threads(threads)
    try:
        velocities = field("prior", DOMAINS["ditac"])
        results = [
            (
                KERNELS.lookup(x, table, *settings),
                *KERNELS.lookup_backward(grad, x, table, *settings, True, True),
                KERNELS.tabulate_backward(table.double(), velocities, *settings),
            )
            for _ in range(3)
        ]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], one_thread)
    for result in results[1:]:
        for again, first in zip(result, results[0], strict=True):
            assert torch.equal(again, first)


def test_inputs_are_left_alone():
    table, settings = table_of("ditac")
    tensors = (torch.randn(100), torch.randn(100), table)
    copies = [tensor.clone() for tensor in tensors]
    KERNELS.lookup_backward(*tensors, *settings, True, True)
    KERNELS.lookup(*tensors[1:], *settings)
    assert all(map(torch.equal, tensors, copies))


# --- Tabulate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_tables(version, kind):
    domain = DOMAINS[version]
    velocities = field(kind, domain)
    ours = KERNELS.tabulate(velocities, version, domain, 160)
    theirs = reference.tabulate(velocities, version, domain, 160)
    # Beside a knot where a trajectory comes to rest dT/dx is one-sided, so rounding decides.
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-9, atol=1e-9)
    at_nodes = torch.ones(ours.shape[1], dtype=torch.bool) if "resting" not in kind else (ours - theirs)[1].abs() < 1
    torch.testing.assert_close(ours[1, at_nodes], theirs[1, at_nodes], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("version", VERSIONS)
def test_gradients_of_tables(version, kind):
    torch.manual_seed(0)
    domain = DOMAINS[version]
    velocities = field(kind, domain)
    grad = torch.randn(2, reference.nodes(version, domain, 160), dtype=torch.float64)
    for part in (grad * torch.tensor([[1.0], [0.0]]), grad):
        ours = KERNELS.tabulate_backward(part, velocities, version, domain, 160)
        theirs = reference.tabulate_backward(part, velocities, version, domain, 160)
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7 * theirs.abs().max().item())


@pytest.mark.parametrize("cells", [1, 2, 3, 7, 30])
def test_cells(cells):
    velocities = torch.randn(cells + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    settings = ("inf", (-2.0, 5.0), cells * 20)
    torch.testing.assert_close(KERNELS.tabulate(velocities, *settings), reference.tabulate(velocities, *settings))
    grad = torch.randn(2, cells * 20 + 3, dtype=torch.float64)
    ours, theirs = (f(grad, velocities, *settings) for f in (KERNELS.tabulate_backward, reference.tabulate_backward))
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7 * theirs.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("version", VERSIONS)
def test_evaluation_is_a_lookup_in_the_table(version, dtype):
    """Also when its table is remembered, of several thetas and settings in turn."""
    torch.manual_seed(0)
    x = (torch.randn(5003, dtype=torch.float64) * 4).to(dtype)
    tessellation = Tessellation(10, DOMAINS[version])
    thetas = torch.randn(2, 9), torch.randn(2, 9).bfloat16(), torch.randn(9, 2).double().T
    for bins in (170, 340) * 2:
        for theta in (row for rows in thetas for row in rows):
            assert_evaluates(x, theta, tessellation, version, bins)


def test_more_thetas_than_are_remembered():
    x, tessellation = torch.linspace(-4, 4, 50), Tessellation(10, DOMAINS["inf"])
    thetas = [torch.full((9,), 1e-3 * i) for i in range(1100)]
    for theta in (*thetas, *thetas[:3]):
        assert_evaluates(x, theta, tessellation, "inf", 20)


def assert_evaluates(x, theta, tessellation, version, bins):
    settings = version, tessellation.domain, bins
    velocities = tessellation.velocities(theta.to(wide(x.dtype)))
    expected = KERNELS.lookup(x, KERNELS.tabulate(velocities, *settings), *settings)
    ours = KERNELS.evaluate(x, theta, tessellation.velocity_basis(wide(x.dtype), x.device), *settings)
    assert torch.equal(ours, expected) and ours.stride() == expected.stride()


# --- Building ---------------------------------------------------------------------------------------------------------

RUN = textwrap.dedent("""
    import torch, warnings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from ditac_timm import DiTAC, ops
        module = DiTAC()
        for _ in range(2):
            module(torch.linspace(-4, 4, 100)).sum().backward()
    ours = [str(warning.message) for warning in caught if "DiTAC" in str(warning.message)]
    print(ops.kernel("cpu"), len(ours), *ours, f"{module.theta.grad.sum().item():.4f}", sep="|")
""")


def start(folder, **environment):
    environment = {**os.environ, "DITAC_CACHE_DIR": str(folder), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", RUN], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip().split("|")


@pytest.fixture(scope="module")
def expected():
    """Theta's gradient in `RUN`, as the reference has it."""
    module = torch.nn.Linear(1, 1)  # keeps torch's threads awake no longer than needed
    del module
    kernel, warnings, gradient = finish(start("unused", DITAC_DISABLE_KERNELS="1"))
    assert (kernel, warnings) == ("reference", "0")
    return gradient


def test_processes_that_start_at_once_build_it_once(tmp_path, expected):
    processes = [start(tmp_path / "cache") for _ in range(3)]
    for process in processes:
        assert finish(process) == ["C++", "0", expected]
    assert len(list((tmp_path / "cache").glob("*.so"))) == 1
    assert not list((tmp_path / "cache").glob(".partial*"))


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler", "there is no C++ compiler 'no-such-compiler'"), ("false", "'false' does not work")],
)
def test_without_a_compiler_one_warning_and_the_reference(tmp_path, compiler, reason, expected):
    kernel, warnings, warning, gradient = finish(start(tmp_path, CXX=compiler))
    assert (kernel, warnings, gradient) == ("reference", "1", expected)
    assert reason in warning and "slower" in warning


def test_a_failed_build_leaves_nothing_behind(tmp_path, monkeypatch):
    broken = tmp_path / "cpu.cpp"
    broken.write_text("#error broken\n")
    monkeypatch.setattr(cpu, "_SOURCE", broken)
    monkeypatch.setenv("DITAC_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(cpu.BuildError, match=r"did not compile cpu.cpp: .*#error broken"):
        cpu.build()
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    """As a read-only home: the folder for temporary files serves; if not that either, one sentence."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DITAC_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(cpu.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(cpu, "_compile", lambda command, library: library.write_text(""))
    assert cpu.build().parent == tmp_path / f"ditac_timm-{os.getuid()}"
    monkeypatch.setattr(cpu.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    with pytest.raises(cpu.BuildError, match="set DITAC_CACHE_DIR"):
        cpu.build()


def test_what_is_built_depends_on_source_torch_flags_and_processor(monkeypatch):
    command = cpu._compile_command()
    names = {cpu._fingerprint(command), cpu._fingerprint([*command, "-O2"])}
    names.add(cpu._fingerprint([word.replace("=native", "=x86-64-v2") for word in command]))
    monkeypatch.setattr(torch, "__version__", "0.0")
    names.add(cpu._fingerprint(command))
    assert len(names) == 4


def test_command_builds_ahead_of_time(tmp_path):
    environment = {**os.environ, "DITAC_CACHE_DIR": str(cpu.build().parent)}
    command = [sys.executable, "-m", "ditac_timm.ops"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(cpu.build())
    failed = subprocess.run(command, env={**environment, "CXX": "no-such-compiler"}, capture_output=True, text=True)
    assert failed.returncode == 1 and "no-such-compiler" in failed.stderr and "Traceback" not in failed.stderr
