"""One epoch of training, and one evaluation."""

import argparse
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask, evaluation_sample_limit
from timm.task.evaluator import ClassificationEvaluator
from timm.utils import AverageMeter, NativeScaler, dispatch_clip_grad, distribute_bn
from torch import nn

from ditac_timm import DiTAC
from ditac_timm.training.device import Precision
from ditac_timm.training.diagnosis import not_finite
from ditac_timm.training.errors import DataLostError, RunError, first_line
from ditac_timm.training.images import UnreadableDataError
from ditac_timm.training.interruption import hear_of_dead_workers_when_fetching
from ditac_timm.training.progress import progress_bar
from ditac_timm.training.randomness import seed_step

_logger = logging.getLogger(__name__)

_REMEDY = "lower --lr, clip with --clip-grad, or use --amp-dtype bfloat16"


class LossMeter:
    """Running mean of the training loss, kept on the device so that no step waits for it.

    A loss that is not finite is counted and left out of the mean.
    """

    def __init__(self, device: torch.device, distributed: bool) -> None:
        """Start at no loss.

        Args:
            device: Where losses are computed.
            distributed: Whether to sum over processes when read; then all must read together.
        """
        dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        # Sum, samples, latest loss; of the losses that are not finite: how many since the last read, how many in a row
        # now, and the most in a row since the last read.
        self._sums = torch.zeros(3, dtype=dtype, device=device)
        self._not_finite = torch.zeros(3, dtype=torch.int64, device=device)
        self._distributed = distributed
        self._since_read = 0

    def update(self, loss: torch.Tensor, samples: int) -> None:
        """Add the mean loss of a number of samples."""
        loss = loss.detach().to(self._sums.dtype)
        finite = loss.isfinite()
        self._sums[:2] += torch.stack((torch.where(finite, loss * samples, 0.0), finite * samples))
        self._sums[2] = loss
        count, row, longest = self._not_finite
        row = torch.where(finite, 0, row + 1)
        self._not_finite = torch.stack((count + ~finite, row, torch.maximum(row, longest)))
        self._since_read += 1

    def read(self) -> "Losses":
        """Return what was counted."""
        sums, not_finite, processes = self._sums.clone(), self._not_finite.clone(), 1
        if self._distributed:
            processes = dist.get_world_size()
            dist.all_reduce(sums)
            dist.all_reduce(not_finite[:1])
            dist.all_reduce(not_finite[1:], dist.ReduceOp.MAX)
        total, samples, latest = sums.tolist()
        count, _, longest = not_finite.tolist()
        since_read, self._since_read = self._since_read * processes, 0
        self._not_finite[0] = 0
        self._not_finite[2] = self._not_finite[1]
        return Losses(latest / processes, total / samples if samples else math.nan, count, longest, since_read)

    def state(self) -> torch.Tensor:
        """This process' sums, for a run that goes on from here."""
        return torch.cat((self._sums, self._not_finite.to(self._sums.dtype)))

    def restore(self, state: torch.Tensor) -> None:
        """Go on from another meter's `state`."""
        self._sums = state[:3].to(self._sums)
        self._not_finite = state[3:].to(self._not_finite)


class Losses(NamedTuple):
    """What a `LossMeter` counted: the mean is an epoch's, the rest is since the last read, `longest` in a row."""

    latest: float
    mean: float
    not_finite: int
    longest: int
    read: int


def updates_per_epoch(loader: Any, args: argparse.Namespace) -> int:
    """How often an epoch changes the weights; its last update may be of fewer batches."""
    return math.ceil(len(loader) / args.grad_accum_steps)


