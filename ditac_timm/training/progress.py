"""A progress bar, where a person watches."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from timm.utils import is_primary
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(
    batches: Iterable[Any], description: str, args: Any, *, total: int, done: int = 0
) -> Iterator[Iterable[Any]]:
    """Show how far an iteration is, with log lines above it, in the first process and if stderr is a terminal.

    Args:
        batches: What is iterated.
        description: Put before the bar.
        args: The flags.
        total: Number of batches.
        done: How many of them were done before.
    """
    if not (sys.stderr.isatty() and is_primary(args)):
        yield batches
        return
    with logging_redirect_tqdm(), tqdm(
        batches, description, total, initial=done, leave=False, unit="batch", dynamic_ncols=True
    ) as bar:  # fmt: skip
        yield bar
