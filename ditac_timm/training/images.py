"""Images that do not decode: noted by name, and never replaced in silence."""

import hashlib
import io
import multiprocessing
import os
import random
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
from PIL import Image
from timm.data import ImageDataset, IterableImageDataset
from timm.data.readers.reader_wds import WdsTargetKeyError
from timm.data.readers.shared_count import SharedCount
from torch.utils.data import get_worker_info

from ditac_timm.training.errors import DataLostError, first_line
from ditac_timm.training.randomness import seed_data

__all__ = [
    "CheckedImageDataset",
    "CheckedIterableDataset",
    "Missing",
    "UnreadableDataError",
    "checked_dataset",
    "without_missing",
]

# What Pillow raises for a file that is cut off, corrupt, no image, empty or implausibly large, and timm's readers for
# one that is not there.
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    AssertionError,
    TypeError,
    tarfile.TarError,
    Image.DecompressionBombError,
)


_MOST_IN_A_ROW = 20


class UnreadableDataError(DataLostError):
    """The data is gone or wrong: many images in a row do not decode, a file cannot be read, a label is no class."""

    def __init__(self, message: str) -> None:
        # torch hands on what another process raised with its traceback before it.
        super().__init__(message.strip().splitlines()[-1].rpartition(f"{type(self).__name__}: ")[2])


class Missing:
    """Stands where an image would, for `without_missing`."""


class _Checked:
    """What both kinds of dataset check.

    Notes are lines of a file, for images are read in other processes than those that report them.
    """

    transform: Any
    target_transform: Any

    def __init__(self) -> None:
        self.num_classes: int | None = None  # labels are checked once it is known
        self._notes = tempfile.NamedTemporaryFile(prefix="bad-images-", suffix=".txt")  # noqa: SIM115
        self._notes_path = self._notes.name

    def __getstate__(self) -> dict[str, Any]:  # a process that is not forked needs the path only
        return {**self.__dict__, "_notes": None}

    def bad(self) -> dict[str, str]:
        """The images noted so far, and why each does not decode."""
        with open(self._notes_path, encoding="utf-8") as notes:
            lines = [line.rstrip("\n").split("\t", 1) for line in notes]
        return dict(line for line in lines if len(line) == 2)

    def _note(self, name: str, error: Exception) -> str:
        reason = " ".join(str(error).split()) or type(error).__name__
        line = f"{name}\t{reason}\n".encode(errors="replace")
        notes = os.open(self._notes_path, os.O_WRONLY | os.O_APPEND)  # in which short lines of processes do not mix
        try:
            os.write(notes, line)
        finally:
            os.close(notes)
        return reason

    def _prepared(self, image: Image.Image, target: Any) -> tuple[Any, Any]:
        if self.transform is not None:
            image = self.transform(image)
        target = -1 if target is None else target
        target = target if self.target_transform is None else self.target_transform(target)
        if self.num_classes is not None and isinstance(target, Integral) and int(target) not in range(self.num_classes):
            raise UnreadableDataError(f"an image has label {target}, and the model classes 0 to {self.num_classes - 1}")
        return image, target


class CheckedImageDataset(_Checked, ImageDataset):
    """timm's map-style dataset, which notes what does not decode.

    In place of such an image comes the next that decodes, or `Missing`.
    """

    def __init__(self, dataset: ImageDataset, *, skip: bool = False) -> None:
        """Check a dataset.

        Args:
            dataset: Says what to read and how.
            skip: Whether `Missing` takes the place of an image that does not decode.
        """
        _Checked.__init__(self)
        ImageDataset.__init__(
            self,
            None,
            reader=dataset.reader,
            input_img_mode=dataset.input_img_mode,
            transform=dataset.transform,
            target_transform=dataset.target_transform,
        )
        self.skip = skip

    def __getitem__(self, index: int) -> Any:
        for step in range(min(len(self), _MOST_IN_A_ROW)):
            at = (index + step) % len(self)
            try:
                file, target = self.reader[at][:2]
                image = _decode(file, self.input_img_mode)
                break
            except _UNREADABLE as error:
                reason = self._note(self._name(at), error)
                if self.skip:
                    return Missing
        else:
            raise _gone(step + 1, self._name(at), reason)
        return self._prepared(image, target)

    def _name(self, index: int) -> str:
        return self.filename(index, absolute=True) or f"image {index}"  # parquet need not name images


