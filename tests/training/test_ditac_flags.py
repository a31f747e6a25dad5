"""The flags about DiTAC: the layers they make, the learning rate and the prior of their thetas."""

import copy
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from timm.task import ClassificationTask
from timm.utils import NativeScaler
from torch import nn

import ditac_timm
from ditac_timm import DiTAC
from ditac_timm.training import checkpoint as checkpoints
from ditac_timm.training.device import Precision
from ditac_timm.training.errors import UsageError
from ditac_timm.training.flags import parse_train_flags
from ditac_timm.training.loop import train_one_epoch
from ditac_timm.training.model import model_arguments
from ditac_timm.training.recipe import create_optimizer, create_scheduler
from ditac_timm.training.regularisation import smoothness_term

SETTINGS = "--ditac-version inf --ditac-init prior --ditac-domain -4 4 --ditac-cells 8 --ditac-roles main se"
SMALL = "-b 24 -j 0 --img-size 32 --num-classes 10 --warmup-epochs 0 --lr 0.01 --log-interval 2 --epochs 1"


def create(train: ModuleType, flags: str) -> tuple[nn.Module, dict]:
    """The model that flags ask for, and what rebuilds it."""
    return train.create_model(parse_train_flags(["--num-classes", "10", *flags.split()]), {})


def layers(model: nn.Module) -> list[DiTAC]:
    return [module for module in model.modules() if isinstance(module, DiTAC)]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--ditac-version leaky", {"version": "leaky"}),
        ("--ditac-init prior", {"init": "prior"}),
        ("--ditac-domain -4 5", {"domain": (-4.0, 5.0)}),
        ("--ditac-cells 6", {"cells": 6}),
        (SETTINGS, {"version": "inf", "init": "prior", "domain": (-4.0, 4.0), "cells": 8}),
    ],
)
@pytest.mark.parametrize("model", ["test_efficientnet_ditac", "ditac --model-kwargs base=test_efficientnet"])
def test_flags_reach_every_layer(train: ModuleType, model: str, flags: str, expected: dict) -> None:
    made, rebuild = create(train, f"--model {model} {flags}")
    assert layers(made)
    for layer in layers(made):
        assert {name: getattr(layer, name) for name in expected} == expected
    again = ditac_timm.create_model(rebuild["arch"], **json.loads(json.dumps(rebuild["model_args"])))
    again.load_state_dict(made.state_dict())
    assert str(again) == str(made)


def test_roles_choose_the_layers(train: ModuleType) -> None:
    default, _ = create(train, "--model mobilenetv3_small_050_ditac")
    both, _ = create(train, "--model mobilenetv3_small_050_ditac --ditac-roles main se")
    squeeze, _ = create(train, "--model mobilenetv3_small_050_ditac --ditac-roles se")
    assert set(squeeze.ditac_report.roles.values()) == {"se"}
    assert len(layers(both)) == len(layers(default)) + len(layers(squeeze))


@pytest.mark.parametrize(("init", "moved"), [("identity", False), ("match", True), ("prior", True)])
def test_init(train: ModuleType, init: str, moved: bool) -> None:
    made, _ = create(train, f"--model test_efficientnet_ditac --ditac-init {init}")  # its base has SiLU
    assert all(bool(layer.theta.any()) == moved for layer in layers(made))


def test_flags_override_and_keep_other_settings(train: ModuleType) -> None:
    other = "--model-kwargs ditac={'cells':6,'init':'identity'}"
    made, rebuild = create(train, f"--model mobilenetv3_ditac {other} --ditac-cells 4")
    assert rebuild["model_args"]["ditac"] == {"cells": 4, "init": "identity"}
    assert {layer.cells for layer in layers(made)} == {4}
    assert set(made.ditac_report.replaced.values()) == {"Hardswish"}  # the variant's own row


def test_flags_override_a_folders_settings(train: ModuleType, tmp_path: Path) -> None:
    saved = timm.create_model("ditac", base="test_resnet", num_classes=10, ditac={"cells": 6, "init": "prior"})
    timm.models.save_for_hf(saved, tmp_path, safe_serialization=True)
    made, rebuild = create(train, f"--model local-dir:{tmp_path} --ditac-cells 4")
    assert {(layer.cells, layer.init) for layer in layers(made)} == {(4, "prior")}
    assert rebuild["model_args"]["ditac"] == {"cells": 4, "init": "prior"}


def test_whole_numbers_of_yaml_are_the_same_domain(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("ditac_domain: [-4, 4]")
    arguments = model_arguments(parse_train_flags(["-c", str(tmp_path / "recipe.yaml")]))
    assert json.dumps(arguments["ditac"]) == '{"domain": [-4.0, 4.0]}'


def test_settings_that_are_no_mapping() -> None:
    with pytest.raises(UsageError, match="--model-kwargs ditac must be a mapping of settings, not 5"):
        model_arguments(parse_train_flags(["--model-kwargs", "ditac=5", "--ditac-cells", "4"]))


@pytest.mark.parametrize("flag", ["--ditac-lr-scale 0.1", "--ditac-reg 0.1", "--ditac-cells 4"])
def test_models_from_folders_without_ditac_are_refused(
    train: ModuleType, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=10), tmp_path / "model")
    argv = f"--data-dir {digits} --output {tmp_path} --model local-dir:{tmp_path}/model {SMALL} {flag}"
    assert train.main(argv.split()) == 2
    said = capsys.readouterr().err
    assert f"{flag.split()[0]} is about DiTAC, and --model" in said
    assert "has none: leave it out" in said


