"""Surgery on timm's architectures: on every one by `make sweep`, on one of each of timm's modules by `make test`.

Everything happens on the meta device, so weights cost nothing and only shapes, calls and errors are looked at.
"""

import re
from collections import Counter, defaultdict

import pytest
import timm
import torch

from ditac_timm import audit_activations, replace_activations

ROLES = ("main", "glu", "se", "pos", "kernel")

# Norm and activation in one formula: nothing there can be replaced.
FUSED = {
    "ese_vovnet39b_evos",
    "regnetz_b16_evos",
    "regnetz_c16_evos",
    "regnetz_d8_evos",
    "resnetv2_50d_evos",
    "resnetv2_50d_frn",
    "test_efficientnet_evos",
}
NOTHING_TO_REPLACE = {"ese_vovnet39b_evos", "resnetv2_50d_evos", "resnetv2_50d_frn"}
FUSED_SOURCE = re.compile(r"timm/layers/(evo_norm|filter_response_norm)\.py:\d+")

# An architecture of each of timm's modules: one of the cheapest, and of the odd ones where a module has some.
ONE_OF_EACH = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet26t",
    "byobnet": "test_byobnet",
    "cait": "cait_xxs24_224",
    "coat": "coat_lite_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_1024_20_ks9_p14",
    "convnext": "test_convnext3",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_distilled_patch16_224",
    "densenet": "densenetblur121d",
    "dla": "dla46_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "test_efficientnet",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m1",
    "eva": "vit_small_patch16_dinov3",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m_enc",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "hieradet_small",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout",
    "maxxvit": "coatnet_pico_rw_224",
    "metaformer": "caformer_s18",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "lcnet_035",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevitv2_050",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_siglip",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny_jx",
    "nextvit": "nextvit_small",
    "nfnet": "test_nfnet",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnety_004",
    "repghost": "repghostnet_058",
    "repvit": "repvit_m1",
    "res2net": "res2net50_48w_2s",
    "resnest": "resnest14d",
    "resnet": "test_resnet",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_pcpvt_small",
    "vgg": "vgg11_bn",
    "visformer": "visformer_tiny",
    "vision_transformer": "test_vit2",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "vit_relpos_small_patch16_224",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}


def architectures() -> dict[str, list[str]]:
    """timm's own architectures by module."""
    by_module = defaultdict(list)
    for module in timm.list_modules():
        if module != "ditac_zoo":
            by_module[module] = timm.list_models(module=module)
    return by_module


def input_size(model) -> tuple[int, ...]:
    """As timm configures it; smaller for sequencer, whose LSTMs run step by step on the meta device."""
    return (3, 28, 28) if "Sequencer" in type(model).__name__ else model.pretrained_cfg["input_size"]


def shapes(output):
    """The shapes in an output, however it is nested."""
    if isinstance(output, torch.Tensor):
        return tuple(output.shape)
    if isinstance(output, dict):
        return {key: shapes(value) for key, value in output.items()}
    if isinstance(output, (list, tuple)):
        return [shapes(value) for value in output]
    return output


def on_meta(name: str, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs).eval()


def sweep(name: str) -> Counter:
    """Replace everything in an architecture, look at it, and count the replaced by role."""
    model = on_meta(name)
    if name in NOTHING_TO_REPLACE:
        with pytest.raises(ValueError, match="fuses norm and activation"):
            replace_activations(model, roles=ROLES)
        report = None
    else:
        with torch.no_grad():
            before = shapes(model(torch.empty(1, *input_size(model), device="meta")))
        report = replace_activations(model, roles=ROLES)
    after = []
    model.register_forward_hook(lambda module, args, output: after.append(shapes(output)))  # in the audit's forward
    left = audit_activations(model, input_size(model))
    if report:
        assert after == [before]
    if name in FUSED:
        assert left, "nothing is left where something was known to be"
        assert all(FUSED_SOURCE.fullmatch(call.source) for call in left), [*map(str, left)]
    else:
        assert not left, [*map(str, left)]
    return Counter(report.roles.values() if report else ())


def test_one_of_each_is_one_of_each():
    assert ONE_OF_EACH.keys() == architectures().keys()
    assert all(name in architectures()[module] for module, name in ONE_OF_EACH.items())


@pytest.mark.parametrize("name", ONE_OF_EACH.values())
def test_one_of_each(name):
    assert sweep(name).total() > 0


@pytest.mark.sweep
@pytest.mark.parametrize("module", ONE_OF_EACH)
def test_every_architecture(module, record_property):
    failures = {}
    for name in architectures()[module]:
        try:
            record_property("sweep", dict(sweep(name)))  # added up in conftest.py
        except Exception as error:  # so that one doesn't hide the others
            failures[name] = f"{type(error).__name__}: {error}"
    assert not failures


def test_the_sweep_leaves_nothing_out():
    assert sum(map(len, architectures().values())) == len(timm.list_models()) - 7
