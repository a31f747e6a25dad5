"""Where a run computes, and in which precision."""

import argparse
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from timm import utils
from torch.distributed import Store
from torch.distributed.constants import default_pg_timeout

from ditac_timm.training.errors import UsageError

_logger = logging.getLogger(__name__)


def resolve_device(name: str | None) -> str:
    """Return the device asked for, or cuda where there is one, else cpu with a log line."""
    if not name:
        if torch.cuda.is_available():
            return "cuda"
        _logger.info("No CUDA device found: running on the CPU.")
        return "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name} is no device: give cuda or cpu") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: this machine has no CUDA device, give cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return name


_RESTARTED = "restarted://"


def _meet_again(_: str, timeout: timedelta = default_pg_timeout, **keywords: Any) -> Iterator[tuple[Store, int, int]]:
    """Meet as env:// says, in a part of the store of this attempt's own.

    torchrun's agents keep their store over a restart, and in it the addresses of the processes that have died.
    """
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    for store, rank, size in dist.rendezvous("env://", timeout=timeout):
        yield dist.PrefixStore(f"attempt {attempt}", store), rank, size


if dist.is_available():
    dist.register_rendezvous_handler(_RESTARTED.removesuffix("://"), _meet_again)


def init_device(args: argparse.Namespace) -> torch.device:
    """Join the other processes where torchrun started several; seed; set what holds for the whole process.

    Sets `distributed`, `rank`, `world_size`, `local_rank` and `device` of `args`. All ranks but the first log warnings
    only.
    """
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        args.dist_url = _RESTARTED
    device = utils.init_distributed_device(args)
    if not utils.is_primary(args):
        logging.root.setLevel(logging.WARNING)
    if args.distributed:
        _logger.info(f"Running in {args.world_size} processes, one device each; this one on {args.device}.")
    else:
        _logger.info(f"Running in one process on {args.device}.")
    utils.random_seed(args.seed, args.rank)
    return device


@dataclass(frozen=True)
class Precision:
    """The dtypes of a run.

    Attributes:
        device: Where it computes.
        model_dtype: Of weights and images; None for torch's default.
        amp_dtype: Of autocast; None without --amp.
    """

    device: torch.device
    model_dtype: torch.dtype | None
    amp_dtype: torch.dtype | None

    @classmethod
    def from_flags(cls, args: argparse.Namespace, device: torch.device) -> "Precision":
        """Read --amp, --amp-dtype and --model-dtype."""
        model_dtype = getattr(torch, args.model_dtype) if args.model_dtype else None
        amp_dtype = getattr(torch, args.amp_dtype) if args.amp else None
        mode = f"mixed precision, {args.amp_dtype}" if args.amp else f"{model_dtype or torch.float32}"
        _logger.info(f"Computing in {mode}.")
        return cls(device, model_dtype, amp_dtype)

    def autocast(self) -> AbstractContextManager[None]:
        """A context in which the model runs."""
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)

    def loss_scaler(self) -> utils.NativeScaler | None:
        """float16 gradients underflow without scaling, on every device; bfloat16 has float32's range."""
        return utils.NativeScaler(device=self.device.type) if self.amp_dtype == torch.float16 else None
