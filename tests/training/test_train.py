"""`train.py`: what a run leaves behind, what it refuses, and that it can be continued and repeated."""

import csv
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
import yaml
from script_runs import ROOT, run_two_processes

SMALL = shlex.split("-b 24 -j 0 --img-size 32 --num-classes 10 --warmup-epochs 0 --lr 0.01 --log-interval 2")


def run(
    train: ModuleType, data: Path, output: Path, *flags: str, model: str = "test_resnet", epochs: int = 1
) -> tuple[int, Path]:
    argv = ["--data-dir", str(data), "--output", str(output), "--experiment", "run", "--model", model]
    return train.main([*argv, "--epochs", str(epochs), *SMALL, *flags]), output / "run"


def summary(folder: Path) -> list[dict[str, str]]:
    with open(folder / "summary.csv") as stream:
        return list(csv.DictReader(stream))


def load(file: Path) -> dict:
    return torch.load(file, weights_only=True)


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope="module")
def finished(train: ModuleType, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs, with averaged weights."""
    code, folder = run(train, digits, tmp_path_factory.mktemp("finished"), "--model-ema", epochs=2)
    assert code == 0
    return folder


def test_run_leaves_timms_files(finished: Path) -> None:
    names = {file.name for file in finished.iterdir()}
    assert names == {
        "args.yaml",
        "summary.csv",
        "last.pth.tar",
        "model_best.pth.tar",
        "checkpoint-0.pth.tar",
        "checkpoint-1.pth.tar",
    }
    assert [row["epoch"] for row in summary(finished)] == ["0", "1"]
    assert yaml.safe_load((finished / "args.yaml").read_text())["model"] == "test_resnet"


def test_checkpoint_rebuilds_the_model(finished: Path) -> None:
    checkpoint = load(finished / "last.pth.tar")
    assert checkpoint["arch"] == "test_resnet"
    assert checkpoint["num_classes"] == 10
    assert checkpoint["data_config"]["input_size"] == (3, 32, 32)
    assert checkpoint["epoch"] == 1
    assert checkpoint["args"]["lr"] == 0.01
    assert checkpoint["metric"] == float(summary(finished)[-1]["eval_top1"])
    # Plain timm takes the averaged weights where there are any.
    model = timm.create_model(checkpoint["arch"], checkpoint_path=finished / "last.pth.tar", **checkpoint["model_args"])
    for name, value in model.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict_ema"][name])


def test_same_seed_same_run(train: ModuleType, digits: Path, tmp_path: Path) -> None:
    flags = ("-j", "1", "--mixup", "0.2", "--reprob", "0.3", "--aa", "rand-m9-mstd0.5", "--drop", "0.1")
    rows = []
    for name in ("first", "second"):
        code, folder = run(train, digits, tmp_path / name, *flags, epochs=2)
        assert code == 0
        rows.append(summary(folder))
    assert rows[0] == rows[1]
    _, other = run(train, digits, tmp_path / "other", *flags, "--seed", "1", epochs=1)
    assert summary(other)[0]["train_loss"] != rows[0][0]["train_loss"]


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("test_vit", "--opt adamw --layer-decay 0.7 --clip-grad 1 --model-ema --model-ema-warmup --grad-checkpointing"),
        ("test_resnet", "--amp --clip-grad 1 --clip-mode value --grad-accum-steps 2 --channels-last"),
        ("test_vit", "--amp --amp-dtype bfloat16 --clip-grad 0.1 --clip-mode agc --sched-on-updates --sched poly"),
        ("test_resnet", "--aug-splits 2 --jsd-loss --split-bn --aa augmix-m5-w4-d2 --resplit --reprob 0.2"),
        (
            "test_efficientnet",
            "--mixup 0.2 --cutmix 1 --bce-loss --mixup-off-epoch 1 -j 1 --epochs 2 --drop 0.1 --drop-path 0.1",
        ),
        ("test_resnet", "--mixup 0.2 --mixup-mode elem --no-prefetcher --sched plateau --opt lookahead_adam"),
        ("test_resnet", "--no-aug --val-split= --sched step --decay-epochs 1 --opt rmsproptf --opt-eps .001"),
        ("test_vit", "--torchcompile eager --model-ema --model-ema-force-cpu --val-split= --head-init-scale 0.1"),
        ("test_vit", "--model-dtype bfloat16 --sched none --eval-metric loss --checkpoint-hist 1 --epochs 2"),
        (
            "test_vit_ditac",
            "--amp --opt adamw --layer-decay 0.7 --grad-accum-steps 2 --ditac-lr-scale .1 --ditac-reg .01",
        ),
        ("test_efficientnet", "--in-chans 1 --mean 0.5 --std 0.5 --val-interval 2 --epochs 3 --bn-momentum .2 -vb 50"),
    ],
)
def test_flags_run(train: ModuleType, digits: Path, tmp_path: Path, model: str, flags: str) -> None:
    code, folder = run(train, digits, tmp_path, *flags.split(), model=model)
    assert code == 0
    checkpoint = load(folder / "last.pth.tar")
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in checkpoint["state_dict"])
    assert torch.isfinite(torch.cat([value.flatten().float() for value in checkpoint["state_dict"].values()])).all()


def test_grad_accumulation_is_a_larger_batch(train: ModuleType, digits: Path, tmp_path: Path) -> None:
    # 120 images: two updates of three batches of 20, or of one of 60.
    weights = []
    for flags in (("-b", "20", "--grad-accum-steps", "3"), ("-b", "60")):
        flags = (*flags, "--no-aug", "--opt", "sgd", "--sched", "none")
        code, folder = run(train, digits, tmp_path / flags[1], *flags, model="test_vit")
        assert code == 0
        weights.append(load(folder / "last.pth.tar")["state_dict"])
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=1e-5, rtol=1e-4)


def test_resume_continues_in_the_same_folder(train: ModuleType, digits: Path, tmp_path: Path) -> None:
    flags = ("--opt", "adamw", "--sched", "plateau", "--patience-epochs", "0", "--no-aug")
    _, whole = run(train, digits, tmp_path / "whole", *flags, epochs=3)
    _, folder = run(train, digits, tmp_path / "parts", *flags, epochs=2)
    first = load(folder / "last.pth.tar")
    assert train.main(["-c", str(folder / "args.yaml"), "--resume", str(folder), "--epochs", "3"]) == 0
    rows = summary(folder)
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert rows[:2] == summary(whole)[:2]
    assert rows[2]["lr"] == summary(whole)[2]["lr"]
    last = load(folder / "last.pth.tar")
    steps = [next(iter(state["optimizer"]["state"].values()))["step"].item() for state in (first, last)]
    assert steps == [10, 15]
    assert last["epoch"] == 2
    assert len(last["saver"]["history"]) == 3
    best = max(rows, key=lambda row: float(row["eval_top1"]))
    assert load(folder / "model_best.pth.tar")["metric"] == float(best["eval_top1"])


def test_resume_restores_everything(train: ModuleType, digits: Path, finished: Path, tmp_path: Path) -> None:
    """One more epoch, in another folder, at a learning rate of next to nothing: the weights stay."""
    file = finished / "last.pth.tar"
    flags = ("--resume", str(file), "--model-ema", "--lr", "1e-30")
    code, folder = run(train, digits, tmp_path, *flags, epochs=3)
    assert code == 0
    before, after = load(file), load(folder / "last.pth.tar")
    for key in ("state_dict", "state_dict_ema"):
        assert after[key].keys() == before[key].keys()
    weight = "fc.weight"
    assert torch.equal(after["state_dict"][weight], before["state_dict"][weight])
    assert summary(folder)[0]["epoch"] == "2"
    assert len(summary(finished)) == 2


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--model test_resnet --num-classes 5", "--num-classes 10, not 5"),
        ("--model test_vit", "give --model test_resnet"),
        ("--model test_resnet --model-ema --opt adamw", "does not fit --opt adamw"),
        ("--model test_resnet --in-chans 1", "without --in-chans: leave --in-chans 1 out"),
        ("--model test_resnet", "holds averaged weights, which would be lost: give --model-ema"),
    ],
)
def test_resume_refuses_another_model(
    train: ModuleType, digits: Path, finished: Path, capsys: pytest.CaptureFixture[str], flags: str, sentence: str
) -> None:
    before = {file: file.read_bytes() for file in finished.iterdir()}
    argv = ["--data-dir", str(digits), *SMALL, *flags.split(), "--resume", str(finished), "--epochs", "3"]
    assert train.main(argv) == 2
    assert sentence in refusal(capsys)
    assert {file: file.read_bytes() for file in finished.iterdir()} == before


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--model test_resnot", "did you mean test_resnet"),
        ("--model test_resnet.nothing", "no weights 'nothing'"),
        ("--model some/where", "hf-hub:some/where"),
        ("--data-dir /no/such/folder", "--data-dir /no/such/folder does not exist"),
        ("--num-classes 7", "give --num-classes 10"),
        ("--val-split nothing", "--val-split nothing"),
        ("-b 1000", "--batch-size"),
        ("-b 7 --mixup 1", "--batch-size must be even"),
        ("--jsd-loss", "--aug-splits"),
        ("--aug-splits 1", "--aug-splits"),
        ("--aug-splits 2 --mixup 1", "--aug-splits"),
        ("--aug-repeats 3", "torchrun"),
        ("--sync-bn", "CUDA"),
        ("--opt sdg", "did you mean sgd"),
        ("--opt-kwargs nothing=1", "--opt-kwargs"),
        ("--sched wsd", "--sched wsd"),
        ("--sched-on-updates --sched plateau", "--sched-on-updates"),
        ("--amp --model-dtype bfloat16", "--model-dtype"),
        ("--amp-dtype int8", "--amp-dtype must be one of"),
        ("--epochs 0", "--epochs"),
        ("--epochs many", "--epochs"),
        ("--drop-block 0.1 --model test_vit", "drop_block_rate"),
        ("--model local-dir:/no/such/folder", "--model local-dir:/no/such/folder"),
        ("--model hf-hub:nobody/none", "--model hf-hub:nobody/none"),
        ("--model ditac", "needs a base"),
        ("--model test_resnet.r160_in1k --pretrained", "--pretrained"),
        ("--pretrained --pretrained-path /no/such/file", "--pretrained-path /no/such/file does not exist"),
        ("--model-kwargs ditac={'version':'x'} --model test_resnet_ditac", "version must be one of ditac, ge"),
        ("--model-kwargs ditac={'types':'ReLU6'} --model test_resnet_ditac", "types must be a sequence"),
        (
            "--ditac-cells 8",
            "--ditac-cells is about DiTAC, and --model test_resnet has none: give --model test_resnet_",
        ),
        ("--ditac-reg 0.1", "--ditac-reg is about DiTAC, and --model test_resnet has none"),
        ("--ditac-lr-scale 0.1 --model test_resnet.r160_in1k", "give --model test_resnet_ditac"),
        ("--ditac-cells 8 --model test_resnot", "did you mean test_resnet"),
        ("--model test_resnet_ditac --ditac-version x", "--ditac-version must be one of ditac, ge, leaky, inf, not x"),
        ("--model test_resnet_ditac --ditac-init x", "--ditac-init must be one of match, identity, prior, not x"),
        ("--model test_resnet_ditac --ditac-cells 1", "--ditac-cells must be a whole number of at least 2, not 1"),
        ("--model test_resnet_ditac --ditac-domain 3 -3", "--ditac-domain must be two finite numbers, the smaller one"),
        ("--model test_resnet_ditac --ditac-domain -3 inf", "--ditac-domain must be two finite numbers"),
        ("--model test_resnet_ditac --ditac-version ge --ditac-domain 1 3", "--ditac-domain 1.0 3.0 cannot be created"),
        (
            "--model test_resnet_ditac --ditac-roles main x",
            "--ditac-roles must be among main, glu, se, pos, kernel, gate",
        ),
        ("--model test_resnet_ditac --ditac-roles kernel", "No activation of ResNet matched roles kernel"),
        (
            "--model test_resnet_ditac --ditac-lr-scale -1",
            "--ditac-lr-scale must be a finite number of at least 0, not",
        ),
        ("--model test_resnet_ditac --ditac-reg inf", "--ditac-reg must be a finite number of at least 0, not inf"),
        ("--model test_resnet_ditac --ditac-lr-scale 2 --sched none", "--ditac-lr-scale: give --sched constant"),
        ("--gp foo", "--gp foo"),
        ("--aa foo", "--aa foo is no policy"),
        ("--aa rand-x9", "--aa rand-x9 is no policy"),
        ("--interpolation foo", "--interpolation must be one of '', nearest, "),
        ("--train-interpolation foo", "--train-interpolation must be one of random, "),
        ("--torchcompile foo", "--torchcompile foo is no backend"),
        ("--torchcompile --torchcompile-mode foo", "--torchcompile-mode must be one of default, "),
        ("--drop 2", "--drop must be from 0 to 1, not 2"),
        ("--drop-path 1.5", "--drop-path must be from 0 to 1, not 1.5"),
        ("--smoothing -1", "--smoothing must be at least 0 and below 1, not -1"),
        ("--reprob 7", "--reprob must be from 0 to 1, not 7"),
        ("--crop-pct 0", "--crop-pct must be above 0, not 0"),
        ("--drop-path 0.1 --drop-connect 0.1", "--drop-connect"),
        ("--resume /no/such/file", "--resume /no/such/file does not exist"),
        ("--torchscript", "--torchscript is not supported: "),
        ("--naflex-train-seq-lens 128", "--naflex-train-seq-lens is not supported: "),
        ("--mean 0.5 0.5", "--mean"),
        ("--device nonsense", "--device"),
        ("--class-map nothing.txt", "--class-map"),
        ("--nonsense", "--nonsense"),
    ],
)
def test_refusals(
    train: ModuleType,
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: str,
    sentence: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    code, _ = run(train, digits, tmp_path / "output", *flags.split())
    assert code == 2
    assert sentence in refusal(capsys)
    assert not (tmp_path / "output").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none(
    train: ModuleType, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(train, digits, tmp_path, "--device", "cuda")[0] == 2
    assert "no CUDA device" in refusal(capsys)


def test_a_run_is_not_overwritten(
    train: ModuleType, digits: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = run(train, digits, finished.parent)
    assert code == 2
    assert "--resume" in refusal(capsys)


def test_loss_that_is_not_finite_stops_the_run(
    train: ModuleType, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, folder = run(train, digits, tmp_path, "--lr", "1e30")
    assert code == 1
    assert "not finite" in refusal(capsys)
    assert not list(folder.glob("*.pth.tar"))


def test_a_full_disk_is_one_sentence(
    train: ModuleType,
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    run(train, digits, tmp_path)
    last = tmp_path / "run" / "last.pth.tar"
    before = last.read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(torch, "save", full)
    assert train.main(["-c", str(last.parent / "args.yaml"), "--resume", str(last), "--epochs", "2"]) == 1
    assert "No space left on device" in refusal(capsys)
    assert last.read_bytes() == before
    assert not list(last.parent.glob("*new*"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits of a process")
def test_a_quota_is_one_sentence(
    train: ModuleType, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real one: the system refuses to write beyond so many bytes of a file."""
    import resource

    _, folder = run(train, digits, tmp_path)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["last.pth.tar"]) // 2, limits[1]))
    try:
        code = train.main(["-c", str(folder / "args.yaml"), "--resume", str(folder), "--epochs", "2"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 1
    assert f"cannot write to {folder}, what was there before is whole" in refusal(capsys)
    after = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {name for name in before if name.endswith(".tar")} == {name for name in after if name.endswith(".tar")}
    assert all(after[name] == before[name] for name in before if name.endswith(".tar"))
    code = train.main(["-c", str(folder / "args.yaml"), "--resume", str(folder), "--epochs", "2"])  # with room again
    assert code == 0
    assert [row["epoch"] for row in summary(folder)] == ["0", "1"]


def test_an_output_that_cannot_be_made_is_one_sentence(
    train: ModuleType, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a file"
    output.write_text("kept")
    assert run(train, digits, output)[0] == 1
    assert f"cannot write to {output / 'run'}" in refusal(capsys)
    assert output.read_text() == "kept"


def test_a_progress_bar_on_a_terminal(
    train: ModuleType, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(train, digits, tmp_path)[0] == 0
    shown = capsys.readouterr().err
    for name in ("Epoch 0", "Test"):
        assert f"\r{name}:   0%" in shown
    assert "Epoch 1" not in shown


def test_interrupt_is_no_traceback(digits: Path, tmp_path: Path) -> None:
    argv = [sys.executable, str(ROOT / "train.py"), "--data-dir", str(digits), "--output", str(tmp_path), *SMALL]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*argv, "--model", "test_resnet", "--epochs", "200"],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # A test run started in a shell's background has the signal ignored, and hands that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("Train: 1 "):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 75
    assert "SIGINT after update" in rest
    assert "Traceback" not in rest


def test_two_processes_evaluate_every_image_once(train: ModuleType, digits: Path, tmp_path: Path) -> None:
    # 50 validation images in batches of 24 do not divide by two processes: padding must not count.
    argv = [
        "--data-dir",
        str(digits),
        "--output",
        str(tmp_path),
        "--experiment",
        "two",
        "--model",
        "test_vit",
        *SMALL,
        "--epochs",
        "1",
        "--model-ema",
        "--device",
        "cpu",
    ]
    log = run_two_processes(*argv)
    checkpoint = load(tmp_path / "two" / "last.pth.tar")
    assert not any(name.startswith("module.") for name in checkpoint["state_dict"])
    top1 = float(summary(tmp_path / "two")[0]["eval_top1"])
    assert top1 * 50 / 100 == pytest.approx(round(top1 * 50 / 100))
    assert log.count("Train: 0 [   0/") == 1  # one process logs


def test_a_base_models_checkpoint_starts_its_ditac_model(train, digits, tmp_path):
    """Thetas stay as initialised, every other weight is the base's."""
    base = timm.create_model("test_vit", num_classes=10)
    torch.save(base.state_dict(), tmp_path / "base.pth")
    args = train.parse_train_flags(
        f"--data-dir {digits} --model test_vit_ditac --num-classes 10 --initial-checkpoint {tmp_path}/base.pth".split()
    )
    model, _ = train.create_model(args, {})
    for name, value in base.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("flag", ["--initial-checkpoint", "--pretrained --pretrained-path", "--resume"])
def test_weights_of_a_wrong_file(train, digits, tmp_path, capsys, flag):
    other = tmp_path / "other.pth"
    torch.save(timm.create_model("test_vit", num_classes=10).state_dict(), other)
    assert run(train, digits, tmp_path, *flag.split(), str(other))[0] == 2
    assert flag.split()[-1] in (said := refusal(capsys))
    assert "does not fit" in said
    if "pretrained" in flag:  # timm, which loads such a file loosely, refuses only tensors of another shape
        torch.save(timm.create_model("test_resnet", num_classes=10, in_chans=1).state_dict(), other)
        assert run(train, digits, tmp_path, *flag.split(), str(other))[0] == 2
        assert f"--pretrained-path {other}" in refusal(capsys)
    other.write_text("this is not a checkpoint")
    assert run(train, digits, tmp_path, *flag.split(), str(other))[0] == 2
    assert "is not a whole checkpoint" in (said := refusal(capsys))
    assert f"{flag.split()[-1]} {other}" in said


def test_pretrained_path_takes_a_runs_folder(train, digits, finished, tmp_path):
    """As --initial-checkpoint does; the averaged weights, as timm."""
    args = train.parse_train_flags(
        f"--data-dir {digits} --model test_resnet --num-classes 10 --pretrained --pretrained-path {finished}".split()
    )
    model, _ = train.create_model(args, {})
    assert torch.equal(model.conv1[0].weight, load(finished / "last.pth.tar")["state_dict_ema"]["conv1.0.weight"])


@pytest.mark.parametrize("flag", ["--initial-checkpoint", "--pretrained --pretrained-path"])
def test_a_run_that_started_from_weights_resumes_by_its_own_flags(train, digits, finished, tmp_path, flag):
    start = tmp_path / "start.pth"
    torch.save(load(finished / "last.pth.tar")["state_dict"], start)
    code, folder = run(train, digits, tmp_path, *flag.split(), str(start))
    assert code == 0
    start.unlink()
    assert train.main(["-c", str(folder / "args.yaml"), "--resume", str(folder), "--epochs", "2"]) == 0
    assert [row["epoch"] for row in summary(folder)] == ["0", "1"]
    assert str(start) in (folder / "args.yaml").read_text()
