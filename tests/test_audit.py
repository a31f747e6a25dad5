"""The audit: what it finds, what it passes over, and that it leaves the model alone."""

import copy
import re

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import EvoNorm2dS0, FilterResponseNormTlu2d
from torch import nn

from ditac_timm import DiTAC, audit_activations, replace_activations
from ditac_timm.audit import ActivationCall

HERE = re.compile(r".*test_audit\.py:\d+")


class Calls(nn.Module):
    """A function as a module's forward."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.function(x)


def found(function, shape=(4, 8, 8)):
    return audit_activations(nn.Sequential(nn.Identity(), Calls(function)), shape)


# --- What it finds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (F.relu, "relu"),
        (torch.relu, "relu"),
        (torch.relu_, "relu"),
        (lambda x: x.relu(), "relu"),
        (F.relu6, "relu6"),
        (F.leaky_relu, "leaky_relu"),
        (F.elu, "elu"),
        (F.selu, "elu"),
        (F.gelu, "gelu"),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu"),
        (F.silu, "silu"),
        (lambda x: F.silu(x, inplace=True), "silu"),
        (F.mish, "mish"),
        (F.hardswish, "hardswish"),
        (F.softplus, "softplus"),
        (F.softshrink, "softshrink"),
        (F.logsigmoid, "log_sigmoid_forward"),
        (torch.tanh, "tanh"),
        (lambda x: x * x.sigmoid(), "x * sigmoid(x)"),
        (lambda x: x.sigmoid() * x, "x * sigmoid(x)"),
        (lambda x: x.clone().mul_(x.sigmoid()), None),  # another tensor: taken for a gate
        (lambda x: x * torch.sigmoid(1.702 * x), "x * sigmoid(x)"),
        (lambda x: F.prelu(x, torch.full((1,), 0.25, device=x.device)), "_prelu_kernel"),
    ],
)
def test_functional_calls(function, operator):
    calls = found(function)
    if operator is None:
        assert calls == []
        return
    (call,) = calls
    assert (call.operator, call.path, call.calls) == (operator, "1", 1)
    assert HERE.fullmatch(call.source) or call.source.startswith("torch/"), call.source


def test_source_is_the_line_of_the_call():
    def function(x):
        return F.relu(x)

    (call,) = found(function)
    assert call.source.endswith(f"test_audit.py:{function.__code__.co_firstlineno + 1}")
    assert str(call) == f"relu in 1 ({call.source})"


def test_calls_are_counted_by_place():
    def twice(x):
        for _ in range(3):
            x = F.relu(x)
        return F.gelu(x)

    assert [(call.operator, call.calls) for call in found(twice)] == [("relu", 3), ("gelu", 1)]


def test_model_itself():
    (call,) = audit_activations(Calls(F.relu), (3,))
    assert call.path == ""
    assert "in the model" in str(call)


def test_activation_modules_are_calls_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Mish()))
    assert [(call.operator, call.path) for call in audit_activations(model, (4,))] == [("relu", "1"), ("mish", "2.0")]


@pytest.mark.parametrize(
    ("norm", "operator", "source"),
    [
        (EvoNorm2dS0(32), "x * sigmoid(x)", r"timm/layers/evo_norm\.py:\d+"),
        (FilterResponseNormTlu2d(32), "maximum(x, threshold)", r"timm/layers/filter_response_norm\.py:\d+"),
    ],
)
def test_fused_norms(norm, operator, source):
    (call,) = audit_activations(nn.Sequential(nn.Conv2d(3, 32, 3), norm), (3, 8, 8))
    assert (call.operator, call.path) == (operator, "1")
    assert re.fullmatch(source, call.source)


def test_functional_relu_of_mobilevitv2():
    with torch.device("meta"):
        model = timm.create_model("mobilevitv2_050")
    replace_activations(model, filter_fn=lambda module, path: "attn" not in path)
    calls = audit_activations(model)
    assert {call.operator for call in calls} == {"relu"}
    assert all(call.path.endswith(".attn") for call in calls)
    assert all(re.fullmatch(r"timm/models/mobilevit\.py:\d+", call.source) for call in calls)
    assert len(calls) == 9


# --- What it passes over ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        torch.sigmoid,
        F.hardsigmoid,
        lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
        lambda x: x * F.hardsigmoid(x.mean((2, 3), keepdim=True)),
        lambda x: x.softmax(-1),
        lambda x: x.log_softmax(-1),
        lambda x: x.clamp(-1, 1),
        lambda x: x.clamp(min=0.1).sqrt(),
        lambda x: F.hardtanh(x),
        lambda x: torch.maximum(x, x.flip(-1)),
        lambda x: F.normalize(x),
        lambda x: x * 2.0,
        F.glu,
    ],
)
def test_gates_and_clamps_are_none(function):
    assert found(function) == []


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_recurrent_cells_are_none(cls):
    assert audit_activations(nn.Sequential(nn.Linear(4, 4), cls(4, 4)), (6, 4)) == []


def test_nothing_is_left_after_surgery():
    model = timm.create_model("test_efficientnet")
    assert audit_activations(model)
    replace_activations(model, roles=("main", "se"))
    assert audit_activations(model) == []


def test_ditac_is_none():
    assert audit_activations(nn.Sequential(nn.Linear(4, 4), DiTAC()), (4,)) == []


# --- The model and its input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_model_is_not_changed(training):
    model = timm.create_model("test_resnet").train(training)
    fired = []
    handle = model.layer1[0].act2.register_forward_hook(lambda *_: fired.append(1))
    flags = {name: module.training for name, module in model.named_modules()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    ids = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert len(audit_activations(model)) > 5
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()} == hooks
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == ids
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(value.device.type == "cpu" for value in model.state_dict().values())
    handle.remove()


def test_model_is_left_alone_by_a_failure():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(RuntimeError, match="reduction dim"):
        audit_activations(model, (5,))
    assert not model[1]._forward_hooks
    assert model(torch.ones(1, 4)).shape == (1, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_of_the_model(dtype):
    """A model in half or double precision is audited as it is."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    model(torch.zeros(2, 3, 8, 8))
    assert [call.operator for call in audit_activations(model.to(dtype), (3, 8, 8))] == ["relu"]


def test_models_on_the_meta_device():
    with torch.device("meta"):
        model = timm.create_model("test_resnet")
    assert {call.operator for call in audit_activations(model)} == {"relu"}


def test_input_size_is_timms_configuration():
    model = timm.create_model("test_vit")  # of a fixed size, 160
    assert audit_activations(model) == audit_activations(model, (3, 160, 160))


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.ReLU()])
def test_input_size_is_needed_elsewhere(model):
    with pytest.raises(ValueError, match="input_size is needed"):
        audit_activations(model)


def test_call_is_a_value():
    call = ActivationCall("relu", "layer1", "model.py:3")
    assert call == ActivationCall("relu", "layer1", "model.py:3", 1)
    assert str(call) == "relu in layer1 (model.py:3)"


def test_source_of_a_package_whose_name_begins_like_torchs():
    (call, *_) = audit_activations(torchvision.models.resnet18(), (3, 64, 64))
    assert call.source.startswith("torchvision/models/resnet.py:")
