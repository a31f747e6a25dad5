"""The command lines of the scripts: timm's flags, with timm's names, defaults and meaning."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from timm.utils import ParseKwargs

from ditac_timm.training.errors import UsageError, suggestion
from ditac_timm.training.refusals import (
    DISTILLATION_DEFAULTS,
    FORMER_FLAGS,
    UNSUPPORTED_IN_TRAIN,
    UNSUPPORTED_IN_VALIDATE,
    Unsupported,
)

_logger = logging.getLogger(__name__)


class _Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse would print its usage, which for so many flags hides the one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def train_parser() -> argparse.ArgumentParser:
    """Build the parser of `train.py`."""
    parser = _Parser(
        prog="train.py",
        description="Train a timm model, with DiTAC or without, on images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("-c", "--config", default="", metavar="FILE", help="YAML file of defaults for the flags below")
    _add_data_flags(parser)
    _add_train_data_flags(parser)
    _add_model_flags(parser, default="resnet50")
    _add_train_model_flags(parser)
    _add_ditac_flags(parser)
    _add_device_flags(parser)
    _add_optimizer_flags(parser)
    _add_schedule_flags(parser)
    _add_augmentation_flags(parser)
    _add_norm_and_ema_flags(parser)
    _add_distillation_flags(parser)
    _add_run_flags(parser)
    _add_unsupported(parser, UNSUPPORTED_IN_TRAIN)
    return parser


def validate_parser() -> argparse.ArgumentParser:
    """Build the parser of `validate.py`."""
    parser = _Parser(
        prog="validate.py",
        description="Evaluate a checkpoint or a pretrained timm model on images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_data_flags(parser)
    _add_model_flags(parser, default=None)
    _add_device_flags(parser)
    add = parser.add_argument_group("Evaluation").add_argument
    add("--split", "--val-split", default="validation", metavar="NAME", help="dataset split")
    add("--num-samples", type=int, metavar="N", help="images in the split, for iterable datasets")
    add("--checkpoint", default="", metavar="PATH", help="a checkpoint, or a run's folder for its last.pth.tar")
    add("--use-ema", action="store_true", help="evaluate the checkpoint's averaged weights")
    add("-b", "--batch-size", type=int, default=256, metavar="N", help="images a batch")
    add("--use-train-size", action="store_true", help="a pretrained model's training size, not its test size")
    add("--crop-mode", metavar="MODE", help="squash, border or center; the model's own if not given")
    add("--crop-border-pixels", type=int, metavar="N", help="pixels to cut from the image's border")
    add("--test-pool", action="store_true", help="pool at test time where the input is larger than in training")
    add("--reparam", action="store_true", help="fuse the model for deployment first")
    add("--log-freq", type=int, default=10, metavar="N", help="batches between log lines")
    add("--results-file", default="", metavar="FILE", help="write the results there, as csv or json by its extension")
    add("--results-format", metavar="FORMAT", help="csv or json, whatever the extension")
    _add_unsupported(parser, UNSUPPORTED_IN_VALIDATE)
    return parser


def export_parser() -> argparse.ArgumentParser:
    """Build the parser of `export.py`."""
    parser = _Parser(
        prog="export.py",
        description="Write a model as ONNX, with its activations frozen, and compare it with PyTorch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("Model").add_argument
    add("-m", "--model", metavar="NAME", help="any name that train.py takes; a checkpoint's own if not given")
    add("--checkpoint", default="", metavar="PATH", help="a checkpoint, or a run's folder for its last.pth.tar")
    add("--use-ema", action="store_true", help="the checkpoint's averaged weights")
    add("--pretrained", action="store_true", help="without a checkpoint: pretrained weights, not initial ones")
    add("--num-classes", type=int, metavar="N", help="classes; the model's own if not given")
    add("--gp", metavar="POOL", help="global pooling: fast, avg, max, avgmax, avgmaxc")
    add("--img-size", type=int, metavar="N", help="image size; the model's own if not given")
    add("--in-chans", type=int, metavar="N", help="image channels; 3 if not given")
    add("--input-size", nargs=3, type=int, metavar="N", help="channels, height, width")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE", help="passed to the model")
    add = parser.add_argument_group("ONNX").add_argument
    add("-o", "--output", default="model.onnx", metavar="FILE", help="the file to write")
    add("--opset", type=int, metavar="N", help="version of ONNX's operators; the exporter's own if not given")
    add("-b", "--batch-size", type=int, metavar="N", help="images a batch; any number if not given")
    return parser


def parse_train_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse `train.py`'s flags; a YAML file given with -c replaces defaults, and flags override it."""
    parser = train_parser()
    # -c is read first, and separately, because what it says becomes defaults of the real parse.
    config_parser = _Parser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("-c", "--config", default="")
    config_flag, _ = config_parser.parse_known_args(argv)
    if config_flag.config:
        parser.set_defaults(**_read_config(Path(config_flag.config), parser))
    args = parser.parse_args(argv)
    del args.config  # a run's args.yaml is itself a file for -c
    if args.sched == "None":  # as published commands spell it: to timm, any name it does not know is no schedule
        args.sched = "none"
    return _checked(args, UNSUPPORTED_IN_TRAIN)