@pytest.fixture(scope="module")
def finished(train: ModuleType, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch with every flag about DiTAC."""
    folder = tmp_path_factory.mktemp("ditac")
    flags = f"{SMALL} {SETTINGS} --ditac-lr-scale 0.1 --ditac-reg 0.001 --opt adamw --grad-accum-steps 2"
    argv = f"--data-dir {digits} --output {folder} --experiment run --model test_efficientnet_ditac {flags}"
    assert train.main(argv.split()) == 0
    return folder / "run"


def test_a_run_with_every_flag(train: ModuleType, validate: ModuleType, finished: Path, digits: Path) -> None:
    checkpoint = torch.load(finished / "last.pth.tar", weights_only=True)
    assert checkpoint["model_args"]["ditac"] == {
        "version": "inf",
        "init": "prior",
        "domain": [-4.0, 4.0],
        "cells": 8,
        "roles": ["main", "se"],
    }
    results = finished / "results.json"
    argv = f"--data-dir {digits} --checkpoint {finished} -b 24 -j 0 --results-file {results}"
    assert validate.main(argv.split()) == 0
    assert json.loads(results.read_text())["top1"] == checkpoint["metric"]
    assert train.main(["-c", str(finished / "args.yaml"), "--resume", str(finished), "--epochs", "2"]) == 0
    again = torch.load(finished / "last.pth.tar", weights_only=True)
    assert again["epoch"] == 1
    scales = [group.get("lr_scale", 1.0) for group in again["optimizer"]["param_groups"]]
    assert sorted(set(scales)) == [0.1, 1.0]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--ditac-cells 10", "with --ditac-cells 8, not 10"),
        ("--ditac-version ditac", "with --ditac-version inf, not ditac"),
        ("--ditac-init match", "with --ditac-init prior, not match"),
        ("--ditac-domain -3 3", "with --ditac-domain -4.0 4.0, not -3.0 3.0"),
        ("--ditac-roles main", "with --ditac-roles main se, not main"),
        ("--model-kwargs ditac={'types':['SiLU']}", "without --model-kwargs ditac types: leave"),
        ("--ditac-lr-scale 0.5", "it is of another --ditac-lr-scale or --layer-decay"),
        ("--ditac-lr-scale 1", "--no-resume-opt"),
    ],
)
def test_resume_with_other_settings_is_refused(
    train: ModuleType, finished: Path, capsys: pytest.CaptureFixture[str], flags: str, sentence: str
) -> None:
    argv = ["-c", str(finished / "args.yaml"), "--resume", str(finished), "--epochs", "3", *flags.split()]
    assert train.main(argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert sentence in lines[0]


def test_resume_without_the_settings_names_them(
    train: ModuleType, finished: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = f"--data-dir {digits} --model test_efficientnet_ditac {SMALL} --resume {finished}"
    assert train.main(argv.split()) == 2
    assert "with --ditac-cells 8, give --ditac-cells 8" in capsys.readouterr().err


def learning_rates(model: nn.Module, flags: str) -> list[dict[str, tuple[float, float]]]:
    """Of every parameter, learning rate and weight decay: at the start, and as timm's schedule goes on."""
    args = parse_train_flags(flags.split())
    args.world_size = 1
    optimizer = create_optimizer(args, model)
    scheduler, _ = create_scheduler(args, optimizer, updates_per_epoch=10)
    assert scheduler is not None
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = []
    for epoch in range(4):
        scheduler.step(epoch, 0.0)
        groups = [(group, names[id(p)]) for group in optimizer.param_groups for p in group["params"]]
        assert len(groups) == len({name for _, name in groups}) == sum(p.requires_grad for p in model.parameters())
        seen.append({name: (group["lr"], group["weight_decay"]) for group, name in groups})
    return seen


@pytest.mark.parametrize(
    "flags",
    [
        "--opt adamw --lr 1e-3 --weight-decay 0.05 --layer-decay 0.7",
        "--opt adamw --lr 1e-3 --weight-decay 0.05 --layer-decay 0.7 --layer-decay-no-opt-scale 0.6",
        "--opt sgd --lr-base 0.1 --weight-decay 1e-4 --warmup-epochs 2",
        "--opt lamb --weight-decay 0 --sched step --decay-epochs 1",
        "--opt lookahead_rmsproptf --sched constant --warmup-epochs 0",
        "--opt muon --lr 1e-3 --weight-decay 0.01 --epochs 4",
        "--opt adamw --sched plateau --lr 1e-3 --warmup-epochs 1",
    ],
)
def test_lr_scale_multiplies_what_timm_gives_thetas(flags: str) -> None:
    model = ditac_timm.create_model("test_vit_ditac", num_classes=10)
    base = learning_rates(copy.deepcopy(model), flags)
    scaled = learning_rates(model, f"{flags} --ditac-lr-scale 0.25")
    assert len({lr for epoch in base for lr, _ in epoch.values()}) > 1 or "constant" in flags
    for before, after in zip(base, scaled, strict=True):
        assert before.keys() == after.keys()
        assert any(name.endswith(".theta") for name in after)
        for name, (lr, decay) in before.items():
            factor = 0.25 if name.endswith(".theta") else 1.0
            assert after[name] == (pytest.approx(lr * factor, rel=1e-12), decay)


def test_optimizer_state_resumes_at_the_same_scale_only() -> None:
    model = ditac_timm.create_model("test_vit_ditac", num_classes=10)
    args = parse_train_flags(["--opt", "adamw", "--lr", "1e-3", "--ditac-lr-scale", "0.25", "--layer-decay", "0.7"])
    optimizer = create_optimizer(args, model)
    model(torch.randn(2, 3, 160, 160)).square().mean().backward()
    optimizer.step()
    checkpoint = {"optimizer": optimizer.state_dict(), "epoch": 4, "args": vars(args)}
    again = create_optimizer(args, model)
    assert checkpoints.restore_training_state(checkpoint, args, again, None, None) == (5, 0)
    theta = layers(model)[0].theta
    assert torch.equal(again.state[theta]["exp_avg"], optimizer.state[theta]["exp_avg"])
    args.ditac_lr_scale = 0.5
    with pytest.raises(UsageError, match="another --ditac-lr-scale or --layer-decay"):
        checkpoints.restore_training_state(checkpoint, args, create_optimizer(args, model), None, None)


def network() -> nn.Sequential:
    """With two tessellations, one of them in two layers."""
    torch.manual_seed(0)
    acts = (DiTAC(init="prior"), DiTAC("inf", cells=6, init="prior"), DiTAC("leaky", init="prior"))
    return nn.Sequential(*(module for act in acts for module in (nn.Linear(4, 4), act)))


def precision_matrix(cells: int) -> np.ndarray:
    """P of the documented prior, from its definition and the basis alone."""
    size = 2 * cells
    centres = np.linspace(-1, 1, size)
    covariance = np.array([[np.exp(-abs(a - b) / 5.0) ** 2 * size**2 for b in centres] for a in centres])
    basis = ditac_timm.cpab.Tessellation(cells).basis.numpy()
    return np.linalg.inv(basis.T @ covariance @ basis)


def expected_gradient(theta: torch.Tensor, weight: float) -> torch.Tensor:
    """By autograd, of `weight * theta^T P theta`."""
    value = theta.detach().double().requires_grad_()
    precision = torch.from_numpy(precision_matrix(len(theta) + 1))
    (weight * value @ precision @ value).backward()
    assert value.grad is not None
    return value.grad


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 4, generator=generator), torch.arange(6) % 4) for _ in range(3)]


