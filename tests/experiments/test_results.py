"""Which learning rate is reported, intervals, and what is claimed of them."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from ditac_timm.experiments.results import best_on_validation, difference, plus_minus, rows_of, verdict

NAN = math.nan


def result(activation: str, validation: list, test: list, rates: tuple = (0.1, 0.01)) -> dict:
    return {
        "activation": activation,
        "parameters": 1,
        "rates": list(rates),
        "seeds": list(range(len(test[0][0]))),
        "evaluated_at": list(range(len(test))),
        "validation": validation,
        "test": test,
        "mse": [],
        "bayes": [None],
    }


def test_the_rate_is_chosen_on_validation_and_reported_on_the_test() -> None:
    (row,) = rows_of(
        [result("ReLU", [[[1, 1], [2, 2]], [[50, 60], [70, 80]]], [[[99, 99], [88, 10]], [[95, 97], [60, 20]]])], 0.1
    )
    assert (row.rate, row.at_edge) == (0.01, True)
    assert (row.final, row.best) == ((60, 20), (88, 20))
    assert row.validation == 75
    assert row.at_paper_rate == (95, 97)
    assert row.trend("test") == [49, 40]


def test_a_rate_that_diverges_is_not_chosen() -> None:
    tests = [[[NAN, 99], [3, 4], [1, 1]]]
    (row,) = rows_of([result("ReLU", [[[NAN, 99], [1, 2], [0, 0]]], tests, rates=(0.1, 0.01, 0.001))], 0.5)
    assert (row.rate, row.final, row.at_paper_rate, row.at_edge) == (0.01, (3, 4), (), False)


def test_what_diverges_everywhere_is_said_to() -> None:
    rows = rows_of(
        [result("ReLU", [[[NAN, 99]]], [[[NAN, 99]]], (0.1,)), result("ELU", [[[1, 2]]], [[[3, 4]]], (0.1,))], 0.1
    )
    assert plus_minus(rows[0].final) == "diverged"
    assert str(difference(rows[0].final, rows[1].final)) == "diverged"
    assert best_on_validation(rows) is rows[1]
    assert json.loads(json.dumps(rows[0].to_dict(), allow_nan=False))["final"] == [None, 99]


def test_intervals_are_scipy_s() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(3, 1, 7), rng.normal(0, 1, 7)
    found = difference(first.tolist(), second.tolist())
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx((first - second).mean())
    wider = difference(first.tolist(), second.tolist(), overlap=78 / 252)
    assert (wider.high - wider.mean) / (found.high - found.mean) == pytest.approx((1 + 7 * 78 / 252) ** 0.5)
    assert str(difference([3.0], [1.0])) == "+2.00"
    assert plus_minus([3.0]) == "3.00"


@pytest.mark.parametrize(
    ("ditac", "prior", "relu", "paper", "word", "named"),
    [
        ([98, 98.2, 98.1], [1, 1, 1], [90, 91, 90], 98.4, "holds", "DiTAC minus ReLU"),
        ([1, 1, 1], [98, 98.2, 98.1], [90, 91, 90], None, "holds", "DiTAC-prior minus ReLU"),
        ([95, 95.2, 95.1], [1, 1, 1], [90, 91, 90], 98.4, "direction only", "DiTAC reaches 95.1, the paper 98.4"),
        ([98, 80, 99], [1, 1, 1], [90, 91, 90], 90, "not reproduced", "no difference seen: DiTAC minus ReLU"),
        ([90, 91, 90], [1, 1, 1], [98, 98.2, 98.1], 98.4, "not reproduced", "DiTAC is worse"),
    ],
)
def test_verdicts(ditac: list, prior: list, relu: list, paper: float | None, word: str, named: str) -> None:
    scores = {"DiTAC": ditac, "DiTAC-prior": prior, "GE-DiTAC": [99.9] * 3, "ReLU": relu, "ELU": [2, 2, 2]}
    rows = rows_of([result(name, [[values, values]], [[values, values]]) for name, values in scores.items()], 0.1)
    said = verdict(rows, {} if paper is None else {"DiTAC": paper})
    assert said is not None
    assert said.word == word
    assert named in said.why


def test_a_verdict_at_the_paper_s_rate_is_of_that_rate() -> None:
    tuned = {"DiTAC": [90, 91, 90], "ReLU": [98, 98.2, 98.1], "ELU": [1, 2, 3]}
    at_rate = {"DiTAC": [80, 81, 80], "ReLU": [70, 70, 71], "ELU": [71, 71.5, 72]}
    rows = rows_of(
        [result(name, [[at_rate[name], tuned[name]]], [[at_rate[name], tuned[name]]]) for name in tuned], 0.1
    )
    assert verdict(rows, {}).word == "not reproduced"
    said = verdict(rows, {}, at_paper_rate=True)
    assert said.word == "holds"
    assert said.why.startswith("DiTAC minus ELU")


def test_nothing_is_claimed_without_a_competitor() -> None:
    rows = rows_of([result(name, [[[1], [2]]], [[[1], [2]]]) for name in ("DiTAC", "GE-DiTAC")], 0.1)
    assert verdict(rows, {}) is None
