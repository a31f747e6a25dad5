"""Pictures of learned activations. Needs matplotlib: `pip install ditac_timm[plot]`."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .activation import DiTAC

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_activations"]

_LEARNED, _START, _DOMAIN, _INPUTS = "#c2410c", "#64748b", "#f1f5f9", "#bfdbfe"


def plot_activations(
    model: nn.Module,
    path: str | Path | None = None,
    columns: int = 5,
    inputs: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> "Figure":
    """Draw every DiTAC of a model over the activation that theta = 0 gives (GELU, for the main version).

    Args:
        model: Any module that has DiTACs.
        path: Where to save the picture; its ending says the format (.png, .svg, .pdf).
        columns: Panels in a row.
        inputs: Histograms to draw behind the curves, by the layers' names: counts `(bins,)` and edges `(bins + 1,)`.
            Each is scaled to its panel's height.

    Returns:
        matplotlib's figure, one panel for each DiTAC in the order of the model.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The model has no DiTAC.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Drawing activations needs matplotlib: pip install ditac_timm[plot].") from error
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, DiTAC)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no DiTAC to draw.")
    columns = min(columns, len(layers))
    rows = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(2.4 * columns, 2.0 * rows + 0.5), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for panel, (name, layer) in zip(panels, layers, strict=False):
        learned = DiTAC(layer.version, layer.cells, layer.domain, device="cpu", dtype=torch.float64).eval()
        start = DiTAC(layer.version, layer.cells, layer.domain, device="cpu", dtype=torch.float64).eval()
        with torch.no_grad():
            learned.theta.copy_(layer.theta)
        x, y = learned.curve(401)
        panel.axvspan(*layer.domain, color=_DOMAIN)
        counts, edges = (inputs or {}).get(name, (None, None))
        if counts is not None and edges is not None and counts.sum() > 0:
            heights = torch.cat((counts, counts[-1:])).double() / counts.max() * 0.9
            in_panel = panel.get_xaxis_transform()  # x as the curves', y from 0 to 1
            panel.fill_between(edges, heights, step="post", color=_INPUTS, linewidth=0, transform=in_panel)
        panel.plot(x, start.curve(x)[1], color=_START, linestyle="--", linewidth=1)
        panel.plot(x, y, color=_LEARNED, linewidth=1.6)
        panel.set_title(name or "DiTAC", fontsize=7)
        panel.tick_params(labelsize=6)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(layers) :]:
        panel.set_axis_off()
    before = "GELU" if all(layer.version == "ditac" for _, layer in layers) else "theta = 0"
    handles: list[Any] = [panels[0].lines[0], panels[0].lines[1]]
    labels = [before, "learned"]
    filled = [collection for panel in panels for collection in panel.collections]
    if filled:
        handles, labels = [*handles, filled[0]], [*labels, "inputs"]
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8, frameon=False)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
