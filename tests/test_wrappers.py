"""Gradients of theta inside what trainers wrap around a model: the same as for the bare model."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ditac_timm import DiTAC
from ditac_timm.training.regularisation import smoothness_term


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), DiTAC(init="prior"), nn.Linear(8, 8), DiTAC("inf", init="prior"))


def batch(n=12):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(1))


def loss(model, x):
    return model(x).square().mean()


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def expected_gradients():
    model = network()
    loss(model, batch()).backward()
    return gradients(model)


def assert_expected(ours, rtol=1e-5, atol=1e-6):
    expected = expected_gradients()
    assert ours.keys() == expected.keys()
    for name, reference in expected.items():
        torch.testing.assert_close(ours[name], reference, rtol=rtol, atol=atol)


def _distributed(rank, processes, file, function):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=processes)
    try:
        function(rank, processes)
    finally:
        dist.destroy_process_group()


def _train_under_ddp(rank, processes):
    model = DistributedDataParallel(network())
    for accumulate in (False, True):  # half the batch in each process; then a quarter twice
        model.zero_grad()
        parts = batch().chunk(processes)[rank].chunk(2 if accumulate else 1)
        for i, part in enumerate(parts):
            if i + 1 < len(parts):
                with model.no_sync():
                    (loss(model, part) / len(parts)).backward()
            else:
                (loss(model, part) / len(parts)).backward()
        assert_expected(gradients(model.module))
    # The smoothness prior, which every process adds to its own loss, counts once.
    term = smoothness_term(model.module, 0.5)
    model.zero_grad()
    (loss(model, batch().chunk(processes)[rank]) + term()).backward()
    bare = network()
    (loss(bare, batch()) + smoothness_term(bare, 0.5)()).backward()
    for ours, reference in zip(model.module.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-5, atol=1e-6)


def _train_under_fsdp2(rank, processes):
    model = network()
    mesh = init_device_mesh("cpu", (processes,))
    for layer in (model[1], model[3], model):
        fully_shard(layer, mesh=mesh)
    for _ in range(2):
        model.zero_grad()
        loss(model, batch()).backward()
        assert_expected({name: gradient.full_tensor() for name, gradient in gradients(model).items()})
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(batch()), network()(batch()))


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize(("function", "processes"), [(_train_under_ddp, 2), (_train_under_fsdp2, 1)])
def test_distributed(function, processes, tmp_path):
    mp.spawn(_distributed, (processes, tmp_path / "rendezvous", function), nprocs=processes)


def test_gradient_accumulation():
    model = network()
    for part in batch().chunk(3):
        (loss(model, part) / 3).backward()
    assert_expected(gradients(model))


def test_frozen_thetas_get_no_gradient_and_change_no_other():
    model = network()
    for module in (model[1], model[3]):
        module.theta.requires_grad_(False)
    loss(model, batch()).backward()
    expected = expected_gradients()
    assert gradients(model).keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    for name, ours in gradients(model).items():
        torch.testing.assert_close(ours, expected[name])


def test_thetas_alone():
    """All else frozen, so that the first layer's input needs no gradient."""
    model = network()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("theta"))
    loss(model, batch()).backward()
    expected = expected_gradients()
    assert gradients(model).keys() == {"1.theta", "3.theta"}
    for name, ours in gradients(model).items():
        torch.testing.assert_close(ours, expected[name])


def test_ema_follows_and_evaluates_its_own_thetas():
    model = network()
    ema, optimizer = ModelEmaV3(model, decay=0.5), torch.optim.AdamW(model.parameters(), lr=0.1)
    ema.module.eval()
    average = copy.deepcopy(model[1].theta.detach())
    for _ in range(3):
        with torch.no_grad():
            ema.module(batch())  # makes a table that the update must not leave stale
        optimizer.zero_grad()
        loss(model, batch()).backward()
        optimizer.step()
        ema.update(model)
        average.lerp_(model[1].theta.detach(), 0.5)
    torch.testing.assert_close(ema.module[1].theta, average)
    fresh = network()
    fresh.load_state_dict(ema.module.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ema.module(batch()), fresh.eval()(batch()))


def test_vmap_over_stacked_models():
    """An ensemble as torch.func has it: parameters stacked, one call for all, and gradients for each."""
    models = [network() for _ in range(3)]
    for scale, model in enumerate(models, 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale / 2)
    parameters, buffers = torch.func.stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")

    def call(parameters, buffers, x):
        return torch.func.functional_call(skeleton, (parameters, buffers), (x,))

    for x, in_dims in ((batch(), None), (torch.stack([batch(), batch() * 2, batch() + 1]), 0)):
        y = torch.vmap(call, in_dims=(0, 0, in_dims))(parameters, buffers, x)
        (stacked,) = torch.autograd.grad(y.square().sum(), [parameters["1.theta"]])
        for i, model in enumerate(models):
            single = model(x if in_dims is None else x[i])
            torch.testing.assert_close(y[i], single)
            (theta,) = torch.autograd.grad(single.square().sum(), [model[1].theta])
            torch.testing.assert_close(stacked[i], theta, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_mixed_precision_training_moves_theta(backend):
    model = network()
    call = model if backend is None else torch.compile(model, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        F.mse_loss(call(batch()).float(), torch.zeros(12, 8)).backward()
    expected = expected_gradients()
    for name, ours in gradients(model).items():
        assert ours.dtype == torch.float32
        error = (ours - expected[name]).norm() / expected[name].norm()
        assert error < 0.05, name
    torch._dynamo.reset()
