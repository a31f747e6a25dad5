"""`torch.vmap` of the operators: one table is looked up for all of x at once; all else goes row by row."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["register"]


def register(name: str) -> None:
    """Give an operator its rule."""
    operator = getattr(torch.ops.ditac, name).default

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        if name in ("lookup", "evaluate") and in_dims[1] is None and in_dims[2] is None:
            return operator(*arguments), in_dims[0]
        if not info.batch_size:
            raise ValueError(f"torch.vmap over ditac::{name} needs a row at least.")
        outputs = [
            operator(*(a.select(d, row) if isinstance(d, int) else a for a, d in zip(arguments, in_dims, strict=True)))
            for row in range(info.batch_size)
        ]
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs), 0
        return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True)), (0,) * len(outputs[0])

    torch.library.register_vmap(f"ditac::{name}", rule)
