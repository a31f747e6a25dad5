"""The fit of theta to another activation, against an integration of its own and against its neighbours."""

import math
import time

import pytest
import torch
from timm.layers.activations import GELUTanh, QuickGELU
from torch import nn

from ditac_timm import DiTAC
from ditac_timm.matching import match

OLD = {
    "ReLU": nn.ReLU,
    "ReLU6": nn.ReLU6,
    "LeakyReLU": nn.LeakyReLU,
    "Hardswish": nn.Hardswish,
    "SiLU": nn.SiLU,
    "Mish": nn.Mish,
    "ELU": nn.ELU,
    "QuickGELU": QuickGELU,
    "GELUTanh": GELUTanh,
}
CASES = [
    *(("ditac", name) for name in OLD),
    *((version, name) for version in ("ge", "leaky", "inf") for name in ("ReLU", "ELU", "SiLU", "GELUTanh")),
]
RIDGE = 1e-6  # the objective is the mean squared error and this times theta's squared norm


def error(version, theta, old, x):
    """New minus old activation at float64 points."""
    new = DiTAC(version, dtype=torch.float64).eval()
    with torch.no_grad():
        new.theta.copy_(torch.as_tensor(theta))
        return new(x) - old(x.clone())


def mean_square(version, theta, old, reach=9.0, points=180_001):
    """The mean squared error under a standard normal input, by the trapezoidal rule."""
    x = torch.linspace(-reach, reach, points, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    return torch.trapezoid(error(version, theta, old, x).square() * density, x).item()


@pytest.mark.parametrize(("version", "name"), CASES)
def test_stated_errors(version, name):
    old = OLD[name]()
    fit = match(old, DiTAC(version))
    jump = 0.01 if version == "leaky" else 0.0  # at a, which weighs a whole step on the grid of the fit
    assert fit.rms == pytest.approx(math.sqrt(mean_square(version, fit.theta, old)), rel=2e-2, abs=1e-7 + jump)
    largest = error(version, fit.theta, old, torch.linspace(-6, 6, 120_001, dtype=torch.float64)).abs().max().item()
    assert fit.max == pytest.approx(largest, rel=2e-2, abs=1e-7)


@pytest.mark.parametrize(("version", "name"), CASES)
def test_optimum(version, name):
    old = OLD[name]()
    fit = match(old, DiTAC(version))
    theta = torch.tensor(fit.theta, dtype=torch.float64)

    def objective(theta):
        return mean_square(version, theta, old, reach=6.0, points=2401) + RIDGE * theta.square().sum().item()

    best = objective(theta)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-2, 1e-1, 1.0):
        for _ in range(5):
            step = torch.randn(theta.shape, generator=generator, dtype=theta.dtype)
            assert objective(theta + size * step / step.norm()) >= best * (1 - 1e-4) - 1e-12


@pytest.mark.parametrize("name", OLD)
def test_fit_is_closer_than_the_identity_start(name):
    old = OLD[name]()
    fit = match(old, DiTAC())
    assert fit.rms < math.sqrt(mean_square("ditac", torch.zeros(9), old))


def test_gelu_needs_no_change():
    fit = match(nn.GELU(), DiTAC())
    assert fit.theta == (0.0,) * 9
    assert fit.rms < 1e-6
    assert fit.max < 1e-6


@pytest.mark.parametrize("arguments", [{"cells": 4}, {"domain": (-2.0, 4.0)}, {"version": "ge", "cells": 5}])
def test_settings_are_those_of_the_module(arguments):
    fit = match(nn.SiLU(), DiTAC(**arguments))
    assert len(fit.theta) == arguments.get("cells", 10) - 1
    assert fit != match(nn.SiLU(), DiTAC())


def test_cached():
    old = nn.Hardswish()
    fit = match(old, DiTAC())
    start = time.perf_counter()
    assert match(nn.Hardswish(inplace=True), DiTAC()) is fit
    assert time.perf_counter() - start < 0.1
    assert match(nn.LeakyReLU(0.1), DiTAC()) is not match(nn.LeakyReLU(0.2), DiTAC()), "settings are part of the curve"


def test_neither_module_is_changed():
    old, new = nn.PReLU(3, init=0.3).half(), DiTAC("ditac", init="prior")
    before = old.weight.clone(), new.theta.detach().clone()
    match(old, new)
    assert torch.equal(old.weight, before[0])
    assert old.weight.dtype == torch.float16
    assert torch.equal(new.theta, before[1])


def test_a_channelwise_prelu_counts_as_its_mean_slope():
    old = nn.PReLU(2)
    with torch.no_grad():
        old.weight.copy_(torch.tensor([0.0, 0.5]))
    assert match(old, DiTAC()) is match(nn.PReLU(1, init=0.25), DiTAC())


def test_a_module_without_values_counts_as_its_class_makes_it():
    with torch.device("meta"):
        old = nn.PReLU(4)
    assert match(old, DiTAC()) is match(nn.PReLU(), DiTAC())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
def test_context_does_not_matter(context):
    with context():
        fit = match(nn.Softplus(beta=1.5), DiTAC())
    assert fit.rms < 0.1
    assert match(nn.Softplus(beta=1.5), DiTAC()) is fit
