#!/usr/bin/env python3
"""Evaluate a checkpoint or a pretrained model on images.

    python validate.py --data-dir /data/imagenet --checkpoint output/train/RUN [--use-ema]
    python validate.py --data-dir /data/imagenet --model resnet50 --pretrained --results-file results.csv

Architecture, number of classes and image preparation are the checkpoint's; flags override the last. A run's last
checkpoint gives the run's last top-1 exactly, evaluated in the same precision.
"""

import argparse
import csv
import io
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm import utils
from timm.layers import apply_test_time_pool, set_fast_norm

from ditac_timm.hub import weights_sha256
from ditac_timm.training import checkpoint as checkpoints
from ditac_timm.training import data, splits
from ditac_timm.training import model as models
from ditac_timm.training.device import Precision, init_device, resolve_device
from ditac_timm.training.errors import run_script
from ditac_timm.training.flags import parse_validate_flags
from ditac_timm.training.loop import evaluate
from ditac_timm.training.refusals import check_validate_flags

_logger = logging.getLogger("validate")


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the flags say, print the result as JSON, and return the exit code."""
    return run_script("validate.py", validate, lambda: parse_validate_flags(argv))


def validate(args: argparse.Namespace) -> None:
    """Evaluate as parsed flags say."""
    args.device = resolve_device(args.device)
    check_validate_flags(args)
    if args.model:
        models.check_model_name(args.model)
    splits.check_data_dir(args)
    file = checkpoints.find_checkpoint(args.checkpoint, "--checkpoint") if args.checkpoint else None
    device = init_device(args)
    try:
        results = _evaluate(args, file, device)
    finally:
        if args.distributed:
            torch.distributed.destroy_process_group()
    if not utils.is_primary(args):
        return
    _logger.info(
        f" * Acc@1 {results['top1']:.3f} ({results['top1_err']:.3f}) "
        f"Acc@5 {results['top5']:.3f} ({results['top5_err']:.3f})"
    )
    if args.results_file:
        write_results(Path(args.results_file), results, args.results_format)
    print(f"--result\n{json.dumps(results, indent=4)}")


def _evaluate(args: argparse.Namespace, file: Path | None, device: torch.device) -> dict[str, Any]:
    precision = Precision.from_flags(args, device)
    checkpoint = checkpoints.read_checkpoint(file, "--checkpoint") if file else {}
    model, name = create_model(args, checkpoint)
    saved_config = checkpoint.get("data_config")
    config = data.resolve_data_config(args, model, saved_config, not args.use_train_size)
    dataset = splits.create_split(args, args.split, "--split", config, num_samples=args.num_samples)
    splits.check_folder(args, args.split, "--split", dataset, flat=True)
    splits.check_classes(args, dataset, args.split, model.num_classes)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    weights = weights_sha256(model)
    if args.reparam:
        model = utils.reparameterize_model(model)
    if args.test_pool:
        model, pooled = apply_test_time_pool(model, config)
        config["crop_pct"] = 1.0 if pooled else config["crop_pct"]
    model = models.place(model, args, precision)
    if args.torchcompile:
        model = torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)

    loader = data.create_eval_loader(args, dataset, config, precision, args.batch_size)
    metrics = evaluate(model, loader, args, precision, log_interval=args.log_freq)
    missing = data.check_images(loader, args, training=False)
    return {
        "model": name,
        **({"checkpoint": str(file), "epoch": checkpoint.get("epoch")} if file else {}),
        "weights_sha256": weights,
        "dataset": args.dataset or Path(args.data_dir).resolve().name,
        "split": args.split,
        "images": len(dataset) - missing,
        **({"test_pool": True} if args.test_pool else {}),
        "precision": f"amp {args.amp_dtype}" if args.amp else args.model_dtype or "float32",
        "top1": metrics["top1"],
        "top1_err": round(100 - metrics["top1"], 4),
        "top5": metrics["top5"],
        "top5_err": round(100 - metrics["top5"], 4),
        "loss": metrics["loss"],
        "param_count": round(parameters / 1e6, 2),
        "img_size": config["input_size"][-1],
        "crop_pct": config["crop_pct"],
        "interpolation": config["interpolation"],
    }


def create_model(args: argparse.Namespace, checkpoint: dict[str, Any]) -> tuple[Any, str]:
    """Create the model to evaluate, with its weights.

    Returns:
        The model on the CPU, and its name.
    """
    if args.fast_norm:
        set_fast_norm()
    model, name = checkpoints.create_model(args, checkpoint, pretrained=True)
    _log_how_it_was_evaluated(args, checkpoint)
    return model, name


def write_results(file: Path, results: dict[str, Any], file_format: str | None = None) -> None:
    """Write one line of csv, or json, as the format or else the file's extension says."""
    text = io.StringIO()
    if (file_format or file.suffix.removeprefix(".")) == "json":
        json.dump(results, text, indent=4)
    else:
        writer = csv.DictWriter(text, fieldnames=results.keys())
        writer.writeheader()
        writer.writerow(results)
    with checkpoints.reported_write_errors(file):
        checkpoints.write_atomically(file, lambda stream: stream.write(text.getvalue().encode()))


def _log_how_it_was_evaluated(args: argparse.Namespace, checkpoint: dict[str, Any]) -> None:
    """Name the flags of the run without which its own accuracy is not to be expected."""
    saved = checkpoint.get("args")
    if not isinstance(saved, dict):
        return
    same = {"amp": args.amp, "channels_last": args.channels_last, "model_ema": args.use_ema}
    for name, asked in same.items():
        if saved.get(name) and not asked:
            flag = {"amp": f"--amp --amp-dtype {saved.get('amp_dtype')}", "model_ema": "--use-ema"}.get(name)
            _logger.info(f"The run evaluated itself with {flag or '--channels-last'}; without, accuracy may differ.")


if __name__ == "__main__":
    sys.exit(main())
