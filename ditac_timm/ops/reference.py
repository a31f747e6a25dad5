"""The operators in plain torch. This file defines what is correct; every other kernel is tested against it.

A table holds the whole activation and its derivative at equally spaced nodes. There are `bins` bins on the domain
`[a, b]` and, where the activation is curved outside it, more of the same width to the left and to the right:

    left piece: left + 1 nodes | domain: bins + 1 nodes | right piece: right + 1 nodes

so a and b stand twice, once with the limit from either side: a kink or a jump there needs no special case. A lookup
interpolates linearly between two neighbours of a piece, and beyond the first and last node it goes on with their
derivative. The gradient with respect to x interpolates the derivatives in the same way.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .. import cpab

VERSIONS = ("ditac", "ge", "leaky", "inf")
LEAKY_SLOPE = 0.01

# Of a table's entries: its lines, a few times as large, stay within float32.
LARGEST = 1e36

# |x| from which GELU is taken as 0 or x: there it differs by less than 6e-9.
_GELU_REACH = 6.0


def pieces(version: str, domain: Sequence[float], bins: int) -> tuple[int, int]:
    """Number of bins left and right of the domain."""
    a, b = domain
    width = (b - a) / bins
    left = math.ceil((a + _GELU_REACH) / width - 1e-9) if version in ("ditac", "ge") else 0
    right = math.ceil((_GELU_REACH - b) / width - 1e-9) if version == "ditac" else 0
    return max(left, 0), max(right, 0)


def nodes(version: str, domain: Sequence[float], bins: int) -> int:
    """Number of columns of a table."""
    return sum(pieces(version, domain, bins)) + bins + 3


def tabulate(velocities: Tensor, version: str, domain: Sequence[float], bins: int) -> Tensor:
    """Values (row 0) and derivatives (row 1) of the activation at its nodes; differentiable, twice.

    Args:
        velocities: `(cells + 1,)`, the field at the knots of the domain.
        version: One of `VERSIONS` (supplement, equations 4 to 7).
        domain: `(a, b)`.
        bins: Bins on the domain, a multiple of the number of cells.

    Returns:
        `(2, nodes)` of velocities' dtype, computed in float64 where the device has it.
    """
    a, b = domain
    dtype = cpab.internal_dtype(velocities.device)
    fixed_nodes = _fixed_nodes if cpab.plain_eager() else _fixed_nodes.__wrapped__
    grid, cdf, pdf, left, right = fixed_nodes(version, a, b, bins, dtype, velocities.device)
    flowed, slope = cpab.flow_with_slope(grid.unsqueeze(0), velocities.to(dtype).unsqueeze(0), (a, b))
    flowed, slope = flowed.squeeze(0), slope.squeeze(0)
    if version == "ditac":
        flowed, slope = flowed * cdf, slope * cdf + flowed * pdf
    middle = torch.stack((flowed, slope))
    if version == "inf":
        left, right = middle[:, :1], middle[:, -1:]
    table = torch.cat((left, middle, right), 1)
    return table.clamp(-LARGEST, LARGEST).to(velocities.dtype)


def tabulate_backward(grad: Tensor, velocities: Tensor, version: str, domain: Sequence[float], bins: int) -> Tensor:
    """Vector-Jacobian product of `tabulate`: of velocities' shape and dtype."""
    # Under a dispatch mode (FlopCounterMode, opcheck) a kernel runs with autograd excluded.
    autograd_key = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(autograd_key, False), torch.enable_grad():
        velocities = velocities.detach().requires_grad_()
        table = tabulate(velocities, version, domain, bins)
        return torch.autograd.grad(table, velocities, grad)[0]


