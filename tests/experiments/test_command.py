"""`python -m ditac_timm.experiments`: what it writes, goes on with, and refuses."""

import csv
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from ditac_timm.experiments import __main__ as command
from ditac_timm.experiments import figures, report, study
from ditac_timm.experiments.results import Verdict
from ditac_timm.experiments.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
FEW = ["ReLU", "GELU", "DiTAC", "DiTAC-prior"]


def short(task, steps: int = 20):
    return replace(task, steps=steps, evaluations=4, rates=(1e-2, 1e-3))


def row(name: str, *final: float) -> dict:
    """A result whose validation and test give the same."""
    evaluation = [[list(final)]]
    return {
        "activation": name, "parameters": 1, "rates": [1e-2], "seeds": [0] * len(final), "evaluated_at": [1],
        "validation": evaluation, "test": evaluation, "mse": [], "bayes": [None],
    }  # fmt: skip


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Jobs are done in this process, and shortened; the names of those done."""
    done: list[str] = []

    def run(jobs, out, data_dir, workers, progress) -> None:
        (out / "runs").mkdir(parents=True, exist_ok=True)
        for job in jobs:
            if not job.file(out).is_file():
                study._work(job, out, data_dir)
                done.append(job.file(out).name)
            progress(1, 1, "")

    monkeypatch.setattr(study, "_report", queue.SimpleQueue())
    monkeypatch.setattr(study, "run", run)
    monkeypatch.setattr(command, "_change", lambda args: short)
    return done


def test_a_table_is_printed_and_written_three_times(
    here: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["table8", "--seeds", "2", "--acts", "relu", "DiTAC", "Swish", "ReLU", "--out", str(tmp_path)]
    assert command.main(argv) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "table8.md").read_text() in said
    for text in ("| ReLU | 193 |", "| Swish | 194 |", "| DiTAC | 202 |", "99.3 |", "| 97.5 |"):
        assert text in said
    document = json.loads((tmp_path / "table8.json").read_text())
    assert document["environment"]["command"].startswith("python -m ditac_timm.experiments table8 --seeds 2")
    assert [row["activation"] for row in document["rows"]] == ["ReLU", "DiTAC", "Swish"]
    assert all(len(row["final"]) == 2 for row in document["rows"])
    assert document["verdicts"]["sines"][""]["word"] in ("holds", "direction only", "not reproduced")
    with open(tmp_path / "table8.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["final_mean"]) for row in rows] == [row["final_mean"] for row in document["rows"]]
    assert len(here) == 3
    assert command.main(argv) == 0
    assert command.main([*argv, "--acts", "ELU", "DiTAC"]) == 0
    assert len(here) == 4  # what had been trained was not trained again
    assert command.main([*argv, "--seeds", "3"]) == 0
    assert len(here) == 7


def test_everything_makes_a_page_with_pictures(
    here: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.sources, "ubyte_images", lambda *_: None)
    tables = {
        name: replace(experiment, tasks=tuple(task for task in experiment.tasks if task != "mnist"))
        for name, experiment in study.EXPERIMENTS.items()
    }
    monkeypatch.setattr(study, "EXPERIMENTS", {name: table for name, table in tables.items() if table.tasks})
    monkeypatch.setattr(command.images, "run_images", lambda *_: {})
    monkeypatch.setattr(command.images, "markdown", lambda _: "of real images")
    monkeypatch.setattr(figures, "NEEDED", ("table2", "table8", "gmm"))
    demo = tmp_path / "demo" / "mobilenetv3_ditac"
    demo.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(demo / "activations.png")
    page = tmp_path / "docs" / "reproduction.md"
    page.parent.mkdir()
    assert command.main(["all", "--seeds", "2", "--out", str(tmp_path), "--report", str(page)]) == 0
    text = page.read_text()
    for title in ("Table 2", "Table 7", "Table 8", "Table 9", "What to choose", "Real images", "What holds"):
        assert title in text
    assert "of real images" in text
    assert f"python -m ditac_timm.experiments all --seeds 2 --out {tmp_path}" in text
    assert "None" not in text
    assert "nan" not in text
    for name in ("sinexp", "plane", "sines", "gmm", "versions", "learned"):
        assert f"](reproduction/{name}.png)" in text
        picture = Image.open(tmp_path / "docs" / "reproduction" / f"{name}.png")
        assert name == "learned" or min(picture.size) > 300
    assert not (tmp_path / "docs" / "reproduction" / "mnist.png").exists()


def test_the_question_of_versions_is_answered_by_intervals() -> None:
    def said(*found: dict) -> Verdict:
        rows = report.rows_of(found, 1e-2)
        return report._versions(report.Part(study.EXPERIMENTS["table9"], TASKS["plane"], rows))

    noise = said(
        row("DiTAC", 97, 99, 98),
        row("GE-DiTAC", 99, 97, 98.5),
        row("inf-DiTAC", 1, 2, 3),
        row("inf-DiTAC-prior", 98, 97, 99),
    )
    assert noise.word == "not reproduced"
    assert "within the noise of seeds: GE-DiTAC minus DiTAC" in noise.why
    assert "best seeds: DiTAC 99.0, GE-DiTAC 99.0, inf-DiTAC-prior 99.0" in noise.why
    assert said(row("DiTAC", 90, 91, 90), row("GE-DiTAC", 99, 99, 98.5)).word == "holds"
    assert "another version is better" in said(row("DiTAC", 99, 99, 98.5), row("GE-DiTAC", 90, 91, 90)).why
    one_worse = said(row("DiTAC", 97, 99, 98), row("GE-DiTAC", 99, 97, 98.5), row("L-DiTAC", 1, 2, 3))
    assert one_worse.word == "not reproduced"


def test_questions_are_answered_by_intervals() -> None:
    parts = [
        report.Part(
            study.EXPERIMENTS["ablation"],
            TASKS[task],
            report.rows_of(
                [row("DiTAC", 97, 97.5, 98), row("DiTAC-5-cells", *five), row("DiTAC-20-cells", 97.1, 97.4, 98)], 1e-2
            ),
        )
        for task, five in (("sines", (90, 91, 90)), ("plane", (99, 99.5, 99.9)))
    ]
    text = report._choices(parts)
    assert (
        "- **How many cells?** DiTAC-5-cells: better on 1 and worse on 1 of 2 tasks; DiTAC-20-cells: no difference"
        in text
    )
    assert "Which init?" not in text


def test_interrupted_it_goes_on(tmp_path: Path) -> None:
    """The real processes: Ctrl-C ends them all; run again, the same figures as of a command that was left alone."""
    argv = [
        sys.executable,
        "-m",
        "ditac_timm.experiments",
        "table8",
        "--quick",
        "--seeds",
        "1",
        "--acts",
        "ReLU",
        "DiTAC",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    out = tmp_path / "out"
    child = subprocess.Popen(
        [*argv, "--out", str(out), "--workers", "2"], env=environment, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 100
    while not list(out.glob("runs/*.pt")):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert said.decode().rstrip().endswith("ditac_timm.experiments: interrupted")
    for folder in (out, tmp_path / "left alone"):
        done = subprocess.run(
            [*argv, "--out", str(folder)], env=environment, capture_output=True, text=True, check=False, timeout=200
        )
        assert done.returncode == 0, done.stderr
    first, second = (json.loads((f / "table8.json").read_text())["rows"] for f in (out, tmp_path / "left alone"))
    assert first == second
    assert not list(out.glob("runs/*.pt"))


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("table3", "invalid choice: 'table3'"),
        ("table8 --acts SwiGLU", "--acts SwiGLU is unknown (did you mean GELU?): give some of ReLU, LeakyReLU"),
        ("table8 --acts DiTACC", "did you mean DiTAC"),
        ("table8 --seeds 0", "--seeds must be at least 1, not 0"),
        ("mnist --mnist-epochs 0", "--mnist-epochs must be at least 1"),
        ("gmm --mnist-epochs 3", "--mnist-epochs is for mnist, figures and all, not for gmm"),
        ("images --acts ReLU", "--acts is not for images"),
        ("table8 --report page.md", "--report is for all"),
        ("all --report page", "--report must end in .md, but is page"),
        ("table8 --out /proc/x", "/proc/x cannot be made"),
    ],
)
def test_refusals(argv: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = command.main([*argv.split(), *(["--out", str(tmp_path)] if "--out" not in argv else [])])
    except SystemExit as exit_:  # argparse's own
        code = exit_.code
    assert code == 2
    assert sentence in capsys.readouterr().err


def test_data_are_looked_for_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(command.sources.torchvision.datasets.MNIST, "download", no_network)
    assert command.main(["mnist", "--out", str(tmp_path), "--data-dir", str(tmp_path / "none")]) == 2
    assert "MNIST cannot be downloaded (no network), and MNIST/raw in that folder lacks" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("package", ["scipy", "matplotlib"])
def test_missing_packages_are_named_before_anything_is_trained(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find_spec(name, *a))
    if package == "scipy":
        monkeypatch.setitem(sys.modules, "scipy.stats", None)
    assert command.main(["figures", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"need {package}" in said
    assert "pip install 'ditac_timm[experiments]'" in said
    assert not (tmp_path / "runs").exists()


def test_shortened_runs_claim_nothing(here: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["table8", "--quick", "--acts", "ReLU", "DiTAC", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "Shortened by `--quick`" in said
    assert "eproduced" not in said
    assert json.loads((tmp_path / "table8.json").read_text())["verdicts"] == {"sines": {}}


def test_pictures_show_every_activation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A legend names each, and no two look alike."""
    monkeypatch.setattr(study, "_report", queue.SimpleQueue())
    jobs = study.jobs_of(study.EXPERIMENTS["table8"], None, 1, lambda task: short(task, 4))
    (tmp_path / "runs").mkdir()
    for job in jobs:
        study._work(job, tmp_path, tmp_path)
    part = report.part_of(study.EXPERIMENTS["table8"], jobs, tmp_path)
    figure = figures._trend(part)
    assert [text.get_text() for text in figure.legends[0].texts] == list(study.EVERYTHING)
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == len(study.EVERYTHING)
    assert torch.tensor([line.get_ydata()[-1] for line in figure.axes[0].lines]).isfinite().all()
