"""Where else DiTAC plugs in: segmentation_models_pytorch, timm's features, torchvision, Hugging Face transformers."""

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
import transformers
from test_ditac_zoo import VARIANTS, assert_same_weights, on_meta, scramble
from torch import nn

from ditac_timm import DiTAC, audit_activations, replace_activations

# Swin's input size is fixed when it is built; a path dropped would have no gradient.
SMALL = {"swin_tiny_ditac": {"img_size": 32, "drop_path_rate": 0.0}}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def ditacs(model) -> list[DiTAC]:
    return [module for module in model.modules() if isinstance(module, DiTAC)]


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def assert_thetas_learn(model, loss):
    loss.backward()
    gradients = [act.theta.grad for act in ditacs(model)]
    assert all(gradient is not None and gradient.isfinite().all() and gradient.any() for gradient in gradients)


# --- segmentation_models_pytorch --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "variant", "activations"),
    [
        ("UPerNet", "convnext_tiny_ditac", 18),
        ("UPerNet", "swin_tiny_ditac", 12),
        pytest.param("UPerNet", "resnet50_ditac", 49, marks=pytest.mark.sweep),
        ("PSPNet", "convnext_tiny_ditac", 6),  # of PSPNet's encoders smp keeps what reduces by 8 at most
        ("PSPNet", "swin_tiny_ditac", 4),
        ("PSPNet", "resnet50_ditac", 22),
    ],
)
def test_segmentation(architecture, variant, activations):
    arguments = {"decoder_channels": 32} if architecture == "UPerNet" else {}
    arguments |= SMALL.get(variant, {})
    model = getattr(smp, architecture)(f"tu-{variant}", encoder_weights=None, classes=3, **arguments)
    assert len(ditacs(model)) == len(ditacs(model.encoder)) == activations
    masks = scramble(model).train()(images())
    assert masks.shape == (2, 3, 32, 32)
    assert_thetas_learn(model, masks.square().mean())
    assert {call.path.split(".")[0] for call in audit_activations(model, (3, 32, 32))} == {"decoder"}
    report = replace_activations(model)
    assert all(path.startswith("decoder.") for path in report.replaced)
    assert audit_activations(model, (3, 32, 32)) == []


@pytest.mark.sweep
def test_segmentation_saves_and_reloads(tmp_path):
    model = scramble(smp.PSPNet("tu-swin_tiny_ditac", encoder_weights=None, img_size=32))
    model.save_pretrained(tmp_path)
    again = smp.from_pretrained(tmp_path)
    assert_same_weights(again, model)
    assert torch.equal(again(images()), model(images()))


def test_segmentation_of_any_encoder():
    model = smp.Unet("tu-mobilenetv3_small_100", encoder_weights=None, decoder_attention_type="scse")
    report = replace_activations(model.encoder)
    assert len(ditacs(model)) == len(report.replaced) == 23
    assert set(report.skipped.values()) == {"role se", "role gate"}
    decoder = replace_activations(model.decoder)
    assert set(decoder.skipped.values()) == {"role se", "role gate"}


# --- timm's features --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=pytest.mark.sweep if name == "convnext_small_ditac" else ()) for name in VARIANTS],
)
def test_features(variant):
    arguments = {"features_only": True, **SMALL.get(variant, {})}
    model = scramble(timm.create_model(variant, **arguments)).train()
    base = on_meta(timm.create_model, VARIANTS[variant][0], **arguments)
    assert model.feature_info.channels() == base.feature_info.channels()
    assert model.feature_info.reduction() == base.feature_info.reduction()
    assert_thetas_learn(model, sum(feature.square().mean() for feature in model(images())))


# --- torchvision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "replaced", "skipped"),
    [
        ("resnet18", {}, {"ReLU"}, set()),
        ("mobilenet_v3_small", {}, {"ReLU", "Hardswish"}, {"role se", "role gate"}),
        pytest.param("vit_b_16", {"image_size": 32}, {"GELU"}, set(), marks=pytest.mark.sweep),
        # Of layer_scale the default, 1e-6, would hide a difference.
        ("convnext_tiny", {"layer_scale": 1.0, "stochastic_depth_prob": 0.0}, {"GELU"}, set()),
    ],
)
def test_torchvision(name, arguments, replaced, skipped):
    model = torchvision.models.get_model(name, weights=None, **arguments).eval()
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    nn.init.normal_(head.weight, std=0.02)  # vit_b_16's is zero
    before = model(images()).detach()
    report = replace_activations(model)
    assert (set(report.replaced.values()), set(report.skipped.values())) == (replaced, skipped)
    after = model(images())
    if replaced == {"GELU"}:
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert {call.operator for call in audit_activations(model, (3, 32, 32))} == ({"relu"} if skipped else set())
    assert_thetas_learn(scramble(model).train(), model(images()).square().mean())


