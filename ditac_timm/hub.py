"""A trained model on the Hugging Face Hub: its files and card, published in one commit.

What is published loads by plain timm once `ditac_timm` is imported: `timm.create_model("hf-hub:OWNER/NAME",
pretrained=True)`. huggingface_hub does the talking, and finds the token.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import safetensors.torch
import torch
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from timm.models import save_for_hf
from torch import nn

from .download import CONFIG, WEIGHTS

__all__ = ["HubError", "check_reload", "model_card", "publish", "save", "weights_sha256"]

CARD = "README.md"
PICTURE, FLAGS, SUMMARY = "activations.png", "args.yaml", "summary.csv"
RESULTS, BASE_RESULTS = "results.json", "base_results.json"

_PUBLISHED = {CONFIG, WEIGHTS, CARD, PICTURE, FLAGS, SUMMARY, RESULTS, BASE_RESULTS}
_OF_OTHER_WEIGHTS = {"tag", "description", "origin_url", "paper_name", "paper_ids", "notes"}
_PASSES = {408, 429, 500, 502, 503, 504}
_WAITS = (2.0, 8.0, 30.0)  # seconds, where the Hub does not say how long
_LONGEST_WAIT = 600.0

_T = TypeVar("_T")

# The way a user loads it, and nothing else, in a process that knows nothing of the model that was saved.
_RELOAD = """
import sys
import timm, torch
import ditac_timm
from safetensors.torch import load_file, save_file
from ditac_timm.hub import weights_sha256

folder, batch, out, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
with torch.inference_mode():
    save_file({"logits": model(load_file(batch)["x"])}, out, metadata={"weights": weights_sha256(model)})
