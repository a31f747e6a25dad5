"""Distillation: what the student learns, what a checkpoint holds of the teacher (nothing), and what is refused."""

import csv
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import torch
from script_runs import run_two_processes
from timm.models import save_for_hf
from torch import nn

import ditac_timm
from ditac_timm.training.distillation import Teacher
from ditac_timm.training.flags import parse_train_flags

SMALL = shlex.split("-b 24 -j 0 --img-size 32 --num-classes 10 --warmup-epochs 0 --lr 0.01 --log-interval 2")
CPU = torch.device("cpu")


def save_teacher(folder: Path, model: str, classes: int = 10) -> str:
    torch.manual_seed(0)
    teacher = ditac_timm.create_model(model, num_classes=classes)
    save_for_hf(teacher, folder, safe_serialization=True)
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A teacher that is a DiTAC model, of features other than the student's."""
    return save_teacher(tmp_path_factory.mktemp("teacher") / "model", "test_resnet_ditac")


def run(train: ModuleType, data: Path, output: Path, *flags: str, model: str = "test_vit") -> tuple[int, Path]:
    argv = ["--data-dir", str(data), "--output", str(output), "--experiment", "run", "--model", model, "--epochs", "1"]
    return train.main([*argv, *SMALL, *flags]), output / "run"


def load(folder: Path) -> dict:
    return torch.load(folder / "last.pth.tar", weights_only=True)


def test_defaults_are_timms() -> None:
    args = parse_train_flags([])
    assert (args.kd_model_name, args.kd_distill_type, args.kd_loss_type, args.kd_temperature) == (
        None,
        "logit",
        "kl",
        4.0,
    )
    assert args.distill_loss_weight is args.task_loss_weight is None
    assert args.kd_student_feature_dim is args.kd_teacher_feature_dim is None
    assert args.kd_token_distill_type == "soft"


def test_without_weight_on_labels_the_loss_is_the_teachers(
    train: ModuleType, digits: Path, tmp_path: Path, teacher: str
) -> None:
    """A student comes to answer as its teacher, and knows nothing of labels."""
    flags = shlex.split("--task-loss-weight 0 --epochs 6 --opt adamw --lr 0.003 --no-aug")
    code, folder = run(train, digits, tmp_path, "--kd-model-name", teacher, *flags, model="test_resnet")
    assert code == 0
    with open(folder / "summary.csv") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["train_loss"]) < 0.5 * float(rows[0]["train_loss"])
    assert float(rows[-1]["eval_loss"]) > 2


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("test_resnet", "--model-ema --grad-accum-steps 2 --torchcompile eager"),
        ("test_vit_ditac", "--amp --kd-distill-type feature --distill-loss-weight 2 --layer-decay 0.7 --clip-grad 1"),
        (
            "test_vit",
            "--amp --amp-dtype bfloat16 --kd-distill-type feature --model-ema --torchcompile eager --channels-last",
        ),
        ("deit_tiny_distilled_patch16_224", "--kd-distill-type token --model-kwargs depth=1 --model-ema"),
        ("test_resnet", "--model-dtype bfloat16 --mixup 0.2 --mean 0.5 --std 0.5"),
        ("test_efficientnet", "--in-chans 1 --mean 0.5 --std 0.5 --clip-grad 0.1 --clip-mode agc"),
    ],
)
def test_flags_run(train: ModuleType, digits: Path, tmp_path: Path, teacher: str, model: str, flags: str) -> None:
    code, folder = run(train, digits, tmp_path, "--kd-model-name", teacher, *flags.split(), model=model)
    assert code == 0
    checkpoint = load(folder)
    own = ditac_timm.create_model(checkpoint["arch"], **checkpoint["model_args"]).state_dict()
    for key in ("state_dict", "state_dict_ema"):
        if key in checkpoint:
            assert checkpoint[key].keys() == own.keys()  # the student's alone
    assert ("task_state" in checkpoint) == ("feature" in flags)
    assert "teacher" not in str(checkpoint.keys())


def test_hard_tokens_run(train: ModuleType, digits: Path, tmp_path: Path, teacher: str) -> None:
    flags = shlex.split("--kd-distill-type token --kd-token-distill-type hard --model-kwargs depth=1")
    model = "deit_tiny_distilled_patch16_224"
    assert run(train, digits, tmp_path, "--kd-model-name", teacher, *flags, model=model)[0] == 0


def test_a_teacher_of_another_image_size_fits(train: ModuleType, digits: Path, tmp_path: Path) -> None:
    name = save_teacher(tmp_path / "teacher", "test_vit")  # of 160 pixels
    assert run(train, digits, tmp_path, "--kd-model-name", name, model="test_resnet")[0] == 0


