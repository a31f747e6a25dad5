"""Where numbers were measured, and how they are shown and written."""

import csv
import io
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ditac_timm import ops
from ditac_timm.training.checkpoint import reported_write_errors, write_atomically
from ditac_timm.training.errors import UsageError


class Table(NamedTuple):
    """Rows with a title; not all rows need all columns."""

    title: str
    rows: Sequence[Mapping[str, Any]]


def environment(device: torch.device, argv: Sequence[str], script: Sequence[str] = ("benchmark.py",)) -> dict[str, Any]:
    """The machine, the versions and the command, in plain values."""
    cuda = device.type == "cuda"
    return {
        "command": shlex.join(["python", *script, *argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "ditac_kernel": ops.kernel(device),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "allocator": " ".join(f"{name}={value}" for name, value in os.environ.items() if name.startswith("MALLOC_"))
        or "default",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": _version("timm"),
        "ditac_timm": _version("ditac_timm"),
        **({"cuda": torch.version.cuda, "gpu_memory": torch.cuda.mem_get_info(device)[1]} if cuda else {}),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from its folder
        return "not installed"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def check_writable(file: Path) -> None:
    """Refuse a results file that cannot be written, before hours are spent on what it should hold."""
    folder = file.resolve().parent
    if not folder.is_dir():
        raise UsageError(f"--results-file {file}: there is no folder {folder}")
    if file.is_dir():
        raise UsageError(f"--results-file {file} is a folder: name a file in it")
    if not os.access(folder, os.W_OK) or (file.exists() and not os.access(file, os.W_OK)):
        raise UsageError(f"--results-file {file} cannot be written: name a file that can")


def write(file: Path, file_format: str | None, surroundings: Mapping[str, Any], tables: Iterable[Table]) -> None:
    """Write all tables, as the format or else the file's extension says: json, or csv with the machine in each row."""
    if (file_format or file.suffix.removeprefix(".").lower()) == "json":
        results = [{"title": table.title, "rows": table.rows} for table in tables]
        text = json.dumps({**surroundings, "results": results}, indent=4)
    else:
        # Where both have a name, the number of threads, the row's is the one that was used.
        rows = [{"table": table.title, **row, **surroundings, **row} for table in tables for row in table.rows]
        stream = io.StringIO()
        writer = csv.DictWriter(stream, fieldnames=_columns(rows), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text = stream.getvalue()
    with reported_write_errors(file):
        write_atomically(file, lambda target: target.write(text.encode()))


def show(surroundings: Mapping[str, Any], tables: Iterable[Table]) -> None:
    """Print the tables, then where they were measured."""
    for table in tables:
        print(f"\n{table.title}\n{layout(table.rows)}")
    print()
    for name, value in surroundings.items():
        print(f"{name:13} {value}")
    sys.stdout.flush()


def layout(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned columns; few rows of many values as columns side by side."""
    columns = _columns(rows)
    lines = [columns, *([_text(row.get(column)) for column in columns] for row in rows)]
    turned = 2 * len(rows) < len(columns)
    if turned:
        lines = [list(line) for line in zip(*lines, strict=True)]
        left = [True, *(False for _ in rows)]
    else:
        left = [any(isinstance(row.get(column), str) for row in rows) for column in columns]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in lines
    )


def _columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:#.4g}" if abs(value) < 1000 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
