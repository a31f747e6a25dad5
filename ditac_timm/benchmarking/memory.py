"""Bytes: a step's peak, what is saved for backward, and the sentence where there are not enough."""

import contextlib
import os
import resource
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ditac_timm.training.errors import UsageError

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reads it at first use; it logs each start and stop

_SHORTAGE = (
    "can't allocate memory",
    "bad_alloc",
    "could not create a memory",
    "Storage size calculation overflowed",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def peak_growth(step: Callable[[], object], device: torch.device) -> int:
    """Run a step once, and return how many bytes of tensors it held at its highest, beyond what was held before.

    On a CPU the profiler reports each allocation, so the number is exact and repeats; what oneDNN and OpenMP keep for
    themselves is no tensor. On CUDA it is the caching allocator's own count.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step()
    held = peak = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def saved_bytes(forward: Callable[[], object], without: Iterable[Tensor] = ()) -> int:
    """Run a forward, and return the bytes it saves for backward; tensors that share a storage count once.

    Args:
        forward: Computes with gradients.
        without: Tensors that exist anyway, a model's parameters for one, and are not counted.
    """
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # held until counted: a storage that is freed may give its address to the next
    del result
    for tensor in without:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def nbytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of tensors that do not share storage."""
    return sum(tensor.nbytes for tensor in tensors)


@contextlib.contextmanager
def reported_shortage(flag: str, device: torch.device) -> Iterator[None]:
    """Turn a lack of memory into one sentence that names the flag to make smaller.

    On a CPU the process may take no more than is available now: an allocation then fails, where otherwise the kernel
    would grant it and kill the process when the pages are touched.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _available_bytes() if device.type == "cpu" else None
    if limit is not None and (before[1] == resource.RLIM_INFINITY or limit < before[1]):
        resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and not any(sign in str(error) for sign in _SHORTAGE):
            raise
        raise UsageError(f"{flag} does not fit in the memory of {device}: give less") from error
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _available_bytes() -> int | None:
    """What this process holds and what is free for it to take; None where Linux does not say."""
    try:
        held = _kibibytes("/proc/self/status", "VmData")
        free = _kibibytes("/proc/meminfo", "MemAvailable")
    except (OSError, StopIteration):
        return None
    return 1024 * (held + free)


def _kibibytes(file: str, name: str) -> int:
    lines = Path(file).read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))
