"""Exported models compute what PyTorch computes, in standard operators only."""

import importlib.util
import logging
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from torch import nn

from ditac_timm import DiTAC, cpab, create_model
from ditac_timm.activation import FrozenDiTAC
from ditac_timm.export import session, to_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = sorted(set(timm.list_models(module="ditac_zoo")) - {"ditac"})
LARGE = {"convnext_small_ditac", "convnext_tiny_ditac", "swin_tiny_ditac", "resnet50_ditac", "mobilenetv3_large_ditac"}
VERSIONS = ("ditac", "ge", "leaky", "inf")
# Swin's windows, of 7 pixels a side at a stride of 32, are built for one image size.
SIZES = {"swin_tiny_ditac": 224}


def with_thetas(model: nn.Module) -> nn.Module:
    """The model in evaluation, each theta drawn from the prior."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, DiTAC):
            module.theta.data.copy_(cpab.sample_prior(module.tessellation, generator=generator))
    return model.eval()


def run(exported: bytes, x: torch.Tensor) -> torch.Tensor:
    (y,) = session(exported, threads=1).run(None, {"images": x.numpy()})
    return torch.from_numpy(y)


def assert_standard(exported: bytes) -> None:
    """Only operators of ONNX's own domain, none of the package's, and no parameter theta."""
    model = onnx.load_from_string(exported)
    onnx.checker.check_model(model, full_check=True)
    assert {opset.domain for opset in model.opset_import} == {""}
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert not model.functions
    assert not [tensor.name for tensor in model.graph.initializer if "theta" in tensor.name]


# --- One activation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "version, dtype",
    [*((version, torch.float32) for version in VERSIONS), ("leaky", torch.float64), ("ditac", torch.float16)],
    ids=str,
)
def test_an_activation_with_its_edge_values(version, dtype):
    torch.manual_seed(0)
    module = DiTAC(version, init="prior", dtype=torch.float64 if dtype == torch.float64 else None).eval()
    a, b = module.domain
    edges = torch.tensor([math.nan, math.inf, -math.inf, 1e4, -1e4, 0.0, -0.0, a, b], dtype=dtype)
    x = torch.cat((edges, torch.linspace(-8, 8, 3991, dtype=dtype))).reshape(4, 1000)
    y = run(to_onnx(nn.Sequential(module), x), x)
    with torch.no_grad():
        expected = module.fuse()(x)
    assert expected.isnan().sum() == y.isnan().sum() == 1
    tolerance = 1e-3 if dtype == torch.float16 else 2e-6
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("opset", [18, 21])
def test_shapes_that_are_cut_into_rows_differently(opset):
    """Rows divide what is known of the shape when exporting, and what is not may then be of any size."""
    module = DiTAC(init="prior").eval()
    exported = to_onnx(nn.Sequential(module), torch.randn(2, 3, 128, 128), opset)
    assert_standard(exported)
    tables = {tuple(t.dims) for t in onnx.load_from_string(exported).graph.initializer if len(t.dims) == 2}
    assert tables == {(2, len(module.fuse().lines[0]))}
    for batch in (1, 5):
        x = 2 * torch.randn(batch, 3, 128, 128)
        torch.testing.assert_close(run(exported, x), module(x), rtol=0, atol=1e-5)


def test_torch_export_of_several_rows():
    module, shape = DiTAC(init="prior").eval(), (24, 24, 64)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(module.fuse(), (torch.randn(3, *shape),), dynamic_shapes=shapes)
    for batch in (1, 2, 5):
        x = torch.randn(batch, *shape)
        torch.testing.assert_close(program.module()(x), module(x), rtol=0, atol=1e-5)


def test_a_batch_of_one_size_and_a_scalar_activation():
    module = DiTAC(init="prior").eval()
    for x in (torch.randn(3, 7), torch.randn(1, 1)):
        assert torch.allclose(run(to_onnx(nn.Sequential(module), x, dynamic_batch=False), x), module(x), atol=1e-5)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "expanded", "scalar", "empty"])
def test_strides_are_those_of_empty_like(layout):
    x = torch.randn(2, 3, 8, 6)
    x = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(1, 3),
        "sliced": x[:, :, ::2],
        "expanded": x[:, :1].expand(2, 5, 8, 6),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
    }[layout]
    frozen = DiTAC(init="prior").fuse()
    y = frozen(x)
    assert y.stride() == torch.empty_like(x).stride() or layout == "expanded"
    assert torch.equal(y, frozen(x.contiguous()))


def test_a_frozen_activation_passes_on_gradients():
    module = DiTAC(init="prior").double()
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(module.fuse()(x).sum(), x)
    (expected,) = torch.autograd.grad(module(x).sum(), x)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.02)  # the slopes of a table's lines, not its derivatives


# --- Whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.sweep] if n in LARGE else []) for n in VARIANTS])
def test_every_variant(name):
    torch.manual_seed(0)
    arguments = {"num_classes": 10}
    model = with_thetas(create_model(name, **arguments))
    x = torch.randn(3, 3, SIZES.get(name, 64), SIZES.get(name, 64))
    with torch.no_grad():
        expected = model(x)
    exported = to_onnx(model, x[:1])
    assert_standard(exported)
    for batch in (1, 3):
        torch.testing.assert_close(run(exported, x[:batch]), expected[:batch], rtol=0, atol=1e-4)
    frozen = timm.utils.reparameterize_model(model)
    assert any(isinstance(module, FrozenDiTAC) for module in frozen.modules())
    program = torch.export.export(frozen, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert not [key for key in program.state_dict if "theta" in key]
    assert not [node for node in program.graph.nodes if "ditac" in str(node.target)]
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), expected, rtol=0, atol=1e-4)


def test_the_model_itself_stays_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), DiTAC(init="prior")).train()
    disabled = logging.root.manager.disable
    to_onnx(model, torch.randn(2, 4))
    assert isinstance(model[1], DiTAC)
    assert model.training
    assert logging.root.manager.disable == disabled


# --- The script -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script `export.py`, imported."""
    spec = importlib.util.spec_from_file_location("export", ROOT / "export.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A run's folder, with averaged weights other than its own."""
    arguments = {"base": "test_vit", "num_classes": 10, "img_size": 32}
    torch.manual_seed(0)
    model, average = (with_thetas(create_model("ditac", **arguments)) for _ in range(2))
    folder = tmp_path_factory.mktemp("run")
    state = {"arch": "ditac", "model_args": arguments, "data_config": {"input_size": (3, 32, 32)}}
    state |= {"state_dict": model.state_dict(), "state_dict_ema": average.state_dict()}
    torch.save(state, folder / "last.pth.tar")
    return folder


@pytest.mark.parametrize("flags", [[], ["--use-ema"], ["--batch-size", "3"]], ids=str)
def test_a_checkpoint(script, checkpoint, tmp_path, capsys, flags):
    output = tmp_path / "model.onnx"
    assert script.main(["--checkpoint", str(checkpoint), *flags, "--output", str(output)]) == 0
    assert "largest difference" in capsys.readouterr().out
    state = torch.load(checkpoint / "last.pth.tar", weights_only=True)
    model = create_model("ditac", **state["model_args"]).eval()
    model.load_state_dict(state["state_dict_ema" if flags == ["--use-ema"] else "state_dict"])
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(run(output.read_bytes(), x), model(x), rtol=0, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_another_image_size(script, tmp_path):
    output = tmp_path / "model.onnx"
    assert script.main(["--model", "test_vit_ditac", "--img-size", "96", "--opset", "18", "-o", str(output)]) == 0
    model = onnx.load(output)
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][1:] == [3, 96, 96]
    assert model.opset_import[0].version == 18


@pytest.mark.parametrize(
    "flags, sentence",
    {
        "": "nothing to export: give --checkpoint PATH, or --model NAME",
        "--model mobilenetv3_dita": "--model mobilenetv3_dita is unknown (did you mean mobilenetv3_ditac",
        "--checkpoint nowhere": "--checkpoint nowhere does not exist",
        "--model test_vit --use-ema": "--use-ema needs --checkpoint",
        "--model test_vit --checkpoint x --pretrained": "--checkpoint and --pretrained name two sets of weights",
        "--model test_vit --img-size 0": "--img-size must be a whole number of at least 1, not 0",
        "--model test_vit --batch-size 0": "--batch-size must be a whole number of at least 1, not 0",
        "--model test_vit --opset 3": "--opset must be a whole number of at least 18, not 3",
        "--model test_vit --output nowhere/model.onnx": "--output nowhere/model.onnx: there is no folder",
        "--model test_vit --output .": "--output . is a folder: name a file in it",
        "--model test_vit --what": "unrecognized arguments: --what",
    }.items(),
)
def test_what_cannot_be_exported_is_said_in_a_sentence(script, capsys, monkeypatch, tmp_path, flags, sentence):
    monkeypatch.chdir(tmp_path)
    assert script.main(flags.split()) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"export.py: error: {sentence}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failing", ["to_onnx", "session"])
