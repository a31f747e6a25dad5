"""Errors a user can mend, and the one place that turns them into a sentence and an exit code."""

import difflib
import logging
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

from timm import utils

_logger = logging.getLogger(__name__)

INTERRUPTED = 130  # 128 + SIGINT, what shells report


class RunError(Exception):
    """The run cannot go on. The message is one sentence for the user."""

    exit_code = 1


class UsageError(RunError):
    """What was asked for cannot be done. The message names the flag and what would be right."""

    exit_code = 2


class DataLostError(RunError):
    """Images cannot be read any more."""


class Interrupted(RunError):
    """The run was asked to stop, and can go on from where it saved."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h, which schedulers take for: try again


def run_script(name: str, script: Callable[[Any], None], args: Callable[[], Any]) -> int:
    """Parse, run and return the exit code of a script.

    Args:
        name: The script's name, put before an error's sentence on stderr.
        script: Does the work, given the parsed flags.
        args: Parses the flags; called here, so that its errors are reported like any other.
    """
    if not logging.root.handlers:  # a caller that imports the script may have its own logging
        utils.setup_default_logging()
    try:
        script(args())
    except RunError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean ...?)" with the known names nearest to `name`, or "" where none is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def as_typed(value: Any) -> str:
    """Return a value as a command line spells it: the items of a list side by side."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def first_line(error: BaseException) -> str:
    """Return the first line that says something: past huggingface_hub's status; an error's kind where it is silent."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not re.match(r"\d{3} (Client|Server) Error\.", line)]
    return next(iter(telling or lines), type(error).__name__).strip()
