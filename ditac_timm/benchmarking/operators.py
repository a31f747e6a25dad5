"""DiTAC beside other activations, as operators: time over GELU's, bytes saved, distance to a plain copy."""

import argparse
import contextlib
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ditac_timm import DiTAC, ops
from ditac_timm.benchmarking import memory
from ditac_timm.benchmarking.report import Table
from ditac_timm.benchmarking.timing import interleave, ratio

# How many tensors of x's size a phase must read and write: x, y; the gradients of y and x, and x again.
_TENSORS_MOVED = {"forward": 2, "backward": 3, "train": 5}
_BLOCK = 0.01  # seconds a timing lasts at least, so that the clock and the call's overhead do not count
_SIZES = {"cpu": [10**6, 10**7], "cuda": [10**7, 10**8]}  # on a GPU, fewer are in its cache, or are all launch
_DTYPES = ["float32", "bfloat16"]
_COPY = "copy"
_REFERENCE = "GELU"
_MODULE = "DiTAC"
_FIXED = "DiTAC, fixed table"


class Rational(nn.Module):
    """A rational activation of degrees 5 and 4 as in PAU, `P(x) / (1 + |Q(x)|)`, in plain torch."""

    def __init__(self) -> None:
        super().__init__()
        self.numerator = nn.Parameter(torch.tensor([0.02, 0.5, 0.4, 0.1, 0.01, 0.0]))
        self.denominator = nn.Parameter(torch.tensor([0.1, 0.1, 0.02, 0.01]))

    def forward(self, x: Tensor) -> Tensor:
        above, below = self.numerator[5], self.denominator[3]
        for index in (4, 3, 2, 1, 0):
            above = above * x + self.numerator[index]
        for index in (2, 1, 0):
            below = below * x + self.denominator[index]
        return above / (1 + (below * x).abs())


class Operator(NamedTuple):
    """An activation, and the tensors beside x whose gradients it computes."""

    function: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...] = ()


def operators(device: torch.device, dtype: torch.dtype) -> dict[str, Operator]:
    """The activations to compare, by name."""
    peers = {
        _REFERENCE: nn.GELU(),
        "SiLU": nn.SiLU(),
        "PReLU": nn.PReLU(),
        "Hardswish": nn.Hardswish(),
        "ReLU": nn.ReLU(),
        "rational 5/4": Rational(),
    }
    found = {}
    for name, module in peers.items():
        module.to(device, dtype)
        found[name] = Operator(module, tuple(module.parameters()))
    act = DiTAC(init="prior").to(device)  # theta stays float32, as under autocast
    act.register_forward_pre_hook(_as_an_optimizer_would)
    found[_MODULE] = Operator(act, tuple(act.parameters()))
    velocities = act.tessellation.velocities(act.theta.detach())
    table = ops.tabulate(velocities, act.version, act.domain, act.bins).requires_grad_()
    fixed = partial(ops.lookup, table=table, version=act.version, domain=act.domain, bins=act.bins)
    found[_FIXED] = Operator(fixed, (table,))
    return found


@torch.no_grad()
def _as_an_optimizer_would(act: nn.Module, _: object) -> None:
    """Change theta between training steps, for the table of a theta that stays is remembered."""
    if act.training:
        act.get_parameter("theta").add_(1e-6)


def benchmark(args: argparse.Namespace, device: torch.device) -> list[Table]:
    """Time all operators side by side, for each size, dtype and phase; then the gain of a second thread."""
    sizes = args.sizes or _SIZES.get(device.type, _SIZES["cpu"])
    dtypes = args.dtypes or _DTYPES
    rows: list[dict[str, Any]] = []
    with _threads(args.threads or (1 if device.type == "cpu" else None)):
        for dtype in dtypes:
            for size in sizes:
                rows += _rows(args, device, dtype, size)
    tables = [Table("operators", rows)]
    if args.threads is None and device.type == "cpu" and torch.get_num_threads() > 1:
        tables.append(Table("two threads over one", list(_scaling_rows(args, device, dtypes[0], max(sizes)))))
    return tables


