"""Tables: as Markdown, JSON and CSV of each experiment, and docs/reproduction.md of all."""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..training.checkpoint import write_atomically
from .results import Row, difference, rows_of, spread, verdict
from .study import Experiment, Job
from .tasks import TASKS, Task

__all__ = ["Part", "markdown", "part_of", "reproduction", "write"]


class Part(NamedTuple):
    """An experiment's results on one task."""

    experiment: Experiment
    task: Task  # as it was run
    rows: list[Row]

    @property
    def paper(self) -> Mapping[str, float]:
        return (self.experiment.paper or {}).get(self.task.name, {})

    @property
    def seeds(self) -> int:
        return len(self.rows[0].final)


def part_of(experiment: Experiment, jobs: Sequence[Job], out: Path) -> Part:
    """Read the results of an experiment's jobs, all of one task."""
    task = jobs[0].task
    return Part(experiment, task, rows_of([job.result(out) for job in jobs], task.paper_rate))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown; the first column to the left, the others to the right."""
    lines = [list(head), ["---", *["---:"] * (len(head) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plus_minus(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    return "diverged" if math.isnan(mean) else f"{mean:.2f} ± {spread(values):.2f}"


def markdown(part: Part) -> str:
    """The table of an experiment on one task, what it says, and how it was made."""
    task, rows = part.task, part.rows
    metric = "accuracy" if task.classes else "R²"
    printed = bool(part.paper)
    head = ["activation", "parameters", "learning rate", f"{metric}, final", f"{metric}, best over training"]
    head += [] if task.classes else ["MSE, final"]
    head += [f"at {task.paper_rate:g}"] + ["paper"] * printed
    reference = next((row for row in rows if row.activation == _reference(part)), None)
    head += [f"less {reference.activation}"] if reference else []
    body = []
    for row in rows:
        line = [row.activation, f"{row.parameters:,}", f"{row.rate:g}", plus_minus(row.final), plus_minus(row.best)]
        line += [] if task.classes else [f"{sum(row.mse) / len(row.mse):.4g}"]
        line += ["" if row.paper_rate is None else f"{row.paper_rate:.1f}"]
        line += [f"{part.paper[row.activation]}" if row.activation in part.paper else ""] * printed
        if reference:
            line += ["" if row is reference else str(difference(row.final, reference.final))]
        body.append(line)
    said = verdict(rows, part.paper)
    bayes = [rate for rate in rows[0].result["bayes"] if rate is not None]
    lines = [table(head, body), ""]
    lines += [f"Who knows the mixture reaches {plus_minus(bayes)}.", ""] if bayes else []
    lines += [f"**{said.word.capitalize()}.** {said.why}.", ""] if said else []
    lines += [_settings(part)]
    return "\n".join(lines)


def _reference(part: Part) -> str | None:
    """What all others are compared with, seed by seed: DiTAC with the init that validation prefers."""
    main = [row for row in part.rows if row.activation in ("DiTAC", "DiTAC-prior")]
    return max(main, key=lambda row: row.validation).activation if main else None


def _settings(part: Part) -> str:
    task = part.task
    rates = ", ".join(f"{rate:g}" for rate in task.rates)
    return (
        f"{task.title}; layers {'-'.join(map(str, task.sizes))}, {task.steps:,} updates of {task.batch} examples, "
        f"Adam, learning rates {rates}, {part.seeds} seed{'s' * (part.seeds > 1)}, {task.evaluations} evaluations."
    )


def write(experiment: Experiment, parts: Sequence[Part], out: Path, surroundings: Mapping[str, Any]) -> str:
    """Write NAME.json, NAME.csv and NAME.md into the folder, and return the last."""
    text = "\n\n".join([f"# {experiment.title}", *map(markdown, parts)]) + "\n"
    rows = [
        {"task": part.task.name, **row.to_dict(), "paper": part.paper.get(row.activation)}
        for part in parts
        for row in part.rows
    ]
    verdicts = {part.task.name: said._asdict() for part in parts if (said := verdict(part.rows, part.paper))}
    settings = {part.task.name: _settings(part) for part in parts}
    document = {
        "experiment": experiment.name, "settings": settings, "verdicts": verdicts, "rows": rows,
        "environment": dict(surroundings),
    }  # fmt: skip
    sheet = io.StringIO()
    writer = csv.DictWriter(sheet, [key for key in rows[0] if key not in ("final", "best")], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    documents = {"json": json.dumps(document, indent=1), "csv": sheet.getvalue(), "md": text}
    for suffix, content in documents.items():
        write_atomically(out / f"{experiment.name}.{suffix}", partial(_put, content))
    return text


def _put(content: str, stream: Any) -> None:
    stream.write(content.encode())


_HEAD = """# The paper's experiments, run again

What *Trainable Highly-expressive Activation Functions* (ECCV 2024) and its supplement claim of small networks, trained
anew with this package's own activations. This page and its pictures are written by

```bash
{command}
```

**How.** Multilayer perceptrons as in the supplement's section A, Adam without weight decay. Every activation is trained
with the same learning rates, and the one with the best mean over seeds on *validation* data is reported, on *test*
data: "final" after the last update; "best over training" the highest of all looks at the test, which nobody can know
when to stop for. The paper chose each competitor's rate by "best performance", on which data it does not say; the
column "at ..." has the rate that it names for DiTAC. A seed fixes weights, data and batches, alike for all activations,
so differences are paired by seed; in brackets are 95 % intervals by Student's t. ± is the standard deviation.

**Holds** says that DiTAC is better than the best competitor by an interval above 0, and not below the paper's figure by
more than 1.5 points; **direction only**, that its mean is higher; else **not reproduced**. Both are the ones that
validation prefers: of DiTAC's two inits, and among the competitors.
"""

_NOTES = {
    "sinexp": """
