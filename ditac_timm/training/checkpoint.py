"""Checkpoints: read with clear refusals, fitted to a model, written so that a crash leaves the previous one whole."""

import argparse
import json
import logging
import math
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from timm.models import clean_state_dict, parse_model_name
from timm.scheduler import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils import NativeScaler, unwrap_model
from torch import nn

from ditac_timm.training.errors import RunError, UsageError, as_typed
from ditac_timm.training.model import (
    as_options,
    build_model,
    check_model_name,
    image_size_argument,
    model_arguments,
)

_logger = logging.getLogger(__name__)

LAST, BEST = "last.pth.tar", "model_best.pth.tar"

# What is read of a checkpoint, each where it is there.
_KINDS = {"state_dict": dict, "state_dict_ema": dict, "model_args": dict, "data_config": dict, "arch": str}


def newest_checkpoint(path: str, flag: str) -> tuple[Path, dict[str, Any]] | None:
    """Find and read what a run resumes from: the file given, or a folder's newest whole checkpoint.

    Returns:
        The file and what `read_checkpoint` makes of it; None for the folder of a run that has written none yet.
    """
    folder = Path(path)
    if not folder.is_dir():
        file = find_checkpoint(path, flag)
        return file, read_checkpoint(file, flag)
    recoveries = sorted(_recoveries(folder), reverse=True)
    best = sorted(((_epoch_of(file), file) for file in folder.glob("checkpoint-*.pth.tar")), reverse=True)
    last = _read_if_whole(folder / LAST, flag)
    done = -1 if last is None else last.get("epoch", -1)
    for epoch, _, file in recoveries:
        if epoch > done and (found := _read_if_whole(file, flag)):
            return file, found
    if last is not None:
        return folder / LAST, last
    for file in (*(file for _, file in best), folder / BEST):
        if found := _read_if_whole(file, flag):
            return file, found
    if not any(folder.glob("*.pth.tar")):
        if (folder / "args.yaml").is_file():
            return None
        raise UsageError(f"{flag} {path}: the folder holds no {LAST}, and is not a run's")
    raise UsageError(f"{flag} {path}: none of the folder's checkpoints is whole")


def _read_if_whole(file: Path, flag: str) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        return read_checkpoint(file, flag)
    except UsageError as error:
        _logger.warning(f"{error}: looking for one before it.")
        return None


def _recoveries(folder: Path) -> list[tuple[int, int, Path]]:
    """Epoch, updates and file of each checkpoint within an epoch."""
    names = ((re.fullmatch(r"recovery-(\d+)-(\d+)\.pth\.tar", file.name), file) for file in folder.iterdir())
    return [(int(name[1]), int(name[2]), file) for name, file in names if name]


def _epoch_of(file: Path) -> int:
    number = file.name.removeprefix("checkpoint-").removesuffix(".pth.tar")
    return int(number) if number.isdecimal() else -1


def find_checkpoint(path: str, flag: str) -> Path:
    """Return the file that a flag names: itself, or the last checkpoint of a run's folder."""
    file = Path(path)
    if file.is_dir():
        file = file / LAST
        if not file.is_file():
            raise UsageError(f"{flag} {path}: the folder holds no {LAST}")
    if not file.is_file():
        raise UsageError(f"{flag} {path} does not exist")
    return file