"""

CITATION = """@inproceedings{chelly2024ditac,
  title     = {Trainable Highly-expressive Activation Functions},
  author    = {Chelly, Irit and Finder, Shahaf E. and Ifergane, Shira and Freifeld, Oren},
  booktitle = {European Conference on Computer Vision (ECCV)},
  year      = {2024},
  note      = {arXiv:2407.07564}
}"""


class HubError(RuntimeError):
    """A model cannot be published; one sentence says why."""


def weights_sha256(model: nn.Module) -> str:
    """The SHA-256 of the `model.safetensors` that a model is saved as, in 64 hexadecimal digits.

    It is also what the Hub shows beside that file.
    """
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)  # tied weights are written twice
        for name, tensor in model.state_dict().items()
    }
    return hashlib.sha256(safetensors.torch.save(tensors)).hexdigest()


def save(model: Any, folder: Path, data_config: Mapping[str, Any], license: str) -> None:
    """Write `config.json` and `model.safetensors`, as timm does.

    Args:
        model: Of timm's `create_model`, on the CPU.
        folder: Where to, made where missing.
        data_config: How images are prepared: timm's `input_size`, `mean`, `std`, `interpolation`, `crop_pct`,
            `crop_mode`.
        license: Of the weights, by the Hub's name for it.
    """
    described = {key: value for key, value in model.pretrained_cfg.items() if key not in _OF_OTHER_WEIGHTS}
    model.pretrained_cfg = {**described, "license": license}
    save_for_hf(model, str(folder), safe_serialization=True, data_config=dict(data_config))


def check_reload(model: nn.Module, folder: Path, input_size: tuple[int, int, int]) -> None:
    """Load a folder in a new process, with plain timm, and compare its logits with a model's, bit for bit.

    Args:
        model: What was saved, on the CPU; it is left in evaluation mode.
        folder: Where `save` has written it.
        input_size: `(channels, height, width)` of the two random images compared, always the same.

    Raises:
        HubError: It does not load, or computes something else.
    """
    x = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    with TemporaryDirectory() as scratch, torch.inference_mode():
        batch, out = Path(scratch, "batch.safetensors"), Path(scratch, "logits.safetensors")
        safetensors.torch.save_file({"x": x}, batch)
        expected = model.eval()(x)
        done = subprocess.run(
            [sys.executable, "-c", _RELOAD, str(folder), str(batch), str(out), str(torch.get_num_threads())],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
            raise HubError(f"what was saved does not load back in a new process: {said}")
        with safetensors.safe_open(out, "pt") as saved:
            logits, weights = saved.get_tensor("logits"), saved.metadata()["weights"]
    if weights != weights_sha256(model) or not torch.equal(logits, expected):
        raise HubError("what was saved loads back as another model: its weights or logits are not the checkpoint's")


def model_card(
    repo_id: str,
    config: Mapping[str, Any],
    results: Mapping[str, Any],
    *,
    license: str,
    base: str | None = None,
    activations: int = 0,
    picture: bool = False,
    base_results: Mapping[str, Any] | None = None,
    started_from: str | None = None,
    dataset_id: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
) -> ModelCard:
    """Write the page of a model: metadata for the Hub, and what a reader wants to know.

    Args:
        repo_id: `OWNER/NAME`.
        config: What `config.json` holds.
        results: What `validate.py` wrote of these weights: accuracies in per cent.
        license: By the Hub's name for it.
        base: The timm architecture whose activations DiTAC replaces, of a model with DiTAC.
        activations: How many were replaced.
        picture: Whether `activations.png` is there.
        base_results: What `validate.py` wrote of the base, on the same images; without it nothing is compared.
        started_from: The Hub's repository of the weights that training started from.
        dataset_id: The Hub's name of the dataset.
        recipe: Flags of `train.py` that are not its defaults, by name.
        versions: Of packages, by name.
    """
    name, dataset = repo_id.partition("/")[2], str(results["dataset"])
    where: dict[str, Any] = {
        "task_type": "image-classification",
        "task_name": "Image classification",
        "dataset_type": dataset_id or dataset,
        "dataset_name": dataset,
        "dataset_split": str(results["split"]),
    }
    data = ModelCardData(
        license=license,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", *(["ditac"] if base else [])],
        datasets=[dataset_id] if dataset_id else None,
        base_model=started_from,
        model_name=name,
        eval_results=[
            EvalResult(
                **where, metric_type="accuracy", metric_name=f"Top-{k} accuracy", metric_value=results[f"top{k}"]
            )
            for k in (1, 5)
        ],
    )
    architecture = config["architecture"]
    what = f"`{architecture}` of [timm](https://github.com/huggingface/pytorch-image-models)"
    if base:
        what = (
            f"`{base}` of [timm](https://github.com/huggingface/pytorch-image-models) with "
            f"[DiTAC](https://arxiv.org/abs/2407.07564), a trainable activation, in the place of {activations} of its "
            "activations. Each is a diffeomorphism of an interval, learned together with the weights, times the "
            "normal distribution function"
        )
    package = "\nimport ditac_timm  # which registers the architecture with timm" if base else ""
    keeps = " and keeps the activations as they were learned" if base else ""
    sections = [
        f"# {name}\n\n{what}. Trained on {dataset}, {config['num_classes']} classes.",
        *(["![The learned activations](activations.png)"] if picture else []),
        f"""## Load it

