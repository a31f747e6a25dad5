"""A model as ONNX, of standard operators only."""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import timm.utils
import torch
from torch import Tensor, nn

__all__ = ["session", "to_onnx"]


def to_onnx(model: nn.Module, images: Tensor, opset: int | None = None, dynamic_batch: bool = True) -> bytes:
    """Freeze a copy of a model for deployment, and export it.

    Args:
        model: Any model on the CPU; every DiTAC in it is frozen, and what else timm knows how to fuse.
        images: `(batch, channels, height, width)`, of the sizes to export for.
        opset: Version of ONNX's operators; the exporter's own if None.
        dynamic_batch: Whether the batch is of any size, not that of `images`.

    Returns:
        A serialised ONNX model, from the input `images` to the output `logits`.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        RuntimeError: torch cannot export the architecture, or the model is larger than the 2 GB of a file of ONNX.
    """
    frozen = timm.utils.reparameterize_model(copy.deepcopy(model).eval())
    if dynamic_batch and len(images) < 2:  # an axis of length 1 would be taken for a constant
        images = torch.cat((images, images))
    with _silent():
        program = torch.onnx.export(
            frozen,
            (images,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            opset_version=opset,
            dynamic_shapes=({0: torch.export.Dim("batch")},) if dynamic_batch else None,
        )
    assert program is not None
    try:
        return program.model_proto.SerializeToString()
    except ValueError as error:  # of protobuf
        raise RuntimeError("the model is larger than the 2 GB that a file of ONNX holds") from error


def session(model: bytes, threads: int = 0) -> Any:
    """ONNX Runtime's session on the CPU, with so many threads, or as many as there are cores; raises ImportError."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The exporter says much that a caller can do nothing about."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
