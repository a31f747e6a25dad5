"""Tables: as Markdown, JSON and CSV of each experiment, and docs/reproduction.md of all."""

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..training.checkpoint import write_atomically
from .results import (
    MAIN,
    Difference,
    Row,
    Verdict,
    best_on_validation,
    difference,
    plus_minus,
    rows_of,
    verdict,
)
from .study import Experiment, Job
from .tasks import Task

__all__ = ["Part", "markdown", "part_of", "reproduction", "table", "write"]

QUICK = "Shortened by `--quick`: these figures show that it runs, and nothing else."


class Part(NamedTuple):
    """An experiment's results on one task."""

    experiment: Experiment
    task: Task  # as it was run
    rows: list[Row]
    quick: bool = False

    @property
    def paper(self) -> Mapping[str, float]:
        return (self.experiment.paper or {}).get(self.task.name, {})

    @property
    def seeds(self) -> int:
        return len(self.rows[0].final)

    def minus(self, first: Row, second: Row) -> Difference:
        """Of as many seeds as both have, which begin alike."""
        number = min(len(first.final), len(second.final))
        return difference(first.final[:number], second.final[:number], self.task.overlap)

    def verdicts(self) -> dict[str, Verdict]:
        """Of the claim that DiTAC is best, by what it is said of; none of shortened runs."""
        if self.quick or self.experiment.name in ("table9", "ablation"):
            return {}
        said = {"": verdict(self.rows, self.paper, self.task.overlap)}
        if self.task.classes:  # what the paper shows there is at one rate
            at_rate = verdict(self.rows, self.paper, self.task.overlap, at_paper_rate=True)
            said = {"learning rates tuned": said[""], f"learning rate {self.task.paper_rate:g}": at_rate}
        return {what: found for what, found in said.items() if found}


def part_of(experiment: Experiment, jobs: Sequence[Job], out: Path, quick: bool = False) -> Part:
    """Read the results of an experiment's jobs, all of one task."""
    task = max((job.task for job in jobs), key=lambda task: len(task.rates))  # competitors may have more of them
    return Part(experiment, task, rows_of([job.result(out) for job in jobs], task.paper_rate), quick)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown; the first column to the left, the others to the right."""
    lines = [list(head), ["---", *["---:"] * (len(head) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(part: Part) -> str:
    """The table of an experiment on one task, what it says, and how it was made."""
    task, rows = part.task, part.rows
    metric = "accuracy" if task.classes else "R²"
    printed = bool(part.paper)
    main = [row for row in rows if row.activation in MAIN]
    reference = best_on_validation(main) if main else None
    head = ["activation", "parameters", "learning rate", f"{metric}, final"]
    head += ["paper"] * printed
    head += [f"minus {reference.activation}"] if reference else []
    head += [f"{metric}, best over training", f"{metric} at {task.paper_rate:g}"]
    head += [] if task.classes else ["MSE, final"]
    body = []
    for row in rows:
        line = [row.activation, f"{row.parameters:,}", f"{row.rate:g}{'*' * row.at_edge}", plus_minus(row.final)]
        line += [f"{part.paper[row.activation]}" if row.activation in part.paper else ""] * printed
        if reference:
            line += ["" if row is reference else str(part.minus(row, reference))]
        line += [plus_minus(row.best), plus_minus(row.at_paper_rate) if row.at_paper_rate else ""]
        line += [] if task.classes else [f"{sum(row.mse) / len(row.mse):.4g}"]
        body.append(line)
    bayes = [rate for rate in rows[0].result["bayes"] if rate is not None]
    lines = [table(head, body), ""]
    lines += ["\\* the highest or lowest that was tried.", ""] if any(row.at_edge for row in rows) else []
    lines += [f"Bayes rate on the same test points: {plus_minus(bayes)}.", ""] if bayes else []
    for what, said in part.verdicts().items():
        lines += [f"**{said.word.capitalize()}**{f', {what}' if what else ''}: {said.why}.", ""]
    lines += [_settings(part)]
    return "\n".join(lines)


def _settings(part: Part) -> str:
    task = part.task
    rates = ", ".join(f"{rate:g}" for rate in task.rates)
    if "DiTAC" in {row.activation for row in part.rows} and set(task.more_rates) & set(task.rates):
        rates += f" ({', '.join(f'{rate:g}' for rate in task.more_rates)} for the competitors only)"
    return (
        f"{task.title}; layers {'-'.join(map(str, task.sizes))}, {task.steps:,} updates of {task.batch} examples, "
        f"Adam, learning rates {rates}, {part.seeds} seed{'s' * (part.seeds > 1)}, {task.evaluations} evaluations."
    )


def write(experiment: Experiment, parts: Sequence[Part], out: Path, surroundings: Mapping[str, Any]) -> str:
    """Write NAME.json, NAME.csv and NAME.md into the folder, and return the last."""
    notes = [QUICK] if parts[0].quick else []
    text = "\n\n".join([f"# {experiment.title}", *notes, *map(markdown, parts)]) + "\n"
    rows = [
        {"task": part.task.name, **row.to_dict(), "paper": part.paper.get(row.activation)}
        for part in parts
        for row in part.rows
    ]
    document = {
        "experiment": experiment.name,
        "quick": parts[0].quick,
        "settings": {part.task.name: _settings(part) for part in parts},
        "verdicts": {part.task.name: {k: v._asdict() for k, v in part.verdicts().items()} for part in parts},
        "rows": rows,
        "environment": dict(surroundings),
    }
    sheet = io.StringIO()
    columns = [key for key, value in rows[0].items() if not isinstance(value, list)]
    writer = csv.DictWriter(sheet, columns, extrasaction="ignore")
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

**How.** Multilayer perceptrons as in the supplement's section A, Adam without weight decay. Of the learning rates
tried, the one with the best mean over seeds on *validation* data is reported, on *test* data: "final" after the last
update; "best over training" is the highest score of all looks at the test, so needs the test to know when to stop. The
paper chose each competitor's rate by "best performance", on which data it does not say; the column "at ..." has the
rate that it names for DiTAC. A seed fixes weights, data and batches, alike for all activations, so differences are
paired by seed; in brackets are 95 % intervals by Student's t. ± is the standard deviation over seeds.

**Holds** says that DiTAC is better than the best competitor by an interval above 0, and at most 1.5 points below the
paper's figure, where it prints one; **direction only**, that the interval is above 0; else **not reproduced**. Which of
DiTAC's two inits, and which competitor, is decided by validation. No interval is corrected for there being many.
"""

