"""What `train.py`'s loop costs over a bare one: the same model, batches in memory and optimizer."""

import argparse
import logging
import statistics
from collections.abc import Callable
from typing import Any

from timm.task import ClassificationTask
from torch import nn

from ditac_timm.benchmarking.report import Table
from ditac_timm.benchmarking.subject import Subject
from ditac_timm.benchmarking.timing import interleave, ratio, spread
from ditac_timm.training import loop
from ditac_timm.training.device import Precision
from ditac_timm.training.flags import parse_train_flags

_UPDATES = 50  # timed at once, with a log line at both ends: the default --log-interval


def benchmark(args: argparse.Namespace, precision: Precision) -> list[Table]:
    """A row for each batch size: an update of either loop, and what the difference is."""
    subject = Subject(args.model, args, precision)
    rows: list[dict[str, Any]] = []
    for batch_size in args.batch_size:
        calls = {"bare": _bare(subject, batch_size), "train.py": _epoch(subject, batch_size)}
        seconds = interleave(
            calls,
            device=precision.device,
            rounds=args.num_bench_iter,
            warmup=args.num_warm_iter,
            label=f"{_UPDATES} updates, batch size {batch_size}",
        )
        over = ratio(seconds["train.py"], seconds["bare"])
        more = spread([(a - b) / _UPDATES for a, b in zip(seconds["train.py"], seconds["bare"], strict=True)])
        rows.append(
            {
                "model": subject.name,
                "batch_size": batch_size,
                "bare_ms": 1000 * statistics.median(seconds["bare"]) / _UPDATES,
                "train_py_ms": 1000 * statistics.median(seconds["train.py"]) / _UPDATES,
                "ratio": over.median,
                "ratio_q1": over.low,
                "ratio_q3": over.high,
                "more_us": 1e6 * more.median,
                "more_us_q1": 1e6 * more.low,
                "more_us_q3": 1e6 * more.high,
            }
        )
    return [Table("train.py's loop over a bare one, an update", rows)]


def _bare(subject: Subject, batch_size: int) -> Callable[[], object]:
    step = subject.training_step(batch_size)

    def call() -> None:
        for _ in range(_UPDATES):
            step()

    return call


def _epoch(subject: Subject, batch_size: int) -> Callable[[], object]:
    flags = parse_train_flags(["--data-dir", "none", "--model", subject.name])
    flags.distributed, flags.rank, flags.world_size = False, 0, 1
    flags.channels_last = subject.args.channels_last
    task = ClassificationTask(subject.model, criterion=nn.CrossEntropyLoss(), verbose=False)
    batches = [subject.batch(batch_size)] * _UPDATES
    scaler = subject.precision.loss_scaler()

    def call() -> None:
        log = logging.getLogger(loop.__name__)
        level = log.level
        log.setLevel(logging.WARNING)  # lines would bury the table
        try:
            loop.train_one_epoch(task, batches, subject.optimizer, 0, flags, subject.precision, loss_scaler=scaler)
        finally:
            log.setLevel(level)

    return call
