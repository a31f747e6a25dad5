"""activations.csv and its picture: exact slopes and shares, however a model is evaluated, and no hook in training."""

import csv
import logging
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from script_runs import run_two_processes
from torch import nn

import ditac_timm
from ditac_timm import DiTAC, cpab
from ditac_timm.training import activations
from ditac_timm.training import run as run_module
from ditac_timm.training.activations import largest_slope

SMALL = shlex.split("-b 24 -j 0 --img-size 32 --num-classes 10 --warmup-epochs 0 --lr 0.05 --log-interval 9 --no-aug")


def arguments(data: Path, output: Path, *flags: str, model: str = "test_resnet_ditac", epochs: int = 1) -> list[str]:
    argv = ["--data-dir", str(data), "--output", str(output), "--experiment", "run", "--model", model]
    return [*argv, "--epochs", str(epochs), *SMALL, *flags]


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "activations.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(train: ModuleType, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs."""
    output = tmp_path_factory.mktemp("finished")
    assert train.main(arguments(digits, output, epochs=2)) == 0
    return output / "run"


@pytest.mark.parametrize("cells", [2, 3, 10])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_largest_slope_is_the_largest(cells: int, scale: float) -> None:
    torch.manual_seed(cells)
    tessellation = cpab.Tessellation(cells, (-2.0, 3.0))
    for _ in range(20):
        velocities = tessellation.velocities(scale * torch.randn(tessellation.dim, dtype=torch.float64))
        velocities = torch.where(torch.rand_like(velocities) < 0.2, 0.0, velocities)  # knots at rest
        x = torch.linspace(-2, 3, 20001, dtype=torch.float64).requires_grad_()
        cpab.flow(x, velocities, (-2.0, 3.0)).sum().backward()
        assert x.grad is not None
        largest, dense = largest_slope(velocities, (-2.0, 3.0)), x.grad.max().item()
        assert dense * (1 - 1e-9) <= largest
        assert largest <= dense * 1.05 + 1e-9


def test_largest_slope_at_rest_is_1() -> None:
    assert largest_slope(torch.zeros(11, dtype=torch.float64), (-3.0, 3.0)) == 1


def test_a_line_for_every_epoch_and_layer(digits: Path, finished: Path) -> None:
    checkpoint = torch.load(finished / "last.pth.tar", weights_only=True)
    model = ditac_timm.create_model("test_resnet_ditac", num_classes=10, checkpoint_path=finished / "last.pth.tar")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, DiTAC)}
    rows = table(finished)
    assert list(rows[0]) == ["epoch", "layer", "theta_norm", "inside", "max_slope"]
    assert [(row["epoch"], row["layer"]) for row in rows] == [(epoch, name) for epoch in "01" for name in layers]
    last = {row["layer"]: row for row in rows[len(layers) :]}
    for name in layers:
        theta = checkpoint["state_dict"][f"{name}.theta"]
        assert float(last[name]["theta_norm"]) == pytest.approx(theta.norm().item(), rel=1e-5)
        assert float(last[name]["theta_norm"]) > 0
        assert float(last[name]["max_slope"]) > 1
        assert 0 < float(last[name]["inside"]) <= 1
    assert (finished / "activations.png").read_bytes().startswith(b"\x89PNG")


def test_inside_is_the_share_of_validations_inputs(train: ModuleType, digits: Path, finished: Path) -> None:
    assert_inside_is_right(train, digits, finished)


def assert_inside_is_right(train: ModuleType, digits: Path, run: Path) -> None:
    """Against all inputs that the run's last model gets from the validation split."""
    args = train.parse_train_flags(arguments(digits, run.parent))
    args.device, args.distributed, args.world_size, args.rank = "cpu", False, 1, 0
    model = ditac_timm.create_model("test_resnet_ditac", num_classes=10, checkpoint_path=run / "last.pth.tar")
    precision = train.Precision(torch.device("cpu"), None, None)
    _, loader, _ = train.data.create_loaders(args, train.data.resolve_data_config(args, model), precision, 10)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, DiTAC):
            module.register_forward_pre_hook(lambda _, x, name=name: seen.setdefault(name, []).append(x[0].flatten()))
    with torch.no_grad():
        for images, _ in loader:
            model.eval()(images)
    last = {row["layer"]: float(row["inside"]) for row in table(run)}  # the last epoch's
    for name, inputs in seen.items():
        x = torch.cat(inputs)
        a, b = model.get_submodule(name).domain  # type: ignore[union-attr,misc]
        assert last[name] == pytest.approx(((x >= a) & (x <= b)).double().mean().item(), abs=1e-4)


@pytest.mark.parametrize(
    "flags",
    ["--model-ema --model-ema-decay 0.5", "--model-ema --torchcompile eager --channels-last"],
)
def test_ways_to_evaluate(train: ModuleType, digits: Path, tmp_path: Path, flags: str) -> None:
    assert train.main(arguments(digits, tmp_path, *flags.split())) == 0
    rows = table(tmp_path / "run")
    assert all(0 < float(row["inside"]) <= 1 for row in rows)
    checkpoint = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=True)
    weights = checkpoint.get("state_dict_ema", checkpoint["state_dict"])  # whose metrics count
    for row in rows:
        assert float(row["theta_norm"]) == pytest.approx(weights[f"{row['layer']}.theta"].norm().item(), rel=1e-5)


