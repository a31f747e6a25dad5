"""DiTAC against its base on images: the real `train.py`, on digits in the files that Fashion-MNIST comes in."""

import json
import subprocess
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from ditac_timm.experiments import images as experiment
from ditac_timm.experiments import sources
from ditac_timm.experiments.results import difference
from ditac_timm.training.errors import RunError, UsageError

SMALL = experiment.Settings(
    networks=("test_convnext",),
    seeds=2,
    train_images=40,
    tuning_images=20,
    test_images=30,
    epochs=1,
    batch_size=10,
    lrs=(0.003,),
    versions=(),
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of twelve training and six test images of 28 x 28, as ubyte files; not to be written to."""
    folder = tmp_path_factory.mktemp("data")
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    digits = load_digits()
    chosen = np.stack([np.flatnonzero(digits.target == label)[:18] for label in range(10)], axis=1)
    for name, rows in (("train", chosen[:12].ravel()), ("t10k", chosen[12:].ravel())):
        grey = [Image.fromarray((digits.images[row] * (255 / 16)).astype(np.uint8)).resize((28, 28)) for row in rows]
        shape = np.array([0x803, len(rows), 28, 28], dtype=">i4").tobytes()
        (raw / f"{name}-images-idx3-ubyte").write_bytes(
            shape + np.stack([np.asarray(image) for image in grey]).tobytes()
        )
        labels = np.array([0x801, len(rows)], dtype=">i4").tobytes() + digits.target[rows].astype(np.uint8).tobytes()
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(labels)
    return folder


def test_runs_stop_go_on_and_are_not_repeated(data_dir, tmp_path, monkeypatch):
    def interrupt(done: int, total: int, description: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiment.run_images(SMALL, tmp_path, data_dir, workers=1, progress=interrupt)
    assert not (tmp_path / "images.json").exists()

    seen = []
    result = experiment.run_images(SMALL, tmp_path, data_dir, workers=1, progress=lambda *said: seen.append(said))
    assert [done for done, _, _ in seen][-1] == seen[-1][1] == 1 + 3 * 2
    assert json.loads((tmp_path / "images.json").read_text()) == json.loads(json.dumps(result))
    network = result["networks"]["test_convnext"]
    assert network["lr"] == 0.003
    assert 0 <= network["tuning"]["0.003"]["final"] <= 100
    assert network["parameters"]["variant"] > network["parameters"]["base"]
    assert all(seconds > 0 for seconds in network["seconds_per_epoch"].values())
    assert network["equal_time"]["epochs"] == 1
    assert network["equal_time"]["same_runs_as_equal_epochs"]
    for who in ("base", "variant"):
        assert len(network["equal_epochs"][who]["final"]) == len(network["equal_epochs"][who]["best"]) == 2
        assert "--lr 0.003 --epochs 1" in network["commands"][who]
    assert "--model test_convnext_ditac" in network["commands"]["variant"]
    assert "| test_convnext | 0.003 |" in experiment.markdown(result)

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("a finished run is repeated")

    monkeypatch.setattr(subprocess, "Popen", fail)
    assert experiment.run_images(SMALL, tmp_path, data_dir) == json.loads(json.dumps(result)) | {
        "settings": result["settings"]
    }


def test_a_failed_run_says_why_and_where_its_log_is(data_dir, tmp_path):
    settings = experiment.Settings(**{**vars(SMALL), "networks": ("test_convnet",)})
    with pytest.raises(RunError, match=r"test_convnet is unknown .*\(log: .*test_convnet-.*\.log\)"):
        experiment.run_images(settings, tmp_path, data_dir)


def test_versions_are_compared_with_the_base_of_their_network(data_dir, tmp_path, monkeypatch):
    """As what `train.py` would find, a table of scores: the second version is a point better in each seed."""

    def scored(self: object, run: experiment.Run) -> dict[str, object]:
        top1 = 80.0 + run.seed + (run.version == "leaky") - (run.lr > 0.003)
        seconds = 3.0 if run.model.endswith("_ditac") else 2.0
        return {"final": top1, "best": top1 + 1, "seconds": [seconds], "parameters": 5, "command": run.name}

    monkeypatch.setattr(experiment._Trainer, "_finished_or_trained", scored)
    more = {
        "epochs": 8,
        "lrs": (0.001, 0.01),
        "seeds": 3,
        "versions_of": "test_convnext",
        "versions": (("ge", "match"), ("leaky", "match")),
    }
    result = experiment.run_images(experiment.Settings(**{**vars(SMALL), **more}), tmp_path, data_dir)
    network = result["networks"]["test_convnext"]
    assert network["lr"] == 0.001
    assert network["equal_time"]["epochs"] == 5  # 8 epochs of 2 seconds buy 5 of 3
    assert not network["equal_time"]["same_runs_as_equal_epochs"]
    rows = {row["version"]: row["difference"]["final"] for row in result["versions"]["rows"]}
    assert list(rows) == ["ditac", "ge", "leaky"]
    assert rows["leaky"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert "| leaky, match | 81.00 ± 1.00 | 82.00 ± 1.00 | +1.00 [+1.00, +1.00] | better |" in experiment.markdown(
        result
    )


def test_images_are_even_disjoint_and_kept(data_dir, tmp_path):
    folder = sources.write_images(data_dir, tmp_path / "images", 40, 30, seed=0, tuning=20)
    for split, count in (("train", 4), ("tuning", 2), ("validation", 3)):
        assert [len(list(path.iterdir())) for path in sorted((folder / split).iterdir())] == [count] * 10
    names = {split: {path.name for path in (folder / split).rglob("*.png")} for split in ("train", "tuning")}
    assert not names["train"] & names["tuning"]
    written = (folder / "images.json").stat().st_mtime_ns
    sources.write_images(data_dir, folder, 40, 30, seed=0, tuning=20)
    assert (folder / "images.json").stat().st_mtime_ns == written
    with pytest.raises(UsageError, match="something other"):
        sources.write_images(data_dir, folder, 50, 30, seed=0, tuning=20)
    with pytest.raises(UsageError, match="multiple of 10, not 45"):
        sources.write_images(data_dir, tmp_path / "odd", 45, 30, seed=0, tuning=20)
    with pytest.raises(UsageError, match="has 12 train images"):
        sources.write_images(data_dir, tmp_path / "many", 110, 30, seed=0, tuning=20)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_missing_images_name_the_files(tmp_path, monkeypatch):
    def unreachable(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", unreachable)
    with pytest.raises(UsageError, match=r"--data-dir .*FashionMNIST/raw.*train-images-idx3-ubyte.*t10k-labels"):
        sources.write_images(tmp_path, tmp_path / "images", 40, 30, seed=0)


def test_without_a_clone_it_says_so(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    with pytest.raises(UsageError, match=r"train\.py.*clone"):
        experiment.run_images(SMALL, tmp_path, data_dir)


@pytest.mark.parametrize(
    ("variant", "expected", "said"),
    [
        ([81.0, 82.1, 83.2], {"mean": 1.1, "low": 0.852, "high": 1.348}, "better"),
        ([79.0, 79.9, 80.8], {"mean": -1.1, "low": -1.348, "high": -0.852}, "worse"),
        ([81.0, 80.0, 82.0], {"mean": 0.0, "low": -2.484, "high": 2.484}, "no difference seen"),
    ],
)
def test_verdicts_are_of_the_paired_interval(variant, expected, said):
    gap = difference(variant, [80.0, 81.0, 82.0])
    assert gap.to_dict() == pytest.approx(expected, abs=1e-3)
    assert experiment.verdict(gap) == said


def test_one_seed_has_no_interval():
    gap = difference([81.0], [80.0])
    assert gap.to_dict() == {"mean": 1.0, "low": None, "high": None}
    assert experiment.verdict(gap) == "no difference seen"


@pytest.mark.parametrize(("base", "variant", "epochs"), [(2.0, 3.0, 5), (3.0, 2.0, 8), (2.0, 2.0, 8), (1.0, 20.0, 1)])
def test_equal_time_buys_whole_epochs(base, variant, epochs):
    assert experiment.epochs_bought(8, base, variant) == epochs
