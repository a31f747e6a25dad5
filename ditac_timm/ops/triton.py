"""The operators for CUDA in Triton. `reference.py` defines what they compute; `TRITON_INTERPRET=1` runs them on a CPU.

Here a table has `table_rows` rows: under values and derivatives, row `2 + k` holds the Jacobian, the derivative of the
values with respect to velocity k. `tabulate` accumulates it along each node's trajectory, in the same launch.

With it the velocities' gradient needs neither a histogram over the nodes nor an atomic operation. `lookup_backward`
gathers the Jacobian at each element's position and sums `g * J_k` in registers, then within a program, then over the
programs in a fixed order: the result is the same in every run on one kind of device. It returns

    grad_table[2 + k, 0] = sum of g dy/dv_k        grad_table[1, [0, -1]] = `inf`'s slopes beyond the domain

and zeros elsewhere, for the sum over a Jacobian's row is all that counts. `tabulate_backward` sums the rows from 2 on
and adds the exact product of rows 0 and 1 (which come from the above, from second derivatives, or from whoever uses
the table itself) with their Jacobians. No kernel makes the host wait; nodes without such a gradient cost one look.
"""

import math
import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import cpab
from . import reference

__all__ = ["MAX_CELLS", "lookup", "lookup_backward", "table_rows", "tabulate", "tabulate_backward"]

# With more cells tables have the reference's two rows, made by the reference; their gradients are its histograms.
MAX_CELLS = 255

# Fixed, not tuned at run time, so that sums are taken in the same order in every run. `lookup` moves 8 elements a
# thread, one 16-byte access in half precision and two in float32. `lookup_backward`, which is held up by its gathers
# and not by memory, has one element a thread: so the layout of loads is that of the sums, up to 16 a thread in
# registers, and nothing goes through shared memory. All its programs should fit on the processors at once.
_FORWARD_BLOCK, _FORWARD_WARPS = 2048, 8
_BACKWARD_BLOCK, _BACKWARD_WARPS = 256, 8
_VELOCITIES_AT_ONCE = 16
_PROGRAMS_PER_PROCESSOR = 4
_TABULATE_ENTRIES, _TABULATE_WARPS = 1024, 4  # nodes times velocities in a program


def table_rows(velocities: Tensor) -> int:
    """Number of rows of a table: 2, and one for each velocity if there are at most `MAX_CELLS` cells."""
    knots = velocities.shape[-1]
    return 2 + knots if knots - 1 <= MAX_CELLS else 2


