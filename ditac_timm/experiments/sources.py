"""Where data come from: downloaded by the usual library, or a folder the user names."""

import json
import re
import tempfile
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor

from ..training.errors import UsageError, first_line

__all__ = ["Mixture", "auto_mpg", "draw_mixture", "ubyte_images", "write_images"]


def ubyte_images(name: str, folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """MNIST or FashionMNIST by torchvision: `(N, 28, 28)` uint8 and labels, of training and test.

    Raises:
        UsageError: It is not in the folder, and cannot be downloaded.
    """
    data = getattr(torchvision.datasets, name)
    try:
        train, test = (data(folder, train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"--data-dir {folder}: {name} cannot be downloaded ({first_line(error)}), and {name}/raw in that folder "
            "lacks train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte or t10k-labels-idx1-ubyte: "
            "put the four there"
        ) from error
    return train.data, train.targets, test.data, test.targets


def write_images(data_dir: Path, folder: Path, train: int, test: int, seed: int, tuning: int = 2_000) -> Path:
    """Write a part of Fashion-MNIST as an image folder, equally many of each class; one that is there is kept.

    Args:
        data_dir: Holds FashionMNIST/raw with the four ubyte files, which are downloaded where missing.
        folder: Gets `train/`, `tuning/` (both of the 60,000 training images) and `validation/` (of the test images).
        train: Images of `train/`, a multiple of 10; so are `test`, of `validation/`, and `tuning`.
        test: See `train`.
        seed: Chooses the images; those of `tuning/` do not depend on `train`.
        tuning: See `train`.

    Returns:
        The folder.

    Raises:
        UsageError: The images can be neither read nor downloaded, are too few, or the folder holds something else.
    """
    made = {"dataset": "Fashion-MNIST", "train": train, "tuning": tuning, "test": test, "seed": seed}
    if folder.exists():
        marker = folder / "images.json"
        if not marker.is_file() or json.loads(marker.read_text()) != made:
            raise UsageError(f"{folder} holds something other than the images asked for: name another folder")
        return folder
    odd = [count for count in (train, tuning, test) if count < 10 or count % 10]
    if odd:
        raise UsageError(f"images are chosen evenly of 10 classes: their number must be a multiple of 10, not {odd[0]}")
    arrays = [part.numpy() for part in ubyte_images("FashionMNIST", data_dir)]
    found = {"train": arrays[:2], "test": arrays[2:]}
    rng = np.random.default_rng(seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        whole = Path(temporary) / "images"
        for source, splits in (("train", {"tuning": tuning, "train": train}), ("test", {"validation": test})):
            images, labels = found[source]
            for label, class_name in enumerate(torchvision.datasets.FashionMNIST.classes):
                left = rng.permutation(np.flatnonzero(labels == label))
                if len(left) < sum(splits.values()) // 10:
                    raise UsageError(f"Fashion-MNIST has {len(left)} {source} images of a class: ask for fewer")
                for split, count in splits.items():
                    chosen, left = left[: count // 10], left[count // 10 :]
                    target = whole / split / re.sub(r"\W", "-", f"{label} {class_name}".lower())
                    target.mkdir(parents=True)
                    for index in chosen:
                        Image.fromarray(images[index]).save(target / f"{index:05d}.png")
        (whole / "images.json").write_text(json.dumps(made))
        whole.rename(folder)
    return folder


def auto_mpg(folder: Path) -> tuple[Tensor, Tensor]:
    """Miles per gallon and horsepower of 392 cars, each `(392, 1)` float64; those with either missing are left out.

    From `auto-mpg.data`, UCI's file, where the folder has it; else from the package vega_datasets.

    Raises:
        UsageError: Neither is there, or the file is another.
    """
    file = folder / "auto-mpg.data"
    if file.is_file():
        lines = [line.split() for line in file.read_text().splitlines() if line.strip()]
        try:
            pairs = [(float(line[0]), float(line[3])) for line in lines if not {"?", "NA"} & {line[0], line[3]}]
        except (ValueError, IndexError) as error:
            raise UsageError(
                f"{file} is not UCI's: its columns are mpg, cylinders, displacement, horsepower ..."
            ) from error
    else:
        try:
            cars = json.loads(resources.files("vega_datasets").joinpath("_data", "cars.json").read_text())
        except (ImportError, FileNotFoundError) as error:
            raise UsageError(
                f"Auto-MPG is not there: pip install 'ditac_timm[experiments]', or put UCI's auto-mpg.data in {folder} "
                "(--data-dir)"
            ) from error
        pairs = [(car["Miles_per_Gallon"], car["Horsepower"]) for car in cars]
        pairs = [pair for pair in pairs if None not in pair]
    numbers = torch.tensor(sorted(pairs), dtype=torch.float64)  # sources differ in their order
    return numbers[:, :1], numbers[:, 1:]


class Mixture(NamedTuple):
    """A sample of a mixture of Gaussians in the plane.

    Attributes:
        x: `(N, 2)`.
        y: `(N,)`, the component that each point is of.
        bayes: Accuracy on the test points (the last 30 %) of whoever knows the mixture, in percent.
    """

    x: Tensor
    y: Tensor
    bayes: float


def draw_mixture(seed: int, classes: int = 10, points: int = 5000, test: int = 1500) -> Mixture:
    """Components from a normal-inverse-Wishart distribution, weights from a Dirichlet one (supplement, section A.1).

    The supplement does not print their parameters. Here they are mean 0, kappa 0.1, the identity and 5 degrees of
    freedom, so that components overlap somewhat; and concentration 10 for the weights, so that no class is empty.
    """
    generator = torch.Generator().manual_seed(seed)
    kappa, freedom, dimension, concentration = 0.1, 5, 2, 10

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    # A Wishart matrix of whole degrees of freedom is a sum of squares of normals, and so is a gamma variate.
    spread = normal(classes, dimension, freedom)
    covariances = (spread @ spread.mT).inverse()
    gammas = normal(classes, 2 * concentration).square().sum(1)
    weights = gammas / gammas.sum()
    means = (torch.linalg.cholesky(covariances / kappa) @ normal(classes, dimension, 1)).squeeze(-1)
    components = torch.distributions.MultivariateNormal(means, covariances)
    y = torch.multinomial(weights, points, replacement=True, generator=generator)
    x = means[y] + (components.scale_tril[y] @ normal(points, dimension, 1)).squeeze(-1)
    best = (components.log_prob(x[-test:].unsqueeze(1)) + weights.log()).argmax(1)
    return Mixture(x, y, (best == y[-test:]).double().mean().item() * 100)
