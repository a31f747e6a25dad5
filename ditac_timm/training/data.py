"""Datasets and loaders from flags, and the checks that keep labels and classes honest."""

import argparse
import logging
import os
import tarfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from timm.data import (
    AugMixDataset,
    FastCollateMixup,
    ImageDataset,
    IterableImageDataset,
    Mixup,
    create_dataset,
    create_loader,
    resolve_input_data_config,
)
from timm.data.auto_augment import NAME_TO_OP, posterize
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import fast_collate
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import CACHE_FILENAME_SUFFIX, ReaderImageInTar
from torch import nn
from torch.utils.data import DistributedSampler, IterableDataset, default_collate

from ditac_timm.training.device import Precision
from ditac_timm.training.errors import DataLostError, UsageError, first_line
from ditac_timm.training.images import (
    CheckedImageDataset,
    CheckedIterableDataset,
    checked_dataset,
    without_missing,
)
from ditac_timm.training.randomness import EpochSampler, SeededDataset, SeededErasing
from ditac_timm.training.refusals import mixup_is_on

_logger = logging.getLogger(__name__)

# What timm's create_loader takes of a data config; the rest of its arguments are flags.
DATA_CONFIG = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")

# The flag that tells a split's number of images, by the flag that names the split.
_COUNT_FLAGS = {"--train-split": "--train-num-samples", "--val-split": "--val-num-samples", "--split": "--num-samples"}

_EVAL_SPLITS = {"val", "valid", "validation", "eval", "evaluation"}  # one split to timm, by any of its names
_SPLITS = {"train", "training", "test", *_EVAL_SPLITS}


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's posterize, also to no bit at all: Pillow from 13 on refuses that, which was black before."""
    return posterize(image, bits) if bits else image.point(lambda _: 0)


# RandAugment of increasing severity, as in rand-m9-mstd0.5-inc1, asks for no bit about once in 700 images.
NAME_TO_OP.update({name: _posterize for name, operation in NAME_TO_OP.items() if operation is posterize})


def check_data_dir(args: argparse.Namespace) -> None:
    """Refuse a data folder that does not exist, before a model is built or downloaded."""
    remote = args.dataset.lower().startswith("wds/") and _is_remote(args.data_dir)
    if args.data_dir and not os.path.exists(args.data_dir) and not args.dataset_download and not remote:
        raise UsageError(f"--data-dir {args.data_dir} does not exist")
    if args.class_map and not any(Path(folder, args.class_map).is_file() for folder in ("", args.data_dir or "")):
        raise UsageError(f"--class-map {args.class_map} does not exist")


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
        _check_splits(args, train_set, eval_set)
        batch_size = args.validation_batch_size or args.batch_size
        eval_loader = create_eval_loader(args, eval_set, config, precision, batch_size)
        check_classes(args, eval_set, args.val_split, num_classes)
    check_classes(args, train_set, args.train_split, num_classes)
    train_loader, mixup = _create_train_loader(args, train_set, config, precision, num_classes)
    if not len(train_loader):
        raise UsageError(f"the length of {args.train_split!r} is unknown: give --train-num-samples")
    return train_loader, eval_loader, mixup


def create_split(
    args: argparse.Namespace,
    split: str,
    flag: str,
    config: dict[str, Any],
    *,
    is_training: bool = False,
    num_samples: int | None = None,
) -> Any:
    """Create the dataset of one split.

    Args:
        args: The data flags.
        split: The split's name.
        flag: The flag that named it, for errors.
        config: See `resolve_data_config`.
        is_training: Whether iterable datasets shuffle and repeat.
        num_samples: Their number of images, where they cannot tell.
    """
    mode = args.input_img_mode or ("RGB" if config["input_size"][0] == 3 else "L")
    kind = args.dataset.partition("/")[0].lower()
    try:
        if not args.dataset and (tars := _tars(args, split)):
            dataset = ImageDataset(tars, reader=ReaderImageInTar(tars, class_map=args.class_map), input_img_mode=mode)
        else:
            dataset = create_dataset(
                args.dataset,
                root=args.data_dir,
                split=split,
                is_training=is_training,
                class_map=args.class_map,
                download=args.dataset_download,
                batch_size=args.batch_size,
                seed=args.seed,
                repeats=getattr(args, "epoch_repeats", 0),
                input_img_mode=mode,
                input_key=args.input_key,
                target_key=args.target_key,
                num_samples=num_samples,
                trust_remote_code=args.dataset_trust_remote_code,
            )
    except (RuntimeError, ValueError, ImportError, OSError, AssertionError, LookupError, tarfile.TarError) as error:
        raise UsageError(f"{flag} {split} of {args.dataset or args.data_dir}: {_reason(error, flag)}") from error
    if not args.class_map:
        _check_empty_classes(dataset, flag)
    if hasattr(dataset, "reader"):
        _check_files(args, dataset, flag)
        _check_columns(dataset.reader, flag)
    if type(dataset) is ImageDataset:
        return CheckedImageDataset(dataset, skip=args.skip_bad_images and not is_training)
    if type(dataset) is IterableImageDataset:
        if not dataset.reader.num_samples:
            raise UsageError(f"{flag} {split} of {args.dataset}: {_unknown_length(flag)}")
        return CheckedIterableDataset(dataset, kind, mode, args.seed, training=is_training)
    return dataset


