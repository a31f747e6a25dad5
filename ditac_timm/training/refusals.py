"""What is refused before data or model are touched: timm's flags not supported here, and flags that contradict."""

import argparse
import importlib.util
import math
import os
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from timm.data import create_transform
from timm.models import is_model, is_model_in_modules
from timm.optim import list_optimizers
from timm.utils import is_distributed_env

from ditac_timm.ops.reference import VERSIONS
from ditac_timm.surgery import ROLES
from ditac_timm.training.errors import UsageError, as_typed, suggestion


class Unsupported(NamedTuple):
    """A timm flag that is refused unless it keeps timm's default, so that recipes that spell defaults out still run."""

    flag: str
    default: Any
    reason: str
    aliases: tuple[str, ...] = ()

    @property
    def dest(self) -> str:
        """The flag's name in the parsed namespace."""
        return self.flag.removeprefix("--").replace("-", "_")


_NAFLEX = "NaFlex loaders feed patches, which only NaFlex models take"
_SIZES = "training at scheduled resolutions is not part of this script; give one --img-size"
_SCRIPT = "DiTAC's operators are not scriptable; use --torchcompile"

UNSUPPORTED_IN_TRAIN = (
    Unsupported("--torchscript", False, _SCRIPT),
    Unsupported("--fuser", "", "it chooses a TorchScript fuser; use --torchcompile"),
    Unsupported("--device-modules", None, "only devices that torch itself provides are supported"),
    Unsupported("--synchronize-step", False, "losses are read at log intervals, and no step waits for the device"),
    Unsupported("--save-images", False, "only checkpoints and the summary are written"),
    Unsupported("--tta", 0, "the loaders make no oversampled views to average"),
    Unsupported("--train-img-sizes", None, _SIZES),
    Unsupported("--train-batch-sizes", None, _SIZES),
    Unsupported("--train-size-probs", None, _SIZES),
    Unsupported("--train-size-schedule", "constant", _SIZES),
    Unsupported("--train-size-schedule-spread", 0.65, _SIZES),
    Unsupported("--train-size-random-mix", 0.1, _SIZES),
    Unsupported("--train-batches-per-epoch", None, _SIZES, ("--train-steps-per-epoch",)),
    Unsupported("--variable-batch-loss-scale", "none", _SIZES),
    Unsupported("--naflex-loader", False, _NAFLEX),
    Unsupported("--naflex-train-seq-lens", [128, 256, 576, 784, 1024], _NAFLEX),
    Unsupported("--naflex-max-seq-len", 576, _NAFLEX),
    Unsupported("--naflex-patch-sizes", None, _NAFLEX),
    Unsupported("--naflex-patch-size-probs", None, _NAFLEX),
    Unsupported("--naflex-loss-scale", "linear", _NAFLEX),
    Unsupported("--naflex-patchify-channels-first", False, _NAFLEX),
)

UNSUPPORTED_IN_VALIDATE = (
    Unsupported("--torchscript", False, _SCRIPT),
    Unsupported("--aot-autograd", False, "it needs functorch's old fusion; use --torchcompile"),
    Unsupported("--fuser", "", "it chooses a TorchScript fuser; use --torchcompile"),
    Unsupported("--num-gpu", 1, "one process drives one GPU; start several with torchrun"),
    Unsupported("--tf-preprocessing", False, "it needs TensorFlow's image operators"),
    Unsupported("--real-labels", "", "only the labels of the dataset itself are scored"),
    Unsupported("--valid-labels", "", "all of the model's classes are scored; use --class-map"),
    Unsupported("--retry", False, "a batch too large is an error; give a smaller --batch-size"),
    Unsupported("--metrics-avg", None, "top-1, top-5 and loss are the metrics here"),
    Unsupported("--naflex-loader", False, _NAFLEX),
    Unsupported("--naflex-max-seq-len", 576, _NAFLEX),
)

# Names that recipes of older versions of timm hold: what they said by default, and what to give instead.
FORMER_FLAGS: dict[str, tuple[Any, str]] = {
    "apex_amp": (False, "give amp: true"),
    "native_amp": (False, "give amp: true"),
    "amp_impl": ("native", "give amp: true"),
    "aot_autograd": (False, "give torchcompile: inductor"),
    "jsd": (False, "give jsd_loss: true"),
    "bn_tf": (False, "give bn_momentum: 0.01 and bn_eps: 0.001"),
    "num_gpu": (1, "start one process for each GPU with torchrun"),
}

# The flags that mean nothing without a teacher, and their defaults.
DISTILLATION_DEFAULTS: dict[str, Any] = {
    "kd_distill_type": "logit",
    "kd_loss_type": "kl",
    "distill_loss_weight": None,
    "task_loss_weight": None,
    "kd_temperature": 4.0,
    "kd_student_feature_dim": None,
    "kd_teacher_feature_dim": None,
    "kd_token_distill_type": "soft",
}

