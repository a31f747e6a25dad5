"""A model to be measured: what it is made of, and its inference and training steps."""

import argparse
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from ditac_timm import DiTAC, ops
from ditac_timm.benchmarking import memory
from ditac_timm.training import data
from ditac_timm.training import model as models
from ditac_timm.training.device import Precision

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # importing fvcore scripts functions that nothing here calls
    from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis

DITAC_FLOPS = 4  # an element: index, intercept, slope, one multiply-add, as the paper counts


class Counts(NamedTuple):
    """What does not depend on the machine; FLOPs and activations of one image, None where the model does not trace."""

    parameters: int
    flops: int | None
    activations: int | None


class Subject:
    """A model on its device, with random images and labels.

    Args:
        name: Any name of `ditac_timm.create_model`.
        args: The flags of `benchmark.py`.
        precision: Device and dtypes.
        use_test_size: Images of the size the model was tested at, where that is not the one it was trained at.
    """

    def __init__(self, name: str, args: argparse.Namespace, precision: Precision, use_test_size: bool = False):
        torch.manual_seed(args.seed)
        self.name = name
        self.args = args
        self.precision = precision
        arguments = models.model_arguments(args)
        arguments |= models.image_size_argument(name, arguments, args)
        model = models.build_model(name, arguments, **models.regularisation_arguments(args))
        self.input_size: tuple[int, ...] = data.resolve_data_config(args, model, use_test_size=use_test_size)[
            "input_size"
        ]
        self.counts = count(model, self.input_size)
        if args.grad_checkpointing:
            models.enable_grad_checkpointing(model)
        self.num_classes: int = model.num_classes
        self.model = models.place(model, args, precision)

    @functools.cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """The one that --opt names."""
        return create_optimizer_v2(self.model, opt=self.args.opt, lr=1e-4)

    def inference(self, batch_size: int, compiled: bool = False) -> Callable[[], Tensor]:
        """A call that infers; the model is in evaluation from now on."""
        model, images = self._runner(compiled), self._images(batch_size)
        self.model.eval()

        def call() -> Tensor:
            with torch.no_grad(), self.precision.autocast():
                return model(images)

        return call

    def training_step(self, batch_size: int, compiled: bool = False) -> Callable[[], None]:
        """A call that trains one step: forward, loss, backward, update; the model is in training from now on."""
        loss = self._loss(batch_size, compiled)
        optimizer = self.optimizer
        self.model.train()

        def call() -> None:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return call

    def training_peak(self, batch_size: int, compiled: bool = False) -> int:
        """Bytes held at the highest point of a training step: weights, optimizer, batch and all the step makes."""
        step = self.training_step(batch_size, compiled)
        step()  # makes the optimizer's state
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        fixed = memory.nbytes(self._own_tensors()) + memory.nbytes(filter(torch.is_tensor, states))
        batch = self._images(batch_size).nbytes
        return fixed + batch + memory.peak_growth(step, self.precision.device)

    def saved_for_backward(self, batch_size: int, compiled: bool = False) -> int:
        """Bytes that a forward in training saves for backward, beside the model's own parameters and buffers."""
        loss = self._loss(batch_size, compiled)
        self.model.train()
        return memory.saved_bytes(loss, without=self._own_tensors())

    def tabulation(self) -> Callable[[], None] | None:
        """A call that tabulates every DiTAC layer, forward and backward, as an eager training step does; or None."""
        layers = [module for module in self.model.modules() if isinstance(module, DiTAC)]
        if not layers:
            return None
        # Dense gradients, as of inputs that reach every bin.
        gradients = [torch.ones_like(_tabulate(layer)[1]) for layer in layers]

        def call() -> None:
            for layer, gradient in zip(layers, gradients, strict=True):
                velocities, _ = _tabulate(layer)
                ops.tabulate_theta_backward(gradient, velocities, _basis(layer), *_settings(layer))

        return call

    @functools.cached_property
    def _compiled(self) -> Callable[..., Any]:
        # One graph for each batch size: a graph for all of them is slower, and nobody deploys the benchmark.
        return torch.compile(
            self.model, backend=self.args.torchcompile, mode=self.args.torchcompile_mode, dynamic=False
        )

    def _runner(self, compiled: bool) -> Callable[..., Any]:
        return self._compiled if compiled else self.model

    def _loss(self, batch_size: int, compiled: bool) -> Callable[[], Tensor]:
        model, (images, targets) = self._runner(compiled), self.batch(batch_size)

        def call() -> Tensor:
            with self.precision.autocast():
                output = model(images)
                logits = output[0] if isinstance(output, tuple) else output  # distilled models have two heads
                return F.cross_entropy(logits, targets)

        return call

    def batch(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Random images and labels, always the same ones."""
        images = self._images(batch_size)
        generator = torch.Generator().manual_seed(self.args.seed)
        return images, torch.randint(self.num_classes, (batch_size,), generator=generator).to(images.device)

    def _images(self, batch_size: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.args.seed)
        images = torch.randn(batch_size, *self.input_size, generator=generator)
        images = images.to(self.precision.device, self.precision.model_dtype)
        return images.contiguous(memory_format=torch.channels_last) if self.args.channels_last else images

    def _own_tensors(self) -> Iterator[Tensor]:
        yield from self.model.parameters()
        yield from self.model.buffers()


def count(model: nn.Module, input_size: tuple[int, ...]) -> Counts:
    """Count parameters, and FLOPs and activations of one image as fvcore does: a multiply-add is one FLOP."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    training = model.training
    images = torch.zeros(1, *input_size)
    try:
        with torch.no_grad():
            flops = FlopCountAnalysis(model.eval(), images)
            flops.set_op_handle("ditac::lookup", _lookup_flops).set_op_handle("aten::batch_norm", _batch_norm_flops)
            activations = ActivationCountAnalysis(model, images)
            for analysis in (flops, activations):
                analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
            return Counts(parameters, int(flops.total()), int(activations.total()))
    except RuntimeError:  # some architectures cannot be traced
        return Counts(parameters, None, None)
    finally:
        model.train(training)


def _lookup_flops(inputs: list[Any], outputs: list[Any]) -> int:
    return DITAC_FLOPS * math.prod(outputs[0].type().sizes())


def _batch_norm_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """In evaluation a scale and a shift: one multiply-add, where fvcore counts two operations."""
    return math.prod(outputs[0].type().sizes())


def _tabulate(layer: DiTAC) -> tuple[Tensor, Tensor]:
    return ops.tabulate_theta(layer.theta, _basis(layer), *_settings(layer))


def _basis(layer: DiTAC) -> Tensor:
    return layer.tessellation.velocity_basis(torch.float32, layer.theta.device)


def _settings(layer: DiTAC) -> tuple[str, tuple[float, float], int]:
    return layer.version, layer.domain, layer.bins
