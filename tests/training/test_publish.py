"""`publish.py`: what it refuses, and the whole way from images to a model that anybody loads."""

import csv
import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
import yaml
from hub_server import TOKEN, HubServer, environment
from huggingface_hub import ModelCard, constants
from script_runs import ROOT, load_script

from ditac_timm import hub

RUN = shlex.split(
    "-b 24 -j 0 --img-size 32 --num-classes 10 --warmup-epochs 0 --lr 0.003 --opt adamw --epochs 2 --crop-pct 1.0"
)
REPO = "me/digits_ditac"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script `publish.py`, imported."""
    return load_script("publish")


@pytest.fixture(scope="module")
def run(train: ModuleType, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, with averaged weights that count from the start."""
    output = tmp_path_factory.mktemp("output")
    flags = ["--data-dir", str(digits), "--output", str(output), "--experiment", "run", *RUN]
    flags += ["--model", "test_vit_ditac", "--ditac-cells", "8", "--model-ema", "--model-ema-decay", "0.5"]
    assert train.main(flags) == 0
    return output / "run"


@pytest.fixture(scope="module")
def results(validate: ModuleType, digits: Path, run: Path) -> Path:
    """What validate.py wrote of the run's averaged weights."""
    file = run.parent / "results.csv"
    argv = ["--data-dir", str(digits), "--checkpoint", str(run), "--use-ema", "-j", "0", "--results-file", str(file)]
    assert validate.main(argv) == 0
    return file


