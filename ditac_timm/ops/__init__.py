"""Two operators, `ditac::tabulate` and `ditac::lookup`, with their gradients, for eager mode, torch.compile and export.

`tabulate` turns knot velocities into a table of the whole activation by the closed form; `lookup` interpolates in it.
They are chained by plain autograd: the gradient of theta is a sum over the table's bins and one vector-Jacobian
product. `activate` goes from theta to the result by the shortest way: in eager training the chain is one node of the
autograd graph; where no gradient is needed, `ditac::evaluate` is both operators in one and remembers tables.

`reference.py` computes on any device. Faster kernels stand under the dispatch keys of their devices: `cpu.cpp`, built
at first use (`python -m ditac_timm.ops` builds it ahead of time), and `triton.py`. Where one cannot be had, a warning
says so once and the reference goes on. `DITAC_DISABLE_KERNELS=1` leaves only the reference.
"""

import functools
import os
import threading
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .. import cpab
from . import reference, vmap

__all__ = ["activate", "activate_rows", "kernel", "lookup", "tabulate"]

_TABLE = "str version, float[] domain, int bins"
torch.library.define("ditac::tabulate", f"(Tensor velocities, {_TABLE}) -> Tensor")
torch.library.define("ditac::tabulate_backward", f"(Tensor grad, Tensor velocities, {_TABLE}) -> Tensor")
# These take x in any strides, so the compiler need not bring it back to those of the traced model before each of them.
_ANY_STRIDES = torch.Tag.flexible_layout
torch.library.define("ditac::lookup", f"(Tensor x, Tensor table, {_TABLE}) -> Tensor", tags=_ANY_STRIDES)
torch.library.define(
    "ditac::lookup_backward",
    f"(Tensor grad, Tensor x, Tensor table, {_TABLE}, bool need_x, bool need_table) -> (Tensor, Tensor)",
    tags=_ANY_STRIDES,
)

_OPERATORS = ("tabulate", "tabulate_backward", "lookup", "lookup_backward")
for _name in _OPERATORS:
    torch.library.impl(f"ditac::{_name}", "CompositeExplicitAutograd", getattr(reference, _name))

# Both in one, from theta on. It has no derivative.
torch.library.define(
    "ditac::evaluate", f"(Tensor x, Tensor theta, Tensor basis, {_TABLE}) -> Tensor", tags=_ANY_STRIDES
)


@torch.library.impl("ditac::evaluate", "CompositeExplicitAutograd")
def _evaluate(x: Tensor, theta: Tensor, basis: Tensor, version: str, domain: Sequence[float], bins: int) -> Tensor:
    velocities = cpab.velocities_in(basis, theta.to(basis.dtype))
    if velocities.device.type == "cpu" and cpab.plain_eager():
        table = _remembered_table(velocities.numpy().tobytes(), velocities.dtype, version, tuple(domain), bins)
    else:  # tabulating is one small launch, and looking at the velocities would wait for it
        table = torch.ops.ditac.tabulate.default(velocities, version, domain, bins)
    return torch.ops.ditac.lookup.default(x, table, version, domain, bins)


# By the velocities' values: neither version counters nor hooks see every way in which theta is changed.
@functools.lru_cache(maxsize=1024)
def _remembered_table(velocities: bytes, dtype: torch.dtype, version: str, domain: tuple[float, float], bins: int):
    return torch.ops.ditac.tabulate.default(torch.frombuffer(bytearray(velocities), dtype=dtype), version, domain, bins)


class _FirstCall:
    """Stands under a device's dispatch key until an operator is first called there, then makes way for the kernels.

    So importing the package compiles nothing, and neither does tracing: what a compiled graph calls comes here too.

    Args:
        key: The dispatch key.
        kernel: What the kernels are called.
        load: Puts them under that key, or raises.
        operators: Which there are.
    """

    def __init__(self, key: str, kernel: str, load: Callable[[], object], operators: Sequence[str] = _OPERATORS):
        self.kernel = kernel
        self.load = load
        self.lock = threading.Lock()
        self.library: torch.library.Library | None = torch.library.Library("ditac", "IMPL")
        for name in operators:
            self.library.impl(name, functools.partial(self, name), key)

    def __call__(self, name: str, *arguments):
        self.make_way()
        return getattr(torch.ops.ditac, name).default(*arguments)

    def make_way(self) -> None:
        with self.lock:
            if self.library is None:
                return
            self.library = None  # which takes its entries back
            try:
                self.load()
            except (RuntimeError, ImportError) as error:
                warnings.warn(f"DiTAC runs without its {self.kernel} kernels, so slower: {error}.", stacklevel=3)
                self.kernel = "reference"


def _load_cpu() -> None:
    from . import cpu

    cpu.load()