def read_checkpoint(file: Path, flag: str) -> dict[str, Any]:
    """Read a checkpoint of ours, of timm's script, or bare weights, without running any code it may hold.

    Returns:
        At least `state_dict`, on the CPU and free of wrapper prefixes; what else a run's checkpoint holds is listed in
        `train.py`.
    """
    try:
        if file.suffix == ".safetensors":
            checkpoint: Any = load_file(file)
        else:
            _check_sums(file)
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm's script saves its flags as one
                checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{flag} {file} holds more than tensors and plain values, or is no checkpoint: "
            "it is not loaded, because that could run code"
        ) from error
    except Exception as error:  # bytes that are no checkpoint may break the reader anywhere
        reason = getattr(error, "strerror", None) or "it is damaged, ends too early, or is another kind of file"
        raise UsageError(f"{flag} {file} is not a whole checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise UsageError(f"{flag} {file} holds no weights")
    if "state_dict" not in checkpoint:
        checkpoint = {"state_dict": checkpoint.get("model", checkpoint)}
    for key, kind in _KINDS.items():
        if key in checkpoint and not isinstance(checkpoint[key], kind):
            found = type(checkpoint[key]).__name__
            raise UsageError(f"{flag} {file} is not a checkpoint to use: its {key} is a {found}, not a {kind.__name__}")
    for key in ("state_dict", "state_dict_ema"):
        for name, value in checkpoint.get(key, {}).items():
            if not isinstance(name, str) or not isinstance(value, torch.Tensor):
                raise UsageError(f"{flag} {file} holds no weights")
        if key in checkpoint:
            checkpoint[key] = clean_state_dict(checkpoint[key])
    return checkpoint


def _check_sums(file: Path) -> None:
    """Raise if a part of the file is not what was written: torch's reader does not look at its checksums."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"{damaged} is damaged")


def create_model(args: argparse.Namespace, checkpoint: dict[str, Any], pretrained: bool) -> tuple[Any, str]:
    """Create the model that --checkpoint, --use-ema, --model and the flags about models ask for, with its weights.

    Args:
        args: Parsed flags.
        checkpoint: What `read_checkpoint` returned, or empty where there is none.
        pretrained: Whether, without a checkpoint, to load the model's pretrained weights.

    Returns:
        The model on the CPU, and its name.
    """
    name = args.model or checkpoint.get("arch")
    if name is None:
        raise UsageError(f"--checkpoint {args.checkpoint} does not name its architecture: give --model")
    if not args.model:
        check_model_name(name)
    arguments = {**checkpoint.get("model_args", {}), **model_arguments(args)}
    if not checkpoint:
        arguments |= image_size_argument(name, arguments, args)
        return build_model(name, arguments, pretrained=pretrained), name
    flag = f"--checkpoint {args.checkpoint}"
    check_same_model(checkpoint, flag, name, arguments)
    model = build_model(name, arguments)
    load_weights(model, weights_to_evaluate(checkpoint, args), flag)
    return model, name


def check_same_model(checkpoint: dict[str, Any], flag: str, name: str, arguments: dict[str, Any]) -> None:
    """Refuse a checkpoint of another architecture, or built with other arguments, than the flags ask for."""
    saved = checkpoint.get("arch")
    if saved and parse_model_name(name)[0] is None and _architecture(saved) != _architecture(name):
        raise UsageError(f"{flag} is a checkpoint of {saved} and --model is {name}: give --model {saved}")
    saved_arguments = checkpoint.get("model_args")
    if saved_arguments is None:  # not ours: the weights themselves are compared when they are loaded
        return
    saved_options, options = as_options(saved_arguments), as_options(arguments)
    for option in sorted(saved_options.keys() | options.keys()):
        was, asked = saved_options.get(option), options.get(option)
        # As JSON, because a list and a tuple of the same numbers build the same model.
        if json.dumps(was, default=str) != json.dumps(asked, default=str):
            if was is None:  # the architecture's own
                raise UsageError(f"{flag} is a checkpoint without {option}: leave {option} {as_typed(asked)} out")
            remedy = f"give {option} {as_typed(was)}" if asked is None else f"not {as_typed(asked)}"
            raise UsageError(f"{flag} is a checkpoint with {option} {as_typed(was)}, {remedy}")


def weights_to_evaluate(checkpoint: dict[str, Any], args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """The weights that --checkpoint and --use-ema ask for."""
    if args.use_ema and "state_dict_ema" not in checkpoint:
        raise UsageError(f"--use-ema: {args.checkpoint} holds no averaged weights, train with --model-ema")
    weights = checkpoint["state_dict_ema" if args.use_ema else "state_dict"]
    # --split-bn's extra batch norms serve augmented images in training only.
    return {name: value for name, value in weights.items() if ".aux_bn." not in name}


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], flag: str) -> None:
    """Load weights that fit; refuse others, saying what does not fit. A base's weights fit its DiTAC model."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        own = model.state_dict()
        problems = {
            "missing": [name for name in own if name not in weights],
            "unexpected": [name for name in weights if name not in own],
            "of another shape": [name for name in own if name in weights and own[name].shape != weights[name].shape],
        }
        found = [f"{len(names)} {problem} (first: {names[0]})" for problem, names in problems.items() if names]
        raise UsageError(f"{flag} does not fit --model and --num-classes, tensors are {', '.join(found)}") from error


def check_loaded(model: nn.Module, weights: dict[str, torch.Tensor], flag: str) -> None:
    """Refuse weights of which a model took none: timm, which renames some and leaves some out, would not say so."""
    for own in model.parameters():
        if own.ndim > 1 and own.any() and any(own.shape == w.shape and torch.equal(own, w) for w in weights.values()):
            return
    raise UsageError(f"{flag} does not fit --model, which has taken none of its weights")


class CheckpointSaver:
    """Writes `last`, the best, and the `max_history` best of a run, under timm's names.

    `last.pth.tar` is replaced last, and is what a run resumes from: a crash before that moment repeats the epoch and
    writes the others again.
    """

    def __init__(self, folder: Path, *, decreasing: bool, max_history: int) -> None:
        """Start with nothing written.

        Args:
            folder: The run's folder, which exists.
            decreasing: Whether a smaller metric is better.
            max_history: Best checkpoints to keep as `checkpoint-EPOCH.pth.tar`.
        """
        self.folder = folder
        self.decreasing = decreasing
        self.max_history = max_history
        self.best_metric: float | None = None
        self.best_epoch: int | None = None
        self.history: list[tuple[int, float]] = []  # (epoch, metric), best first

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Go on from the state that `save` put into a checkpoint of the same folder."""
        state = checkpoint.get("saver", {})
        self.best_metric, self.best_epoch = state.get("best_metric"), state.get("best_epoch")
        history = [(epoch, metric) for epoch, metric in state.get("history", [])]
        self.history = [entry for entry in history if self._file(entry[0]).is_file()]

    def save(self, state: dict[str, Any], epoch: int, metric: float) -> None:
        """Write the state of a run after an epoch.

        Raises:
            RunError: If the folder cannot be written. The checkpoints written before are whole.
        """
        done = [file for of, _, file in _recoveries(self.folder) if of <= epoch]
        is_best = math.isfinite(metric) and (self.best_metric is None or self._better(metric, self.best_metric))
        if is_best:
            self.best_metric, self.best_epoch = metric, epoch
        ranked = sorted([*self.history, (epoch, metric)], key=lambda entry: entry[1], reverse=not self.decreasing)
        self.history, dropped = ranked[: self.max_history], ranked[self.max_history :]
        state = {**state, "epoch": epoch, "metric": metric, "saver": self._bookkeeping()}
        new = self.folder / ".new.pth.tar"  # hidden from whoever looks for checkpoints
        with reported_write_errors(self.folder):
            write_atomically(new, lambda file: torch.save(state, file))
            if (epoch, metric) in self.history:
                _link_atomically(new, self._file(epoch))
            if is_best:
                _link_atomically(new, self.folder / BEST)
            os.replace(new, self.folder / LAST)
            _sync_folder(self.folder)
            for file in (*(self._file(old) for old, _ in dropped), *done):
                file.unlink(missing_ok=True)

    def save_within(self, state: dict[str, Any], epoch: int, updates: int) -> Path:
        """Write the state of a run within an epoch, after a number of its updates; the one before is kept, too.

        Raises:
            RunError: As for `save`.
        """
        file = self.folder / f"recovery-{epoch}-{updates}.pth.tar"
        state = {**state, "epoch": epoch, "updates": updates, "saver": self._bookkeeping()}
        with reported_write_errors(self.folder):
            write_atomically(file, lambda stream: torch.save(state, stream))
            for _, _, old in sorted(_recoveries(self.folder))[:-2]:
                old.unlink(missing_ok=True)
        return file

    def _bookkeeping(self) -> dict[str, Any]:
        return {"best_metric": self.best_metric, "best_epoch": self.best_epoch, "history": self.history}

    def _better(self, metric: float, other: float) -> bool:
        return metric < other if self.decreasing else metric > other

    def _file(self, epoch: int) -> Path:
        return self.folder / f"checkpoint-{epoch}.pth.tar"


@contextmanager
def reported_write_errors(path: Path) -> Iterator[None]:
    """Turn a disk that is full or not writable into one sentence."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's writer may hide the former in the latter
        raise RunError(f"cannot write to {path}, what was there before is whole: {error}") from error


def training_state(
    task: TrainingTask,
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler | None,
    loss_scaler: NativeScaler | None,
) -> dict[str, Any]:
    """What a checkpoint holds that changes while training."""
    state = {**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True), "optimizer": optimizer.state_dict()}
    if isinstance(generator := getattr(optimizer, "generator", None), torch.Generator):
        state["optimizer"]["generator"] = generator.get_state()  # adahessian's, which it leaves out itself
    if loss_scaler is not None:
        state[loss_scaler.state_dict_key] = loss_scaler.state_dict()
    if isinstance(scheduler, PlateauLRScheduler):  # timm's other schedules are functions of epoch and update alone
        state["scheduler"] = scheduler.lr_scheduler.state_dict()
    return state


