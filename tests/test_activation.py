"""The module against the closed form, and in everything that PyTorch and timm do with a module."""

import copy
import io
import math
import pickle
from functools import partial

import numpy as np
import pytest
import timm.optim
import timm.utils
import torch
import torch.nn.functional as F
from test_ops import DTYPES, VERSIONS, closed_form, points, table_error
from torch import nn
from torch.utils.checkpoint import checkpoint

from ditac_timm import cpab
from ditac_timm.activation import DiTAC
from ditac_timm.ops import reference as reference_ops

INF = math.inf


def prior(version="ditac", seed=0, **arguments):
    """A DiTAC with a theta drawn from the prior."""
    torch.manual_seed(seed)
    return DiTAC(version, init="prior", **arguments)


def expected_output(module, x, theta=None):
    """The closed form in float64, differentiable in x and theta."""
    theta = module.theta.detach().double() if theta is None else theta
    return closed_form(x, module.tessellation.velocities(theta), module.version, module.domain)


def gradients(function, x, module):
    """y, and the gradients of x and theta for a loss that weighs the outputs."""
    x = x.detach().requires_grad_()
    y = function(x)
    weights = points(y.numel(), seed=7, reach=1.0, dtype=y.dtype).reshape(y.shape)
    return y.detach(), *torch.autograd.grad(y, [x, module.theta], weights)


def assert_same(ours, expected):
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


# --- What it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("seed", range(3))
def test_matches_the_closed_form(version, mode, seed):
    module = prior(version, seed).train(mode == "train")
    x = points(seed=seed, dtype=torch.float32)
    y, dx, dtheta = gradients(module, x, module)
    exact_x, theta = x.double().requires_grad_(), module.theta.detach().double().requires_grad_()
    expected = expected_output(module, exact_x, theta)
    weights = points(len(x), seed=7, reach=1.0, dtype=torch.float32).double()
    expected_dx, expected_dtheta = torch.autograd.grad(expected, [exact_x, theta], weights)
    assert (y - expected).abs().max() <= table_error(module.domain, module.bins)
    error = (dx - expected_dx).abs() / (1 + expected_dx.abs())
    assert error.quantile(0.99) <= 1e-3
    assert error.max() <= 0.1
    assert (dtheta - expected_dtheta).norm() <= 2e-3 * expected_dtheta.norm()


@pytest.mark.parametrize(
    "arguments",
    [
        {"cells": 2},
        {"cells": 31},
        {"domain": (-1.5, 4.0)},
        {"domain": (0.5, 2.0), "cells": 3},
        {"domain": (-9.0, -7.0)},
        {"domain": (-8.0, 8.0), "cells": 7},
        {"version": "ge", "domain": (0.0, 7.5)},
        {"version": "leaky", "domain": (0.0, 2.0)},
        {"version": "leaky", "domain": (-2.0, 0.0)},
        {"version": "inf", "domain": (-0.1, 0.1)},
    ],
    ids=str,
)
def test_other_cells_and_domains(arguments):
    module = prior(**arguments).double()
    x = points(reach=12.0)
    error = (module(x) - expected_output(module, x)).abs().max()
    # The bins are at most 1/400 wide; cells narrower than 0.6 hold sharper bends.
    a, b = module.domain
    assert error <= table_error((-3.0, 3.0), 2400) * max(1, 0.6 * module.cells / (b - a)) * max(1, (b - a) / 6)


@pytest.mark.parametrize("domain", [(1.0, 2.0), (-2.0, -1.0)])
def test_leaky_without_0_in_its_domain_is_right_or_refused(domain):
    """The leaky ReLU outside the domain then has its kink there, where the table's tails are straight."""
    try:
        module = prior("leaky", domain=domain).double()
    except ValueError as error:
        assert "domain" in str(error)
    else:
        x = points()
        torch.testing.assert_close(module(x), expected_output(module, x), rtol=0, atol=1e-3)


