"""What is learned from: targets, draws, splits, and the data behind them."""

import math
from pathlib import Path

import pytest
import torch
import torchvision
from scipy import stats

from ditac_timm.experiments import sources
from ditac_timm.experiments.tasks import TASKS
from ditac_timm.training.errors import UsageError


@pytest.mark.parametrize(
    ("task", "target"),
    [
        ("sinexp", lambda x: math.sin(math.exp(6 * x))),
        (
            "sines",
            lambda x: 0.4 * math.sin(19 * x) + 0.2 * math.sin(23 * x) + 0.3 * math.sin(29 * x) + 0.1 * math.sin(31 * x),
        ),
        (
            "plane",
            lambda x, y: (
                0.4 * math.sin(9 * x - 7 * y)
                + 0.1 * math.sin(-9 * x + 11 * y)
                + 0.15 * math.sin(3 * x + 13 * y)
                + 0.15 * math.sin(9 * x + 9 * y)
                + 0.1 * math.sin(13 * x + 5 * y)
                + 0.1 * math.sin(3 * x + 19 * y)
            ),
        ),
    ],
)
def test_functions_are_the_supplement_s(task: str, target) -> None:
    split = TASKS[task].split(0, 98, Path())
    for x, y in (split.draw(7, 1), split.validation, split.test):
        for point, value in list(zip(x.flatten(0, -2).tolist(), y.flatten().tolist(), strict=True))[:100]:
            assert value == pytest.approx(target(*point), abs=1e-4)


@pytest.mark.parametrize("name", ["sines", "plane", "gmm", "autompg"])
def test_what_a_step_gets_depends_on_nothing_but_seed_and_step(name: str) -> None:
    task = TASKS[name]
    whole = task.split(3, task.batch, Path()).draw(0, 250)
    split = task.split(3, task.batch, Path())
    for first, number in ((120, 130), (0, 7), (99, 2)):
        for some, part in zip(whole, split.draw(first, number), strict=True):
            assert torch.equal(part, some[first : first + number])
    other = task.split(4, task.batch, Path()).draw(0, 1)
    assert not torch.equal(other[0][0], whole[0][0])


@pytest.mark.parametrize(("name", "examples"), [("gmm", (3000, 500, 1500)), ("autompg", (252, 62, 78))])
def test_nothing_is_tested_on_what_was_learned(name: str, examples: tuple[int, int, int]) -> None:
    task = TASKS[name]
    split = task.split(0, 1, Path())
    x, y = split.draw(0, examples[0])
    learned = torch.cat((x, y.view(len(y), 1, -1)), -1).flatten(1)
    parts = [torch.cat((x, y.view(len(y), -1)), 1) for x, y in (split.validation, split.test)]
    assert (len(learned), *map(len, parts)) == examples
    everything = torch.cat((learned, *parts))
    if name == "gmm":  # cars share their figures with others
        assert len(everything.unique(dim=0)) == 5000
    assert learned[:, 0].mean().item() == pytest.approx(0, abs=1e-4)
    assert learned[:, 0].std().item() == pytest.approx(1, abs=1e-4)


def test_cars_from_uci_s_file_and_from_the_package_are_the_same(tmp_path: Path) -> None:
    mpg, power = sources.auto_mpg(tmp_path)
    assert mpg.shape == power.shape == (392, 1)
    assert (mpg.min().item(), mpg.max().item(), power.max().item()) == (9, 46.6, 230)
    pairs = torch.cat((mpg, power), 1).tolist()
    rows = [f'{m} 8 307.0 {p} 3504. 12.0 70 1\t"a car"' for m, p in pairs]
    (tmp_path / "auto-mpg.data").write_text("\n".join([*rows, '25.0 4 98.0 ? 2046. 19.0 71 1\t"ford pinto"', ""]))
    for ours, theirs in zip(sources.auto_mpg(tmp_path), (mpg, power), strict=True):
        assert torch.equal(ours, theirs)
    (tmp_path / "auto-mpg.data").write_text("\n".join(reversed(rows)))
    assert torch.equal(sources.auto_mpg(tmp_path)[0], mpg)
    (tmp_path / "auto-mpg.data").write_text("mpg,cylinders\n18,8")
    with pytest.raises(UsageError, match=r"auto-mpg\.data is not UCI's"):
        sources.auto_mpg(tmp_path)


def test_without_data_there_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", no_network)
    with pytest.raises(UsageError, match=r"--data-dir .*: MNIST cannot be downloaded .*, and MNIST/raw .* lacks train"):
        sources.ubyte_images("MNIST", tmp_path)

    def no_package(_: str) -> None:
        raise ModuleNotFoundError

    monkeypatch.setattr(sources.resources, "files", no_package)
    with pytest.raises(UsageError, match=r"pip install 'ditac_timm\[experiments\]', or put UCI's auto-mpg.data in"):
        sources.auto_mpg(tmp_path)


def test_a_mixture_is_what_it_says() -> None:
    """The Bayes rate is scipy's, and what is drawn is of the components."""
    mixture = sources.draw_mixture(5)
    assert mixture.x.shape == (5000, 2)
    assert set(mixture.y.tolist()) == set(range(10))
    assert 60 < mixture.bayes < 100
    weights = torch.bincount(mixture.y) / 5000
    densities = []
    for component in range(10):
        points = mixture.x[mixture.y == component]
        fitted = stats.multivariate_normal(points.mean(0).numpy(), torch.cov(points.T).numpy())
        densities.append(torch.as_tensor(fitted.pdf(mixture.x[-1500:].numpy())) * weights[component])
    guessed = (torch.stack(densities).argmax(0) == mixture.y[-1500:]).double().mean().item() * 100
    assert guessed == pytest.approx(mixture.bayes, abs=1.5)
    assert torch.equal(sources.draw_mixture(5).x, mixture.x)
    assert not torch.equal(sources.draw_mixture(6).x, mixture.x)
