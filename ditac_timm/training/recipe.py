"""The loss, the optimizer and the schedule that flags ask for."""

import argparse
import logging
from typing import Any

import torch
from timm.loss import create_classification_loss
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from torch import nn

from ditac_timm.training.errors import UsageError, first_line
from ditac_timm.training.model import ditac_layers
from ditac_timm.training.refusals import mixup_is_on

_logger = logging.getLogger(__name__)


def create_loss(args: argparse.Namespace) -> nn.Module:
    """The training loss: cross entropy unless flags name another, for the targets that mixup leaves."""
    bce: dict[str, Any] = {}
    if args.bce_loss:
        bce = {
            "bce_target_thresh": args.bce_target_thresh,
            "bce_sum": args.bce_sum,
            "pos_weight": args.bce_pos_weight,
        }
    return create_classification_loss(
        loss_type="jsd" if args.jsd_loss else "bce" if args.bce_loss else "ce",
        smoothing=args.smoothing,
        soft_targets=mixup_is_on(args),
        jsd_splits=args.aug_splits,
        **bce,
    )


def create_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a model that is not wrapped; sets `args.lr` from --lr-base where it is not given."""
    if not args.lr:
        args.lr = base_lr(args)
        _logger.info(f"Learning rate {args.lr:g}, from --lr-base {args.lr_base:g}.")
    try:
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--opt {args.opt} does not take these --opt-* flags or --opt-kwargs: {error}") from error
    except (AssertionError, ImportError) as error:  # of another package (bitsandbytes, apex), which may need a GPU
        raise UsageError(f"--opt {args.opt} does not run here: {first_line(error)}") from error
    if args.ditac_lr_scale != 1:
        scale_theta_lr(optimizer, model, args.ditac_lr_scale)
    return optimizer


def scale_theta_lr(optimizer: torch.optim.Optimizer, model: nn.Module, scale: float) -> None:
    """Give thetas parameter groups of their own, whose `lr_scale` timm's schedules multiply learning rates by.

    In the finished optimizer, so that thetas keep whatever else timm decided for their group: the weight decay, the
    layer's own scale, a hybrid optimizer's fallback.
    """
    thetas = {id(layer.theta) for layer in ditac_layers(model, "--ditac-lr-scale")}
    for group in list(optimizer.param_groups):
        ours = [parameter for parameter in group["params"] if id(parameter) in thetas]
        others = [parameter for parameter in group["params"] if id(parameter) not in thetas]
        scaled = {**group, "params": ours, "lr_scale": group.get("lr_scale", 1.0) * scale}
        if ours and others:
            group["params"] = others
            optimizer.add_param_group(scaled)
        elif ours:
            group.update(scaled)


def base_lr(args: argparse.Namespace) -> float:
    """The learning rate of --lr-base, scaled to the images of one update."""
    ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
    adaptive = any(name in args.opt.lower() for name in ("ada", "lamb"))
    scale = args.lr_base_scale or ("sqrt" if adaptive else "linear")
    return args.lr_base * (ratio**0.5 if scale == "sqrt" else ratio)


def create_scheduler(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int
) -> tuple[Scheduler | None, int]:
    """The learning rate schedule, None for --sched none, and the number of epochs with cycles, warmup and cooldown."""
    kwargs = scheduler_kwargs(args, decreasing_metric=metric_decreases(args))
    try:
        return create_scheduler_v2(optimizer, **kwargs, updates_per_epoch=updates_per_epoch)
    except ValueError as error:
        raise UsageError(f"--sched {args.sched}: {error}") from error


def best_metric_name(args: argparse.Namespace) -> str:
    """What makes a checkpoint the best: --eval-metric, or the training loss where nothing is validated."""
    return args.eval_metric if args.val_split else "loss"


def metric_decreases(args: argparse.Namespace) -> bool:
    """Whether less of `best_metric_name` is better."""
    return best_metric_name(args) == "loss"