def test_identity_init_is_gelu():
    x = torch.cat([points(200001, reach=scale, dtype=torch.float32) for scale in (1, 8, 100, 1e4)])
    x = torch.cat([x, torch.tensor([0.0, -0.0, 3, -3, 6, -6, 1e4, -1e4, 1e-30])]).requires_grad_()
    expected = F.gelu(x.detach())
    for module in (DiTAC(), DiTAC().eval()):
        y = module(x)
        assert ((y - expected).abs() <= 2e-6 * x.abs().clamp(min=1)).all()
        (dx,) = torch.autograd.grad(y.sum(), x)
        (expected_dx,) = torch.autograd.grad(F.gelu(x).sum(), x)
        assert (dx - expected_dx).abs().max() <= 1e-4


def test_identity_init_of_the_other_versions():
    x = points(dtype=torch.float32)
    torch.testing.assert_close(DiTAC("inf")(x), x, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(DiTAC("ge")(x), torch.where(x < 0, F.gelu(x), x), rtol=1e-6, atol=2e-6)
    leaky = torch.where(x.abs() <= 3, x, F.leaky_relu(x, 0.01))
    torch.testing.assert_close(DiTAC("leaky")(x), leaky, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("theta_dtype", DTYPES)
def test_dtypes_of_input_and_theta(version, dtype, theta_dtype):
    """The output has x's dtype, and is that of a float64 input but for one rounding."""
    module = prior(version, dtype=theta_dtype)
    assert module.theta.dtype == theta_dtype
    x = points(2000, dtype=dtype)
    y, dx, dtheta = gradients(module, x, module)
    assert (y.dtype, dx.dtype, dtheta.dtype) == (dtype, dtype, theta_dtype)
    with torch.no_grad():
        wide = copy.deepcopy(module).double()(x.double())
        if dtype != torch.float64 and version != "inf":
            assert (y.double() - wide).abs().max() <= 1e-5 + torch.finfo(dtype).eps / 2 * wide.abs().max()
        torch.testing.assert_close(module.eval()(x), y, rtol=0, atol=0)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_very_large_theta_is_finite(version, dtype):
    """Knot velocities of sd 20: slopes of 1e7 and more."""
    module = DiTAC(version, dtype=dtype)
    module.theta.data = 50 * torch.randn(9, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert all(tensor.isfinite().all() for tensor in gradients(module, points(dtype=dtype), module))
    y = module(points(dtype=dtype).sort().values).detach()
    if version == "inf":
        assert (y.diff() >= -1e-3 * y.abs().max()).all()


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 5), (2, 3, 5), (2, 3, 4, 5), (3, 0, 2)], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_shapes(shape, mode):
    module, x = prior().train(mode == "train"), torch.randn(shape)
    y, dx, dtheta = gradients(module, x, module)
    assert y.shape == dx.shape == x.shape
    assert dtheta.shape == (9,)
    assert x.numel() or not dtheta.any()


def test_keeps_channels_last_in_a_network():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), prior()).to(memory_format=torch.channels_last)
    seen = []
    model[1].register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_in[0]))
    y = model(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    y.square().sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("version", VERSIONS)
def test_limits(version):
    y = prior(version)(torch.tensor([INF, -INF, math.nan]))
    assert y[0] == INF
    assert y[1] == (0 if version in ("ditac", "ge") else -INF)
    assert y[2].isnan()


def test_second_derivatives():
    """A gradient penalty, trained through: as with the closed form, up to the table's error."""
    module = prior().double()
    x = points(20000, reach=5.0).requires_grad_()

    def penalty_gradient(y, theta):
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().mean(), theta)[0]

    theta = module.theta.detach().clone().requires_grad_()
    ours = penalty_gradient(module(x), module.theta)
    expected = penalty_gradient(expected_output(module, x, theta), theta)
    assert (ours - expected).norm() <= 0.02 * expected.norm()


def test_adahessian_trains():
    """It asks for second derivatives in every step."""
    model = nn.Sequential(nn.Linear(3, 4), prior(), nn.Linear(4, 1))
    optimizer = timm.optim.create_optimizer_v2(model, "adahessian", lr=0.05)
    theta, x = model[1].theta.detach().clone(), torch.randn(32, 3)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward(create_graph=True)
        optimizer.step()
    assert model[1].theta.isfinite().all()
    assert not torch.equal(model[1].theta, theta)


