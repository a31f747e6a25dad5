"""DiTAC against its base's own activation on Fashion-MNIST: `train.py` runs, paired by seed.

The learning rate of a network is tuned on its base alone, on images held out of the training images, and serves its
variant too. Base and variant then train from the same seeds, for equally many epochs and for equally much time.
"""

import csv
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ditac_timm

from ..training.checkpoint import write_atomically
from ..training.errors import RunError, UsageError
from . import sources
from .report import table
from .results import Difference, difference, plus_minus, t_quantile

__all__ = ["Run", "Settings", "markdown", "run_images", "verdict"]

ROOT = Path(ditac_timm.__file__).parents[1]
TUNING_SEED = 1_000  # beyond those that are scored
DATA_SEED = 0
METRICS = ("final", "best")


@dataclass(frozen=True)
class Settings:
    """What is compared, on how much.

    Attributes:
        networks: timm's names of the bases; a variant is its base's name + `_ditac`.
        seeds: How many: 0, 1 and so on.
        train_images, tuning_images, test_images: Multiples of the 10 classes; the second chooses a learning rate.
        versions_of: The network on which `versions` are compared, where it is one of `networks`.
        versions: Version and initialisation of each, next to `ditac` and `match`.
        versions_seeds: How many of the seeds they are trained with.
    """

    networks: tuple[str, ...] = ("test_resnet", "test_convnext", "mobilenetv3_small_050")
    seeds: int = 5
    train_images: int = 4_000
    tuning_images: int = 1_000
    test_images: int = 3_000
    epochs: int = 5
    batch_size: int = 64
    lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    versions_of: str = "test_resnet"
    versions: tuple[tuple[str, str], ...] = (
        ("ge", "match"),
        ("leaky", "match"),
        ("inf", "match"),
        ("ditac", "identity"),
        ("ditac", "prior"),
    )
    versions_seeds: int = 3

    @classmethod
    def quick(cls) -> "Settings":
        """Few images, one epoch, two seeds: whether it runs, not which is better."""
        return cls(seeds=2, train_images=500, tuning_images=200, test_images=500, epochs=1, lrs=(3e-3,))


@dataclass(frozen=True)
class Run:
    """One run of `train.py`, scored on the split `split`; `version` and `init` are DiTAC's, where not its default."""

    model: str
    lr: float
    epochs: int
    seed: int
    split: str = "validation"
    version: str = ""
    init: str = ""

    @property
    def name(self) -> str:
        """Of its folder."""
        ditac = [part for part in (self.version, self.init) if part]
        return "-".join([self.model, *ditac, self.split, f"lr{self.lr:g}", f"epochs{self.epochs}", f"seed{self.seed}"])

    def arguments(self, settings: Settings, images: Path, output: Path) -> list[str]:
        """The flags of `train.py`."""
        flags = {
            "-c": ROOT / "recipes" / "fashion_mnist.yaml",
            "--data-dir": images,
            "--val-split": self.split,
            "--model": self.model,
            "--lr": f"{self.lr:g}",
            "--epochs": self.epochs,
            "-b": settings.batch_size,
            "--seed": self.seed,
            "--output": output,
            "--experiment": self.name,
            "--ditac-version": self.version,
            "--ditac-init": self.init,
        }
        return [str(part) for flag, value in flags.items() if value != "" for part in (flag, value)]


