"""Randomness that depends on what is computed, not on what was computed before, so that a run can go on from anywhere.

An image is read and augmented by (seed, epoch, image), whichever worker does it; what happens in the main process, such
as dropout, is drawn by (seed, rank, epoch, batch).
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler, Sampler

__all__ = ["EpochSampler", "SeededDataset", "SeededErasing", "seed_all", "seed_data", "seed_step"]

_DATA, _STEP, _ERASING = range(3)  # streams that must not repeat one another


def seed_all(*key: int, device: torch.device | None = None) -> None:
    """Seed Python, NumPy and torch with a mixture of numbers that are not negative.

    Args:
        *key: The numbers; each order of them gives another seed.
        device: Seed its generator as well, if it is not the CPU.
    """
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if device is None or device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def seed_data(*key: int) -> None:
    """Seed what reading and augmenting draw."""
    seed_all(_DATA, *key)


def seed_step(seed: int, rank: int, epoch: int, batch: int, device: torch.device) -> None:
    """Seed what a batch draws in the main process."""
    seed_all(_STEP, seed, rank, epoch, batch, device=device)


class SeededDataset(Dataset):
    """A map-style dataset whose images are augmented by (seed, epoch, index, repeat), the keys of `EpochSampler`."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int, int]) -> Any:
        seed_data(self.seed, *key)
        return self.dataset[key[1]]

    @property
    def transform(self) -> Any:
        """Of the dataset itself; timm's loader sets it."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform


class EpochSampler(Sampler[tuple[int, int, int]]):
    """The keys (epoch, index, repeat) of an epoch, from any batch on.

    `repeat` tells apart the views of one image in an epoch, which repeated augmentation spreads over ranks.
    """

    def __init__(self, sampler: Any, batch_size: int) -> None:
        """Wrap a sampler.

        Args:
            sampler: One of a rank's indices that is a function of its epoch: torch's DistributedSampler (also for a
                single process) or timm's RepeatAugSampler.
            batch_size: Of the loader.
        """
        self.sampler = sampler
        self.batch_size = batch_size
        self.first_batch = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose what the next iteration yields."""
        self.sampler.set_epoch(epoch)
        self.first_batch = first_batch

    def __len__(self) -> int:
        return len(self.sampler)  # of a whole epoch: what is left of one does not change how long it is

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        sampler, first = self.sampler, self.first_batch * self.batch_size
        views: Counter[int] = Counter()
        for position, index in enumerate(sampler):
            if position >= first:
                repeat = 0 if isinstance(sampler, DistributedSampler) else self._view(views[index])
                yield sampler.epoch, index, repeat
            views[index] += 1

    def _view(self, seen: int) -> int:
        return seen * self.sampler.num_replicas + self.sampler.rank


class SeededErasing:
    """timm's random erasing in the main process, by (seed, rank, epoch, batch), for batches are fetched ahead."""

    def __init__(self, erasing: Callable[[torch.Tensor], torch.Tensor], seed: int, rank: int) -> None:
        self.erasing = erasing
        self.key = seed, rank
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Tell which batch comes next."""
        self.epoch, self.batch = epoch, first_batch

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        seed_all(_ERASING, *self.key, self.epoch, self.batch, device=images.device)
        self.batch += 1
        return self.erasing(images)