# timm's types of datasets, in --dataset TYPE/NAME, and what reads them.
_DATASET_MODULES: dict[str, tuple[str, ...]] = {
    "wds": ("webdataset",),
    "hfds": ("datasets",),
    "hfids": ("datasets",),
    "tfds": ("tensorflow", "tensorflow_datasets"),
    "torch": (),
}

# Checked here and not by argparse, which checks neither choices nor ranges of what a YAML file says.
_INTERPOLATIONS = ("", "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_CHOICES: dict[str, Collection[str | None]] = {
    "amp_dtype": ("float16", "bfloat16"),
    "model_dtype": (None, "", "float32", "float16", "bfloat16"),
    "interpolation": (None, *_INTERPOLATIONS),
    "train_interpolation": (None, "random", *_INTERPOLATIONS),
    "clip_mode": ("norm", "value", "agc"),
    "mixup_mode": ("batch", "pair", "elem"),
    "remode": ("const", "rand", "pixel"),
    "dist_bn": ("", "reduce", "broadcast"),
    "worker_seeding": ("all", "part"),
    "lr_base_scale": ("", "linear", "sqrt"),
    "eval_metric": ("top1", "top5", "loss"),
    "results_format": (None, "csv", "json"),
    "ditac_version": (None, *VERSIONS),
    "ditac_init": (None, "match", "identity", "prior"),
    "kd_distill_type": ("logit", "feature", "token"),
    "kd_loss_type": ("kl",),
    "kd_token_distill_type": ("soft", "hard"),
    "sched": ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "plateau", "constant", "none"),
}

# What a value must be, in words and as a test; a value that is not given is not tested.
_Rule = tuple[str, Callable[[Any], bool]]
_COUNT: _Rule = ("a whole number of at least 1", lambda value: isinstance(value, int) and value >= 1)
_NOT_NEGATIVE: _Rule = ("at least 0", lambda value: value >= 0)
_POSITIVE: _Rule = ("above 0", lambda value: value > 0)
_SHARE: _Rule = ("from 0 to 1", lambda value: 0 <= value <= 1)
_BELOW_ONE: _Rule = ("at least 0 and below 1", lambda value: 0 <= value < 1)
_FACTOR: _Rule = ("a finite number of at least 0", lambda value: 0 <= value < math.inf)
_DOMAIN: _Rule = (
    "two finite numbers, the smaller one first",
    lambda ends: (
        len(ends) == 2
        and all(isinstance(end, int | float) and math.isfinite(end) for end in ends)
        and ends[0] < ends[1]
    ),
)
_RULES: dict[str, _Rule] = {
    "batch_size": _COUNT,
    "validation_batch_size": _COUNT,
    "grad_accum_steps": _COUNT,
    "epochs": _COUNT,
    "log_interval": _COUNT,
    "log_freq": _COUNT,
    "val_interval": _COUNT,
    "checkpoint_hist": _COUNT,
    "recovery_interval": _NOT_NEGATIVE,
    "nan_patience": _NOT_NEGATIVE,
    "max_bad_images": _NOT_NEGATIVE,
    "num_classes": _COUNT,
    "img_size": _COUNT,
    "in_chans": _COUNT,
    "opset": ("a whole number of at least 18", lambda value: value >= 18),
    "workers": _NOT_NEGATIVE,
    "seed": _NOT_NEGATIVE,
    "crop_pct": _POSITIVE,
    "kd_student_feature_dim": _COUNT,
    "kd_teacher_feature_dim": _COUNT,
    "kd_temperature": _POSITIVE,
    "distill_loss_weight": _NOT_NEGATIVE,
    "task_loss_weight": _NOT_NEGATIVE,
    "drop": _SHARE,
    "drop_connect": _SHARE,
    "drop_path": _SHARE,
    "drop_block": _SHARE,
    "reprob": _SHARE,
    "hflip": _SHARE,
    "vflip": _SHARE,
    "color_jitter_prob": _SHARE,
    "grayscale_prob": _SHARE,
    "gaussian_blur_prob": _SHARE,
    "mixup_prob": _SHARE,
    "mixup_switch_prob": _SHARE,
    "smoothing": _BELOW_ONE,
    "ditac_cells": ("a whole number of at least 2", lambda value: isinstance(value, int) and value >= 2),
    "ditac_domain": _DOMAIN,
    "ditac_roles": (
        f"among {', '.join(ROLES)}",
        lambda roles: bool(roles) and all(role in list(ROLES) for role in roles),
    ),
    "ditac_lr_scale": _FACTOR,
    "ditac_reg": _FACTOR,
}

