"""Loaders from flags."""

import argparse
import logging
import warnings
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from timm.data import (
    AugMixDataset,
    FastCollateMixup,
    Mixup,
    create_loader,
    resolve_input_data_config,
)
from timm.data.auto_augment import NAME_TO_OP, posterize
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import fast_collate
from torch import nn
from torch.utils.data import DistributedSampler, IterableDataset, default_collate

from ditac_timm.training.device import Precision
from ditac_timm.training.errors import DataLostError, UsageError, first_line
from ditac_timm.training.images import CheckedIterableDataset, checked_dataset, without_missing
from ditac_timm.training.randomness import EpochSampler, SeededDataset, SeededErasing
from ditac_timm.training.refusals import mixup_is_on
from ditac_timm.training.splits import check_classes, check_iterable, check_splits, create_split

_logger = logging.getLogger(__name__)

# What timm's create_loader takes of a data config; the rest of its arguments are flags.
DATA_CONFIG = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's posterize, also to no bit at all: Pillow from 13 on refuses that, which was black before."""
    return posterize(image, bits) if bits else image.point(lambda _: 0)


# RandAugment of increasing severity, as in rand-m9-mstd0.5-inc1, asks for no bit about once in 700 images.
NAME_TO_OP.update({name: _posterize for name, operation in NAME_TO_OP.items() if operation is posterize})


def resolve_data_config(
    args: argparse.Namespace,
    model: nn.Module,
    saved: dict[str, Any] | None = None,
    use_test_size: bool = False,
) -> dict[str, Any]:
    """How images are prepared: by flags, else as `saved` with a checkpoint, else as the model was pretrained."""
    try:
        config = resolve_input_data_config(model, vars(args), pretrained_cfg=saved, use_test_size=use_test_size)
    except (ValueError, AssertionError) as error:
        reason = first_line(error)
        raise UsageError(f"--img-size, --input-size, --in-chans, --mean or --std do not fit: {reason}") from error
    _logger.info("Data: " + ", ".join(f"{name} {value}" for name, value in config.items()))
    return {name: config[name] for name in DATA_CONFIG}


def create_loaders(
    args: argparse.Namespace, config: dict[str, Any], precision: Precision, num_classes: int
) -> tuple[Any, Any, Mixup | None]:
    """Create what a training run reads, once its splits and classes are known to be right.

    Returns:
        The training loader; the validation loader, None where --val-split is empty; and the mixup to apply to batches,
        None where there is none or the loader applies it.
    """
    train_set = create_split(
        args, args.train_split, "--train-split", config, is_training=True, num_samples=args.train_num_samples
    )
    eval_loader = None
    if args.val_split:
        eval_set = create_split(args, args.val_split, "--val-split", config, num_samples=args.val_num_samples)
        check_splits(args, train_set, eval_set)
        batch_size = args.validation_batch_size or args.batch_size
        eval_loader = create_eval_loader(args, eval_set, config, precision, batch_size)
        check_classes(args, eval_set, args.val_split, num_classes)
    check_classes(args, train_set, args.train_split, num_classes)
    train_loader, mixup = _create_train_loader(args, train_set, config, precision, num_classes)
    if not len(train_loader):
        raise UsageError(f"the length of {args.train_split!r} is unknown: give --train-num-samples")
    return train_loader, eval_loader, mixup


def create_eval_loader(
    args: argparse.Namespace, dataset: Any, config: dict[str, Any], precision: Precision, batch_size: int
) -> Any:
    """Create the loader of an evaluation split: the same images, prepared the same way, in training and validation."""
    # A process or worker that has larger shards than others reads more than its share.
    warnings.filterwarnings("ignore", "Length of IterableDataset", UserWarning)
    collate = None
    if args.skip_bad_images:
        collate = partial(without_missing, collate=default_collate if args.no_prefetcher else fast_collate)
    return create_loader(
        dataset,
        **config,
        crop_border_pixels=getattr(args, "crop_border_pixels", None),
        is_training=False,
        batch_size=batch_size,
        collate_fn=collate,
        **_shared_loader_args(args, precision),
    )


def set_epoch(loader: Any, epoch: int, first_batch: int = 0) -> None:
    """Tell whatever shuffles, or draws by epoch, which epoch comes next, and from which batch on.

    Only map-style data can begin within an epoch.
    """
    if hasattr(loader.dataset, "set_epoch"):
        loader.dataset.set_epoch(epoch)
    for part in (getattr(loader.batch_sampler, "sampler", None), getattr(loader, "random_erasing", None)):
        if isinstance(part, EpochSampler | SeededErasing):
            part.set_epoch(epoch, first_batch)


