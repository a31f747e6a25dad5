"""DiTAC architectures in timm's registry: `ditac`, for any timm architecture as its base, and named variants of it.

    timm.create_model("ditac", base="resnet50", pretrained=True)
    timm.create_model("convnext_small_ditac", num_classes=50)

The base's own timm entrypoint runs, with surgery right after the model's construction: before weights load and before
features are wrapped, so checkpoint filters, adapters and `features_only` are the base's own. So are the pretrained
weights: a variant has the tags of its base, and each names the base's repository.
"""

import contextlib
import functools
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import timm
import torch
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    model_entrypoint,
    parse_model_name,
    register_model,
    split_model_name_tag,
)
from timm.models._builder import _resolve_pretrained_source
from timm.models._manipulate import group_with_matcher
from torch import nn

from .activation import DiTAC
from .download import verified_download
from .surgery import NothingMatchedError, SurgeryReport, replace_activations

__all__ = ["create_model"]  # register_model adds the architectures

_logger = logging.getLogger(__name__)

# A named variant: its base, and its arguments of `replace_activations`. For the MobileNets Hardswish only, as the
# paper's count of operations (table 10) shows.
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mobilenetv3_ditac": ("mobilenetv3_small_100", {"types": ["Hardswish"]}),
    "mobilenetv3_large_ditac": ("mobilenetv3_large_100", {"types": ["Hardswish"]}),
    "convnext_tiny_ditac": ("convnext_tiny", {}),
    "convnext_small_ditac": ("convnext_small", {}),
    "resnet50_ditac": ("resnet50", {}),
    "swin_tiny_ditac": ("swin_tiny_patch4_window7_224", {}),
}

default_cfgs: dict[str, DefaultCfg] = {}  # what register_model reads the tags of a variant from


def base_of(architecture: str, model_args: Mapping[str, Any]) -> str | None:
    """The timm architecture, without a tag, whose activations an architecture of this file replaces; None of others.

    Args:
        architecture: A registered name, as `config.json` has it.
        model_args: The arguments saved beside it.
    """
    if architecture == "ditac":
        return split_model_name_tag(model_args["base"])[0]
    return _VARIANTS[architecture][0] if architecture in _VARIANTS else None


def create_model(model_name: str, pretrained: bool = False, **kwargs) -> nn.Module:
    """`timm.create_model` that also takes `<architecture>_ditac` for any timm architecture.

    Args:
        model_name: Anything that timm takes (a name with or without a tag, `hf-hub:...`, `local-dir:...`), or a timm
            name with `_ditac` behind the architecture (`resnet50_ditac`, `resnet50_ditac.a1_in1k`).
        pretrained: Load weights: of the base, where no DiTAC weights are named.
        **kwargs: As for `timm.create_model`.

    Returns:
        The model.

    Raises:
        RuntimeError: timm does not know the architecture, or a file of the Hub's was damaged in download.
    """
    if ":" in model_name:
        source, place = parse_model_name(model_name)
        if source == "hf-hub":
            with verified_download(place, kwargs.get("cache_dir")):
                return timm.create_model(model_name, pretrained, **kwargs)
    else:
        name, tag = split_model_name_tag(model_name)
        base = name.removesuffix("_ditac")
        if base != name and not timm.is_model(name) and timm.is_model(base):
            return timm.create_model("ditac", pretrained, base=f"{base}.{tag}" if tag else base, **kwargs)
    return timm.create_model(model_name, pretrained, **kwargs)


@register_model
def ditac(pretrained: bool = False, *, base: str = "", ditac: dict[str, Any] | None = None, **kwargs) -> nn.Module:
    """Any timm architecture with DiTAC in the place of its activations.

    Args:
        pretrained: Load weights, by default the base's.
        base: Name of a timm architecture, with or without a tag ("convnext_small.fb_in1k").
        ditac: Arguments of `replace_activations`, in plain JSON types.
        **kwargs: The base's.
    """
    if not base:
        raise ValueError('Architecture ditac needs a base, as in timm.create_model("ditac", base="resnet50").')
    if kwargs.get("pretrained_cfg") == PretrainedCfg(architecture="ditac").to_dict():
        del kwargs["pretrained_cfg"]  # what timm's scripts put for a name without tags, and the base has its own
    return _build("ditac", base, ditac or {}, pretrained, **kwargs)


