"""Time calls side by side, so that what disturbs the machine disturbs them all alike."""

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

_logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 10.0


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """Median and quartiles of the ratios of two interleaved series, round by round."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def interleave(
    calls: dict[str, Callable[[], object]],
    *,
    device: torch.device,
    rounds: int,
    warmup: int,
    label: str,
    block: float = 0.0,
) -> dict[str, list[float]]:
    """Time every call once a round, in an order that turns about from round to round.

    Args:
        calls: What to time, by name.
        device: Whose work is waited for before the clock is read.
        rounds: How many, at least 1.
        warmup: Rounds before those that count.
        label: What is being timed, for the progress line.
        block: Seconds: a call that is shorter is repeated in each round until they are filled.

    Returns:
        Seconds a call, by name: one number a round.
    """
    _logger.info(f"{label}: {warmup} rounds to warm up, then {rounds}.")
    repeats = dict.fromkeys(calls, 1)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    shown = time.monotonic()
    for turn in range(-warmup, rounds):
        if turn == 0 and block:
            repeats = {name: max(1, math.ceil(block / _time(call, 1, device))) for name, call in calls.items()}
        for name in reversed(calls) if turn % 2 else calls:
            elapsed = _time(calls[name], repeats[name], device)
            if turn >= 0:
                seconds[name].append(elapsed)
        if time.monotonic() - shown > _PROGRESS_SECONDS:
            shown = time.monotonic()
            _logger.info(f"{label}: {turn + warmup + 1} of {warmup + rounds} rounds done.")
    return seconds


def _time(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / repeats


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
