"""Theta fitted to the inputs that each activation of a model really gets."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import matching
from .activation import DiTAC

__all__ = ["Calibrated", "calibrate"]

_SAMPLES = 1 << 16  # of an activation's inputs
_POINTS = 1 << 11  # to fit to: the samples in order, so many means of neighbours
_MARGIN = 1.02  # of a domain that reaches beyond all inputs
_WIDEST = 4  # times its own width that a domain may grow to either side: cells that wide say little


class Calibrated(NamedTuple):
    """What became of an activation.

    Attributes:
        theta: Its new parameters.
        domain: Its domain.
        before: Root mean square of its output minus the original's, on the batch, with the theta it had.
        after: The same with the new one.
    """

    theta: tuple[float, ...]
    domain: tuple[float, float]
    before: float
    after: float


class _Seen(NamedTuple):
    """Some of an activation's inputs, and what the original made of them; `where` in its flat input."""

    where: Tensor
    inputs: Tensor
    targets: Tensor


@torch.no_grad()
def calibrate(model: nn.Module, batch: Any, *, domain: bool = False) -> dict[str, Calibrated]:
    """Refit every theta to the model's own inputs, in place: no labels, and no other weight changes.

    The batch passes twice. First through the original activations, whose outputs are kept; then through the new ones,
    each fitted as the batch reaches it. With domains it is fitted to give what the original gave where it stood, so
    that it makes up for what those before it have left. Without, what saturates beyond the domain leaves more than can
    be made up for, and each is fitted to the inputs of the first pass; so is one that is called several times. Where
    the fit, which keeps theta small, is no better than what was there, that stays.

    Args:
        model: One whose activations `replace_activations` replaced, or one of the zoo; on any device. It is evaluated,
            and afterwards in the mode that it was in.
        batch: What `model` takes: some dozens of real images, prepared as for training.
        domain: Whether to choose each activation's domain as well. It is wider where inputs reach beyond it, which an
            original that saturates (ReLU6) needs. A model of the zoo saves its domains.

    Returns:
        What became of each activation, by path.

    Raises:
        ValueError: The model has no DiTAC, one that replaced nothing, or one that the batch does not reach.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, DiTAC)}
    if not layers:
        raise ValueError("model has no DiTAC: replace its activations first.")
    for path, layer in layers.items():
        if layer.original is None:
            raise ValueError(f"{path or 'model'} replaced no activation: there is nothing to calibrate it to.")
    with _evaluated(model):
        seen = _original_pass(model, batch, layers)
        unseen = [path for path in layers if not seen[path]]
        if unseen:
            raise ValueError(f"the batch does not reach {unseen[0]}: nothing was changed.")
        done = _fitting_pass(model, batch, layers, seen, domain)
    record: Any = getattr(model, "set_ditac_domains", None)  # the zoo's
    if domain and record is not None:
        record({path: list(result.domain) for path, result in done.items()})
    return {path: done[path] for path in layers}


def _original_pass(model: nn.Module, batch: Any, layers: dict[str, DiTAC]) -> dict[str, list[_Seen]]:
    seen: dict[str, list[_Seen]] = defaultdict(list)
    generator = torch.Generator().manual_seed(0)

    def watch(path: str, layer: DiTAC) -> Callable[..., Tensor]:
        assert layer.original is not None
        original = matching.on(layer.original, layer.theta.device)

        def hook(_: nn.Module, inputs: tuple[Tensor], __: Tensor) -> Tensor:
            x = inputs[0]
            y = original(x.clone())  # it may work in place
            where = torch.randint(x.numel(), (_SAMPLES,), generator=generator).to(x.device)
            seen[path].append(_Seen(where, *(t.flatten()[where].double().cpu() for t in (x, y))))
            return y

        return hook

    with _hooked(layers, watch):
        model(batch)
    return seen


def _fitting_pass(
    model: nn.Module, batch: Any, layers: dict[str, DiTAC], seen: dict[str, list[_Seen]], domain: bool
) -> dict[str, Calibrated]:
    done: dict[str, Calibrated] = {}

    def watch(path: str, layer: DiTAC) -> Callable[..., Tensor]:
        def hook(_: nn.Module, inputs: tuple[Tensor], __: Tensor) -> Tensor:
            x = inputs[0]
            if path not in done:
                calls = seen[path]
                if domain and len(calls) == 1:
                    calls = [calls[0]._replace(inputs=x.flatten()[calls[0].where].double().cpu())]
                done[path] = _fit(
                    layer, torch.cat([c.inputs for c in calls]), torch.cat([c.targets for c in calls]), domain
                )
            return layer.forward(x)

        return hook

    with _hooked(layers, watch):
        model(batch)
    return done


def _fit(layer: DiTAC, inputs: Tensor, targets: Tensor, domain: bool) -> Calibrated:
    """Fit a layer to pairs of numbers, and set it."""
    order = inputs.argsort()
    # Least squares over neighbours' means: what is lost is the spread within them, which no function of x can give.
    x, y = (values[order].unflatten(0, (_POINTS, -1)).mean(-1) for values in (inputs, targets))
    before = _rms(layer, inputs, targets)
    chosen = layer.domain
    if domain:  # by quick fits to some of the points
        quick = {
            d: matching.fit_points(x[::4], y[::4], layer.version, layer.cells, d, iterations=20)
            for d in _domains(layer, inputs)
        }
        chosen = min(quick, key=lambda d: quick[d].rms)
    fit = matching.fit_points(x, y, layer.version, layer.cells, chosen, iterations=100)
    old_domain, old_theta = layer.domain, tuple(layer.theta.tolist())
    for at, theta in ((chosen, fit.theta), (old_domain, old_theta)):
        layer.set_domain(at)
        layer.start_from(theta)
        if (after := _rms(layer, inputs, targets)) < before:
            break
    return Calibrated(theta, at, before, after)


def _domains(layer: DiTAC, inputs: Tensor) -> list[tuple[float, float]]:
    """The domain a layer has, and wider ones up to its largest and smallest inputs, or all but one in a thousand."""
    a, b = layer.domain
    most = _WIDEST * (b - a)
    lows, highs = {a}, {b}
    for share in (0.001, 0.0):
        low, high = inputs.quantile(share).item() * _MARGIN, inputs.quantile(1 - share).item() * _MARGIN
        highs.add(min(max(b, high), b + most))
        if layer.version in ("leaky", "inf"):  # the others are GELU there, next to 0: no cell need be spent on it
            lows.add(max(min(a, low), a - most))
    return [(low, high) for low in sorted(lows) for high in sorted(highs)]


def _rms(layer: DiTAC, inputs: Tensor, targets: Tensor) -> float:
    y = layer.forward(inputs.to(layer.theta.device, torch.float32))  # without its hooks
    return (y.cpu().double() - targets).square().mean().sqrt().item()


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _hooked(layers: dict[str, DiTAC], watch: Callable[[str, DiTAC], Callable[..., Tensor]]) -> Iterator[None]:
    """While this lasts, layers return what hooks do."""
    handles = [layer.register_forward_hook(watch(path, layer)) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
