"""Publishing and loading, by huggingface_hub's real client and a Hub on the loopback interface, with every fault."""

import hashlib
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from hub_server import READ_ONLY, TOKEN, HubServer, environment
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import ditac_timm
from ditac_timm import hub

ROOT = Path(__file__).parents[1]
REPO = "me/tiny_ditac"
DATA = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 1.0}
RESULTS = {
    "model": "test_vit_ditac", "epoch": 1, "dataset": "digits", "split": "validation", "images": 50,
    "precision": "float32", "top1": 90.0, "top5": 99.0, "loss": 0.5, "param_count": 0.3, "img_size": 32,
    "crop_pct": 1.0, "interpolation": "bicubic",
}  # fmt: skip


def tiny(seed: int = 0, **kwargs):
    """A small model whose thetas no initialisation would give."""
    torch.manual_seed(seed)
    model = ditac_timm.create_model("test_vit_ditac", num_classes=7, **kwargs).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".theta"):
                parameter.normal_()
    return model


def write(model, folder: Path, repo_id: str = REPO, **kwargs) -> Path:
    """What publish.py would write, but for pictures and tables."""
    hub.save(model, folder, DATA, "apache-2.0")
    config = json.loads((folder / "config.json").read_text())
    card = hub.model_card(repo_id, config, RESULTS, license="apache-2.0", base="test_vit", activations=6, **kwargs)
    card.save(folder / "README.md")
    return folder


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def files(model, tmp_path_factory) -> Path:
    """A folder to publish, not to be written to."""
    return write(model, tmp_path_factory.mktemp("published"))


@pytest.fixture
def no_waiting(monkeypatch):
    """The seconds that were to be waited, not waited."""
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    return waits


def publish(folder: Path, **kwargs) -> str:
    return hub.publish(folder, kwargs.pop("repo_id", REPO), message="a model", **kwargs)


def of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def published(server: HubServer, revision: str = "main") -> dict[str, bytes]:
    return {name: content for name, content in server.files(REPO, revision).items() if name != ".gitattributes"}


def load(name: str = REPO, **kwargs):
    return timm.create_model(f"hf-hub:{name}", pretrained=True, **kwargs).eval()


def assert_same(model, other):
    assert hub.weights_sha256(model) == hub.weights_sha256(other)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), other(x))


# --- The files --------------------------------------------------------------------------------------------------------


def test_the_checksum_is_the_files(model, files):
    assert hub.weights_sha256(model) == hashlib.sha256((files / "model.safetensors").read_bytes()).hexdigest()


def test_config_says_nothing_of_other_weights(files):
    config = json.loads((files / "config.json").read_text())
    assert (config["architecture"], config["model_args"]["base"], config["num_classes"]) == ("ditac", "test_vit", 7)
    assert config["pretrained_cfg"]["license"] == "apache-2.0"
    assert not {"tag", "url", "hf_hub_id", "origin_url"} & config["pretrained_cfg"].keys()


def test_the_card(files):
    card = hub.ModelCard.load(files / "README.md")
    assert card.data.to_dict() | {"model-index": 0} == {
        "license": "apache-2.0",
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "ditac"],
        "model-index": 0,
    }
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found == {"Top-1 accuracy": 90.0, "Top-5 accuracy": 99.0}
    assert 'timm.create_model("hf-hub:me/tiny_ditac", pretrained=True)' in card.text
    assert "arXiv:2407.07564" in card.text
    assert "points of top-1 over" not in card.text


def test_the_card_says_how_the_result_comes_again(files):
    config = json.loads((files / "config.json").read_text())
    results = {**RESULTS, "precision": "amp bfloat16", "img_size": 48, "split": "test"}
    card = hub.model_card(REPO, config, results, license="mit", base="test_vit", base_results={**RESULTS, "top1": 89.5})
    flags = "--split test --img-size 48 --amp --amp-dtype bfloat16"
    assert f"python validate.py --model hf-hub:{REPO} --data-dir DIR {flags}" in card.text
    assert "+0.500 points of top-1 over `test_vit`" in card.text


def test_what_does_not_load_back_is_refused(model, tmp_path):
    folder = write(tiny(seed=1), tmp_path / "other")
    with pytest.raises(hub.HubError, match="loads back as another model"):
        hub.check_reload(model, folder, (3, 32, 32))


# --- Publishing -------------------------------------------------------------------------------------------------------


def test_publish_and_publish_again(server, files, model, tmp_path):
    address = publish(files)
    repository = server.repositories[REPO]
    assert published(server) == of(files)
    assert address == f"{server.url}/{REPO}/commit/{repository.branches['main']}"
    assert [commit.title for commit in repository.commits.values()] == ["initial commit", "a model"]
    assert not repository.private

    assert publish(files) == address  # nothing new: no commit
    assert len(repository.commits) == 2

    other = shutil.copytree(files, tmp_path / "with picture")
    (other / "activations.png").write_bytes(b"a picture")
    publish(other)
    assert published(server) == of(other)
    publish(files)  # what an earlier one left is gone, in the same commit
    assert published(server) == of(files)
    assert len(repository.commits) == 4
    assert_same(load(), model)


