"""`docs/matching.md` says what fits give."""

import re
from pathlib import Path

import pytest

from ditac_timm import DiTAC
from ditac_timm.match_table import ACTIVATIONS, DEFAULT_DOMAINS
from ditac_timm.matching import match

ROWS = {
    cells[0]: cells[1:]
    for line in (Path(__file__).parent.parent / "docs" / "matching.md").read_text().splitlines()
    if len(cells := re.split(r" \| ", line.strip("| "))) == 1 + len(DEFAULT_DOMAINS)
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_figures_are_the_fits(name: str) -> None:
    for version, cell in zip(DEFAULT_DOMAINS, ROWS[name], strict=True):
        fit = match(ACTIVATIONS[name], DiTAC(version))
        said = [float(figure) for figure in cell.split(" / ")]
        assert said == pytest.approx([fit.rms, fit.max], rel=0.1)
