"""Theta refitted to a model's own inputs."""

import copy
import pickle
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import ditac_timm
from ditac_timm import DiTAC, calibrate, replace_activations


def network(act: type[nn.Module] = nn.ReLU6, gain: float = 3.0) -> nn.Module:
    """Whose activations get inputs far from standard normal."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(3):
        linear = nn.Linear(32, 32)
        nn.init.normal_(linear.weight, std=gain / 32**0.5)
        nn.init.normal_(linear.bias, 1.0, 1.0)
        layers += [linear, act()]
    return nn.Sequential(*layers, nn.Linear(32, 5)).eval()


def batch(seed: int) -> torch.Tensor:
    return torch.randn(500, 32, generator=torch.Generator().manual_seed(seed))


def distance(model: nn.Module, base: nn.Module) -> float:
    """On other inputs than those calibrated to."""
    x = batch(1)
    with torch.no_grad():
        return (model(x) - base(x)).square().mean().sqrt().item()


@pytest.mark.parametrize("act", [nn.ReLU6, nn.Hardswish, nn.SiLU, nn.ELU, nn.PReLU])
def test_it_comes_closer_to_the_original(act: type[nn.Module]) -> None:
    base = network(act)
    errors = {}
    for domain in (False, True):
        model = copy.deepcopy(base)
        replace_activations(model)
        errors["match"] = distance(model, base)
        report = calibrate(model, batch(0), domain=domain)
        errors[str(domain)] = distance(model, base)
        assert list(report) == ["1", "3", "5"]
        for path, result in report.items():
            layer = model.get_submodule(path)
            assert isinstance(layer, DiTAC)
            assert result.after <= result.before
            assert tuple(layer.theta.tolist()) == pytest.approx(result.theta, rel=1e-6, abs=1e-7)
            assert layer.domain == result.domain
            assert (result.domain == (-3, 3)) or domain
    # Beyond the domain theta changes nothing; a wider one is for what saturates.
    assert errors["False"] < 1.01 * errors["match"]
    assert errors["True"] < errors["match"] * (0.5 if act is nn.ReLU6 else 1.01)


@pytest.mark.parametrize("version", ["ditac", "ge", "leaky", "inf"])
def test_every_version(version: str) -> None:
    base = network()
    model = copy.deepcopy(base)
    replace_activations(model, version=version)
    before = distance(model, base)
    calibrate(model, batch(0), domain=True)
    assert distance(model, base) < before


def test_each_makes_up_for_those_before() -> None:
    """What an activation is fitted to is what the original gave there, not what it would give to changed inputs."""
    base = network()
    model = copy.deepcopy(base)
    replace_activations(model, cells=3)  # which leave something to make up for
    calibrate(model, batch(0), domain=True)
    with torch.no_grad():
        hidden, expected = model[:5](batch(0)), base[:6](batch(0))
        inputs = base[:5](batch(0)).flatten().double()
        last = model[5]
        assert isinstance(last, DiTAC)
        alone = copy.deepcopy(last)
        fit = ditac_timm.matching.fit_points(inputs, nn.functional.relu6(inputs), last.version, last.cells, last.domain)
        alone.start_from(fit.theta)
        after, without = ((act(hidden) - expected).square().mean() for act in (last, alone))
        assert after < without


def test_nothing_but_theta_changes() -> None:
    model = network()
    replace_activations(model, init="identity")
    model.insert(4, nn.BatchNorm1d(32))
    model.train()
    model[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    calibrate(model, batch(0))
    assert [module.training for module in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.endswith(".theta"), name
    assert not any(module._forward_hooks for module in model.modules())


def test_gelu_stays_itself() -> None:
    model = network(nn.GELU)
    replace_activations(model)
    report = calibrate(model, batch(0), domain=True)
    assert all(result.after < 1e-4 for result in report.values())


def test_one_activation_at_several_places() -> None:
    shared = nn.ReLU6()
    base = network()
    base[1] = base[3] = base[5] = shared
    model = copy.deepcopy(base)
    replace_activations(model)
    before = distance(model, base)
    report = calibrate(model, batch(0), domain=True)
    assert list(report) == ["1"]
    assert distance(model, base) < before


def test_what_it_replaced_survives_copies_and_a_start_without_values() -> None:
    for model in (network(), network(nn.PReLU)):
        replace_activations(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert not [name for name in twin.state_dict() if "original" in name]
            assert calibrate(twin, batch(0)) == calibrate(copy.deepcopy(model), batch(0))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(32, 32), nn.PReLU())
        replace_activations(model)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    calibrate(model, batch(0))


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100"])
def test_a_model_of_the_zoo_is_saved_with_its_domains(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model("ditac", base=name, num_classes=3, ditac={"init": "identity"}).eval()
    images = torch.randn(4, 3, 64, 64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # inputs beyond the domain
            nn.init.constant_(module.bias, 3.0)
    report = calibrate(model, images, domain=True)
    assert {result.domain for result in report.values()} != {(-3.0, 3.0)}
    timm.models.save_for_hf(model, tmp_path / "saved", safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


def test_a_domain_for_each_activation() -> None:
    model = network()
    report = replace_activations(model, domain={"1": [-3, 8], "5": (-4.0, 4.0)})
    assert report.to_dict()["settings"]["domain"] == {"1": [-3, 8], "5": [-4.0, 4.0]}
    assert "domain=its own" in str(report)
    assert [model[index].domain for index in (1, 3, 5)] == [(-3, 8), (-3, 3), (-4, 4)]
    model = network()
    with pytest.raises(ValueError, match="domain names 2, where no activation is replaced"):
        replace_activations(model, domain={"1": (-3, 8), "2": (-3, 8)})
    assert isinstance(model[1], nn.ReLU6)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="model has no DiTAC"):
        calibrate(network(), batch(0))
    with pytest.raises(ValueError, match="1 replaced no activation"):
        calibrate(nn.Sequential(nn.Linear(32, 32), DiTAC()), batch(0))
    model = network()
    replace_activations(model)

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = model[:2], model[2:4]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    half = Half()
    before = copy.deepcopy(half.state_dict())
    with pytest.raises(ValueError, match=r"the batch does not reach unused\.3: nothing was changed"):
        calibrate(half, batch(0))
    assert all(torch.equal(value, before[name]) for name, value in half.state_dict().items())