def test_a_private_one(server, files):
    publish(files, private=True)
    assert server.repositories[REPO].private
    server.create("me/public")
    with pytest.raises(hub.HubError, match="me/public is public already"):
        publish(files, repo_id="me/public", private=True)
    assert server.files("me/public").keys() == {".gitattributes"}


def test_a_branch_and_a_pinned_commit(server, files, model, tmp_path):
    publish(files)
    first = server.repositories[REPO].branches["main"]
    second = tiny(seed=1)
    publish(write(second, tmp_path / "second"), revision="better")
    assert published(server) == of(files)
    assert_same(load(), model)
    assert_same(load(f"{REPO}@better"), second)
    publish(tmp_path / "second")
    assert_same(load(), second)
    assert_same(load(f"{REPO}@{first}"), model)


def test_another_architecture_is_refused(server, files, tmp_path):
    publish(files)
    torch.manual_seed(0)
    plain = timm.create_model("test_resnet", num_classes=7)
    hub.save(plain, tmp_path / "plain", DATA, "mit")
    with pytest.raises(hub.HubError, match=r"holds ditac on test_vit and this is test_resnet.*--replace-architecture"):
        publish(tmp_path / "plain")
    assert published(server) == of(files)
    publish(tmp_path / "plain", replace_architecture=True)
    assert published(server) == of(tmp_path / "plain")  # README.md went with the model that it was of
    assert_same(load(), plain.eval())


def test_a_repository_of_something_else_is_refused(server, files):
    repository = server.create(REPO)
    repository.commit("main", "a tokenizer", {"config.json": b"{"})
    with pytest.raises(hub.HubError, match="holds no model of timm and this is ditac on test_vit"):
        publish(files)
    assert server.files(REPO) == {"config.json": b"{"}


def test_answers_that_are_no_json(server, files, no_waiting):
    """Of a proxy in between, say."""
    server.inject("POST", "/validate-yaml", times=1000, status=502, page=True)
    with pytest.raises(
        hub.HubError, match=r"the Hub's answer is no JSON, .*; nothing was published; me/tiny_ditac was"
    ):
        publish(files)
    assert published(server) == {}


