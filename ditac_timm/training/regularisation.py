"""The smoothness prior on thetas, as a term of the training loss."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ditac_timm.cpab import Tessellation, smoothness_penalty
from ditac_timm.training.model import ditac_layers


def smoothness_term(model: nn.Module, weight: float) -> Callable[[], Tensor] | None:
    """The term that --ditac-reg adds to the loss of an update, to be called once for each.

    Args:
        model: Placed on its device, but not wrapped yet.
        weight: LAMBDA of `LAMBDA * sum over layers of theta^T P theta`; see `cpab.smoothness_penalty` for P.

    Returns:
        A function of nothing that returns the term, a float32 scalar; None where the weight is 0.
    """
    if not weight:
        return None
    thetas: dict[Tessellation, list[Tensor]] = defaultdict(list)
    for layer in ditac_layers(model, "--ditac-reg"):
        thetas[layer.tessellation].append(layer.theta)

    def term() -> Tensor:
        # All layers of a tessellation at once; in float32 also where the weights are in half precision.
        penalties = [smoothness_penalty(torch.stack(rows).float(), cells).sum() for cells, rows in thetas.items()]
        return weight * torch.stack(penalties).sum()

    return term
