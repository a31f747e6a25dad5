"""The recipes: their flags are accepted, and a variant's are its base's."""

from pathlib import Path

import pytest
import yaml
from script_runs import ROOT

from ditac_timm.training.flags import parse_train_flags
from ditac_timm.training.model import check_model_name
from ditac_timm.training.recipe import create_loss
from ditac_timm.training.refusals import check_train_flags

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def command(recipe: Path) -> list[str]:
    """The arguments of the command line in a recipe's first lines."""
    line = next(line for line in recipe.read_text().splitlines() if line.startswith("#   torchrun "))
    return line.partition("train.py ")[2].split()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_flags_are_accepted(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse_train_flags(["-c", str(recipe), "--data-dir", "x", "--device", "cpu"])
    monkeypatch.setenv("WORLD_SIZE", "8")
    check_train_flags(args)
    check_model_name(args.model)
    create_loss(args)
    assert recipe.read_text().startswith("# ")


@pytest.mark.parametrize(
    ("variant", "base"), [("mobilenetv3_ditac", "mobilenetv3_small_100"), ("convnext_small_ditac", "convnext_small")]
)
def test_a_variants_recipe_is_its_bases(variant: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {}
    for name in (variant, base):
        recipe = ROOT / "recipes" / f"{name}.yaml"
        text = recipe.read_text()
        flags[name] = yaml.safe_load(text)
        assert flags[name].pop("model") == name
        assert "# Not run." in text
        monkeypatch.chdir(ROOT)  # which the command line's -c is relative to
        assert parse_train_flags(command(recipe)).model == name
    assert {name: flags[variant][name] for name in flags[variant] if not name.startswith("ditac_")} == flags[base]


@pytest.mark.parametrize(("name", "images"), [("mobilenetv3_ditac", 2048), ("convnext_small_ditac", 4096)])
def test_images_an_update(name: str, images: int) -> None:
    args = parse_train_flags(["-c", str(ROOT / "recipes" / f"{name}.yaml")])
    assert 8 * args.batch_size * args.grad_accum_steps == images