def test_curve():
    module = prior()
    x, y = module.curve(11)
    assert (x.dtype, x[0], x[-1]) == (torch.float64, -6, 6)
    assert not y.requires_grad
    torch.testing.assert_close(y, expected_output(module, x), rtol=0, atol=table_error(module.domain, module.bins))
    given = torch.randn(2, 3)
    assert module.curve(given)[0] is given
    assert torch.equal(module.curve(given)[1], module(given))


def test_start_from_survives_a_reset():
    theta = [0.1 * i for i in range(9)]
    with torch.device("meta"):
        module = DiTAC()
        module.start_from(theta)
    module.to_empty(device="cpu").reset_parameters()
    torch.testing.assert_close(module.theta.detach(), torch.tensor(theta))


# --- Arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"version": "gelu"}, "version must be one of ditac, ge, leaky, inf"),
        ({"init": "zero"}, "init must be one of identity, prior"),
        ({"cells": 1}, "cells"),
        ({"cells": 0}, "cells"),
        ({"cells": 2.5}, "cells"),
        ({"cells": True}, "cells"),
        ({"domain": (3.0, -3.0)}, "domain"),
        ({"domain": (1.0, 1.0)}, "domain"),
        ({"domain": (0.0, INF)}, "domain"),
        ({"domain": (math.nan, 1.0)}, "domain"),
        ({"domain": (0.0,)}, "domain"),
        ({"domain": (0.0, 1.0, 2.0)}, "domain"),
        ({"version": "ge", "domain": (-1.0, 3.0)}, "domain of version 'ge' must begin at 0"),
    ],
    ids=str,
)
def test_bad_arguments_raise_in_one_sentence(arguments, names):
    with pytest.raises(ValueError, match=names) as raised:
        DiTAC(**arguments)
    assert str(raised.value).count(". ") == 0
    assert str(raised.value).endswith(".")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_integers_raise(dtype):
    with pytest.raises(TypeError, match="floating"):
        DiTAC()(torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("cells", [2, 10, 23])
def test_theta_is_all_its_state(cells):
    module = DiTAC(cells=cells, inplace=True)
    assert {name: tensor.shape for name, tensor in module.state_dict().items()} == {"theta": (cells - 1,)}
    assert not list(module.buffers())
    assert [name for name, _ in module.named_parameters()] == ["theta"]


def test_state_dict_is_still_theta_alone_after_use():
    module = prior().eval()
    with torch.no_grad():
        module(torch.randn(5))
    assert list(module.state_dict()) == ["theta"]


def test_inplace_is_ignored():
    x = torch.randn(100)
    kept = x.clone()
    DiTAC(inplace=True)(x)
    assert torch.equal(x, kept)


def test_weight_decay_leaves_theta_alone():
    model = nn.Sequential(nn.Linear(3, 4), DiTAC(), nn.Linear(4, 2))
    without, with_decay = timm.optim.param_groups_weight_decay(model, weight_decay=0.05)
    assert (without["weight_decay"], with_decay["weight_decay"]) == (0.0, 0.05)
    assert any(parameter is model[1].theta for parameter in without["params"])
    assert not any(parameter is model[1].theta for parameter in with_decay["params"])


def test_prior_init_draws_from_the_global_generator():
    torch.manual_seed(3)
    module = DiTAC(init="prior")
    torch.manual_seed(3)
    assert torch.equal(module.theta.detach(), cpab.sample_prior(module.tessellation).float())
    module.reset_parameters()
    assert not torch.equal(module.theta, prior(seed=3).theta)


def test_repr_builds_an_equal_one():
    module = DiTAC("ge", cells=4, domain=(0, 2), init="prior")
    assert repr(module) == "DiTAC(version='ge', cells=4, domain=(0.0, 2.0), init='prior')"


# --- Memory and partial gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_saves_x_and_the_table_only(mode):
    module, x = prior().train(mode == "train"), points(100_000, dtype=torch.float16).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        module(x)
    assert [tensor.data_ptr() for tensor in saved if tensor.numel() >= x.numel()] == [x.data_ptr()]
    others = sorted(tensor.numel() for tensor in saved if tensor.numel() < x.numel())
    assert others[-1] <= 2 * 2 * (module.bins + 3)  # the table: here as wide again outside the domain as on it
    assert sum(others[:-1]) <= 250  # theta, its basis, the velocities


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("x_needs", "theta_needs"), [(True, False), (False, True), (False, False)])
def test_partial_gradients(mode, x_needs, theta_needs):
    module, x = prior().train(mode == "train"), torch.randn(100)
    _, dx, dtheta = gradients(module, x, module)
    module.theta.requires_grad_(theta_needs)
    leaf = x.clone().requires_grad_(x_needs)
    y = module(leaf)
    assert y.requires_grad == (x_needs or theta_needs)
    if y.requires_grad:
        y.backward(points(100, seed=7, reach=1.0, dtype=torch.float32))
    for tensor, needed, expected in ((leaf, x_needs, dx), (module.theta, theta_needs, dtheta)):
        assert torch.equal(tensor.grad, expected) if needed else tensor.grad is None


