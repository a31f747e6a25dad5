"""The command line of `benchmark.py`: timm's flags, with timm's names, defaults and meaning, and four more."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from timm.optim import list_optimizers
from timm.utils import ParseKwargs

from ditac_timm.training.errors import UsageError, suggestion
from ditac_timm.training.refusals import Unsupported

_BENCH = {
    "both": ("infer", "train"),
    "infer": ("infer",),
    "inference": ("infer",),
    "train": ("train",),
    "profile": (),
    "op": (),
    "loop": (),
    "onnx": (),
}
# Each precision's dtype of weights and images, and of autocast.
PRECISIONS: dict[str, tuple[torch.dtype | None, torch.dtype | None]] = {
    "float32": (None, None),
    "float16": (torch.float16, None),
    "bfloat16": (torch.bfloat16, None),
    "amp": (None, torch.float16),
    "amp_bfloat16": (None, torch.bfloat16),
}
_BENCH_HELP = """both (default), infer, train, profile (counts only); op: DiTAC as operator; loop: train.py's
over a bare one; onnx: in ONNX Runtime on the CPU, every variant over its base, or a --pair"""
_COST = "it does not change what a step costs here"
UNSUPPORTED = (
    Unsupported("--model-list", "", "one call measures one model, or one pair"),
    Unsupported("--detail", False, "steps are timed whole"),
    Unsupported("--torchscript", False, "DiTAC's operators are not scriptable; use --torchcompile"),
    Unsupported("--fuser", "", "it chooses a TorchScript fuser; use --torchcompile"),
    Unsupported("--aot-autograd", False, "it needs functorch's old fusion; use --torchcompile"),
    Unsupported("--reparam", False, "models are measured as they are trained"),
    Unsupported("--opt-eps", None, _COST),
    Unsupported("--opt-betas", None, _COST),
    Unsupported("--momentum", 0.9, _COST),
    Unsupported("--weight-decay", 0.0001, _COST),
    Unsupported("--smoothing", 0.1, _COST),
    Unsupported("--clip-grad", None, "a step is forward, loss, backward and update"),
    Unsupported("--clip-mode", "norm", "a step is forward, loss, backward and update"),
)
# What a mode has no use for, by the flags' names in the namespace: giving one is a mistake.
_FIXED = ("batch_size", "img_size", "input_size", "num_classes", "gp", "use_train_size", "model_kwargs")
_OPERATOR = ("sizes", "dtypes")
_TRAINING = ("torchcompile", "channels_last", "amp", "precision", "grad_checkpointing")
_USELESS: dict[str, tuple[str, ...]] = {
    "--model": _OPERATOR,
    "--pair": ("use_train_size", *_OPERATOR),
    "--table10": (*_FIXED, *_OPERATOR),
    "--bench loop": ("use_train_size", "torchcompile", "grad_checkpointing", *_OPERATOR),
    "--bench op": (*_FIXED, *_TRAINING),
    "--bench onnx": ("use_train_size", *_TRAINING, *_OPERATOR),
}


class _Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse would print its usage, which hides the one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Build the parser."""
    result = _Parser(prog="benchmark.py", description=description, formatter_class=argparse.RawTextHelpFormatter)
    add = result.add_argument_group("What to measure").add_argument
    add("-m", "--model", metavar="NAME", help="one model (resnet50)")
    add("--pair", nargs=2, metavar=("BASE", "VARIANT"), help="two models, interleaved in one process")
    add("--table10", action="store_true", help="the paper's table 10 on this machine")
    add("--bench", metavar="MODE", help=_BENCH_HELP)
    add("--num-warm-iter", type=int, default=10, metavar="N", help="rounds that do not count (10)")
    add("--num-bench-iter", type=int, default=40, metavar="N", help="rounds that count (40)")
    add("--results-file", default="", metavar="FILE", help="write the results there, as json or csv by its extension")
    add("--results-format", metavar="FORMAT", help="csv or json, whatever the extension")
    add("--no-retry", action="store_true", help="accepted: a batch that does not fit is never retried smaller")
    add = result.add_argument_group("Models").add_argument
    add(
        "-b",
        "--batch-size",
        type=int,
        nargs="+",
        metavar="N",
        help="images a batch (256; --pair: 1 8; --bench onnx: 1), several for several; --pair trains with the largest",
    )
    add("--img-size", type=int, metavar="N", help="image size; the model's own if not given")
    add("--input-size", nargs=3, type=int, metavar="N", help="channels, height, width")
    add("--use-train-size", action="store_true", help="--model: its training size, not its test size")
    add("--num-classes", type=int, metavar="N", help="classes; the model's own if not given")
    add("--gp", metavar="POOL", help="global pooling: fast, avg, max, avgmax, avgmaxc")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE", help="passed to the model")
    add("--opt", default="sgd", metavar="NAME", help="any timm optimizer (sgd)")
    add("--drop", type=float, default=0.0, metavar="P", help="dropout")
    add("--drop-path", type=float, metavar="P", help="stochastic depth")
    add("--drop-block", type=float, metavar="P", help="DropBlock")
    add("--grad-checkpointing", action="store_true", help="recompute activations to save memory")
    add("--fast-norm", action="store_true", help="timm's fast normalisation layers")
    add("--channels-last", action="store_true", help="channels_last memory layout")
    add("--amp", action="store_true", help="mixed precision; overrides --precision")
    add("--amp-dtype", default="float16", metavar="DTYPE", help="float16 (default) or bfloat16")
    add("--precision", default="float32", metavar="NAME", help=", ".join(PRECISIONS))
    add(
        "--torchcompile",
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="torch.compile, inductor if not named; with --pair beside eager: infer at the first batch size, train",
    )
    add("--torchcompile-mode", metavar="MODE", help="torch.compile's mode")
    add = result.add_argument_group("Operators, with --bench op").add_argument
    add("--sizes", type=_size, nargs="+", metavar="N", help="elements (1e6 1e7; on CUDA 1e7 1e8)")
    add("--dtypes", nargs="+", metavar="DTYPE", help="(float32 bfloat16)")
    add = result.add_argument_group("Machine").add_argument
    add("--device", metavar="DEVICE", help="cuda where there is one, else cpu")
    add("--threads", type=int, metavar="N", help="torch's threads on the CPU (torch's default; --bench op: 1)")
    add("--seed", type=int, default=42, metavar="S", help="random seed (42)")
    for row in UNSUPPORTED:
        kind: dict[str, Any] = {"action": "store_true"} if row.default is False else {"nargs": "+"}
        if isinstance(row.default, float):
            kind = {"type": float}
        elif isinstance(row.default, str):
            kind = {}
        add(row.flag, dest=row.dest, default=row.default, help=argparse.SUPPRESS, **kind)
    result.set_defaults(in_chans=None, drop_connect=None)  # which the package's builders read and timm has not here
    return result


