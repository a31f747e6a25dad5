"""Pictures are files with a panel for every DiTAC, and refusals are sentences."""

import sys

import pytest
import torch
from torch import nn

from ditac_timm import DiTAC
from ditac_timm.plot import plot_activations


def test_a_panel_for_every_layer(tmp_path):
    model = nn.Sequential(*(DiTAC(version, init="prior") for version in ("ditac", "ge", "leaky", "inf")), nn.ReLU())
    figure = plot_activations(model, tmp_path / "picture.png", columns=3)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["0", "1", "2", "3", "", ""]
    assert all(len(axes.lines) == 2 for axes in figure.axes[:4])
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_histograms_of_inputs_stand_behind_the_curves():
    model = nn.Sequential(DiTAC(), DiTAC(), DiTAC())
    edges = torch.linspace(-6, 6, 5)
    inputs = {"0": (torch.tensor([0, 3, 6, 0]), edges), "2": (torch.zeros(4), edges)}  # of "2" nothing was seen
    figure = plot_activations(model, inputs=inputs)
    assert [len(axes.collections) for axes in figure.axes] == [1, 0, 0]
    heights = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(0.9)  # of the panel
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["GELU", "learned", "inputs"]
    without = plot_activations(model)
    assert figure.axes[0].get_ylim() == without.axes[0].get_ylim()


def test_the_learned_curve_is_the_modules_own():
    act = DiTAC(init="prior")
    x, y = plot_activations(act).axes[0].lines[1].get_data()
    learned = act.double().curve(act.theta.new_tensor(x))[1]
    assert abs(learned.numpy() - y).max() < 1e-6


def test_a_model_without_ditac_is_refused():
    with pytest.raises(ValueError, match="no DiTAC"):
        plot_activations(nn.ReLU())


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"ditac_timm\[plot\]"):
        plot_activations(DiTAC())
