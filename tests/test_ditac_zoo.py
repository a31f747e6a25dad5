"""The registered architectures: what timm does with its own models, done with ours, and compared with the base's."""

import copy
import functools
import io
import json
import logging
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import timm.models.nasnet
import torch
from safetensors.torch import load_file, save_file
from test_sweep import ONE_OF_EACH, input_size, shapes
from timm.models import build_model_with_cfg, create_feature_extractor, group_parameters, save_for_hf
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import nn

import ditac_timm
from ditac_timm import DiTAC
from ditac_timm.ditac_zoo import _VARIANTS as VARIANTS

ROOT = Path(__file__).parents[1]
TWINS = ("test_resnet", "test_vit2", "caformer_s18", "mobilevitv2_050", "test_efficientnet")
SMALL = {"test_vit2": 160}  # fixed input sizes; 64 elsewhere


def twin(base, **kwargs):
    return timm.create_model("ditac", base=base, **kwargs)


def build(name, **kwargs):
    """A named variant, or the twin of a base."""
    return timm.create_model(name, **kwargs) if name in VARIANTS else twin(name, **kwargs)


def on_meta(function, *args, **kwargs):
    with torch.device("meta"):
        return function(*args, **kwargs)


def thetas(model):
    return {name: value for name, value in model.state_dict().items() if name.endswith(".theta")}


def image(name, batch=2, channels=3, device="cpu"):
    size = SMALL.get(name, 224 if "swin" in name else 64)
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(0)).to(device)