def train_one_epoch(
    task: TrainingTask,
    loader: Any,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    args: argparse.Namespace,
    precision: Precision,
    *,
    loss_scaler: NativeScaler | None = None,
    scheduler: Scheduler | None = None,
    mixup: Mixup | None = None,
    regulariser: Callable[[], torch.Tensor] | None = None,
    first_update: int = 0,
    losses: LossMeter | None = None,
    after_update: Callable[[int], None] = lambda updates: None,
    settle_gradients: bool = False,
) -> OrderedDict[str, float]:
    """Train for one epoch, or what is left of it, and return its mean loss.

    Args:
        regulariser: Gives a term that is added to the loss of an update, and not to the mean.
        first_update: Updates of the epoch done before; the loader begins with the batches of the next.
        losses: Their losses.
        after_update: Called with the number of updates done in the epoch.
        settle_gradients: Whether to `settle_layout` with the first batch.

    Raises:
        DataLostError: The loader fails.
        RunError: At a log interval, if more than --nan-patience losses in a row were not finite. With loss scaling,
            which skips a step whose gradients overflow, only if all of the interval's are.
    """
    model: Any = task.get_trainable_module()
    model.train()
    clipped = None if args.clip_grad is None else clipped_parameters(task, args.clip_mode)
    second_order = getattr(optimizer, "is_second_order", False)
    batches, accumulate = len(loader), args.grad_accum_steps
    updates = updates_per_epoch(loader, args)
    update = epoch * updates + first_update
    in_last_update = batches - (batches - 1) // accumulate * accumulate  # batches; fewer where they do not divide
    losses = LossMeter(precision.device, args.distributed) if losses is None else losses
    update_time, data_time = AverageMeter(), AverageMeter()
    logged_updates, waited, samples = first_update, 0.0, 0
    interval_start = data_start = time.perf_counter()
    optimizer.zero_grad()
    first = first_update * accumulate
    left = fetched(loader) if first < batches else ()
    with progress_bar(left, f"Epoch {epoch}", args, total=batches, done=first) as shown:
        for index, (images, target) in enumerate(shown, first):
            seed_step(args.seed, args.rank, epoch, index, precision.device)
            last = index == batches - 1
            need_update = last or (index + 1) % accumulate == 0
            divisor = in_last_update if index >= batches - in_last_update else accumulate
            images = images.to(precision.device, precision.model_dtype)
            target = target.to(precision.device)
            if mixup is not None:
                images, target = mixup(images, target)
            if args.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            waited += time.perf_counter() - data_start
            if settle_gradients and index == first:
                settle_layout(task, images, target, precision, regulariser)
                seed_step(args.seed, args.rank, epoch, index, precision.device)

            with nullcontext() if need_update else task.no_sync():
                with precision.autocast():
                    loss = task(images, target)["loss"]
                share = loss / divisor
                if regulariser is not None and need_update:  # once an update; alike in all processes, whose mean counts
                    share = share + regulariser()
                _backward_and_step(share, clipped, optimizer, args, loss_scaler, second_order, need_update)
            losses.update(loss, len(images))
            samples += len(images) * args.world_size
            if not need_update:
                data_start = time.perf_counter()
                continue

            update += 1
            in_epoch = update - epoch * updates
            optimizer.zero_grad()
            task.update_ema(step=update)
            if (in_epoch - 1) % args.log_interval == 0 or last:
                counted = losses.read()
                if counted.not_finite and (
                    counted.not_finite == counted.read if loss_scaler else counted.longest > args.nan_patience
                ):
                    raise RunError(
                        f"the loss is not finite in {counted.not_finite} of the last {counted.read} batches up to "
                        f"update {in_epoch} of epoch {epoch}, "
                        f"{not_finite(model, images, precision.autocast())}: {_REMEDY}"
                    )
                done = in_epoch - logged_updates
                interval = time.perf_counter() - interval_start
                update_time.update(interval / done, done)
                data_time.update(waited / done, done)
                per_update = samples / done
                _logger.info(
                    f"Train: {epoch} [{in_epoch - 1:>4d}/{updates} ({100 * in_epoch / updates:>3.0f}%)]  "
                    f"Loss: {counted.latest:#.3g} ({counted.mean:#.3g})  "
                    f"Time: {update_time.val:.3f}s, {per_update / update_time.val:>7.2f}/s  "
                    f"({update_time.avg:.3f}s, {per_update / update_time.avg:>7.2f}/s)  "
                    f"LR: {mean_lr(optimizer):.3e}  "
                    f"Data: {data_time.val:.3f} ({data_time.avg:.3f})"
                )
                logged_updates, waited, samples = in_epoch, 0.0, 0
                interval_start = time.perf_counter()
            if scheduler is not None:
                scheduler.step_update(num_updates=update)
            after_update(in_epoch)
            data_start = time.perf_counter()
    if hasattr(optimizer, "sync_lookahead"):
        optimizer.sync_lookahead()
    return OrderedDict(loss=losses.read().mean)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Any,
    args: argparse.Namespace,
    precision: Precision,
    *,
    log_interval: int,
    log_suffix: str = "",
    after_batch: Callable[[], None] = lambda: None,
) -> OrderedDict[str, float]:
    """Return loss, top1 and top5 of a model over a whole split.

    Top-1 and top-5 are percentages of integer counts, summed over processes without the samples that pad them: they
    do not depend on the batch size or on the number of processes. `after_batch` is called after each.

    Raises:
        DataLostError: The loader fails.
    """
    model.eval()
    evaluator = ClassificationEvaluator(precision.device, max_samples=evaluation_sample_limit(loader))
    batch_time = AverageMeter()
    last, logged, start = len(loader) - 1, -1, time.perf_counter()
    with progress_bar(fetched(loader), f"Test{log_suffix}", args, total=len(loader)) as batches:
        for index, (images, target) in enumerate(batches):
            images = images.to(precision.device, precision.model_dtype)
            if args.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with precision.autocast():
                output = model(images)
            evaluator.update(output[0] if isinstance(output, tuple | list) else output, target.to(precision.device))
            if index % log_interval == 0 or index == last:
                running = evaluator.summary()
                batch_time.update((time.perf_counter() - start) / (index - logged), index - logged)
                logged, start = index, time.perf_counter()
                _logger.info(
                    f"Test{log_suffix}: [{index:>4d}/{last}]  "
                    f"Time: {batch_time.val:.3f} ({batch_time.avg:.3f})  "
                    f"Loss: {running['loss']:>6.3f}  Acc@1: {running['top1']:>7.3f}  Acc@5: {running['top5']:>7.3f}"
                )
            after_batch()
    return evaluator.compute(distributed=args.distributed)


