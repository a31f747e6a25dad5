"""Whole models: one alone, a pair side by side, and the paper's table 10."""

import argparse
import statistics
from typing import Any

from ditac_timm.benchmarking.report import Table
from ditac_timm.benchmarking.subject import Subject
from ditac_timm.benchmarking.timing import Spread, interleave, ratio
from ditac_timm.training.device import Precision
from ditac_timm.training.errors import UsageError

# The paper's table 10, on an NVIDIA Tesla P100 at batch size 1: parameters, FLOPs, seconds.
TABLE10: dict[str, tuple[str, str, str, str]] = {
    "MobileNet-V3": ("mobilenetv3_small_100", "1.57M", "57.2M", "0.009±0.004"),
    "MobileNet-V3+": ("mobilenetv3_ditac", "1.57M", "60.4M", "0.016±0.001"),
    "ConvNeXt-S": ("convnext_small", "49.5M", "8.6B", "0.016±0.002"),
    "ConvNeXt-S+": ("convnext_small_ditac", "49.5M", "8.7B", "0.027±0.001"),
}
TABLE10_CLASSES = 50  # which is what its numbers of parameters count
TABLE10_SIZE = 224


def single(args: argparse.Namespace, precision: Precision) -> list[Table]:
    """Throughput, step time and counts of one model, by timm's names, a row for each batch size."""
    subject = Subject(args.model, args, precision, use_test_size=not args.use_train_size)
    compiled = bool(args.torchcompile)
    parameters, flops, activations = subject.counts
    counts = {
        "gmacs": None if flops is None else round(flops / 1e9, 2),
        "macts": None if activations is None else round(activations / 1e6, 2),
    }
    rows = []
    for batch_size in args.batch_size if args.phases else args.batch_size[:1]:
        row: dict[str, Any] = {"model": args.model}
        for prefix in args.phases:
            call = (subject.inference if prefix == "infer" else subject.training_step)(batch_size, compiled)
            seconds = _time(args, precision, f"{prefix}, batch size {batch_size}", {"model": call})["model"]
            mean = statistics.fmean(seconds)
            results = {
                "samples_per_sec": round(batch_size / mean, 2),
                "step_time": round(1000 * mean, 3),
                "batch_size": batch_size,
                "img_size": subject.input_size[-1],
                **(counts if prefix == "infer" else {}),
            }
            row |= {f"{prefix}_{name}": value for name, value in results.items()}
        if not args.phases:
            row |= {"img_size": subject.input_size[-1], **counts}
        rows.append({**row, "param_count": round(parameters / 1e6, 2)})
    return [Table("model", rows)]


def pair(args: argparse.Namespace, precision: Precision) -> list[Table]:
    """Two models in one process: what the second costs over the first."""
    base, variant = (Subject(name, args, precision) for name in args.pair)
    if base.input_size != variant.input_size:
        raise UsageError(
            f"--pair: {base.name} takes images of {base.input_size} and {variant.name} of {variant.input_size}: "
            "give both one size with --img-size"
        )
    rows = _count_rows(base, variant)
    modes = ["eager", "compiled"] if args.torchcompile else ["eager"]
    if "infer" in args.phases:
        for mode in modes:
            for batch_size in args.batch_size if mode == "eager" else args.batch_size[:1]:
                calls = {
                    "base": base.inference(batch_size, mode == "compiled"),
                    "variant": variant.inference(batch_size, mode == "compiled"),
                }
                seconds = _time(args, precision, f"infer, {mode}, batch size {batch_size}", calls)
                rows.append(_timed_row(f"infer, {mode}", batch_size, seconds))
    if "train" in args.phases:
        for mode in modes:
            rows += _training_rows(args, base, variant, mode)
    return [Table(f"{variant.name} over {base.name}, images of {'x'.join(map(str, base.input_size))}", rows)]


