"""`benchmark.py`: what it counts is exact, what it writes parses, what it cannot do it says. No time is asserted."""

import csv
import importlib.util
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ditac_timm import create_model
from ditac_timm.benchmarking import flags, memory, models, operators, report, subject, timing
from ditac_timm.training.device import Precision
from ditac_timm.training.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SHORT = ["--device", "cpu", "--num-warm-iter", "1", "--num-bench-iter", "2"]
SMALL_OP = ["--bench", "op", "--sizes", "1e3", *SHORT]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script `benchmark.py`, imported."""
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "benchmark.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_text())
    assert found["cpu"]
    assert found["torch"] == torch.__version__
    assert {"timm", "ditac_timm", "python", "cores", "threads", "date", "ditac_kernel", "allocator"} <= found.keys()
    assert found["command"].startswith("python benchmark.py -")
    return found


# What does not depend on the machine


@pytest.mark.parametrize(
    ("label", "parameters", "flops"),
    [
        ("MobileNet-V3", 1_569_106, 56_978_592),
        ("MobileNet-V3+", 1_569_277, 56_978_592 + 4 * 799_136),
        ("ConvNeXt-S", 49_493_138, 8_704_662_528),
        ("ConvNeXt-S+", 49_493_462, 8_704_662_528 + 4 * 13_999_104),
    ],
)
def test_table10_counts(label: str, parameters: int, flops: int) -> None:
    name, paper_parameters, paper_flops, _ = models.TABLE10[label]
    size = models.TABLE10_SIZE
    found = subject.count(create_model(name, num_classes=models.TABLE10_CLASSES), (3, size, size))
    assert found[:2] == (parameters, flops)
    unit = {"M": 1e6, "B": 1e9}
    assert found.parameters / 1e6 == pytest.approx(float(paper_parameters[:-1]), abs=0.01)
    assert flops / unit[paper_flops[-1]] == pytest.approx(float(paper_flops[:-1]), rel=0.025)
    assert found.activations


def test_model_that_does_not_trace_has_no_flops() -> None:
    class Untraceable(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError

    model = Untraceable(2, 3)
    assert subject.count(model, (2,)) == (9, None, None)
    assert model.training


def test_peak_of_a_known_graph() -> None:
    def step() -> None:
        first = torch.empty(1000)
        second = torch.empty(500, dtype=torch.float64)
        del first
        third = torch.empty(250)
        del second, third

    before = [torch.empty(10**6)]
    assert memory.peak_growth(step, CPU) == 4000 + 4000
    assert memory.peak_growth(before.clear, CPU) == 0
    x, gradient = torch.zeros(1000, requires_grad=True), torch.zeros(1000)
    assert memory.peak_growth(lambda: torch.autograd.grad(F.gelu(x), x, gradient), CPU) == 4000 + 4000


def test_saved_for_backward() -> None:
    x = torch.zeros(1000, requires_grad=True)
    assert memory.saved_bytes(lambda: x.exp().exp()) == 2 * 4000
    assert memory.saved_bytes(lambda: x * x) == 4000
    assert memory.saved_bytes(lambda: x.view(10, 100) * x[:100]) == 4000
    layer = nn.Linear(1000, 10)
    assert memory.saved_bytes(lambda: layer(x[None]), without=layer.parameters()) == 4000
    with torch.no_grad():
        assert memory.saved_bytes(lambda: x.exp()) == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [("GELU", 4), ("SiLU", 4), ("PReLU", 4), ("Hardswish", 4), ("ReLU", 4), ("DiTAC, fixed table", 4)],
)
def test_bytes_that_operators_save(name: str, expected: int) -> None:
    found = operators.operators(CPU, torch.float32)
    assert operators.saved_per_element(found[name], torch.zeros(1000)) == expected


def test_rational_is_a_quotient_of_polynomials() -> None:
    act = operators.Rational().double()
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    above = sum(coefficient * x**power for power, coefficient in enumerate(act.numerator))
    below = sum(coefficient * x ** (power + 1) for power, coefficient in enumerate(act.denominator))
    torch.testing.assert_close(act(x), above / (1 + below.abs()))


@pytest.mark.parametrize("phase", ["forward", "backward", "train"])
def test_operators_compute_what_their_phase_says(phase: str) -> None:
    x = torch.linspace(-4, 4, 100, dtype=torch.bfloat16)
    for operator in operators.operators(CPU, x.dtype).values():
        call = operators.phase_call(phase, operator, x)
        first, second = call(), call()
        if phase == "forward":
            assert isinstance(first, torch.Tensor)
            assert not first.requires_grad
        else:
            assert isinstance(first, tuple)
            assert [gradient.shape for gradient in first] == [x.shape, *(p.shape for p in operator.parameters)]
        torch.testing.assert_close(first, second)


# Timing


def test_order_turns_about() -> None:
    called: list[str] = []
    calls = {name: (lambda name=name: called.append(name)) for name in "abc"}
    seconds = timing.interleave(calls, device=CPU, rounds=3, warmup=2, label="")
    assert "".join(called) == "abccba" + "abc" + "cba" + "abc"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_short_calls_are_repeated() -> None:
    called: list[int] = []
    timing.interleave({"a": lambda: called.append(1)}, device=CPU, rounds=1, warmup=0, label="", block=0.001)
    assert len(called) > 2


def test_ratio_is_of_rounds() -> None:
    assert timing.ratio([2.0, 20.0, 600.0], [1.0, 10.0, 100.0]) == (2.0, 2.0, 4.0)
    assert timing.ratio([3.0], [2.0]) == (1.5, 1.5, 1.5)


# Modes


def test_operator_results(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "op.json"
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert script.main([*SMALL_OP, "--results-file", str(file)]) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    table, scaling = results(file)["results"]
    rows = table["rows"]
    names = {"GELU", "SiLU", "PReLU", "Hardswish", "ReLU", "rational 5/4", "DiTAC", "DiTAC, fixed table"}
    for dtype in ("float32", "bfloat16"):
        for phase in ("forward", "backward", "train"):
            found = {row["operator"] for row in rows if (row["dtype"], row["phase"]) == (dtype, phase)}
            assert found == names | ({"copy"} if phase == "forward" else set())
    assert {row["over_gelu"] for row in rows if row["operator"] == "GELU"} == {1.0}
    assert {row["threads"] for row in rows} == {1}
    assert {row["share_of_copy_limit"] for row in rows if row["operator"] == "copy"} == {1.0}
    saved = {row["dtype"]: row["saved_bytes_per_element"] for row in rows if row["saved_bytes_per_element"]}
    assert saved == {"float32": 4, "bfloat16": 2}
    assert {(row["operator"], row["phase"]) for row in scaling["rows"]} == {
        (name, phase) for name in ("GELU", "DiTAC, fixed table") for phase in ("forward", "train")
    }
    printed = capsys.readouterr().out
    assert "over_gelu" in printed
    assert torch.__version__ in printed


def test_pair(script: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "pair.csv"
    small = ["--img-size", "32", "-b", "1", "2", "--num-classes", "10", "--torchcompile", "eager", *SHORT]
    assert script.main(["--pair", "test_vit", "test_vit_ditac", *small, "--results-file", str(file)]) == 0
    with open(file) as stream:
        rows = {(row["measure"], row["batch_size"]): row for row in csv.DictReader(stream)}
    assert all(row["cpu"] and row["torch"] == torch.__version__ and row["command"] for row in rows.values())
    assert set(rows) >= {
        *((f"infer, {mode}", "1") for mode in ("eager", "compiled")),
        ("infer, eager", "2"),
        *((f"train, {mode}{what}", "2") for mode in ("eager", "compiled") for what in ("", ": peak memory")),
        ("train, eager: saved for backward", "2"),
        ("train, eager: tabulate all layers, share of step", "2"),
    }
    layers = 6
    parameters = rows["parameters", ""]
    assert int(parameters["variant"]) - int(parameters["base"]) == 9 * layers
    flops = rows["FLOPs, one image", ""]
    hidden = 5 * 192  # four patches and the class token, three times as wide as the model
    assert int(flops["variant"]) - int(flops["base"]) == 4 * layers * hidden


def test_pair_of_one_model_with_itself_is_even() -> None:
    args = flags.parse(["--pair", "test_vit", "test_vit", "--img-size", "32", "-b", "2", "--bench", "train", *SHORT])
    (table,) = models.pair(args, Precision(CPU, None, None))
    even = [row for row in table.rows if row["unit"] in ("bytes", "number")]
    assert len(even) == 5
    assert [row["ratio"] for row in even] == [1.0] * 5
    assert not any("tabulate" in row["measure"] for row in table.rows)


def test_peak_of_a_training_step_repeats() -> None:
    args = flags.parse(["--model", "test_vit_ditac", "--img-size", "32", *SHORT])
    model = subject.Subject("test_vit_ditac", args, Precision(CPU, None, None))
    own = memory.nbytes(model.model.parameters())
    first = model.training_peak(2)
    assert first == model.training_peak(2)
    assert first > 3 * own  # weights, momentum, gradients
    assert all(parameter.grad is None for parameter in model.model.parameters())


@pytest.mark.parametrize("bench", ["both", "infer", "train", "profile"])
def test_single_model_by_timms_names(script: ModuleType, tmp_path: Path, bench: str) -> None:
    file = tmp_path / "one.json"
    flags_ = ["-m", "test_vit", "-b", "2", "--img-size", "32", "--amp", "--amp-dtype", "bfloat16", "--channels-last"]
    assert script.main([*flags_, "--bench", bench, *SHORT, "--results-file", str(file)]) == 0
    ((row,),) = [table["rows"] for table in results(file)["results"]]
    assert row["model"] == "test_vit"
    assert row["param_count"] == 0.37
    assert ("infer_step_time" in row) == (bench in ("both", "infer"))
    assert ("train_samples_per_sec" in row) == (bench in ("both", "train"))
    assert ("gmacs" in row) == (bench == "profile")
    assert next(value for name, value in row.items() if name.endswith("img_size")) == 32


def test_the_training_loop_over_a_bare_one(script: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "loop.json"
    flags_ = ["--bench", "loop", "-m", "test_vit_ditac", "-b", "1", "2", "--img-size", "32"]
    assert script.main([*flags_, *SHORT, "--results-file", str(file)]) == 0
    (rows,) = [table["rows"] for table in results(file)["results"]]
    assert [row["batch_size"] for row in rows] == [1, 2]
    assert all(row["train_py_ms"] > 0 and row["bare_ms"] > 0 for row in rows)


def test_table10_has_the_papers_numbers_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    plus = {"MobileNet-V3": "test_vit", "ConvNeXt-S": "test_vit"}
    tiny = {label: (plus.get(label, "test_vit_ditac"), *columns[1:]) for label, columns in models.TABLE10.items()}
    monkeypatch.setattr(models, "TABLE10", tiny)
    monkeypatch.setattr(models, "TABLE10_SIZE", 32)
    (table,) = models.table10(flags.parse(["--table10", *SHORT]), Precision(CPU, None, None))
    assert [row["configuration"] for row in table.rows] == list(tiny)
    assert [row.get("paper_ratio") for row in table.rows] == [None, 1.78, None, 1.69]
    assert [("ratio" in row) for row in table.rows] == [False, True, False, True]
    assert all(row["latency_std_ms"] >= 0 for row in table.rows)


def test_results_format_rules_over_the_extension(tmp_path: Path) -> None:
    file = tmp_path / "r.txt"
    table = report.Table("t", [{"a": 1, "threads": 1}])
    report.write(file, "json", {"threads": 2}, [table])
    assert json.loads(file.read_text()) == {"threads": 2, "results": [{"title": "t", "rows": [{"a": 1, "threads": 1}]}]}
    report.write(file, None, {"threads": 2, "cpu": "x"}, [table])
    with open(file) as stream:
        assert list(csv.DictReader(stream)) == [{"table": "t", "a": "1", "threads": "1", "cpu": "x"}]


def test_layout() -> None:
    rows = [{"name": "a", "n": 1234567}, {"name": "bb", "n": None}]
    assert report.layout(rows).splitlines() == ["name          n", "a     1,234,567", "bb"]
    assert report.layout([{"name": "a", "x": 1.0, "y": 12345.6}]).splitlines() == [
        "name         a",
        "x        1.000",
        "y     12,345.6",
    ]


# In ONNX Runtime


def test_onnx(script: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    file = tmp_path / "results.json"
    pair = ["--pair", "test_vit", "test_vit_ditac", "--batch-size", "1", "3", "--threads", "1"]
    assert script.main(["--bench", "onnx", *pair, "--results-file", str(file), *SHORT]) == 0
    rows = results(file)["results"][0]["rows"]
    assert [(row["variant"], row["base"], row["batch_size"]) for row in rows] == [
        ("test_vit_ditac", "test_vit", 1),
        ("test_vit_ditac", "test_vit", 3),
    ]
    assert all(0 < row["ratio_q1"] <= row["ratio"] <= row["ratio_q3"] for row in rows)


def test_onnx_without_the_exporter(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(*args: Any, **kwargs: Any) -> None:
        raise ModuleNotFoundError("No module named 'onnx'", name="onnx")

    monkeypatch.setattr(torch.onnx, "export", absent)
    assert script.main(["--bench", "onnx", "--pair", "test_vit", "test_vit_ditac", *SHORT]) == 2
    assert "--bench onnx needs onnx: pip install onnx onnxscript onnxruntime" in capsys.readouterr().err


# Refusals


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--model resnet5", "--model resnet5 is unknown (did you mean resnet50"),
        ("--pair test_vit test_vit_ditak", "--pair test_vit_ditak is unknown (did you mean test_vit"),
        ("--pair test_vit resnet18", "give both one size with --img-size"),
        ("--model a --pair b c", "--model and --pair are two things to measure: give one"),
        ("--pair b c --table10", "--pair and --table10 are two things to measure: give one"),
        ("--bench op --table10", "--table10 and --bench op are two things to measure: give one"),
        ("--table10 -b 4", "--batch-size means nothing to --table10: leave it out"),
        ("--table10 --bench train", "--table10 measures inference: leave --bench train out"),
        ("--bench onnx --table10", "--table10 and --bench onnx are two things to measure: give one"),
        ("--bench onnx --amp", "--amp means nothing to --bench onnx: leave it out"),
        ("--bench onnx --pair test_vit test_vit_ditak", "test_vit_ditak is unknown (did you mean test_vit"),
        ("--bench op --amp", "--amp means nothing to --bench op: leave it out"),
        ("--model test_vit --sizes 9", "--sizes means nothing to --model: leave it out"),
        ("--bench loop --torchcompile", "--torchcompile means nothing to --bench loop: leave it out"),
        ("--bench loop --model test_vti", "--model test_vti"),
        ("--bench trian", "--bench must be one of both, infer, inference, train, profile, op, loop, onnx, not trian"),
        ("--bench op --dtypes int8", "--dtypes must be among float32, float64, float16, bfloat16, not int8"),
        ("--bench op --sizes many", "many is no number of elements, give one such as 1e6"),
        ("--bench op --sizes 1e13", "--sizes does not fit in the memory of cpu: give less"),
        ("--model test_vit -b 9999999999", "--batch-size 9999999999 does not fit in the memory of cpu: give less"),
        ("--model test_vit -b 0", "--batch-size must be at least 1, not [0]"),
        ("--num-bench-iter 0", "--num-bench-iter must be at least 1, not 0"),
        ("--num-warm-iter -1", "--num-warm-iter must be at least 0, not -1"),
        ("--precision float8", "--precision must be one of float32, float16, bfloat16, amp, amp_bfloat16, not float8"),
        ("--opt sgdd", "--opt sgdd is no timm optimizer (did you mean sgd"),
        ("--torchcompile indctor", "--torchcompile indctor is unknown (did you mean inductor?)"),
        ("--model-list all.txt", "--model-list is not supported: one call measures one model, or one pair"),
        ("--clip-grad 1", "--clip-grad is not supported: a step is forward, loss, backward and update"),
        ("--no-such-flag", "unrecognized arguments: --no-such-flag"),
        ("--device cuda", "--device cuda: this machine has no CUDA device, give cpu"),
        ("--results-file /no/such/folder/r.csv", "there is no folder /no/such/folder"),
        ("--results-file /", "--results-file / is a folder: name a file in it"),
    ],
)
def test_refusals(
    script: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: str,
    sentence: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main(argv.split()) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.splitlines()[-1].startswith("benchmark.py: error: ")
    assert not captured.out


def test_only_a_shortage_is_a_shortage() -> None:
    limit = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(RuntimeError, match="another matter"), memory.reported_shortage("--x", CPU):
        raise RuntimeError("another matter")
    cuda = torch.device("cuda")
    with (
        pytest.raises(UsageError, match="--x does not fit in the memory of cuda"),
        memory.reported_shortage("--x", cuda),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert resource.getrlimit(resource.RLIMIT_DATA) == limit


def test_as_a_script(tmp_path: Path) -> None:
    """A process of its own keeps its pages, and says so."""
    file = tmp_path / "r.json"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    argv = [*SMALL_OP, "--dtypes", "float32", "--threads", "1", "--results-file", str(file)]
    run = subprocess.run(
        [sys.executable, str(ROOT / "benchmark.py"), *argv],
        env={**environment, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert "then 2." in run.stderr
    found = results(file)
    assert found["threads"] == 1
    assert len(found["results"]) == 1
    if sys.platform == "linux":
        assert "MALLOC_MMAP_MAX_=0" in found["allocator"]
        assert "MALLOC_MMAP_MAX_=0" in run.stdout