def scramble(model, seed=0):
    """Weights and thetas that no initialisation would give."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".theta"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            elif parameter.ndim == 1:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


# --- Names and numbers ------------------------------------------------------------------------------------------------


def test_timms_list_grows_by_seven_names():
    names = timm.list_models(module="ditac_zoo")
    assert sorted(names) == sorted(["ditac", *VARIANTS])
    assert sorted(VARIANTS) == [
        "convnext_small_ditac",
        "convnext_tiny_ditac",
        "mobilenetv3_ditac",
        "mobilenetv3_large_ditac",
        "resnet50_ditac",
        "swin_tiny_ditac",
    ]
    code = (
        "import timm; before = {*timm.list_models()}; import ditac_timm; print(*sorted({*timm.list_models()} - before))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.split() == sorted(names)


@pytest.mark.parametrize(
    ("name", "base", "parameters", "activations"),
    [
        ("mobilenetv3_ditac", "mobilenetv3_small_100", 1_569_106, 19),
        ("mobilenetv3_large_ditac", "mobilenetv3_large_100", None, 21),
        ("convnext_small_ditac", "convnext_small", 49_493_138, 36),
        ("convnext_tiny_ditac", "convnext_tiny", None, 18),
        ("resnet50_ditac", "resnet50", None, 49),
        ("swin_tiny_ditac", "swin_tiny_patch4_window7_224", None, 12),
    ],
)
def test_parameters_with_50_classes(name, base, parameters, activations):
    def count(model):
        return sum(parameter.numel() for parameter in model.parameters())

    of_base = count(on_meta(timm.create_model, base, num_classes=50))
    assert parameters in (of_base, None)
    model = on_meta(timm.create_model, name, num_classes=50)
    assert count(model) == of_base + 9 * activations
    assert len(thetas(model)) == activations


def test_mobilenetv3_keeps_its_relus():
    assert set(on_meta(timm.create_model, "mobilenetv3_ditac").ditac_report.replaced.values()) == {"Hardswish"}
    whole = on_meta(ditac_timm.create_model, "mobilenetv3_small_100_ditac")
    assert set(whole.ditac_report.replaced.values()) == {"Hardswish", "ReLU"}


@pytest.mark.parametrize(
    ("name", "base", "tag"),
    [
        ("resnet18_ditac", "resnet18", "a1_in1k"),
        ("resnet18_ditac.fb_swsl_ig1b_ft_in1k", "resnet18", "fb_swsl_ig1b_ft_in1k"),
        ("mobilenetv3_small_100_ditac", "mobilenetv3_small_100", "lamb_in1k"),
    ],
)
def test_create_model_takes_any_name_with_ditac_behind_it(name, base, tag):
    model = on_meta(ditac_timm.create_model, name, num_classes=3)
    assert type(model).__name__ == type(on_meta(timm.create_model, base)).__name__
    assert (model.pretrained_cfg["architecture"], model.pretrained_cfg["tag"]) == ("ditac", tag)
    assert model.num_classes == 3
    assert thetas(model)


def test_create_model_takes_timms_names():
    assert not thetas(on_meta(ditac_timm.create_model, "resnet18"))
    variant = on_meta(ditac_timm.create_model, "resnet50_ditac")
    assert variant.pretrained_cfg["architecture"] == "resnet50_ditac"


def test_base_and_variant_take_a_tag():
    model = on_meta(twin, "convnext_small.fb_in22k")
    assert model.pretrained_cfg["tag"] == "fb_in22k"
    assert model.num_classes == 21841
    assert on_meta(timm.create_model, "convnext_small_ditac.fb_in22k").num_classes == 21841


def test_arguments_of_the_surgery():
    arguments = {"roles": ["main", "se"], "version": "inf", "cells": 6, "init": "identity"}
    model = twin("test_efficientnet", ditac=arguments)
    acts = [module for module in model.modules() if isinstance(module, DiTAC)]
    assert all((act.version, act.cells) == ("inf", 6) and not act.theta.any() for act in acts)
    assert set(model.ditac_report.roles.values()) == {"main", "se"}
    variant = on_meta(timm.create_model, "mobilenetv3_ditac", ditac={"version": "ge"})
    assert variant.ditac_report.settings["version"] == "ge"
    assert set(variant.ditac_report.replaced.values()) == {"Hardswish"}


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: timm.create_model("ditac"), ValueError, 'needs a base, as in timm.create_model\\("ditac", base='),
        (lambda: twin("resnet19"), RuntimeError, "base must be the name of a timm architecture, but is 'resnet19'"),
        (lambda: twin("ditac"), RuntimeError, "base must be a timm architecture without DiTAC, but is 'ditac'"),
        (lambda: twin("resnet50_ditac"), RuntimeError, "without DiTAC, but is 'resnet50_ditac'"),
        (lambda: twin("resnet18.no_such_tag"), RuntimeError, "no_such_tag"),
        (lambda: twin("resnetv2_50d_evos"), ValueError, "No activation of ResNetV2 matched"),
        (lambda: twin("resnet18", ditac={"version": "relu"}), ValueError, "version must be one of"),
        (lambda: twin("resnet18", ditac={"cell": 3}), TypeError, "takes version, cells and domain"),
        (lambda: ditac_timm.create_model("resnet19_ditac"), RuntimeError, "resnet19"),
        (lambda: ditac_timm.create_model("ditac_ditac"), RuntimeError, "without DiTAC"),
        (lambda: ditac_timm.create_model("resnet50_ditac_ditac"), RuntimeError, "without DiTAC"),
    ],
)
def test_errors(build, error, message):
    with pytest.raises(error, match=message) as raised:
        on_meta(build)
    assert "\n" not in str(raised.value)
    assert timm.models.resnet.build_model_with_cfg is build_model_with_cfg


# --- One twin of each of timm's modules, on the meta device -----------------------------------------------------------


# The cheapest and the oddest run in `make test`, the others in `make sweep`.
QUICK = {
    "caformer_s18", "coat_lite_tiny", "coatnet_pico_rw_224", "convmixer_1024_20_ks9_p14", "cpubone_nano",
    "cs3darknet_s", "cspnext_tiny", "dla46_c", "dpn48b", "efficientformer_l1", "efficientvim_m1", "efficientvit_b0",
    "ese_vovnet19b_slim", "fasternet_t0", "ghostnet_050", "gmlp_ti16_224", "halonet26t", "hiera_tiny_224",
    "lcnet_035", "lcnetv2_small", "legacy_seresnet18", "legacy_xception", "levit_128s", "mobilevitv2_050",
    "pit_ti_224", "regnety_004", "resnest14d", "resnetv2_18", "skresnet18", "test_byobnet", "test_convnext3",
    "test_efficientnet", "test_nfnet", "test_resnet", "test_vit2", "vgg11_bn", "visformer_tiny",
}  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(base, marks=() if base in QUICK else pytest.mark.sweep, id=base) for base in ONE_OF_EACH.values()
    ],
)
def pair(request):
    """The name of an architecture, and it and its twin with 7 classes and 4 channels."""
    base = request.param
    arguments = {"num_classes": 7, "in_chans": 3 if base == "csatv2" else 4}  # its forward knows RGB only
    return base, *(on_meta(create, base, **arguments) for create in (timm.create_model, twin))


def tensors(output):
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in tensors(value)]


def test_classes_channels_and_backward(pair):
    base, timms, ours = pair
    outputs = ours(torch.empty(2, 3 if base == "csatv2" else 4, *input_size(ours)[1:], device="meta"))
    assert ours.num_classes == timms.num_classes == (0 if base == "gemma4_vit_167m_enc" else 7)
    assert base == "gemma4_vit_167m_enc" or tensors(outputs)[0].shape[-1] == 7
    sum(tensor.sum() for tensor in tensors(outputs)).backward()
    assert any(parameter.grad is not None for name, parameter in ours.named_parameters() if name.endswith(".theta"))


def test_weight_decay_leaves_theta_alone(pair):
    _, _, ours = pair
    groups = param_groups_weight_decay(ours, weight_decay=0.1)
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    assert decayed
    assert not any(id(parameter) in decayed for name, parameter in ours.named_parameters() if name.endswith(".theta"))


def test_layer_decay_keeps_the_bases_groups(pair):
    """No base parameter changes its group, and theta is in one of the groups of the innermost module around it."""
    _, timms, ours = pair
    assert hasattr(ours, "group_matcher") == hasattr(timms, "group_matcher")
    if not hasattr(timms, "group_matcher"):
        return
    of_base, of_twin = (group_of_each(model) for model in (timms, ours))
    assert of_base.items() <= of_twin.items()
    inner = {name: group for name, group in of_twin.items() if name not in of_base}
    assert inner.keys() == thetas(ours).keys()
    for name, group in inner.items():
        prefix, around = name, set()
        while not around:
            prefix = prefix.rpartition(".")[0]
            around = {of_base[other] for other in of_base if other.startswith(prefix and f"{prefix}.")}
        assert group in around, f"{name} is in group {group}, but around it are {around}"


def test_features_are_the_bases(pair):
    """Of the same number, channels and shapes; every base gives features."""
    base, timms, _ = pair
    expected, features = (on_meta(create, base, features_only=True).eval() for create in (timm.create_model, twin))
    assert features.feature_info.channels() == expected.feature_info.channels()
    assert features.feature_info.reduction() == expected.feature_info.reduction()
    if base != "gemma4_vit_167m_enc":  # reads values, which meta tensors don't have
        x = torch.empty(2, 3, *input_size(timms)[1:], device="meta")
        with torch.no_grad():
            assert shapes(features(x)) == shapes(expected(x))


# --- Layer decay ------------------------------------------------------------------------------------------------------


def group_of_each(model) -> dict[str, int]:
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    return dict(groups)


@pytest.mark.parametrize(
    ("base", "theta", "beside"),
    [
        ("test_resnet", "act1.theta", "conv1.0.weight"),
        ("resnet18", "act1.theta", "conv1.weight"),
        ("resnet18", "layer3.1.act2.theta", "layer3.1.conv2.weight"),
        ("res2net50_48w_2s", "act1.theta", "conv1.weight"),
        ("resnest14d", "act1.theta", "conv1.0.weight"),
        ("skresnet18", "act1.theta", "conv1.weight"),
        ("hrnet_w18_small", "act1.theta", "conv1.weight"),
        ("hrnet_w18_small", "act2.theta", "conv2.weight"),
        ("ghostnet_050", "act1.theta", "conv_stem.weight"),
        ("repghostnet_058", "act1.theta", "conv_stem.weight"),
        ("vgg11", "features.1.theta", "features.0.weight"),
        ("mobilenetv3_small_100", "bn1.act.theta", "conv_stem.weight"),
        ("mobilenetv3_small_100", "act2.theta", "conv_head.weight"),
        ("convnext_atto", "stages.2.blocks.1.mlp.act.theta", "stages.2.blocks.1.mlp.fc1.weight"),
        ("test_vit2", "blocks.3.mlp.act.theta", "blocks.3.mlp.fc1.weight"),
    ],
)
def test_theta_is_in_the_group_of_its_neighbour(base, theta, beside):
    groups = group_of_each(on_meta(twin, base))
    assert groups[theta] == groups[beside]


def test_optimizers_of_timm():
    model = twin("test_vit2")
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.5)
    by_id = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    assert len(by_id) == len([*model.parameters()])
    blocks = [by_id[id(block.mlp.act.theta)] for block in model.blocks]
    assert all(group["weight_decay"] == 0 for group in blocks)
    scales = [group["lr_scale"] for group in blocks]
    assert scales == [by_id[id(block.mlp.fc1.bias)]["lr_scale"] for block in model.blocks]
    assert scales == sorted(set(scales))


# --- Training and saving ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mobilenetv3_ditac", "resnet50_ditac", "swin_tiny_ditac", *TWINS])
def test_every_theta_learns(name):
    torch.manual_seed(0)
    model = scramble(build(name, num_classes=7)).train()  # some bases begin with a branch that is zero
    model(image(name)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert all(p.grad.any() for key, p in model.named_parameters() if key.endswith(".theta"))


def save(model, folder, base=None, ditac=None, **kwargs):
    model_args = {"base": base, "ditac": ditac} if base else None
    save_for_hf(model, folder, model_args=model_args, safe_serialization=True, **kwargs)
    return f"local-dir:{folder}"


@pytest.mark.parametrize("name", [*VARIANTS, *TWINS])
def test_saves_and_reloads_bit_equal(name, tmp_path):
    model = scramble(build(name, num_classes=7))
    saved = save(model, tmp_path, *(() if name in VARIANTS else (name, {"cells": 10})))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == (name if name in VARIANTS else "ditac")
    reloaded = timm.create_model(saved, pretrained=True).eval()
    assert reloaded.num_classes == 7
    assert_same_weights(model, reloaded)
    if "small" not in name:  # enough of them
        x = image(name, batch=1)
        with torch.no_grad():
            assert torch.equal(model(x), reloaded(x))


def test_saves_its_surgery(tmp_path):
    arguments = {"version": "inf", "cells": 6, "roles": ["main", "se"]}
    model = scramble(twin("test_efficientnet", ditac=arguments, num_classes=7))
    reloaded = timm.create_model(save(model, tmp_path, "test_efficientnet", arguments), pretrained=True).eval()
    assert reloaded.ditac_report.settings == model.ditac_report.settings
    x = image("test_efficientnet")
    with torch.no_grad():
        assert torch.equal(model(x), reloaded(x))


def test_reloads_in_another_process_with_features(tmp_path):
    model = scramble(twin("test_resnet", num_classes=7))
    saved, x = save(model, tmp_path, "test_resnet"), image("test_resnet")
    with torch.no_grad():
        torch.save((x, model(x)), tmp_path / "expected.pt")
    code = f"""