def _load_cuda() -> None:
    from . import triton

    for name in _OPERATORS:
        torch.library.impl(f"ditac::{name}", "CUDA", getattr(triton, name))


_first_calls: dict[str, _FirstCall] = {}
if os.environ.get("DITAC_DISABLE_KERNELS", "0") in ("", "0"):
    _first_calls["cpu"] = _FirstCall("CPU", "C++", _load_cpu, (*_OPERATORS, "evaluate"))
    _first_calls["cuda"] = _FirstCall("CUDA", "Triton", _load_cuda)


def kernel(device: torch.device | str) -> str:
    """What computes on a device: "C++", "Triton" or "reference". Loads it where that has not happened yet."""
    first_call = _first_calls.get(torch.device(device).type)
    if first_call is None:
        return "reference"
    first_call.make_way()
    return first_call.kernel


def tabulate(velocities: Tensor, version: str, domain: Sequence[float], bins: int) -> Tensor:
    """Tabulate an activation.

    Args:
        velocities: `(cells + 1,)`, float32 or float64, the field at the knots of the domain.
        version: "ditac", "ge", "leaky" or "inf".
        domain: `(a, b)`.
        bins: Number of bins on the domain, a multiple of the number of cells.

    Returns:
        Values and derivatives, `(2, nodes)` of velocities' dtype, see `reference.py`; on CUDA the Jacobian below them,
        see `triton.py`.

    Raises:
        ValueError: An argument does not fit.
    """
    cells = velocities.shape[-1] - 1
    if velocities.ndim != 1 or cells < 1 or velocities.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            "velocities must have the shape (cells + 1,) with cells >= 1 and be float32 or float64, "
            f"but has {tuple(velocities.shape)} and is {velocities.dtype}."
        )
    if version not in reference.VERSIONS:
        raise ValueError(f"version must be one of {', '.join(reference.VERSIONS)}, but is {version!r}.")
    if bins < cells or bins % cells:
        raise ValueError(f"bins must be a positive multiple of the {cells} cells, but is {bins}.")
    _refuse_forward_mode(velocities)
    return torch.ops.ditac.tabulate.default(velocities, version, domain, bins)


def lookup(x: Tensor, table: Tensor, version: str, domain: Sequence[float], bins: int) -> Tensor:
    """Interpolate linearly in a table made by `tabulate` with the same version, domain and bins.

    Args:
        x: Any shape and floating dtype.
        table: As `tabulate` made it.
        version: As for `tabulate`.
        domain: As for `tabulate`.
        bins: As for `tabulate`.

    Returns:
        Tensor of x's shape and dtype, strides as `torch.empty_like(x)`, computed in table's dtype.

    Raises:
        TypeError: x is not floating.
        ValueError: The table does not have the shape that version, domain and bins say, or is on another device.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, but is {x.dtype}.")
    if x.device != table.device:
        raise ValueError(f"x and the table, so theta, must be on one device, but are on {x.device} and {table.device}.")
    _refuse_forward_mode(x, table)
    return torch.ops.ditac.lookup.default(x, table, version, domain, bins)


def activate(x: Tensor, theta: Tensor, tessellation: cpab.Tessellation, version: str, bins: int) -> Tensor:
    """`lookup` in the table of `tabulate`, with the velocities of theta.

    Args:
        x: As for `lookup`.
        theta: `(tessellation.dim,)`, of any floating dtype; what is computed with it is float32 at least.
        tessellation: Gives the domain and the basis.
        version: As for `tabulate`.
        bins: As for `tabulate`.

    Returns:
        As `lookup`.

    Raises:
        ValueError: theta has another shape.
        TypeError, ValueError, NotImplementedError: As `lookup` and `tabulate`.
    """
    if theta.shape != (tessellation.dim,):
        raise ValueError(f"theta must have the shape ({tessellation.dim},), but has {tuple(theta.shape)}.")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    settings = version, tessellation.domain, bins
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or theta.requires_grad)
    if torch.compiler.is_compiling():
        short = not needs_gradient and not torch.compiler.is_exporting()
    else:
        short = cpab.plain_eager() and not torch.jit.is_tracing() and x.device == theta.device
    if not (short and x.is_floating_point()):
        look = _lookup_recomputably if torch.compiler.is_compiling() and x.requires_grad else lookup
        return look(x, tabulate(tessellation.velocities(theta.to(dtype)), *settings), *settings)
    _refuse_forward_mode(x, theta)
    basis = tessellation.velocity_basis(dtype, theta.device)
    if needs_gradient:
        return _Activate.apply(x, theta, basis, *settings)
    return torch.ops.ditac.evaluate.default(x, theta, basis, *settings)


def _lookup_recomputably(x: Tensor, table: Tensor, *settings) -> Tensor:
    """`lookup`, such that torch.compile keeps no tensor more for the gradient than it keeps for the base's activation.

    The compiler makes what a normalisation or an activation gave anew where the gradient needs it, but never for an
    operator that it can't look into: it would keep both x and y. What is marked as checkpointed it may make anew. For x
    that needs an operator of its own: a round trip through another dtype, which the compiler folds away and into which
    it fuses all that comes before. For y it is `lookup` once more; on a GPU that pass over memory is dearer than y.
    """
    if torch.compiler.is_exporting():
        return lookup(x, table, *settings)
    if x.device.type == "cpu":
        return checkpoint(lambda x, table: lookup(_round_trip(x), table, *settings), x, table, use_reentrant=False)
    return lookup(checkpoint(_round_trip, x, use_reentrant=False), table, *settings)


def _round_trip(x: Tensor) -> Tensor:
    if x.dtype == torch.float64 or x.device.type == "mps":  # where there is no wider dtype
        return x
    return x.to(torch.float64 if x.dtype == torch.float32 else torch.float32).to(x.dtype)


def tabulate_theta(theta: Tensor, basis: Tensor, *settings) -> tuple[Tensor, Tensor]:
    """Velocities and table of theta, of basis' dtype, without a graph."""
    with torch._C._AutoDispatchBelowAutograd():  # torch.library's Python code for gradients would take twice the time
        velocities = cpab.velocities_in(basis, theta.to(basis.dtype))
        return velocities, torch.ops.ditac.tabulate.default(velocities, *settings)