# --- Eval's table is never stale --------------------------------------------------------------------------------------


def _optimizer_step(optimizer, module):
    module.theta.grad = torch.ones_like(module.theta)
    optimizer([module.theta]).step()


def _ema_update(module):
    """Of the average, which is `module` here, towards another model."""
    average = timm.utils.ModelEmaV3(module, decay=0.5)
    average.module = module
    average.update(prior(seed=9))


def _inference_write(module):
    with torch.inference_mode():
        module.theta.mul_(2)


def _behind_autograd(module):
    """As a collective writes: into the memory, past the version counter."""
    version = module.theta._version
    module.theta.detach().numpy()[:] *= 2
    assert module.theta._version == version


WRITES = {
    "SGD": partial(_optimizer_step, partial(torch.optim.SGD, lr=0.1)),
    "SGD fused": partial(_optimizer_step, partial(torch.optim.SGD, lr=0.1, fused=True)),
    "AdamW foreach": partial(_optimizer_step, partial(torch.optim.AdamW, lr=0.1, foreach=True)),
    "AdamW fused": partial(_optimizer_step, partial(torch.optim.AdamW, lr=0.1, fused=True)),
    "load_state_dict": lambda module: module.load_state_dict(prior(seed=9).state_dict()),
    "load_state_dict, assign": lambda module: module.load_state_dict(prior(seed=9).state_dict(), assign=True),
    "ModelEmaV3": _ema_update,
    "behind autograd": _behind_autograd,
    "vector_to_parameters": lambda module: nn.utils.vector_to_parameters(torch.ones(9), module.parameters()),
    "data, in place": lambda module: module.theta.data.add_(0.3),
    "data, replaced": lambda module: setattr(module.theta, "data", torch.ones(9)),
    "another parameter": lambda module: setattr(module, "theta", nn.Parameter(torch.ones(9))),
    "inference_mode": _inference_write,
    "reset_parameters": lambda module: module.reset_parameters(),
    "one number, one ulp": lambda module: module.theta.data[4:5].nextafter_(torch.tensor([INF])),
    "float64 and written there": lambda module: module.double().theta.data.add_(0.1),
    "bfloat16": lambda module: module.bfloat16(),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_eval_is_never_stale(write, context):
    module, x = prior().eval(), torch.randn(200)
    with context():
        module(x), module(x)  # the second may use what the first kept
    WRITES[write](module)
    fresh = DiTAC(dtype=module.theta.dtype)
    fresh.theta.data = module.theta.detach().clone()
    with context():
        assert torch.equal(module(x), fresh(x))
    assert not torch.equal(fresh.theta.float(), prior().theta)


@pytest.mark.parametrize("frozen", [False, True])
def test_eval_in_every_context_is_what_training_computes(frozen):
    module, x = prior(), torch.randn(100)
    expected = module(x).detach()
    module.eval().theta.requires_grad_(not frozen)
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            assert torch.equal(module(x), expected)
            assert torch.equal(module(x), expected)


def test_to_float64_and_back():
    module, x = prior().eval(), torch.randn(100)
    with torch.no_grad():
        before = module(x)
        module.to(torch.float64)
        assert torch.equal(module(x), before)
        assert module(x.double()).dtype == torch.float64
        module.to(torch.float32)
        assert torch.equal(module(x), before)


@torch.no_grad()
def test_functional_call_with_another_theta():
    module, other, x = prior().eval(), prior(seed=1).eval(), torch.randn(100)
    before = module(x)
    assert torch.equal(torch.func.functional_call(module, {"theta": other.theta}, (x,)), other(x))
    assert torch.equal(module(x), before)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_training_after_inference_mode(mode, frozen):
    """Nothing made in inference mode may reach a backward pass."""
    module, x = prior(cells=13).eval(), torch.randn(100)  # 13: nobody has made its constants before
    with torch.inference_mode():
        module(x)
    module.train(mode == "train").theta.requires_grad_(not frozen)
    leaf = x.clone().requires_grad_()
    module(leaf).sum().backward()
    assert leaf.grad.isfinite().all()
    assert frozen or module.theta.grad.norm() > 0


def test_cache_does_not_travel():
    module, x = prior().eval(), torch.randn(10)
    with torch.no_grad():
        module(x)
        size = len(pickle.dumps(module))
        assert size < 10_000
        twin = copy.deepcopy(module)
        twin.theta.mul_(2)
        assert not torch.equal(twin(x), module(x))


# --- Copies, files, devices -------------------------------------------------------------------------------------------


def _saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved_and_loaded])
def test_copies(version, mode, copied):
    module, x = prior(version, cells=5).train(mode == "train"), torch.randn(100)
    y = module(x)
    twin = copied(module)
    assert twin.theta is not module.theta
    assert twin.training == module.training
    assert_same(gradients(twin, x, twin), gradients(module, x, module))
    twin.theta.data.zero_()
    assert torch.equal(module(x), y)


