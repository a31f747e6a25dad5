"""Fixtures: small real images, and the scripts as modules."""

from pathlib import Path
from types import ModuleType

import pytest
from script_runs import load_script, write_digits


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of twelve training and five validation images; not to be written to."""
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def train() -> ModuleType:
    """The script `train.py`, imported."""
    return load_script("train")


@pytest.fixture(scope="session")
def validate() -> ModuleType:
    """The script `validate.py`, imported."""
    return load_script("validate")
