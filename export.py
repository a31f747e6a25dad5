#!/usr/bin/env python3
"""Write a model as ONNX, with its activations frozen, and compare it with PyTorch.

    python export.py --checkpoint output/train/RUN [--use-ema] --output model.onnx
    python export.py --model convnext_small_ditac --pretrained --img-size 224

The graph holds standard operators only and takes batches of any size. Where ONNX Runtime is installed, its logits are
compared with those of the model as it was trained; a file is written only if they are equal.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ditac_timm.export import session, to_onnx
from ditac_timm.training import checkpoint as checkpoints
from ditac_timm.training import data
from ditac_timm.training import model as models
from ditac_timm.training.errors import RunError, UsageError, first_line, run_script
from ditac_timm.training.flags import parse_export_flags
from ditac_timm.training.refusals import check_export_flags

_logger = logging.getLogger("export")

TOLERANCE = 1e-4  # of a logit, or of the largest one where that is above 1


def main(argv: Sequence[str] | None = None) -> int:
    """Export as the flags say, and return the exit code."""
    return run_script("export.py", export, lambda: parse_export_flags(argv))


def export(args: argparse.Namespace) -> None:
    """Export as parsed flags say."""
    check_export_flags(args)
    if args.model:
        models.check_model_name(args.model)
    file = checkpoints.find_checkpoint(args.checkpoint, "--checkpoint") if args.checkpoint else None
    checkpoint = checkpoints.read_checkpoint(file, "--checkpoint") if file else {}
    model, name = checkpoints.create_model(args, checkpoint, pretrained=args.pretrained)
    if not checkpoint and not args.pretrained:
        _logger.warning("Weights are as initialised: give --checkpoint or --pretrained for others.")
    size = data.resolve_data_config(args, model, checkpoint.get("data_config"))["input_size"]
    images = torch.randn(args.batch_size or 2, *size, generator=torch.Generator().manual_seed(0))
    try:
        exported = to_onnx(model, images, args.opset, dynamic_batch=args.batch_size is None)
    except ImportError as error:
        raise UsageError(f"exporting needs {error.name}: pip install ditac_timm[export]") from error
    except Exception as error:  # of torch's exporter, which meets any architecture's code
        raise RunError(f"{name} cannot be exported: {first_line(error)}") from error
    verify(model, exported, images)
    output = Path(args.output)
    with checkpoints.reported_write_errors(output):
        checkpoints.write_atomically(output, lambda stream: stream.write(exported))
    _logger.info(f"Wrote {output}, {len(exported) / 1e6:.1f} MB: {name}, {'x'.join(map(str, size))}.")


@torch.no_grad()
def verify(model: Any, exported: bytes, images: torch.Tensor) -> None:
    """Compare ONNX Runtime's logits with the model's own, whose activations are not frozen.

    Raises:
        RunError: They are not equal, to `TOLERANCE`.
    """
    try:
        runtime = session(exported)
    except ImportError:
        _logger.warning("Not compared with PyTorch, for that needs onnxruntime: pip install onnxruntime")
        return
    except Exception as error:  # an operator that it does not have, in this version of ONNX
        raise RunError(f"ONNX Runtime does not take the model, try another --opset: {first_line(error)}") from error
    expected = model.eval()(images)
    (logits,) = runtime.run(None, {"images": images.numpy()})
    difference, largest = (torch.from_numpy(logits) - expected).abs().max().item(), expected.abs().max().item()
    print(f"largest difference of a logit between ONNX Runtime and PyTorch: {difference:.2g} of {largest:.2g}")
    if not difference <= TOLERANCE * max(1.0, largest):
        raise RunError(f"ONNX Runtime computes other logits than PyTorch, they differ by {difference:.2g}: not written")


if __name__ == "__main__":
    sys.exit(main())