import timm, ditac_timm, torch
x, expected = torch.load({str(tmp_path / "expected.pt")!r})
with torch.no_grad():
    assert torch.equal(timm.create_model({saved!r}, pretrained=True).eval()(x), expected)
    print(len(timm.create_model({saved!r}, pretrained=True, features_only=True)(x)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "5\n"


@pytest.mark.parametrize("name", VARIANTS)
def test_reloads_as_features(name, tmp_path):
    """Every theta that the features hold, also where timm's feature model names the stem otherwise."""
    model = scramble(build(name, num_classes=7))
    features = timm.create_model(save(model, tmp_path), pretrained=True, features_only=True).eval()
    saved = {key.replace(".", "_"): theta for key, theta in thetas(model).items()}  # stages_0... for stages.0...
    saved["act1_theta"] = saved.get("act1_theta", saved.get("bn1_act_theta"))
    found = thetas(features)
    assert found
    for key, theta in found.items():
        assert torch.equal(theta, saved[key.replace(".", "_")]), key
    x = image(name, batch=1)
    with torch.no_grad():
        ours, expected = features(x)[-2:], model.forward_intermediates(x, intermediates_only=True)[-2:]
    if "swin" in name:  # channels last, in timm too
        expected = [feature.permute(0, 2, 3, 1) for feature in expected]
    assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))