def check_folder(args: argparse.Namespace, split: str, flag: str, dataset: Any, *, flat: bool = False) -> None:
    """Refuse a split that the data folder does not have: timm would take the whole folder for it.

    Args:
        args: The data flags.
        split: The split's name.
        flag: The flag that named it, for errors.
        dataset: What `create_split` made of it.
        flat: Whether the folder may hold the classes themselves, and no splits.
    """
    folder = _folder(dataset)
    if not folder or not os.path.isdir(folder) or os.path.normpath(folder) != os.path.normpath(args.data_dir or ""):
        return
    # A class may be named like a split, but then its images lie in its own folder.
    classes = {Path(os.path.relpath(path, folder)).parent.parts for path, _ in dataset.reader.samples}
    splits = _SPLITS & {parts[0] for parts in classes if len(parts) > 1}
    if not flat or splits or split.partition("[")[0] not in _EVAL_SPLITS:
        raise UsageError(f"{flag} {split}: {args.data_dir} has no folder of that name")


def check_classes(args: argparse.Namespace, dataset: Any, split: str, num_classes: int) -> None:
    """Refuse a dataset whose number of classes is not the model's; where it tells none, its labels are checked."""
    if isinstance(dataset, CheckedImageDataset | CheckedIterableDataset):
        dataset.num_classes = num_classes
    classes = _class_to_idx(dataset)
    if classes is None:
        return
    found = max(classes.values()) + 1
    if found > num_classes or (found < num_classes and not args.class_map):
        # A checkpoint's classes are fixed.
        advice = "" if getattr(args, "checkpoint", "") else f": give --num-classes {found}"
        raise UsageError(f"{split!r} has {found} classes and the model {num_classes}{advice}")


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
    if count != expected and dataset.exact:
        raise DataLostError(
            f"validation read {count} images, and {args.dataset} is said to hold {expected}: a shard is incomplete, or "
            f"the number is wrong in its description or in {_COUNT_FLAGS['--val-split']}"
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
        _check_iterable(args, dataset)
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


def _check_splits(args: argparse.Namespace, train: Any, evaluation: Any) -> None:
    """Refuse splits that are not two folders, and classes that differ: timm would train on one and score another."""
    check_folder(args, args.train_split, "--train-split", train)
    check_folder(args, args.val_split, "--val-split", evaluation)
    classes, eval_classes = _class_to_idx(train), _class_to_idx(evaluation)
    if classes is not None and eval_classes is not None and classes != eval_classes:
        name = sorted(map(str, classes.keys() ^ eval_classes.keys()))[0]
        has, lacks = (args.train_split, args.val_split) if name in classes else (args.val_split, args.train_split)
        raise UsageError(f"the splits differ in their classes: {has!r} has images of {name!r} and {lacks!r} has none")


def _tars(args: argparse.Namespace, split: str) -> str | None:
    """A split's folder of tars, which timm can read but takes for a folder of images."""
    folder = Path(args.data_dir, split)
    if not folder.is_dir():
        return None
    entries = list(os.scandir(folder))
    tars = any(entry.is_file() and entry.name.endswith(".tar") for entry in entries)
    return str(folder) if tars and not any(entry.is_dir() for entry in entries) else None


def _reason(error: Exception, flag: str) -> str:
    """Why a dataset cannot be read, in words that name flags where timm names its arguments."""
    said = first_line(error)
    if "num_samples" in said and not isinstance(error, KeyError):
        return _unknown_length(flag)
    if "not enough values to unpack" in said:
        return "it holds no images"
    if isinstance(error, KeyError):
        return f"its description lacks {said}"
    return said


def _unknown_length(flag: str) -> str:
    return f"its number of images is not known, give {_COUNT_FLAGS[flag]}"


def _is_remote(name: str) -> bool:
    """Whether WebDataset reads a shard from elsewhere: an address, or what a command prints."""
    return "://" in name or name.startswith("pipe:")


def _check_files(args: argparse.Namespace, dataset: Any, flag: str) -> None:
    """Refuse tars that are not there or were cut off, of which timm would read what is left."""
    reader, index = dataset.reader, None
    if isinstance(reader, ReaderImageInTar):
        root = Path(reader.root)
        folder, name = (root.parent, root.stem) if root.is_file() else (root, root.name)
        index = folder / f"_{name}{CACHE_FILENAME_SUFFIX}"
        files = [reader.root] if os.path.isfile(reader.root) else sorted(map(str, Path(reader.root).glob("*.tar")))
    elif args.dataset.lower().startswith("wds/"):
        files = [os.path.join(reader.root, name) for name in reader.split_info.filenames]
        files = [file for file in files if not _is_remote(file)]
    else:
        return
    for file in files:
        if not os.path.isfile(file):
            raise UsageError(f"{flag}: there is no file {file}")
        if index is not None and index.exists() and index.stat().st_mtime < os.path.getmtime(file):
            raise UsageError(f"{flag}: {index} is older than {file}, which it tells how to read: remove it")
        with open(file, "rb") as stream:
            stream.seek(max(0, os.path.getsize(file) - 512))
            if file.endswith(".tar") and any(stream.read()):
                raise UsageError(f"{flag}: {file} was cut off, it does not end as a tar does")


def _check_columns(reader: Any, flag: str) -> None:
    """Refuse a Hugging Face dataset whose images or labels are called otherwise, which timm takes for missing."""
    if type(reader).__name__ != "ReaderHfds":
        return
    first = reader.dataset[0]
    columns = ", ".join(name for name in first if name != reader.image_key)
    if first.get(reader.image_key) is None:
        raise UsageError(f"{flag}: the first row has no {reader.image_key}, but {columns}: give --input-key")
    try:
        reader._get_target(first)
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{flag}: the first row has no {reader.label_key}, but {columns}: give --target-key"
        ) from error