# What the flags about DiTAC say by default, so that a model without it is not refused.
_DITAC_DEFAULTS: dict[str, Any] = {
    "ditac_version": None,
    "ditac_init": None,
    "ditac_domain": None,
    "ditac_cells": None,
    "ditac_roles": None,
    "ditac_lr_scale": 1.0,
    "ditac_reg": 0.0,
}


def check_train_flags(args: argparse.Namespace) -> None:
    """Refuse flags of `train.py` that cannot work, or cannot work together."""
    _check_each(args)
    opt = args.opt.lower().removeprefix("lookahead_")
    known = [str(name) for name in list_optimizers()]
    if opt not in known:
        raise UsageError(f"--opt {args.opt} is no timm optimizer{suggestion(opt, known)}")
    if opt.startswith("kron") and importlib.util.find_spec("opt_einsum") is None:
        # Without, torch multiplies the factors of a convolution in the order given: gigabytes for the smallest.
        raise UsageError(f"--opt {args.opt} needs opt_einsum, which is not installed: pip install opt_einsum")
    _check_augmentation(args)
    _check_ditac(args)
    _check_distillation(args)
    _check_logging(args)
    if args.sync_bn and not args.device.startswith("cuda"):
        raise UsageError(f"--sync-bn works on CUDA devices only, and --device is {args.device}: leave it out")
    if args.sync_bn and args.split_bn:
        raise UsageError("--sync-bn and --split-bn exclude each other: give one")
    if args.sched == "plateau" and args.sched_on_updates:
        raise UsageError("--sched plateau steps on epochs: leave --sched-on-updates out")
    if args.pretrained_path and not args.pretrained:
        raise UsageError("--pretrained-path needs --pretrained")
    if args.drop_connect is not None and args.drop_path is not None:
        raise UsageError("--drop-connect is the former name of --drop-path: give --drop-path only")


def check_validate_flags(args: argparse.Namespace) -> None:
    """Refuse flags of `validate.py` that cannot work, or cannot work together."""
    _check_each(args)
    if not args.model and not args.checkpoint:
        raise UsageError("nothing to evaluate: give --checkpoint PATH, or --model NAME --pretrained")
    if args.checkpoint and args.pretrained:
        raise UsageError("--checkpoint and --pretrained name two sets of weights: give one")
    if args.use_ema and not args.checkpoint:
        raise UsageError("--use-ema needs --checkpoint")
    folder = os.path.dirname(os.path.abspath(args.results_file))
    if args.results_file and not os.path.isdir(folder):
        raise UsageError(f"--results-file {args.results_file}: there is no folder {folder}")


def check_export_flags(args: argparse.Namespace) -> None:
    """Refuse flags of `export.py` that cannot work, or cannot work together."""
    _check_values(args)
    if not args.model and not args.checkpoint:
        raise UsageError("nothing to export: give --checkpoint PATH, or --model NAME")
    if args.checkpoint and args.pretrained:
        raise UsageError("--checkpoint and --pretrained name two sets of weights: give one")
    if args.use_ema and not args.checkpoint:
        raise UsageError("--use-ema needs --checkpoint")
    folder = os.path.dirname(os.path.abspath(args.output))
    if not os.path.isdir(folder):
        raise UsageError(f"--output {args.output}: there is no folder {folder}")
    if os.path.isdir(args.output):
        raise UsageError(f"--output {args.output} is a folder: name a file in it")


def _check_each(args: argparse.Namespace) -> None:
    """Refuse values that are wrong by themselves."""
    _check_values(args)
    if args.amp and args.model_dtype not in (None, "", "float32"):
        raise UsageError(f"--amp keeps float32 weights: leave --model-dtype {args.model_dtype} out")
    _check_compilation(args)
    if args.skip_bad_images and is_distributed_env():
        raise UsageError("--skip-bad-images would miscount in several processes: validate in one")
    _check_dataset(args)


def _check_values(args: argparse.Namespace) -> None:
    for name, choices in _CHOICES.items():
        if getattr(args, name, next(iter(choices))) not in choices:
            allowed = ", ".join(choice or "''" for choice in choices if choice is not None)
            raise UsageError(f"{_flag(name)} must be one of {allowed}, not {getattr(args, name)}")
    for name, (wanted, fits) in _RULES.items():
        value = getattr(args, name, None)
        if value is not None and not fits(value):
            raise UsageError(f"{_flag(name)} must be {wanted}, not {as_typed(value)}")