The supplement does not print the domain. On (0, 1) and (-1, 1) the target's last period is 0.0026 wide, too narrow for
thirty units, and nothing learns it; on (-1, 0.5) it is 0.05 wide, the activations differ, and the figures come near the
paper's.
""",
    "plane": """
The first term is sin(9x - 7y), as in the official code; the supplement prints sin(9xy).
""",
    "autompg": """
392 cars with both quantities, split anew for each seed: 64 % to learn from, 16 % to choose by, 20 % to test on. The
paper prints one number each.
""",
    "mnist": """
The supplement's learning rate of "1 * 10^4" is read as 1e-4.
""",
    "gmm": """
The supplement does not print the prior's parameters: here a normal-inverse-Wishart distribution of mean 0, kappa 0.1,
the identity and 5 degrees of freedom, and Dirichlet weights of concentration 10. Each seed has its own mixture.
""",
}


def reproduction(
    parts: Sequence[Part], images: str | None, pictures: Mapping[str, str], surroundings: Mapping[str, Any]
) -> str:
    """The page of all experiments.

    Args:
        parts: Results, in order.
        images: The section on real images, where it was run.
        pictures: For a task's name, or "versions" and "learned", a Markdown image.
        surroundings: Machine and versions.
    """
    environment = {key: value for key, value in surroundings.items() if key not in ("load_average", "allocator")}
    lines = [_HEAD.format(command=environment.pop("command")), "## What holds", ""]
    body = [
        [part.experiment.title, part.task.title, said.word, said.why]
        for part in parts
        if part.experiment.name not in ("table9", "ablation") and (said := verdict(part.rows, part.paper))
    ]
    body += [
        ["Table 9: the versions of DiTAC", part.task.title, *_versions(part)]
        for part in parts
        if part.experiment.name == "table9"
    ]
    lines += [table(["claim", "task", "verdict", "why"], body), ""]
    seen = ""
    for part in parts:
        if part.experiment.title != seen:
            seen = part.experiment.title
            lines += [f"## {seen}", ""]
        lines += [f"### {part.task.title}", "", markdown(part), ""]
        if part.experiment.name not in ("table9", "ablation"):
            lines += [_NOTES.get(part.task.name, "").strip(), "", pictures.get(part.task.name, ""), ""]
        if part.experiment.name == "table9":
            lines += [
                f"**{_versions(part)[0].capitalize()}.** {_versions(part)[1]}.",
                "",
                pictures.get("versions", ""),
                "",
            ]
    choices = _choices(parts)
    if choices:
        lines += ["## What to choose", "", choices, ""]
    if images:
        lines += ["## Real images", "", images, ""]
    if "learned" in pictures:
        lines += ["## What activations learn", "", pictures["learned"], ""]
    lines += ["## Where", "", table(["", ""], [[key, str(value)] for key, value in environment.items()])]
    return re.sub("\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _versions(part: Part) -> tuple[str, str]:
    """Whether Table 9's order is more than noise: GE-DiTAC is best there."""
    rows = {row.activation: row for row in part.rows}
    families = [
        max(
            (row for name, row in rows.items() if name.removesuffix("-prior") == version),
            key=lambda row: row.validation,
        )
        for version in ("DiTAC", "GE-DiTAC", "L-DiTAC", "inf-DiTAC")
        if version in rows
    ]
    if len(families) < 2:
        return "not run", "it needs more than one version"
    order = sorted(families, key=lambda row: -sum(row.final))
    gap = difference(order[0].final, order[-1].final)
    best = "; ".join(f"{row.activation} {max(row.final):.1f}" for row in families)
    said = (
        f"first and last, {order[0].activation} and {order[-1].activation}, differ by {gap} points (best seeds: {best})"
    )
    if gap.low <= 0:
        return "not reproduced", f"the order is within the noise of seeds: {said}"
    if order[0].activation.startswith("GE-DiTAC"):
        return "holds", said
    return "not reproduced", f"another version is best: {said}"


def _choices(parts: Sequence[Part]) -> str:
    """What a user asks, each with the paired difference from the default on every task that was run."""
    questions = (
        ("Which init?", ("DiTAC-prior",)),
        ("Which version?", ("GE-DiTAC", "L-DiTAC", "inf-DiTAC")),
        ("Which domain?", ("DiTAC-domain-1", "DiTAC-domain-6")),
        ("How many cells?", ("DiTAC-5-cells", "DiTAC-20-cells")),
        ("Regularisation?", ("DiTAC-reg-0.001", "DiTAC-reg-0.1")),
    )
    by_task: dict[str, dict[str, Row]] = {}
    for part in parts:  # of what was run twice, the one with more seeds
        rows = by_task.setdefault(part.task.name, {})
        rows |= {r.activation: r for r in part.rows if len(r.final) > len(getattr(rows.get(r.activation), "final", ()))}
    by_task = {task: rows for task, rows in by_task.items() if "DiTAC" in rows}
    body = []
    for question, names in questions:
        for name in names:
            gaps = [
                str(difference(rows[name].final, rows["DiTAC"].final)) if name in rows else ""
                for rows in by_task.values()
            ]
            if any(gaps):
                body.append([question, name, *gaps])
                question = ""
    if not body:
        return ""
    return (
        "Final test score less that of the default (version `ditac`, identity init, ten cells, domain (-3, 3), no "
        "regularisation), in points, paired by seed, each at the rate that validation chose.\n\n"
        + table(["question", "instead of the default", *(TASKS[task].title for task in by_task)], body)
    )
