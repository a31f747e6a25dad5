"""Epochs as others watch them: Weights & Biases and TensorBoard, whichever flags ask for. In the first process only."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.utils import is_primary

from ditac_timm.training.errors import RunError, first_line


class Watch:
    """Sends a row an epoch to what --log-wandb and --log-tensorboard name; nothing without them."""

    def __init__(self, args: argparse.Namespace, flags: Mapping[str, Any], folder: Path, start_epoch: int) -> None:
        """Open what is asked for.

        Args:
            args: The flags.
            flags: The flags as given, which become the run's configuration.
            folder: The run's, whose name is the run's.
            start_epoch: The first epoch to come; what TensorBoard has of it and later ones is dropped.

        Raises:
            RunError: Weights & Biases refuses the run.
        """
        self._wandb: Any = None
        self._board: Any = None
        if not is_primary(args):
            return
        # Imported only where asked for: neither is needed to train.
        if args.log_wandb:
            import wandb

            try:
                self._wandb = wandb.init(
                    project=args.wandb_project,
                    name=folder.name,
                    config=dict(flags),
                    tags=args.wandb_tags,
                    resume="must" if args.wandb_resume_id else None,
                    id=args.wandb_resume_id or None,
                )
            except wandb.Error as error:
                raise RunError(f"--log-wandb: {first_line(error)}") from error
        if args.log_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder), purge_step=start_epoch)

    def log(
        self,
        epoch: int,
        train_metrics: Mapping[str, float],
        eval_metrics: Mapping[str, float] | None,
        lr: float,
        more: Mapping[str, float] | None = None,
    ) -> None:
        """Log an epoch under the names of summary.csv, which are timm's, and what more there is under its own."""
        row = {f"train_{name}": value for name, value in train_metrics.items()}
        row |= {f"eval_{name}": value for name, value in (eval_metrics or {}).items()}
        row |= {"lr": lr, **(more or {})}
        if self._wandb is not None:
            self._wandb.log({"epoch": epoch, **row})
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, epoch)
            self._board.flush()

    def close(self) -> None:
        """Finish; a run that ends early is finished by the clients themselves."""
        if self._wandb is not None:
            self._wandb.finish()
        if self._board is not None:
            self._board.close()