def parse(argv: Sequence[str] | None, description: str | None = None) -> argparse.Namespace:
    """Parse, refuse what contradicts, and fill in what the mode implies.

    `mode` becomes "--model", "--pair", "--table10", or "--bench" and "op", "loop" or "onnx"; `phases` what is
    timed: "infer", "train".
    """
    built = parser(description)
    args = built.parse_args(argv)
    for row in UNSUPPORTED:
        if getattr(args, row.dest) != row.default:
            raise UsageError(f"{row.flag} is not supported: {row.reason}")
    _check_values(args)
    modes = {
        "--model": args.model is not None and args.bench != "loop",
        "--pair": args.pair is not None and args.bench != "onnx",
        "--table10": args.table10,
        "--bench op": args.bench == "op",
        "--bench loop": args.bench == "loop",
        "--bench onnx": args.bench == "onnx",
    }
    chosen = [mode for mode, given in modes.items() if given] or ["--model"]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} are two things to measure: give one")
    (args.mode,) = chosen
    for name in _USELESS[args.mode]:
        if getattr(args, name) != built.get_default(name):
            raise UsageError(f"--{name.replace('_', '-')} means nothing to {args.mode}: leave it out")
    if args.table10 and args.bench not in (None, "infer", "inference"):
        raise UsageError(f"--table10 measures inference: leave --bench {args.bench} out")
    args.phases = _BENCH[args.bench or "both"]
    args.model = args.model or "resnet50"
    sizes = {"--pair": [1, 8], "--bench onnx": [1]}
    args.batch_size = args.batch_size or sizes.get(args.mode, [256])
    if args.amp:
        args.precision = "amp" if args.amp_dtype == "float16" else "amp_bfloat16"
    return args


def _check_values(args: argparse.Namespace) -> None:
    if args.bench is not None and args.bench not in _BENCH:
        raise UsageError(
            f"--bench must be one of {', '.join(_BENCH)}, not {args.bench}{suggestion(args.bench, _BENCH)}"
        )
    choices = {"precision": PRECISIONS, "amp_dtype": ("float16", "bfloat16"), "results_format": (None, "csv", "json")}
    for name, allowed in choices.items():
        value = getattr(args, name)
        if value not in allowed:
            listed = ", ".join(filter(None, allowed))
            raise UsageError(f"--{name.replace('_', '-')} must be one of {listed}, not {value}")
    for name in ("num_bench_iter", "batch_size", "img_size", "input_size", "num_classes", "threads", "sizes"):
        value = getattr(args, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if args.num_warm_iter < 0:
        raise UsageError(f"--num-warm-iter must be at least 0, not {args.num_warm_iter}")
    for name in args.dtypes or ():
        if name not in ("float32", "float64", "float16", "bfloat16"):
            raise UsageError(f"--dtypes must be among float32, float64, float16, bfloat16, not {name}")
    known = [str(name) for name in list_optimizers()]
    if args.opt.lower().removeprefix("lookahead_") not in known:
        raise UsageError(f"--opt {args.opt} is no timm optimizer{suggestion(args.opt.lower(), known)}")


def _size(text: str) -> int:
    try:
        return int(float(text))
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text} is no number of elements, give one such as 1e6") from error
