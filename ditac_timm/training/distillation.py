"""Knowledge distillation: the teacher that flags name, and the task that learns from it, which is timm's."""

import argparse
import logging
from collections.abc import Sequence
from typing import Any

import torch
from timm.task import (
    ClassificationTask,
    DistillationTeacher,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import Tensor, nn

from ditac_timm.audit import meta_twin
from ditac_timm.training import model as models
from ditac_timm.training.device import Precision
from ditac_timm.training.errors import UsageError, first_line

_logger = logging.getLogger(__name__)

_FLAG = "--kd-model-name"


class Teacher(DistillationTeacher):
    """A frozen model that sees the student's images, normalised as it was trained to see them.

    timm's own takes the student's default normalisation for what --mean and --std may have changed, and compares the
    two in every step, for which the device has to be waited for.
    """

    mean_kd: Tensor
    std_kd: Tensor
    _scale: Tensor
    _shift: Tensor

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> None:
        """Freeze a model.

        Args:
            model: The teacher, of as many channels as the images have.
            mean: The images', with which they are normalised for the student.
            std: Likewise.
            device: Where the model is.
            dtype: Of the images; torch's default if None.
        """
        super().__init__(model.requires_grad_(False), device=device, dtype=dtype)
        own_mean, own_std = self.mean_kd, self.std_kd
        mean_seen, std_seen = (own_mean.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        # A teacher adapted to other than three channels was not trained with any normalisation of theirs.
        if own_mean.shape != mean_seen.shape:
            own_mean, own_std = mean_seen, std_seen
        self._same = torch.equal(own_mean, mean_seen) and torch.equal(own_std, std_seen)
        self.register_buffer("_scale", std_seen / own_std, persistent=False)
        self.register_buffer("_shift", (mean_seen - own_mean) / own_std, persistent=False)

    def normalize_input(
        self, input: Tensor, student_mean: Tensor | None = None, student_std: Tensor | None = None
    ) -> Tensor:
        """Images normalised for the student, as this model was trained to see them."""
        return input if self._same else input * self._scale + self._shift


def create_teacher(
    args: argparse.Namespace, student: Any, config: dict[str, Any], precision: Precision
) -> Teacher | None:
    """The teacher that --kd-model-name names, with its pretrained weights, in place; None without that flag.

    Args:
        args: The flags. The feature dimensions are set in it where they are not given.
        student: The model to train.
        config: How images are prepared.
        precision: The run's.

    Raises:
        UsageError: There is no such teacher, or it has nothing to teach this student.
    """
    if args.kd_model_name is None:
        return None
    if args.kd_distill_type == "token" and not hasattr(student, "set_distilled_training"):
        raise UsageError(
            f"--kd-distill-type token needs a model with a distillation head, such as deit_tiny_distilled_patch16_224, "
            f"and --model {args.model} has none: give --kd-distill-type logit"
        )
    arguments = {"in_chans": config["input_size"][0]}
    size = argparse.Namespace(input_size=config["input_size"], img_size=None)
    arguments |= models.image_size_argument(args.kd_model_name, arguments, size, _FLAG)
    model = models.build_model(args.kd_model_name, arguments, pretrained=True, flag=_FLAG)
    if args.kd_distill_type == "feature":
        _set_feature_dims(args, student, model, config["input_size"])
    elif model.num_classes != student.num_classes:
        raise UsageError(
            f"{_FLAG} {args.kd_model_name} has {model.num_classes} classes and --model {args.model} has "
            f"{student.num_classes}: give a teacher of the same, or --kd-distill-type feature"
        )
    model = model.to(precision.device, precision.model_dtype)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    _logger.info(f"Teacher {args.kd_model_name}: {parameters:,} parameters.")
    return Teacher(model, config["mean"], config["std"], precision.device, precision.model_dtype)


def create_training_task(
    args: argparse.Namespace, model: nn.Module, loss: nn.Module, teacher: Teacher | None, precision: Precision
) -> TrainingTask:
    """Join a model and its loss; with a teacher, also the loss of --kd-distill-type."""
    common: dict[str, Any] = {
        "criterion": loss,
        "device": precision.device,
        "dtype": precision.model_dtype,
        "verbose": False,
    }
    if teacher is None:
        return ClassificationTask(model, **common)
    common |= {
        "student_model": model,
        "teacher_model": teacher,
        "distill_loss_weight": args.distill_loss_weight,
        "task_loss_weight": args.task_loss_weight,
    }
    task: Any
    if args.kd_distill_type == "feature":
        task = FeatureDistillationTask(
            student_feature_dim=args.kd_student_feature_dim, teacher_feature_dim=args.kd_teacher_feature_dim, **common
        )
    elif args.kd_distill_type == "token":
        task = TokenDistillationTask(distill_type=args.kd_token_distill_type, temperature=args.kd_temperature, **common)
    else:
        task = LogitDistillationTask(loss_type=args.kd_loss_type, temperature=args.kd_temperature, **common)
    _logger.info(
        f"Distillation by {args.kd_distill_type}: loss = {task.task_loss_weight:g} * task + "
        f"{task.distill_loss_weight:g} * distillation."
    )
    return task


def restore_task_state(task: TrainingTask, resumed: dict[str, Any], *, ema: bool = False) -> None:
    """Give a task back what its checkpoint holds beside the model: the projection of features, where there is one."""
    try:
        task.load_task_state(resumed.get("task_state_ema" if ema else "task_state"), ema=ema)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UsageError(
            "--resume: the checkpoint's projection of features does not fit --kd-distill-type, --kd-model-name and "
            f"--model: {first_line(error)}"
        ) from error


def _set_feature_dims(args: argparse.Namespace, student: nn.Module, teacher: nn.Module, size: Sequence[int]) -> None:
    """Find the dimensions of both models' features, so that flags which contradict them are refused."""
    shapes = []
    for model, name, side in ((student, f"--model {args.model}", "student"), (teacher, args.kd_model_name, "teacher")):
        name = name if side == "student" else f"{_FLAG} {name}"
        shape = _feature_shape(model, name, size)
        dest = f"kd_{side}_feature_dim"
        given = getattr(args, dest)
        if given not in (None, shape[-1]):
            raise UsageError(f"--kd-{side}-feature-dim must be {shape[-1]} for {name}, not {given}")
        setattr(args, dest, shape[-1])
        shapes.append(shape)
    if shapes[0][:-1] != shapes[1][:-1]:
        raise UsageError(
            f"--kd-distill-type feature: the features of --model {args.model} have the shape {shapes[0]} and those of "
            f"{_FLAG} {args.kd_model_name} {shapes[1]}: give --kd-distill-type logit"
        )


def _feature_shape(model: nn.Module, name: str, size: Sequence[int]) -> tuple[int, ...]:
    """Shape of the features before the head, without computing them."""
    twin: Any = meta_twin(model).eval()
    try:
        with torch.no_grad():
            images = torch.empty(1, *size, dtype=next(model.parameters()).dtype, device="meta")
            return tuple(twin.forward_head(twin.forward_features(images), pre_logits=True).shape)
    except (AttributeError, TypeError) as error:
        raise UsageError(f"--kd-distill-type feature: {name} gives no features: {first_line(error)}") from error