def _check_dataset(args: argparse.Namespace) -> None:
    kind, slash, name = args.dataset.partition("/")
    kind = kind.lower()
    if args.dataset and (kind not in _DATASET_MODULES or not slash or not (name or kind == "wds")):
        known = ", ".join(f"{known}/NAME" for known in _DATASET_MODULES)
        raise UsageError(f"--dataset {args.dataset} is none of {known}: leave it out for folders and tars")
    if kind in ("", "wds", "torch") and not args.data_dir:
        raise UsageError("--data-dir is missing: give the folder that holds the images")
    if kind in ("", "torch") and args.target_key:
        raise UsageError("--target-key names a field of wds/, hfds/, hfids/ and tfds/ data: leave it out")
    for module in _DATASET_MODULES.get(kind, ()):
        _check_installed(f"--dataset {args.dataset}", module)


def _check_installed(flag: str, module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        package = module.replace("_", "-")
        raise UsageError(f"{flag} needs {module}, which is not installed: pip install {package}") from error


def _check_compilation(args: argparse.Namespace) -> None:
    if args.torchcompile:
        known = torch.compiler.list_backends(exclude_tags=())
        if args.torchcompile not in known:
            near = suggestion(args.torchcompile, known)
            raise UsageError(f"--torchcompile {args.torchcompile} is no backend of torch.compile{near}")
    if args.torchcompile_mode:
        modes = list(torch._inductor.list_mode_options())
        if args.torchcompile_mode not in modes:
            raise UsageError(f"--torchcompile-mode must be one of {', '.join(modes)}, not {args.torchcompile_mode}")


def _check_augmentation(args: argparse.Namespace) -> None:
    try:
        create_transform(224, is_training=True, auto_augment=args.aa)
    except (AssertionError, LookupError, ValueError) as error:
        raise UsageError(
            f"--aa {args.aa} is no policy of timm: give one such as rand-m9-mstd0.5-inc1, augmix-m3-w3, original or v0"
        ) from error
    mixup = mixup_is_on(args)
    if mixup and args.batch_size % 2:
        raise UsageError(f"--mixup and --cutmix pair images: --batch-size must be even, not {args.batch_size}")
    if args.aug_splits == 1:
        raise UsageError("--aug-splits must be 0, or 2 and more, not 1")
    if args.aug_splits and mixup:
        raise UsageError("--aug-splits does not go with --mixup and --cutmix: give one")
    if args.aug_splits and (args.no_aug or args.no_prefetcher):
        raise UsageError("--aug-splits needs augmentation and prefetching: leave --no-aug and --no-prefetcher out")
    if args.jsd_loss and not args.aug_splits:
        raise UsageError("--jsd-loss compares augmentation splits: give --aug-splits 2 or more")
    if args.jsd_loss and args.bce_loss:
        raise UsageError("--jsd-loss and --bce-loss are two losses: give one")
    if args.split_bn and not (args.aug_splits or args.resplit):
        raise UsageError("--split-bn needs --aug-splits 2 or more, or --resplit")
    if args.aug_repeats and not is_distributed_env():
        raise UsageError("--aug-repeats spreads views over processes: start several with torchrun, or leave it out")


def _check_ditac(args: argparse.Namespace) -> None:
    given = [name for name, default in _DITAC_DEFAULTS.items() if getattr(args, name) != default]
    architecture = args.model.partition(".")[0]
    # Of a name that timm does not know (a folder, the Hub, NAME_ditac) the model itself will tell.
    if given and is_model(architecture) and not is_model_in_modules(architecture, "ditac_zoo"):
        raise UsageError(
            f"{_flag(given[0])} is about DiTAC, and --model {args.model} has none: give --model {architecture}_ditac"
        )
    if args.ditac_lr_scale != 1 and args.sched == "none":
        raise UsageError("--sched none takes no account of --ditac-lr-scale: give --sched constant")


def _check_distillation(args: argparse.Namespace) -> None:
    if args.kd_model_name is None:
        for name, default in DISTILLATION_DEFAULTS.items():
            if getattr(args, name) != default:
                raise UsageError(f"{_flag(name)} needs a teacher: give --kd-model-name")
    if args.distill_loss_weight is None and (args.task_loss_weight or 0) > 1:
        raise UsageError(
            f"--task-loss-weight {args.task_loss_weight} leaves distillation one minus it, which is below 0: "
            "give --distill-loss-weight too"
        )


def _check_logging(args: argparse.Namespace) -> None:
    if args.wandb_resume_id and not args.log_wandb:
        raise UsageError("--wandb-resume-id needs --log-wandb")
    if args.wandb_resume_id and not args.resume:
        raise UsageError("--wandb-resume-id continues a run of Weights & Biases: give --resume too")
    for asked, flag, module in (
        (args.log_wandb, "--log-wandb", "wandb"),
        (args.log_tensorboard, "--log-tensorboard", "tensorboard"),
    ):
        if asked:
            _check_installed(flag, module)


def mixup_is_on(args: argparse.Namespace) -> bool:
    """Whether training targets are soft, from mixup or cutmix."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def _flag(dest: str) -> str:
    return "--" + dest.replace("_", "-")