def test_projection_is_trained_and_resumed(train: ModuleType, digits: Path, tmp_path: Path, teacher: str) -> None:
    # The averaged weights are those of the first update, and stay what they are.
    flags = ("--kd-model-name", teacher, "--kd-distill-type", "feature", "--model-ema", "--model-ema-decay", "1")
    code, folder = run(train, digits, tmp_path, *flags)
    assert code == 0
    first = load(folder)
    assert not torch.equal(*(first[key]["projection"]["weight"] for key in ("task_state", "task_state_ema")))
    again = ["-c", str(folder / "args.yaml"), "--resume", str(folder), "--epochs", "2", "--output", str(tmp_path / "b")]
    assert train.main([*again, "--sched", "none", "--lr", "1e-30", "--no-resume-opt"]) == 0  # nothing moves
    second = load(tmp_path / "b" / "run")
    for key in ("task_state", "task_state_ema"):
        for name, value in first[key]["projection"].items():
            torch.testing.assert_close(second[key]["projection"][name], value, rtol=0, atol=0)


def test_two_processes(digits: Path, tmp_path: Path, teacher: str) -> None:
    argv = ["--data-dir", str(digits), "--output", str(tmp_path), "--experiment", "two", "--model", "test_vit", *SMALL]
    argv += [
        "--epochs",
        "1",
        "--kd-model-name",
        teacher,
        "--kd-distill-type",
        "feature",
        "--model-ema",
        "--device",
        "cpu",
    ]
    run_two_processes(*argv, "--grad-accum-steps", "2")
    assert not any("." in name for name in load(tmp_path / "two")["task_state"]["projection"])


def test_images_reach_the_teacher_as_it_knows_them() -> None:
    model = nn.Conv2d(3, 1, 1)
    model.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1)}  # type: ignore[assignment]
    raw = torch.rand(2, 3, 4, 4)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([1.0, 0.5, 0.1]).view(3, 1, 1)
    teacher = Teacher(model, mean.flatten().tolist(), std.flatten().tolist(), CPU, None)
    seen = teacher.normalize_input((raw - mean) / std)
    torch.testing.assert_close(seen[:, 0], (raw[:, 0] - 0.5) / 0.2)
    torch.testing.assert_close(seen[:, 2], (raw[:, 2] - 0.3) / 0.1)
    same = Teacher(model, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), CPU, None)
    assert same.normalize_input(raw) is raw
    assert not any(parameter.requires_grad for parameter in same.parameters())
    assert not same.model.training


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--kd-temperature 2", "--kd-temperature needs a teacher: give --kd-model-name"),
        ("--kd-distill-type feature", "--kd-distill-type needs a teacher"),
        ("--task-loss-weight 0.5", "--task-loss-weight needs a teacher"),
        ("--kd-model-name resnet5", "--kd-model-name resnet5 is unknown (did you mean resnet5"),
        ("--kd-model-name resnet50.a9_in1k", "--kd-model-name resnet50.a9_in1k: resnet50 has no weights"),
        ("--kd-model-name local-dir:/no/such/folder", "--kd-model-name local-dir:/no/such/folder"),
        ("--kd-model-name test_resnet --kd-distill-type foo", "--kd-distill-type must be one of logit, feature, token"),
        ("--kd-model-name test_resnet --kd-loss-type mse", "--kd-loss-type must be one of kl, not mse"),
        ("--kd-model-name test_resnet --kd-token-distill-type warm", "--kd-token-distill-type must be one of soft"),
        ("--kd-model-name test_resnet --kd-temperature 0", "--kd-temperature must be above 0"),
        ("--kd-model-name test_resnet --task-loss-weight 2", "give --distill-loss-weight too"),
        ("--kd-model-name TEACHER --kd-distill-type token", "needs a model with a distillation head"),
        ("--kd-model-name TEACHER --num-classes 7", "has 10 classes and --model test_vit has 7"),
        (
            "--kd-model-name TEACHER --kd-distill-type feature --kd-student-feature-dim 5",
            "--kd-student-feature-dim must be 64 for --model test_vit, not 5",
        ),
    ],
)
def test_refusals(
    train: ModuleType,
    digits: Path,
    tmp_path: Path,
    teacher: str,
    capsys: pytest.CaptureFixture[str],
    flags: str,
    sentence: str,
) -> None:
    code, _ = run(train, digits, tmp_path / "output", *flags.replace("TEACHER", teacher).split())
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2, lines
    assert len(lines) == 1
    assert sentence in lines[0]
    assert not (tmp_path / "output").exists()