def test_a_compiled_run_sees_what_another_sees(train: ModuleType, digits: Path, tmp_path: Path) -> None:
    """Three validation batches are all there are."""
    shares = []
    for name, flags in (("plain", []), ("compiled", ["--torchcompile", "eager"])):
        assert train.main(arguments(digits, tmp_path / name, *flags)) == 0
        shares.append([float(row["inside"]) for row in table(tmp_path / name / "run")])
    assert shares[0] == pytest.approx(shares[1], abs=1e-3)


def test_hooks_are_gone_when_training_steps_run(
    train: ModuleType, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, hooked = run_module.train_one_epoch, []

    def watched(task, *args, **kwargs):
        hooked.extend(module for module in task.modules() if isinstance(module, DiTAC) and module._forward_pre_hooks)
        return step(task, *args, **kwargs)

    monkeypatch.setattr(run_module, "train_one_epoch", watched)
    assert train.main(arguments(digits, tmp_path, "--plot-activations", epochs=2)) == 0
    assert not hooked


def test_pictures_each_epoch_on_request(
    train: ModuleType, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[dict] = []
    monkeypatch.setattr("ditac_timm.training.activations.plot_activations", lambda *_, inputs: drawn.append(inputs))
    assert train.main(arguments(digits, tmp_path / "a", "--plot-activations", epochs=2)) == 0
    assert len(drawn) == 2
    assert all(counts.sum() > 0 for counts, _ in drawn[0].values())
    assert train.main(arguments(digits, tmp_path / "b", epochs=2)) == 0
    assert len(drawn) == 3


def test_without_validation_there_are_no_inputs(train: ModuleType, digits: Path, tmp_path: Path) -> None:
    assert train.main(arguments(digits, tmp_path, "--val-split=")) == 0
    rows = table(tmp_path / "run")
    assert {row["inside"] for row in rows} == {""}
    assert all(float(row["max_slope"]) > 1 for row in rows)
    assert (tmp_path / "run" / "activations.png").exists()


def test_without_matplotlib_training_goes_on(
    train: ModuleType,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level(logging.WARNING):
        assert train.main(arguments(digits, tmp_path, "--plot-activations", epochs=2)) == 0
    assert [message for message in caplog.messages if "matplotlib" in message] == [
        "No activations.png: Drawing activations needs matplotlib: pip install ditac_timm[plot]."
    ]
    assert not (tmp_path / "run" / "activations.png").exists()
    assert table(tmp_path / "run")


def test_a_model_without_ditac_leaves_no_file(train: ModuleType, digits: Path, tmp_path: Path) -> None:
    assert train.main(arguments(digits, tmp_path, "--plot-activations", model="test_resnet")) == 0
    assert not list((tmp_path / "run").glob("activations*"))


def test_a_resumed_run_writes_no_epoch_twice(train: ModuleType, digits: Path, tmp_path: Path) -> None:
    assert train.main(arguments(digits, tmp_path)) == 0
    folder = tmp_path / "run"
    with open(folder / "activations.csv", "a") as file:
        file.write("1,act,0,0,0\n")  # of an epoch that was not finished
    assert train.main(["-c", str(folder / "args.yaml"), "--resume", str(folder), "--epochs", "2"]) == 0
    rows = table(folder)
    assert len({(row["epoch"], row["layer"]) for row in rows}) == len(rows)
    assert {row["epoch"] for row in rows} == {"0", "1"}
    assert "act" not in {row["layer"] for row in rows}


def test_two_processes_sum_their_inputs(train: ModuleType, digits: Path, tmp_path: Path) -> None:
    run_two_processes(*arguments(digits, tmp_path, "--device", "cpu"))
    rows = table(tmp_path / "run")
    assert len({row["layer"] for row in rows}) == len(rows)
    assert_inside_is_right(train, digits, tmp_path / "run")
    assert (tmp_path / "run" / "activations.png").exists()


def test_large_batches_are_sampled() -> None:
    counts = torch.zeros(2 + 80, dtype=torch.int64)
    hook = activations._counter(counts, DiTAC())
    images = torch.full((8, 2**17), 2.0)
    images[1::2] = 9.0  # of a million inputs every fourth image is looked at
    hook(nn.Identity(), (images,))
    assert counts[:2].tolist() == [2**18, 2**18]
    assert counts[2:].sum() == 2**18
    hook(nn.Identity(), (torch.tensor([float("nan"), float("inf"), -7.0, 3.0, -3.0]).half(),))
    assert counts[:2].tolist() == [2**18 + 2, 2**18 + 5]
    assert counts[2:].sum() == 2**18 + 2


def test_counting_waits_for_no_device() -> None:
    """Nothing in a hook reads a value, which on the meta device could not be read."""
    hook = activations._counter(torch.zeros(2 + 80, dtype=torch.int64, device="meta"), DiTAC())
    hook(nn.Identity(), (torch.empty(4, 3, 2, 2, dtype=torch.bfloat16, device="meta"),))
