"""Pretrained weights carry over: timm's own of the base, from the base's repository on a Hub on the loopback interface.

The weights served are random, as large as real ones, and none that an initialisation would give.
"""

import functools
import hashlib
import shlex
import shutil

import pytest
import safetensors.torch
import timm
import torch
from hub_server import HubServer, Large
from huggingface_hub import constants
from timm.models import resolve_model_input_args
from torch import nn
from training.script_runs import load_script, write_digits

import ditac_timm
from ditac_timm import DiTAC
from ditac_timm.ditac_zoo import _VARIANTS as VARIANTS

SMALL = "mobilenetv3_small_100.lamb_in1k"


@pytest.fixture(autouse=True)
def no_cache_is_kept(tmp_path):
    """Which would be a gigabyte of all tests together."""
    yield
    shutil.rmtree(tmp_path / "hub_cache", ignore_errors=True)


@functools.lru_cache(maxsize=2)
def weights(base: str) -> bytes:
    """A `model.safetensors` of a tag of timm's."""
    torch.manual_seed(0)
    model = timm.create_model(base)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("gamma"):  # of layer scale, which begins at 1e-6 and hides what is in the layer
                tensor.uniform_(0.1, 0.5, generator=generator)
            elif tensor.ndim == 1:
                tensor.mul_(torch.rand(tensor.shape, generator=generator).mul_(0.2).add_(0.9))
                tensor.add_(torch.rand(tensor.shape, generator=generator).mul_(0.1))
    return safetensors.torch.save(model.state_dict(), {"format": "pt"})


def serve(server: HubServer, base: str) -> dict[str, torch.Tensor]:
    """Put the repository of a tag's weights there, and return them."""
    repo_id, content = timm.get_pretrained_cfg(base).hf_hub_id, weights(base)
    assert repo_id == f"timm/{base}"
    oid = hashlib.sha256(content).hexdigest()
    server.objects[oid] = content
    server.create(repo_id).commit("main", "weights", {"model.safetensors": Large(oid, len(content))})
    return safetensors.torch.load(content)


def fetched(server: HubServer) -> set[str]:
    """The files that were asked for, of any repository, and those of the storage."""
    paths = (request.split()[1].strip("/") for request in server.requests)
    return {path for path in paths if "/resolve/" in path or path.startswith("storage/")}


def only_of(base: str) -> set[str]:
    return {f"timm/{base}/resolve/main/model.safetensors", f"storage/{hashlib.sha256(weights(base)).hexdigest()}"}


def assert_weights(model: nn.Module, expected: dict[str, torch.Tensor], but: tuple[str, ...] = ()) -> None:
    """Tensor by tensor, and theta as initialised; `but` are prefixes of what is the model's own."""
    own = model.state_dict()
    thetas = {f"{path}.theta" for path, module in model.named_modules() if isinstance(module, DiTAC)}
    assert thetas
    assert own.keys() - thetas == expected.keys()
    for name, value in expected.items():
        assert name.startswith(but) or torch.equal(own[name], value), name


def assert_same_function(model, base, x: torch.Tensor) -> None:
    with torch.no_grad():
        ours, theirs = model.eval()(x), base.eval()(x)
    for mine, its in zip(*((o,) if torch.is_tensor(o) else o for o in (ours, theirs)), strict=True):
        assert (mine - its).abs().max() <= 1e-5 * its.abs().max()


# --- The registry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_has_the_tags_of_its_base(variant):
    base = VARIANTS[variant][0]
    tags = [name.partition(".")[2] for name in timm.list_pretrained(base)]
    assert tags
    assert timm.list_pretrained(f"{variant}*") == [f"{variant}.{tag}" for tag in tags]
    assert timm.list_models(variant, pretrained=True) == timm.list_pretrained(variant)
    for tag in ("", *(f".{tag}" for tag in tags)):
        cfg, of_base = timm.get_pretrained_cfg(variant + tag), timm.get_pretrained_cfg(base + tag)
        assert timm.is_model_pretrained(variant + tag)
        assert cfg.architecture == variant
        assert cfg.to_dict() | {"architecture": base} == of_base.to_dict()
        assert cfg.hf_hub_id == f"timm/{base}.{cfg.tag}"