def _training_rows(args: argparse.Namespace, base: Subject, variant: Subject, mode: str) -> list[dict[str, Any]]:
    batch_size, compiled = max(args.batch_size), mode == "compiled"
    calls = {
        "base": base.training_step(batch_size, compiled),
        "variant": variant.training_step(batch_size, compiled),
    }
    tabulation = variant.tabulation() if mode == "eager" else None
    if tabulation is not None:
        calls["tabulation"] = tabulation
    seconds = _time(args, base.precision, f"train, {mode}, batch size {batch_size}", calls)
    rows = [_timed_row(f"train, {mode}", batch_size, seconds)]
    if tabulation is not None:
        share = ratio(seconds["tabulation"], seconds["variant"])
        milliseconds = 1000 * statistics.median(seconds["tabulation"])
        row = _row("train, eager: tabulate all layers, share of step", batch_size, "ms")
        rows.append({**row, "variant": milliseconds, **_columns(share)})
    peaks = base.training_peak(batch_size, compiled), variant.training_peak(batch_size, compiled)
    rows.append(_bytes_row(f"train, {mode}: peak memory", batch_size, *peaks))
    saved = base.saved_for_backward(batch_size, compiled), variant.saved_for_backward(batch_size, compiled)
    rows.append(_bytes_row(f"train, {mode}: saved for backward", batch_size, *saved))
    return rows


def table10(args: argparse.Namespace, precision: Precision) -> list[Table]:
    """The paper's table 10 on this machine: 50 classes, batch size 1, latency as mean and standard deviation."""
    args = argparse.Namespace(**{**vars(args), "num_classes": TABLE10_CLASSES, "img_size": TABLE10_SIZE})
    rows = []
    labels = list(TABLE10)
    for pair_labels in (labels[:2], labels[2:]):
        subjects = {label: Subject(TABLE10[label][0], args, precision) for label in pair_labels}
        calls = {label: subject.inference(1, bool(args.torchcompile)) for label, subject in subjects.items()}
        seconds = _time(args, precision, pair_labels[0], calls)
        for label, subject in subjects.items():
            _, paper_parameters, paper_flops, paper_latency = TABLE10[label]
            row = {
                "configuration": label,
                "model": subject.name,
                "parameters": subject.counts.parameters,
                "paper_parameters": paper_parameters,
                "flops": subject.counts.flops,
                "paper_flops": paper_flops,
                "latency_mean_ms": 1000 * statistics.fmean(seconds[label]),
                "latency_std_ms": 1000 * statistics.stdev(seconds[label]) if len(seconds[label]) > 1 else 0.0,
                "paper_latency_s": paper_latency,
            }
            if label != pair_labels[0]:
                row |= _columns(ratio(seconds[label], seconds[pair_labels[0]]))
                row["paper_ratio"] = round(_mean(paper_latency) / _mean(TABLE10[pair_labels[0]][3]), 2)
            rows.append(row)
    return [Table("the paper's table 10, 50 classes, batch size 1", rows)]


def _mean(latency: str) -> float:
    return float(latency.partition("±")[0])


def _time(args: argparse.Namespace, precision: Precision, label: str, calls: dict[str, Any]) -> dict[str, list[float]]:
    return interleave(
        calls, device=precision.device, rounds=args.num_bench_iter, warmup=args.num_warm_iter, label=label
    )


def _count_rows(base: Subject, variant: Subject) -> list[dict[str, Any]]:
    rows = []
    names = ("parameters", "FLOPs, one image", "activations, one image")
    for name, a, b in zip(names, base.counts, variant.counts, strict=True):
        quotient = None if a is None or b is None else b / a
        rows.append({**_row(name, None, "number"), "base": a, "variant": b, "ratio": quotient})
    return rows


def _timed_row(name: str, batch_size: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    medians = {side: 1000 * statistics.median(seconds[side]) for side in ("base", "variant")}
    return {**_row(name, batch_size, "ms"), **medians, **_columns(ratio(seconds["variant"], seconds["base"]))}


def _bytes_row(name: str, batch_size: int, base: int, variant: int) -> dict[str, Any]:
    return {**_row(name, batch_size, "bytes"), "base": base, "variant": variant, "ratio": variant / base}


def _row(name: str, batch_size: int | None, unit: str) -> dict[str, Any]:
    return {"measure": name, "batch_size": batch_size, "unit": unit}


def _columns(value: Spread) -> dict[str, float]:
    return {"ratio": value.median, "ratio_q1": value.low, "ratio_q3": value.high}