def test_ema_averages_theta():
    module, x = prior(), torch.randn(50)
    average = timm.utils.ModelEmaV3(module, decay=0.5)
    start = module.theta.detach().clone()
    with torch.no_grad():
        assert torch.equal(average.module(x), module(x))
        module.theta.add_(1)
        average.update(module)
        assert torch.equal(average.module(x), average(x))
    torch.testing.assert_close(average.module.theta.detach(), start + 0.5)


@pytest.mark.parametrize("init", ["identity", "prior"])
@pytest.mark.parametrize("filled", ["reset_parameters", "load_state_dict", "load_state_dict, assign"])
def test_meta_device(init, filled):
    with torch.device("meta"):
        module = DiTAC(init=init)
    assert module.theta.is_meta
    y = module(torch.empty(2, 3, device="meta"))
    assert y.is_meta
    assert y.shape == (2, 3)
    torch.manual_seed(0)
    expected = DiTAC(init=init)
    if filled == "load_state_dict, assign":
        module.load_state_dict(expected.state_dict(), assign=True)
    else:
        module.to_empty(device="cpu")
    if filled == "reset_parameters":
        torch.manual_seed(0)
        module.reset_parameters()
    elif filled == "load_state_dict":
        module.load_state_dict(expected.state_dict())
    x = torch.randn(50)
    assert_same(gradients(module, x, module), gradients(expected, x, expected))


