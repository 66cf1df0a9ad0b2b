"""Figures: what is in them, that a page needs nothing else, and what is said without plotly."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import torch

from lensbridge.hooks import AbsentPointError, InputError
from lensbridge.methods.figures import (
    attention_plot,
    head_plot,
    head_scatter,
    lens_plot,
    patch_plot,
)
from lensbridge.methods.heads import HeadScores, induction_score, previous_token_score
from lensbridge.methods.lenses import logit_lens
from lensbridge.methods.patch_grid import PatchGrid
from lensbridge.methods.patching import activation_patch

TEXT = "ab <b>a"


@pytest.fixture
def bridge(lens_of: Any) -> Any:
    return lens_of("gpt2").bridge


@pytest.fixture
def grid() -> PatchGrid:
    """Three layers, two heads; the clean metric is 3, the corrupted 1."""
    values = torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.0, 1.5]])
    return PatchGrid("z", ("layer", "head"), ((0, 2, 5), (0, 1)), values, 3.0, 1.0)


def _ticks(axis: Any) -> list[str]:
    assert list(axis.tickvals) == list(range(len(axis.ticktext)))
    return list(axis.ticktext)


def test_attention(bridge: Any) -> None:
    """A step of the slider for each head, with that head's own pattern; tokens as labels, taken literally."""
    plot = attention_plot(bridge, TEXT)
    _, cache = bridge.run_with_cache(TEXT)
    expected = torch.cat([cache["pattern", layer] for layer in (0, 1)])
    assert torch.allclose(plot.data, expected, atol=1e-5)
    (slider,) = plot.figure.layout.sliders
    assert [step.label for step in slider.steps] == [f"{i}.{j}" for i in (0, 1) for j in range(4)]
    for index, step in enumerate(slider.steps):
        (z,) = step.args[0]["z"]
        assert torch.allclose(torch.tensor(z), expected.flatten(0, 1)[index], atol=1e-4)
    (trace,) = plot.figure.data
    assert torch.allclose(torch.tensor(trace.z), expected[0, 0], atol=1e-4)
    words = _ticks(plot.figure.layout.xaxis)
    assert words == _ticks(plot.figure.layout.yaxis)
    assert words[-4:] == [
        f"{len(words) - 4 + i} {x}" for i, x in enumerate(["&lt;", "b", "&gt;", "a"])
    ]
    assert words[-5].endswith(" ·")
    some = attention_plot(bridge, TEXT, layers=-1, heads=[3, 1])
    assert torch.allclose(some.data, expected[1:][:, [3, 1]], atol=1e-5)
    assert [x.label for x in some.figure.layout.sliders[0].steps] == ["1.3", "1.1"]


def test_lens(bridge: Any) -> None:
    """A cell for each depth and position; its token is the likeliest, its colour the target's probability."""
    lens = logit_lens(bridge, TEXT, target="c", top_k=3)
    plot = lens.plot()
    assert torch.allclose(plot.data, lens.target_log_probs[:, 0].exp())
    (trace,) = plot.figure.data
    assert torch.allclose(torch.tensor(trace.z), plot.data)
    assert trace.text[1][2] == lens.top_words(1)[2][0].replace(" ", "·").replace(
        "<", "&lt;"
    ).replace(">", "&gt;")
    assert trace.customdata[2][0].count("<br>") == 2
    assert _ticks(plot.figure.layout.yaxis) == ["blocks.0.in", "blocks.0.out", "blocks.1.out"]
    assert _ticks(plot.figure.layout.xaxis)[-4:] == ["&lt;", "b", "&gt;", "a"]
    without = lens_plot(logit_lens(bridge, TEXT))
    assert torch.allclose(without.data, logit_lens(bridge, TEXT).top_log_probs[:, 0, :, 0].exp())
    # Padding is left out.
    both = logit_lens(bridge, ["abcd", "ab"], padding_side="right")
    assert both.plot(row=1).data.shape[1] == both.plot(row=0).data.shape[1] - 2
    with pytest.raises(InputError, match="row 2: there are 2"):
        both.plot(row=2)


