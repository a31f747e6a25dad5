"""Builds `cpu.cpp` with the machine's compiler at first use, keeps the result, and loads it.

The file's name holds a hash of all that it depends on: the source, torch's version, the flags, and the macros that the
compiler predefines for this very processor (so its version and the instruction sets too). A folder of such files may
be shared between unlike machines. They appear in one step, complete; a lock lets one of several processes compile.
"""

import hashlib
import logging
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from filelock import FileLock

__all__ = ["BuildError", "build", "load"]

_logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("cpu.cpp")
_LONGEST_BUILD = 300  # seconds


class BuildError(RuntimeError):
    """The kernels could not be built or loaded; the message says why, in one sentence."""


def load() -> Path:
    """Build the kernels unless that was done before, register them with torch, and return the library's path.

    Raises:
        BuildError: There is no compiler, it failed, or there is no folder to write to.
    """
    library = build()
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise BuildError(f"{library} cannot be loaded: {error}") from error
    return library


def build() -> Path:
    """The path of the compiled library, which is compiled if it is not there.

    The folder is `DITAC_CACHE_DIR`, else `ditac_timm` in `XDG_CACHE_HOME` or `~/.cache`; where that can't be written
    to, one of this user's in the folder for temporary files.

    Raises:
        BuildError: As `load`.
    """
    command = _compile_command()
    name = f"cpu-{_fingerprint(command)}.so"
    refusals = []
    for folder in _folders():
        library = folder / name
        if library.exists() and library.stat().st_uid in (os.getuid(), 0):
            return library
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_uid != os.getuid():
                raise PermissionError(f"{folder} belongs to another user")
            with FileLock(folder / f"{name}.lock", timeout=_LONGEST_BUILD):
                if not library.exists():
                    _compile(command, library)
            return library
        except OSError as error:  # of files; filelock's Timeout is one as well
            refusals.append(str(error))
    raise BuildError(f"no folder takes the compiled kernels ({'; '.join(refusals)}); set DITAC_CACHE_DIR to one")


def _folders() -> list[Path]:
    chosen = os.environ.get("DITAC_CACHE_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    return [Path(chosen) if chosen else cache / "ditac_timm", Path(tempfile.gettempdir()) / f"ditac_timm-{os.getuid()}"]


def _compile_command() -> list[str]:
    if sys.platform == "win32":
        raise BuildError("on Windows there are no compiled kernels for the CPU yet")
    native = "-mcpu=native" if os.uname().machine in ("aarch64", "arm64", "ppc64le") else "-march=native"
    torch_folder = Path(torch.__file__).parent  # torch.utils.cpp_extension warns on import of a CUDA that is not there
    return [
        *shlex.split(os.environ.get("CXX", "c++")), "-std=c++20", "-O3", native, "-fopenmp", "-fPIC", "-shared", "-w",
        f"-isystem{torch_folder / 'include'}", str(_SOURCE), f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu",
    ]  # fmt: skip


def _fingerprint(command: list[str]) -> str:
    paths = ("-isystem", "-L", str(_SOURCE))  # torch's version stands for what lies there
    flags = [word for word in command if not word.startswith(paths)]
    try:
        macros = subprocess.run(
            [*flags, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, check=True, timeout=60
        ).stdout
    except FileNotFoundError:
        raise BuildError(f"there is no C++ compiler {command[0]!r}; install one, or name one in CXX") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the C++ compiler {command[0]!r} does not work: {_last_words(error)}") from error
    sources = [path.read_bytes() for path in (_SOURCE, *sorted(_SOURCE.parent.glob("*.h")))]
    parts = (*sources, torch.__version__.encode(), " ".join(flags).encode(), macros)
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _compile(command: list[str], library: Path) -> None:
    _logger.info(f"Compiling DiTAC's kernels for this processor, once, into {library}.")
    handle, partial = tempfile.mkstemp(suffix=".so", prefix=".partial-", dir=library.parent)
    os.close(handle)
    try:
        subprocess.run([*command, "-o", partial], capture_output=True, check=True, timeout=_LONGEST_BUILD)
        os.chmod(partial, 0o755)
        os.replace(partial, library)
    except subprocess.SubprocessError as error:
        raise BuildError(f"{command[0]} did not compile {_SOURCE.name}: {_last_words(error)}") from error
    finally:
        Path(partial).unlink(missing_ok=True)


def _last_words(error: Exception) -> str:
    output = (getattr(error, "stderr", None) or b"").decode(errors="replace")
    errors = [line.strip() for line in output.splitlines() if "error" in line]
    return errors[0] if errors else str(error).splitlines()[0]