@pytest.mark.parametrize("name", ["test_resnet", "mobilevitv2_050", "caformer_s18", "mobilenetv3_ditac"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies(name, way):
    model = scramble(build(name, num_classes=7))
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(model)
    assert_same_weights(model, other)
    x = image(name, batch=1)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
    other.reset_classifier(3)
    assert other(x).shape == (1, 3)


def test_ema():
    model = twin("test_resnet", num_classes=7)
    ema = ModelEmaV3(model, decay=0.5)
    start = {name: theta.clone() for name, theta in thetas(model).items()}
    scramble(model)
    ema.update(model, step=1)
    for name, theta in thetas(ema.module).items():
        assert not torch.equal(theta, start[name])


# --- Weights ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def logs(caplog):
    caplog.set_level(logging.INFO, logger="ditac_timm")
    return caplog


def our_lines(logs):
    return [record.getMessage() for record in logs.records if record.name.startswith("ditac_timm")]


@pytest.mark.parametrize("way", ["pretrained", "checkpoint_path", "load_state_dict"])
@pytest.mark.parametrize(
    ("base", "kwargs"),
    [("test_resnet", {}), ("caformer_s18", {}), ("test_efficientnet", {"act_layer": "prelu"}), ("mobilevitv2_050", {})],
)
def test_base_weights_load(base, kwargs, way, tmp_path, logs):
    """Thetas stay as initialised, one line says so; weights of the old activations are no error."""
    timms = scramble(timm.create_model(base, num_classes=7, **kwargs))
    save_for_hf(timms, tmp_path, safe_serialization=True)
    initial = thetas(twin(base, num_classes=7, **kwargs))
    create = functools.partial(twin, base, num_classes=7, **kwargs)
    file = f"{tmp_path}/model.safetensors"
    if way == "pretrained":
        model = create(pretrained=True, pretrained_cfg_overlay={"file": file, "num_classes": 7})
    elif way == "checkpoint_path":
        model = create(checkpoint_path=file)
    else:
        model = create()
        model.load_state_dict(timms.state_dict())
    assert our_lines(logs) == [f"The checkpoint has no thetas: {len(initial)} DiTAC activations stay as initialised."]
    assert all(torch.equal(theta, initial[name]) for name, theta in thetas(model).items())
    kept = {name: value for name, value in model.state_dict().items() if name not in initial}
    assert all(torch.equal(value, timms.state_dict()[name]) for name, value in kept.items())
    assert (kept.keys() < timms.state_dict().keys()) == (base == "caformer_s18" or bool(kwargs))


def test_base_weights_change_nothing_in_a_gelu_model(tmp_path):
    timms = scramble(timm.create_model("test_vit2", num_classes=7))
    model = twin("test_vit2", num_classes=7).eval()
    model.load_state_dict(timms.state_dict())
    x = image("test_vit2")
    with torch.no_grad():
        torch.testing.assert_close(model(x), timms(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_classes", [7, 5])
@pytest.mark.parametrize("fault", ["missing", "all but one missing", "misshapen", "other cells"])
@pytest.mark.parametrize("way", ["local-dir", "overlay", "checkpoint_path", "load_state_dict"])
def test_faulty_thetas_are_an_error(way, fault, num_classes, tmp_path):
    """Also where timm loads non-strictly, for a head of another size."""
    model = twin("test_resnet", num_classes=7)
    saved, file = save(model, tmp_path, "test_resnet"), tmp_path / "model.safetensors"
    state = load_file(file)
    names = [*thetas(model)]
    if fault == "missing":
        del state[names[3]]
    elif fault == "all but one missing":
        for name in names[1:]:
            del state[name]
    elif fault == "misshapen":
        state[names[3]] = torch.zeros(5)
    else:
        state |= {name: torch.zeros(5) for name in names}
    save_file(state, file, {"format": "pt"})
    if num_classes == 5 and way in ("checkpoint_path", "load_state_dict"):
        state = {name: value for name, value in state.items() if not name.startswith("fc.")}
        save_file(state, file, {"format": "pt"})
    with pytest.raises(RuntimeError, match=r"lacks theta of|size mismatch for .*theta"):
        if way == "local-dir":
            timm.create_model(saved, pretrained=True, num_classes=num_classes)
        elif way == "overlay":
            overlay = {"file": str(file), "num_classes": 7}
            twin("test_resnet", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes)
        elif way == "checkpoint_path":
            twin("test_resnet", checkpoint_path=str(file), num_classes=num_classes)
        else:
            twin("test_resnet", num_classes=num_classes).load_state_dict(state, strict=False)


def test_a_model_within_a_model_loads_base_weights(logs):
    """As a backbone of something larger."""
    outer = nn.ModuleDict({"backbone": twin("test_resnet", num_classes=0), "head": nn.Linear(3, 3)})
    timms = timm.create_model("test_resnet", num_classes=0)
    state = {f"backbone.{name}": value for name, value in timms.state_dict().items()}
    outer.load_state_dict(state | {f"head.{k}": v for k, v in outer["head"].state_dict().items()})
    assert len(our_lines(logs)) == 1


def test_an_ordinary_error_stays_one():
    state = timm.create_model("test_resnet").state_dict()
    del state["fc.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*fc\.weight"):
        twin("test_resnet").load_state_dict(state)


# --- What timm's models do --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["test_resnet", "test_vit2", "caformer_s18", "test_mambaout", "swin_tiny_ditac"])
def test_reset_classifier(base):
    timms, ours = (create(VARIANTS.get(base, (base,))[0]).eval() for create in (timm.create_model, twin))
    x = image(base, batch=1)
    for num_classes in (5, 0):
        for model in (timms, ours):
            model.reset_classifier(num_classes)
        assert shapes(ours(x)) == shapes(timms(x))
        assert ours.num_classes == num_classes


@pytest.mark.parametrize("pool", ["avg", ""])
def test_reset_classifier_of_caformer_leaves_no_old_activation(pool):
    """Its head holds an activation, which timm makes anew."""
    model = twin("caformer_s18")
    before = len(thetas(model))
    model.reset_classifier(5, pool)
    assert not any(type(module).__name__ in ("StarReLU", "SquaredReLU") for module in model.modules())
    assert len(thetas(model)) == before
    other = twin("caformer_s18", num_classes=5)
    other.load_state_dict(model.state_dict())


def test_reset_classifier_touches_nothing_else():
    model = scramble(twin("test_resnet"))
    before = thetas(model)
    model.reset_classifier(5)
    assert all(torch.equal(theta, before[name]) for name, theta in thetas(model).items())


@pytest.mark.parametrize("base", ["test_resnet", "test_vit2", "caformer_s18", "mobilevitv2_050"])
def test_forward_intermediates(base):
    timms, ours = timm.create_model(base).eval(), twin(base).eval()
    x = image(base, batch=1)
    with torch.no_grad():
        if base == "mobilevitv2_050":  # refused by both alike, or given by both
            assert hasattr(timms, "forward_intermediates") == hasattr(ours, "forward_intermediates")
            return
        assert shapes(ours.forward_intermediates(x)) == shapes(timms.forward_intermediates(x))


def test_get_intermediate_layers():
    timms, ours = timm.create_model("test_vit2").eval(), twin("test_vit2").eval()
    ours.load_state_dict(timms.state_dict())
    x = image("test_vit2")
    with torch.no_grad():
        for mine, theirs in zip(ours.get_intermediate_layers(x, 3), timms.get_intermediate_layers(x, 3), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", ["test_resnet", "test_vit2", "caformer_s18"])
def test_gradient_checkpointing(base):
    torch.manual_seed(0)
    model = twin(base, num_classes=7).eval()
    x, grads = image(base), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripting_is_refused_in_a_sentence():
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script does not know DiTAC") as error:
        torch.jit.script(twin("test_resnet"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("base", "kwargs"),
    [
        ("resnet18", {"feature_cls": "hook"}),
        ("resnet18", {"feature_cls": "fx", "out_indices": (1, 2)}),
        ("nasnetalarge", {}),
        ("legacy_xception", {}),
        ("xception41", {}),
    ],
)
def test_wrapped_features(base, kwargs):
    """Those that hook or trace activations."""
    device = "cpu" if "fx" in kwargs.values() else "meta"
    with torch.device(device):
        timms = timm.create_model(base, features_only=True, **kwargs).eval()
        ours = twin(base, features_only=True, **kwargs).eval()
    x = torch.zeros(1, 3, 96, 96, device=device)
    with torch.no_grad():
        assert shapes(ours(x)) == shapes(timms(x))


def test_hooked_features_are_what_ditac_computes():
    model = twin("resnet18", features_only=True, feature_cls="hook").eval()
    computed = []
    for path, module in model.named_modules():
        if isinstance(module, DiTAC) and path.endswith(("layer2.1.act2", "layer4.1.act2")):
            module.register_forward_hook(lambda _, __, output: computed.append(output))
    with torch.no_grad():
        features = model(torch.rand(1, 3, 64, 64))
    assert len(computed) == 2
    assert torch.equal(features[2], computed[0])
    assert torch.equal(features[4], computed[1])


def test_feature_extractor():
    model = scramble(twin("test_resnet"))
    extractor = create_feature_extractor(model, {"layer2.0.act1": "inner", "layer3": "outer"})
    x = image("test_resnet")
    with torch.no_grad():
        features = extractor(x)
    assert [*features] == ["inner", "outer"]
    assert all(feature.isfinite().all() for feature in features.values())


# --- timm's builder ---------------------------------------------------------------------------------------------------


def test_builder_is_restored_after_an_error():
    with pytest.raises(TypeError):
        twin("resnet18", no_such_argument=1)
    with pytest.raises(FileNotFoundError):
        twin("test_resnet", checkpoint_path="/no/such/file")
    assert timm.models.resnet.build_model_with_cfg is build_model_with_cfg
    assert timm.models.nasnet.build_model_with_cfg is build_model_with_cfg
    assert not thetas(timm.create_model("test_resnet"))


def test_threads():
    """Different models at once, timm's own among them."""
    expected = {"test_resnet": "test_resnet", "test_vit2": "test_vit2", "test_efficientnet": "test_efficientnet"}
    built, errors = [], []

    def work(base):
        try:
            for _ in range(3):
                built.append((base, twin(base, num_classes=3)))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(base,)) for base in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(built) == 9
    for base, model in built:
        assert thetas(model).keys() == thetas(twin(base, num_classes=3)).keys()
    assert timm.models.resnet.build_model_with_cfg is build_model_with_cfg


def test_timms_models_stay_timms_while_another_thread_builds():
    """A plain `timm.create_model` in another thread gets no DiTAC."""
    inside, done, plain = threading.Event(), threading.Event(), []

    def hold(module, path):
        inside.set()
        done.wait(20)
        return True

    thread = threading.Thread(target=lambda: twin("test_resnet", ditac={"filter_fn": hold}))
    thread.start()
    inside.wait(20)
    other = threading.Thread(target=lambda: plain.append(timm.create_model("test_resnet")))
    other.start()
    other.join(5)
    done.set()
    thread.join()
    other.join()
    assert not thetas(plain[0])