def update_gradients(task: ClassificationTask, weight: float, accumulate: int, scaler: NativeScaler | None) -> list:
    """The gradients of all thetas at each update of an epoch, as the optimizer sees them."""
    model = task.get_trainable_module()
    assert model is not None
    args = parse_train_flags(["--grad-accum-steps", str(accumulate)])
    args.rank = 0
    args.distributed, args.world_size = False, 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen: list[list[torch.Tensor]] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append([layer.theta.grad.clone() for layer in layers(model)]))
    precision = Precision(torch.device("cpu"), None, None)
    term = smoothness_term(model, weight)
    train_one_epoch(task, batches(), optimizer, 0, args, precision, loss_scaler=scaler, regulariser=term)
    return seen


def assert_penalised_once(task: ClassificationTask, accumulate: int, scaler: NativeScaler | None = None) -> None:
    weight = 0.3
    without = update_gradients(task, 0.0, accumulate, scaler)
    penalised = update_gradients(task, weight, accumulate, scaler)
    assert len(without) == len(penalised) == -(-3 // accumulate)
    model = task.get_trainable_module()
    assert model is not None
    for before, after in zip(without, penalised, strict=True):
        for layer, plain, gradient in zip(layers(model), before, after, strict=True):
            expected = expected_gradient(layer.theta, weight)
            torch.testing.assert_close((gradient - plain).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "loss scaling"])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_prior_has_its_true_gradient_once_an_update(accumulate: int, scaled: bool) -> None:
    scaler = NativeScaler(device="cpu") if scaled else None
    assert_penalised_once(ClassificationTask(network(), verbose=False), accumulate, scaler)


def test_no_weight_no_term() -> None:
    assert smoothness_term(network(), 0.0) is None
    assert smoothness_term(nn.Linear(1, 1), 0.0) is None  # nor a DiTAC that is missed


def test_prior_is_in_float32_for_weights_in_half_precision() -> None:
    model = network().bfloat16()
    term = smoothness_term(model, 1.0)
    assert term is not None
    assert term().dtype == torch.float32
    term().backward()
    theta = layers(model)[0].theta
    assert theta.grad is not None
    torch.testing.assert_close(theta.grad.double(), expected_gradient(theta, 1.0), rtol=0.01, atol=0.01)
