#!/usr/bin/env python3
"""Publish a checkpoint on the Hugging Face Hub, as a model that plain timm loads, with the page that says what it is.

    python validate.py --data-dir /data/imagenet --checkpoint output/train/RUN --use-ema --results-file results.json
    python publish.py --checkpoint output/train/RUN --use-ema --results results.json --repo-id me/convnext_small_ditac
    python publish.py ... --dry-run my_model

One commit holds config.json, model.safetensors, README.md (the model card), activations.png, args.yaml, summary.csv
and results.json: all of it, or nothing. Before, the files are loaded back in a new process, and must compute what the
checkpoint computes. Accuracies are those that validate.py measured of these very weights. The token is the one that
huggingface_hub finds (`hf auth login`, or HF_TOKEN). The flags in args.yaml and the paths in results.json are published
as they are: --dry-run writes the same files into a folder, to look at first.
"""

import argparse
import csv
import json
import logging
import math
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id
from timm.models import parse_model_name

from ditac_timm import hub
from ditac_timm.activation import DiTAC
from ditac_timm.ditac_zoo import base_of
from ditac_timm.plot import plot_activations
from ditac_timm.training import checkpoint as checkpoints
from ditac_timm.training import model as models
from ditac_timm.training.errors import RunError, UsageError, as_typed, run_script
from ditac_timm.training.flags import parse_publish_flags, train_parser

_logger = logging.getLogger("publish")

# What is said of an evaluation, all of it by validate.py.
_MEASURED = ("top1", "top5", "loss", "param_count", "crop_pct", "img_size", "images")
_NAMED = ("model", "weights_sha256", "dataset", "split", "precision", "interpolation")
# Flags of a run that say where and how it was run, not what was trained.
_WHERE = {"data_dir", "output", "experiment", "resume", "workers", "local_rank", "log_interval", "wandb_resume_id"}


def main(argv: Sequence[str] | None = None) -> int:
    """Publish as the flags say, print the commit's address, and return the exit code."""
    return run_script("publish.py", publish, lambda: parse_publish_flags(argv))


def publish(args: argparse.Namespace) -> None:
    """Publish as parsed flags say."""
    check_repo_id(args.repo_id)
    file = checkpoints.find_checkpoint(args.checkpoint, "--checkpoint")
    if not args.results:
        average = " --use-ema" if args.use_ema else ""
        raise UsageError(
            "--results is missing, and a model is published with what it was measured to do: run validate.py "
            f"--checkpoint {args.checkpoint}{average} --results-file results.json, and give that file"
        )
    results = read_results(args.results, "--results")
    base_results = read_results(args.base_results, "--base-results") if args.base_results else None
    if args.dry_run and Path(args.dry_run).exists() and any(Path(args.dry_run).iterdir()):
        raise UsageError(f"--dry-run {args.dry_run} is not empty: name a new folder")
    try:
        with TemporaryDirectory() as scratch:
            folder = Path(args.dry_run or scratch)
            architecture = write_files(args, file, folder, results, base_results)
            if args.dry_run:
                print(folder)
                return
            address = hub.publish(
                folder,
                args.repo_id,
                message=f"{architecture}, top-1 {results['top1']}",
                revision=args.revision,
                private=args.private,
                replace_architecture=args.replace_architecture,
            )
    except hub.HubError as error:
        raise RunError(str(error)) from error
    print(address)


def write_files(
    args: argparse.Namespace,
    file: Path,
    folder: Path,
    results: dict[str, Any],
    base_results: dict[str, Any] | None,
) -> str:
    """Write what is to be published into a folder, load it back, and return its architecture."""
    flag = f"--checkpoint {args.checkpoint}"
    checkpoint = checkpoints.read_checkpoint(file, "--checkpoint")
    lacking = [key for key in ("arch", "model_args", "data_config", "args") if key not in checkpoint]
    if lacking:
        raise UsageError(f"{flag} holds no {' and no '.join(lacking)}: give one that train.py wrote")
    models.check_model_name(checkpoint["arch"], f"{flag}:")
    model = models.build_model(checkpoint["arch"], checkpoint["model_args"], flag=f"{flag}:")
    checkpoints.load_weights(model, checkpoints.weights_to_evaluate(checkpoint, args), flag)
    check_results(results, model, checkpoint, args)

    flags = dict(checkpoint["args"])
    started_from, inherited = _origin(model, flags)
    license = args.license or inherited or "apache-2.0"
    with checkpoints.reported_write_errors(folder):
        hub.save(model, folder, checkpoint["data_config"], license)
        config = json.loads((folder / hub.CONFIG).read_text())
        base = base_of(config["architecture"], config.get("model_args", {}))
        if base_results is not None:
            check_base_results(base_results, results, base)
            (folder / hub.BASE_RESULTS).write_text(json.dumps(base_results, indent=4))
        layers = sum(isinstance(module, DiTAC) for module in model.modules())
        if layers:
            _write_picture(model, file, folder, checkpoint, args.use_ema)
        (folder / hub.FLAGS).write_text(yaml.safe_dump(flags, default_flow_style=False))
        (folder / hub.RESULTS).write_text(json.dumps(results, indent=4))
        if (summary := file.parent / hub.SUMMARY).is_file():
            shutil.copyfile(summary, folder / hub.SUMMARY)
        card = hub.model_card(
            args.repo_id,
            config,
            results,
            license=license,
            base=base,
            activations=layers,
            picture=bool(layers),
            base_results=base_results,
            started_from=started_from,
            dataset_id=args.dataset_id,
            recipe=_recipe(flags),
            versions=_versions(),
        )
        card.save(folder / hub.CARD)
    _logger.info("Loading back what was saved, in a new process.")
    hub.check_reload(model, folder, tuple(checkpoint["data_config"]["input_size"]))
    return checkpoint["arch"]