def tabulate_theta_backward(grad_table: Tensor, velocities: Tensor, basis: Tensor, *settings) -> Tensor:
    """Gradient of theta, of basis' dtype, from the one of its table."""
    with torch._C._AutoDispatchBelowAutograd():
        return (torch.ops.ditac.tabulate_backward.default(grad_table, velocities, *settings) * basis).sum(-1)


class _Activate(torch.autograd.Function):
    """`tabulate` and `lookup` as one node: a step crosses into Python once in each direction, not six times."""

    @staticmethod
    def forward(ctx, x, theta, basis, *settings):
        velocities, table = tabulate_theta(theta, basis, *settings)
        with torch._C._AutoDispatchBelowAutograd():
            y = torch.ops.ditac.lookup.default(x, table, *settings)
        ctx.save_for_backward(x, theta, basis, velocities, table)
        ctx.settings = settings
        return y

    @staticmethod
    def backward(ctx, grad):
        x, theta, basis, velocities, table = ctx.saved_tensors
        need_x, need_theta = ctx.needs_input_grad[:2]
        grad_theta = None
        if torch.is_grad_enabled():  # create_graph=True: once more in operators that have a derivative themselves
            with torch.enable_grad():
                velocities = cpab.velocities_in(basis, theta.to(basis.dtype))
                table = torch.ops.ditac.tabulate.default(velocities, *ctx.settings)
                y = torch.ops.ditac.lookup.default(x, table, *ctx.settings)
            needed = [tensor for tensor, need in ((x, need_x), (theta, need_theta)) if need]
            gradients = iter(torch.autograd.grad(y, needed, grad, create_graph=True))
            grad_x, grad_theta = (next(gradients) if need else None for need in (need_x, need_theta))
        else:
            with torch._C._AutoDispatchBelowAutograd():
                grad_x, grad_table = torch.ops.ditac.lookup_backward.default(
                    grad, x, table, *ctx.settings, need_x, need_theta
                )
            if need_theta:
                grad_theta = tabulate_theta_backward(grad_table, velocities, basis, *ctx.settings).to(theta.dtype)
        return grad_x if need_x else None, grad_theta, None, None, None, None


def activate_rows(x: Tensor, theta: Tensor, tessellation: cpab.Tessellation, version: str, bins: int) -> Tensor:
    """`activate` of each row of x with a theta of its own: many networks that are trained as one.

    In eager calls; `torch.vmap` over `activate` gives the same, and anywhere, more slowly.

    Args:
        x: `(R, ...)`, as for `lookup`.
        theta: `(R, tessellation.dim)`.
        tessellation: As for `activate`.
        version: As for `tabulate`.
        bins: As for `tabulate`.

    Returns:
        Of x's shape and dtype, contiguous; differentiable once.

    Raises:
        ValueError: theta has another shape, or there is no row.
        TypeError, ValueError, NotImplementedError: As `lookup` and `tabulate`.
    """
    if x.ndim == 0 or not len(x):
        raise ValueError(f"x must have a row at least, but has the shape {tuple(x.shape)}.")
    if theta.shape != (len(x), tessellation.dim):
        raise ValueError(f"theta must have the shape ({len(x)}, {tessellation.dim}), but has {tuple(theta.shape)}.")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, but is {x.dtype}.")
    if x.device != theta.device:
        raise ValueError(f"x and theta must be on one device, but are on {x.device} and {theta.device}.")
    _refuse_forward_mode(x, theta)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    basis = tessellation.velocity_basis(dtype, theta.device)
    return _ActivateRows.apply(x, theta, basis, version, tessellation.domain, bins)