def test_what_torch_or_the_runtime_refuses_is_said_in_a_sentence(script, monkeypatch, tmp_path, capsys, failing):
    def refuse(*args, **kwargs):
        raise RuntimeError("no such operator\nand much more")

    monkeypatch.setattr(script, "to_onnx", lambda *args, **kwargs: b"a graph")
    monkeypatch.setattr(script, failing, refuse)
    assert script.main(["--model", "test_vit_ditac", "--output", str(tmp_path / "model.onnx")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("export.py: error: ")
    assert error.endswith("no such operator")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [1e-3, math.nan])
def test_other_logits_are_not_written(script, monkeypatch, tmp_path, capsys, wrong):
    class Runtime:
        def run(self, names, inputs):
            return [np.full((2, 1000), wrong, dtype=np.float32)]

    monkeypatch.setattr(script, "to_onnx", lambda *args, **kwargs: b"a graph")
    monkeypatch.setattr(script, "session", lambda model: Runtime())
    output = tmp_path / "model.onnx"
    output.write_bytes(b"the one before")
    assert script.main(["--model", "test_vit_ditac", "--output", str(output)]) == 1
    assert "other logits than PyTorch" in capsys.readouterr().err
    assert output.read_bytes() == b"the one before"


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_without_the_exporter(script, monkeypatch, tmp_path, capsys, missing):
    def absent(*args, **kwargs):
        raise ModuleNotFoundError(f"No module named '{missing}'", name=missing)

    monkeypatch.setattr(torch.onnx, "export", absent)
    assert script.main(["--model", "test_vit_ditac", "--output", str(tmp_path / "model.onnx")]) == 2
    assert f"exporting needs {missing}: pip install ditac_timm[export]" in capsys.readouterr().err


def test_without_a_runtime_the_file_is_written_uncompared(script, monkeypatch, tmp_path, capsys):
    def absent(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")

    monkeypatch.setattr(script, "to_onnx", lambda *args, **kwargs: b"a graph")
    monkeypatch.setattr(script, "session", absent)
    output = tmp_path / "model.onnx"
    assert script.main(["--model", "test_vit_ditac", "--output", str(output)]) == 0
    assert "largest difference" not in capsys.readouterr().out
    assert output.read_bytes() == b"a graph"