_NOTES = {
    "sinexp": """
The supplement does not print the domain. On (0, 1) and (-1, 1) the target's last period would be 0.0026 wide, too
narrow for thirty units and 98 points; on (-1, 0.5) it is 0.05 wide.
""",
    "plane": """
The first term is sin(9x - 7y), as in the official code; the supplement prints sin(9xy).
""",
    "autompg": """
392 cars with both quantities, both standardised, divided anew for each seed: 64 % to learn from, 16 % to choose by,
20 % to test on. The divisions share cars, so intervals are corrected after Nadeau and Bengio; and the one learning rate
is chosen by all divisions' validation, where a car of one's test may be. The supplement trains twice as long, for
40,000 updates; even so each car is seen 7,800 times. The paper prints one number each, and none for PDELU, whose
training it calls unstable.
""",
    "mnist": """
The supplement's learning rate of "1 * 10^4" is read as 1e-4. It trains on all 60,000 images for 150 epochs; here a
twelfth is kept back to choose by, and the epochs are {evaluations}.
""",
    "gmm": """
The supplement does not print the prior's parameters: here a normal-inverse-Wishart distribution of mean 0, kappa 0.1,
the identity and 5 degrees of freedom, and Dirichlet weights of concentration 10. Each seed has its own mixture, with
standardised inputs; of its 3,500 points to learn from 500 are kept back to choose by.
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
    lines = [_HEAD.format(command=environment.pop("command"))]
    lines += [QUICK] if any(part.quick for part in parts) else ["## What holds", "", _summary(parts, bool(images)), ""]
    seen = ""
    for part in parts:
        name = part.experiment.name
        if name != seen:
            seen = name
            lines += ["", f"## {part.experiment.title}", ""]
            lines += [f"`python -m ditac_timm.experiments {name}`", ""]
        lines += [f"### {part.task.title}", "", markdown(part), ""]
        if name == "table9":
            said = _versions(part)
            lines += [f"**{said.word.capitalize()}**: {said.why}.", "", pictures.get("versions", ""), ""]
        elif name != "ablation":
            note = _NOTES.get(part.task.name, "").strip().replace("{evaluations}", str(part.task.evaluations))
            lines += [note, "", pictures.get(part.task.name, ""), ""]
    choices = _choices(parts)
    lines += ["## What to choose", "", choices, ""] if choices else []
    lines += ["## Real images", "", "`python -m ditac_timm.experiments images`", "", images, ""] if images else []
    lines += ["## What activations learn", "", pictures["learned"], ""] if "learned" in pictures else []
    lines += ["## Where", "", table(["", ""], [[key, str(value)] for key, value in environment.items()])]
    return re.sub("\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _summary(parts: Sequence[Part], images: bool) -> str:
    rows = []
    for part in parts:
        found = {"": _versions(part)} if part.experiment.name == "table9" else part.verdicts()
        for what, said in found.items():
            task = part.task.title + (f", {what}" if what else "")
            rows.append([part.experiment.title, task, said.word, said.why])
    text = table(["claim", "task", "verdict", "why"], rows)
    return text + "\n\nOn Fashion-MNIST, which the paper has not: see [real images](#real-images)." * images


def _versions(part: Part) -> Verdict:
    """Whether GE-DiTAC is better than each other version, as Table 9 has it; each with the init validation prefers."""
    chosen = [
        best_on_validation(some)
        for version in ("DiTAC", "GE-DiTAC", "L-DiTAC", "inf-DiTAC")
        if (some := [row for row in part.rows if row.activation.removesuffix("-prior") == version])
    ]
    claimed = next((row for row in chosen if row.activation.startswith("GE-")), None)
    others = [row for row in chosen if row is not claimed]
    if claimed is None or not others:
        return Verdict("not run", "it needs GE-DiTAC and another version")
    gaps = {row.activation: part.minus(claimed, row) for row in others}
    why = f"{claimed.activation} minus " + ", ".join(f"{name}: {gap}" for name, gap in gaps.items())
    why += "; best seeds: " + ", ".join(f"{row.activation} {max(row.final):.1f}" for row in chosen)
    if all(gap.low > 0 for gap in gaps.values()):
        return Verdict("holds", why)
    if any(gap.high < 0 for gap in gaps.values()):
        return Verdict("not reproduced", f"another version is better: {why}")
    return Verdict("not reproduced", f"the order is within the noise of seeds: {why}")


_QUESTIONS = {
    "Which init?": ("DiTAC-prior",),
    "Which version?": ("GE-DiTAC", "L-DiTAC", "inf-DiTAC"),
    "Which domain?": ("DiTAC-domain-1", "DiTAC-domain-6"),
    "How many cells?": ("DiTAC-5-cells", "DiTAC-20-cells"),
    "Regularisation?": ("DiTAC-reg-0.001", "DiTAC-reg-0.1"),
}


def _choices(parts: Sequence[Part]) -> str:
    """What a user asks, answered by the paired differences from the default on every task that was run."""
    by_task: dict[str, tuple[Part, dict[str, Row]]] = {}
    for part in parts:
        rows = by_task.setdefault(part.task.name, (part, {}))[1]
        for row in part.rows:  # of what was run twice, the one with more seeds
            if row.activation not in rows or len(row.final) > len(rows[row.activation].final):
                rows[row.activation] = row
    by_task = {task: found for task, found in by_task.items() if "DiTAC" in found[1]}
    body, answers = [], []
    for question, names in _QUESTIONS.items():
        said = []
        for name in names:
            gaps = [part.minus(rows[name], rows["DiTAC"]) if name in rows else None for part, rows in by_task.values()]
            known = [gap for gap in gaps if gap]
            if known:
                body.append([name, *(str(gap) if gap else "" for gap in gaps)])
                better, worse = sum(gap.low > 0 for gap in known), sum(gap.high < 0 for gap in known)
                found = [f"{word} on {count}" for word, count in (("better", better), ("worse", worse)) if count]
                said.append(f"{name}: {' and '.join(found) or 'no difference seen on any'} of {len(known)} tasks")
        answers += [f"- **{question}** {'; '.join(said)}."] if said else []
    if not answers:
        return ""
    return "\n".join(
        [
            "Against the default (version `ditac`, identity init, ten cells, domain (-3, 3), no regularisation), by "
            "intervals of the final test scores' paired differences, each at the rate that validation chose:",
            "",
            *answers,
            "",
            table(["minus the default, in points", *(part.task.title for part, _ in by_task.values())], body),
        ]
    )