def _rows(args: argparse.Namespace, device: torch.device, dtype: str, size: int) -> Iterator[dict[str, Any]]:
    torch.manual_seed(args.seed)
    x = torch.randn(size, dtype=getattr(torch, dtype), device=device)
    found = operators(device, x.dtype)
    for phase, tensors in _TENSORS_MOVED.items():
        calls: dict[str, Callable[[], object]] = {_COPY: x.clone}
        calls |= {name: phase_call(phase, operator, x) for name, operator in found.items()}
        seconds = _time(args, device, f"{phase}, {dtype}, {size:,} elements", calls)
        for name in calls:
            if name == _COPY and phase != "forward":
                continue
            over = ratio(seconds[name], seconds[_REFERENCE])
            saved = saved_per_element(found[name], x) if phase == "train" else None
            yield {
                "operator": name,
                "phase": phase,
                "dtype": dtype,
                "elements": size,
                "threads": torch.get_num_threads(),
                "time_ms": 1000 * statistics.median(seconds[name]),
                "over_gelu": over.median,
                "over_gelu_q1": over.low,
                "over_gelu_q3": over.high,
                "share_of_copy_limit": tensors / 2 * ratio(seconds[_COPY], seconds[name]).median,
                "saved_bytes_per_element": saved,
            }


def _scaling_rows(args: argparse.Namespace, device: torch.device, dtype: str, size: int) -> Iterator[dict[str, Any]]:
    torch.manual_seed(args.seed)
    x = torch.randn(size, dtype=getattr(torch, dtype), device=device)
    found = operators(device, x.dtype)
    for phase in ("forward", "train"):
        calls: dict[str, Callable[[], object]] = {}
        for name in (_REFERENCE, _FIXED):
            call = phase_call(phase, found[name], x)
            calls |= {f"{name} {threads}": partial(_with_threads, threads, call) for threads in (1, 2)}
        with _threads(None):
            seconds = _time(args, device, f"two threads, {phase}", calls)
        for name in (_REFERENCE, _FIXED):
            one, two = seconds[f"{name} 1"], seconds[f"{name} 2"]
            gain = ratio(one, two)
            yield {
                "operator": name,
                "phase": phase,
                "dtype": dtype,
                "elements": size,
                "one_thread_ms": 1000 * statistics.median(one),
                "two_threads_ms": 1000 * statistics.median(two),
                "speedup": gain.median,
                "speedup_q1": gain.low,
                "speedup_q3": gain.high,
            }


def phase_call(phase: str, operator: Operator, x: Tensor) -> Callable[[], object]:
    """A call of an operator: "forward" without gradients, "train" forward and backward, or "backward" alone."""
    if phase == "forward":
        module = operator.function
        if isinstance(module, nn.Module):
            module.eval()

        def forward() -> Tensor:
            with torch.no_grad():
                return operator.function(x)

        return forward
    if isinstance(operator.function, nn.Module):
        operator.function.train()
    leaf = x.detach().requires_grad_()
    inputs = (leaf, *operator.parameters)
    gradient = torch.ones_like(x)
    if phase == "train":
        return lambda: torch.autograd.grad(operator.function(leaf), inputs, gradient)
    y = operator.function(leaf)
    return lambda: torch.autograd.grad(y, inputs, gradient, retain_graph=True)


def saved_per_element(operator: Operator, x: Tensor) -> float:
    """Bytes saved for backward, over the number of elements; parameters, and a table that is one, do not count."""
    leaf = x.detach().requires_grad_()
    return memory.saved_bytes(lambda: operator.function(leaf), without=operator.parameters) / x.numel()


def _time(
    args: argparse.Namespace, device: torch.device, label: str, calls: dict[str, Callable[[], object]]
) -> dict[str, list[float]]:
    return interleave(
        calls, device=device, rounds=args.num_bench_iter, warmup=args.num_warm_iter, label=label, block=_BLOCK
    )


def _with_threads(threads: int, call: Callable[[], object]) -> None:
    torch.set_num_threads(threads)
    call()


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """So many threads for now, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