def test_no_token(server, files, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(hub.HubError, match="there is no token for the Hub: run `hf auth login`, or set HF_TOKEN"):
        publish(files)
    assert not server.requests


@pytest.mark.parametrize(
    ("token", "repo_id", "sentence"),
    [
        ("hf_unknown", REPO, "the token that huggingface_hub found is not valid"),
        (READ_ONLY, REPO, "has no right to write to me/tiny_ditac"),
        (TOKEN, "somebody/model", "has no right to write to somebody/model"),
    ],
)
def test_no_right(server, files, monkeypatch, caplog, token, repo_id, sentence):
    monkeypatch.setenv("HF_TOKEN", token)
    with caplog.at_level(logging.DEBUG), pytest.raises(hub.HubError) as refused:
        publish(files, repo_id=repo_id)
    assert sentence in str(refused.value)
    assert str(refused.value).endswith("nothing was published")
    assert "\n" not in str(refused.value)
    assert not server.repositories
    assert token not in caplog.text + str(refused.value)


def test_somebody_else_commits_meanwhile(server, files, tmp_path):
    """Before the commit arrives, and after the head was read: theirs stays, ours is refused."""
    publish(files)
    repository = server.repositories[REPO]
    theirs = {**repository.at("main").files, "README.md": b"theirs"}
    server.inject("POST", "/commit/", before=lambda: repository.commit("main", "theirs", theirs))
    with pytest.raises(hub.HubError, match=r"somebody else has committed to me/tiny_ditac meanwhile.*\(412"):
        publish(write(tiny(seed=1), tmp_path / "second"))
    assert published(server) == {**of(files), "README.md": b"theirs"}
    server.inject("POST", "/commit/", status=409)
    with pytest.raises(hub.HubError, match=r"somebody else has committed .*\(409"):
        publish(tmp_path / "second")
    publish(tmp_path / "second")  # who has looked may
    assert published(server) == of(tmp_path / "second")


# The requests of a publication, in their order.
REQUESTS = {
    "head": ("GET", "/api/models/me/tiny_ditac$"),
    "create": ("POST", "/repos/create"),
    "card": ("POST", "/validate-yaml"),
    "modes": ("POST", "/preupload/"),
    "batch": ("POST", "/objects/batch"),
    "upload": ("PUT", "/storage/"),
    "verify": ("POST", "/lfs/verify"),
    "commit": ("POST", "/commit/"),
}


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("request_", REQUESTS)
def test_what_passes_is_tried_again(server, files, no_waiting, status, request_):
    server.inject(*REQUESTS[request_], times=2, status=status, headers={"Retry-After": "7"})
    publish(files)
    assert published(server) == of(files)
    assert len(server.repositories[REPO].commits) == 2
    assert len(no_waiting) >= 2
    assert all(7 <= wait <= 8 for wait in no_waiting)  # as long as asked for; the client adds a second


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_lost_answer(server, files, no_waiting, request_):
    """What was done is done once, though nobody heard of it."""
    server.inject(*REQUESTS[request_], lose=True)
    publish(files)
    assert published(server) == of(files)
    assert len(server.repositories[REPO].commits) == 2


def test_a_lost_answer_to_a_commit_that_deletes(server, files, no_waiting, tmp_path):
    other = shutil.copytree(files, tmp_path / "with summary")
    (other / "summary.csv").write_bytes(b"epoch")
    publish(other)
    server.inject("POST", "/commit/", lose=True)
    publish(files)
    assert published(server) == of(files)
    assert len(server.repositories[REPO].commits) == 3


@pytest.mark.parametrize("request_", ["upload", "commit", "modes"])
def test_an_upload_that_is_cut(server, files, no_waiting, request_):
    server.inject(*REQUESTS[request_], cut=100)
    publish(files)
    assert published(server) == of(files)


@pytest.mark.parametrize("request_", ["card", "modes", "batch", "upload", "verify", "commit"])
@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 403}, {"cut": 100}])
def test_what_does_not_pass_leaves_nothing(server, files, no_waiting, request_, fault, tmp_path):
    """Of an old publication all is there, of the new one nothing; and the next one works."""
    publish(files)
    second = write(tiny(seed=1), tmp_path / "second")
    broken = server.inject(*REQUESTS[request_], times=1000, **fault)
    with pytest.raises(hub.HubError) as refused:
        publish(second)
    assert "\n" not in str(refused.value)
    unknown = "cut" in fault and request_ not in ("upload", "verify")  # nobody can say, after a lost connection
    outcome = f"whether anything was published, {REPO} itself will show" if unknown else "nothing was published"
    assert str(refused.value).endswith(f"; {outcome}")
    expected = {503: "the Hub is busy", 403: "has no right to write"}.get(
        fault.get("status"), "the Hub was not reached"
    )
    assert expected in str(refused.value)
    assert published(server) == of(files)
    assert len(server.repositories[REPO].commits) == 2
    broken.times = 0
    publish(second)
    assert published(server) == of(second)


def test_a_new_repository_that_stays_empty_is_named(server, files, no_waiting):
    server.inject("PUT", "/storage/", times=1000, status=503)
    with pytest.raises(hub.HubError, match="nothing was published; me/tiny_ditac was made for it"):
        publish(files)
    assert published(server) == {}


def test_no_network(server, files, no_waiting):
    server.shutdown()
    server.server_close()
    with pytest.raises(hub.HubError, match=r"the Hub was not reached: .*; whether anything was published"):
        publish(files)


def test_a_wait_of_an_hour_is_not_waited(server, files, no_waiting):
    server.inject("GET", "/api/models/", status=429, headers={"Retry-After": "3600"})
    with pytest.raises(hub.HubError, match="the Hub is busy"):
        publish(files)
    assert not no_waiting


# --- Loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def there(server, files) -> HubServer:
    """The server, with the model on it."""
    publish(files)
    server.requests.clear()
    return server


def blobs() -> list[Path]:
    return [*Path(constants.HF_HUB_CACHE).glob("*/blobs/*")]


def test_without_a_network(there, model, tmp_path):
    """In a new process, by plain timm, from the cache that a load before has filled."""
    load()
    assert not there.leaked  # the storage has seen no token
    there.requests.clear()
    code = f"""
import timm
import ditac_timm
from ditac_timm.hub import weights_sha256
print(weights_sha256(timm.create_model("hf-hub:{REPO}", pretrained=True)))
"""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": constants.HF_HUB_CACHE}
    env = environment(there, tmp_path) | offline
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [hub.weights_sha256(model)]
    assert TOKEN not in run.stderr
    assert not there.requests


@pytest.mark.parametrize("name", ["mobilenetv3_ditac", "test_resnet_ditac", "test_resnet"])
def test_variants_bases_and_plain_models(server, tmp_path, name):
    torch.manual_seed(0)
    model = ditac_timm.create_model(name, num_classes=7).eval()
    hub.save(model, tmp_path / "model", DATA, "mit")
    publish(tmp_path / "model")
    assert_same(load(), model)
    assert_same(timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval(), model)


