"""The model a command line asks for."""

import pytest
import timm
import torch

from ditac_timm.training.errors import UsageError
from ditac_timm.training.flags import parse_train_flags
from ditac_timm.training.model import (
    build_model,
    check_model_name,
    enable_grad_checkpointing,
    image_size_argument,
    init_head,
    model_arguments,
    source_of,
)


@pytest.mark.parametrize("name", ["resnet50", "resnet50.a1_in1k", "resnet50_ditac", "resnet50.a1_in1k", "hf-hub:a/b"])
def test_known_names(name: str) -> None:
    check_model_name(name)


@pytest.mark.parametrize(
    ("name", "near"), [("resnet5o", "resnet50"), ("resnet5o_ditac", "resnet50_ditac"), ("resnet50.a1_in2k", "a1_in1k")]
)
def test_unknown_names(name: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean .*{near}"):
        check_model_name(name)


@pytest.mark.parametrize("name", ["mobilenetv3_ditacc", "resnet5o"])
def test_suggestions_are_different_names(name: str) -> None:
    with pytest.raises(UsageError) as raised:
        check_model_name(name)
    near = str(raised.value).partition("did you mean ")[2].removesuffix("?)").split(" or ")
    assert len(near) == len(set(near)) > 1


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        ("vit_tiny_patch16_224", "--img-size 64", {"img_size": 64}),
        ("vit_tiny_patch16_224", "--input-size 3 64 32", {"img_size": (64, 32)}),
        ("vit_tiny_patch16_224", "", {}),
        ("resnet18", "--img-size 64", {}),
    ],
)
def test_fixed_size_models_are_built_for_the_size(name: str, flags: str, expected: dict) -> None:
    args = parse_train_flags(flags.split())
    assert image_size_argument(name, model_arguments(args), args) == expected


def test_head_init() -> None:
    args = parse_train_flags(["--head-init-scale", "0", "--head-init-bias", "-2"])
    model = build_model("test_resnet", {"num_classes": 3})
    init_head(model, args)
    assert torch.equal(model.fc.weight, torch.zeros_like(model.fc.weight))
    assert model.fc.bias.tolist() == [-2, -2, -2]


def test_models_without_grad_checkpointing_say_so() -> None:
    with pytest.raises(UsageError, match="--grad-checkpointing"):
        enable_grad_checkpointing(torch.nn.Identity())


def test_a_model_from_a_folder_is_rebuilt_without_it(tmp_path) -> None:
    model = timm.create_model("test_resnet", num_classes=4, in_chans=1)
    timm.models.save_for_hf(model, tmp_path)
    name = f"local-dir:{tmp_path}"
    arch, arguments = source_of(build_model(name, {"num_classes": 3}), name, {"num_classes": 3})
    assert arch == "test_resnet"
    rebuilt = build_model(arch, arguments)
    assert rebuilt.num_classes == 3
    assert rebuilt.conv1[0].in_channels == 1