class _ActivateRows(torch.autograd.Function):
    """One node of the graph for all rows."""

    @staticmethod
    def forward(ctx, x, theta, basis, *settings):
        with torch._C._AutoDispatchBelowAutograd():
            velocities = cpab.velocities_in(basis, theta.to(basis.dtype))
            tables = [torch.ops.ditac.tabulate.default(row, *settings) for row in velocities.unbind()]
            rows = zip(x.unbind(), tables, strict=True)
            y = torch.stack([torch.ops.ditac.lookup.default(row, table, *settings) for row, table in rows])
        ctx.save_for_backward(x, theta, basis, velocities, *tables)
        ctx.settings = settings
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, theta, basis, velocities, *tables = ctx.saved_tensors
        need_x, need_theta = ctx.needs_input_grad[:2]
        with torch._C._AutoDispatchBelowAutograd():
            pairs = [
                torch.ops.ditac.lookup_backward.default(g, row, table, *ctx.settings, need_x, need_theta)
                for g, row, table in zip(grad.unbind(), x.unbind(), tables, strict=True)
            ]
            grad_x = torch.stack([pair[0] for pair in pairs]) if need_x else None
            if not need_theta:
                return grad_x, None, None, None, None, None
            of_rows = zip(pairs, velocities.unbind(), strict=True)
            grad_velocities = torch.stack(
                [torch.ops.ditac.tabulate_backward.default(pair[1], row, *ctx.settings) for pair, row in of_rows]
            )
            grad_theta = (grad_velocities.unsqueeze(-2) * basis).sum(-1).to(theta.dtype)
        return grad_x, grad_theta, None, None, None, None


def _refuse_forward_mode(*tensors: Tensor) -> None:
    """torch.library's autograd drops tangents without a word."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError("DiTAC has no forward-mode derivative (jvp, jacfwd): use reverse mode.")


@torch.library.register_fake("ditac::tabulate")
def _(velocities, version, domain, bins):
    rows = 2
    if velocities.device.type == "cuda" and kernel("cuda") == "Triton":
        from . import triton

        rows = triton.table_rows(velocities)
    return velocities.new_empty(rows, reference.nodes(version, domain, bins))


@torch.library.register_fake("ditac::tabulate_backward")
def _(grad, velocities, version, domain, bins):
    return torch.empty_like(velocities)


@torch.library.register_fake("ditac::lookup")
def _(x, table, version, domain, bins):
    return torch.empty_like(x)


@torch.library.register_fake("ditac::evaluate")
def _(x, theta, basis, version, domain, bins):
    return torch.empty_like(x)


@torch.library.register_fake("ditac::lookup_backward")
def _(grad, x, table, version, domain, bins, need_x, need_table):
    return torch.empty_like(x) if need_x else x.new_empty(0), torch.empty_like(table) if need_table else x.new_empty(0)


def _save_tabulate(ctx, inputs, output):
    velocities, *ctx.settings = inputs
    ctx.save_for_backward(velocities)


def _tabulate_backward(ctx, grad):
    (velocities,) = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: once more in operators that have a derivative themselves
        with torch.enable_grad():
            table = reference.tabulate(velocities, *ctx.settings)
            grad_velocities = torch.autograd.grad(table, velocities, grad[:2], create_graph=True)[0]
            grad_velocities = grad_velocities + grad[2:].sum(1) if len(grad) > 2 else grad_velocities
    else:
        grad_velocities = torch.ops.ditac.tabulate_backward.default(grad, velocities, *ctx.settings)
    return grad_velocities, None, None, None


def _save_lookup(ctx, inputs, output):
    x, table, *ctx.settings = inputs
    ctx.save_for_backward(x, table)


def _lookup_backward(ctx, grad):
    x, table = ctx.saved_tensors
    if torch.is_grad_enabled():
        grad_x, grad_table = reference.lookup_backward_differentiable(grad, x, table[:2], *ctx.settings)
        grad_table = torch.nn.functional.pad(grad_table, (0, 0, 0, len(table) - 2))
    else:
        grad_x, grad_table = torch.ops.ditac.lookup_backward.default(
            grad, x, table, *ctx.settings, *ctx.needs_input_grad[:2]
        )
    needed = ctx.needs_input_grad
    return grad_x if needed[0] else None, grad_table if needed[1] else None, None, None, None


torch.library.register_autograd("ditac::tabulate", _tabulate_backward, setup_context=_save_tabulate)
torch.library.register_autograd("ditac::lookup", _lookup_backward, setup_context=_save_lookup)

for _name in (*_OPERATORS, "evaluate"):
    vmap.register(_name)
