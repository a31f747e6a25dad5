"""Small real images, and the scripts as modules, for the tests of training."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).resolve().parents[2]


def write_digits(folder: Path, *, classes: int = 10, train: int = 12, validation: int = 5) -> Path:
    """Write scikit-learn's handwritten digits as image folders: so many images a class, 32 pixels wide."""
    digits = load_digits()
    for label in range(classes):
        images = digits.images[digits.target == label]
        for split, chosen in (("train", images[:train]), ("validation", images[train : train + validation])):
            target = folder / split / f"digit_{label}"
            target.mkdir(parents=True)
            for index, image in enumerate(chosen):
                grey = Image.fromarray((image * (255 / 16)).astype("uint8"))
                grey.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB").save(target / f"{index}.png")
    return folder


def load_script(name: str) -> ModuleType:
    """Import a script of the repository's root, without running it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_two_processes(*argv: str) -> str:
    """Run `train.py` in two processes under torchrun, to its end, and return what it logged."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(ROOT / "train.py"), *argv],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr
