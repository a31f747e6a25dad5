"""The command line: timm's defaults, YAML files, and what is refused by name."""

import argparse
import sys
from pathlib import Path

import pytest
import yaml
from script_runs import load_script

from ditac_timm.training.errors import UsageError
from ditac_timm.training.flags import parse_train_flags, parse_validate_flags, train_parser, validate_parser
from ditac_timm.training.refusals import UNSUPPORTED_IN_TRAIN, check_train_flags


def test_yaml_gives_defaults_that_flags_override(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: resnet18\nlr: 5e-4\nmixup: 0.2\ncolor_jitter: null\ntorchscript: false\nwandb_tags: []\n")
    args = parse_train_flags(["-c", str(file), "--data-dir", "x", "--mixup", "0.8"])
    assert (args.model, args.lr, args.mixup, args.color_jitter) == ("resnet18", 5e-4, 0.8, None)
    assert args.batch_size == 128


def test_a_runs_flags_are_a_recipe(tmp_path: Path) -> None:
    args = parse_train_flags(["data", "--opt-kwargs", "nesterov=False", "--scale", "0.5", "1"])
    file = tmp_path / "args.yaml"
    file.write_text(yaml.safe_dump(vars(args)))
    assert parse_train_flags(["-c", str(file)]) == args


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("modle: resnet18", "unknown flag 'modle' (did you mean model"),
        ("batch-size: 3", "did you mean batch_size"),
        ("epochs: ten", "--epochs"),
        ("save_images: true", "--save-images is not supported"),
        ("- model", "name: value"),
        ("model: [", "is not YAML"),
        ("model: 5", "model must be text, not 5"),
        ("amp: 'yes'", "amp must be true or false, not 'yes'"),
        ("mean: 0.5", "mean must be a list, not 0.5"),
        ("lr: [1]", "lr must be a number, not [1]"),
        ("opt_kwargs: a=1", "opt_kwargs must be a mapping, not 'a=1'"),
        ("native_amp: true", "native_amp is no flag any more: give amp: true"),
        ("train_img_sizes: [128, 192]", "--train-img-sizes is not supported"),
    ],
)
def test_yaml_refusals(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as raised:
        parse_train_flags(["-c", str(file)])
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


def test_flags_of_older_versions_that_ask_for_nothing_pass(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("apex_amp: false\nnative_amp: false\namp_impl: native\njsd: null\nlr: 0.1\n")
    with caplog.at_level("INFO"):
        assert parse_train_flags(["-c", str(file)]).lr == 0.1
    assert len(caplog.messages) == 1
    assert "apex_amp, native_amp, amp_impl, jsd" in caplog.text


def test_values_of_yaml_are_checked_too(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("epochs: 1.5\ndata_dir: x")
    args = parse_train_flags(["-c", str(file)])
    args.device = "cpu"
    with pytest.raises(UsageError, match="--epochs"):
        check_train_flags(args)


@pytest.mark.parametrize("row", UNSUPPORTED_IN_TRAIN, ids=lambda row: row.flag)
def test_unsupported_flags_say_why(row) -> None:
    if row.default is False:
        value = []
    elif isinstance(row.default, int | float | list):
        value = ["7"]
    else:
        value = ["something"]
    with pytest.raises(UsageError, match=f"^{row.flag} is not supported: "):
        parse_train_flags([row.flag, *value])
    parse_train_flags([])  # and timm's default is no request


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        ("--train-img-sizes 128 192 224", "--train-img-sizes"),
        ("--device-modules a b c", "--device-modules"),
        ("--train-batch-sizes 1 2", "--train-batch-sizes"),
        ("--train-size-probs .5 .5", "--train-size-probs"),
        ("--naflex-patch-sizes 8 16", "--naflex-patch-sizes"),
        ("--naflex-patch-size-probs .5 .5", "--naflex-patch-size-probs"),
        ("--train-steps-per-epoch 3", "--train-batches-per-epoch"),
    ],
)
def test_unsupported_flags_of_several_values_and_names(argv: str, flag: str) -> None:
    with pytest.raises(UsageError, match=f"^{flag} is not supported: "):
        parse_train_flags(argv.split())


def test_two_data_folders_are_refused() -> None:
    assert parse_validate_flags(["a"]).data_dir == "a"
    with pytest.raises(UsageError, match="give one"):
        parse_validate_flags(["a", "--data-dir", "b"])


@pytest.mark.parametrize("parser", [train_parser(), validate_parser()], ids=["train", "validate"])
def test_help_is_written_for_every_flag(parser: argparse.ArgumentParser) -> None:
    assert "usage" in parser.format_help()
    assert all(action.help for action in parser._actions)


@pytest.mark.parametrize("name", ["train", "validate"])
def test_scripts_do_not_parse_when_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--nonsense"])
    assert callable(load_script(name).main)