def test_no_name_of_ours_is_a_repositorys():
    ours = [name for name in timm.list_pretrained() if "_ditac" in name or name.startswith("ditac")]
    assert len(ours) == 45
    assert not any("ditac" in timm.get_pretrained_cfg(name).hf_hub_id for name in ours)
    assert not timm.is_model_pretrained("ditac")


@pytest.mark.parametrize(
    "create",
    [
        lambda tag: timm.get_pretrained_cfg(f"mobilenetv3_ditac.{tag}"),
        lambda tag: timm.create_model(f"mobilenetv3_ditac.{tag}", pretrained=True),
        lambda tag: timm.create_model("ditac", base=f"mobilenetv3_small_100.{tag}", pretrained=True),
        lambda tag: ditac_timm.create_model(f"mobilenetv3_small_100_ditac.{tag}", pretrained=True),
    ],
)
def test_a_wrong_tag(server, create):
    with pytest.raises(RuntimeError, match=r"^Invalid pretrained tag \(no_such\) for mobilenetv3_\w+\.$"):
        create("no_such")
    assert not fetched(server)


# --- Every way to load ------------------------------------------------------------------------------------------------


def by_scripts(name, **kwargs):
    """As timm's own scripts do."""
    return timm.create_model(**resolve_model_input_args(name, **kwargs), pretrained=True)


@pytest.mark.parametrize(
    ("create", "architecture"),
    [
        (lambda: timm.create_model("mobilenetv3_ditac", pretrained=True), "mobilenetv3_ditac"),
        (lambda: timm.create_model("mobilenetv3_ditac.lamb_in1k", pretrained=True), "mobilenetv3_ditac"),
        (lambda: ditac_timm.create_model("mobilenetv3_ditac.lamb_in1k", pretrained=True), "mobilenetv3_ditac"),
        (lambda: timm.create_model("ditac", base="mobilenetv3_small_100", pretrained=True), "ditac"),
        (lambda: timm.create_model("ditac", base=SMALL, pretrained=True), "ditac"),
        (lambda: timm.create_model("ditac.lamb_in1k", base="mobilenetv3_small_100", pretrained=True), "ditac"),
        (lambda: ditac_timm.create_model("mobilenetv3_small_100_ditac", pretrained=True), "ditac"),
        (lambda: ditac_timm.create_model("mobilenetv3_small_100_ditac.lamb_in1k", pretrained=True), "ditac"),
        (lambda: by_scripts("mobilenetv3_ditac"), "mobilenetv3_ditac"),
        (lambda: by_scripts("ditac", base=SMALL), "ditac"),
    ],
)
def test_every_way(server, create, architecture):
    expected = serve(server, SMALL)
    model = create()
    assert_weights(model, expected)
    assert fetched(server) == only_of(SMALL)
    of_base = timm.create_model(SMALL).pretrained_cfg
    assert model.pretrained_cfg == model.default_cfg == of_base | {"architecture": architecture}
    initial = timm.create_model(architecture, **({"base": SMALL} if architecture == "ditac" else {})).state_dict()
    own = model.state_dict()
    assert all(torch.equal(own[name], initial[name]) for name in own if name.endswith(".theta"))


@pytest.mark.parametrize(
    ("name", "base", "size"),
    [
        ("convnext_tiny_ditac.fb_in1k", "convnext_tiny.fb_in1k", 64),
        ("convnext_atto_ditac.d2_in1k", "convnext_atto.d2_in1k", 96),
        ("vit_tiny_patch16_224_ditac", "vit_tiny_patch16_224.augreg_in21k_ft_in1k", 224),
        ("swin_tiny_ditac", "swin_tiny_patch4_window7_224.ms_in1k", 224),
    ],
)
def test_a_gelu_base_goes_on_computing_the_same(server, name, base, size):
    expected = serve(server, base)
    model = ditac_timm.create_model(name, pretrained=True)
    assert_weights(model, expected)
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    assert_same_function(model, timm.create_model(base, pretrained=True), x)
    assert fetched(server) == only_of(base)


