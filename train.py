#!/usr/bin/env python3
"""Train a timm model, with DiTAC or without, on images: timm's flags, timm's recipes, timm's file names.

    python train.py --data-dir /data/imagenet --model mobilenetv3_ditac --epochs 100
    torchrun --nproc-per-node 8 train.py -c recipe.yaml --data-dir /data/imagenet
    python train.py -c output/train/RUN/args.yaml --resume output/train/RUN

A run's folder, OUTPUT/EXPERIMENT, holds args.yaml (the flags, for -c), summary.csv (a line an epoch), last.pth.tar,
model_best.pth.tar, the best checkpoint-EPOCH.pth.tar and, within an epoch, the latest recovery-EPOCH-UPDATES.pth.tar;
of a model with DiTAC also activations.csv (a line an epoch and layer) and activations.png. --resume FOLDER goes on from
the newest whole checkpoint, bit for bit, and so does a run that torchrun restarts. SIGTERM and SIGINT end a run after
the update at hand, with its state saved and exit code 75. A checkpoint is a dict of tensors and plain values, which
torch.load reads with weights_only=True:

    arch, model_args        create_model(arch, **model_args) rebuilds the model
    state_dict              its weights; with --model-ema also state_dict_ema, their average
    num_classes             as in model_args
    data_config             how images are prepared: input_size, mean, std, interpolation, crop_pct, crop_mode
    epoch, metric, saver    the epoch just finished, its metric, the best ones of the run
    task_state              the projection that --kd-distill-type feature may train; task_state_ema, its average
    optimizer, scheduler, amp_scaler, args, version
    updates, ranks          of a recovery checkpoint: updates done in its epoch, and what differs between processes
"""

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from timm import utils
from timm.layers import set_fast_norm
from timm.models import safe_model_name
from timm.task import TrainingTask
from torch import nn

from ditac_timm.training import checkpoint as checkpoints
from ditac_timm.training import data, distillation, splits
from ditac_timm.training import model as models
from ditac_timm.training.activations import ActivationStatistics
from ditac_timm.training.device import Precision, init_device, resolve_device
from ditac_timm.training.errors import RunError, UsageError, run_script
from ditac_timm.training.flags import parse_train_flags
from ditac_timm.training.interruption import Interruption, ignore_in_workers
from ditac_timm.training.loop import updates_per_epoch
from ditac_timm.training.recipe import (
    best_metric_name,
    create_loss,
    create_optimizer,
    create_scheduler,
    metric_decreases,
)
from ditac_timm.training.refusals import check_train_flags
from ditac_timm.training.regularisation import smoothness_term
from ditac_timm.training.run import Run
from ditac_timm.training.watch import Watch