@dataclass
class _Trainer:
    """Trains runs, some at a time, each in a process of its own; what is finished is read, not repeated."""

    settings: Settings
    images: Path
    output: Path
    workers: int
    progress: Callable[[int, int, str], None]
    total: int
    done: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._children: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def train(self, runs: Sequence[Run]) -> dict[Run, dict[str, Any]]:
        """Train what is not finished; if a run fails, or at a signal, end the others with their state saved."""
        results = {}
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                futures = {pool.submit(self._finished_or_trained, run): run for run in runs}
                for future in as_completed(futures):
                    results[futures[future]] = future.result()
                    self.count(futures[future].name)
            except BaseException:
                self._stop()
                pool.shutdown(cancel_futures=True)
                raise
        return results

    def count(self, description: str, runs: int = 1) -> None:
        """Report runs as done."""
        self.done += runs
        self.progress(self.done, self.total, description)

    def _finished_or_trained(self, run: Run) -> dict[str, Any]:
        marker = self.output / f"{run.name}.json"
        if not marker.is_file():
            self._train(run)
            _write_json(marker, self._read(run))
        return json.loads(marker.read_text())

    def _train(self, run: Run) -> None:
        arguments = run.arguments(self.settings, self.images, self.output)
        folder, log = self.output / run.name, self.output / f"{run.name}.log"
        begun = (folder / "args.yaml").is_file()
        command = [sys.executable, str(ROOT / "train.py"), *arguments, *(["--resume", str(folder)] if begun else [])]
        with open(log, "ab" if begun else "wb") as file:
            with self._lock:
                if self._stopped:
                    raise RunError(f"{run.name} was not begun")
                child = subprocess.Popen(
                    command,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    stdout=subprocess.DEVNULL,
                    stderr=file,
                    start_new_session=True,  # else Ctrl-C is a second signal, at which it ends without saving
                )
                self._children.add(child)
            code = child.wait()
            with self._lock:
                self._children.remove(child)
        if code:
            said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise RunError(f"{run.name} failed with exit code {code}: {said[-1] if said else 'no word'} (log: {log})")

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            for child in self._children:
                child.terminate()

    def _read(self, run: Run) -> dict[str, Any]:
        log = (self.output / f"{run.name}.log").read_text(errors="replace")
        with open(self.output / run.name / "summary.csv") as file:
            top1 = [float(row["eval_top1"]) for row in csv.DictReader(file)]
        # An epoch's last line has its mean rate, of training alone, to more digits than the time of an update.
        rates = re.findall(r"Train: .*/(\d+) \(100%\)\].* ([\d.]+)/s\)  LR", log)
        parameters = re.search(r"Model \S+: ([\d,]+) parameters", log)
        batch = self.settings.batch_size
        return {
            "final": top1[-1],
            "best": max(top1),
            "top1": top1,
            "seconds": [int(updates) * batch / float(rate) for updates, rate in rates if float(rate)],
            "parameters": int(parameters[1].replace(",", "")) if parameters else None,
            "command": shlex.join(["python", "train.py", *run.arguments(self.settings, self.images, self.output)]),
        }


