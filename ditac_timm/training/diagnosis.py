"""Where a model stops being finite."""

from typing import Any

import torch
from timm.utils import unwrap_model
from torch import nn

__all__ = ["not_finite"]

_MOST = 3  # names in a sentence


def not_finite(model: nn.Module, images: torch.Tensor, autocast: Any) -> str:
    """Name the layers whose parameters, or else whose outputs for some images, are not finite.

    Args:
        model: As it trains.
        images: Its input.
        autocast: The context it runs in.
    """
    model = unwrap_model(model)
    parameters = [name for name, value in model.named_parameters() if not bool(value.isfinite().all())]
    if parameters:
        return f"parameters that are not finite: {_some(parameters)}"
    layers: list[str] = []

    def watch(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple | list) else (output,)
            if any(isinstance(t, torch.Tensor) and not bool(t.isfinite().all()) for t in tensors):
                layers.append(name)

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
    hooks = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        with torch.no_grad(), autocast:
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if layers:
        return f"layers whose outputs are not finite, in order: {_some(layers)}"
    return "all parameters and outputs of the latest batch are finite"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(names[:_MOST]) + more