def test_patches(grid: PatchGrid, bridge: Any) -> None:
    """One axis is bars, more are a heat map with the last across; white is where nothing happened."""
    plot = grid.plot()
    assert torch.equal(plot.data, (grid.values - 1) / 2)
    (trace,) = plot.figure.data
    assert isinstance(trace, go.Heatmap)
    assert [list(row) for row in trace.z] == plot.data.tolist()
    assert (trace.zmin, trace.zmax) == (-1.0, 1.0)
    assert _ticks(plot.figure.layout.yaxis) == ["0", "2", "5"]
    assert plot.figure.layout.yaxis.title.text == "layer"
    assert trace.customdata[2][1] == "5, 1"
    raw = patch_plot(grid, normalised=False)
    assert torch.equal(raw.data, grid.values)
    assert (raw.figure.data[0].zmin, raw.figure.data[0].zmax) == (-1.0, 3.0)
    bars = PatchGrid("mlp_out", ("layer",), ((0, 3),), torch.tensor([1.0, 5.0]), 3.0, 1.0).plot()
    assert isinstance(bars.figure.data[0], go.Bar)
    assert list(bars.figure.data[0].y) == [0.0, 2.0]
    with pytest.raises(InputError, match="one patch is a number"):
        PatchGrid("senders to final", (), (), torch.tensor(1.0), 3.0, 1.0).plot()
    options = {"heads": "each", "positions": [0, [1, -1]], "progress": False}
    real = activation_patch(bridge, "abc", "abd", lambda x: x[:, -1, 5], "z", **options)
    shown = real.plot(normalised=False).figure
    assert _ticks(shown.layout.yaxis)[:5] == ["0.0", "0.1", "0.2", "0.3", "1.0"]
    first = bridge.to_str_tokens("abd")
    assert _ticks(shown.layout.xaxis) == [
        f"0 {first[0].replace('<', '&lt;').replace('>', '&gt;')}",
        f"1+-1 {first[1]}{first[-1]}",
    ]


def test_heads(grid: PatchGrid, bridge: Any) -> None:
    """A cell, or a dot, for each head there is."""
    scores = HeadScores("made_up", torch.tensor([[0.1, 0.9], [0.5, torch.nan]]), (0, 3))
    (trace,) = head_plot(scores).figure.data
    assert [list(row) for row in trace.z] == [[pytest.approx(0.1), pytest.approx(0.9)], [0.5, None]]
    assert scores.plot().figure.layout.title.text == "made up"
    x, y = previous_token_score(bridge), induction_score(bridge)
    plot = head_scatter(x, y)
    assert torch.equal(plot.data, torch.stack([x.scores.flatten(), y.scores.flatten()], -1))
    (trace,) = plot.figure.data
    assert list(trace.text) == [f"{i}.{j}" for i in (0, 1) for j in range(4)]
    assert plot.figure.layout.xaxis.title.text == "previous token"
    mixed = head_scatter(scores, _same_heads())
    assert len(mixed.data) == 3
    assert mixed.data[1].tolist() == pytest.approx([0.9, 1.0])
    with pytest.raises(InputError, match=r"x has the heads 0.0, 0.1, .* and y 0.0"):
        head_scatter(grid, y)
    with pytest.raises(InputError, match=r"a grid of heads is \[layer, head\], got \[layer\]"):
        head_scatter(PatchGrid("mlp_out", ("layer",), ((0,),), torch.ones(1), 1.0, 0.0), y)


def _same_heads() -> PatchGrid:
    values = torch.tensor([[1.0, 2.0], [3.0, torch.nan]])
    return PatchGrid("z", ("layer", "head"), ((0, 3), (0, 1)), values, 3.0, 1.0)


def test_a_page(grid: PatchGrid, tmp_path: Path) -> None:
    """One file with plotly's script inside and nothing from elsewhere; a notebook gets the same in a
    frame."""
    plot = grid.plot()
    path = plot.save(tmp_path / "patches.html")
    page = path.read_text(encoding="utf-8")
    assert "Plotly.newPlot" in page
    assert "<script src=" not in page
    assert "<html>" in page
    assert "cdn." not in page.split("Plotly.newPlot")[1]
    assert page.count("</script>") == plot.html.count("</script>")
    frame = plot._repr_html_()
    assert frame.startswith('<iframe srcdoc="')
    assert "</iframe>" in frame
    assert "Plotly.newPlot" in frame
    assert repr(plot) == "Plot(z, patched into the corrupted run, data [3, 2])"


def test_refusals(bridge: Any, lens_of: Any, left_alone: Any) -> None:
    """What was given and what there is."""
    with left_alone(lens_of("gpt2")):
        with pytest.raises(InputError, match="attention is drawn for one row, got 2"):
            attention_plot(bridge, ["ab", "cd"])
        with pytest.raises(InputError, match=r"heads are some of 0 to 3, got \[4\]"):
            attention_plot(bridge, "ab", heads=[4])
    with pytest.raises(AbsentPointError):
        attention_plot(lens_of("mamba").bridge, torch.tensor([[8, 9]]))


def test_without_plotly(monkeypatch: pytest.MonkeyPatch, bridge: Any, grid: PatchGrid) -> None:
    """The message says what to install."""
    scores = HeadScores("made", torch.ones(1, 1), (0,))
    lens = logit_lens(bridge, "ab")
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    for draw in (
        grid.plot,
        scores.plot,
        lens.plot,
        lambda: attention_plot(bridge, "ab"),
        lambda: head_scatter(scores, scores),
    ):
        with pytest.raises(InputError, match=r"pip install 'lensbridge\[plots\]'"):
            draw()