_logger = logging.getLogger("train")


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the flags say, print the best epochs as JSON, and return the exit code."""
    return run_script("train.py", train, lambda: parse_train_flags(argv))


def train(args: argparse.Namespace) -> None:
    """Refuse what is cheaply known to fail; then train, in one process or as one of several."""
    flags = dict(vars(args))  # as given, before values are filled in
    args.device = resolve_device(args.device)
    check_train_flags(args)
    if args.resume:  # replaces the weights that the run started from, which its args.yaml names
        args.pretrained, args.pretrained_path, args.initial_checkpoint = False, None, ""
    models.check_model_name(args.model)
    if args.kd_model_name is not None:
        models.check_model_name(args.kd_model_name, "--kd-model-name")
    splits.check_data_dir(args)
    resume_restarted(args)
    if args.resume and not os.path.exists(args.resume):
        raise UsageError(f"--resume {args.resume} does not exist")
    if args.experiment and not args.resume and (_runs(args) / args.experiment / checkpoints.LAST).exists():
        raise UsageError(f"--experiment {args.experiment} is a run in {_runs(args)}: --resume it, or name another")
    device = init_device(args)
    interruption = Interruption(args.distributed)
    try:
        with interruption.listening():
            _run(args, flags, Precision.from_flags(args, device), interruption)
    except RuntimeError as error:
        if args.distributed and re.search("Connection (closed|reset) by peer", str(error)):
            raise RunError("another process of the run has ended: what it said, or torchrun, tells why") from error
        raise
    finally:
        if args.distributed:
            torch.distributed.destroy_process_group()


def _run(args: argparse.Namespace, flags: dict[str, Any], precision: Precision, interruption: Interruption) -> None:
    run = build_run(args, flags, precision, interruption)
    _logger.info(f"Training from epoch {run.start_epoch} up to {run.epochs}, checkpoints in {run.folder}.")
    results = run.train()
    if run.saver is not None:
        name = best_metric_name(args)
        _logger.info(f"*** Best {name}: {run.saver.best_metric} (epoch {run.saver.best_epoch})")
        ranked = sorted(
            results,
            key=lambda result: result.get("validation", result["train"])[name],
            reverse=not metric_decreases(args),
        )
        print(f"--result\n{json.dumps(ranked[:10], indent=4)}")


def build_run(args: argparse.Namespace, flags: dict[str, Any], precision: Precision, interruption: Interruption) -> Run:
    """Build all that takes part in training, in the state of the checkpoint that --resume finds.

    Args:
        args: The flags.
        flags: As given, to be written to args.yaml.
        precision: Device and dtypes.
        interruption: Whether a signal asks to stop.
    """
    found = checkpoints.newest_checkpoint(args.resume, "--resume") if args.resume else None
    resume_file, resumed = found or (None, {})
    if args.resume:
        _logger.info(
            f"Resuming from {resume_file}." if found else f"{args.resume} has no checkpoint yet: starting over."
        )
    model, rebuild = create_model(args, resumed)
    config = data.resolve_data_config(args, model)
    teacher = distillation.create_teacher(args, model, config, precision)
    num_classes = model.num_classes
    train_loader, eval_loader, mixup = data.create_loaders(args, config, precision, num_classes)
    if args.recovery_interval and data.is_iterable(train_loader):
        raise UsageError("--recovery-interval: iterable data resumes at the ends of epochs only, leave it out")
    for loader in (train_loader, eval_loader):
        if loader is not None:
            ignore_in_workers(loader)

    model = models.place(model, args, precision)
    if resumed:  # only now, because --split-bn adds layers
        checkpoints.load_weights(model, resumed["state_dict"], f"--resume {args.resume}")
    regulariser = smoothness_term(model, args.ditac_reg)
    task = create_task(args, model, precision, resumed, teacher)
    # Of the task's own module, which may train more than the model; bare, because parameters are grouped by name.
    optimizer = create_optimizer(args, utils.unwrap_model(task.get_trainable_module()))
    loss_scaler = precision.loss_scaler()
    updates = updates_per_epoch(train_loader, args)
    scheduler, epochs = create_scheduler(args, optimizer, updates)
    start_epoch, first_update = checkpoints.restore_training_state(resumed, args, optimizer, scheduler, loss_scaler)
    past_losses = checkpoints.restore_within_epoch(resumed, task, args)
    if args.start_epoch is not None:
        start_epoch, first_update, past_losses = args.start_epoch, 0, None
    if scheduler is not None and (start_epoch > 0 or first_update > 0):
        scheduler.step(start_epoch)
        scheduler.step_update(start_epoch * updates + first_update)

    folder = run_folder(args, config, resume_file)
    saver = create_saver(args, flags, folder, start_epoch) if utils.is_primary(args) else None
    if saver is not None and resume_file is not None and resume_file.parent.resolve() == folder.resolve():
        saver.restore(resumed)
    return Run(
        args=args,
        precision=precision,
        task=task,
        train_loader=train_loader,
        eval_loader=eval_loader,
        mixup=mixup,
        regulariser=regulariser,
        optimizer=optimizer,
        scheduler=scheduler,
        loss_scaler=loss_scaler,
        epochs=epochs,
        start_epoch=start_epoch,
        first_update=first_update,
        past_losses=past_losses,
        folder=folder,
        saver=saver,
        constants={**rebuild, "num_classes": num_classes, "data_config": config, "args": flags, "version": 2},
        activations=ActivationStatistics(task, args, precision, folder, start_epoch),
        watch=Watch(args, flags, folder, start_epoch),
        interruption=interruption,
    )


def create_saver(
    args: argparse.Namespace, flags: dict[str, Any], folder: Path, start_epoch: int
) -> checkpoints.CheckpointSaver:
    """Open a run's folder: write its args.yaml, and drop what its summary.csv says of epochs to come."""
    with checkpoints.reported_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        flags_text = yaml.safe_dump(flags, default_flow_style=False)
        checkpoints.write_atomically(folder / "args.yaml", lambda file: file.write(flags_text.encode()))
        utils.trim_summary(folder / "summary.csv", start_epoch)
    return checkpoints.CheckpointSaver(folder, decreasing=metric_decreases(args), max_history=args.checkpoint_hist)


