"""Command lines that people published for timm's train.py, as they stand, through ours.

What differs from the source: the data, which are scikit-learn's digits (so `--num-classes 10` is added), the model, a
tiny one of the same family and for half of them its DiTAC twin, two epochs, the output's folder, and no worker
processes, for there is more to do than the machine has cores. Images are 32 wide, because float16, which most of these
lines ask for, is slow on a CPU. A line for N GPUs runs as one process, or as two where its flags need several. Batch
sizes, and all else, are the published ones: there are as many digits as an update takes in all processes, so an epoch
is one update.
"""

import argparse
import csv
import math
import shlex
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import yaml
from script_runs import run_two_processes, write_digits
from test_watch import Client

import ditac_timm
from ditac_timm.training.flags import parse_train_flags
from ditac_timm.training.recipe import create_loss


class Published(NamedTuple):
    """A command, and what it asks for: a run of it is compared with this."""

    source: str
    command: str
    model: str
    loss: str
    lr: float
    warmup: tuple[float, int] = (1e-5, 5)  # its first learning rate and its epochs; these are timm's defaults
    processes: int = 1
    size: str = "--img-size 32"


_DOCS = "timm's documentation, Training Examples (hfdocs/source/training_script.mdx): "
_KAT = "github.com/Adamdad/kat, scripts/"