def test_device_and_dtype_arguments():
    module = DiTAC(device="meta", dtype=torch.bfloat16)
    assert (module.theta.device.type, module.theta.dtype) == ("meta", torch.bfloat16)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_checkpointing_changes_no_gradient(use_reentrant, mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), prior(), nn.Linear(6, 6), prior("inf", 1)).train(mode == "train")
    x = torch.randn(8, 5)

    def all_gradients(function):
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        function(leaf).square().sum().backward()
        return [leaf.grad] + [parameter.grad.clone() for parameter in model.parameters()]

    assert_same(all_gradients(partial(checkpoint, model, use_reentrant=use_reentrant)), all_gradients(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_autocast_changes_nothing(dtype, mode):
    module, x = prior().train(mode == "train"), points(500, dtype=dtype)
    expected = gradients(module, x, module)
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(module, x, module)
    assert ours[0].dtype == dtype
    assert_same(ours, expected)


def test_autocast_in_a_network():
    model = nn.Sequential(nn.Linear(5, 6), prior(), nn.Linear(6, 1))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(8, 5))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert model[1].theta.grad.dtype == torch.float32
    assert model[1].theta.grad.norm() > 0


# --- Compiled, exported, transformed ----------------------------------------------------------------------------------


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize(
    ("version", "mode", "backend"),
    [("ditac", "train", "inductor"), ("ditac", "eval", "aot_eager")]
    + [(version, mode, "aot_eager") for version in ("ge", "leaky", "inf") for mode in ("train", "eval")],
)
def test_compile(version, mode, backend):
    """From its first call on: nothing may have run eagerly before."""
    module = prior(version, cells=6).train(mode == "train")
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    x = torch.randn(40, 5)
    first = gradients(compiled, x, module)
    eager = gradients(module, x, module)
    for ours, expected in zip(first, eager, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        module.theta.data.mul_(0.5)
        second = gradients(compiled, x, module)
    torch.testing.assert_close(second[0], module(x).detach(), rtol=1e-5, atol=1e-5)
    assert not torch.equal(second[0], first[0])


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_compiled_eval_is_never_stale(context):
    module, x = prior().eval(), torch.randn(50)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with context():
        compiled(x)
        for write in ("AdamW fused", "behind autograd", "data, in place", "load_state_dict"):
            with torch.inference_mode(False), torch.enable_grad():
                WRITES[write](module)
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("version", ["ditac", "inf"])
def test_export(strict, mode, version):
    module = prior(version, cells=7).train(mode == "train")
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(module, (torch.randn(3, 4),), strict=strict, dynamic_shapes=shapes)
    assert list(program.state_dict) == ["theta"]
    exported, x = program.module(), torch.randn(9, 4)
    assert torch.equal(exported(x), module(x))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), module(x))


def _right_or_refused(function, expected):
    """A transform that torch.library's operators do not support may raise; it may not be wrong."""
    try:
        ours = function()
    except (RuntimeError, NotImplementedError) as error:
        assert str(error)
    else:
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_vmap(mode):
    module, thetas, x = prior().train(mode == "train"), torch.randn(3, 9), torch.randn(4, 5)
    call = partial(torch.func.functional_call, module)
    expected = torch.stack([call({"theta": theta}, (x,)) for theta in thetas])
    torch._C._functorch._set_vmap_fallback_enabled(False)  # torch's loop, which warns at every call
    try:
        assert torch.equal(torch.vmap(lambda theta: call({"theta": theta}, (x,)))(thetas), expected)
        assert torch.equal(torch.vmap(module)(x), module(x))
        assert torch.equal(torch.vmap(module, in_dims=1, out_dims=1)(x), module(x))
        with torch.no_grad():  # where compiled code calls another operator
            compiled = torch.compile(torch.vmap(module), backend="aot_eager")
            assert torch.equal(compiled(x), module(x))
    finally:
        torch._C._functorch._set_vmap_fallback_enabled(True)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("argument", ["theta", "x"])
def test_functional_gradients_are_right_or_refused(mode, argument):
    module, x = prior().train(mode == "train"), torch.randn(50)
    values = {"theta": module.theta.detach().clone(), "x": x}

    def output(value):
        given = {**values, argument: value}
        return torch.func.functional_call(module, {"theta": given["theta"]}, (given["x"],))

    jacobian = torch.autograd.functional.jacobian(output, values[argument])
    ones = torch.ones_like(values[argument])
    _right_or_refused(lambda: torch.func.grad(lambda v: output(v).sum())(values[argument]), jacobian.sum(0))
    _right_or_refused(lambda: torch.func.jacrev(output)(values[argument]), jacobian)
    _right_or_refused(lambda: torch.func.jacfwd(output)(values[argument]), jacobian)
    _right_or_refused(lambda: torch.func.jvp(output, (values[argument],), (ones,))[1], jacobian.sum(1))


def test_per_sample_gradients_are_right_or_refused():
    module, x = prior(), torch.randn(4, 6)

    def loss(theta, row):
        return torch.func.functional_call(module, {"theta": theta}, (row,)).sum()

    expected = torch.stack([torch.autograd.grad(module(row).sum(), module.theta)[0] for row in x])
    _right_or_refused(lambda: torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(module.theta.detach(), x), expected)


def test_under_a_dispatch_mode():
    """Counting FLOPs of a training step: below the mode autograd is switched off."""
    from torch.utils.flop_counter import FlopCounterMode

    module, x = prior(), torch.randn(50)
    (expected,) = torch.autograd.grad(module(x).sum(), module.theta)
    with FlopCounterMode(display=False):
        module(x).sum().backward()
    assert torch.equal(module.theta.grad, expected)