def state_within_epoch(task: TrainingTask, args: argparse.Namespace, losses: torch.Tensor) -> dict[str, Any]:
    """What a checkpoint within an epoch holds besides: what differs between processes until the epoch's end.

    All processes must call this together.

    Returns:
        `losses` and `buffers` (batch norm's statistics), of each rank, and `images_per_update`.
    """
    buffers = [{name: value.cpu() for name, value in _buffers(task, ema).items()} for ema in (False, True)]
    own = {"losses": losses.cpu(), "buffers": buffers}
    ranks = [own]
    if args.distributed:
        ranks = [{} for _ in range(args.world_size)]
        dist.all_gather_object(ranks, own)
    return {"ranks": ranks, "images_per_update": images_per_update(args)}


def restore_within_epoch(
    checkpoint: dict[str, Any], task: TrainingTask, args: argparse.Namespace
) -> torch.Tensor | None:
    """Restore what `state_within_epoch` saved and return this rank's losses; None where an epoch was at its end."""
    if not checkpoint.get("updates"):
        return None
    images, ranks = checkpoint["images_per_update"], checkpoint["ranks"]
    if images != images_per_update(args) or len(ranks) != args.world_size:
        raise UsageError(
            f"--resume {args.resume} is within an epoch of a run of {len(ranks)} processes and {images} images an "
            "update: give the same number of processes, --batch-size and --grad-accum-steps, or resume from an "
            f"epoch's end, {LAST}"
        )
    own = ranks[args.rank]
    for ema, saved in zip((False, True), own["buffers"], strict=True):
        for name, value in _buffers(task, ema).items():
            value.copy_(saved[name])
    return own["losses"]


