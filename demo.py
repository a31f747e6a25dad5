#!/usr/bin/env python3
"""Train `mobilenetv3_ditac` on handwritten digits, validate the checkpoint, draw what the activations learned.

The digits are scikit-learn's (1,797 real images of 8 x 8, inside the wheel), so nothing is downloaded. This script only
prepares the images and calls `train.py`, which also draws, and `validate.py` as a user would.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

HERE = Path(__file__).parent
EXPECTED_TOP1 = 95.0


def write_digits(folder: Path) -> None:
    """Write the digits as an image folder: `train/` and `validation/` (one fifth), a folder for each class."""
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    train, held_out = train_test_split(np.arange(len(images)), test_size=0.2, stratify=digits.target, random_state=0)
    for split, indices in (("train", train), ("validation", held_out)):
        for index in indices:
            path = folder / split / str(digits.target[index]) / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[index]).save(path)


def run(script: str, *arguments: str | Path) -> None:
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    print("$", " ".join(["python", script, *map(str, arguments)]), flush=True)
    subprocess.run(command, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="folder for data and results")
    parser.add_argument("--epochs", type=int, default=None, help="train for so many epochs instead of the recipe's")
    args = parser.parse_args()

    data, folder = args.output / "digits", args.output / "mobilenetv3_ditac"
    for old in (data, folder):
        shutil.rmtree(old, ignore_errors=True)
    write_digits(data)
    epochs = [] if args.epochs is None else ["--epochs", str(args.epochs)]
    run(
        "train.py", "-c", HERE / "recipes/digits.yaml", "--data-dir", data, "--output", args.output,
        "--experiment", folder.name, *epochs,
    )  # fmt: skip
    results = args.output / "validation.json"
    run("validate.py", "--checkpoint", folder / "last.pth.tar", "--data-dir", data, "--results-file", results)

    with open(folder / "summary.csv") as file:
        trained = float(list(csv.DictReader(file))[-1]["eval_top1"])
    validated = json.loads(results.read_text())
    validated = (validated[0] if isinstance(validated, list) else validated)["top1"]
    print(f"""
top-1       {trained} at the end of training, {validated} from the checkpoint
checkpoint  {folder / "last.pth.tar"}
summary     {folder / "summary.csv"}
picture     {folder / "activations.png"}""")
    if validated != trained:
        print("The checkpoint does not give the accuracy that training reported.", file=sys.stderr)
        return 1
    if args.epochs is None and trained < EXPECTED_TOP1:
        print(f"Top-1 is below the {EXPECTED_TOP1} that this recipe reaches.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
