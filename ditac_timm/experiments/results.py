"""From trainings to figures: the learning rate chosen, means, intervals, verdicts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, NamedTuple

__all__ = ["Difference", "Row", "Verdict", "difference", "rows_of", "verdict"]

_CLOSE = 1.5  # percent: as near to what the paper prints counts as the same


@dataclass(frozen=True)
class Row:
    """An activation on a task, with the learning rate that was best on validation.

    Attributes:
        activation: Its name.
        parameters: Of one network.
        rate: The learning rate: the highest mean over seeds of the last validation.
        validation: That mean, in percent.
        final: Of each seed, R2 or accuracy on the test after the last update, in percent.
        best: Likewise the highest of all evaluations of the test, as if the test had told when to stop.
        mse: Of each seed, the test's mean squared error after the last update; none for classes.
        paper_rate: Final means at the learning rate that the paper names for DiTAC; None if it was not tried.
        result: All of the trainings.
    """

    activation: str
    parameters: int
    rate: float
    validation: float
    final: tuple[float, ...]
    best: tuple[float, ...]
    mse: tuple[float, ...]
    paper_rate: float | None
    result: Mapping[str, Any]

    @property
    def rate_index(self) -> int:
        return self.result["rates"].index(self.rate)

    def trend(self, key: str) -> list[float]:
        """Mean over seeds of "test" or "mse" at each evaluation, at the chosen rate."""
        return [_mean(evaluation[self.rate_index]) for evaluation in self.result[key]]

    def to_dict(self) -> dict[str, Any]:
        return {
            "activation": self.activation,
            "parameters": self.parameters,
            "learning_rate": self.rate,
            "final_mean": _mean(self.final),
            "final_sd": spread(self.final),
            "best_mean": _mean(self.best),
            "best_sd": spread(self.best),
            "mse_mean": _mean(self.mse) if self.mse else None,
            "final": list(self.final),
            "best": list(self.best),
        }


def rows_of(results: Sequence[Mapping[str, Any]], paper_rate: float) -> list[Row]:
    """A row for each of an experiment's results on one task, in their order."""
    rows = []
    for result in results:
        last = [_mean(seeds) for seeds in result["validation"][-1]]
        chosen = max(range(len(last)), key=lambda index: -math.inf if math.isnan(last[index]) else last[index])
        seeds = range(len(result["seeds"]))
        finals = result["test"][-1]
        rows.append(
            Row(
                activation=result["activation"],
                parameters=result["parameters"],
                rate=result["rates"][chosen],
                validation=last[chosen],
                final=tuple(finals[chosen]),
                best=tuple(
                    max((e[chosen][s] for e in result["test"] if not math.isnan(e[chosen][s])), default=math.nan)
                    for s in seeds
                ),
                mse=tuple(result["mse"][-1][chosen]) if result["mse"] else (),
                paper_rate=(
                    _mean(finals[result["rates"].index(paper_rate)]) if paper_rate in result["rates"] else None
                ),
                result=result,
            )
        )
    return rows


class Difference(NamedTuple):
    """Mean of paired differences with its 95 % interval, by Student's t; infinite for a single pair."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """First minus second, paired by seed; of as many seeds as both have, which begin alike."""
    from scipy import stats

    differences = [a - b for a, b in zip(first, second, strict=False)]
    centre = _mean(differences)
    if len(differences) < 2:
        return Difference(centre, -math.inf, math.inf)
    half = stats.t.ppf(0.975, len(differences) - 1) * spread(differences) / math.sqrt(len(differences))
    return Difference(centre, centre - half, centre + half)


class Verdict(NamedTuple):
    word: str
    why: str


def verdict(rows: Sequence[Row], paper: Mapping[str, float]) -> Verdict | None:
    """What became of the claim that DiTAC is best; None where there is nothing to compare.

    The main version, with the init that validation chooses, against the competitor that it chooses. "holds": the
    interval of the paired difference is above 0, and DiTAC's mean not below the paper's by more than 1.5 points.
    "direction only": its mean is above, no more. Else "not reproduced".
    """
    main = [row for row in rows if row.activation in ("DiTAC", "DiTAC-prior")]
    others = [row for row in rows if "DiTAC" not in row.activation]
    if not main or not others:
        return None
    best, rival = (max(group, key=lambda row: _or_least(row.validation)) for group in (main, others))
    gap = difference(best.final, rival.final)
    mean_final, printed = _mean(best.final), paper.get("DiTAC")
    why = f"{best.activation} minus {rival.activation}, the best competitor on validation: {gap} points"
    if printed is not None:
        why += f"; DiTAC reaches {mean_final:.1f}, the paper {printed}"
    if gap.low > 0 and (printed is None or mean_final >= printed - _CLOSE):
        return Verdict("holds", why)
    if gap.mean > 0:
        return Verdict("direction only", why)
    return Verdict("not reproduced", why)


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 for a single one."""
    finite = [value for value in values if not math.isnan(value)]
    return math.nan if len(finite) < len(values) else stdev(finite) if len(finite) > 1 else 0.0


def _mean(values: Sequence[float]) -> float:
    return mean(values)


def _or_least(value: float) -> float:
    return -math.inf if math.isnan(value) else value