def _register_variant(name: str, base: str, arguments: dict[str, Any]) -> None:
    def entrypoint(pretrained: bool = False, **kwargs) -> nn.Module:
        return _build(name, base, arguments | kwargs.pop("ditac", {}), pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"{base} with DiTAC in the place of its {'Hardswish' if arguments else 'activations'}."
    entrypoint.__module__ = __name__
    # As registered, so with the repository's whole name: timm would complete "timm/" by the variant's.
    weights = {split_model_name_tag(tagged)[1]: cfg for tagged, cfg in get_arch_pretrained_cfgs(base).items()}
    default_cfgs[name] = DefaultCfg(tags=deque(weights), cfgs=weights, is_pretrained=True)
    globals()[name] = register_model(entrypoint)


for _name, (_base, _arguments) in _VARIANTS.items():
    _register_variant(_name, _base, _arguments)


def _build(
    architecture: str,
    base: str,
    arguments: Mapping[str, Any],
    pretrained: bool,
    pretrained_cfg: Any = None,
    **kwargs,
) -> nn.Module:
    base, tag = split_model_name_tag(base)
    if not timm.is_model(base):
        raise RuntimeError(f"base must be the name of a timm architecture, but is {base!r}.")
    if base == "ditac" or base in _VARIANTS:
        raise RuntimeError(f"base must be a timm architecture without DiTAC, but is {base!r}.")
    pretrained_cfg = pretrained_cfg or tag or None
    weights = _weights(base, pretrained_cfg) if pretrained and not kwargs.get("pretrained_cfg_overlay") else {}
    # What was saved with DiTAC, and says so, must have every theta.
    needs_thetas = weights.get("source") in ("hf-hub", "local-dir")
    with contextlib.ExitStack() as stack:
        if (repository := _repository(weights)) is not None:
            stack.enter_context(verified_download(repository, kwargs.get("cache_dir")))
        stack.enter_context(_surgery_at_construction(arguments, needs_thetas))
        model = model_entrypoint(base)(pretrained=pretrained, pretrained_cfg=pretrained_cfg, **kwargs)
    for module in model.modules():  # features hold it one level down
        if isinstance(module, _WithDiTAC):
            module.ditac_needs_thetas = False
    model.pretrained_cfg = {**model.pretrained_cfg, "architecture": architecture}
    model.default_cfg = model.pretrained_cfg
    return model


def _weights(base: str, pretrained_cfg: Any) -> dict[str, Any]:
    """What timm knows of the weights of a base's tag; nothing of those that it has no entry of."""
    if isinstance(pretrained_cfg, dict):
        return pretrained_cfg
    if not isinstance(pretrained_cfg, PretrainedCfg):
        pretrained_cfg = get_pretrained_cfg(f"{base}.{pretrained_cfg}" if pretrained_cfg else base)
    return pretrained_cfg.to_dict() if pretrained_cfg else {}


def _repository(weights: dict[str, Any]) -> str | None:
    """The Hub's repository that weights will come from, if they do."""
    source, place = _resolve_pretrained_source(weights)
    if source != "hf-hub":
        return None
    return place if isinstance(place, str) else place[0]  # with the name of a file


_lock = threading.RLock()


@contextlib.contextmanager
def _surgery_at_construction(arguments: Mapping[str, Any], needs_thetas: bool) -> Iterator[None]:
    """While this lasts, every model that timm's builder constructs gets its activations replaced at once.

    Each of timm's model files holds the builder by name, and a base's entrypoint passes to it what only the base
    knows (checkpoint filter, features, strictness), so the builder's name is exchanged in all of them.
    """
    builder = timm.models.build_model_with_cfg
    thread = threading.get_ident()

    def build(model_cls: Callable[..., nn.Module], *args, **kwargs) -> nn.Module:
        if threading.get_ident() != thread:  # someone else's model, meanwhile
            return builder(model_cls, *args, **kwargs)
        return builder(functools.partial(_construct, model_cls, arguments, needs_thetas), *args, **kwargs)

    with _lock:
        holders = [
            module
            for name, module in list(sys.modules.items())
            if name.startswith("timm.models.") and getattr(module, "build_model_with_cfg", None) is builder
        ]
        try:
            for module in holders:
                module.build_model_with_cfg = build  # type: ignore[attr-defined]
            yield
        finally:
            for module in holders:
                module.build_model_with_cfg = builder  # type: ignore[attr-defined]


def _construct(
    model_cls: Callable[..., nn.Module], arguments: Mapping[str, Any], needs_thetas: bool, **kwargs
) -> nn.Module:
    model = model_cls(**kwargs)
    before = set(model.state_dict())
    model.ditac_report = replace_activations(model, **arguments)  # type: ignore[assignment]
    model.ditac_removed_keys = frozenset(before - set(model.state_dict()))  # type: ignore[assignment]
    model.ditac_arguments = dict(arguments)  # type: ignore[assignment]
    model.ditac_needs_thetas = needs_thetas  # type: ignore[assignment]
    model.__class__ = _class_with_ditac(type(model))
    return model


class _WithDiTAC(nn.Module):
    """What a model of the zoo adds to the base's class."""

    ditac_report: SurgeryReport
    ditac_arguments: dict[str, Any]
    _model_args: dict[str, Any]
    ditac_removed_keys: frozenset[str]
    ditac_needs_thetas: bool = False  # while what was saved with DiTAC is loaded

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """A base model's weights leave theta as it is; a DiTAC model's must have every theta, strict or not."""
        thetas = {prefix + name: theta for name, theta in _thetas(self).items()}
        # What MobileNetV3 holds as `bn1.act`, its twin for `features_only` holds as `act1`.
        stem, twin = f"{prefix}bn1.act.theta", f"{prefix}act1.theta"
        if stem in state_dict and stem not in thetas and twin in thetas:
            state_dict[twin] = state_dict.pop(stem)
        missing = [key for key in thetas if key not in state_dict]
        none = len(missing) == len(thetas) and not any(key.endswith(".theta") for key in state_dict)
        other = [key for key in thetas if key in state_dict and state_dict[key].shape != thetas[key].shape]
        if none and not self.ditac_needs_thetas:
            state_dict.update(thetas)
            for name in self.ditac_removed_keys:  # weights of the activations replaced
                state_dict.pop(prefix + name, None)
            _logger.info(f"The checkpoint has no thetas: {len(thetas)} DiTAC activations stay as initialised.")
        elif missing:
            error_msgs.append(
                f"The checkpoint lacks theta of {len(missing)} of the model's {len(thetas)} DiTAC activations "
                f"(the first: {missing[0]}); it belongs to a model with other DiTAC settings."
            )
        elif other:
            error_msgs.append(
                f"The checkpoint's {other[0]} has {state_dict[other[0]].numel()} numbers and the model's "
                f"{thetas[other[0]].numel()}; it belongs to a model with another number of DiTAC cells."
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def set_ditac_domains(self, domains: dict[str, list[float]]) -> None:
        """Have the model saved with these domains of its activations, by path."""
        self.ditac_arguments["domain"] = domains
        saved = self._model_args  # what timm's factory saves a model with
        self._model_args = {**saved, "ditac": {**(saved.get("ditac") or {}), "domain": domains}}

    def reset_classifier(self, *args, **kwargs):
        super().reset_classifier(*args, **kwargs)  # type: ignore[misc]
        # MetaFormer's makes a new head, with an activation in it.
        with contextlib.suppress(NothingMatchedError):
            replace_activations(self, **self.ditac_arguments)

    def __reduce_ex__(self, protocol):
        # The class is made at run time, so a pickle names the base's.
        return _blank, (type(self).__bases__[1],), self.__getstate__()


class _WithDiTACAndGroups(_WithDiTAC):
    """The same, for a base that groups its parameters by layer."""

    def group_matcher(self, *args, **kwargs):
        """The base's groups, and each theta in the group of the parameter that it stands beside."""
        matcher = super().group_matcher(*args, **kwargs)  # type: ignore[misc]
        beside = _neighbours(self)
        of_base = ((name, parameter) for name, parameter in self.named_parameters() if name not in beside)
        groups = group_with_matcher(of_base, matcher, reverse=True)
        return lambda name: groups.get(beside.get(name, name), float("inf"))


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _class_with_ditac(base: type[nn.Module]) -> type[nn.Module]:
    if base not in _classes:
        mixin = _WithDiTACAndGroups if hasattr(base, "group_matcher") else _WithDiTAC
        _classes[base] = type(base.__name__, (mixin, base), {"__module__": base.__module__, "__doc__": base.__doc__})
    return _classes[base]


def _blank(base: type[nn.Module]) -> nn.Module:
    cls = _class_with_ditac(base)
    return cls.__new__(cls)


def _thetas(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{path}.theta": module.theta.detach() for path, module in model.named_modules() if isinstance(module, DiTAC)
    }


def _neighbours(model: nn.Module) -> dict[str, str]:
    """For each theta the base's parameter beside it: in the innermost module that has one, the one before, or after."""
    thetas = _thetas(model)
    names = [name for name, _ in model.named_parameters()]
    neighbours = {}
    for position, name in enumerate(names):
        prefix = name if name in thetas else ""
        while prefix:
            prefix = prefix.rpartition(".")[0]
            inside = [i for i, n in enumerate(names) if n not in thetas and n.startswith(prefix and f"{prefix}.")]
            if inside:
                neighbours[name] = names[max((i for i in inside if i < position), default=inside[0])]
                break
    return neighbours
