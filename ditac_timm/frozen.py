"""The form of DiTAC for deployment."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FrozenDiTAC"]

# A gather is spread over threads by rows, and in ONNX each row has a copy of the table: so many elements a row at
# least, so many rows at most.
_ROW = 1 << 14
_MOST_ROWS = 8


class FrozenDiTAC(nn.Module):
    """A DiTAC that is not trained any more: a table in a buffer, looked up by standard operators; exports anywhere.

    A value is `intercept + slope * x`, both gathered along a row: of all look-ups in standard operators the cheapest,
    in torch as in ONNX Runtime, whose Gather takes ten times what its GatherElements takes.

    Args:
        lines: `(2, bins + 2)`, float32 or float64: intercepts (row 0) and slopes of the bins; the first bin holds to
            the left of all, the last to the right.
        low: Where the second bin begins.
        width: Of a bin.
        least: From here on to the left the activation is constant, where a slope of 0 times -inf would be NaN.

    Shape:
        As `DiTAC`.
    """

    def __init__(self, lines: Tensor, low: float, width: float, least: float = -math.inf):
        super().__init__()
        self.register_buffer("lines", lines.detach().clone(memory_format=torch.contiguous_format))
        self.lines: Tensor
        self.low = low
        self.width = width
        self.least = least

    def _apply(self, fn, recurse=True):
        before = self.lines
        super()._apply(fn, recurse)
        if self.lines.itemsize < 4:  # in half precision most positions would fall into another bin
            self.lines = before.to(self.lines.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        # In the order of memory a row is a view, and y gets x's strides; a compiler chooses its own, ONNX has none.
        order: Sequence[int] = range(x.ndim) if torch.compiler.is_compiling() else x.dim_order()
        in_order = _permuted(x, order)
        wide = in_order.to(self.lines.dtype)
        if self.least > -math.inf:
            wide = wide.clamp(self.least, math.inf)  # without its upper end, ONNX Runtime makes inf the largest number
        # By way of one axis: torch.export would else ask of a dynamic axis whether the rows divide it.
        wide = wide.reshape(-1).reshape(_rows(x), -1)
        bins = self._bins(wide.detach())
        intercept, slope = (_gather(line, bins) for line in self.lines)
        y = torch.addcmul(intercept, slope, wide)
        return _permuted(
            y.reshape(-1).reshape(in_order.shape).to(x.dtype), [order.index(axis) for axis in range(x.ndim)]
        )

    def _bins(self, x: Tensor) -> Tensor:
        """The bin of each element, int32; any for NaN."""
        last = self.lines.shape[1] - 1
        if _exporting_to_onnx() and x.dtype == torch.float32:  # two operators for four; float64's are not everywhere
            # Rounding must not put a domain's end, where an activation may jump, a bin too low.
            shift = 1 + 2e-7 * last
            position = last * _hard_sigmoid(x, 1 / (self.width * last), (shift - self.low / self.width) / last)
        else:
            position = (x - self.low).div_(self.width).add_(1).clamp_(0, last)
        # Clamped on both sides of the cast: what a NaN becomes there depends on the processor.
        return position.to(torch.int32).clamp_(0, last)


def _rows(x: Tensor) -> int:
    """Into how many rows x is cut; a divisor of its number of elements for any size of its dynamic axes."""
    known = math.prod(size for size in x.shape if isinstance(size, int))
    wanted = min(known // _ROW, _MOST_ROWS)
    return math.gcd(known, 1 << wanted.bit_length() - 1) if wanted else 1


def _permuted(x: Tensor, order: Sequence[int]) -> Tensor:
    return x if list(order) == list(range(x.ndim)) else x.permute(tuple(order))


def _gather(line: Tensor, bins: Tensor) -> Tensor:
    """`line[bins]`."""
    table = line.expand(len(bins), -1)
    if _exporting_to_onnx():  # torch's own translation would make the bins int64, twice as many bytes
        return _onnx_operator("GatherElements", table, bins, axis=1)
    return table.gather(1, bins)


def _hard_sigmoid(x: Tensor, alpha: float, beta: float) -> Tensor:
    return _onnx_operator("HardSigmoid", x, alpha=alpha, beta=beta)


def _onnx_operator(name: str, *inputs: Tensor, **attributes: Any) -> Tensor:
    """An operator of ONNX, whose output has the first input's dtype and the last's shape."""
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=inputs[0].dtype, shape=inputs[-1].shape)


def _exporting_to_onnx() -> bool:
    """Not true of the exporter by TorchScript, which knows no such operators."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
