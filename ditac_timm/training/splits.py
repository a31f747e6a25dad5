"""The datasets of a run's splits, and the checks that keep files, labels and classes honest."""

import argparse
import os
import tarfile
from pathlib import Path
from typing import Any

from timm.data import ImageDataset, IterableImageDataset, create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import CACHE_FILENAME_SUFFIX, ReaderImageInTar

from ditac_timm.training.errors import UsageError, first_line
from ditac_timm.training.images import CheckedImageDataset, CheckedIterableDataset

# The flag that tells a split's number of images, by the flag that names the split.
_COUNT_FLAGS = {"--train-split": "--train-num-samples", "--val-split": "--val-num-samples", "--split": "--num-samples"}

_EVAL_SPLITS = {"val", "valid", "validation", "eval", "evaluation"}  # one split to timm, by any of its names
_SPLITS = {"train", "training", "test", *_EVAL_SPLITS}


def check_data_dir(args: argparse.Namespace) -> None:
    """Refuse a data folder that does not exist, before a model is built or downloaded."""
    remote = args.dataset.lower().startswith("wds/") and _is_remote(args.data_dir)
    if args.data_dir and not os.path.exists(args.data_dir) and not args.dataset_download and not remote:
        raise UsageError(f"--data-dir {args.data_dir} does not exist")
    if args.class_map and not any(Path(folder, args.class_map).is_file() for folder in ("", args.data_dir or "")):
        raise UsageError(f"--class-map {args.class_map} does not exist")


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


def check_splits(args: argparse.Namespace, train: Any, evaluation: Any) -> None:
    """Refuse splits that are not two folders, and classes that differ: timm would train on one and score another."""
    check_folder(args, args.train_split, "--train-split", train)
    check_folder(args, args.val_split, "--val-split", evaluation)
    classes, eval_classes = _class_to_idx(train), _class_to_idx(evaluation)
    if classes is not None and eval_classes is not None and classes != eval_classes:
        name = sorted(map(str, classes.keys() ^ eval_classes.keys()))[0]
        has, lacks = (args.train_split, args.val_split) if name in classes else (args.val_split, args.train_split)
        raise UsageError(f"the splits differ in their classes: {has!r} has images of {name!r} and {lacks!r} has none")


def check_iterable(args: argparse.Namespace, dataset: Any) -> None:
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