# --- Hugging Face transformers ----------------------------------------------------------------------------------------

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.2,  # large enough for a difference to show
}
CONFIGS = {
    "ViT": transformers.ViTConfig(**VIT),
    "ViT, tanh": transformers.ViTConfig(hidden_act="gelu_pytorch_tanh", **VIT),
    "ConvNeXt": transformers.ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, layer_scale_init_value=1.0, image_size=32
    ),
    "Swin": transformers.SwinConfig(
        embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, image_size=32, patch_size=4, drop_path_rate=0.0
    ),
    "ResNet": transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
    "RegNet": transformers.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8),
}


def build(name) -> nn.Module:
    return transformers.AutoModelForImageClassification.from_config(CONFIGS[name]).eval()


@pytest.mark.parametrize(
    ("name", "old", "count", "largest"),
    [
        ("ViT", "GELUActivation", 2, 1e-5),
        ("ViT, tanh", "GELUTanh", 2, 1e-3),
        ("ConvNeXt", "GELUActivation", 3, 1e-5),
        ("Swin", "GELUActivation", 2, 1e-5),
        ("ResNet", "ReLU", 7, None),
        ("RegNet", "ReLU", 7, None),
    ],
)
def test_transformers(name, old, count, largest):
    model = build(name)
    assert len(audit_activations(model, (3, 32, 32))) > 0
    before = model(images()).logits.detach()
    report = replace_activations(model)
    assert list(report.replaced.values()) == [old] * count
    assert set(report.skipped.values()) == ({"role se", "role gate"} if name == "RegNet" else set())
    after = model(images()).logits
    if largest:
        torch.testing.assert_close(after, before, rtol=0, atol=largest)
    assert {call.operator for call in audit_activations(model, (3, 32, 32))} == (
        {"relu"} if name == "RegNet" else set()
    )
    assert_thetas_learn(scramble(model).train(), model(images()).logits.square().mean())


@pytest.mark.parametrize("name", sorted(transformers.activations.ACT2CLS))
def test_each_activation_of_transformers(name):
    """Its own classes are known by default, as PyTorch's are; feature maps, gates and scores are left."""
    old = transformers.activations.ACT2FN[name]
    model = nn.Sequential(nn.Linear(2, 2), old)
    if name in {"laplace", "linear", "sigmoid", "sqrtsoftplus", "xielu"}:
        with pytest.raises(ValueError, match="No activation"):
            replace_activations(model)
    else:
        assert replace_activations(model).replaced == {"1": type(old).__name__}


def test_transformers_types_by_name():
    model = build("ViT")
    with pytest.raises(ValueError, match="2 left: type GELUActivation"):
        replace_activations(model, types=["GELU"])
    assert len(replace_activations(model, types=["GELUActivation"]).replaced) == 2


class ViTWithDiTAC(transformers.ViTForImageClassification):
    def __init__(self, config):
        super().__init__(config)
        replace_activations(self)


def test_transformers_saves_and_reloads(tmp_path):
    """From a base's weights by surgery after `from_pretrained`; from its own by a class that does it in `__init__`."""
    base = build("ViT")
    base.save_pretrained(tmp_path / "base")
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "base").eval()
    replace_activations(model)
    torch.testing.assert_close(model(images()).logits, base(images()).logits, rtol=0, atol=1e-5)
    scramble(model).save_pretrained(tmp_path / "ours")
    again = ViTWithDiTAC.from_pretrained(tmp_path / "ours").eval()
    assert_same_weights(again, model)
    assert torch.equal(again(images()).logits, model(images()).logits)


def test_transformers_state_dict():
    model, again = build("ViT"), build("ViT")
    for each in (model, again):
        replace_activations(each)
    again.load_state_dict(scramble(model).state_dict())
    assert torch.equal(again(images()).logits, model(images()).logits)