def run_images(
    settings: Settings,
    out: Path,
    data_dir: Path,
    workers: int = 2,
    progress: Callable[[int, int, str], None] = lambda done, total, description: None,
) -> dict[str, Any]:
    """Train all runs, and return what they came to; it is written to `out` as images.json, .csv and .md.

    A second call goes on from what `out` holds of the same settings. It does not see that the recipe or the package
    changed: then use another folder.

    Args:
        settings: What is compared.
        out: The folder of images, runs and results.
        data_dir: Where Fashion-MNIST is, or is downloaded to.
        workers: Runs at a time; each has one thread.
        progress: Called with the runs done, all runs, and the name of what was done.

    Raises:
        UsageError: There is no `train.py`, no scipy, or no Fashion-MNIST.
        RunError: A run failed; the message has its last line and the path of its log.
    """
    if not (ROOT / "train.py").is_file():
        raise UsageError(f"images trains by the repository's train.py, which {ROOT} lacks: run it in a clone")
    t_quantile(1)  # what it needs may be missing: better now than after hours of training
    train, tuning, test = settings.train_images, settings.tuning_images, settings.test_images
    folder = out / f"{train}-{tuning}-{test}-batch{settings.batch_size}"  # all that a run's own name does not tell
    images = sources.write_images(data_dir, folder / "images", train, test, DATA_SEED, tuning)
    output = folder / "runs"
    output.mkdir(exist_ok=True)
    networks, seeds, epochs = settings.networks, range(settings.seeds), settings.epochs
    versions = settings.versions if settings.versions_of in networks else ()
    total = len(networks) * (len(settings.lrs) + 3 * len(seeds))
    total += len(versions) * len(seeds[: settings.versions_seeds])
    trainer = _Trainer(settings, images, output, workers, progress, total)

    tried = trainer.train([Run(base, lr, epochs, TUNING_SEED, "tuning") for base in networks for lr in settings.lrs])
    tuned: dict[str, dict[float, dict[str, float]]] = {base: {} for base in networks}
    for run, outcome in tried.items():
        tuned[run.model][run.lr] = {metric: outcome[metric] for metric in METRICS}
    lrs = {base: max(settings.lrs, key=lambda lr: tuple(tuned[base][lr].values())) for base in networks}

    def runs_of(base: str, suffix: str = "", epochs: int = epochs, version: str = "", init: str = "") -> list[Run]:
        some = seeds[: settings.versions_seeds] if version else seeds
        return [Run(base + suffix, lrs[base], epochs, seed, version=version, init=init) for seed in some]

    # Base and variant side by side, so that what else the machine does slows both.
    pairs = [
        Run(base + suffix, lrs[base], epochs, seed) for base in networks for seed in seeds for suffix in ("", "_ditac")
    ]
    others = [run for kind in versions for run in runs_of(settings.versions_of, "_ditac", epochs, *kind)]
    done = trainer.train([*pairs, *others])

    seconds = {model: _seconds(done, model) for base in networks for model in (base, f"{base}_ditac")}
    bought = {base: epochs_bought(epochs, seconds[base], seconds[f"{base}_ditac"]) for base in networks}
    done |= trainer.train(
        [run for base in networks if bought[base] != epochs for run in runs_of(base, "_ditac", bought[base])]
    )
    for base in networks:
        if bought[base] == epochs:
            trainer.count(f"{base}_ditac: equal time buys equal epochs", settings.seeds)

    def paired(base: str, variant_runs: list[Run]) -> dict[str, Any]:
        scores = {"base": runs_of(base)[: len(variant_runs)], "variant": variant_runs}
        top1 = {
            who: {metric: [done[run][metric] for run in runs] for metric in METRICS} for who, runs in scores.items()
        }
        gaps = {metric: difference(top1["variant"][metric], top1["base"][metric]) for metric in METRICS}
        return {**top1, "difference": {metric: gap.to_dict() for metric, gap in gaps.items()}}

    result: dict[str, Any] = {"settings": asdict(settings), "networks": {}, "versions": None}
    for base in networks:
        runs = {"base": runs_of(base), "variant": runs_of(base, "_ditac")}
        result["networks"][base] = {
            "lr": lrs[base],
            "tuning": {f"{lr:g}": scores for lr, scores in sorted(tuned[base].items())},
            "parameters": {who: done[kind[0]]["parameters"] for who, kind in runs.items()},
            "seconds_per_epoch": {who: seconds[kind[0].model] for who, kind in runs.items()},
            "equal_epochs": {"epochs": epochs, **paired(base, runs["variant"])},
            "equal_time": {
                "epochs": bought[base],
                "same_runs_as_equal_epochs": bought[base] == epochs,
                **paired(base, runs_of(base, "_ditac", bought[base])),
            },
            "commands": {who: done[kind[0]]["command"] for who, kind in runs.items()},
        }
    if versions:
        base = settings.versions_of
        rows = [{"version": "ditac", "init": "match", **paired(base, runs_of(base, "_ditac"))}]
        for version, init in versions:
            runs_there = runs_of(base, "_ditac", epochs, version, init)
            command = done[runs_there[0]]["command"]
            rows.append({"version": version, "init": init, "command": command, **paired(base, runs_there)})
        result["versions"] = {"network": base, "epochs": epochs, "rows": rows}
    _write_json(out / "images.json", result)
    write_atomically(out / "images.csv", lambda file: file.write(_sheet(result).encode()))
    write_atomically(out / "images.md", lambda file: file.write(markdown(result).encode()))
    return result