def check_repo_id(repo_id: str) -> None:
    """Refuse what is no name of a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"--repo-id {repo_id} is no name for the Hub: {' '.join(str(error).split())}") from error
    if repo_id.count("/") != 1:
        raise UsageError(f"--repo-id {repo_id} names no owner: give OWNER/NAME")


def read_results(path: str, flag: str) -> dict[str, Any]:
    """Read the one row that validate.py wrote, csv or json."""
    try:
        text = Path(path).read_text()
        rows = json.loads(text) if text.lstrip().startswith(("{", "[")) else [*csv.DictReader(text.splitlines())]
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{flag} {path} is not what validate.py wrote: {error}") from error
    rows = rows if isinstance(rows, list) else [rows]
    if len(rows) != 1 or not isinstance(rows[0], dict):
        raise UsageError(f"{flag} {path} must hold one result, and holds {len(rows)}")
    (row,) = rows
    if missing := [name for name in (*_NAMED, *_MEASURED) if row.get(name) in (None, "")]:
        raise UsageError(f"{flag} {path} has no {missing[0]}: let validate.py --results-file write it again")
    try:
        numbers = {name: float(row[name]) for name in _MEASURED}
    except ValueError as error:
        raise UsageError(f"{flag} {path} is not what validate.py wrote: {error}") from error
    if not all(math.isfinite(number) for number in numbers.values()):
        raise UsageError(f"{flag} {path} holds a number that is not finite: this model is not one to publish")
    whole = {name: int(numbers[name]) for name in ("img_size", "images")}
    return {**row, **numbers, **whole}


def check_results(results: dict[str, Any], model: Any, checkpoint: dict[str, Any], args: argparse.Namespace) -> None:
    """Refuse results of another model, or of other weights of it."""
    named = results["model"]
    if parse_model_name(named)[0] is None and named != checkpoint["arch"]:
        raise UsageError(
            f"--results {args.results} is of {named} and --checkpoint {args.checkpoint} of {checkpoint['arch']}: "
            "give the results of this one"
        )
    if results["weights_sha256"] != hub.weights_sha256(model):
        average = " and --use-ema" if args.use_ema else ", without --use-ema"
        raise UsageError(
            f"--results {args.results} is of other weights: give what validate.py measured with "
            f"--checkpoint {args.checkpoint}{average}"
        )


def check_base_results(base_results: dict[str, Any], results: dict[str, Any], base: str | None) -> None:
    """Refuse a comparison of what cannot be compared."""
    if base is None:
        raise UsageError(f"--base-results: {results['model']} has no DiTAC, and so no base: leave it out")
    if (named := parse_model_name(base_results["model"])[1].partition(".")[0]) != base:
        raise UsageError(f"--base-results is of {named}, and the base is {base}: give the base's")
    for key in ("dataset", "split", "images"):
        if base_results[key] != results[key]:
            raise UsageError(
                f"--base-results is of {key} {base_results[key]} and --results of {results[key]}: "
                "measure both on the same images"
            )


def _origin(model: Any, flags: dict[str, Any]) -> tuple[str | None, str | None]:
    """The Hub's repository of the weights that a run started from, and their licence, where it is known."""
    if not flags.get("pretrained") or flags.get("pretrained_path"):
        return None, None
    source, place = parse_model_name(flags["model"])
    if source == "hf-hub":
        return place.partition("@")[0], None
    return (model.pretrained_cfg.get("hf_hub_id"), model.pretrained_cfg.get("license")) if not source else (None, None)


def _write_picture(model: Any, file: Path, folder: Path, checkpoint: dict[str, Any], use_ema: bool) -> None:
    """The run's own picture, over histograms of inputs, where it is of these weights; else one of the curves alone."""
    drawn, flags = file.with_name(hub.PICTURE), checkpoint["args"]
    averaged = bool(flags.get("model_ema") and not flags.get("model_ema_force_cpu"))
    ended = flags.get("plot_activations") or checkpoint.get("epoch", -1) + 1 == flags.get("epochs")
    if drawn.is_file() and file.name == checkpoints.LAST and ended and averaged == use_ema:
        shutil.copyfile(drawn, folder / hub.PICTURE)
        return
    try:
        plot_activations(model, folder / hub.PICTURE)
    except ImportError as error:
        raise RunError(str(error)) from error


def _recipe(flags: dict[str, Any]) -> dict[str, str]:
    """The flags that are not train.py's defaults, as a command line spells them."""
    parser = train_parser()
    return {
        f"--{name.replace('_', '-')}": as_typed(value)
        for name, value in sorted(flags.items())
        if name not in _WHERE and value != parser.get_default(name)
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in ("ditac_timm", "timm", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a checkout
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