def test_fake_tensors_leave_nothing_behind():
    """Constants kept between calls must be real ones, whatever the first call was made with."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    module = prior(cells=11)  # 11: nobody has made its constants before
    with FakeTensorMode(allow_non_fake_inputs=True):
        module(torch.randn(5))
    with FakeTensorMode():
        twin = DiTAC(cells=11)
        (dtheta,) = torch.autograd.grad(twin(torch.randn(5)).sum(), twin.theta, create_graph=True)
        torch.autograd.grad(dtheta.sum(), twin.theta)
    x = torch.randn(50).requires_grad_()
    y = module(x)
    assert type(y) is torch.Tensor
    (dtheta,) = torch.autograd.grad(y.sum(), module.theta, create_graph=True)
    assert type(dtheta) is torch.Tensor


def test_functionalize_leaves_nothing_behind():
    module, x = prior(cells=12), torch.randn(50)  # 12: as above
    torch.func.functionalize(module)(x)
    y = module(x)
    assert not torch._is_functional_tensor(y)
    assert torch.equal(y, copy.deepcopy(module)(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_cuda_graph_replays_with_the_new_theta(mode):
    module = prior().cuda().train(mode == "train")
    x = torch.randn(1000, device="cuda")
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            module(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = module(x)
    module.theta.data.mul_(0.5)
    graph.replay()
    torch.testing.assert_close(y, module(x).detach())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_matches_the_cpu():
    module, x = prior(), points(100_000, dtype=torch.float32)
    expected = gradients(module, x, module)
    module.cuda()
    for ours, reference in zip(gradients(module, x.cuda(), module), expected, strict=True):
        torch.testing.assert_close(ours.cpu(), reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("version", ["ditac", "ge", "leaky", "inf"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_fused_computes_the_same_from_a_buffer_by_standard_operators(version, dtype):
    torch.manual_seed(0)
    module = DiTAC(version, init="prior", dtype=torch.float64 if dtype == torch.float64 else None).eval()
    fused = module.fuse()
    edges = [math.nan, math.inf, -math.inf, 1e30, -1e30, 0.0, *module.domain]
    x = torch.cat((torch.tensor(edges, dtype=dtype), torch.linspace(-8, 8, 4000, dtype=dtype))).reshape(3, -1)
    with torch.no_grad():
        table = module._table(torch.float64 if dtype == torch.float64 else torch.float32)
        defined = reference_ops.lookup(x, table, version, module.domain, module.bins)
        torch.testing.assert_close(fused(x), defined, rtol=2e-6, atol=1e-6, equal_nan=True)
        # A kernel rounds intercept + slope * x once, not twice: that differs by a last digit of x, times the slope.
        steepest = np.abs(np.gradient(*(values.double().numpy() for values in reversed(module.curve()))))
        torch.testing.assert_close(fused(x), module(x), rtol=2e-6, atol=1e-6 * max(1, steepest.max()), equal_nan=True)
    assert not list(fused.parameters())
    exported = torch.export.export(fused, (x,))
    assert all("ditac" not in str(node.target) for node in exported.graph.nodes)


def test_timm_fuses_every_ditac_of_a_model():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), DiTAC(init="prior"), torch.nn.Sequential(DiTAC("inf"))).eval()
    fused, x = timm.utils.reparameterize_model(model), torch.randn(5, 4)
    assert not [name for name, _ in fused.named_parameters() if "theta" in name]
    torch.testing.assert_close(fused(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fused_keeps_its_table_when_a_model_is_cast_to_half(dtype):
    """In half precision a position would fall into another bin."""
    module = DiTAC(init="prior").eval()
    fused, x = module.fuse().to(dtype), torch.linspace(-4, 4, 1000, dtype=dtype)
    assert fused.lines.dtype == torch.float32
    assert torch.equal(fused.lines, module.fuse().lines)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), module(x))
    assert fused.double().lines.dtype == torch.float64


def test_theta_left_on_the_meta_device_is_an_error():
    """Without it a forgotten `to_empty` would compute from memory nobody wrote."""
    for module in (DiTAC(device="meta"), DiTAC(device="meta").eval()):
        with pytest.raises(ValueError, match="on cpu and meta"):
            module(torch.ones(3))


@pytest.mark.parametrize("version", ["ditac", "ge", "leaky", "inf"])
def test_a_huge_theta_gives_finite_numbers_in_float32(version):
    """Its slopes leave float32's range."""
    module = DiTAC(version)
    with torch.no_grad():
        module.theta.copy_(100 * torch.randn(9, generator=torch.Generator().manual_seed(0)))
    x = torch.linspace(-5, 5, 1001).requires_grad_()
    y = module(x)
    y.clamp(-1e3, 1e3).sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and module.theta.grad.isfinite().all()


