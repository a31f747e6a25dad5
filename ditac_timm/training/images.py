"""Images that do not decode: noted by name, and never replaced in silence."""

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from timm.data import ImageDataset

from ditac_timm.training.errors import DataLostError

__all__ = ["CheckedImageDataset", "Missing", "UnreadableDataError", "bad_images", "without_missing"]

# What Pillow raises for a file that is cut off, corrupt, no image, empty or implausibly large.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


_MOST_IN_A_ROW = 20


class UnreadableDataError(DataLostError):
    """So many images in a row do not decode that the data must be gone."""

    def __init__(self, message: str) -> None:
        # torch hands on what another process raised with its traceback before it.
        super().__init__(message.strip().splitlines()[-1].rpartition(f"{type(self).__name__}: ")[2])


class Missing:
    """Stands where an image would, for `without_missing`."""


class CheckedImageDataset(ImageDataset):
    """timm's image dataset, which notes what does not decode.

    In place of such an image comes the next that decodes, or `Missing`. Notes are lines of a file, for images are read
    in other processes than those that report them.
    """

    def __init__(self, dataset: ImageDataset, *, skip: bool = False) -> None:
        """Check a dataset.

        Args:
            dataset: Says what to read and how.
            skip: Whether `Missing` takes the place of an image that does not decode.
        """
        super().__init__(
            None,
            reader=dataset.reader,
            input_img_mode=dataset.input_img_mode,
            transform=dataset.transform,
            target_transform=dataset.target_transform,
        )
        self.skip = skip
        self._notes = tempfile.NamedTemporaryFile(prefix="bad-images-", suffix=".txt")  # noqa: SIM115
        self._notes_path = self._notes.name

    def __getstate__(self) -> dict[str, Any]:  # a process that is not forked needs the path only
        return {**self.__dict__, "_notes": None}

    def __getitem__(self, index: int) -> Any:
        for step in range(min(len(self), _MOST_IN_A_ROW)):
            at = (index + step) % len(self)
            try:
                file, target = self.reader[at][:2]
                image = _decode(file, self.input_img_mode)
                break
            except _UNREADABLE as error:
                reason = self._note(at, error)
                if self.skip:
                    return Missing
        else:
            name = self.filename(at, absolute=True)
            raise UnreadableDataError(f"{step + 1} images in a row do not decode, the last is {name} ({reason})")
        if self.transform is not None:
            image = self.transform(image)
        target = -1 if target is None else target
        return image, target if self.target_transform is None else self.target_transform(target)

    def bad(self) -> dict[str, str]:
        """The images noted so far, and why each does not decode."""
        with open(self._notes_path, encoding="utf-8") as notes:
            lines = [line.rstrip("\n").split("\t", 1) for line in notes]
        return dict(line for line in lines if len(line) == 2)

    def _note(self, index: int, error: Exception) -> str:
        reason = " ".join(str(error).split()) or type(error).__name__
        line = f"{self.filename(index, absolute=True)}\t{reason}\n".encode(errors="replace")
        notes = os.open(self._notes_path, os.O_WRONLY | os.O_APPEND)  # in which short lines of processes do not mix
        try:
            os.write(notes, line)
        finally:
            os.close(notes)
        return reason


def _decode(file: Any, mode: str | None) -> Image.Image:
    image = file if isinstance(file, Image.Image) else Image.open(file)
    image.load()
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    return image.convert(mode) if mode else image


def bad_images(loader: Any) -> dict[str, str]:
    """What `CheckedImageDataset.bad` says of a loader's images."""
    dataset = loader.dataset
    while not isinstance(dataset, CheckedImageDataset):
        dataset = getattr(dataset, "dataset", None)
        if dataset is None:
            return {}
    return dataset.bad()


def without_missing(samples: Sequence[Any], collate: Callable[[list[Any]], Any]) -> Any:
    """Collate the samples that are there.

    Raises:
        UnreadableDataError: There is none.
    """
    there = [sample for sample in samples if sample is not Missing]
    if not there:
        raise UnreadableDataError("none of a batch's images decodes")
    return collate(there)