def parse_validate_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse `validate.py`'s flags."""
    return _checked(validate_parser().parse_args(argv), UNSUPPORTED_IN_VALIDATE)


def publish_parser() -> argparse.ArgumentParser:
    """Build the parser of `publish.py`."""
    parser = _Parser(
        prog="publish.py",
        description="Publish a checkpoint on the Hugging Face Hub.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="a run's checkpoint, or its folder for its last.pth.tar")
    add("--use-ema", action="store_true", help="publish the checkpoint's averaged weights")
    add("--repo-id", required=True, metavar="OWNER/NAME", help="the repository, made where missing")
    add("--revision", metavar="BRANCH", help="its branch, made where missing; main if not given")
    add("--private", action="store_true", help="make a new repository private")
    add("--results", default="", metavar="FILE", help="what validate.py --results-file wrote of these weights")
    add("--base-results", default="", metavar="FILE", help="the same of the base, to compare with")
    add("--license", metavar="NAME", help="of the weights; by default the pretrained ones', else apache-2.0")
    add("--dataset-id", metavar="ID", help="the Hub's name of the dataset, imagenet-1k for one")
    add("--replace-architecture", action="store_true", help="where the repository holds another architecture")
    add("--dry-run", metavar="DIR", help="write the files there, and publish nothing")
    return parser


def parse_publish_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse `publish.py`'s flags."""
    return publish_parser().parse_args(argv)


def parse_export_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse `export.py`'s flags."""
    return export_parser().parse_args(argv)


def _checked(args: argparse.Namespace, unsupported: Sequence[Unsupported]) -> argparse.Namespace:
    for row in unsupported:
        if getattr(args, row.dest) != row.default:
            raise UsageError(f"{row.flag} is not supported: {row.reason}")
    if args.data and args.data_dir and args.data != args.data_dir:
        raise UsageError(f"--data-dir {args.data_dir} and the positional {args.data} name two folders: give one")
    args.data_dir = args.data_dir or args.data
    args.data = None
    return args


def _read_config(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise UsageError(f"--config {path} must hold flags as `name: value` lines")
    former = [name for name in config if name in FORMER_FLAGS]
    for name in former:
        default, advice = FORMER_FLAGS[name]
        if (value := config.pop(name)) and value != default:
            raise UsageError(f"--config {path}: {name} is no flag any more: {advice}")
    if former:
        _logger.info(f"--config {path}: {', '.join(former)} ask for nothing, and are flags of older versions of timm.")
    actions = {action.dest: action for action in parser._actions}
    for name, value in config.items():
        if name not in actions:
            raise UsageError(f"--config {path}: unknown flag {name!r}{suggestion(str(name), actions)}")
        kind = _kind(actions[name])
        if value is not None and kind and not isinstance(value, kind[1]):
            raise UsageError(f"--config {path}: {name} must be {kind[0]}, not {value!r}")
    return config


def _kind(action: argparse.Action) -> tuple[str, tuple[type, ...]] | None:
    """What a YAML file may give for a flag, in words and types; None where argparse itself will see."""
    if action.help == argparse.SUPPRESS:
        return None
    if isinstance(action, ParseKwargs):
        return "a mapping", (dict,)
    if action.nargs == 0:
        return "true or false", (bool,)
    if action.nargs not in (None, "?"):
        return "a list", (list, tuple)
    if action.type is None:
        return "text", (str,)
    return "a number", (int, float, str)  # argparse turns text into the flag's type, 1e-3 for one


def _add_unsupported(parser: argparse.ArgumentParser, table: Sequence[Unsupported]) -> None:
    # Parsed and not merely rejected: a recipe that states timm's default (`torchscript: false`) asks for nothing.
    for row in table:
        # Any number of values, because some of timm's flags without a default take several.
        kind: dict[str, Any] = {"nargs": "*"} if row.default is None or isinstance(row.default, list) else {}
        if row.default is False:
            kind = {"action": "store_true"}
        elif isinstance(row.default, int | float):
            kind = {"type": float}
        parser.add_argument(row.flag, *row.aliases, dest=row.dest, default=row.default, help=argparse.SUPPRESS, **kind)


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="?", metavar="DIR", help="the dataset's folder (deprecated, use --data-dir)")
    add = parser.add_argument_group("Dataset").add_argument
    add("--data-dir", metavar="DIR", help="the dataset's folder")
    add("--dataset", default="", metavar="NAME", help="type/name for wds, hfds, hfids, tfds, torch; folder if empty")
    add("--dataset-download", action="store_true", help="allow torch/ and tfds/ datasets to be downloaded")
    add("--dataset-trust-remote-code", action="store_true", help="allow a Hugging Face dataset to run its own code")
    add("--class-map", default="", metavar="FILE", help="file that maps class names to indices")
    add("--input-img-mode", metavar="MODE", help="image mode, by the model's channels if not given")
    add("--input-key", metavar="KEY", help="the dataset's key for images")
    add("--target-key", metavar="KEY", help="the dataset's key for labels")
    add("-j", "--workers", type=int, default=4, metavar="N", help="processes that load data")
    add("--pin-mem", action="store_true", help="pin host memory, for faster copies to a GPU")
    add("--skip-bad-images", action="store_true", help="leave images that do not decode out of validation")
    add("--no-prefetcher", action="store_true", help="normalise on the CPU, without the prefetching loader")


def _add_train_data_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Training data").add_argument
    add("--train-split", default="train", metavar="NAME", help="training split")
    add("--val-split", default="validation", metavar="NAME", help="validation split; empty for no validation")
    add("--train-num-samples", type=int, metavar="N", help="images in the training split, for iterable datasets")
    add("--val-num-samples", type=int, metavar="N", help="images in the validation split, for iterable datasets")
    add("-b", "--batch-size", type=int, default=128, metavar="N", help="images a batch and process")
    add("-vb", "--validation-batch-size", type=int, metavar="N", help="images a validation batch; --batch-size if not")
    add("--epoch-repeats", type=float, default=0.0, metavar="N", help="passes over an iterable dataset an epoch")
    add("--use-multi-epochs-loader", action="store_true", help="workers live on between epochs, as always here")
    add("--max-bad-images", type=int, default=10, metavar="N", help="images that may not decode, in each process")
    add("--worker-seeding", default="all", metavar="MODE", help="all or part")


def _add_model_flags(parser: argparse.ArgumentParser, default: str | None) -> None:
    add = parser.add_argument_group("Model").add_argument
    add(
        "-m",
        "--model",
        default=default,
        metavar="NAME",
        help="a timm architecture, a DiTAC variant, or ARCHITECTURE_ditac",
    )
    add("--pretrained", action="store_true", help="start from pretrained weights")
    add("--num-classes", type=int, metavar="N", help="classes; the model's own if not given")
    add("--gp", metavar="POOL", help="global pooling: fast, avg, max, avgmax, avgmaxc")
    add("--img-size", type=int, metavar="N", help="image size; the model's own if not given")
    add("--in-chans", type=int, metavar="N", help="image channels; 3 if not given")
    add("--input-size", nargs=3, type=int, metavar="N", help="channels, height, width")
    add("--crop-pct", type=float, metavar="N", help="share of the image that validation's centre crop keeps")
    add("--mean", type=float, nargs="+", metavar="MEAN", help="mean pixel value")
    add("--std", type=float, nargs="+", metavar="STD", help="standard deviation of pixel values")
    add("--interpolation", default="", metavar="NAME", help="how images are resized")
    add("--channels-last", action="store_true", help="channels_last memory layout")
    add("--fast-norm", action="store_true", help="timm's fast normalisation layers")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE", help="passed to the model")
    add("--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile, inductor if not named")
    add("--torchcompile-mode", metavar="MODE", help="torch.compile's mode")


def _add_train_model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Training model").add_argument
    add("--pretrained-path", metavar="FILE", help="with --pretrained: weights to use as the pretrained ones")
    add("--initial-checkpoint", default="", metavar="PATH", help="load these weights into the finished model")
    add("--resume", default="", metavar="PATH", help="continue a run with its own weights: its checkpoint or folder")
    add("--no-resume-opt", action="store_true", help="resume without the optimizer's state")
    add("--grad-accum-steps", type=int, default=1, metavar="N", help="batches an update")
    add("--grad-checkpointing", action="store_true", help="recompute activations to save memory")
    add("--head-init-scale", type=float, metavar="SCALE", help="multiply the head's initial weights")
    add("--head-init-bias", type=float, metavar="BIAS", help="the head's initial bias")


def _add_ditac_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("DiTAC").add_argument
    add("--ditac-version", metavar="NAME", help="ditac, ge, leaky or inf; the model's own if not given")
    add("--ditac-init", metavar="NAME", help="match (the activation replaced), identity or prior")
    add(
        "--ditac-domain", nargs=2, type=float, metavar=("A", "B"), help="ends of its domain; the version's if not given"
    )
    add("--ditac-cells", type=int, metavar="N", help="cells of the tessellation; theta has one number less")
    add("--ditac-roles", nargs="+", metavar="ROLE", help="activations to replace: main, glu, se, pos, kernel, gate")
    add("--ditac-lr-scale", type=float, default=1.0, metavar="SCALE", help="thetas' learning rate over the others'")
    add("--ditac-reg", type=float, default=0.0, metavar="LAMBDA", help="weight of the smoothness prior on thetas")


def _add_device_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Device").add_argument
    add("--device", metavar="DEVICE", help="cuda where there is one, else cpu")
    add("--amp", action="store_true", help="mixed precision")
    add("--amp-dtype", default="float16", metavar="DTYPE", help="float16 or bfloat16")
    add("--model-dtype", metavar="DTYPE", help="float32, float16 or bfloat16 weights, without --amp")
    add("--seed", type=int, default=42, metavar="S", help="random seed")
    add("--local-rank", "--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # torchrun's variable rules


def _add_optimizer_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Optimizer").add_argument
    add("--opt", default="sgd", metavar="NAME", help="any timm optimizer")
    add("--opt-eps", type=float, metavar="EPS", help="the optimizer's own if not given")
    add("--opt-betas", type=float, nargs="+", metavar="BETA", help="the optimizer's own if not given")
    add("--momentum", type=float, default=0.9, metavar="M", help="momentum")
    add("--weight-decay", type=float, default=2e-5, metavar="WD", help="weight decay")
    add("--clip-grad", type=float, metavar="NORM", help="clip gradients; not clipped if not given")
    add("--clip-mode", default="norm", metavar="MODE", help="norm, value or agc")
    add("--layer-decay", type=float, metavar="DECAY", help="layer-wise learning rate decay")
    add("--layer-decay-min-scale", type=float, default=0.0, metavar="SCALE", help="smallest layer-wise scale")
    add("--layer-decay-no-opt-scale", type=float, metavar="SCALE", help="layers of a smaller scale are not trained")
    add("--opt-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE", help="passed to the optimizer")


def _add_schedule_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Learning rate schedule").add_argument
    add(
        "--sched",
        default="cosine",
        metavar="NAME",
        help="cosine, tanh, step, multistep, poly, wsd, rsqrt, plateau, constant or none",
    )
    add("--sched-on-updates", action="store_true", help="step the schedule each update, not each epoch")
    add("--lr", type=float, metavar="LR", help="learning rate; from --lr-base if not given")
    add("--lr-base", type=float, default=0.1, metavar="LR", help="learning rate for --lr-base-size images an update")
    add("--lr-base-size", type=int, default=256, metavar="N", help="images an update that --lr-base is for")
    add("--lr-base-scale", default="", metavar="SCALE", help="linear or sqrt; by the optimizer if empty")
    add("--lr-noise", type=float, nargs="+", metavar="PCT", help="shares of the run between which lr is noisy")
    add("--lr-noise-pct", type=float, default=0.67, metavar="PCT", help="limit of the noise")
    add("--lr-noise-std", type=float, default=1.0, metavar="STD", help="standard deviation of the noise")
    add("--lr-cycle-mul", type=float, default=1.0, metavar="MULT", help="cycle length multiplier")
    add("--lr-cycle-decay", type=float, default=0.5, metavar="MULT", help="learning rate decay each cycle")
    add("--lr-cycle-limit", type=int, default=1, metavar="N", help="cycles")
    add("--lr-k-decay", type=float, default=1.0, metavar="K", help="k-decay of cosine and poly")
    add("--warmup-lr", type=float, default=1e-5, metavar="LR", help="learning rate the warmup starts from")
    add("--min-lr", type=float, default=0.0, metavar="LR", help="smallest learning rate")
    add("--epochs", type=int, default=300, metavar="N", help="epochs, cooldown not counted")
    add("--start-epoch", type=int, metavar="N", help="first epoch, whatever a checkpoint says")
    add("--decay-milestones", type=int, nargs="+", default=[90, 180, 270], metavar="N", help="multistep's epochs")
    add("--decay-epochs", type=float, default=90, metavar="N", help="epochs between step's decays, or of wsd's decay")
    add("--warmup-epochs", type=int, default=5, metavar="N", help="epochs of warmup")
    add("--warmup-prefix", action="store_true", help="warm up before the schedule begins, not within it")
    add("--cooldown-epochs", type=int, default=0, metavar="N", help="epochs at the smallest learning rate at the end")
    add("--patience-epochs", type=int, default=10, metavar="N", help="plateau's patience")
    add("--decay-rate", "--dr", type=float, default=0.1, metavar="RATE", help="factor of a decay, or poly's power")


def _add_augmentation_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Augmentation and regularisation").add_argument
    add("--no-aug", action="store_true", help="no training augmentation at all")
    add("--train-crop-mode", metavar="MODE", help="training crop: rrc, rkrc or rkrr")
    add("--scale", type=float, nargs="+", default=[0.08, 1.0], metavar="PCT", help="random crop's share of the image")
    add("--ratio", type=float, nargs="+", default=[3 / 4, 4 / 3], metavar="RATIO", help="random crop's aspect ratio")
    add("--hflip", type=float, default=0.5, metavar="P", help="probability of a horizontal flip")
    add("--vflip", type=float, default=0.0, metavar="P", help="probability of a vertical flip")
    add("--color-jitter", type=float, default=0.4, metavar="FACTOR", help="colour jitter")
    add("--color-jitter-prob", type=float, metavar="P", help="probability of any colour jitter")
    add("--grayscale-prob", type=float, metavar="P", help="probability of a grey image")
    add("--gaussian-blur-prob", type=float, metavar="P", help="probability of blur")
    add("--aa", metavar="POLICY", help="AutoAugment, RandAugment or AugMix, as timm writes them")
    add("--aug-repeats", type=float, default=0, metavar="N", help="views of an image an epoch, over several processes")
    add("--aug-splits", type=int, default=0, metavar="N", help="augmentation splits: 0, or 2 and more")
    add("--jsd-loss", action="store_true", help="Jensen-Shannon divergence and cross entropy over --aug-splits")
    add("--bce-loss", action="store_true", help="binary cross entropy")
    add("--bce-sum", action="store_true", help="sum binary cross entropy over classes")
    add("--bce-target-thresh", type=float, metavar="T", help="make soft targets binary at this threshold")
    add("--bce-pos-weight", type=float, metavar="W", help="weight of positive targets")
    add("--reprob", type=float, default=0.0, metavar="P", help="probability of random erasing")
    add("--remode", default="pixel", metavar="MODE", help="random erasing: const, rand or pixel")
    add("--recount", type=int, default=1, metavar="N", help="regions to erase")
    add("--resplit", action="store_true", help="do not erase in the first augmentation split")
    add("--mixup", type=float, default=0.0, metavar="ALPHA", help="mixup, off at 0")
    add("--cutmix", type=float, default=0.0, metavar="ALPHA", help="cutmix, off at 0")
    add("--cutmix-minmax", type=float, nargs="+", metavar="RATIO", help="cutmix's smallest and largest ratio")
    add("--mixup-prob", type=float, default=1.0, metavar="P", help="probability of mixup or cutmix")
    add("--mixup-switch-prob", type=float, default=0.5, metavar="P", help="probability of cutmix, where both are on")
    add("--mixup-mode", default="batch", metavar="MODE", help="batch, pair or elem")
    add("--mixup-off-epoch", type=int, default=0, metavar="N", help="no mixup from this epoch on, 0 for never")
    add("--smoothing", type=float, default=0.1, metavar="S", help="label smoothing")
    add("--train-interpolation", default="random", metavar="NAME", help="random, bilinear or bicubic")
    add("--drop", type=float, default=0.0, metavar="P", help="dropout")
    add("--drop-connect", type=float, metavar="P", help="former name of --drop-path")
    add("--drop-path", type=float, metavar="P", help="stochastic depth")
    add("--drop-block", type=float, metavar="P", help="DropBlock")


def _add_norm_and_ema_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Batch norm").add_argument
    add("--bn-momentum", type=float, metavar="M", help="the model's own if not given")
    add("--bn-eps", type=float, metavar="EPS", help="the model's own if not given")
    add("--sync-bn", action="store_true", help="synchronised batch norm, on GPUs")
    add("--dist-bn", default="reduce", metavar="HOW", help="statistics of several processes: reduce, broadcast or ''")
    add("--split-bn", action="store_true", help="a batch norm for each augmentation split")
    add("--no-ddp-bb", action="store_true", help="processes do not broadcast buffers")
    add = parser.add_argument_group("Weight averaging").add_argument
    add("--model-ema", action="store_true", help="keep a moving average of the weights")
    add("--model-ema-force-cpu", action="store_true", help="keep it on the CPU, without validating it")
    add("--model-ema-decay", type=float, default=0.9998, metavar="DECAY", help="its decay")
    add("--model-ema-warmup", action="store_true", help="warm its decay up")


def _add_distillation_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Knowledge distillation").add_argument
    add("--kd-model-name", metavar="NAME", help="the teacher, pretrained: any name that --model takes")
    add("--kd-distill-type", metavar="TYPE", help="what is learned of it: logit, feature or token")
    add("--kd-loss-type", metavar="LOSS", help="between logits: kl")
    add("--distill-loss-weight", type=float, metavar="W", help="1, or 1 - TASK where only --task-loss-weight is given")
    add("--task-loss-weight", type=float, metavar="TASK", help="weight of the loss on labels, 1 if not given")
    add("--kd-temperature", type=float, metavar="T", help="of the softmax on both sides")
    add("--kd-student-feature-dim", type=int, metavar="N", help="the student's own if not given")
    add("--kd-teacher-feature-dim", type=int, metavar="N", help="the teacher's own if not given")
    add("--kd-token-distill-type", metavar="TYPE", help="soft, or hard for the teacher's best class")
    parser.set_defaults(**DISTILLATION_DEFAULTS)


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Run").add_argument
    add("--output", default="", metavar="DIR", help="folder of runs, ./output/train if empty")
    add("--experiment", default="", metavar="NAME", help="the run's folder in it; time, model and size if empty")
    add("--log-interval", type=int, default=50, metavar="N", help="updates between log lines")
    add("--val-interval", type=int, default=1, metavar="N", help="epochs between validations and checkpoints")
    add(
        "--recovery-interval", type=int, default=0, metavar="N", help="updates between checkpoints in an epoch, 0: none"
    )
    add("--nan-patience", type=int, default=0, metavar="N", help="losses in a row that may be not finite")
    add("--checkpoint-hist", type=int, default=10, metavar="N", help="best checkpoints to keep")
    add("--eval-metric", default="top1", metavar="NAME", help="what makes a checkpoint the best: top1, top5 or loss")
    add("--plot-activations", action="store_true", help="draw DiTAC's activations each epoch, not only at the end")
    add("--log-tensorboard", action="store_true", help="write TensorBoard's events into the run's folder")
    add("--log-wandb", action="store_true", help="log every epoch to Weights & Biases")
    add("--wandb-project", metavar="NAME", help="its project")
    add("--wandb-tags", default=[], nargs="+", metavar="TAG", help="its tags")
    add("--wandb-resume-id", default="", metavar="ID", help="with --resume: its run to continue")
