"""Which trainings an experiment is made of, and how they are run: side by side, resumable, each only once."""

import hashlib
import json
import multiprocessing
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..training.checkpoint import write_atomically
from ..training.errors import RunError, first_line
from . import competitors
from .ensemble import train
from .tasks import TASKS, Task

__all__ = ["EXPERIMENTS", "Experiment", "Job", "run"]

_EDITION = 1  # to be raised with any change of what is learned, or how: earlier results are then not used

VERSIONS = ("DiTAC", "DiTAC-prior", "GE-DiTAC", "L-DiTAC", "inf-DiTAC")
EVERYTHING = (*competitors.COMPETITORS, *VERSIONS)


@dataclass(frozen=True)
class Experiment:
    """A table of the paper, or a question of a user's.

    Attributes:
        name: What the command takes.
        title: For people.
        tasks: What is learned.
        activations: What is compared, unless the user says otherwise.
        seeds: How many, likewise.
        paper: What the paper prints, by task and activation: R2 or accuracy in percent.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    activations: tuple[str, ...] = EVERYTHING
    seeds: int = 5
    paper: dict[str, dict[str, float]] | None = None


_FOUR = ("DiTAC", "GE-DiTAC", "L-DiTAC", "inf-DiTAC")
_EXPERIMENTS = (
    Experiment(
        "table2",
        "Table 2: a function of one and of two variables",
        ("sinexp", "plane"),
        paper={"sinexp": {"LeakyReLU": 89.78, "DiTAC": 96.26}, "plane": {"PReLU": 96.09, "DiTAC": 98.37}},
    ),
    Experiment(
        "table7",
        "Table 7: Auto-MPG",
        ("autompg",),
        (*competitors.COMPETITORS, "DiTAC", "DiTAC-prior"),
        seeds=10,
        paper={
            "autompg": {
                "ReLU": 71.8, "LeakyReLU": 72.2, "GELU": 71.6, "ELU": 72.2, "Softplus": 71.8, "Mish": 71.7,
                "Swish": 72.1, "PReLU": 72.0, "DiTAC": 73.2,
            }
        },
    ),
    Experiment(
        "table8",
        "Table 8: another function of one variable",
        ("sines",),
        paper={
            "sines": {
                "ReLU": 93.3, "LeakyReLU": 94.7, "GELU": 9.7, "ELU": 3.6, "Softplus": 5.2, "Mish": 5.5,
                "Swish": 97.5, "PReLU": 93.1, "DiTAC": 99.3,
            }
        },
    ),
    Experiment(
        "table9",
        "Table 9: the versions of DiTAC",
        ("plane",),
        (*_FOUR, *(f"{name}-prior" for name in _FOUR)),
        paper={"plane": {"DiTAC": 98.4, "GE-DiTAC": 99.4, "L-DiTAC": 98.7, "inf-DiTAC": 97.6}},
    ),
    Experiment("mnist", "Figure 9: MNIST", ("mnist",), seeds=3),
    Experiment("gmm", "Section A.1: a mixture of Gaussians", ("gmm",)),
    Experiment(
        "ablation",
        "What to choose: domain, cells, regularisation",
        ("sines", "plane"),
        (
            "DiTAC", "DiTAC-domain-1", "DiTAC-domain-6", "DiTAC-5-cells", "DiTAC-20-cells",
            "DiTAC-reg-0.001", "DiTAC-reg-0.1",
        ),
        seeds=3,
    ),
)  # fmt: skip
EXPERIMENTS = {experiment.name: experiment for experiment in _EXPERIMENTS}


@dataclass(frozen=True)
class Job:
    """The training of one activation on one task, with all learning rates and seeds."""

    task: Task
    activation: str
    seeds: tuple[int, ...]

    @property
    def cost(self) -> float:
        """In some unit: what the progress bar counts."""
        networks, layers = len(self.seeds) * len(self.task.rates), len(self.task.sizes) - 2
        weights = sum(a * b for a, b in zip(self.task.sizes, self.task.sizes[1:], strict=False))
        each = layers * (0.2 if competitors.is_ditac(self.activation) else 0.04) + weights * self.task.batch * 1e-7
        return self.task.steps * networks * each

    def file(self, out: Path) -> Path:
        """Where its result is; another file for other settings."""
        task = self.task
        settings = [_EDITION, task.sizes, task.steps, task.batch, task.rates, task.evaluations, self.seeds]
        settings += [competitors.DITAC.get(self.activation)]
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
        slug = "".join(c if c.isalnum() else "_" for c in self.activation)
        return out / "runs" / f"{task.name}-{slug}-{digest}.json"

    def result(self, out: Path) -> dict[str, Any]:
        return json.loads(self.file(out).read_text())


def jobs_of(
    experiment: Experiment, activations: Sequence[str] | None, seeds: int | None, change: Callable[[Task], Task]
) -> list[Job]:
    """The trainings of an experiment, those given or its own; its tasks are changed first, as by `--quick`."""
    return [
        Job(_for(change(TASKS[task]), activation), activation, tuple(range(seeds or experiment.seeds)))
        for task in experiment.tasks
        for activation in activations or experiment.activations
    ]


def _for(task: Task, activation: str) -> Task:
    return task if competitors.is_ditac(activation) else replace(task, rates=(*task.more_rates, *task.rates))


_report: Any = None  # in a worker: the queue on which it tells its share


def _start_worker(queue: Any) -> None:
    global _report
    _report = queue
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it; its state is in a file
    torch.set_num_threads(1)


def _tell(name: str, share: float) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # killed, so nobody waits for this
        sys.exit(1)
    _report.put((name, share))


def _work(job: Job, out: Path, data_dir: Path) -> None:
    file = job.file(out)
    state = file.with_suffix(".pt")
    result = train(job.task, job.activation, list(job.seeds), data_dir, state, partial(_tell, file.name))
    result |= {"task": job.task.name, "activation": job.activation, "rates": job.task.rates, "seeds": job.seeds}
    result |= {"steps": job.task.steps, "batch": job.task.batch, "sizes": job.task.sizes}
    write_atomically(file, lambda stream: stream.write(json.dumps(result).encode()))
    state.unlink()


def run(
    jobs: Sequence[Job], out: Path, data_dir: Path, workers: int, progress: Callable[[float, float, str], None]
) -> None:
    """Run those jobs whose results are not there, some side by side, each on one thread.

    Args:
        jobs: What.
        out: The folder of results.
        data_dir: The folder of data.
        workers: How many at once.
        progress: Told the cost that is done, the whole, and what is at work.

    Raises:
        RunError: A job failed. Those that ended are kept, the others go on where they stood when run again.
        KeyboardInterrupt: Likewise.
    """
    (out / "runs").mkdir(parents=True, exist_ok=True)
    missing = {job.file(out).name: job for job in jobs if not job.file(out).is_file()}
    if not missing:
        return
    whole = sum(job.cost for job in missing.values())
    shares = dict.fromkeys(missing, 0.0)
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(min(workers, len(missing)), context, _start_worker, (queue := manager.Queue(),)) as pool,
    ):
        # The longest first, so that none is left alone at the end.
        order = sorted(missing.values(), key=lambda job: -job.cost)
        waiting = {pool.submit(_work, job, out, data_dir): job for job in order}
        try:
            while waiting:
                done, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                while not queue.empty():
                    name, share = queue.get()
                    shares[name] = share
                at_work = [f"{missing[n].task.name} {missing[n].activation}" for n, s in shares.items() if 0 < s < 1]
                progress(sum(missing[n].cost * s for n, s in shares.items()), whole, " | ".join(at_work))
                for future in done:
                    job = waiting.pop(future)
                    try:
                        future.result()
                    except RunError:
                        raise
                    except BrokenProcessPool as error:
                        raise RunError("a process was killed, perhaps for memory: run the same again") from error
                    except Exception as error:
                        raise RunError(f"{job.activation} on {job.task.name}: {first_line(error)}") from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
            raise