# --- Under torch.compile ----------------------------------------------------------------------------------------------


def _saved_elements(model, x):
    """Elements kept for backward, parameters aside; a storage counts once."""
    sizes = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    y.sum().backward()
    return sum(sizes.values())


class SqueezeExcited(nn.Module):
    """Where the compiler recomputes the base's activation, for the gate's gradient needs it."""

    def __init__(self, act):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), act()
        self.gate, self.out = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.act(self.norm(self.conv(x)))
        return self.out(y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid())


NETWORKS = {
    "squeeze and excite": SqueezeExcited,
    "convolution": lambda act: nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), act(), nn.Conv2d(8, 8, 3, padding=1)
    ),
    "linear": lambda act: nn.Sequential(nn.Flatten(0, 2), nn.Linear(64, 64), act(), nn.Linear(64, 8)),
}


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("network", NETWORKS)
def test_compiled_training_keeps_no_more_than_the_base(network):
    """The compiler must be free to recompute what a normalisation made of a convolution's output."""
    x = torch.randn(4, 3, 64, 64)
    kept = []
    for act in (nn.GELU, DiTAC):
        torch.manual_seed(0)
        kept.append(_saved_elements(torch.compile(NETWORKS[network](act), fullgraph=True), x))
    table = 2 * reference_ops.nodes("ditac", (-3.0, 3.0), DiTAC().bins) + 11  # and the velocities
    assert kept[1] <= kept[0] + table


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_compiler_may_keep_its_own_strides(mode, monkeypatch):
    """It runs convolutions channels_last; brought back to the model's strides, each tensor would be copied twice."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), prior(), nn.Conv2d(8, 8, 3)).train(mode == "train")
    compiled, x, seen = torch.compile(model, fullgraph=True), torch.randn(2, 3, 16, 16), []
    operator = torch.ops.ditac.lookup if mode == "train" else torch.ops.ditac.evaluate
    real = operator.default

    def watched(x, *arguments):
        seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return real(x, *arguments)

    with torch.set_grad_enabled(mode == "train"):
        expected = compiled(x)
        monkeypatch.setattr(operator, "default", watched)  # generated code looks it up at each call
        torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(model(x), expected)
    assert seen[0]


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_compiled_training_computes_the_same(dtype):
    torch.manual_seed(0)
    module, x = prior(), torch.randn(300, 5).to(dtype)
    compiled = torch.compile(module, fullgraph=True)
    expected = gradients(module, x, module)
    for ours, reference in zip(gradients(compiled, x, module), expected, strict=True):
        torch.testing.assert_close(ours, reference)


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_compiled_inside_a_checkpoint(use_reentrant):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(5, 5), prior(), nn.Linear(5, 5))

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=use_reentrant)

    model, x = Net(), torch.randn(7, 5).requires_grad_()
    (2 * model(x)).sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    (2 * torch.compile(model, backend="aot_eager")(x)).sum().backward()
    for parameter, reference in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, reference)


@pytest.mark.usefixtures("_fresh_dynamo")
def test_one_graph_for_training_and_one_for_evaluation():
    module, compilations = prior(), []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    compiled, x = torch.compile(module, fullgraph=True, backend=backend), torch.randn(50)
    for _ in range(3):
        for mode in (True, False):
            module.train(mode)
            with torch.set_grad_enabled(mode):
                compiled(x)
            with torch.no_grad():
                module.theta.mul_(0.9)
    assert len(compilations) == 2
