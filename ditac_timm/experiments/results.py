"""From trainings to figures: the learning rate chosen, means, intervals, verdicts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, NamedTuple

from ..training.errors import UsageError

__all__ = [
    "Difference", "Row", "Verdict", "best_on_validation", "difference", "plus_minus", "rows_of", "t_quantile", "verdict"
]  # fmt: skip

MAIN = ("DiTAC", "DiTAC-prior")  # the main version, by its two inits

_CLOSE = 1.5  # percentage points within which a figure counts as the paper's


@dataclass(frozen=True)
class Row:
    """An activation on a task, with the learning rate that was best on validation.

    Attributes:
        activation: Its name.
        parameters: Of one network.
        rate: The learning rate: the highest mean over seeds of the last validation.
        at_edge: Whether it is the highest or the lowest that was tried, so that others might be better still.
        validation: That mean, in percent; NaN where every rate diverged.
        final: Of each seed, R2 or accuracy on the test after the last update, in percent; NaN where it diverged.
        best: Likewise the highest of all evaluations of the test.
        mse: Of each seed, the test's mean squared error after the last update; none for classes.
        at_paper_rate: As `final`, at the learning rate that the paper names for DiTAC; none if it was not tried.
        validation_at_paper_rate: As `validation`, at that rate; NaN if it was not tried.
        result: All of the trainings.
    """

    activation: str
    parameters: int
    rate: float
    at_edge: bool
    validation: float
    final: tuple[float, ...]
    best: tuple[float, ...]
    mse: tuple[float, ...]
    at_paper_rate: tuple[float, ...]
    validation_at_paper_rate: float
    result: Mapping[str, Any]

    @property
    def rate_index(self) -> int:
        return self.result["rates"].index(self.rate)

    def trend(self, key: str) -> list[float]:
        """Mean over seeds of "test" or "mse" at each evaluation, at the chosen rate."""
        return [mean(evaluation[self.rate_index]) for evaluation in self.result[key]]

    def to_dict(self) -> dict[str, Any]:
        """In plain values; None for what diverged."""
        values = {"final": self.final, "best": self.best, "mse": self.mse, "at_paper_rate": self.at_paper_rate}
        return {
            "activation": self.activation,
            "parameters": self.parameters,
            "learning_rate": self.rate,
            **{f"{name}_mean": _finite(mean(some)) for name, some in values.items() if some},
            **{f"{name}_sd": _finite(_spread(some)) for name, some in values.items() if len(some) > 1},
            **{name: [_finite(value) for value in some] for name, some in values.items()},
        }


def rows_of(results: Sequence[Mapping[str, Any]], paper_rate: float) -> list[Row]:
    """A row for each of an experiment's results on one task, in their order."""
    rows = []
    for result in results:
        rates = result["rates"]
        last = [mean(seeds) for seeds in result["validation"][-1]]
        chosen = max(range(len(last)), key=lambda index: _or_least(last[index]))
        finals = result["test"][-1]
        by_seed = zip(*(evaluation[chosen] for evaluation in result["test"]), strict=True)
        rows.append(
            Row(
                activation=result["activation"],
                parameters=result["parameters"],
                rate=rates[chosen],
                at_edge=len(rates) > 1 and rates[chosen] in (min(rates), max(rates)),
                validation=last[chosen],
                final=tuple(finals[chosen]),
                best=tuple(max(filter(math.isfinite, scores), default=math.nan) for scores in by_seed),
                mse=tuple(result["mse"][-1][chosen]) if result["mse"] else (),
                at_paper_rate=tuple(finals[rates.index(paper_rate)]) if paper_rate in rates else (),
                validation_at_paper_rate=last[rates.index(paper_rate)] if paper_rate in rates else math.nan,
                result=result,
            )
        )
    return rows


def best_on_validation(rows: Sequence[Row]) -> Row:
    return max(rows, key=lambda row: _or_least(row.validation))


class Difference(NamedTuple):
    """Mean of paired differences with its 95 % interval; NaN ends for a single pair."""

    mean: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        return {name: _finite(value) for name, value in self._asdict().items()}

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return "diverged"
        return f"{self.mean:+.2f}" + ("" if math.isnan(self.low) else f" [{self.low:+.2f}, {self.high:+.2f}]")


def difference(first: Sequence[float], second: Sequence[float], overlap: float = 0.0) -> Difference:
    """First minus second, paired by seed, with an interval by Student's t.

    Args:
        first: A score of each seed.
        second: The same seeds' in the same order.
        overlap: Test examples for each one learned from, where all seeds divide the same examples anew. Their scores
            then depend on each other, and the interval is wider: Nadeau and Bengio, "Inference for the Generalization
            Error", Machine Learning 2003.

    Raises:
        UsageError: scipy is missing.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    centre = mean(differences)
    if len(differences) < 2:
        return Difference(centre, math.nan, math.nan)
    half = t_quantile(len(differences) - 1) * _spread(differences) * math.sqrt(1 / len(differences) + overlap)
    return Difference(centre, centre - half, centre + half)


def t_quantile(degrees: int) -> float:
    """Of Student's t, such that 95 % lie between its negative and itself.

    Raises:
        UsageError: scipy is missing.
    """
    try:
        from scipy.stats import t
    except ImportError as error:
        raise UsageError("intervals need scipy: pip install 'ditac_timm[experiments]'") from error
    return float(t.ppf(0.975, degrees))


class Verdict(NamedTuple):
    word: str
    why: str


def verdict(
    rows: Sequence[Row], paper: Mapping[str, float], overlap: float = 0.0, at_paper_rate: bool = False
) -> Verdict | None:
    """What became of the claim that DiTAC is best; None where there is nothing to compare.

    The main version, with the init that validation prefers, against the competitor that it prefers. "holds": the
    interval of the paired difference is above 0, and DiTAC's mean at most 1.5 points below the paper's figure.
    "direction only": the interval is above 0. Else "not reproduced".

    Args:
        rows: Of one task.
        paper: What the paper prints, by activation.
        overlap: As for `difference`.
        at_paper_rate: Whether to compare, and to choose by validation, at the paper's learning rate.
    """
    if at_paper_rate:
        rows = [row for row in rows if row.at_paper_rate]
    main = [row for row in rows if row.activation in MAIN]
    others = [row for row in rows if "DiTAC" not in row.activation]
    if not main or not others:
        return None

    def score(row: Row) -> tuple[float, ...]:
        return row.at_paper_rate if at_paper_rate else row.final

    if at_paper_rate:
        best, rival = (max(group, key=lambda row: _or_least(row.validation_at_paper_rate)) for group in (main, others))
    else:
        best, rival = best_on_validation(main), best_on_validation(others)
    gap, printed = difference(score(best), score(rival), overlap), paper.get("DiTAC")
    why = f"{best.activation} minus {rival.activation}, the best competitor: {gap} points"
    if printed is not None:
        why += f"; DiTAC reaches {mean(score(best)):.1f}, the paper {printed}"
    if gap.low > 0:
        near = printed is None or mean(score(best)) >= printed - _CLOSE
        return Verdict("holds" if near else "direction only", why)
    if gap.high < 0:
        return Verdict("not reproduced", f"DiTAC is worse: {why}")
    return Verdict("not reproduced", f"no difference seen: {why}")


def plus_minus(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    if not all(map(math.isfinite, values)):
        return "diverged"
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if all(map(math.isfinite, values)) else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _or_least(value: float) -> float:
    return -math.inf if math.isnan(value) else value
