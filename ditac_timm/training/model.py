"""The model a command line asks for."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.models import get_model_input_config, load_model_config_from_hf, parse_model_name
from timm.models._hub import load_model_config_from_path
from torch import nn

from ditac_timm import DiTAC, create_model
from ditac_timm.training.device import Precision
from ditac_timm.training.errors import UsageError, as_typed, first_line, suggestion

# The flags that name arguments of a model; --model-kwargs gives any other.
FLAGS = {
    "num_classes": "--num-classes",
    "in_chans": "--in-chans",
    "global_pool": "--gp",
    "drop_rate": "--drop",
    "drop_path_rate": "--drop-path",
    "drop_block_rate": "--drop-block",
    "bn_momentum": "--bn-momentum",
    "bn_eps": "--bn-eps",
    "img_size": "--img-size",
}
# Likewise the settings in its argument `ditac`.
DITAC_FLAGS = {name: f"--ditac-{name}" for name in ("version", "init", "domain", "cells", "roles")}


def check_model_name(name: str, flag: str = "--model") -> None:
    """Refuse a name that neither timm nor ditac_timm knows, with the nearest names they do."""
    try:
        source, _ = parse_model_name(name)
    except ValueError as error:
        raise UsageError(f"{flag} {name}: {error}") from error
    if source:  # a folder or a Hub repository; its own config names the architecture
        return
    architecture, _, tag = name.partition(".")
    base = architecture.removesuffix("_ditac")
    if not timm.is_model(architecture) and not timm.is_model(base):
        suffix = "" if base == architecture else "_ditac"
        known = sorted({*timm.list_models(), *(model + suffix for model in timm.list_models())})
        raise UsageError(f"{flag} {name} is unknown{suggestion(architecture, known)}")
    if tag:
        weights = base if timm.is_model(base) else architecture
        tags = [model.partition(".")[2] for model in timm.list_models(weights, include_tags=True)]
        if tag not in tags:
            raise UsageError(f"{flag} {name}: {weights} has no weights {tag!r}{suggestion(tag, tags)}")


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that, with the architecture's name, rebuild the model for evaluation.

    Only what was asked for: None leaves a default to the architecture. Regularisation is training's own business.
    """
    arguments = {
        "num_classes": args.num_classes,
        "in_chans": args.input_size[0] if args.input_size else args.in_chans,
        "global_pool": args.gp,
        "bn_momentum": getattr(args, "bn_momentum", None),
        "bn_eps": getattr(args, "bn_eps", None),
    }
    arguments = {name: value for name, value in arguments.items() if value is not None} | args.model_kwargs
    if settings := _ditac_settings(args):
        others = arguments.get("ditac", {})
        if not isinstance(others, dict):
            raise UsageError(f"--model-kwargs ditac must be a mapping of settings, not {others!r}")
        arguments["ditac"] = others | settings
    return arguments


def as_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """A model's arguments, each under what gives it on the command line."""
    options: dict[str, Any] = {}
    for name, value in arguments.items():
        if name == "ditac" and isinstance(value, dict):
            options |= {DITAC_FLAGS.get(key, f"--model-kwargs ditac {key}"): value[key] for key in value}
        else:
            options[FLAGS.get(name, f"--model-kwargs {name}")] = value
    return options


