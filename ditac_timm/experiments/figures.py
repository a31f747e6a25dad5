"""The supplement's figures 8 to 13, and what the demo's model learned. Needs matplotlib."""

import importlib.util
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import ditac_timm

from .. import cpab
from ..activation import DEFAULT_DOMAINS, DiTAC
from ..training.errors import RunError, UsageError
from . import sources
from .report import Part
from .results import Row, best_on_validation
from .tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["NEEDED", "check_packages", "draw"]

NEEDED = ("table2", "table8", "mnist", "gmm")  # the experiments whose results are drawn

_ROOT = Path(ditac_timm.__file__).parents[1]
_MAIN = {"DiTAC": "#c2410c", "DiTAC-prior": "#f59e0b"}
_VERSIONS = {"GE-DiTAC": "#7c3aed", "L-DiTAC": "#db2777", "inf-DiTAC": "#4d7c0f"}
_OTHERS = ("#1d4ed8", "#0891b2", "#059669", "#64748b", "#111827", "#60a5fa", "#84cc16", "#a8a29e", "#78350f")


def draw(parts: Sequence[Part], folder: Path, out: Path, quick: bool = False) -> dict[str, str]:
    """Draw what the results allow.

    Args:
        parts: Results.
        folder: Gets the pictures, as PNG.
        out: The folder of results; the demo is trained there, once.
        quick: Whether the demo is trained for one epoch.

    Returns:
        The pictures' names, without ending, and their captions.

    Raises:
        UsageError: As `check_packages`.
        RunError: The demo failed.
    """
    check_packages()
    by_task = {part.task.name: part for part in parts if part.experiment.name in NEEDED}
    pictures: dict[str, tuple[str, Callable[[], "Figure"]]] = {
        name: (caption, partial(_trend, by_task[name]))
        for name, caption in (
            ("sinexp", "Test error over training, and the function learned (figures 10 and 11)"),
            ("plane", "Test error over training"),
            ("sines", "Test error over training, and the function learned (figure 12)"),
            ("mnist", "Test accuracy over training (figure 9)"),
        )
        if name in by_task
    }
    pictures["gmm"] = "A sample of ten Gaussians, to learn from and to test on (figure 8)", _mixture
    pictures["versions"] = "A velocity field, and the four versions of DiTAC that it makes (figure 13)", _four_versions
    for name, (_, picture) in pictures.items():
        picture().savefig(folder / f"{name}.png", dpi=130)
    shutil.copyfile(_demo(out / ("demo-quick" if quick else "demo"), quick), folder / "learned.png")
    captions = {name: caption for name, (caption, _) in pictures.items()}
    return captions | {"learned": "The activations that mobilenetv3_ditac learned on handwritten digits, over GELU"}


def check_packages() -> None:
    """Raise UsageError if matplotlib or scikit-learn is missing, or this is not a clone of the repository."""
    for package in ("matplotlib", "sklearn"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"figures need {package}: pip install 'ditac_timm[experiments]'")
    if not (_ROOT / "demo.py").is_file():
        raise UsageError(f"figures draw what the repository's demo.py trains, which {_ROOT} lacks: run it in a clone")


def _figure(columns: int, rows: int = 1, height: float = 4.2, width: float = 5.2, **kwargs: Any):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, **kwargs)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    return figure, panels