COMMANDS = {
    "seresnet34": Published(
        _DOCS + "Training Script",
        "./distributed_train.sh 4 --data-dir /data/imagenet --model seresnet34 --sched cosine --epochs 150 "
        "--warmup-epochs 5 --lr 0.4 --reprob 0.5 --remode pixel --batch-size 256 --amp -j 4",
        "test_resnet",
        "LabelSmoothingCrossEntropy",
        0.4,
    ),
    "efficientnet_b2": Published(
        _DOCS + "EfficientNet-B2 with RandAugment (of which the text says that EfficientNet-B3 started so, too)",
        "./distributed_train.sh 2 --data-dir /imagenet/ --model efficientnet_b2 -b 128 --sched step --epochs 450 "
        "--decay-epochs 2.4 --decay-rate .97 --opt rmsproptf --opt-eps .001 -j 8 --warmup-lr 1e-6 --weight-decay 1e-5 "
        "--drop 0.3 --drop-path 0.2 --model-ema --model-ema-decay 0.9999 --aa rand-m9-mstd0.5 --remode pixel "
        "--reprob 0.2 --amp --lr .016",
        "test_efficientnet_ditac",
        "LabelSmoothingCrossEntropy",
        0.016,
        (1e-6, 5),
    ),
    "mixnet_xl": Published(
        _DOCS + "MixNet-XL with RandAugment",
        "./distributed_train.sh 2 --data-dir /imagenet/ --model mixnet_xl -b 128 --sched step --epochs 450 "
        "--decay-epochs 2.4 --decay-rate .969 --opt rmsproptf --opt-eps .001 -j 8 --warmup-lr 1e-6 "
        "--weight-decay 1e-5 --drop 0.3 --drop-path 0.2 --model-ema --model-ema-decay 0.9999 --aa rand-m9-mstd0.5 "
        "--remode pixel --reprob 0.3 --amp --lr .016 --dist-bn reduce",
        "test_efficientnet",
        "LabelSmoothingCrossEntropy",
        0.016,
        (1e-6, 5),
        processes=2,
    ),
    "seresnext26t": Published(
        _DOCS + "SE-ResNeXt-26-D and SE-ResNeXt-26-T",
        "./distributed_train.sh 2 --data-dir /imagenet/ --model seresnext26t_32x4d --lr 0.1 --warmup-epochs 5 "
        "--epochs 160 --weight-decay 1e-4 --sched cosine --reprob 0.4 --remode pixel -b 112",
        "test_resnet_ditac",
        "LabelSmoothingCrossEntropy",
        0.1,
    ),
    "efficientnet_b0": Published(
        _DOCS + "EfficientNet-B0 with RandAugment",
        "./distributed_train.sh 2 --data-dir /imagenet/ --model efficientnet_b0 -b 384 --sched step --epochs 450 "
        "--decay-epochs 2.4 --decay-rate .97 --opt rmsproptf --opt-eps .001 -j 8 --warmup-lr 1e-6 --weight-decay 1e-5 "
        "--drop 0.2 --drop-path 0.2 --model-ema --model-ema-decay 0.9999 --aa rand-m9-mstd0.5 --remode pixel "
        "--reprob 0.2 --amp --lr .048",
        "test_efficientnet",
        "LabelSmoothingCrossEntropy",
        0.048,
        (1e-6, 5),
    ),
    "resnet50_jsd": Published(
        _DOCS + "ResNet50 with JSD loss and RandAugment; --jsd is short for --jsd-loss there as well",
        "./distributed_train.sh 2 --data-dir /imagenet -b 64 --model resnet50 --sched cosine --epochs 200 --lr 0.05 "
        "--amp --remode pixel --reprob 0.6 --aug-splits 3 --aa rand-m9-mstd0.5-inc1 --resplit --split-bn --jsd "
        "--dist-bn reduce",
        "test_resnet",
        "JsdCrossEntropy",
        0.05,
        processes=2,
    ),
    "efficientnet_es": Published(
        _DOCS + "EfficientNet-ES (EdgeTPU-Small) with RandAugment",
        "./distributed_train.sh 8 --data-dir /imagenet --model efficientnet_es -b 128 --sched step --epochs 450 "
        "--decay-epochs 2.4 --decay-rate .97 --opt rmsproptf --opt-eps .001 -j 8 --warmup-lr 1e-6 --weight-decay 1e-5 "
        "--drop 0.2 --drop-path 0.2  --aa rand-m9-mstd0.5 --remode pixel --reprob 0.2 --amp --lr .064",
        "test_efficientnet_ditac",
        "LabelSmoothingCrossEntropy",
        0.064,
        (1e-6, 5),
    ),
    "mobilenetv3_large_100": Published(
        _DOCS + "MobileNetV3-Large-100, where a slip of the pen has `/--data-dir imagenet/`",
        "./distributed_train.sh 2 --data-dir /imagenet/ --model mobilenetv3_large_100 -b 512 --sched step "
        "--epochs 600 --decay-epochs 2.4 --decay-rate .973 --opt rmsproptf --opt-eps .001 -j 7 --warmup-lr 1e-6 "
        "--weight-decay 1e-5 --drop 0.2 --drop-path 0.2 --model-ema --model-ema-decay 0.9999 --aa rand-m9-mstd0.5 "
        "--remode pixel --reprob 0.2 --amp --lr .064 --lr-noise 0.42 0.9",
        "test_efficientnet_ditac",
        "LabelSmoothingCrossEntropy",
        0.064,
        (1e-6, 5),
    ),
    "resnext50": Published(
        _DOCS + "ResNeXt-50 32x4d w/ RandAugment",
        "./distributed_train.sh 8 --data-dir /imagenet --model resnext50_32x4d --lr 0.6 --warmup-epochs 5 "
        "--epochs 240 --weight-decay 1e-4 --sched cosine --reprob 0.4 --recount 3 --remode pixel "
        "--aa rand-m7-mstd0.5-inc1 -b 192 -j 6 --amp --dist-bn reduce",
        "test_resnet_ditac",
        "LabelSmoothingCrossEntropy",
        0.6,
        processes=2,
    ),
    "vit_small": Published(
        "timm's author in github.com/huggingface/pytorch-image-models/issues/252",
        "./distributed_train.sh 2 /data/imagenet/ --model vit_small_patch16_224 --sched cosine --epochs 300 "
        "--opt adamp -j 8 --warmup-lr 1e-6 --mixup .2 --model-ema --model-ema-decay 0.99996 --aa rand-m9-mstd0.5-inc1 "
        "--remode pixel --reprob 0.25 --amp --lr .001 --weight-decay .01 -b 256",
        "test_vit_ditac",
        "SoftTargetCrossEntropy",
        0.001,
        (1e-6, 5),
    ),
    "vit_base": Published(
        # As DeiT trains, by timm's script of this day. Left out are the model's weight_init=skip post_weight_init=...,
        # which leave its initial weights to the authors' own code.
        "github.com/osiriszjq/structured_initialization, README.md, ImageNet-1K",
        "torchrun --nproc_per_node=16 train.py /data/imagenet --train-split train --val-split val "
        "--input-size 3 224 224 --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225 --num-classes 1000 --seed 42 "
        "--model vit_base_patch16_224 --model-kwargs img_size=224 -j 10 -b 64 --lr-base-size 512 "
        "--lr-base 5e-4 --lr-base-scale linear --warmup-lr 1e-6 --min-lr 1e-5 --weight-decay 0.05 --opt adamw "
        "--opt-eps 1e-8 --epochs 300 --sched cosine --warmup-epochs 5 --cooldown-epochs 10 --amp "
        "--aa rand-m9-mstd0.5-inc1 --cutmix 1.0 --mixup 0.8 --reprob 0.25 --smoothing 0.1 --drop 0.0 "
        "--color-jitter 0.3 --drop-path 0.1 --crop-pct 0.875 --aug-repeats 3.0 --pin-mem",
        "test_vit",
        "SoftTargetCrossEntropy",
        5e-4 * 2 * 64 / 512,
        (1e-6, 5),
        processes=2,
        size="--input-size 3 32 32 --model-kwargs img_size=32",  # in which it states it
    ),
    "resnet50_a2": Published(
        # ResNet strikes back's A2. --amp was --native-amp in timm 0.5; left out is --augsub, the authors' own.
        "github.com/naver-ai/augsub, resnet_rsb/README.md",
        "python -m torch.distributed.launch --nproc_per_node=8 --nnodes=1 train.py /data/imagenet --model resnet50 "
        "--output output --img-size 224 --epochs 300 --batch-size 256 --opt lamb --lr 5e-3 --sched cosine "
        "--weight-decay 0.02 --warmup-epochs 5 --cooldown-epochs 0 --smoothing 0.0 --drop 0.0 --drop-path 0.05 "
        "--aug-repeats 3 --aa rand-m7-mstd0.5 --mixup 0.1 --cutmix 1.0 --reprob 0.0 --color-jitter 0.0 "
        "--crop-pct 0.95 --bce-loss --amp --log-interval 400",
        "test_resnet_ditac",
        "BinaryCrossEntropy",
        5e-3,
        processes=2,
    ),
    "bagnet33": Published(
        "github.com/inspire-group/PatchCURE, checkpoints/README.md, after ResNet strikes back",
        "./distributed_train.sh 8 imagenet --model bagnet33 --batch-size 64 --lr 0.0015 --epochs 300 "
        "--experiment bagnet33_64x8_0.0015 --opt lamb --sched cosine --warmup-epochs 5 --weight-decay 0.02 "
        "--drop-path 0.05 --aa rand-m7-mstd0.5-inc1 --cutmix 1.0 --mixup 0.1 --bce-loss --crop-pct 0.95 --amp",
        "test_resnet",
        "BinaryCrossEntropy",
        0.0015,
    ),
    "vit_finetuning": Published(
        "github.com/inspire-group/PatchCURE, checkpoints/README.md, after MAE's",
        "./distributed_train.sh 8 data/imagenet     --opt adamw     --batch-size 64     --model vitsrf14x2     "
        "--initial-checkpoint checkpoints/mae_finetuned_vit_base.pth     --layer-decay 0.65     --weight-decay 0.05 "
        "--drop-path 0.1 --mixup 0.8 --cutmix 1.0 --reprob 0.25     --aa rand-m9-mstd0.5-inc1 --amp     --epochs 100  "
        "--lr-base 5e-5",
        "test_vit_ditac",
        "SoftTargetCrossEntropy",
        5e-5 * (64 / 256) ** 0.5,
    ),
    "kat_tiny": Published(
        _KAT + "train_kat_tiny_8x128.sh",
        "bash ./dist_train.sh 8 $DATA_PATH --model kat_tiny_swish_patch16_224 -b 128 --opt adamw --lr 1e-3 "
        "--weight-decay 0.05 --epochs 300 --mixup 0.8 --cutmix 1.0 --sched cosine --smoothing 0.1 --drop-path 0.1 "
        "--aa rand-m9-mstd0.5 --remode pixel --reprob 0.25 --amp --crop-pct 0.875 --mean 0.485 0.456 0.406 "
        "--std 0.229 0.224 0.225 --model-ema --model-ema-decay 0.9999 --output output/kat_tiny_swish_patch16_224 "
        "--log-wandb",
        "test_vit_ditac",
        "SoftTargetCrossEntropy",
        1e-3,
    ),
    "kat_base": Published(
        _KAT + "train_kat_base_8x128.sh",
        "bash ./dist_train.sh 8 $DATA_PATH --model kat_base_swish_patch16_224 -b 128 --opt adamw --lr 1e-3 "
        "--weight-decay 0.05 --epochs 300 --mixup 0.8 --cutmix 1.0 --sched cosine --smoothing 0.1 --drop-path 0.4 "
        "--aa rand-m9-mstd0.5 --remode pixel --reprob 0.25 --amp --crop-pct 0.875 --mean 0.485 0.456 0.406 "
        "--std 0.229 0.224 0.225 --model-ema --model-ema-decay 0.9999 --output output/kat_base_swish_patch16_224 "
        "--log-wandb",
        "test_vit",
        "SoftTargetCrossEntropy",
        1e-3,
    ),
    "convnext_variant": Published(
        # With its variables filled in: 4,096 images on 8 GPUs in 4 steps.
        "github.com/sail-sg/inceptionnext, scripts/convnext_variants/train_convnext_tiny_k5_ema.sh",
        "sh distributed_train.sh 8 $DATA_PATH --model inceptionnext_tiny_k5 --opt adamw --lr 4e-3 --warmup-epochs 20 "
        "-b 128 --grad-accum-steps 4 --drop-path 0.1 --model-ema --model-ema-decay 0.9999",
        "test_convnext_ditac",
        "LabelSmoothingCrossEntropy",
        4e-3,
        (1e-5, 20),
    ),
    "inceptionnext_finetuning": Published(
        # With its variables filled in: 1,024 images on 8 GPUs in 4 steps.
        "github.com/sail-sg/inceptionnext, scripts/inceptionnext/finetune_inceptionnext_base.sh",
        "sh distributed_train.sh 8 $DATA_PATH --model inceptionnext_base_384 --img-size 384 --epochs 30 --opt adamw "
        "--lr 5e-5 --sched None -b 32 --grad-accum-steps 4 --initial-checkpoint $INIT_CKPT --mixup 0 --cutmix 0 "
        "--model-ema --model-ema-decay 0.9999 --drop-path 0.7 --drop 0.5",
        "test_convnext",
        "LabelSmoothingCrossEntropy",
        5e-5,
        (5e-5, 1),
    ),
    "mambaout_femto": Published(
        # With its variables filled in: 4,096 images on 8 GPUs in 4 steps.
        "github.com/yuweihao/MambaOut, scripts/train_mambaout_femto.sh",
        "sh distributed_train.sh 8 $DATA_PATH --model mambaout_femto --opt adamw --lr 4e-3 --warmup-epochs 20 -b 128 "
        "--grad-accum-steps 4 --drop-path 0.025",
        "test_mambaout_ditac",
        "LabelSmoothingCrossEntropy",
        4e-3,
        (1e-5, 20),
    ),
    "convformer_s18": Published(
        # With its variables filled in: 4,096 images on 8 GPUs in 4 steps. Left out is --head-dropout, of their script.
        "github.com/sail-sg/metaformer, scripts/convformer/train_convformer_s18.sh",
        "sh distributed_train.sh 8 $DATA_PATH --model convformer_s18 --opt adamw --lr 4e-3 --warmup-epochs 20 -b 128 "
        "--grad-accum-steps 4 --drop-path 0.2",
        "test_convnext",
        "LabelSmoothingCrossEntropy",
        4e-3,
        (1e-5, 20),
    ),
}

