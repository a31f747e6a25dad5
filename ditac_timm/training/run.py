"""A run: its epochs, what it writes of them, and how it ends early."""

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from timm import utils
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask

from ditac_timm.training import checkpoint as checkpoints
from ditac_timm.training import data
from ditac_timm.training.activations import ActivationStatistics
from ditac_timm.training.device import Precision
from ditac_timm.training.errors import DataLostError, Interrupted
from ditac_timm.training.interruption import Interruption
from ditac_timm.training.loop import (
    LossMeter,
    evaluate_task,
    mean_lr,
    share_batch_norm,
    train_one_epoch,
    updates_per_epoch,
)
from ditac_timm.training.randomness import seed_all
from ditac_timm.training.recipe import best_metric_name
from ditac_timm.training.refusals import mixup_is_on
from ditac_timm.training.watch import Watch

__all__ = ["Run"]

_logger = logging.getLogger(__name__)


@dataclass
class Run:
    """All that takes part in training, built or restored.

    Attributes:
        args: The flags.
        precision: Device and dtypes.
        task: The model and its loss.
        train_loader: Of the training split.
        eval_loader: Of the validation split; None where there is none.
        mixup: What the loader does not mix itself.
        regulariser: A term of every update's loss.
        optimizer: Of the task.
        scheduler: Its learning rates; None where they stay.
        loss_scaler: With --amp-dtype float16.
        epochs: How many the whole run has.
        start_epoch: The first to come.
        first_update: Its updates that are done.
        past_losses: Their `LossMeter.state`.
        folder: Where it is written.
        saver: In the first process only.
        constants: What every checkpoint holds that does not change.
        activations: The statistics of DiTAC layers.
        watch: Who watches.
        interruption: Whether a signal asks to stop.
    """

    args: argparse.Namespace
    precision: Precision
    task: TrainingTask
    train_loader: Any
    eval_loader: Any
    mixup: Mixup | None
    regulariser: Callable[[], torch.Tensor] | None
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler | None
    loss_scaler: utils.NativeScaler | None
    epochs: int
    start_epoch: int
    first_update: int
    past_losses: torch.Tensor | None
    folder: Path
    saver: checkpoints.CheckpointSaver | None
    constants: dict[str, Any]
    activations: ActivationStatistics
    watch: Watch
    interruption: Interruption

    def __post_init__(self) -> None:
        self.updates_per_epoch = updates_per_epoch(self.train_loader, self.args)
        self._updates = self.first_update  # done in the epoch at hand
        # From three processes on, sums depend on how DDP lays out gradients, which it does once the first are there.
        self._settle = self.args.world_size > 2 and (self.start_epoch > 0 or self.first_update > 0)

    def train(self) -> list[dict[str, Any]]:
        """Train the epochs that are left, and return the metrics of those that were validated.

        Raises:
            Interrupted: A signal asked to stop.
            DataLostError: Images cannot be read any more.
        """
        results: list[dict[str, Any]] = []
        for epoch in range(self.start_epoch, self.epochs):
            losses = self._begin(epoch)
            try:
                train_metrics = self._train_epoch(epoch, losses)
                eval_metrics = self._evaluate(epoch, losses) if self._validates(epoch) else None
            except DataLostError as error:
                raise self._with_state_saved(error, epoch, losses) from error
            self.first_update, self.past_losses = 0, None
            if self._validates(epoch):
                self._record(epoch, train_metrics, eval_metrics)
                validation = {"validation": eval_metrics} if eval_metrics else {}
                results.append({"epoch": epoch, "train": train_metrics, **validation})
            elif self.scheduler is not None:
                self.scheduler.step(epoch + 1)
        self.watch.close()
        return results

    def _begin(self, epoch: int) -> LossMeter:
        args = self.args
        self._updates = self.first_update
        data.set_epoch(self.train_loader, epoch, self.first_update * args.grad_accum_steps)
        seed_all(args.seed, args.rank, epoch, device=self.precision.device)  # for the seeds of the loader's processes
        if mixup_is_on(args) and args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
            (self.mixup or self.train_loader).mixup_enabled = False
        losses = LossMeter(self.precision.device, args.distributed)
        if self.past_losses is not None:
            losses.restore(self.past_losses)
        return losses

    def _train_epoch(self, epoch: int, losses: LossMeter) -> dict[str, float]:
        args = self.args

        def after_update(updates: int) -> None:
            self._updates = updates
            if self.interruption.agreed():
                if updates == self.updates_per_epoch:
                    share_batch_norm(self.task, args)
                self._leave(epoch, losses)
            if updates % args.log_interval == 0:
                data.check_images(self.train_loader, args, training=True, report=False)
            if args.recovery_interval and updates % args.recovery_interval == 0 and updates < self.updates_per_epoch:
                self._save_within(epoch, losses)

        settle, self._settle = self._settle, False
        metrics = train_one_epoch(
            self.task,
            self.train_loader,
            self.optimizer,
            epoch,
            args,
            self.precision,
            loss_scaler=self.loss_scaler,
            scheduler=self.scheduler,
            mixup=self.mixup,
            regulariser=self.regulariser,
            first_update=self.first_update,
            losses=losses,
            after_update=after_update,
            settle_gradients=settle,
        )
        data.check_images(self.train_loader, args, training=True)
        if self._updates > self.first_update:  # else it was done before the run was stopped there
            share_batch_norm(self.task, args)
        return metrics

    def _validates(self, epoch: int) -> bool:
        return (epoch + 1) % self.args.val_interval == 0 or epoch + 1 == self.epochs

    def _evaluate(self, epoch: int, losses: LossMeter) -> dict[str, float] | None:
        if self.eval_loader is None:
            return None

        def after_batch() -> None:
            if self.interruption.agreed():
                self._leave(epoch, losses)

        # Iterable data cannot go on from here, and its batches may be more in one process than in another.
        listen = (lambda: None) if data.is_iterable(self.eval_loader) else after_batch
        with self.activations.observed(self.eval_loader):
            metrics = evaluate_task(self.task, self.eval_loader, self.args, self.precision, epoch, after_batch=listen)
        data.check_images(self.eval_loader, self.args, training=False)
        return metrics

    def _record(self, epoch: int, train_metrics: dict[str, float], eval_metrics: dict[str, float] | None) -> None:
        metric, lr = (eval_metrics or train_metrics)[best_metric_name(self.args)], mean_lr(self.optimizer)
        if self.scheduler is not None:
            self.scheduler.step(epoch + 1, metric)
        with checkpoints.reported_write_errors(self.folder):
            learned = self.activations.record(epoch, last=epoch + 1 == self.epochs)
        self.watch.log(epoch, train_metrics, eval_metrics, lr, learned)
        if self.saver is not None:
            # The line first: a run that is killed in between resumes before it, and writes it again.
            with checkpoints.reported_write_errors(self.folder):
                utils.update_summary(epoch, train_metrics, eval_metrics, self.folder / "summary.csv", lr=lr)
            self.saver.save(self._state(), epoch, metric)

    def _state(self) -> dict[str, Any]:
        changing = checkpoints.training_state(self.task, self.optimizer, self.scheduler, self.loss_scaler)
        return {**self.constants, **changing}

    def _save_within(self, epoch: int, losses: LossMeter) -> None:
        ranks = checkpoints.state_within_epoch(self.task, self.args, losses.state())
        if self.saver is not None:
            self.saver.save_within({**self._state(), **ranks}, epoch, self._updates)

    def _leave(self, epoch: int, losses: LossMeter) -> NoReturn:
        """Save, where the data can go on from here, and end the run."""
        within = not data.is_iterable(self.train_loader)
        if within:
            self._save_within(epoch, losses)
        signal = self.interruption.signal
        asked = signal.name if signal else "a signal to another process"
        where = "there" if within else "the last epoch's end, for iterable data cannot go on within one"
        raise Interrupted(
            f"{asked} after update {self._updates} of epoch {epoch}: --resume {self.folder} goes on from {where}"
        )

    def _with_state_saved(self, error: DataLostError, epoch: int, losses: LossMeter) -> DataLostError:
        """Save where that can be done: in a single process, between updates."""
        where = "its newest checkpoint"
        between = self._updates == self.updates_per_epoch or self.args.grad_accum_steps == 1
        if between and not self.args.distributed and not data.is_iterable(self.train_loader):
            if self._updates > self.first_update:
                self._save_within(epoch, losses)
            where = f"update {self._updates} of epoch {epoch}"
        return DataLostError(f"{error}; --resume {self.folder} goes on from {where}")