def evaluate_task(
    task: TrainingTask,
    loader: Any,
    args: argparse.Namespace,
    precision: Precision,
    epoch: int,
    *,
    after_batch: Callable[[], None] = lambda: None,
) -> OrderedDict[str, float]:
    """Evaluate a task's model, and the averaged weights where there are any, whose metrics then count.

    Raises:
        RunError: If the loss is not finite.
    """
    # Not through DDP, whose forward waits for all ranks: their last batches may differ in number.
    model: Any = task.get_eval_model()
    model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    options: Any = {"log_interval": args.log_interval, "after_batch": after_batch}
    metrics = evaluate(model, loader, args, precision, **options)
    if args.model_ema and not args.model_ema_force_cpu:
        model = task.get_eval_model(ema=True)
        metrics = evaluate(model, loader, args, precision, log_suffix=" (EMA)", **options)
    if not math.isfinite(metrics["loss"]):
        raise RunError(f"the validation loss after epoch {epoch} is not finite: {_REMEDY}")
    return metrics


def share_batch_norm(task: TrainingTask, args: argparse.Namespace) -> None:
    """Give all processes the same batch norm statistics, so that they evaluate, and save, the same model."""
    if not args.distributed or (not args.dist_bn and args.no_ddp_bb):
        return
    reduce = args.dist_bn == "reduce" and not args.sync_bn
    distribute_bn(task.get_trainable_module(), args.world_size, reduce)
    if args.model_ema and not args.model_ema_force_cpu:
        distribute_bn(task.get_trainable_module(ema=True), args.world_size, reduce)


def fetched(loader: Any) -> Iterator[Any]:
    """Iterate a loader, whose own failures become a `DataLostError`, and come only where a batch is fetched."""
    try:
        for index, batch in enumerate(loader):
            if index == 0:  # torch sets its handler with the first processes
                hear_of_dead_workers_when_fetching()
            yield batch
    except UnreadableDataError:
        raise
    except (RuntimeError, ConnectionError, EOFError) as error:  # the latter two if it died while it sent a batch
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise DataLostError(
            f"a process that loads data has ended ({first_line(error)}): out of memory? Give fewer --workers"
        ) from error


def settle_layout(
    task: TrainingTask,
    images: torch.Tensor,
    target: torch.Tensor,
    precision: Precision,
    regulariser: Callable[[], torch.Tensor] | None,
) -> None:
    """Have DDP lay out gradients as it has done in a run that is not resumed: in the order in which they arrive.

    It changes from the order of parameters to that one after the first backward pass, and with it, between three
    processes and more, the order in which gradients are summed. So one pass is made that nothing else remembers.
    """
    module: Any = task.get_trainable_module()
    before = {name: value.clone() for name, value in module.named_buffers()}
    with precision.autocast():
        loss = task(images, target)["loss"]
    (loss if regulariser is None else loss + regulariser()).backward()
    for parameter in module.parameters():
        parameter.grad = None
    with torch.no_grad():
        for name, value in module.named_buffers():
            value.copy_(before[name])


def clipped_parameters(task: TrainingTask, mode: str) -> list[nn.Parameter]:
    """The parameters whose gradients are clipped.

    Adaptive clipping leaves the head alone, as its authors do, and DiTAC: it clips to a share of a parameter's norm,
    and theta's is 0, or next to it, where it starts as GELU.
    """
    adaptive = mode == "agc"
    parameters = task.get_clip_parameters(exclude_head=adaptive)
    model: Any = task.get_trainable_module()
    modules = [module for module in model.modules() if isinstance(module, DiTAC)] if adaptive else []
    exempt = {id(parameter) for module in modules for parameter in module.parameters()}
    return [parameter for parameter in parameters if id(parameter) not in exempt]


def mean_lr(optimizer: torch.optim.Optimizer) -> float:
    """The mean learning rate of an optimizer's parameter groups."""
    return sum(group["lr"] for group in optimizer.param_groups) / len(optimizer.param_groups)


def _backward_and_step(
    loss: torch.Tensor,
    clipped: list[nn.Parameter] | None,
    optimizer: torch.optim.Optimizer,
    args: argparse.Namespace,
    loss_scaler: NativeScaler | None,
    second_order: bool,
    need_update: bool,
) -> None:
    if loss_scaler is not None:
        loss_scaler(
            loss,
            optimizer,
            clip_grad=args.clip_grad,
            clip_mode=args.clip_mode,
            parameters=clipped,
            create_graph=second_order,
            need_update=need_update,
        )
        return
    loss.backward(create_graph=second_order)
    if need_update:
        if clipped is not None:
            dispatch_clip_grad(clipped, args.clip_grad, mode=args.clip_mode)
        optimizer.step()