def images_per_update(args: argparse.Namespace) -> int:
    """Over all processes."""
    return args.batch_size * args.grad_accum_steps * args.world_size


def _buffers(task: TrainingTask, ema: bool) -> dict[str, torch.Tensor]:
    if ema and not task.has_ema():
        return {}
    model: Any = unwrap_model(task.get_trainable_module(ema=ema))
    saved = model.state_dict()
    return {name: value for name, value in model.named_buffers() if name in saved}


def restore_training_state(
    checkpoint: dict[str, Any],
    args: argparse.Namespace,
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler | None,
    loss_scaler: NativeScaler | None,
) -> tuple[int, int]:
    """Restore what `training_state` saved, the weights aside.

    Comes after the schedule's creation, which resets learning rates.

    Returns:
        The epoch to go on with, and how many of its updates are done.
    """
    if not args.no_resume_opt and "optimizer" in checkpoint:
        saved = checkpoint.get("args") or {}
        saved_opt = (saved if isinstance(saved, dict) else vars(saved)).get("opt", args.opt)
        try:
            if saved_opt != args.opt:
                raise ValueError(f"it is of {saved_opt}")
            scales = _lr_scales(optimizer)
            optimizer.load_state_dict(checkpoint["optimizer"])
            if "generator" in checkpoint["optimizer"]:
                generator = torch.Generator(optimizer.param_groups[0]["params"][0].device)
                optimizer.generator = generator.set_state(checkpoint["optimizer"]["generator"])  # type: ignore[attr-defined]
            if _lr_scales(optimizer) != scales:  # which it has taken from the checkpoint
                raise ValueError("it is of another --ditac-lr-scale or --layer-decay")
        except ValueError as error:
            raise UsageError(
                f"--resume: the optimizer's state does not fit --opt {args.opt} ({error}): give the run's "
                "flags, or --no-resume-opt"
            ) from error
        if isinstance(scheduler, PlateauLRScheduler) and "scheduler" in checkpoint:
            scheduler.lr_scheduler.load_state_dict(checkpoint["scheduler"])
        if loss_scaler is not None and loss_scaler.state_dict_key in checkpoint:
            loss_scaler.load_state_dict(checkpoint[loss_scaler.state_dict_key])
    epoch, updates = checkpoint.get("epoch"), checkpoint.get("updates", 0)
    if epoch is None:
        return 0, 0
    return (epoch, updates) if updates else (epoch + 1, 0)


def _lr_scales(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group.get("lr_scale", 1.0) for group in optimizer.param_groups]


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file that is, at every moment, either the old one whole or the new one whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _link_atomically(source: Path, path: Path) -> None:
    """Give a file a second name, or copy it where the file system has no links."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _architecture(name: str) -> str:
    return parse_model_name(name)[1].partition(".")[0]
