"""Where data come from: downloaded by the usual library, or a folder the user names."""

import json
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor

from ..training.errors import UsageError, first_line

__all__ = ["Mixture", "auto_mpg", "draw_mixture", "ubyte_images"]


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