def tabulate(velocities: Tensor, version: str, domain: Sequence[float], bins: int) -> Tensor:
    """As `reference.tabulate`, with the Jacobian's rows: `(table_rows(velocities), nodes)`."""
    if table_rows(velocities) == 2:
        return reference.tabulate(velocities, version, domain, bins)
    constants, left = _constants(version, domain, bins, velocities.device)
    velocities = velocities.contiguous()
    knots, nodes = velocities.numel(), constants.shape[1]
    table = velocities.new_empty(table_rows(velocities), nodes)
    columns = triton.next_power_of_2(knots)
    block = max(_block(_TABULATE_ENTRIES, velocities.device) // columns, 1)
    with _on(velocities.device):
        _tabulate_kernel[(triton.cdiv(nodes, block),)](
            velocities, constants, table, nodes, left, bins, knots - 1,
            BLOCK=block, COLUMNS=columns, num_warps=_TABULATE_WARPS,
        )  # fmt: skip
    return table


def tabulate_backward(grad: Tensor, velocities: Tensor, version: str, domain: Sequence[float], bins: int) -> Tensor:
    """As `reference.tabulate_backward`, for `grad` of the shape of `tabulate`'s table, or of its rows 0 and 1 alone."""
    if 2 in (table_rows(velocities), grad.shape[0]):
        return reference.tabulate_backward(grad, velocities, version, domain, bins)
    constants, left = _constants(version, domain, bins, velocities.device)
    velocities, grad = velocities.contiguous(), grad.contiguous()
    knots, nodes = velocities.numel(), constants.shape[1]
    columns = triton.next_power_of_2(knots)
    block = max(_block(_TABULATE_ENTRIES, velocities.device) // columns, 1)
    programs = triton.cdiv(nodes, block)
    sums = constants.new_empty(programs, knots)
    with _on(velocities.device):
        _tabulate_backward_kernel[(programs,)](
            grad, velocities, constants, sums, nodes, left, bins, knots - 1,
            BLOCK=block, COLUMNS=columns, num_warps=_TABULATE_WARPS,
        )  # fmt: skip
    return sums.sum(0).to(velocities.dtype)


def lookup(x: Tensor, table: Tensor, version: str, domain: Sequence[float], bins: int) -> Tensor:
    """As `reference.lookup`; of the table it reads rows 0 and 1, and may have been given only these."""
    left, right, low, high, inverse_width = _scale(table, version, domain, bins)
    y = torch.empty_like(x)
    if x.numel():
        x, table, block = _laid_out_as(x, y), table.contiguous(), _block(_FORWARD_BLOCK, x.device)
        with _on(x.device):
            _lookup_kernel[(triton.cdiv(x.numel(), block),)](
                x, table, y, x.numel(), left, bins, right, _bits(low), _bits(high), _bits(inverse_width),
                LEFT_ENDS_IN_0=version in ("ditac", "ge"), BLOCK=block, num_warps=_FORWARD_WARPS,
            )  # fmt: skip
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
    """As `reference.lookup_backward`, with the gradient of a table that has a Jacobian as the module's head says."""
    left, right, low, high, inverse_width = _scale(table, version, domain, bins)
    if need_table and table.shape[0] == 2:
        return reference.lookup_backward(grad, x, table, version, domain, bins, need_x, need_table)
    grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
    grad_table = torch.empty_like(table, memory_format=torch.contiguous_format) if need_table else table.new_empty(0)
    if not x.numel() or not (need_x or need_table):
        return grad_x, grad_table.zero_()
    layout = grad_x if need_x else torch.empty_like(x, device="meta")
    x, grad, table = _laid_out_as(x, layout), _laid_out_as(grad, layout), table.contiguous()
    nodes, knots = table.shape[1], max(table.shape[0] - 2, 0)
    groups = max(triton.cdiv(knots, _VELOCITIES_AT_ONCE), 1) if need_table else 1
    block = _block(_BACKWARD_BLOCK, x.device)
    programs = min(triton.cdiv(x.numel(), block), _programs(x.device))
    sums = table.new_empty(knots + 2 if need_table else 0, programs)
    with _on(x.device):
        _lookup_backward_kernel[(programs, groups)](
            grad, x, table, grad_x, sums, x.numel(), left, bins, right, _bits(low), _bits(high), _bits(inverse_width),
            NODES=nodes, KNOTS=knots, NEED_X=need_x, NEED_TABLE=need_table, INF=version == "inf",
            BLOCK=block, AT_ONCE=triton.next_power_of_2(triton.cdiv(max(knots, 1), groups)),
            num_warps=_BACKWARD_WARPS,
        )  # fmt: skip
        if need_table:
            _table_gradient_kernel[(table.shape[0], triton.cdiv(nodes, 1024))](
                sums, grad_table, nodes, knots, programs,
                INF=version == "inf", BLOCK=1024, PROGRAMS=triton.next_power_of_2(programs), num_warps=4,
            )  # fmt: skip
    return grad_x, grad_table


def _scale(table: Tensor, version: str, domain: Sequence[float], bins: int) -> tuple[int, int, float, float, float]:
    layout = reference.Layout(table[:2], version, domain, bins)
    return layout.left, layout.right, layout.low, layout.high, 1 / layout.width


def _constants(version: str, domain: Sequence[float], bins: int, device: torch.device) -> tuple[Tensor, int]:
    make = _node_constants if cpab.plain_eager() else _node_constants.__wrapped__
    return make(version, *domain, bins, device), reference.pieces(version, domain, bins)[0]


@lru_cache(maxsize=64)
def _node_constants(version: str, a: float, b: float, bins: int, device: torch.device) -> Tensor:
    """`(6, nodes)` float64: x, c, f, d, e, and the bins' width; value = c + f T(x), derivative = d + e T(x) + f T'(x).

    So one kernel tabulates all versions; outside the domain f and e are 0, or x is an end of it.
    """
    with torch.inference_mode(False), torch.no_grad():
        # Not the cached ones: these are kept instead.
        grid, cdf, pdf, left, right = reference._fixed_nodes.__wrapped__(version, a, b, bins, torch.float64, device)
        zeros, ones = torch.zeros_like(grid), torch.ones_like(grid)
        middle = torch.stack((grid, zeros, *((cdf, zeros, pdf) if version == "ditac" else (ones, zeros, zeros))))
        if version == "inf":
            before, after = middle[:, :1], middle[:, -1:]
        else:
            before, after = (
                torch.stack((torch.full_like(piece[0], end), piece[0], piece[0] * 0, piece[1], piece[0] * 0))
                for piece, end in ((left, a), (right, b))
            )
        columns = torch.cat((before, middle, after), 1)
        return torch.cat((columns, torch.full_like(columns[:1], (b - a) / bins)))


def _block(size: int, device: torch.device) -> int:
    return size if device.type == "cuda" else 32 * size  # interpreted, a block takes Python's time, whatever its size


def _programs(device: torch.device) -> int:
    if device.type != "cuda":  # interpreted
        return 3
    return _PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def _on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, whatever device its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _laid_out_as(tensor: Tensor, layout: Tensor) -> Tensor:
    """The tensor, or a copy, with the strides of `layout`, which is dense: kernels walk its memory from end to end."""
    if tensor.stride() == layout.stride() or (tensor.is_contiguous() and layout.is_contiguous()):
        return tensor
    return torch.empty_like(layout, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _bits(number: float) -> int:
    """Triton takes floats as float32; so a float64 comes as an integer."""
    return struct.unpack("<q", struct.pack("<d", number))[0]


# --- Tabulate ---------------------------------------------------------------------------------------------------------

# Below this a division by the squared velocity overflows; as in the reference.
_AT_REST = tl.constexpr(math.sqrt(torch.finfo(torch.float64).tiny))
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_MAX_GROWTH = tl.constexpr(math.log(torch.finfo(torch.float64).max) - 1)


@triton.jit
def _crossing_time(distance, speed, exit_speed):
    """`distance * log(exit_speed / speed) / (exit_speed - speed)`, by a series where the speeds are nearly equal."""
    total = speed + exit_speed
    difference = exit_speed - speed
    ratio = difference / total
    near = tl.abs(ratio) < 0.02
    square = ratio * ratio
    series = 1 + square * (1.0 / 3 + square * (1.0 / 5 + square * (1.0 / 7 + square * (1.0 / 9))))
    far = tl.log(exit_speed / speed) / tl.where(near, 1.0, difference)
    return distance * tl.where(near, 2 / total * series, far)


@triton.jit
def _flow(velocities, node, cells, cell_bins, bin_width, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
          DERIVATIVE: tl.constexpr):  # fmt: skip
    """Follow the trajectory from each node of the domain for the unit of time, leg by leg, a leg a cell.

    A leg that begins at the part p of a cell of width w, with the velocity v, slope s, and lasts tau (z = s tau) turns
    the Jacobian J of the position into `J e^z` plus the integrals of the hat functions of the cell's two knots,
    weighted with `e^(s (tau - t))`. These are `A - R` and `R`, with `A = tau phi(z)`, `phi(z) = (e^z - 1) / z`,
    `R = p A + v / w tau^2 psi(z)`, `psi(z) = (z e^z - e^z + 1) / z^2`: nothing is divided by a velocity or a slope.

    Nodes are counted, so one on a knot is exactly on it: moving left, it leaves the cell to its right in no time.

    Returns:
        What the position gains, its derivative in the node's position, J and, if DERIVATIVE, dJ/dx `(BLOCK, COLUMNS)`.
    """
    column = tl.arange(0, COLUMNS)[None, :]
    width = cell_bins * bin_width
    cell = tl.minimum(node // cell_bins, cells - 1)
    part = (node - cell * cell_bins).to(tl.float64) / cell_bins
    origin = node
    gained = tl.zeros([BLOCK], tl.float64)
    growth = gained + 1
    remaining = gained + 1
    jacobian = tl.zeros([BLOCK, COLUMNS], tl.float64)
    jacobian_dx = tl.zeros([BLOCK, COLUMNS], tl.float64)
    remaining_dx = gained
    moving = tl.full([BLOCK], 1, tl.int32)
    leg = 0
    # A trajectory keeps its direction, so it has at most one leg a cell.
    while (tl.max(moving, 0) > 0) & (leg <= cells):
        at_left = tl.load(velocities + cell).to(tl.float64)
        at_right = tl.load(velocities + cell + 1).to(tl.float64)
        slope = (at_right - at_left) / width
        velocity = at_left * (1 - part) + at_right * part
        rightward = velocity > 0
        knot = tl.where(rightward, cell + 1, cell)
        speed = tl.abs(velocity)
        exit_speed = tl.where(rightward, at_right, -at_left)
        may_exit = (speed > _AT_REST) & (exit_speed > _AT_REST) & (knot > 0) & (knot < cells)
        speed = tl.where(may_exit, speed, 1.0)
        exit_speed = tl.where(may_exit, exit_speed, 1.0)
        hit_time = _crossing_time(width * tl.where(rightward, 1 - part, part), speed, exit_speed)
        exits = may_exit & (hit_time < remaining)
        duration = tl.where(exits, hit_time, remaining)

        z = tl.minimum(slope * duration, _MAX_GROWTH)
        factor = tl.where(exits, exit_speed / speed, tl.exp(z))
        near = tl.abs(z) < 0.1
        small = tl.where(near, z, 0.0)
        large = tl.where(near, 1.0, z)
        phi = 1 + small * (1.0 / 2 + small * (1.0 / 6 + small * (1.0 / 24 + small * (1.0 / 120 + small * (
            1.0 / 720 + small * (1.0 / 5040 + small * (1.0 / 40320 + small * (1.0 / 362880))))))))  # fmt: skip
        psi = 1.0 / 2 + small * (1.0 / 3 + small * (1.0 / 8 + small * (1.0 / 30 + small * (1.0 / 144 + small * (
            1.0 / 840 + small * (1.0 / 5760 + small * (1.0 / 45360 + small * (1.0 / 403200))))))))  # fmt: skip
        phi = tl.where(near, phi, (factor - 1) / large)
        psi = tl.where(near, psi, (factor * ((large - 1) / large) + 1 / large) / large)
        both = duration * phi
        bend = duration * duration * psi
        to_right = part * both + velocity / width * bend
        on_left = column == cell[:, None]
        on_right = column == cell[:, None] + 1
        jacobian = jacobian * factor[:, None] + tl.where(on_left, (both - to_right)[:, None], 0.0)
        jacobian += tl.where(on_right, to_right[:, None], 0.0)

        if DERIVATIVE:
            # A leg that begins at x and ends at a knot: its J is an integral from x, and it is shorter for a larger x.
            # The last leg, if it begins at a knot, is then longer, at whose end J grows by s J + hat.
            first = leg == 0
            end = part + velocity * both / width
            head = exit_speed / (speed * speed) * tl.where(rightward, -1.0, 1.0)
            right_dx = tl.where(exits, head * part, both / width + slope / width * bend)
            left_dx = tl.where(exits, head * (1 - part), -right_dx)
            later = tl.where(exits, 0.0, remaining_dx)
            right_dx = tl.where(first, right_dx, later * end) * moving
            left_dx = tl.where(first, left_dx, later * (1 - end)) * moving
            stretch = tl.where(first, 0.0, later * slope) * moving
            jacobian_dx = jacobian_dx * factor[:, None] + jacobian * stretch[:, None]
            jacobian_dx += tl.where(on_left, left_dx[:, None], 0.0) + tl.where(on_right, right_dx[:, None], 0.0)
            remaining_dx = tl.where(first & exits, tl.where(rightward, 1.0, -1.0) / speed, remaining_dx)

        growth *= factor
        gained = tl.where(exits, 0.0, gained + velocity * both)
        origin = tl.where(exits, knot * cell_bins, origin)
        remaining = tl.where(exits, remaining - duration, 0.0)  # of no time left nothing more comes
        part = tl.where(exits, tl.where(rightward, 0.0, 1.0), part)
        cell = tl.where(exits, tl.where(rightward, cell + 1, cell - 1), cell)
        moving = tl.where(exits, moving, 0)
        leg += 1
    return gained + (origin - node) * bin_width, growth, jacobian, jacobian_dx


@triton.jit(do_not_specialize=["nodes", "left", "bins", "cells"])
def _tabulate_kernel(velocities, constants, table, nodes, left, bins, cells,
                     BLOCK: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    node = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = node < nodes
    bin_width = tl.load(constants + 5 * nodes)
    inner = tl.minimum(tl.maximum(node - left - 1, 0), bins)
    gained, growth, jacobian, _ = _flow(velocities, inner, cells, bins // cells, bin_width, BLOCK, COLUMNS, False)
    flowed = tl.load(constants + node, mask, 0.0) + gained
    value = tl.load(constants + nodes + node, mask, 0.0)
    factor = tl.load(constants + 2 * nodes + node, mask, 0.0)
    derivative = tl.load(constants + 3 * nodes + node, mask, 0.0)
    second = tl.load(constants + 4 * nodes + node, mask, 0.0)
    moved = factor != 0  # velocities that are not finite must not reach GELU
    value = tl.where(moved, value + factor * flowed, value)
    derivative = tl.where(moved, derivative + second * flowed + factor * growth, derivative)
    tl.store(table + node, value.to(table.dtype.element_ty), mask)
    tl.store(table + nodes + node, derivative.to(table.dtype.element_ty), mask)
    jacobian = tl.where(moved[:, None], factor[:, None] * jacobian, 0.0)
    if table.dtype.element_ty == tl.float32:  # of which an infinity, times a weight of 0, would make NaN
        jacobian = tl.where(tl.abs(jacobian) > _LARGEST, tl.where(jacobian > 0, _LARGEST, -_LARGEST), jacobian)
    column = tl.arange(0, COLUMNS)[None, :]
    at = table + (2 + column) * nodes + node[:, None]
    tl.store(at, jacobian.to(table.dtype.element_ty), mask[:, None] & (column <= cells))


@triton.jit(do_not_specialize=["nodes", "left", "bins", "cells"])
def _tabulate_backward_kernel(grad, velocities, constants, sums, nodes, left, bins, cells,
                              BLOCK: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    node = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = node < nodes
    factor = tl.load(constants + 2 * nodes + node, mask, 0.0)
    moved = factor != 0
    to_value = tl.load(grad + node, moved, 0.0).to(tl.float64)
    to_derivative = tl.load(grad + nodes + node, moved, 0.0).to(tl.float64)
    column = tl.arange(0, COLUMNS)[None, :]
    at = grad + (2 + column) * nodes + node[:, None]
    total = tl.sum(tl.load(at, mask[:, None] & (column <= cells), 0.0).to(tl.float64), 0)
    if tl.max(((to_value != 0) | (to_derivative != 0)).to(tl.int32), 0) > 0:
        bin_width = tl.load(constants + 5 * nodes)
        second = tl.load(constants + 4 * nodes + node, mask, 0.0)
        inner = tl.minimum(tl.maximum(node - left - 1, 0), bins)
        _, _, jacobian, jacobian_dx = _flow(velocities, inner, cells, bins // cells, bin_width, BLOCK, COLUMNS, True)
        to_position = to_value * factor + to_derivative * second
        to_growth = to_derivative * factor
        # 0 times what has overflowed would be NaN.
        through = tl.where((to_position != 0)[:, None], to_position[:, None] * jacobian, 0.0)
        total += tl.sum(through + tl.where((to_growth != 0)[:, None], to_growth[:, None] * jacobian_dx, 0.0), 0)
    column = tl.arange(0, COLUMNS)
    tl.store(sums + tl.program_id(0) * (cells + 1) + column, total, column <= cells)


# --- Lookup -----------------------------------------------------------------------------------------------------------


@triton.jit
def _between(row, node, weight):
    """Interpolate a table's row between a node and the next: all that is gathered, but for Jacobians, comes from here.

    Through pointers: a row of 20 kB stays in the first-level cache, and neighbours share its lines. `tl.gather` would
    write the row to shared memory again for each block.
    """
    start = tl.load(row + node)
    return start + weight * (tl.load(row + node + 1) - start)


@triton.jit
def _float64(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _to(number, dtype: tl.constexpr):
    """Between half precision and float64 by way of float32: not every version of Triton goes there directly."""
    if number.dtype.primitive_bitwidth + dtype.primitive_bitwidth == 80:
        number = number.to(tl.float32)
    return number.to(dtype)


@triton.jit
def _position(x, low, inverse_width, left, bins, right):
    """x in bins, unbounded, the bin, and the part of it; of NaN, some bin."""
    position = (x - low) * inverse_width
    total = left + bins + right
    bounded = tl.minimum(tl.maximum(position, 0.0), total.to(x.dtype))
    # Clamped after the cast too: not every way of running this takes the number when the other is NaN.
    index = tl.maximum(tl.minimum(bounded.to(tl.int32), total - 1), 0)
    return position, index, bounded - index.to(x.dtype)


@triton.jit
def _node(index, left, bins):
    """A bin's left node: a and b stand twice."""
    return index + (index >= left).to(tl.int32) + (index >= left + bins).to(tl.int32)


@triton.jit(do_not_specialize=["left", "bins", "right", "low_bits", "high_bits", "inverse_width_bits"])
def _lookup_kernel(x, table, y, size, left, bins, right, low_bits, high_bits, inverse_width_bits,
                   LEFT_ENDS_IN_0: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    dtype: tl.constexpr = table.dtype.element_ty
    low = _float64(low_bits).to(dtype)
    high = _float64(high_bits).to(dtype)
    inverse_width = _float64(inverse_width_bits).to(dtype)
    total = left + bins + right
    nodes = total + 3
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    mask = offset < size - begin
    wide = _to(tl.load(x + begin + offset, mask, 0.0), dtype)
    position, index, weight = _position(wide, low, inverse_width, left, bins, right)
    result = _between(table, _node(index, left, bins), weight)
    beyond = wide - low
    if LEFT_ENDS_IN_0:  # -inf times a slope of 0 would be NaN
        result = tl.where(position < 0, tl.load(table), result)
    else:
        result = tl.where(position < 0, tl.load(table) + tl.load(table + nodes) * beyond, result)
    last = tl.load(table + nodes - 1) + tl.load(table + 2 * nodes - 1) * (wide - high)
    result = tl.where(position >= total.to(dtype), last, result)
    result = tl.where(wide == wide, result, wide)
    tl.store(y + begin + offset, _to(result, y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["left", "bins", "right", "low_bits", "high_bits", "inverse_width_bits"])
def _lookup_backward_kernel(
    grad, x, table, grad_x, sums, size, left, bins, right, low_bits, high_bits, inverse_width_bits,
    NODES: tl.constexpr, KNOTS: tl.constexpr, NEED_X: tl.constexpr, NEED_TABLE: tl.constexpr, INF: tl.constexpr,
    BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One program walks blocks of elements in a fixed order, for a group of velocities; group 0 also makes `grad_x`.

    The Jacobian is interpolated, though that doubles what is gathered: it is then the exact derivative of what
    `lookup` returns. At the nearest node it would be off by up to half a bin's change, 1e-3 of it in bins of 1/400; as
    gradients come with both signs, so does their sum, and such errors do not average out of the quotient.
    """
    dtype: tl.constexpr = table.dtype.element_ty
    low = _float64(low_bits).to(dtype)
    high = _float64(high_bits).to(dtype)
    inverse_width = _float64(inverse_width_bits).to(dtype)
    total = left + bins + right
    group = tl.program_id(1)
    velocity = group * AT_ONCE + tl.arange(0, AT_ONCE)[:, None]
    jacobian = table + (2 + velocity) * NODES
    gathered = tl.zeros([AT_ONCE, BLOCK], dtype)
    left_tail = tl.zeros([BLOCK], dtype)
    right_tail = tl.zeros([BLOCK], dtype)
    offset = tl.arange(0, BLOCK)
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    while begin < size:
        mask = offset < size - begin
        wide = _to(tl.load(x + begin + offset, mask, 0.0), dtype)
        weight_y = _to(tl.load(grad + begin + offset, mask, 0.0), dtype)
        position, index, weight = _position(wide, low, inverse_width, left, bins, right)
        if NEED_X:  # noqa: SIM102 - what is known when compiling, apart from what is not
            if group == 0:
                slope = _between(table + NODES, _node(index, left, bins), weight)
                slope = tl.where(position < 0, tl.load(table + NODES), slope)
                slope = tl.where(position >= total.to(dtype), tl.load(table + 2 * NODES - 1), slope)
                slope = tl.where(wide == wide, slope, wide)
                tl.store(grad_x + begin + offset, _to(slope * weight_y, grad_x.dtype.element_ty), mask)
        if NEED_TABLE:
            inside = mask
            if INF:  # beyond the domain the Jacobian is that of its end, and more through the slope there
                left_tail += tl.where(position >= 0, 0.0, weight_y * (wide - low))
                right_tail += tl.where(position >= total.to(dtype), weight_y * (wide - high), 0.0)
            else:
                inside = mask & (index >= left) & (index < left + bins) & (position >= 0) & (position < total.to(dtype))
            known = inside[None, :] & (velocity < KNOTS)
            at = jacobian + (index + 1)[None, :]
            start = tl.load(at, known, 0.0)
            weight = tl.where(inside, weight, 0.0)
            value = start + weight[None, :] * (tl.load(at + 1, known, 0.0) - start)
            gathered += tl.where(inside, weight_y, 0.0)[None, :] * value
        begin += step
    if NEED_TABLE:
        program = tl.program_id(0)
        programs = tl.num_programs(0)
        row = group * AT_ONCE + tl.arange(0, AT_ONCE)
        tl.store(sums + row * programs + program, tl.sum(gathered, 1), row < KNOTS)
        if INF:  # noqa: SIM102
            if group == 0:
                tl.store(sums + KNOTS * programs + program, tl.sum(left_tail, 0))
                tl.store(sums + (KNOTS + 1) * programs + program, tl.sum(right_tail, 0))


@triton.jit(do_not_specialize=["knots", "programs"])
def _table_gradient_kernel(sums, grad_table, nodes, knots, programs,
                           INF: tl.constexpr, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr):  # fmt: skip
    """Zeros, and the sums over the programs in their places."""
    row = tl.program_id(0)
    node = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    program = tl.arange(0, PROGRAMS)
    result = tl.zeros([BLOCK], tl.float64)
    if (row >= 2) & (tl.program_id(1) == 0):
        part = tl.load(sums + (row - 2) * programs + program, program < programs, 0.0).to(tl.float64)
        result = tl.where(node == 0, tl.sum(part, 0), 0.0)
    if INF:  # noqa: SIM102
        if row == 1:
            part = tl.load(sums + knots * programs + program, program < programs, 0.0).to(tl.float64)
            result = tl.where(node == 0, tl.sum(part, 0), 0.0)
            part = tl.load(sums + (knots + 1) * programs + program, program < programs, 0.0).to(tl.float64)
            result = tl.where(node == nodes - 1, tl.sum(part, 0), result)
    tl.store(grad_table + row * nodes + node, result.to(grad_table.dtype.element_ty), node < nodes)
