"""The running loss, and when a loss that is not finite stops a run."""

import argparse
import math

import pytest
import torch
from timm.task import ClassificationTask
from timm.utils import NativeScaler
from torch import nn

from ditac_timm import DiTAC
from ditac_timm.training.device import Precision
from ditac_timm.training.errors import RunError
from ditac_timm.training.loop import LossMeter, evaluate, train_one_epoch

CPU = torch.device("cpu")


def test_loss_meter() -> None:
    meter = LossMeter(CPU, distributed=False)
    for loss, samples in ((1.0, 2), (4.0, 1), (math.nan, 5)):
        meter.update(torch.tensor(loss), samples)
    counted = meter.read()
    assert math.isnan(counted.latest)
    assert counted[1:] == (2.0, 1, 1, 3)
    resumed = LossMeter(CPU, distributed=False)
    resumed.restore(meter.state())
    for each in (meter, resumed):  # the row of losses that are not finite goes on over a read
        each.update(torch.tensor(math.inf), 3)
        each.update(torch.tensor(2.0), 3)
        assert each.read() == (2.0, 2.0, 1, 2, 2)


def _args(**values: object) -> argparse.Namespace:
    defaults = {
        "grad_accum_steps": 1,
        "distributed": False,
        "world_size": 1,
        "channels_last": False,
        "log_interval": 4,
        "clip_grad": None,
        "clip_mode": "norm",
        "nan_patience": 0,
        "seed": 0,
        "rank": 0,
    }
    return argparse.Namespace(**(defaults | values))


def _batches(scales: list[float]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(2, 3) * scale, torch.tensor([0, 1])) for scale in scales]


def _train(scales: list[float], scaler: NativeScaler | None, **values: object) -> float:
    model = nn.Linear(3, 2)
    task = ClassificationTask(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    precision = Precision(CPU, None, None)
    loader = _batches(scales)
    return train_one_epoch(task, loader, optimizer, 0, _args(**values), precision, loss_scaler=scaler)["loss"]


def test_one_loss_that_is_not_finite_stops_the_run() -> None:
    with pytest.raises(RunError, match="not finite in 3 of the last 4 batches up to update 5"):
        _train([1, 1, math.inf, 1, 1, 1], scaler=None)  # the weights are lost with it


@pytest.mark.parametrize("poisoned", ["weight", "images"])
def test_it_says_where_and_only_after_patience(poisoned: str) -> None:
    if poisoned == "weight":  # an infinite image spoils the weights
        with pytest.raises(RunError, match="parameters that are not finite: weight, bias"):
            _train([1, math.inf, 1, 1, 1, 1], scaler=None, nan_patience=3)
        assert math.isfinite(_train([1, math.inf, 1, 1], scaler=None, nan_patience=3))
    else:
        with pytest.raises(RunError, match="layers whose outputs are not finite, in order: "):
            _train([math.inf], scaler=NativeScaler(device="cpu"))  # which skips the step


def test_the_scaler_may_skip_steps_but_not_all() -> None:
    assert math.isfinite(_train([1, 1, math.inf, 1, 1, 1], scaler=NativeScaler(device="cpu")))
    with pytest.raises(RunError, match="not finite"):
        _train([1, math.inf, math.inf, math.inf, math.inf, math.inf], scaler=NativeScaler(device="cpu"))


@pytest.mark.parametrize(("batches", "accumulate", "updates"), [(5, 2, 3), (4, 2, 2), (3, 4, 1), (3, 1, 3)])
def test_last_update_of_fewer_batches_is_a_mean(batches: int, accumulate: int, updates: int) -> None:
    """Every update steps along the mean gradient of its batches, the last too."""
    torch.manual_seed(0)
    model, reference = nn.Linear(3, 2), nn.Linear(3, 2)
    reference.load_state_dict(model.state_dict())
    data = _batches([1.0] * batches)
    task = ClassificationTask(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    train_one_epoch(task, data, optimizer, 0, _args(grad_accum_steps=accumulate), Precision(CPU, None, None))
    done = 0
    for start in range(0, batches, accumulate):
        images, target = (torch.cat(parts) for parts in zip(*data[start : start + accumulate], strict=True))
        reference.zero_grad()
        nn.functional.cross_entropy(reference(images), target).backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter -= 0.5 * parameter.grad
        done += 1
    assert done == updates
    torch.testing.assert_close(model.weight, reference.weight)


def test_top1_counts_images_and_not_batches() -> None:
    model = nn.Identity()
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    loader = [(logits[:2], torch.tensor([0, 0])), (logits[2:], torch.tensor([0]))]
    metrics = evaluate(model, loader, _args(), Precision(CPU, None, None), log_interval=10)
    assert metrics["top1"] == 100 * 2 / 3


def test_adaptive_clipping_leaves_theta_alone() -> None:
    """It clips to a share of a parameter's norm, and theta starts at 0 where it stands for GELU."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), DiTAC(), nn.Linear(4, 2))
    task = ClassificationTask(model, verbose=False)
    before = _gradients(task, clip_mode="agc", clip_grad=None)
    after = _gradients(task, clip_mode="agc", clip_grad=0.001)
    assert before["1.theta"].abs().max() > 0
    assert torch.equal(after["1.theta"], before["1.theta"])
    assert after["0.weight"].norm() < 0.1 * before["0.weight"].norm()
    norm = _gradients(task, clip_mode="norm", clip_grad=0.001)
    assert norm["1.theta"].norm() < before["1.theta"].norm()


def _gradients(task: ClassificationTask, **values: object) -> dict[str, torch.Tensor]:
    """Of one batch, as the optimizer sees them."""
    model = task.get_trainable_module()
    assert model is not None
    seen: dict[str, torch.Tensor] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: seen.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    )
    images = torch.linspace(-1, 1, 12).reshape(4, 3)
    batch = (images, torch.tensor([0, 1, 1, 0]))
    train_one_epoch(task, [batch], optimizer, 0, _args(**values), Precision(CPU, None, None))
    return seen