def create_model(args: argparse.Namespace, resumed: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Create the model the flags ask for; if it is to resume, only where the checkpoint is of the same model.

    Returns:
        The model on the CPU, and the `arch` and `model_args` that rebuild it.
    """
    if args.fast_norm:
        set_fast_norm()
    arguments = models.model_arguments(args)
    arguments |= models.image_size_argument(args.model, arguments, args)
    pretrained_path, pretrained = None, {}
    if args.pretrained_path:
        pretrained_path = checkpoints.find_checkpoint(args.pretrained_path, "--pretrained-path")
        pretrained = checkpoints.read_checkpoint(pretrained_path, "--pretrained-path")
    model = models.build_model(
        args.model,
        arguments,
        pretrained=args.pretrained,
        pretrained_path=pretrained_path,
        **models.regularisation_arguments(args),
    )
    if pretrained:
        weights = pretrained.get("state_dict_ema", pretrained["state_dict"])
        checkpoints.check_loaded(model, weights, f"--pretrained-path {pretrained_path}")
    arch, arguments = models.source_of(model, args.model, arguments)
    arguments = {**arguments, "num_classes": model.num_classes}
    if args.initial_checkpoint:
        file = checkpoints.find_checkpoint(args.initial_checkpoint, "--initial-checkpoint")
        initial = checkpoints.read_checkpoint(file, "--initial-checkpoint")
        checkpoints.load_weights(model, initial.get("state_dict_ema", initial["state_dict"]), "--initial-checkpoint")
    models.init_head(model, args)
    if resumed:
        checkpoints.check_same_model(resumed, f"--resume {args.resume}", arch, arguments)
    if args.grad_checkpointing:
        models.enable_grad_checkpointing(model)
    _logger.info(f"Model {args.model}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters.")
    return model, {"arch": arch, "model_args": arguments}


def create_task(
    args: argparse.Namespace,
    model: nn.Module,
    precision: Precision,
    resumed: dict[str, Any],
    teacher: distillation.Teacher | None = None,
) -> TrainingTask:
    """Join model and loss; average, compile and distribute the model as the flags say, in the order that needs."""
    task = distillation.create_training_task(args, model, create_loss(args), teacher, precision)
    distillation.restore_task_state(task, resumed)
    if "state_dict_ema" in resumed and not args.model_ema:
        raise UsageError(f"--resume {args.resume} holds averaged weights, which would be lost: give --model-ema")
    if args.model_ema:
        task.setup_ema(
            args.model_ema_decay,
            args.model_ema_warmup,
            torch.device("cpu") if args.model_ema_force_cpu else None,
        )
        if "state_dict_ema" in resumed:
            task.load_checkpoint_state(resumed["state_dict_ema"], ema=True)
            distillation.restore_task_state(task, resumed, ema=True)
    if args.torchcompile:
        task.compile(args.torchcompile, args.torchcompile_mode)
        task.compile_ema(args.torchcompile, args.torchcompile_mode)
    if args.distributed:
        device_ids = [precision.device] if precision.device.type == "cuda" else None
        task.prepare_distributed(device_ids, broadcast_buffers=not args.no_ddp_bb)
    return task


def resume_restarted(args: argparse.Namespace) -> None:
    """Where torchrun has restarted the run (--max-restarts), go on from what it had written."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0:
        return
    if not args.experiment:
        raise UsageError("a restarted run can only go on in a folder that has a name: give --experiment")
    if (_runs(args) / args.experiment / "args.yaml").is_file():
        args.resume = str(_runs(args) / args.experiment)


def run_folder(args: argparse.Namespace, config: dict[str, Any], resume_file: Path | None) -> Path:
    """Where a run is written: --experiment in --output; a resumed run's own folder if neither is given."""
    if args.resume and not args.experiment:
        return Path(args.resume) if resume_file is None else resume_file.parent
    name = args.experiment or "-".join(
        (f"{datetime.now():%Y%m%d-%H%M%S}", safe_model_name(args.model), str(config["input_size"][-1]))
    )
    return _runs(args) / name


def _runs(args: argparse.Namespace) -> Path:
    return Path(args.output or os.path.join("output", "train"))


if __name__ == "__main__":
    sys.exit(main())
