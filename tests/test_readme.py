"""Every code block of the README runs: Python as it stands, commands by their own parsers and targets."""

import re
import shlex
from pathlib import Path

import pytest
import timm.models._builder
import torch

from ditac_timm.benchmarking import flags as benchmark_flags
from ditac_timm.experiments import __main__ as experiments_command
from ditac_timm.experiments import competitors as experiments
from ditac_timm.training.flags import (
    parse_export_flags,
    parse_publish_flags,
    parse_train_flags,
    parse_validate_flags,
)

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    command
    for language, code in BLOCKS
    if language == "bash"
    for command in (line.partition("#")[0].strip() for line in code.splitlines())
    if command
]


@pytest.fixture
def no_download(monkeypatch):
    """timm's pretrained weights stay as initialised: tests reach no network."""
    asked = []
    real = timm.models._builder.load_pretrained

    def load_pretrained(model, pretrained_cfg, *args, **kwargs):
        if pretrained_cfg.get("file"):  # a local folder
            real(model, pretrained_cfg, *args, **kwargs)
        else:
            asked.append(pretrained_cfg["architecture"])

    monkeypatch.setattr(timm.models._builder, "load_pretrained", load_pretrained)
    return asked


def test_python_blocks_run_in_order(no_download, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict = {}
    blocks = [code for language, code in BLOCKS if language == "python"]
    assert len(blocks) >= 6
    for code in blocks:
        exec(compile(code, "README.md", "exec"), namespace)
    assert no_download == ["vit_tiny_patch16_224", "resnet50", "resnet50", "convnext_small", "resnet18"]
    printed = capsys.readouterr().out
    # What the page shows is what is printed, but for the last digits of the difference.
    shown = next(code for language, code in BLOCKS if not language and code.startswith("VisionTransformer"))
    report, _, difference = shown.strip().rpartition("\n")
    assert report in printed
    measured = float(re.search(r"max difference (\S+)", printed)[1])
    assert measured < 1e-4
    assert 0 < float(difference.split()[-1]) < 1e-4


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, tmp_path, monkeypatch):
    words = shlex.split(command)
    for file in (Path(word) for word in words if word.endswith("/args.yaml")):  # of a run that went before
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("data_dir: /data/imagenet\n")
        monkeypatch.chdir(tmp_path)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if words[:3] == ["python", "-m", "ditac_timm.experiments"]:
        experiments.check_names(experiments_command.parse(words[3:]).acts or [])
        return
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[script]).is_file()
    assert words[:script] == ["python"] or words[0] == "torchrun"
    parse = {
        "train.py": parse_train_flags,
        "validate.py": parse_validate_flags,
        "publish.py": parse_publish_flags,
        "export.py": parse_export_flags,
        "benchmark.py": benchmark_flags.parse,
    }
    parse[words[script]](words[script + 1 :])


def test_the_file_tree_is_the_repositorys():
    tree = next(code for language, code in BLOCKS if not language and code.startswith("train.py"))
    package = {line.split()[0] for line in tree.splitlines() if line.startswith("  ")}
    found = {
        f"{path.name}/" if path.is_dir() else path.name
        for path in (ROOT / "ditac_timm").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert package == found


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