@pytest.fixture
def no_reload(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved is not loaded back in a new process, which takes seconds."""
    monkeypatch.setattr(hub, "check_reload", lambda *_: None)


def row(file: Path) -> dict:
    with open(file) as stream:
        (found,) = csv.DictReader(stream)
    return found


def test_the_whole_way(
    script: ModuleType,
    validate: ModuleType,
    digits: Path,
    run: Path,
    results: Path,
    server: HubServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Train, validate, publish; then load by plain timm in a new process, and validate what was loaded.

    What anybody measures of the published model is what its page says, to the last digit.
    """
    argv = ["--checkpoint", str(run), "--use-ema", "--results", str(results), "--repo-id", REPO]
    assert script.main(argv) == 0
    address = capsys.readouterr().out.strip()
    assert address == f"{server.url}/{REPO}/commit/{server.repositories[REPO].branches['main']}"

    files = server.files(REPO)
    written = {"config.json", "model.safetensors", "README.md", "activations.png", "args.yaml", "summary.csv"}
    assert files.keys() == {".gitattributes", "results.json", *written}
    assert files["summary.csv"] == (run / "summary.csv").read_bytes()
    assert files["args.yaml"] == (run / "args.yaml").read_bytes()
    assert files["activations.png"] == (run / "activations.png").read_bytes()
    measured = row(results)
    card = ModelCard(files["README.md"].decode())
    assert {f"{result.metric_value}" for result in card.data.eval_results} == {measured["top1"], measured["top5"]}
    assert not any(b"hf_" in content for content in files.values())

    command = [sys.executable, str(ROOT / "validate.py"), "--model", f"hf-hub:{REPO}", "--data-dir", str(digits)]
    again = tmp_path / "again.csv"
    done = subprocess.run(
        [*command, "-j", "0", "--results-file", str(again)],
        env=environment(server, tmp_path) | {"PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    differs = {key for key in measured if measured[key] != row(again).get(key)}
    assert differs == {"model", "checkpoint", "epoch"}


@pytest.mark.parametrize("averaged", [False, True])
def test_a_dry_run(
    script: ModuleType, validate: ModuleType, digits: Path, run: Path, tmp_path: Path, averaged: bool, no_reload: None
) -> None:
    """A folder that timm loads; the picture is of these weights, so the run's own is of the averaged ones only."""
    average, out, file = ["--use-ema"] * averaged, tmp_path / "out", tmp_path / "results.json"
    argv = ["--checkpoint", str(run), *average]
    assert validate.main([*argv, "--data-dir", str(digits), "-j", "0", "--results-file", str(file)]) == 0
    assert script.main([*argv, "--results", str(file), "--repo-id", REPO, "--dry-run", str(out)]) == 0
    checkpoint = torch.load(run / "last.pth.tar", weights_only=True)
    weights = checkpoint["state_dict_ema" if averaged else "state_dict"]
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    same = (out / "activations.png").read_bytes() == (run / "activations.png").read_bytes()
    assert same == averaged
    assert yaml.safe_load((out / "args.yaml").read_text()) == checkpoint["args"]
    assert json.loads((out / "results.json").read_text())["weights_sha256"] == hub.weights_sha256(model)
    assert script.main([*argv, "--results", str(file), "--repo-id", REPO, "--dry-run", str(out)]) == 2


def test_a_plain_model_beside_which_nothing_is_claimed(
    script: ModuleType, train: ModuleType, validate: ModuleType, digits: Path, tmp_path: Path, no_reload: None
) -> None:
    flags = ["--data-dir", str(digits), "--output", str(tmp_path), "--experiment", "run", *RUN]
    assert train.main([*flags, "--model", "test_resnet", "--epochs", "1"]) == 0
    file, argv = tmp_path / "results.json", ["--checkpoint", str(tmp_path / "run")]
    assert validate.main([*argv, "--data-dir", str(digits), "-j", "0", "--results-file", str(file)]) == 0
    argv += ["--results", str(file), "--repo-id", "me/plain", "--license", "mit", "--dataset-id", "me/digits"]
    assert script.main([*argv, "--dry-run", str(tmp_path / "out")]) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict().items() >= {"license": "mit", "tags": ["image-classification", "timm"]}.items()
    assert card.data.datasets == ["me/digits"]
    assert "DiTAC" not in card.text
    assert "ditac_timm  #" not in card.text
    assert not (tmp_path / "out" / "activations.png").exists()


def test_what_it_started_from(
    script: ModuleType, run: Path, results: Path, tmp_path: Path, no_reload: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights that --pretrained took, with their licence; a picture of another epoch is not this one's."""
    checkpoint = torch.load(run / "last.pth.tar", weights_only=True)
    (tmp_path / "activations.png").write_bytes(b"of the epoch before")
    argv = ["--checkpoint", str(tmp_path), "--use-ema", "--results", str(results), "--repo-id", REPO]
    for name, started_from in (("test_vit_ditac", "timm/test_vit.r160_in1k"), ("hf-hub:me/base@main", "me/base")):
        checkpoint["args"] |= {"pretrained": True, "model": name, "epochs": 3}
        torch.save(checkpoint, tmp_path / "last.pth.tar")
        out = tmp_path / started_from.replace("/", "_")
        assert script.main([*argv, "--dry-run", str(out)]) == 0
        card = ModelCard.load(out / "README.md")
        assert (card.data.base_model, card.data.license) == (started_from, "apache-2.0")
        assert f"started from `{started_from}`" in card.text
        assert (out / "activations.png").read_bytes().startswith(b"\x89PNG")


def test_beside_its_base(
    script: ModuleType,
    run: Path,
    results: Path,
    tmp_path: Path,
    no_reload: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Compared with what validate.py wrote of the base, on the same images; with nothing else."""
    base = {**row(results), "model": "test_vit.r160_in1k", "top1": "4.0", "weights_sha256": "0" * 64}
    file, argv = tmp_path / "base.json", ["--checkpoint", str(run), "--use-ema", "--results", str(results)]
    argv += ["--repo-id", REPO, "--base-results", str(file)]
    for other, sentence in (
        ({"model": "test_resnet"}, "--base-results is of test_resnet, and the base is test_vit"),
        ({"images": "49"}, "--base-results is of images 49 and --results of 50: measure both on the same images"),
    ):
        file.write_text(json.dumps(base | other))
        assert script.main([*argv, "--dry-run", str(tmp_path / other.popitem()[0])]) == 2
        assert sentence in capsys.readouterr().err
    file.write_text(json.dumps(base))
    assert script.main([*argv, "--dry-run", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"{float(row(results)['top1']) - 4:+.3f} points of top-1 over `test_vit`, one run of each" in text
    assert (tmp_path / "out" / "base_results.json").is_file()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--results", "expected one argument"),
        ("--results ''", "--results is missing"),
        ("--results /no/such/file", "--results /no/such/file: No such file"),
        ("--repo-id name", "names no owner: give OWNER/NAME"),
        ("--repo-id me/x/y", "is no name for the Hub"),
        ("--repo-id me/-x-", "is no name for the Hub"),
        ("--checkpoint /no/such/file", "--checkpoint /no/such/file does not exist"),
        ("--token hf_x", "unrecognized arguments"),
        ("--base-results /no/such/file", "--base-results /no/such/file"),
    ],
)
def test_refusals(
    script: ModuleType,
    run: Path,
    results: Path,
    server: HubServer,
    capsys: pytest.CaptureFixture[str],
    flags: str,
    sentence: str,
) -> None:
    argv = ["--checkpoint", str(run), "--use-ema", "--results", str(results), "--repo-id", REPO, *shlex.split(flags)]
    assert script.main(argv) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("publish.py: error: ")
    assert sentence in said
    assert not server.requests


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": "test_resnet"}, "is of test_resnet and --checkpoint"),
        ({"weights_sha256": "0" * 64}, "is of other weights: give what validate.py measured with --checkpoint"),
        ({"weights_sha256": ""}, "has no weights_sha256: let validate.py --results-file write it again"),
        ({"top1": ""}, "has no top1"),
        ({"loss": "nan"}, "holds a number that is not finite"),
        ({"top5": "many"}, "is not what validate.py wrote"),
    ],
)
def test_results_of_something_else(
    script: ModuleType,
    run: Path,
    results: Path,
    server: HubServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict,
    sentence: str,
) -> None:
    other = tmp_path / "results.json"
    other.write_text(json.dumps(row(results) | change))
    argv = ["--checkpoint", str(run), "--use-ema", "--results", str(other), "--repo-id", REPO]
    assert script.main(argv) == 2
    assert sentence in capsys.readouterr().err
    assert not server.requests


def test_results_of_the_weights_that_are_not_averaged(
    script: ModuleType, run: Path, results: Path, server: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--checkpoint", str(run), "--results", str(results), "--repo-id", REPO]) == 2
    assert "is of other weights" in capsys.readouterr().err
    assert not server.requests


@pytest.mark.parametrize("change", ["arch", "model_args", "args", "another arch", "another setting"])
def test_checkpoints_that_say_another_thing(
    script: ModuleType,
    run: Path,
    results: Path,
    server: HubServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: str,
) -> None:
    checkpoint = torch.load(run / "last.pth.tar", weights_only=True)
    if change == "another arch":
        checkpoint["arch"] = "test_resnet_ditac"
    elif change == "another setting":
        checkpoint["model_args"]["ditac"]["cells"] = 10
    else:
        del checkpoint[change]
    torch.save(checkpoint, tmp_path / "last.pth.tar")
    argv = ["--checkpoint", str(tmp_path), "--use-ema", "--results", str(results), "--repo-id", REPO]
    assert script.main(argv) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("publish.py: error: ")
    assert ("does not fit" if "another" in change else f"holds no {change}: give one that train.py wrote") in said
    assert not server.requests


def test_what_the_hub_refuses_is_one_sentence(
    script: ModuleType,
    run: Path,
    results: Path,
    server: HubServer,
    no_reload: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["--checkpoint", str(run), "--use-ema", "--results", str(results), "--repo-id", "somebody/model"]
    assert script.main(argv) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("publish.py: error: the token that huggingface_hub found has no right to write to somebody/")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert script.main(argv) == 1
    assert "run `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("break_", "sentence"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"damaged"), "cannot be created"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be created"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
    ],
)
def test_validate_says_what_is_wrong_with_a_folder(
    validate: ModuleType, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], break_, sentence: str
) -> None:
    data = {"input_size": (3, 32, 32), "crop_pct": 1.0}
    hub.save(timm.create_model("ditac", base="test_resnet", num_classes=10), tmp_path, data, "mit")
    argv = ["--model", f"local-dir:{tmp_path}", "--data-dir", str(digits), "-j", "0"]
    assert validate.main(argv) == 0
    capsys.readouterr()
    break_(tmp_path)
    assert validate.main(argv) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("validate.py: error: ")
    assert sentence in said
