"""What DiTAC's activations are and see, epoch by epoch: activations.csv, and a picture.

For each layer `theta_norm`, the 2-norm of theta; `inside`, the share of its inputs within the domain [a, b], where the
activation is the learned one; `max_slope`, the largest slope of T on the domain, 1 where T(x) = x.
"""

import argparse
import csv
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.task import TrainingTask
from timm.utils import is_primary, trim_summary, unwrap_model
from torch import Tensor, nn

from ditac_timm import DiTAC, cpab
from ditac_timm.plot import plot_activations
from ditac_timm.training.device import Precision

_logger = logging.getLogger(__name__)

TABLE, PICTURE = "activations.csv", "activations.png"
COLUMNS = ("epoch", "layer", "theta_norm", "inside", "max_slope")

# Inputs of a layer that are looked at in a batch, about, so that the cost is bounded.
_SAMPLE = 2**18
_BINS = 80  # of a histogram, over the domain and half its width to either side
_COMPILED_BATCHES = 8


def largest_slope(velocities: Tensor, domain: tuple[float, float]) -> float:
    """The largest slope of T on its domain, exactly.

    `T'(x) = v(T(x)) / v(x)`, so `(log T')' = (v'(T(x)) - v'(x)) / v(x)`, whose sign is constant while neither x nor
    T(x) changes its cell. T' is thus monotone between the points where one of them does, the knots and the points that
    the flow takes to knots, and largest at one of these. (T' is continuous but where a knot is at rest; there, on
    either side, it is constant up to the next of these points.)

    Args:
        velocities: `(cells + 1,)`, float64, zero at both ends.
        domain: `(a, b)`.
    """
    a, b = domain
    knots = torch.linspace(a, b, len(velocities), dtype=velocities.dtype, device=velocities.device)
    origins = cpab.flow(knots, velocities, domain, time=-1.0)
    points = torch.cat((knots, origins)).clamp(a, b)
    _, slopes = cpab.flow_with_slope(points.unsqueeze(0), velocities.unsqueeze(0), domain)
    return slopes.max().item()


class ActivationStatistics:
    """Statistics of the DiTAC layers of the model whose metrics count; of a model without DiTAC nothing at all.

    Inputs are counted by hooks while that model is evaluated, on its device, without waiting for it, and summed over
    processes; where a layer has more than 262,144 inputs in a batch, those of some of its images. Training steps run no
    hook. A compiled model runs none either, so a few validation batches pass once more through the module that was
    compiled, whose weights are the same.
    """

    def __init__(
        self, task: TrainingTask, args: argparse.Namespace, precision: Precision, folder: Path, start_epoch: int
    ) -> None:
        """Find the layers.

        Args:
            task: What is trained.
            args: The flags.
            precision: The run's.
            folder: The run's; what its activations.csv says of `start_epoch` and later is dropped.
            start_epoch: The first epoch to come.
        """
        averaged = args.model_ema and not args.model_ema_force_cpu  # as `evaluate_task`
        self.model: nn.Module = unwrap_model(task.get_eval_model(ema=averaged))
        self.layers = {name: module for name, module in self.model.named_modules() if isinstance(module, DiTAC)}
        self._args = args
        self._precision = precision
        self._folder = folder
        self._can_plot = True
        # Of each layer: inputs inside the domain, inputs, and the histogram's bins.
        self._counts = torch.zeros(len(self.layers), 2 + _BINS, dtype=torch.int64, device=precision.device)
        if self.layers and is_primary(args):
            trim_summary(folder / TABLE, start_epoch)

    @contextmanager
    def observed(self, loader: Any) -> Iterator[None]:
        """Count the inputs of the evaluation that runs inside; with a compiled model, of a few batches afterwards.

        Args:
            loader: Of the validation split; None where there is none, and nothing to count.
        """
        self._counts.zero_()
        if not self.layers or loader is None:
            yield
            return
        if self._args.torchcompile:
            yield
            with self._hooks(), torch.inference_mode():
                self.model.eval()
                for images, _ in islice(loader, _COMPILED_BATCHES):
                    images = images.to(self._precision.device, self._precision.model_dtype)
                    if self._args.channels_last:
                        images = images.contiguous(memory_format=torch.channels_last)
                    with self._precision.autocast():
                        self.model(images)
            return
        with self._hooks():
            yield

    def record(self, epoch: int, *, last: bool) -> dict[str, float]:
        """Write an epoch's lines, and its picture if it is the last or --plot-activations; all processes call it.

        Returns:
            The statistics by name, for other logs; without `inside` where nothing was observed.
        """
        if not self.layers:
            return {}
        counts = self._counts.clone()
        if self._args.distributed:
            dist.all_reduce(counts)
        if not is_primary(self._args):
            return {}
        counts = counts.cpu()
        statistics: dict[str, float] = {}
        new = not (self._folder / TABLE).exists()
        with open(self._folder / TABLE, "a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(COLUMNS)
            for (name, layer), (inside, seen, *_) in zip(self.layers.items(), counts.tolist(), strict=True):
                theta = layer.theta.detach().cpu().double()
                row = {"theta_norm": theta.norm().item()}
                row |= {"inside": inside / seen} if seen else {}
                row |= {"max_slope": largest_slope(layer.tessellation.velocities(theta), layer.domain)}
                writer.writerow([epoch, name, *(row.get(column, "") for column in COLUMNS[2:])])
                statistics |= {f"activations/{name or 'DiTAC'}/{column}": value for column, value in row.items()}
        if last or self._args.plot_activations:
            self._plot(counts[:, 2:])
        return statistics

    def _plot(self, histograms: Tensor) -> None:
        if not self._can_plot:
            return
        edges = {name: torch.linspace(*_reach(layer), _BINS + 1) for name, layer in self.layers.items()}
        inputs = {name: (counts, edges[name]) for name, counts in zip(self.layers, histograms, strict=True)}
        try:
            plot_activations(self.model, self._folder / PICTURE, inputs=inputs)
        except ImportError as error:
            _logger.warning(f"No {PICTURE}: {error}")
            self._can_plot = False

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = [
            layer.register_forward_pre_hook(_counter(counts, layer))
            for layer, counts in zip(self.layers.values(), self._counts, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _counter(counts: Tensor, layer: DiTAC) -> Any:
    """A hook that adds a layer's inputs to its counts; nothing in it waits for the device."""
    a, b = layer.domain
    low, high = _reach(layer)

    def count(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].detach()
        if x.numel() > _SAMPLE and x.ndim:
            x = x[:: math.ceil(x.numel() / _SAMPLE)]  # whole images, evenly spaced: a view
        x = x.float()
        counts[0] += ((x >= a) & (x <= b)).sum()
        counts[1] += x.numel()
        counts[2:] += torch.histc(x, _BINS, low, high).to(torch.int64)

    return count


def _reach(layer: DiTAC) -> tuple[float, float]:
    """What a picture shows of a layer: as `DiTAC.curve`, the domain and half its width to either side."""
    a, b = layer.domain
    return a - (b - a) / 2, b + (b - a) / 2