DATA = {"/data/imagenet", "/data/imagenet/", "/imagenet", "/imagenet/", "imagenet", "data/imagenet", "$DATA_PATH"}
WEIGHTS = {"checkpoints/mae_finetuned_vit_base.pth", "$INIT_CKPT"}
CHANGED = [
    "data_dir",
    "device",
    "img_size",
    "input_size",
    "model_kwargs",
    "model",
    "epochs",
    "output",
    "experiment",
    "workers",
    "num_classes",
    "initial_checkpoint",
]
EPOCHS = 2
# Many images, or two processes, for flags that others here have too.
SLOW = {"seresnet34", "mixnet_xl", "resnext50", "resnet50_a2", "vit_base", "resnet50_jsd"}


def arguments(command: str) -> list[str]:
    """What a command gives to timm's train.py, by torchrun or by a shell script that starts it: `SCRIPT N ...`."""
    words = shlex.split(command)
    script = next(index for index, word in enumerate(words) if word.endswith(("train.py", "train.sh")))
    return words[script + (1 if words[script].endswith(".py") else 2) :]


def parsed(command: str) -> argparse.Namespace:
    return parse_train_flags(arguments(command))


@pytest.fixture(scope="session")
def of_size(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of so many digits to train on, and ten to validate on, made at first need."""

    @cache
    def folder(images: int) -> Path:
        return write_digits(tmp_path_factory.mktemp(f"digits{images}"), train=math.ceil(images / 10), validation=1)

    return folder


def run(train: ModuleType, of_size: Callable[[int], Path], output: Path, published: Published) -> Path:
    """Run a command to its end, and return the run's folder."""
    args = parsed(published.command)
    digits = of_size(args.batch_size * args.grad_accum_steps * published.processes)
    weights = output / "weights.pth"
    torch.save(ditac_timm.create_model(published.model, num_classes=10).state_dict(), weights)
    places = dict.fromkeys(DATA, str(digits)) | dict.fromkeys(WEIGHTS, str(weights))
    argv = [places.get(word, word) for word in arguments(published.command)]
    argv += ["--model", published.model, "--epochs", str(EPOCHS), "--num-classes", "10", "-j", "0", "--device", "cpu"]
    argv += ["--output", str(output), "--experiment", "run", *published.size.split()]
    if published.processes == 1:
        assert train.main(argv) == 0
    else:
        run_two_processes(*argv)
    return output / "run"


def check(folder: Path, published: Published) -> None:
    """Compare a run with what its command asks for."""
    asked = vars(parsed(published.command))
    flags = yaml.safe_load((folder / "args.yaml").read_text())
    kept = asked.keys() - CHANGED
    assert {name: flags[name] for name in kept} == {name: asked[name] for name in kept}
    epochs = EPOCHS + asked["cooldown_epochs"]
    with open(folder / "summary.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(epochs))
    assert all(math.isfinite(float(row[loss])) for row in rows for loss in ("train_loss", "eval_loss"))
    last = torch.load(folder / "last.pth.tar", weights_only=True)
    assert last["epoch"] == epochs - 1
    assert ("state_dict_ema" in last) == asked["model_ema"]
    # The optimizer has what its next update needs: weight decay but for biases and norms, and the schedule's rate.
    groups = last["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, asked["weight_decay"]}
    assert all(group["eps"] == asked["opt_eps"] for group in groups if asked["opt_eps"])
    first, warmup = published.warmup
    warm = [first + epoch * (published.lr - first) / warmup for epoch in range(EPOCHS + 1)]
    scale = sum(group.get("lr_scale", 1.0) for group in groups) / len(groups)  # of --layer-decay
    assert float(rows[0]["lr"]) == pytest.approx(warm[0] * scale)
    # --lr-noise moves it by up to two thirds.
    assert float(rows[1]["lr"]) == pytest.approx(warm[1] * scale, rel=0.67 if asked["lr_noise"] else 1e-6)
    if not asked["cooldown_epochs"]:
        assert [group["lr"] for group in groups] == pytest.approx(
            [warm[EPOCHS] * group.get("lr_scale", 1.0) for group in groups]
        )
    assert type(create_loss(argparse.Namespace(**flags))).__name__ == published.loss


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.sweep] if name in SLOW else []) for name in COMMANDS]
)
def test_runs_as_published(train, of_size, tmp_path, monkeypatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Client())
    published = COMMANDS[name]
    check(run(train, of_size, tmp_path, published), published)
