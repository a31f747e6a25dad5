"""The paper's experiments: `python -m ditac_timm.experiments NAME`.

    python -m ditac_timm.experiments table8 --seeds 5          one table: printed, and written as JSON, CSV and Markdown
    python -m ditac_timm.experiments table2 --acts ReLU DiTAC  these activations only
    python -m ditac_timm.experiments all --quick               everything, shortened: whether it runs, not what is true
    python -m ditac_timm.experiments all                       everything, and reproduction.md with its pictures

What has been trained is kept in the folder of results, so the same command goes on where it was interrupted.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from ..benchmarking.report import environment
from ..training.checkpoint import write_atomically
from ..training.errors import UsageError, run_script
from . import competitors, figures, images, report, results, sources, study
from .tasks import Task

NAMES = (*study.EXPERIMENTS, "images", "figures", "all")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiments that the flags name, and return the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return run_script("ditac_timm.experiments", lambda args: experiments(args, argv), lambda: parse(argv))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ditac_timm.experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds; each experiment's own number if not given")
    parser.add_argument(
        "--acts",
        nargs="+",
        metavar="ACT",
        help=f"activations: some of {', '.join([*competitors.COMPETITORS, *competitors.DITAC])}; not for images",
    )
    parser.add_argument("--quick", action="store_true", help="few updates and two seeds")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of results; output/experiments, or with --quick -quick behind it",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="folder with MNIST/raw and FashionMNIST/raw, downloaded to where missing, and perhaps auto-mpg.data",
    )
    parser.add_argument(
        "--mnist-epochs", type=int, metavar="N", help="for mnist, figures and all: fewer than the supplement's 150"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes; as many as there are cores if not given")
    parser.add_argument(
        "--report", type=Path, metavar="FILE.md", help="where `all` writes its page; OUT/reproduction.md if not given"
    )
    args = parser.parse_args(argv)
    for flag in ("seeds", "mnist_epochs", "workers"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            parser.error(f"--{flag.replace('_', '-')} must be at least 1, not {value}")
    if args.acts and args.name == "images":
        parser.error("--acts is not for images, which compares networks with their own activations")
    if args.mnist_epochs and args.name not in ("mnist", "figures", "all"):
        parser.error(f"--mnist-epochs is for mnist, figures and all, not for {args.name}")
    if args.report and args.name != "all":
        parser.error(f"--report is for all, which writes a page; {args.name} does not")
    if args.report and args.report.suffix != ".md":
        parser.error(f"--report must end in .md, but is {args.report}")
    if args.workers is None:
        args.workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if args.out is None:
        args.out = Path("output/experiments-quick" if args.quick else "output/experiments")
    return args


def experiments(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Run what parsed flags say."""
    acts = competitors.check_names(args.acts or [])
    names = {"all": (*study.EXPERIMENTS, "images"), "figures": figures.NEEDED}.get(args.name, (args.name,))
    tables = [study.EXPERIMENTS[name] for name in names if name in study.EXPERIMENTS]
    seeds, change = args.seeds or (2 if args.quick else None), _change(args)
    jobs = {table.name: study.jobs_of(table, acts, seeds, change) for table in tables}
    _check_what_is_needed(args, {job.task.name for some in jobs.values() for job in some})
    surroundings = environment(torch.device("cpu"), argv, ("-m", "ditac_timm.experiments"))

    _train([job for some in jobs.values() for job in some], args)
    parts = []
    for table in tables:
        by_task: dict[str, list[study.Job]] = {}
        for job in jobs[table.name]:
            by_task.setdefault(job.task.name, []).append(job)
        own = [report.part_of(table, some, args.out, args.quick) for some in by_task.values()]
        parts += own
        if args.name != "figures":
            print(report.write(table, own, args.out, surroundings))
    real = _images(args) if "images" in names else None

    if args.name in ("all", "figures"):
        page = args.report or args.out / "reproduction.md"
        folder = page.with_suffix("")
        _make(folder)
        pictures = figures.draw(parts, folder, args.out, quick=args.quick)
        if args.name == "all":
            links = {name: f"![{caption}]({folder.name}/{name}.png)" for name, caption in pictures.items()}
            text = report.reproduction(parts, real, links, surroundings)
            write_atomically(page, lambda stream: stream.write(text.encode()))
            print(f"Wrote {page}")
        for name in pictures:
            print(f"Wrote {folder / name}.png")


def _train(jobs: Sequence[study.Job], args: argparse.Namespace) -> None:
    layout = "{percentage:3.0f}% {bar} {elapsed}<{remaining} {desc}"
    with tqdm(total=100, bar_format=layout, mininterval=0.1 if sys.stderr.isatty() else 30) as bar:

        def progress(done: float, whole: float, at_work: str) -> None:
            bar.set_description_str(at_work, refresh=False)
            bar.update(100 * done / whole - bar.n)

        study.run(jobs, args.out, args.data_dir, args.workers, progress)
        bar.update(100 - bar.n)


def _images(args: argparse.Namespace) -> str:
    settings = images.Settings.quick() if args.quick else images.Settings()
    settings = replace(settings, seeds=args.seeds or settings.seeds)
    with tqdm(total=1, unit="run", mininterval=0.1 if sys.stderr.isatty() else 30) as bar:

        def progress(done: int, total: int, description: str) -> None:
            bar.total = total
            bar.set_description_str(description, refresh=False)
            bar.update(done - bar.n)

        done = images.run_images(settings, args.out / "images", args.data_dir, args.workers, progress)
        text = images.markdown(done)
    print(text)
    return text


def _change(args: argparse.Namespace) -> Callable[[Task], Task]:
    def change(task: Task) -> Task:
        if args.quick:
            return task.shortened()
        if task.name == "mnist" and args.mnist_epochs:
            return replace(
                task, steps=task.steps * args.mnist_epochs // task.evaluations, evaluations=args.mnist_epochs
            )
        return task

    return change


def _check_what_is_needed(args: argparse.Namespace, tasks: set[str]) -> None:
    """Packages, data and a writable folder: before anything is trained."""
    results.t_quantile(1)
    if args.name in ("all", "figures"):
        figures.check_packages()
    if "mnist" in tasks:
        sources.ubyte_images("MNIST", args.data_dir)
    if args.name in ("all", "images"):
        sources.ubyte_images("FashionMNIST", args.data_dir)
    if "autompg" in tasks:
        sources.auto_mpg(args.data_dir)
    _make(args.out)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made: {error.strerror}") from error


if __name__ == "__main__":
    for name in ("SIGTERM", "SIGHUP"):  # as Ctrl-C, so that what was started ends too
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    sys.exit(main())