@pytest.mark.parametrize(
    ("name", "base"), [("resnet50_ditac.a1_in1k", "resnet50.a1_in1k"), ("resnet18_ditac", "resnet18.a1_in1k")]
)
def test_a_relu_base_gives_all_its_weights(server, name, base):
    expected = serve(server, base)
    assert_weights(ditac_timm.create_model(name, pretrained=True), expected)
    assert fetched(server) == only_of(base)


# --- Adapted, as the base is ------------------------------------------------------------------------------------------


def pair(server, base, **kwargs):
    """The DiTAC model and timm's, from the same weights and with the same arguments."""
    expected = serve(server, base)
    return expected, *(
        create(name, pretrained=True, **kwargs)
        for create, name in (
            (ditac_timm.create_model, base.replace(".", "_ditac.")),
            (timm.create_model, base),
        )
    )


@pytest.mark.parametrize("base", ["convnext_atto.d2_in1k", "resnet18.a1_in1k", "vit_tiny_patch16_224.augreg_in21k"])
def test_fine_tuning_has_a_new_head_only(server, base):
    expected, ours, timms = pair(server, base, num_classes=5)
    head = timms.pretrained_cfg["classifier"]
    assert ours.get_classifier().out_features == ours.num_classes == 5
    own = {name: value for name, value in expected.items() if not name.startswith(f"{head}.")}
    new = {f"{head}.{name}": value for name, value in ours.get_classifier().state_dict().items()}
    assert_weights(ours, own | new)
    assert not torch.equal(new[f"{head}.weight"], expected[f"{head}.weight"][:5])


def test_weights_with_other_heads(server):
    """Of 21,843 classes, and of none."""
    _, ours, timms = pair(server, "vit_tiny_patch16_224.augreg_in21k")
    assert ours.num_classes == 21843
    assert_same_function(ours, timms, torch.randn(1, 3, 224, 224))
    _, ours, timms = pair(server, "convnext_tiny.dinov3_lvd1689m")
    assert ours.num_classes == 0
    assert_same_function(ours, timms, torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("base", ["convnext_atto.d2_in1k", "resnet18.a1_in1k"])
def test_other_channels(server, base):
    _, ours, timms = pair(server, base, in_chans=1)
    assert_weights(ours, timms.state_dict())
    if base.startswith("convnext"):
        assert_same_function(ours, timms, torch.randn(1, 1, 64, 64))


def test_features(server):
    _, ours, timms = pair(server, "convnext_atto.d2_in1k", features_only=True, out_indices=(1, 3))
    assert_weights(ours, timms.state_dict())
    assert_same_function(ours, timms, torch.randn(1, 3, 64, 64))
    assert ours.pretrained_cfg["hf_hub_id"] == "timm/convnext_atto.d2_in1k"


def test_features_of_a_variant(server):
    """MobileNetV3 names its stem's activation otherwise there."""
    serve(server, SMALL)
    ours = timm.create_model("mobilenetv3_ditac", pretrained=True, features_only=True)
    assert_weights(ours, timm.create_model(SMALL, pretrained=True, features_only=True).state_dict())


# --- What goes wrong --------------------------------------------------------------------------------------------------


def test_a_missing_repository(server):
    with pytest.raises(Exception, match=f"Repository Not Found for url: .*/timm/{SMALL}/"):
        timm.create_model("mobilenetv3_ditac", pretrained=True)


def test_damage_in_download_is_refused_and_not_kept(server):
    expected = serve(server, SMALL)
    server.inject("GET", "/storage/", damage=True)
    with pytest.raises(
        RuntimeError, match=f"^model.safetensors of timm/{SMALL} was damaged in download, and is out of"
    ):
        timm.create_model("mobilenetv3_ditac", pretrained=True)
    assert_weights(timm.create_model("mobilenetv3_ditac", pretrained=True), expected)


def test_without_a_network(server, monkeypatch):
    """With nothing in the cache an error of one line; else the weights in it."""
    expected = serve(server, SMALL)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="cannot find the requested files in the local cache") as error:
        timm.create_model("mobilenetv3_ditac", pretrained=True)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    timm.create_model("mobilenetv3_ditac", pretrained=True)
    server.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_weights(timm.create_model("mobilenetv3_ditac", pretrained=True), expected)
    assert not server.requests