def check_images(loader: Any, args: argparse.Namespace, *, training: bool, report: bool = True) -> int:
    """Report the images that did not decode so far, in this process' share of a split.

    Args:
        loader: Of that split.
        args: --max-bad-images and --skip-bad-images say what is let pass.
        training: Whether others stood in for them.
        report: Whether to say which, if they are let pass.

    Returns:
        How many there are.

    Raises:
        DataLostError: In training, if they are more than --max-bad-images; else, if there are any and they are not
            skipped, or if a split of shards did not hold as many images as it is said to.
    """
    dataset = checked_dataset(loader)
    if isinstance(dataset, CheckedIterableDataset) and not training:
        _check_count(dataset, args)
    bad = dataset.bad() if dataset is not None else {}
    if not bad:
        return 0
    name, reason = next(iter(bad.items()))
    which = f"{len(bad)} images do not decode, the first is {name} ({reason})"
    if training and len(bad) > args.max_bad_images:
        raise DataLostError(f"{which}: more than --max-bad-images {args.max_bad_images}, mend or remove them")
    if not training and not args.skip_bad_images:
        raise DataLostError(f"{which}: mend or remove them, or leave them out with --skip-bad-images")
    if report:
        _logger.warning(f"{len(bad)} images do not decode, and others stood in for them or they were left out:")
        for name, reason in bad.items():
            _logger.warning(f"  {name}: {reason}")
    return len(bad)


def _check_count(dataset: CheckedIterableDataset, args: argparse.Namespace) -> None:
    count = torch.tensor(dataset.count(), device=args.device)
    if args.distributed:
        dist.all_reduce(count)
    expected = dataset.reader.num_samples
    flag = "--val-num-samples" if hasattr(args, "val_num_samples") else "--num-samples"  # train.py, validate.py
    if count != expected and dataset.exact:
        raise DataLostError(
            f"validation read {count} images, and {args.dataset} is said to hold {expected}: a shard is incomplete, or "
            f"the number is wrong in its description or in {flag}"
        )


def is_iterable(loader: Any) -> bool:
    """Whether a loader's data can only be read from an epoch's beginning."""
    return isinstance(loader.dataset, IterableDataset)


def _create_train_loader(
    args: argparse.Namespace, dataset: Any, config: dict[str, Any], precision: Precision, num_classes: int
) -> tuple[Any, Mixup | None]:
    """Create the loader of the training split, and the mixup to apply to its batches where it does not itself."""
    if not isinstance(dataset, IterableDataset) and len(dataset) < args.batch_size * args.world_size:
        raise UsageError(
            f"--batch-size {args.batch_size} in {args.world_size} processes is more than the "
            f"{len(dataset)} images of {args.train_split!r}: give a smaller one"
        )
    if isinstance(dataset, IterableDataset):
        check_iterable(args, dataset)
    mixup, collate = None, None
    if mixup_is_on(args):
        mixup_args = {
            "mixup_alpha": args.mixup,
            "cutmix_alpha": args.cutmix,
            "cutmix_minmax": args.cutmix_minmax,
            "prob": args.mixup_prob,
            "switch_prob": args.mixup_switch_prob,
            "mode": args.mixup_mode,
            "label_smoothing": args.smoothing,
            "num_classes": num_classes,
        }
        if args.no_prefetcher:
            mixup = Mixup(**mixup_args)
        else:
            collate = FastCollateMixup(**mixup_args)
    if args.aug_splits:
        dataset = AugMixDataset(dataset, num_splits=args.aug_splits)
    if not isinstance(dataset, IterableDataset):
        dataset = SeededDataset(dataset, args.seed)
    interpolation = config["interpolation"] if args.no_aug else args.train_interpolation or config["interpolation"]
    loader = create_loader(
        dataset,
        input_size=config["input_size"],
        mean=config["mean"],
        std=config["std"],
        interpolation=interpolation,
        is_training=True,
        batch_size=args.batch_size,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        re_split=args.resplit,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob,
        gaussian_blur_prob=args.gaussian_blur_prob,
        auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats,
        num_aug_splits=args.aug_splits,
        collate_fn=collate,
        worker_seeding=args.worker_seeding,
        # Workers hold a copy of the mixup: turning it off reaches only workers started afterwards.
        persistent_workers=not (collate and args.mixup_off_epoch),
        **_shared_loader_args(args, precision),
    )
    _seed_loader(loader, args)
    return loader, mixup


def _seed_loader(loader: Any, args: argparse.Namespace) -> None:
    """Make order and augmentation functions of the epoch, which timm's loader leaves to global random states."""
    if getattr(loader, "random_erasing", None) is not None:
        loader.random_erasing = SeededErasing(loader.random_erasing, args.seed, args.rank)
    if is_iterable(loader):
        return
    sampler = loader.batch_sampler.sampler
    if not isinstance(sampler, RepeatAugSampler):
        sampler = DistributedSampler(
            loader.dataset, num_replicas=args.world_size, rank=args.rank, shuffle=True, seed=args.seed
        )
    loader.batch_sampler.sampler = EpochSampler(sampler, args.batch_size)


def _shared_loader_args(args: argparse.Namespace, precision: Precision) -> dict[str, Any]:
    return {
        "num_workers": args.workers,
        "pin_memory": args.pin_mem,
        "use_prefetcher": not args.no_prefetcher,
        "distributed": args.distributed,
        "device": precision.device,
        "img_dtype": precision.model_dtype or torch.float32,
    }