```python
import timm{package}

model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

`hf-hub:{repo_id}@COMMIT` pins a version; `num_classes=` puts a new head on it{keeps}.""",
        _results_section(repo_id, config, results, base, base_results),
        _training_section(results, recipe or {}, versions or {}, started_from),
    ]
    if base:
        sections.append(f"## Citation\n\n```bibtex\n{CITATION}\n```")
    return ModelCard("---\n" + data.to_yaml() + "\n---\n\n" + "\n\n".join(sections) + "\n")


def _results_section(
    repo_id: str,
    config: Mapping[str, Any],
    results: Mapping[str, Any],
    base: str | None,
    base_results: Mapping[str, Any] | None,
) -> str:
    rows = [(repo_id.partition("/")[2], results), *([(str(base), base_results)] if base_results else [])]
    table = "\n".join(
        f"| {name} | {row['param_count']}M | {row['top1']} | {row['top5']} | {row['loss']:.4f} |" for name, row in rows
    )
    saved = config["pretrained_cfg"]
    used = {
        "--split": (results["split"], "validation"),
        "--img-size": (results["img_size"], saved["input_size"][-1]),
        "--crop-pct": (results["crop_pct"], saved["crop_pct"]),
        "--interpolation": (results["interpolation"], saved["interpolation"]),
    }
    flags = [f"{flag} {value}" for flag, (value, default) in used.items() if value != default]
    if str(results.get("test_pool")) == "True":
        flags.append("--test-pool")
    precision = str(results["precision"])
    if precision.startswith("amp "):
        flags.append(f"--amp --amp-dtype {precision.removeprefix('amp ')}")
    elif precision != "float32":
        flags.append(f"--model-dtype {precision}")
    command = " ".join([f"python validate.py --model hf-hub:{repo_id} --data-dir DIR", *flags])
    compared = ""
    if base_results:
        difference = results["top1"] - base_results["top1"]
        compared = f"\n\n{difference:+.3f} points of top-1 over `{base}`, one run of each: another seed moves either."
    return f"""## Results

| | parameters | top-1, % | top-5, % | loss |
| --- | --- | --- | --- | --- |
{table}{compared}

Measured on the {results["images"]} images of {results["dataset"]}, split {results["split"]}, in {precision}; \
`{RESULTS}` is what was measured, of `{WEIGHTS}` by its SHA-256. The same again:

```bash
{command}
```"""


def _training_section(
    results: Mapping[str, Any], recipe: Mapping[str, Any], versions: Mapping[str, str], started_from: str | None
) -> str:
    epoch = results.get("epoch")
    lines = [f"`python train.py -c {FLAGS}`" + ("" if epoch in (None, "") else f", the weights after epoch {epoch}")]
    lines.append(f", started from `{started_from}`" if started_from else "")
    text = "## How it was trained\n\n" + "".join(lines) + "."
    if versions:
        text += f" Saved with {', '.join(f'{name} {version}' for name, version in versions.items())}."
    if recipe:
        rows = "\n".join(f"| `{flag}` | {value} |" for flag, value in recipe.items())
        text += f"\n\n| flag, where it is not the default | |\n| --- | --- |\n{rows}"
    return text


def publish(
    folder: Path,
    repo_id: str,
    *,
    message: str,
    revision: str | None = None,
    private: bool = False,
    replace_architecture: bool = False,
    api: HfApi | None = None,
) -> str:
    """Put a folder's files onto the Hub in one commit: all of it becomes visible, or nothing.

    Files that an earlier publication left and this one does not have go in the same commit. The repository, or the
    branch, is made where missing. What passes (a limit on requests, a busy server, a lost connection) is tried again;
    a commit whose answer was lost is recognised, not repeated.

    Args:
        folder: Holds `config.json` and what else is to be published.
        repo_id: `OWNER/NAME`.
        message: Of the commit, one line.
        revision: A branch, main if not given.
        private: Make a new repository private.
        replace_architecture: Let another architecture take the repository over.
        api: The client; by default huggingface_hub's own, with the token that it finds.

    Returns:
        The commit's address.

    Raises:
        HubError: Nothing was published, or the connection was lost at the end, and it says so.
    """
    api = api or HfApi(library_name="ditac_timm")
    if not (api.token or get_token()):
        raise HubError("there is no token for the Hub: run `hf auth login`, or set HF_TOKEN")
    made = ""
    try:
        try:
            repository = _patiently(lambda: api.model_info(repo_id))
        except RepositoryNotFoundError:
            _patiently(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True))
            made = f"; {repo_id} was made for it"
            repository = _patiently(lambda: api.model_info(repo_id))
        if private and not repository.private:
            raise HubError(f"{repo_id} is public already: leave --private out, or name another repository")
        try:
            head = _patiently(lambda: api.model_info(repo_id, revision=revision)) if revision else repository
        except RevisionNotFoundError:
            _patiently(lambda: api.create_branch(repo_id, branch=str(revision), exist_ok=True))
            head = _patiently(lambda: api.model_info(repo_id, revision=revision))
        if not replace_architecture:
            _check_architecture(api, repo_id, head, json.loads((folder / CONFIG).read_text()))
        commit = _patiently(lambda: _commit(api, folder, repo_id, revision, str(head.sha), message))
    except HubError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # what huggingface_hub raises
        known = isinstance(error, HfHubHTTPError) or not isinstance(error, HTTPError)
        outcome = "nothing was published" if known else f"whether anything was published, {repo_id} itself will show"
        raise HubError(f"{_reason(error, repo_id)}; {outcome}{made}") from error
    return commit


def _commit(api: HfApi, folder: Path, repo_id: str, revision: str | None, parent: str, message: str) -> str:
    # Read again at each try: after a commit whose answer was lost there is nothing left to do, and no new commit.
    there = {file.rfilename for file in api.model_info(repo_id, revision=revision).siblings or []}
    files = {file.name: file for file in sorted(folder.iterdir())}
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(name, str(file)) for name, file in files.items()),
        *(CommitOperationDelete(name) for name in sorted(_PUBLISHED & there - files.keys())),
    ]
    commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision, parent_commit=parent)
    return commit.commit_url


def _check_architecture(api: HfApi, repo_id: str, head: Any, config: Mapping[str, Any]) -> None:
    if CONFIG not in {file.rfilename for file in head.siblings or []}:
        return
    file = _patiently(lambda: api.hf_hub_download(repo_id, CONFIG, revision=head.sha))
    try:
        there = _architecture(json.loads(Path(file).read_text()))
    except ValueError:
        there = "no model of timm"
    if there != (ours := _architecture(config)):
        raise HubError(
            f"{repo_id} holds {there} and this is {ours}: name another repository, or give --replace-architecture"
        )


def _architecture(config: Mapping[str, Any]) -> str:
    base = (config.get("model_args") or {}).get("base")
    name = config.get("architecture", "no model of timm")
    return f"{name} on {base.partition('.')[0]}" if base else str(name)


def _patiently(call: Callable[[], _T]) -> _T:
    """Call, and again after what passes, as long as the Hub asks to wait."""
    for wait in _WAITS:
        try:
            return call()
        except HfHubHTTPError as error:
            asked = error.response.headers.get("Retry-After", "")
            wait = float(asked) if asked.isdecimal() else wait
            if error.response.status_code not in _PASSES or wait > _LONGEST_WAIT:
                raise
        except json.JSONDecodeError:
            pass  # a busy server's page, where huggingface_hub expects JSON
        except HTTPError:
            pass  # no answer at all
        time.sleep(wait)
    return call()


def _reason(error: BaseException, repo_id: str) -> str:
    """One sentence of what huggingface_hub raised."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # an upload's error is inside another
        error = error.__cause__
    if isinstance(error, json.JSONDecodeError):
        return "the Hub's answer is no JSON, as of a server that is down or a proxy"
    if not isinstance(error, HfHubHTTPError):
        said = " ".join(str(error).split()) or type(error).__name__
        return f"the Hub was not reached: {said}" if isinstance(error, HTTPError | ConnectionError) else said
    status, said = error.response.status_code, " ".join((error.server_message or "").split())
    reasons = {
        401: "the token that huggingface_hub found is not valid",
        403: f"the token that huggingface_hub found has no right to write to {repo_id}",
        404: f"{repo_id} is not there, or not to be seen with the token that huggingface_hub found",
        409: f"somebody else has committed to {repo_id} meanwhile: look at it, and publish again",
        412: f"somebody else has committed to {repo_id} meanwhile: look at it, and publish again",
        413: f"{repo_id} does not take files as large as these",
    }
    busy = "the Hub is busy, and stayed so: publish again later"
    reason = busy if status in _PASSES else reasons.get(status, "the Hub refused")
    return f"{reason} ({status}{f', {said}' if said else ''})"
