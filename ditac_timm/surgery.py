"""Surgery: put DiTAC in the place of a model's activations, and list the activations that are left.

    report = replace_activations(timm.create_model("vit_tiny_patch16_224", pretrained=True))
    print(report)

Which module is an activation and what it is there for (its role) is decided by class and by place; see `ROLES`.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

import torch
import torch.nn.functional as F
from timm.layers import DropPath, activations, activations_me
from timm.models import metaformer, mobilevit, nfnet, register_notrace_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import matching
from .activation import DiTAC
from .audit import ActivationCall, audit_activations

__all__ = ["ROLES", "ActivationCall", "SurgeryReport", "audit_activations", "replace_activations"]

ROLES = {
    "main": "ordinary activations, after a convolution, a norm or a linear layer",
    "glu": "the activation of a gated MLP",
    "se": "between squeeze and excite",
    "pos": "in a position-bias MLP",
    "kernel": "feature maps inside linear attention",
    "gate": "sigmoids and other gates",
}
DEFAULT_ROLES = ("main", "glu")

_GATES = (nn.Sigmoid, nn.Hardsigmoid, activations.Sigmoid, activations.HardSigmoid, activations_me.HardSigmoidMe)
_SOFTMAXES = (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin)
_NO_ACTIVATIONS = (nn.Identity, nn.modules.dropout._DropoutNd, DropPath)
_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Softplus, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.LogSigmoid,
    activations.Swish, activations.Mish, activations.HardSwish, activations.HardMish, activations.PReLU,
    activations.GELU, activations.GELUTanh, activations.QuickGELU, activations.Tanh,
    activations_me.SwishMe, activations_me.MishMe, activations_me.HardSwishMe, activations_me.HardMishMe,
    metaformer.StarReLU, metaformer.SquaredReLU, nfnet.GammaAct,
)  # fmt: skip
# Those of Hugging Face's transformers, by name, because it need not be installed.
_TRANSFORMERS_MODULE = "transformers.activations"
_TRANSFORMERS_ACTIVATIONS = {
    "GELUActivation", "GELUTanh", "PytorchGELUTanh", "NewGELUActivation", "FastGELUActivation", "QuickGELUActivation",
    "AccurateGELUActivation", "ClippedGELUActivation", "SiLUActivation", "MishActivation", "ReLUSquaredActivation",
}  # fmt: skip

# Norms that hold an activation of their own, as a formula and not as a module: nothing to replace.
_FUSED_NORMS = (
    "EvoNorm2dB0", "EvoNorm2dB1", "EvoNorm2dB2", "EvoNorm2dS0", "EvoNorm2dS0a", "EvoNorm2dS1", "EvoNorm2dS1a",
    "EvoNorm2dS2", "EvoNorm2dS2a", "FilterResponseNormTlu2d", "InplaceAbn",
)  # fmt: skip

# Places, by name of the class that holds an activation, so that they fit other libraries' blocks too.
_GLU_CLASSES = {"GluMlp", "SwiGLU", "SwiGLUPacked", "GeGluMlp", "Gemma4GatedMlp", "GatedConvBlock"}
_SE_CLASSES = {
    "SEModule", "SqueezeExcite", "SqueezeExciteCl", "SqueezeExcitation", "EffectiveSEModule", "EseModule",
    "EcaModule", "CecaModule", "GlobalContext", "GatherExcite", "SelectiveKernelAttn", "ChannelAttn",
    "LightChannelAttn", "CbamModule", "LightCbamModule", "CoordAttn", "SimpleCoordAttn", "EfficientLocalAttn",
    "StripAttn", "RegNetSELayer", "EfficientNetSqueezeExciteLayer", "AlignVisionSqueezeExciteLayer", "SCSEModule",
}  # fmt: skip
_SE_ATTRIBUTES = {("SplitAttn", "act1")}
_POS_CLASSES = {"RelPosMlp"}
_POS_ATTRIBUTES = {"cpb_mlp", "meta_mlp"}
_KERNEL_ATTRIBUTES = {"kernel_func"}

# Wrappers that gather the parameters they find when made; by name, because not every build of PyTorch has them.
_PARALLEL_CLASSES = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}


class NothingMatchedError(ValueError):
    """No activation matched; the model is as it was."""


@dataclass
class SurgeryReport:
    """What became of a model's activations.

    Attributes:
        model: Class of the model.
        settings: The arguments that made the new activations.
        replaced: Path of each activation replaced -> name of its old class.
        skipped: Path of each activation left -> why.
        roles: Path of each activation replaced -> its role.
        fits: Path of each activation replaced -> how far the new one is from the old; empty unless init is "match".
    """

    model: str
    settings: dict
    replaced: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    fits: dict[str, matching.Fit] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return {
            "model": self.model,
            "settings": self.settings,
            "replaced": dict(self.replaced),
            "skipped": dict(self.skipped),
            "roles": dict(self.roles),
            "fits": {path: {"rms": fit.rms, "max": fit.max} for path, fit in self.fits.items()},
        }

    def __str__(self) -> str:
        shown = {name: "its own" if isinstance(value, dict) else value for name, value in self.settings.items()}
        settings = ", ".join(f"{name}={value}" for name, value in shown.items())
        lines = [f"{self.model}: {len(self.replaced)} activations replaced by DiTAC ({settings})"]
        rows: list[tuple[str, ...]] = [("was", "role", "count", "rms error", "max error", "where")]
        groups: dict[tuple, list[str]] = {}
        for path, old in self.replaced.items():
            fit = self.fits.get(path)
            errors = (f"{fit.rms:.1e}", f"{fit.max:.1e}") if fit else ("", "")
            groups.setdefault((old, self.roles[path], *errors), []).append(path)
        for (old, role, rms, largest), paths in groups.items():
            rows.append((old, role, str(len(paths)), rms, largest, _span(paths)))
        lines += _table(rows)
        if self.skipped:
            reasons: dict[str, list[str]] = {}
            for path, reason in self.skipped.items():
                reasons.setdefault(reason, []).append(path)
            lines.append(f"{len(self.skipped)} left as they were")
            lines += _table([(str(len(paths)), reason, _span(paths)) for reason, paths in reasons.items()])
        if self.fits:
            lines.append("errors: new minus old activation, rms under a standard normal input, max over |x| <= 6")
        return "\n".join(lines)


def _span(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} ... {paths[-1]}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def replace_activations(
    model: nn.Module,
    *,
    roles: Sequence[str] = DEFAULT_ROLES,
    types: Sequence[type | str] | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    init: str = "match",
    **ditac_kwargs,
) -> SurgeryReport:
    """Replace a model's activations by DiTAC, in place.

    An instance that stands at several paths stays one instance; forward and backward hooks move to the new module;
    device and dtype come from the parameters beside it. `nn.Identity`, softmax and dropout are never touched, and
    an error leaves the whole model untouched.

    >>> report = replace_activations(nn.Sequential(nn.Linear(2, 2), nn.GELU()))
    >>> report.replaced
    {'1': 'GELU'}

    Args:
        model: Any module, but neither compiled nor wrapped for data parallelism yet.
        roles: Which of `ROLES` to replace.
        types: Only activations of these classes, given as classes or by name ("Hardswish"). A class not known as an
            activation is taken as one.
        filter_fn: Only activations for which `filter_fn(module, path)` is true.
        init: "match" fits theta by least squares to the activation replaced, under a standard normal input: for
            exact GELU that is theta = 0, and the model computes what it computed. "identity" and "prior" as in
            `DiTAC`.
        **ditac_kwargs: `version`, `cells`, `domain` of `DiTAC`. A mapping of paths to domains gives each its own, and
            the version's default to those that it leaves out.

    Returns:
        A report; `print` it.

    Raises:
        ValueError: Nothing matched (`NothingMatchedError`), an unknown role, an argument that `DiTAC` refuses, or a
            class in `types` that is no function of one number.
        TypeError: A compiled, scripted or data-parallel model, or an argument that `DiTAC` does not have.
    """
    _check_model(model)
    unknown = [role for role in roles if role not in ROLES]
    if isinstance(roles, str) or unknown:
        raise ValueError(f"roles must be a sequence of {', '.join(ROLES)}, but is {roles!r}.")
    if isinstance(types, (str, type)):
        raise ValueError(f"types must be a sequence of classes or their names, but is {types!r}.")
    if init not in ("match", "identity", "prior"):
        raise ValueError(f"init must be one of match, identity, prior, but is {init!r}.")
    refused = sorted(set(ditac_kwargs) - {"version", "cells", "domain"})
    if refused:
        raise TypeError(f"replace_activations takes version, cells and domain for DiTAC, but not {', '.join(refused)}.")
    domains = ditac_kwargs.get("domain")
    if isinstance(domains, Mapping):
        domains = {path: tuple(domain) for path, domain in domains.items()}
        ditac_kwargs["domain"] = None
    else:
        domains = {}
    template = DiTAC(init="identity" if init == "match" else init, **ditac_kwargs)
    settings = {
        "version": template.version,
        "cells": template.cells,
        "domain": {path: list(domain) for path, domain in domains.items()} or list(template.domain),
        "init": init,
    }
    report = SurgeryReport(type(model).__name__, settings)
    new_modules: dict[int, tuple[nn.Module, nn.Module, matching.Fit | None]] = {}  # the old one is kept alive: by id
    places: list[tuple[_Found, nn.Module]] = []
    for found in _find(model, types):
        reason = found.reason(roles, types, filter_fn)
        if reason:
            report.skipped[found.path] = reason
            continue
        if id(found.module) not in new_modules:
            new, fit = _make(found, init, template, domains.get(found.path))
            new_modules[id(found.module)] = found.module, new, fit
        _, new, fit = new_modules[id(found.module)]
        report.replaced[found.path] = found.old_name
        report.roles[found.path] = found.role
        places.append((found, new))
        if fit:
            report.fits[found.path] = fit
    unknown = [path for path in domains if path not in report.replaced]
    if unknown:
        raise ValueError(f"domain names {unknown[0]}, where no activation is replaced.")
    if not places:
        raise NothingMatchedError(_nothing_matched(model, report, roles, types, filter_fn))
    for found, new in places:
        found.put(new)
    return report


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is a {type(model).__name__}.")
    for path, module in model.named_modules():
        name = type(module).__name__ + (f" at {path}" if path else "")
        if _PARALLEL_CLASSES & {cls.__name__ for cls in type(module).__mro__}:
            raise TypeError(
                f"Replace the activations before the model is wrapped: {name} already holds its parameters."
            )
        if hasattr(module, "_orig_mod"):
            raise TypeError(f"Replace the activations before torch.compile: {name} is already compiled.")
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"Replace the activations before scripting or tracing: {name} can't be changed any more.")


def _nothing_matched(model, report, roles, types, filter_fn) -> str:
    if _kind(model, types) in ("activation", "gate", "softmax", "done"):
        return f"{report.model} is itself an activation: give the module that holds it."
    asked = [f"roles {', '.join(roles)}"]
    if types is not None:
        asked.append(f"types {', '.join(t if isinstance(t, str) else t.__name__ for t in types)}")
    if filter_fn is not None:
        asked.append("the filter")
    reasons = Counter(report.skipped.values())
    there = "; ".join(f"{count} left: {reason}" for reason, count in reasons.items()) or "it has none as modules"
    return f"No activation of {report.model} matched {' and '.join(asked)} ({there})."


@dataclass
class _Found:
    """An activation and its place."""

    path: str
    module: nn.Module
    ancestors: list[tuple[str, nn.Module]]  # from the root: (name within the parent, module)
    name: str
    kind: str  # activation, gate, softmax, none, fused, functional or done

    @property
    def parent(self) -> nn.Module:
        return self.ancestors[-1][1]

    @property
    def old_name(self) -> str:
        return _FUNCTIONAL[type(self.module)].name if self.kind == "functional" else type(self.module).__name__

    @property
    def role(self) -> str:
        if self.kind == "gate":
            return "gate"
        if self.kind == "functional" or self.name in _KERNEL_ATTRIBUTES:
            return "kernel"
        names = {name for name, _ in self.ancestors} | {self.name}
        classes = {type(module).__name__ for _, module in self.ancestors}
        if classes & _POS_CLASSES or names & _POS_ATTRIBUTES:
            return "pos"
        if classes & _SE_CLASSES or (type(self.parent).__name__, self.name) in _SE_ATTRIBUTES:
            return "se"
        # A gated MLP may hold whole layers, so only the nearest class counts.
        return "glu" if type(self.parent).__name__ in _GLU_CLASSES else "main"

    def reason(self, roles, types, filter_fn) -> str:
        """Why it is left as it is; empty if it is not."""
        name = type(self.module).__name__
        if self.kind == "done":
            return "already DiTAC"
        if self.kind == "softmax":
            return f"{name} is no function of one number"
        if self.kind == "none":
            return f"{name} is no activation"
        if self.kind == "fused":
            return f"{name} fuses norm and activation"
        if self.role not in roles:
            return f"role {self.role}"
        if types is not None and self.old_name not in types and type(self.module) not in types:
            return f"type {self.old_name}"
        if filter_fn is not None and not filter_fn(self.module, self.path):
            return "refused by filter_fn"
        return ""

    def placement(self) -> dict:
        """Device and dtype of the nearest parameters."""
        for _, module in reversed(self.ancestors):
            for parameter in module.parameters():
                if parameter.is_floating_point():
                    return {"device": parameter.device, "dtype": parameter.dtype}
        return {}

    def put(self, new: nn.Module) -> None:
        if self.kind != "functional":
            setattr(self.parent, self.name, new)
            if isinstance(self.parent, nn.TransformerEncoderLayer):
                # Its fused path, taken in eval, would go on computing the old one.
                self.parent.activation_relu_or_gelu = 0
        elif type(self.module) in _FUNCTIONAL:  # else it stands at another path too, and has changed already
            self.module.__class__ = _FUNCTIONAL[type(self.module)].replacement
            self.module.add_module("act", new)


def _find(model: nn.Module, types: Sequence[type | str] | None) -> Iterator[_Found]:
    def walk(path: str, ancestors: list[tuple[str, nn.Module]]) -> Iterator[_Found]:
        for name, module in ancestors[-1][1]._modules.items():  # named_children would leave out a second name
            if module is None:
                continue
            child_path = f"{path}.{name}" if path else name
            kind = _kind(module, types)
            if kind:
                child_path += ".act" if kind == "functional" else ""
                yield _Found(child_path, module, ancestors, name, kind)
            if kind in (None, "fused", "functional"):
                yield from walk(f"{path}.{name}" if path else name, [*ancestors, (name, module)])

    yield from walk("", [("", model)])


def _kind(module: nn.Module, types: Sequence[type | str] | None) -> str | None:
    cls = type(module)
    if cls is DiTAC:
        return "done"
    if cls in _FUNCTIONAL:
        return "functional"
    if cls in _SOFTMAXES:
        return "softmax"
    if cls.__name__ in _FUSED_NORMS:
        return "fused" if getattr(module, "apply_act", True) else None
    # A subclass that computes the same is the same; one with a forward of its own (and weights, maybe) is not.
    for base in cls.__mro__:
        if base in _GATES or _is_activation(base):
            if cls.forward is base.forward:
                return "gate" if base in _GATES else "activation"
            break
    if types is None or (cls not in types and cls.__name__ not in types):
        return None
    return "none" if isinstance(module, _NO_ACTIVATIONS) else "activation"


def _is_activation(cls: type) -> TypeGuard[type[nn.Module]]:
    return cls in _ACTIVATIONS or (cls.__module__ == _TRANSFORMERS_MODULE and cls.__name__ in _TRANSFORMERS_ACTIVATIONS)


def _make(
    found: _Found, init: str, template: DiTAC, domain: tuple[float, float] | None
) -> tuple[nn.Module, matching.Fit | None]:
    placement = found.placement()
    act = DiTAC(template.version, template.cells, domain or template.domain, template.init, **placement)
    old, gain = found.module, None
    function: Callable[[Tensor], Tensor] = old
    if found.kind == "functional":
        function = _FUNCTIONAL[type(old)].function
    elif isinstance(old, nfnet.GammaAct):
        function, gain = old.act_fn, old.gamma
    act.__dict__["original"] = function
    fit = None
    if init == "match":
        try:
            fit = matching.match(function, act)
        except Exception as error:  # whatever a class named in types may do to one number
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{found.old_name} at {found.path} is no function of one number, leave it out of types: {reason}"
            ) from error
        act.start_from(fit.theta)
    act.train(old.training)
    new: nn.Module = act if gain is None else ScaledActivation(act, gain)
    if found.kind != "functional":
        _move_hooks(old, new)
    return new, fit


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    # The dictionaries themselves, so that the handles their users hold still remove the hooks.
    for name in vars(old):
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and "state_dict" not in name:
            setattr(new, name, getattr(old, name))
    new._is_full_backward_hook = old._is_full_backward_hook


class ScaledActivation(nn.Module):
    """`gain * activation(x)`: what nfnet's GammaAct becomes.

    Args:
        activation: Any elementwise module.
        gain: The constant that keeps the variance.
    """

    def __init__(self, activation: nn.Module, gain: float):
        super().__init__()
        self.activation = activation
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x) * self.gain

    def extra_repr(self) -> str:
        return f"gain={self.gain}"


class _Instead(TorchFunctionMode):
    """Calls `new` wherever `old` is called."""

    def __init__(self, old: Callable, new: Callable):
        super().__init__()
        self.old, self.new = old, new

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.new(*args) if func is self.old else func(*args, **(kwargs or {}))


class LinearSelfAttention(mobilevit.LinearSelfAttention):
    """MobileViTv2's attention with the child `act` in place of its call of `F.relu`."""

    act: nn.Module

    def forward(self, x: Tensor, x_prev: Tensor | None = None) -> Tensor:
        with _Instead(F.relu, self.act):
            return super().forward(x, x_prev)


@dataclass(frozen=True)
class _Functional:
    name: str
    function: Callable[[Tensor], Tensor]
    replacement: type[nn.Module]


# Modules that call an activation as a function.
_FUNCTIONAL: dict[type[nn.Module], _Functional] = {
    mobilevit.LinearSelfAttention: _Functional("relu", F.relu, LinearSelfAttention)
}

register_notrace_module(DiTAC)  # a leaf for timm's FX feature extraction
