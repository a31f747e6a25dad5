"""Builds the kernels for this machine's processor ahead of time: `python -m ditac_timm.ops`."""

import logging
import sys

from .cpu import BuildError, build

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(build())
    except BuildError as error:
        sys.exit(f"DiTAC's kernels were not built: {error}.")