def _style(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    name = row.activation
    if name in _MAIN:
        return {"color": _MAIN[name], "linewidth": 2.4, "zorder": 3}
    if name in _VERSIONS:
        return {"color": _VERSIONS[name], "linewidth": 1.6, "linestyle": "--", "zorder": 2}
    others = [other.activation for other in rows if other.activation not in (*_MAIN, *_VERSIONS)]
    return {"color": _OTHERS[others.index(name) % len(_OTHERS)], "linewidth": 1.2}


def _trend(part: Part) -> "Figure":
    """Of each activation at its rate, mean over seeds; for a function of one variable also what was learned."""
    task, rows = part.task, part.rows
    curve = not task.classes and task.sizes[0] == 1 and "outputs" in rows[0].result
    figure, ((trend, *more),) = _figure(1 + curve)
    for row in rows:
        y = row.trend("test" if task.classes else "mse")
        trend.plot(row.result["evaluated_at"], y, label=row.activation, **_style(row, rows))
    trend.set_xlabel("updates", fontsize=9)
    trend.set_title(task.title, fontsize=10)
    if task.classes:
        trend.set_ylabel("accuracy on the test, %", fontsize=9)
        best = max((max(row.trend("test")) for row in rows if math.isfinite(row.validation)), default=100.0)
        trend.set_ylim(best - 6, best + 0.3)
    else:
        trend.set_ylabel("mean squared error on the test", fontsize=9)
        trend.set_yscale("log")
    if more:
        _learned_function(more[0], part)
    figure.legend(*trend.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _learned_function(panel: "Axes", part: Part) -> None:
    """The target, and what DiTAC and the best competitor make of it, both of the first seed."""
    rows = part.rows
    x, y = TASKS[part.task.name].split(0, 1, Path()).test
    panel.plot(x[:, 0], y[:, 0], color="#cbd5e1", linewidth=4, label="target")
    mine = [row for row in rows if row.activation in _MAIN]
    others = [row for row in rows if "DiTAC" not in row.activation]
    for row in [best_on_validation(group) for group in (others, mine) if group]:
        style = _style(row, rows) | {"linewidth": 1.4}
        label = f"{row.activation} (R² {row.final[0]:.1f})"
        panel.plot(x[:, 0], row.result["outputs"][row.rate_index], label=label, **style)
    panel.set_title("learned, first seed", fontsize=10)
    panel.set_xlabel("x", fontsize=9)
    panel.set_ylim(y.min().item() - 0.5 * y.std().item(), y.max().item() + 1.6 * y.std().item())
    panel.legend(fontsize=8, frameon=False, loc="upper left")


def _mixture() -> "Figure":
    mixture = sources.draw_mixture(0)
    figure, (panels,) = _figure(2, sharex=True, sharey=True)
    low, high = (mixture.x.quantile(share, 0) for share in (0.005, 0.995))
    for panel, part, title in (
        (panels[0], slice(None, 3500), "training and validation, 3,500"),
        (panels[1], slice(3500, None), "test, 1,500"),
    ):
        panel.scatter(*mixture.x[part].T, c=mixture.y[part], cmap="tab10", s=4, linewidths=0)
        panel.set_title(title, fontsize=10)
        panel.set_xlim(low[0].item() - 1, high[0].item() + 1)
        panel.set_ylim(low[1].item() - 1, high[1].item() + 1)
    return figure


def _four_versions() -> "Figure":
    """One theta in each version's own domain; the field is drawn in the main version's."""
    theta = torch.tensor([0.6, 1.0, 0.3, -0.9, -1.3, -0.3, 0.9, 1.2, 0.5], dtype=torch.float64)
    figure, (panels,) = _figure(5, height=2.9, width=2.9)
    tessellation = cpab.Tessellation()
    panels[0].plot(tessellation.knots, tessellation.velocities(theta), color="#1d4ed8", marker="o", markersize=3)
    panels[0].axhline(0, color="#94a3b8", linewidth=0.8)
    panels[0].set_title("velocity field $v^\\theta$", fontsize=10)
    names = {"ditac": "DiTAC", "ge": "GE-DiTAC", "leaky": "L-DiTAC", "inf": "inf-DiTAC"}
    for panel, (version, name) in zip(panels[1:], names.items(), strict=True):
        act = DiTAC(version, dtype=torch.float64)
        with torch.no_grad():
            act.theta.copy_(theta)
        x = torch.linspace(-5, 5, 2001, dtype=torch.float64)
        y = act.curve(x)[1]
        for end in act.domain:  # a jump is not a slope
            y = torch.where((x - end).abs() <= 0.0025, torch.nan, y) if version == "leaky" else y
        panel.axvspan(*DEFAULT_DOMAINS[version], color="#f1f5f9")
        panel.plot(x, torch.nn.functional.gelu(x), color="#64748b", linestyle="--", linewidth=1, label="GELU")
        panel.plot(x, y, color=_MAIN["DiTAC"], linewidth=1.8, label="version")
        panel.set_title(name, fontsize=10)
        panel.set_ylim(-4.2, 5.2)
    panels[1].legend(fontsize=7, frameon=False, loc="upper left")
    return figure


def _demo(folder: Path, quick: bool) -> Path:
    """The picture that the demo's training draws; trained where it is not there."""
    picture = folder / "mobilenetv3_ditac" / "activations.png"
    if picture.is_file():
        return picture
    command = [sys.executable, str(_ROOT / "demo.py"), "--output", str(folder), *(["--epochs", "1"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    if done.returncode:
        raise RunError(f"demo.py failed: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    return picture


def _environment() -> Mapping[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))}