def regularisation_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that matter in training only."""
    drop_path = args.drop_connect if args.drop_path is None else args.drop_path
    arguments = {"drop_rate": args.drop, "drop_path_rate": drop_path, "drop_block_rate": args.drop_block}
    return {name: value for name, value in arguments.items() if value is not None}


def image_size_argument(
    name: str, arguments: dict[str, Any], args: argparse.Namespace, flag: str = "--model"
) -> dict[str, Any]:
    """`img_size` for the architectures that are built for one image size, where flags ask for a size; else nothing."""
    size = tuple(args.input_size[1:]) if args.input_size else args.img_size
    if size is None or "img_size" in arguments:
        return {}
    with torch.device("meta"):
        fixed = get_model_input_config(build_model(name, arguments, flag=flag))["fixed_input_size"]
    return {"img_size": size} if fixed else {}


def build_model(
    name: str,
    arguments: dict[str, Any],
    *,
    pretrained_path: Path | None = None,
    flag: str = "--model",
    **kwargs: Any,
) -> Any:
    """Create a model; what timm, or the architecture, does not take is refused.

    Args:
        name: Any name of `ditac_timm.create_model`.
        arguments: See `model_arguments`.
        pretrained_path: A file to read pretrained weights from, instead of the architecture's own.
        flag: The flag that gave the name, for what is said of it.
        **kwargs: More arguments of `create_model`, `pretrained` for one.
    """
    if pretrained_path:
        kwargs["pretrained_cfg_overlay"] = {"file": str(pretrained_path), "num_classes": -1}
    try:
        return create_model(name, **_with_saved_settings(name, arguments), **kwargs)
    # Whatever timm, the Hub and an architecture's own checks raise where a name, a file or an argument is wrong.
    except (
        OSError, ValueError, RuntimeError, AssertionError, LookupError, AttributeError, TypeError,
        SafetensorError, HTTPError,
    ) as error:  # fmt: skip
        if "unexpected keyword argument" in str(error):
            refused = str(error).rpartition("argument ")[2]
            if refused == "'ditac'":
                option = next(iter(as_options({"ditac": arguments["ditac"]})), "--model-kwargs ditac")
                raise UsageError(f"{option} is about DiTAC, and {flag} {name} has none: leave it out") from error
            raise UsageError(f"{flag} {name} takes no {refused}: see --model-kwargs and --drop-*") from error
        source = f"--pretrained-path {pretrained_path}" if pretrained_path else "--pretrained"
        if "loading state_dict" in str(error):
            raise UsageError(f"{source} does not fit {flag} {name}, its weights are of another model") from error
        asked = [f"{option} {as_typed(value)}" for option, value in as_options(arguments).items()]
        asked += [source] if kwargs.get("pretrained") and flag == "--model" else []
        raise UsageError(f"{' '.join([f'{flag} {name}', *asked])} cannot be created: {first_line(error)}") from error


def _with_saved_settings(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, where the DiTAC settings not named are those that a folder or Hub repository holds."""
    source, place = parse_model_name(name)
    if source is None or "ditac" not in arguments:  # timm itself would put the few that are named for all of them
        return arguments
    _, _, saved = load_model_config_from_hf(place) if source == "hf-hub" else load_model_config_from_path(place)
    return {**arguments, "ditac": {**(saved or {}).get("ditac", {}), **arguments["ditac"]}}


def source_of(model: Any, name: str, arguments: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The architecture and arguments that rebuild a model without the folder or Hub repository it came from."""
    if parse_model_name(name)[0] is None:
        return name, arguments
    saved = model.pretrained_model_args
    if "ditac" in saved and "ditac" in arguments:
        arguments = {**arguments, "ditac": {**saved["ditac"], **arguments["ditac"]}}
    return model.pretrained_cfg["architecture"], {**saved, **arguments}


def ditac_layers(model: nn.Module, flag: str) -> list[DiTAC]:
    """A model's DiTAC activations; a model without any is refused, because a flag is about them."""
    layers = [module for module in model.modules() if isinstance(module, DiTAC)]
    if not layers:
        raise UsageError(f"{flag} is about DiTAC, and --model has none: leave it out")
    return layers


def init_head(model: Any, args: argparse.Namespace) -> None:
    """Apply --head-init-scale and --head-init-bias."""
    with torch.no_grad():
        for parameter in _head_parameters(model):
            if args.head_init_scale is not None:
                parameter.mul_(args.head_init_scale)
            if args.head_init_bias is not None and parameter.ndim == 1:
                parameter.fill_(args.head_init_bias)


def enable_grad_checkpointing(model: Any) -> None:
    """Apply --grad-checkpointing."""
    try:
        model.set_grad_checkpointing(enable=True)
    except (AssertionError, AttributeError) as error:
        raise UsageError(f"--grad-checkpointing: {type(model).__name__} does not support it, leave it out") from error


def place(model: nn.Module, args: argparse.Namespace, precision: Precision) -> nn.Module:
    """Move a model to its device, dtype and memory format, with the batch norm layers that training asks for."""
    if getattr(args, "split_bn", False):
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    model = model.to(precision.device, precision.model_dtype)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if getattr(args, "sync_bn", False) and args.distributed:
        model = convert_sync_batchnorm(model)
    return model


def _ditac_settings(args: argparse.Namespace) -> dict[str, Any]:
    settings = {name: getattr(args, f"ditac_{name}", None) for name in DITAC_FLAGS}
    if settings["domain"] is not None:  # a YAML file may give whole numbers
        settings["domain"] = [float(end) for end in settings["domain"]]
    return {name: value for name, value in settings.items() if value is not None}


def _head_parameters(model: Any) -> Iterator[nn.Parameter]:
    head = model.get_classifier()
    for layer in head if isinstance(head, tuple | list) else (head,):  # distilled models have two
        yield from layer.parameters()