def test_another_head_keeps_the_activations(there, model):
    tuned = load(num_classes=3)
    assert tuned.num_classes == 3
    assert tuned.head.out_features == 3
    own, theirs = tuned.state_dict(), model.state_dict()
    kept = [name for name in own if not name.startswith("head.")]
    assert sum(name.endswith(".theta") for name in kept) == 6
    assert all(torch.equal(own[name], theirs[name]) for name in kept)


def test_a_download_that_is_cut_goes_on(there, model, no_waiting):
    there.inject("GET", "/storage/", times=2, cut=300_000)
    assert_same(load(), model)
    assert [request.split("/")[1] for request in there.requests].count("storage") == 3


@pytest.mark.parametrize(("method", "path"), [("GET", "/storage/"), ("GET", "config.json"), ("HEAD", "config.json")])
def test_a_download_that_fails_leaves_nothing(there, model, no_waiting, method, path):
    broken = there.inject(method, path, times=1000, **({"lose": True} if method == "GET" else {"status": 503}))
    with pytest.raises(Exception):  # noqa: B017, huggingface_hub's and its HTTP client's own
        load()
    assert not any(blob.name.endswith(".incomplete") for blob in blobs())
    broken.times = 0
    assert_same(load(), model)


@pytest.mark.parametrize("fault", [{"status": 429}, {"status": 503}])
def test_a_busy_hub(there, model, no_waiting, fault):
    there.inject("HEAD", "/resolve/", times=2, **fault)
    assert_same(load(), model)


@pytest.mark.parametrize(
    ("create", "path"),
    [  # and not timm's with config.json, which it reads before DiTAC is asked for
        (timm.create_model, "/storage/"),
        (ditac_timm.create_model, "/storage/"),
        (ditac_timm.create_model, "config.json"),
    ],
)
def test_damage_in_download_is_refused_and_not_kept(there, model, create, path):
    """Bytes that are others, as many as they were: huggingface_hub takes them."""
    there.inject("GET", path, damage=True)
    with pytest.raises(RuntimeError, match="of me/tiny_ditac was damaged in download, and is out of the cache"):
        create(f"hf-hub:{REPO}", pretrained=True)
    assert_same(load(), model)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("me/nothing", "Repository Not Found"),
        (f"{REPO}@nowhere", "Revision Not Found"),
        ("me/empty", "Entry Not Found"),
    ],
)
def test_what_is_not_there(there, model, name, sentence):
    there.create("me/empty")
    with pytest.raises(OSError, match=sentence):
        load(name)
    assert_same(load(), model)


THETA = "blocks.2.mlp.act.theta"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w.pop(THETA), "lacks theta of 1 of the model's 6 DiTAC activations"),
        (
            lambda w: [w.pop(key) for key in [*w] if key.endswith(".theta")],
            "lacks theta of 6 of the model's 6 DiTAC activations",
        ),
        (
            lambda w: w.update({THETA: torch.zeros(5)}),
            f"{THETA} has 5 numbers and the model's 9; it belongs to a model with another number of DiTAC cells",
        ),
    ],
)
@pytest.mark.parametrize("classes", [7, 3])  # with another head timm is not strict
def test_thetas_that_do_not_fit(files, tmp_path, change, sentence, classes):
    folder = shutil.copytree(files, tmp_path / "folder")
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(RuntimeError, match=sentence):
        timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=classes)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c["model_args"]["ditac"].update(cell=3), "takes version, cells and domain"),
        (lambda c: c["model_args"]["ditac"].update(version="relu"), "version must be one of"),
        (lambda c: c["model_args"].update(base="resnet19"), "base must be the name of a timm architecture"),
        (lambda c: c["model_args"].pop("base"), "needs a base"),
        (lambda c: c["model_args"].update(colour="red"), "unexpected keyword argument 'colour'"),
        (lambda c: c.update(architecture="ditac2"), "Unknown model"),
    ],
)
def test_settings_that_are_unknown(files, tmp_path, change, sentence):
    folder = shutil.copytree(files, tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    config["model_args"].setdefault("ditac", {})
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((TypeError, ValueError, RuntimeError), match=sentence) as refused:
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert "\n" not in str(refused.value)


def test_the_server_refuses_what_the_hub_would(server, files, tmp_path):
    """A card that is no YAML, and content that is not of its name."""
    broken = shutil.copytree(files, tmp_path / "broken")
    (broken / "README.md").write_text("---\nmodel-index: [\n---\n")
    with pytest.raises(hub.HubError, match=r"Invalid metadata in README.md. - .*; nothing was published"):
        publish(broken)
    assert published(server) == {}
    assert yaml.safe_load((files / "README.md").read_text().split("---")[1])["model-index"]