# --- train.py ---------------------------------------------------------------------------------------------------------

FLAGS = "--num-classes 10 --img-size 32 -b 60 -j 0 --epochs 1 --warmup-epochs 0 --sched none --device cpu"


@pytest.fixture(scope="module")
def train():
    return load_script("train")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"), train=6, validation=1)


def arguments(digits, output, flags):
    return [*shlex.split(flags), *FLAGS.split(), *f"--data-dir {digits} --output {output} --experiment run".split()]


@pytest.mark.parametrize("path", [False, True])
def test_training_starts_from_them(server, train, digits, tmp_path, path):
    """A run whose learning rate moves nothing ends with the base's weights under a new head."""
    flags = "--model mobilenetv3_ditac.lamb_in1k --pretrained --lr 1e-30 --bn-momentum 0"
    if path:
        file = tmp_path / "base.safetensors"
        file.write_bytes(weights(SMALL))
        flags += f" --pretrained-path {file}"
    expected = serve(server, SMALL)
    assert train.main(arguments(digits, tmp_path, flags)) == 0
    assert fetched(server) == (set() if path else only_of(SMALL))
    ended = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=True)["state_dict"]
    assert ended["classifier.weight"].shape[0] == 10
    assert all(
        torch.equal(ended[name], value)
        for name, value in expected.items()
        if not name.startswith("classifier.") and not name.endswith("num_batches_tracked")
    )
    initial = timm.create_model("mobilenetv3_ditac").state_dict()
    thetas = [name for name in ended if name.endswith(".theta")]
    assert len(thetas) == 19
    assert all(torch.equal(ended[name], initial[name]) for name in thetas)


def test_a_variant_for_fine_tuning(server, train, digits, tmp_path):
    expected = serve(server, "convnext_tiny.in12k_ft_in1k")  # timm's default
    flags = "--model convnext_tiny_ditac --pretrained --ditac-lr-scale 0.1"
    model, _ = train.create_model(train.parse_train_flags(arguments(digits, tmp_path, flags)), {})
    head = {f"head.fc.{name}": value for name, value in model.head.fc.state_dict().items()}
    assert head["head.fc.weight"].shape[0] == 10
    assert_weights(model, expected | head)
    assert fetched(server) == only_of("convnext_tiny.in12k_ft_in1k")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("mobilenetv3_ditac.lamb", "--model mobilenetv3_ditac.lamb: mobilenetv3_ditac has no weights 'lamb' (did you"),
        ("resnet18_ditac.nope", "--model resnet18_ditac.nope: resnet18 has no weights 'nope'"),
        ("mobilenetv3_ditac", "--model mobilenetv3_ditac --num-classes 10 --pretrained cannot be created: Repository"),
        ("test_vit2_ditac.r160_in1k", "without a network"),
    ],
)
def test_refusals(server, train, digits, tmp_path, capsys, monkeypatch, name, sentence):
    if sentence == "without a network":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        sentence = "cannot be created: An error happened while trying to locate the file on the Hub"
    assert train.main(arguments(digits, tmp_path, f"--model {name} --pretrained")) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("train.py: error: --model ")
    assert "\n" not in said
    assert sentence in said