@lru_cache(maxsize=64)
def _fixed_nodes(
    version: str, a: float, b: float, bins: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What does not depend on theta: the domain's nodes, Phi and phi at them, and the columns outside the domain."""
    with torch.inference_mode(False), torch.no_grad():
        width = (b - a) / bins
        left_bins, right_bins = pieces(version, (a, b), bins)
        grid = torch.linspace(a, b, bins + 1, dtype=dtype, device=device)
        left = _gelu_columns(a + width * torch.arange(-left_bins, 1, dtype=dtype, device=device))
        right = _gelu_columns(b + width * torch.arange(right_bins + 1, dtype=dtype, device=device))
        if version == "leaky":
            left = torch.tensor([[LEAKY_SLOPE * a], [LEAKY_SLOPE]], dtype=dtype, device=device)
            right = torch.tensor([[b], [1.0]], dtype=dtype, device=device)
        else:  # GELU's limits, from where it has reached them
            left[:, 0] = 0.0
            right[0, -1], right[1, -1] = b + width * right_bins, 1.0
        return grid, _cdf(grid), _pdf(grid), left, right


def _cdf(x: Tensor) -> Tensor:
    return torch.special.erfc(x * -(0.5**0.5)) / 2


def _pdf(x: Tensor) -> Tensor:
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def _gelu_columns(x: Tensor) -> Tensor:
    return torch.stack((x * _cdf(x), _cdf(x) + x * _pdf(x)))


class Layout:
    """Where a table's rows lie. A row is a bin; row 0 is all that is left of the nodes, the last all right of them."""

    def __init__(self, table: Tensor, version: str, domain: Sequence[float], bins: int):
        self.left, self.right = pieces(version, domain, bins)
        if table.ndim != 2 or tuple(table.shape) != (2, self.left + bins + self.right + 3):
            raise ValueError(
                f"table must have the shape (2, {self.left + bins + self.right + 3}), but has {tuple(table.shape)}."
            )
        self.bins = bins
        self.width = (domain[1] - domain[0]) / bins
        self.low = domain[0] - self.left * self.width
        self.high = domain[1] + self.right * self.width
        self.rows = self.left + bins + self.right + 2

    def starts(self, node_values: Tensor) -> Tensor:
        """Of each bin, the value at its left node; `node_values` is `(nodes,)`."""
        return self._without_joints(node_values[:-1])

    def ends(self, node_values: Tensor) -> Tensor:
        """Of each bin, the value at its right node."""
        return self._without_joints(node_values[1:])

    def _without_joints(self, between: Tensor) -> Tensor:
        return torch.cat(between.split([self.left, 1, self.bins, 1, self.right])[::2])

    def lines(self, table: Tensor) -> Tensor:
        """`(rows, 2)`: of each row, intercept and slope of the activation's straight line.

        In this form a lookup is one gather and one multiply-add.
        """
        start, slope = self._bins(table[0])
        tails = table[:, [0, -1]].T  # value and derivative at the first and at the last node
        begin = self.width * torch.arange(self.rows - 2, dtype=table.dtype, device=table.device) + self.low
        slope = slope / self.width
        bins = torch.stack((start - slope * begin, slope), 1)
        ends = torch.tensor([self.low, self.high], dtype=table.dtype, device=table.device)
        tails = torch.stack((tails[:, 0] - tails[:, 1] * ends, tails[:, 1]), 1)
        return torch.cat((tails[:1], bins, tails[1:]))

    def derivative_lines(self, table: Tensor) -> Tensor:
        """The same for the derivative, but of the position, which is never infinite once it is kept within the rows."""
        start, slope = self._bins(table[1])
        row = torch.arange(1, self.rows - 1, dtype=table.dtype, device=table.device)
        bins = torch.stack((start - slope * row, slope), 1)
        tails = torch.nn.functional.pad(table[1, [0, -1]].unsqueeze(1), (0, 1))
        return torch.cat((tails[:1], bins, tails[1:]))

    def _bins(self, node_values: Tensor) -> tuple[Tensor, Tensor]:
        start = self.starts(node_values)
        return start, self.ends(node_values) - start

    def position(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x in bins, such that its whole part, kept within the rows, is the row."""
        if self.left == 0:  # exact at a, where `leaky` jumps
            x, offset = torch.sub(x, self.low, out=out), 1.0
        else:
            offset = 1 - self.low / self.width
        return torch.add(torch.full((), offset, dtype=x.dtype, device=x.device), x, alpha=1 / self.width, out=out)


def lookup(x: Tensor, table: Tensor, version: str, domain: Sequence[float], bins: int) -> Tensor:
    """The activation of `x`, of any shape and floating dtype, in `torch.empty_like(x)`'s layout."""
    layout = Layout(table, version, domain, bins)
    lines = torch.view_as_complex(layout.lines(table))  # one gather moves both parts
    # Where the activation ends in 0, -inf times a slope of 0 would be NaN.
    least = layout.low - layout.width if version in ("ditac", "ge") else -math.inf
    y = torch.empty_like(x)
    for (piece, out), (position, row, line, intercept, slope) in _chunks((x, y), table.dtype):
        wide = piece.to(table.dtype)
        _rows(layout.position(wide, out=position), layout.rows, out=row)
        torch.index_select(lines, 0, row, out=line)
        _into(out, torch.addcmul, intercept, slope, torch.clamp(wide, min=least, out=position))
    return y


def lookup_backward(
    grad: Tensor,
    x: Tensor,
    table: Tensor,
    version: str,
    domain: Sequence[float],
    bins: int,
    need_x: bool,
    need_table: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `lookup` with respect to `x` (in its layout) and to `table`; an empty tensor for one not needed."""
    layout = Layout(table, version, domain, bins)
    lines = torch.view_as_complex(layout.derivative_lines(table))
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    sums = torch.zeros(2, layout.rows, dtype=cpab.internal_dtype(table.device), device=table.device)
    tensors = (grad, x, grad_x) if need_x else (grad, x)
    for (piece_grad, piece, *out), (position, row, line, intercept, slope) in _chunks(tensors, table.dtype, like=x):
        piece_grad = piece_grad.to(table.dtype)
        layout.position(piece.to(table.dtype), out=position)
        kept = position.clone()
        _rows(kept, layout.rows, out=row)
        if need_x:
            torch.index_select(lines, 0, row, out=line)
            _into(out[0], torch.mul, torch.addcmul(intercept, slope, kept, out=kept), piece_grad)
        if need_table:  # in float64: float32 sums of equal numbers stop growing
            index = row.to(torch.int64)
            sums[0].scatter_add_(0, index, piece_grad.to(sums.dtype))
            sums[1].scatter_add_(0, index, position.sub_(row).mul_(piece_grad).to(sums.dtype))
    return grad_x, _node_gradient(sums, layout, table.dtype) if need_table else table.new_empty(0)


def lookup_backward_differentiable(
    grad: Tensor, x: Tensor, table: Tensor, version: str, domain: Sequence[float], bins: int
) -> tuple[Tensor, Tensor]:
    """`lookup_backward` in operators that autograd can differentiate once more."""
    layout = Layout(table, version, domain, bins)
    wide_grad = grad.to(table.dtype).flatten()
    position = layout.position(x.to(table.dtype).flatten())
    row = _rows(position.detach().clone(), layout.rows)
    line = layout.derivative_lines(table).index_select(0, row)
    grad_x = wide_grad * (line[:, 0] + line[:, 1] * position.clamp(0, layout.rows - 1))
    zeros = torch.zeros(layout.rows, dtype=table.dtype, device=table.device)
    sums = torch.stack(
        (
            zeros.index_add(0, row, wide_grad),
            zeros.index_add(0, row, wide_grad * (position - row)),
        )
    )
    return grad_x.reshape(x.shape).to(x.dtype), _node_gradient(sums, layout, table.dtype)


def _node_gradient(sums: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """From the sums of g (row 0) and g * position within the bin (row 1), per bin, to the gradient of the table."""
    total, weighted = sums
    to_start, to_end = (total - weighted)[1:-1], weighted[1:-1]
    cuts = [layout.left, layout.bins, layout.right]
    pad = torch.nn.functional.pad
    values = torch.cat(
        [
            pad(start, (0, 1)) + pad(end, (1, 0))
            for start, end in zip(to_start.split(cuts), to_end.split(cuts), strict=True)
        ]
    )
    count = len(values)
    values = values + pad(total[:1], (0, count - 1)) + pad(total[-1:], (count - 1, 0))
    # Left of the first node the position is counted from one bin before it.
    slopes = pad((weighted - total)[:1] * layout.width, (0, count - 1))
    slopes = slopes + pad(weighted[-1:] * layout.width, (count - 1, 0))
    return torch.stack((values, slopes)).to(dtype)


def _rows(position: Tensor, rows: int, out: Tensor | None = None) -> Tensor:
    """The row of each position, which is kept within the rows too; row 0 for NaN."""
    # Clamped on both sides of the cast: what a NaN becomes there depends on the processor.
    position.clamp_(0, rows - 1)
    row = position.to(torch.int32) if out is None else out.copy_(position)
    return row.clamp_(min=0)


def _into(out: Tensor, function: Callable[..., Tensor], *arguments: Tensor) -> None:
    if out.dtype == arguments[0].dtype:
        function(*arguments, out=out)
    else:
        out.copy_(function(*arguments))


def _chunks(
    tensors: tuple[Tensor, ...], dtype: torch.dtype, like: Tensor | None = None
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Walk tensors of one shape together in flat pieces that a CPU's cache holds.

    The order is that of `torch.empty_like(like)`'s memory (by default of the first tensor's); a tensor laid out
    otherwise is copied, so it must not be written to. With each piece come buffers of its length: one of `dtype`, an
    int32 one, a complex one, and the two parts of the latter.
    """
    like = tensors[0] if like is None else like
    flat = [_flat(tensor, like) for tensor in tensors]
    size = like.numel()
    step = 131072 * torch.get_num_threads() if like.device.type == "cpu" else max(size, 1)
    length = min(size, step)
    line = torch.empty(length, dtype=_complex(dtype), device=like.device)
    position, row = torch.empty(length, dtype=dtype, device=like.device), torch.empty_like(line, dtype=torch.int32)
    buffers: tuple[Tensor, ...] = (position, row, line, *torch.view_as_real(line).unbind(1))
    for begin in range(0, size, step):
        if size - begin < length:
            buffers = tuple(buffer[: size - begin] for buffer in buffers)
        yield tuple(tensor[begin : begin + step] for tensor in flat), buffers


def _flat(tensor: Tensor, like: Tensor) -> Tensor:
    layout = torch.empty_like(like, dtype=tensor.dtype, device="meta")
    if tensor.stride() != layout.stride():
        tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def _complex(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype == torch.float64 else torch.complex64