def _check_iterable(args: argparse.Namespace, dataset: Any) -> None:
    """Refuse what iterable data cannot do in training."""
    for flag, given in (("--aug-splits", args.aug_splits), ("--aug-repeats", args.aug_repeats)):
        if given:
            raise UsageError(f"{flag} needs data that is read in any order, and {args.dataset} is read in its own")
    shards = getattr(getattr(dataset.reader, "split_info", None), "filenames", None)
    readers = max(1, args.workers) * args.world_size
    if shards and len(shards) < readers:
        raise UsageError(
            f"{args.train_split!r} has {len(shards)} shards for {readers} processes that read: each needs one, give "
            "fewer --workers"
        )


def _class_to_idx(dataset: Any) -> dict[Any, int] | None:
    reader = getattr(dataset, "reader", dataset)
    classes = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)  # folders, tars
    return classes if isinstance(classes, dict) else None


def _folder(dataset: Any) -> str | None:
    """The folder an image folder dataset reads, None for another kind."""
    reader = getattr(dataset, "reader", None)
    return reader.root if isinstance(reader, ReaderImageFolder) else None


def _check_empty_classes(dataset: Any, flag: str) -> None:
    """Refuse a class without images: timm would leave it out and shift the labels of all that follow."""
    reader = getattr(dataset, "reader", None)
    if isinstance(reader, ReaderImageInTar) and "." in reader.class_name_to_idx:
        raise UsageError(
            f"{flag}: {reader.root} holds images as ./NAME, which timm takes for a class: tar them as NAME"
        )
    if isinstance(reader, ReaderImageInTar) and isinstance(reader.tar_state, dict):
        for file in sorted(Path(reader.root).glob("*.tar")):
            if file.name not in reader.tar_state:
                raise UsageError(f"{flag}: {file} holds no images, fill or remove it")
    folder = _folder(dataset)
    if folder is None or not os.path.isdir(folder):
        return
    assert reader is not None
    filled = {os.path.relpath(path, folder).partition(os.sep)[0] for path, _ in reader.samples}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith(".") and entry.name not in filled:
            raise UsageError(f"{flag}: the class folder {entry.path} holds no images, fill or remove it")