class CheckedIterableDataset(_Checked, IterableImageDataset):
    """timm's iterable dataset, which notes what does not decode, and stops at what cannot be read.

    In training the next image that decodes takes the place of one that does not; in evaluation it is left out, and each
    other image comes once, whatever the number of processes. An epoch is a function of the seed and its number.
    """

    def __init__(self, dataset: IterableImageDataset, kind: str, mode: str, seed: int, *, training: bool) -> None:
        """Check a dataset.

        Args:
            dataset: Says what to read and how; nothing has been read yet.
            kind: The type in its name: wds, hfids or tfds.
            mode: Of the images, as Pillow names it.
            seed: Of shuffling and augmentation.
            training: Whether it shuffles and repeats.
        """
        _Checked.__init__(self)
        IterableImageDataset.__init__(
            self,
            None,
            reader=dataset.reader,
            transform=dataset.transform,
            target_transform=dataset.target_transform,
        )
        self.training = training
        self.exact = kind != "tfds"  # whose processes read as many images each, some of them twice
        self._kind = kind
        self._mode = mode
        self._seed = seed
        self._epoch = SharedCount()
        self._lost = self._in_a_row = 0  # images of a pass that are not to be had, and those since the last that was
        self.set_loader_cfg(0)

    def set_epoch(self, count: int) -> None:
        """Choose what the next iteration yields."""
        super().set_epoch(count)
        self._epoch.value = count

    def set_loader_cfg(self, num_workers: int | None = None) -> None:
        """Learn how many processes will read."""
        super().set_loader_cfg(num_workers)
        self._counts = multiprocessing.Array("q", max(1, num_workers or 0))

    def count(self) -> int:
        """How many images the latest whole pass read, decoded or not, in this process and its workers."""
        return sum(self._counts[:])

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        self._lost = self._in_a_row = read = owed = 0
        last: tuple[Any, Any] | None = None
        for image, target in self._read():
            if image is None:
                owed += 1
                continue
            for _ in range(1 + owed if self.training else 1):
                yield self._prepared(image, target)
            last, owed, read = (image, target), 0, read + 1
        for _ in range(owed if self.training else 0):
            if last is not None:
                yield self._prepared(*last)
        self._counts[worker.id if worker else 0] = read + self._lost

    def _read(self) -> Iterator[tuple[Image.Image | None, Any]]:
        """Images and targets; None for an image that does not decode."""
        try:
            self._open()
            for image, target in self.reader:
                yield (self._decoded(image) if self._kind == "hfids" else image), target
        except UnreadableDataError:
            raise
        except Exception as error:  # whatever the library of a format raises
            reason = f"{first_line(error)} ({type(error).__name__})"
            raise UnreadableDataError(f"--dataset {self._kind}/ cannot be read: {reason}") from error

    def _open(self) -> None:
        """Make the reader tell of faults, and begin an epoch as if there had been none before."""
        reader = self.reader
        first = reader.ds is None
        worker = get_worker_info()
        if self.training:
            seed_data(self._seed, self._epoch.value, reader.dist_rank, worker.id if worker else 0)
        if self._kind == "tfds":
            return
        if first:
            reader.input_img_mode = ""  # for `_decode` converts
            reader._lazy_init()
        if first and self._kind == "hfids":
            import datasets

            reader.ds = reader.ds.cast_column(reader.input_key, datasets.Image(decode=False))
        if self._kind == "wds" and (first or self.training):
            reader.worker_seed = random.getrandbits(32)
            reader._lazy_init()  # again, with that seed
            self._open_shards()

    def _open_shards(self) -> None:
        """Take from timm's pipeline what would log a fault, and go on without the image or the rest of the shard."""
        import webdataset as wds

        *stages, decode, _ = self.reader.ds.pipeline
        for stage in stages:
            getattr(stage, "kw", {}).pop("handler", None)  # by default errors are raised
        self.reader.ds.pipeline = [*stages, wds.map(partial(self._sample, decode.args[0]))]
        if not self.training:  # where it would cut or fill the shares of processes to one length
            self.reader.dist_num_replicas = 1

    def _sample(self, decode: Callable[[Any], Any], sample: dict[str, Any]) -> dict[str, Any] | None:
        """A sample of a shard, decoded; None to go on with the next."""
        name, keys = f"{sample['__url__']}/{sample['__key__']}", self.reader.input_key
        if not any(key in sample for key in keys.split(";")):
            has = ", ".join(key for key in sample if not key.startswith("__"))
            raise UnreadableDataError(f"{name} has no {keys}, but {has}: give --input-key")
        try:
            decoded = decode(sample)
            if decoded is None:  # timm's word for a label below 0
                self._lost += 1
                return None
            image = _decode(decoded["jpg"], self._mode)
        except WdsTargetKeyError:
            raise
        except KeyError as error:
            raise UnreadableDataError(f"{name} has no {error.args[0]}: give --target-key") from error
        except _UNREADABLE as error:
            self._lose(name, error)
            return None
        self._in_a_row = 0
        return {"image": image, "target": decoded["target"]}

    def _decoded(self, stored: dict[str, Any]) -> Image.Image | None:
        """An image of a Hugging Face dataset, None if it does not decode."""
        try:
            content, path = stored["bytes"], stored["path"]
            image = _decode(path if content is None else io.BytesIO(content), self._mode)
        except _UNREADABLE as error:
            name = stored and (stored["path"] or f"image of sha1 {hashlib.sha1(stored['bytes'] or b'').hexdigest()}")
            self._lose(name or "no image", error)
            return None
        self._in_a_row = 0
        return image

    def _lose(self, name: str, error: Exception) -> None:
        reason = self._note(name, error)
        self._lost += 1
        self._in_a_row += 1
        if self._in_a_row == _MOST_IN_A_ROW:
            raise _gone(_MOST_IN_A_ROW, name, reason)


def _gone(count: int, name: str, reason: str) -> UnreadableDataError:
    return UnreadableDataError(f"{count} images in a row do not decode, the last is {name} ({reason})")


def _decode(file: Any, mode: str | None) -> Image.Image:
    image = file if isinstance(file, Image.Image) else Image.open(file)
    image.load()
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    return image.convert(mode) if mode else image


def checked_dataset(loader: Any) -> CheckedImageDataset | CheckedIterableDataset | None:
    """The dataset of a loader that notes what does not decode, if one does."""
    dataset = loader.dataset
    while dataset is not None and not isinstance(dataset, CheckedImageDataset | CheckedIterableDataset):
        dataset = getattr(dataset, "dataset", None)
    return dataset


def without_missing(samples: Sequence[Any], collate: Callable[[list[Any]], Any]) -> Any:
    """Collate the samples that are there.

    Raises:
        UnreadableDataError: There is none.
    """
    there = [sample for sample in samples if sample is not Missing]
    if not there:
        raise UnreadableDataError("none of a batch's images decodes")
    return collate(there)
