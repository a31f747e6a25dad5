"""Models in ONNX Runtime on the CPU: what a variant, frozen and exported, costs over its base."""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ditac_timm.benchmarking.report import Table
from ditac_timm.benchmarking.subject import Subject
from ditac_timm.benchmarking.timing import interleave, ratio
from ditac_timm.ditac_zoo import _VARIANTS as VARIANTS
from ditac_timm.export import session, to_onnx
from ditac_timm.training.device import Precision
from ditac_timm.training.errors import UsageError, first_line


def benchmark(args: argparse.Namespace, precision: Precision) -> list[Table]:
    """Time a pair, or every variant beside its base, as exported for a batch of any size."""
    if precision.device.type != "cpu":
        raise UsageError("--bench onnx measures ONNX Runtime on the CPU: give --device cpu")
    pairs = [args.pair] if args.pair else [(base, name) for name, (base, _) in VARIANTS.items()]
    rows = [row for base, variant in pairs for row in _rows(args, precision, base, variant)]
    return [Table("in ONNX Runtime on the CPU, variant over base", rows)]


def _rows(args: argparse.Namespace, precision: Precision, base: str, variant: str) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    subjects = {name: Subject(name, args, precision) for name in (base, variant)}
    sessions = {name: _session(subject, threads) for name, subject in subjects.items()}
    rows = []
    for batch_size in args.batch_size:
        calls: dict[str, Callable[[], object]] = {}
        for name, subject in subjects.items():
            images = torch.randn(batch_size, *subject.input_size, generator=torch.Generator().manual_seed(args.seed))
            calls[name] = partial(sessions[name].run, None, {"images": images.numpy()})
        seconds = interleave(
            calls,
            device=precision.device,
            rounds=args.num_bench_iter,
            warmup=args.num_warm_iter,
            label=f"{variant} over {base}, batch size {batch_size}",
        )
        over = ratio(seconds[variant], seconds[base])
        row: dict[str, Any] = {"variant": variant, "base": base, "batch_size": batch_size, "threads": threads}
        row |= {
            "base_ms": 1000 * statistics.median(seconds[base]),
            "variant_ms": 1000 * statistics.median(seconds[variant]),
        }
        rows.append({**row, "ratio": over.median, "ratio_q1": over.low, "ratio_q3": over.high})
    return rows


def _session(subject: Subject, threads: int) -> Any:
    try:
        return session(to_onnx(subject.model, torch.randn(2, *subject.input_size)), threads)
    except ImportError as error:
        raise UsageError(f"--bench onnx needs {error.name}: pip install onnx onnxscript onnxruntime") from error
    except Exception as error:  # of torch's exporter, which meets any architecture's code
        raise UsageError(f"--bench onnx: {subject.name} cannot be exported: {first_line(error)}") from error
