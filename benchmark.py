#!/usr/bin/env python3
"""Measure what a model, or an activation, costs: time, parameters, FLOPs, memory.

    python benchmark.py --model resnet50_ditac -b 32                            as timm's benchmark.py
    python benchmark.py --pair convnext_small convnext_small_ditac              what the second costs over the first
    python benchmark.py --pair mobilenetv3_small_100 mobilenetv3_ditac --torchcompile
    python benchmark.py --table10                                               the paper's table 10 on this machine
    python benchmark.py --bench op                                              DiTAC beside GELU and other activations
    python benchmark.py --bench loop --model mobilenetv3_ditac -b 8             train.py's loop over a bare one
    python benchmark.py --bench onnx                                            every variant over its base, as ONNX

What is compared is timed in one process in turn, round by round, in an order that turns about; a ratio is the median
of the rounds' own ratios, with its quartiles. Peak memory is of tensors, and repeats to the byte. With --results-file
the numbers are written with the machine, the versions and the command.
"""

import os
import sys

if __name__ == "__main__" and sys.platform == "linux":
    # glibc gives large blocks back to the kernel and takes them anew, and the page faults then outweigh what is to be
    # measured. It reads these settings when a process starts, so the script starts itself once more.
    settings = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 << 30), "MALLOC_TOP_PAD_": str(256 << 20)}
    if not settings.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **settings})

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from timm.layers import set_fast_norm

from ditac_timm.benchmarking import flags, models, onnx, operators, report, training_loop
from ditac_timm.benchmarking.memory import reported_shortage
from ditac_timm.training.device import Precision, resolve_device
from ditac_timm.training.errors import UsageError, run_script, suggestion
from ditac_timm.training.model import check_model_name


def main(argv: Sequence[str] | None = None) -> int:
    """Measure as the flags say, print the tables, and return the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return run_script("benchmark.py", lambda args: benchmark(args, argv), lambda: flags.parse(argv, __doc__))


def benchmark(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Refuse what is cheaply known to fail; then measure, show and write."""
    device = torch.device(resolve_device(args.device))
    results_file = Path(args.results_file) if args.results_file else None
    if results_file:
        report.check_writable(results_file)
    names = {"--model": [args.model], "--bench loop": [args.model]}.get(args.mode, args.pair or [])
    with _named(args.mode):
        for name in names:
            check_model_name(name)
    if args.torchcompile:
        backends = torch.compiler.list_backends(exclude_tags=())
        if args.torchcompile not in backends:
            raise UsageError(f"--torchcompile {args.torchcompile} is unknown{suggestion(args.torchcompile, backends)}")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.fast_norm:
        set_fast_norm()
    precision = Precision(device, *flags.PRECISIONS[args.precision])
    surroundings = report.environment(device, argv)  # before the measurement, which itself loads the machine

    batches = f"--batch-size {' '.join(map(str, args.batch_size))}"
    large = {"--bench op": "--sizes", "--table10": "--table10"}.get(args.mode, batches)
    with _named(args.mode), reported_shortage(large, device):
        if args.mode == "--bench op":
            tables = operators.benchmark(args, device)
        elif args.mode == "--bench loop":
            tables = training_loop.benchmark(args, precision)
        elif args.mode == "--bench onnx":
            tables = onnx.benchmark(args, precision)
        elif args.mode == "--table10":
            tables = models.table10(args, precision)
        elif args.mode == "--pair":
            tables = models.pair(args, precision)
        else:
            tables = models.single(args, precision)
    report.show(surroundings, tables)
    if results_file:
        report.write(results_file, args.results_format, surroundings, tables)


@contextlib.contextmanager
def _named(mode: str) -> Iterator[None]:
    """Errors about a --model name the flag that the model was given by."""
    try:
        yield
    except UsageError as error:
        flag = "--model" if mode == "--bench loop" else mode
        raise UsageError(str(error).replace("--model ", f"{flag} ", 1)) from error


if __name__ == "__main__":
    sys.exit(main())