def _sheet(result: dict[str, Any]) -> str:
    """A line for each final and best top-1, as CSV."""
    lines = ["network,comparison,model,seed,final,best"]
    compared = [
        (base, name, row[name]) for base, row in result["networks"].items() for name in ("equal_epochs", "equal_time")
    ]
    if versions := result["versions"]:
        compared += [(versions["network"], f"{row['version']} {row['init']}", row) for row in versions["rows"]]
    for network, name, row in compared:
        for model in ("base", "variant"):
            scores = zip(row[model]["final"], row[model]["best"], strict=True)
            lines += [f"{network},{name},{model},{seed},{final},{best}" for seed, (final, best) in enumerate(scores)]
    return "\n".join(lines) + "\n"


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, lambda file: file.write(json.dumps(value, indent=2).encode()))


def _seconds(done: dict[Run, dict[str, Any]], model: str) -> float:
    """Median seconds of training an epoch, over the epochs of all seeds of a model in its default version."""
    runs = [outcome for run, outcome in done.items() if run.model == model and not run.version]
    return statistics.median(second for outcome in runs for second in outcome["seconds"])


def epochs_bought(epochs: int, base: float, variant: float) -> int:
    """Epochs of the variant in the time of the base's, to the nearest; at least 1, and never more than the base's."""
    return min(epochs, max(1, round(epochs * base / variant)))


def verdict(gap: Difference) -> str:
    """In words, whether an interval is above 0, below, or neither."""
    return "better" if gap.low > 0 else "worse" if gap.high < 0 else "no difference seen"


def markdown(result: dict[str, Any]) -> str:
    """Tables of what `run_images` returned."""
    settings, networks = result["settings"], result["networks"]
    head = ["base", "DiTAC", "difference", "verdict", "difference of best epochs"]
    lrs = sorted(settings["lrs"])
    equal_epochs, equal_time = [], []
    for base, row in networks.items():
        parameters, seconds = row["parameters"], row["seconds_per_epoch"]
        added = f"{parameters['base']:,} + {parameters['variant'] - parameters['base']:,}"
        edge = "*" * (len(lrs) > 1 and row["lr"] in (lrs[0], lrs[-1]))
        equal_epochs.append([base, f"{row['lr']:g}{edge}", added, *_cells(row["equal_epochs"])])
        bought = row["equal_time"]["epochs"]
        share = bought * seconds["variant"] / (settings["epochs"] * seconds["base"])
        times = f"{seconds['base']:.2f} / {seconds['variant']:.2f}"
        equal_time.append([base, times, f"{bought}, {share:.0%} of the time", *_cells(row["equal_time"])])
    parts = [
        f"Top-1 on {settings['test_images']:,} test images of Fashion-MNIST after training on "
        f"{settings['train_images']:,} by `train.py -c recipes/fashion_mnist.yaml`; mean ± sd of {settings['seeds']} "
        "seeds, differences paired by seed, in points, with 95 % intervals by Student's t. The learning rate was tuned "
        "for the base alone, by one seed, on images held out of the training images; DiTAC has the same.",
        f"Equal epochs, {settings['epochs']}:",
        table(["network", "learning rate", "parameters", *head], equal_epochs),
        "\\* the highest or lowest that was tried." if any("*" in row[1] for row in equal_epochs) else "",
        f"Equal training time, that of the base's {settings['epochs']} epochs, to the nearest (as many: the same "
        "runs):",
        table(["network", "seconds an epoch, base / DiTAC", "epochs of DiTAC", *head], equal_time),
    ]
    if versions := result["versions"]:
        rows = [[f"{row['version']}, {row['init']}", *_cells(row)] for row in versions["rows"]]
        number = len(versions["rows"][-1]["base"]["final"])
        parts += [f"Versions and inits on {versions['network']}, equal epochs, {number} seeds but for the first row:"]
        parts += [table(["version, init", *head], rows)]
    parts += [
        f"Tuning, bases only: final top-1 on {settings['tuning_images']:,} held-out training images:",
        table(
            ["network", *(f"{lr:g}" for lr in lrs)],
            [[base, *(f"{row['tuning'][f'{lr:g}']['final']:.2f}" for lr in lrs)] for base, row in networks.items()],
        ),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    final, best = (difference(row["variant"][metric], row["base"][metric]) for metric in METRICS)
    means = [plus_minus(row[who]["final"]) for who in ("base", "variant")]
    return [*means, str(final), verdict(final), str(best)]
