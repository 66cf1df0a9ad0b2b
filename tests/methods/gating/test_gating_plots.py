"""Figures of gates: what is in them, on gates that are written down."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lensbridge import AblationCurve, CHGResults, InputError
from lensbridge.methods.gating import (
    ablation_plot,
    cooccurrence_heatmap,
    gate_trajectories,
    head_heatmaps,
    plots,
    role_scatter,
)

# Of layers 3 and 7: facilitating, interfering, irrelevant; inconsistent, and two that take turns.
POSITIVE = torch.tensor([[[0.9, 0.1, 0.9], [0.2, 0.9, 0.9]]]).repeat(4, 1, 1)
NEGATIVE = torch.tensor([[[0.8, 0.1, 0.2], [0.9, 0.1, 0.1]]]).repeat(4, 1, 1)
NEGATIVE[:2, 1, 1] = 0.9
NEGATIVE[2:, 1, 2] = 0.9


def results(**more: Any) -> CHGResults:
    """Four masks of two layers, with three updates kept of one stage."""
    history = {"negative": torch.stack([0 * NEGATIVE + 0.5, NEGATIVE / 2, NEGATIVE])}
    given = {
        "masks": {"positive": POSITIVE.clone(), "negative": NEGATIVE.clone()},
        "layers": [3, 7],
        "history": history,
        "updates": {"negative": [0, 10, 12]},
    }
    return CHGResults(**{**given, **more})


def traces(figure: Any) -> dict[str, Any]:
    """By the name before the count."""
    return {trace.name.split(" (")[0]: trace for trace in figure.data}


def test_roles() -> None:
    """A dot for each head at its mean gates, under its role; pointed to, it says the scores with intervals."""
    shown = traces(role_scatter(results()))
    assert list(shown) == [
        "facilitating",
        "interfering",
        "irrelevant",
        "inconsistent",
        "undecided",
    ]
    where = {
        role: [(*head, x, y) for head, x, y in zip(t.customdata, t.x, t.y, strict=True)]
        for role, t in shown.items()
    }
    assert where["facilitating"] == [(3, 0, pytest.approx(0.9), pytest.approx(0.8))]
    assert where["interfering"] == [(3, 1, pytest.approx(0.1), pytest.approx(0.1))]
    assert where["irrelevant"] == [(3, 2, pytest.approx(0.9), pytest.approx(0.2))]
    assert where["inconsistent"] == [(7, 0, pytest.approx(0.2), pytest.approx(0.9))]
    assert where["undecided"] == [
        (7, 1, pytest.approx(0.9), pytest.approx(0.5)),
        (7, 2, pytest.approx(0.9), pytest.approx(0.5)),
    ]
    assert shown["undecided"].name == "undecided (2)"
    (said,) = shown["facilitating"].hovertext
    assert said.split("<br>") == [
        "layer 3, head 0",
        "facilitation 0.800 (0.800 to 0.800)",
        "interference 0.100 (0.100 to 0.100)",
        "irrelevance 0.180 (0.180 to 0.180)",
        "facilitating",
    ]
    low, high = (end[1, 1] for end in results().intervals()["facilitation"])
    assert f"facilitation 0.500 ({low:.3f} to {high:.3f})" in shown["undecided"].hovertext[0]


def test_roles_at_another_threshold() -> None:
    """The colours and the lines follow it."""
    figure = role_scatter(results(), threshold=0.85)
    assert [tuple(head) for head in traces(figure)["irrelevant"].customdata] == [(3, 0), (3, 2)]
    assert [(line.x0, line.y0) for line in figure.layout.shapes] == [(0, 0.85), (0.85, 0)]


def test_heat_maps() -> None:
    """The three scores by layer and head; marked are the heads whose interval holds 0.5."""
    found = results()
    figure = head_heatmaps(found)
    assert [trace.name for trace in figure.data] == ["facilitation", "interference", "irrelevance"]
    for trace, score in zip(
        figure.data, (found.facilitation(), found.interference(), found.irrelevance()), strict=True
    ):
        assert torch.allclose(torch.tensor(trace.z), score)
        assert (tuple(trace.x), tuple(trace.y)) == ((0, 1, 2), ("3", "7"))
        assert trace.hovertext[1][2].startswith("layer 7, head 2<br>facilitation 0.500")
    kept, harmed, _ = (trace.text for trace in figure.data)
    assert [list(row) for row in kept] == [["", "", ""], ["", "?", "?"]]
    assert not any(itertools.chain(*harmed))
    axis = figure.layout.coloraxis
    assert (axis.cmin, axis.cmax) == (0, 1)
    assert figure.layout.yaxis.autorange == "reversed"


def test_trajectories() -> None:
    """The gates that were kept, at the updates they are of; the mean, or one mask's."""
    found = results()
    figure = gate_trajectories(found, "negative")
    assert len(figure.data) == 6
    by_head = {tuple(trace.customdata[0]): trace for trace in figure.data}
    assert by_head[7, 1].x == (0, 10, 12)
    assert by_head[7, 1].y == pytest.approx([0.5, 0.25, 0.5])
    assert (by_head[3, 1].name, by_head[7, 1].name) == ("interfering", "undecided")
    assert sum(trace.showlegend for trace in figure.data) == 5
    one = gate_trajectories(found, "negative", mask_idx=-1, heads=[(7, 2), (3, 0)])
    assert [tuple(trace.customdata[0]) for trace in one.data] == [(7, 2), (3, 0)]
    assert one.data[0].y == pytest.approx([0.5, 0.45, 0.9])
    assert [trace.name for trace in one.data] == ["facilitating", "facilitating"]
    assert one.layout.title.text == "Stage 'negative', mask 3"


def test_trajectories_without_roles() -> None:
    """Of a contrastive fit there is one stage: lines say how their gate ends."""
    history = {"positive": torch.stack([POSITIVE / 2, POSITIVE])}
    alone = results(masks={"positive": POSITIVE}, history=history, updates={"positive": [0, 10]})
    figure = gate_trajectories(alone, "positive", mask_idx=0)
    ends = {tuple(trace.customdata[0]): trace.name for trace in figure.data}
    assert [head for head, name in ends.items() if name == "shut"] == [(3, 1), (7, 0)]
    assert set(ends.values()) == {"open", "shut"}


def test_curves() -> None:
    """A line each, with the head that went last; and one for a score to compare with."""
    heads = [(3, 0), (7, 1), (3, 2), (7, 0)]
    curves = {
        "facilitation": AblationCurve(heads, [0, 2, 4], torch.tensor([0.0, -1.5, -4.0])),
        "irrelevance": AblationCurve(heads[::-1], [0, 4], torch.tensor([0.0, -4.0])),
    }
    figure = ablation_plot(curves, full=-0.25)
    assert [trace.name for trace in figure.data] == list(curves)
    assert (figure.data[0].x, figure.data[0].y) == ((0, 2, 4), (0.0, -1.5, -4.0))
    assert figure.data[1].x == (0, 4)
    assert figure.data[0].hovertext == ("", ", last layer 7, head 1", ", last layer 7, head 0")
    assert figure.data[0].line.color != figure.data[1].line.color
    (line,) = figure.layout.shapes
    assert (line.y0, line.y1) == (-0.25, -0.25)
    assert not ablation_plot(curves).layout.shapes


def test_cooccurrence() -> None:
    """Only heads that masks disagree on; those that take turns are opposites."""
    (trace,) = cooccurrence_heatmap(results()).data
    assert trace.x == trace.y == ("7.1", "7.2")
    assert torch.allclose(torch.tensor(trace.z), torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    assert (trace.zmin, trace.zmax) == (-1, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: role_scatter(results(masks={"positive": POSITIVE})), "'negative' was not fitted"),
        (lambda: head_heatmaps(results(masks={"negative": NEGATIVE})), "'positive' was not fitted"),
        (lambda: gate_trajectories(results(), "none"), "stage 'none'; there are of negative"),
        (lambda: gate_trajectories(results(history={}), "none"), "there are of no stage"),
        (lambda: gate_trajectories(results(), "negative", 4), "masks 0 to 3"),
        (
            lambda: gate_trajectories(results(), "negative", heads=[(0, 0)]),
            r"\(0, 0\): there are layers \[3, 7\] with heads 0 to 2",
        ),
        (lambda: gate_trajectories(results(), "negative", heads=[(3, 3)]), "heads 0 to 2"),
        (lambda: gate_trajectories(results(), "negative", heads=[]), "no heads"),
        (lambda: ablation_plot({}), "no curves"),
        (lambda: cooccurrence_heatmap(results(), "positive"), r"all masks \(there are 4\) agree"),
        (lambda: cooccurrence_heatmap(results(), "none"), "'none' was not fitted"),
    ],
)
def test_what_is_refused(call: Callable[[], Any], message: str) -> None:
    """What is not there is named, and so is what is."""
    with pytest.raises(InputError, match=message):
        call()


def test_without_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to install; the package itself does not need it."""
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(InputError, match=r"pip install 'lensbridge\[plots\]'"):
        role_scatter(results())
    with pytest.raises(InputError, match=r"pip install 'lensbridge\[plots\]'"):
        head_heatmaps(results())


def test_plotly_is_imported_when_used() -> None:
    """Importing the module of the figures does not import it."""
    code = "import sys, lensbridge.methods.gating.plots; sys.exit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_page(tmp_path: Path) -> None:
    """One file that needs nothing from elsewhere."""
    path = tmp_path / "roles.html"
    role_scatter(results()).write_html(path)
    page = path.read_text(encoding="utf-8")
    assert "layer 3, head 0" in page
    assert "<script src=" not in page


# --- colours ------------------------------------------------------------------------------------------------

# What a missing kind of cone leaves of linear red, green and blue (Machado, Oliveira, Fernandes 2009).
VISION = {
    "all": torch.eye(3),
    "protan": torch.tensor(
        [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0521]]
    ),
    "deutan": torch.tensor(
        [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]]
    ),
    "tritan": torch.tensor(
        [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]]
    ),
}
TO_XYZ = torch.tensor(
    [[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0178, 0.1095, 0.8727]]
)


def linear(color: str) -> torch.Tensor:
    """Linear red, green and blue of "#RRGGBB"."""
    value = torch.tensor([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return torch.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(color: torch.Tensor) -> torch.Tensor:
    """CIELAB of a linear colour."""
    x, y, z = (TO_XYZ @ color.clamp(0, 1)).clamp(min=1e-3) ** (1 / 3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISION)
def test_colours_are_told_apart(vision: str) -> None:
    """Help from harm by colour alone and clearly; any two roles by colour, by shape and by dash."""
    seen = {role: lab(VISION[vision] @ linear(look[0])) for role, look in plots.ROLES.items()}
    apart = {
        frozenset(pair): float((seen[pair[0]] - seen[pair[1]]).norm())
        for pair in itertools.combinations(seen, 2)
    }
    assert apart[frozenset({"facilitating", "interfering"})] > 60
    assert min(apart.values()) > 9  # 2.3 can just be noticed
    for part in (1, 2):
        assert len({look[part] for look in plots.ROLES.values()}) == len(plots.ROLES)


@pytest.mark.parametrize("page", ["#FFFFFF", "#131416"], ids=["light", "dark"])
def test_colours_stand_out(page: str) -> None:
    """From a light page and a dark one: 3 to 1, what WCAG 2.1 asks of figures; lines of text 4 to 1."""
    weights = torch.tensor([0.2126, 0.7152, 0.0722])
    behind = float(weights @ linear(page))

    def contrast(color: str) -> float:
        own = float(weights @ linear(color))
        return (max(own, behind) + 0.05) / (min(own, behind) + 0.05)

    assert min(contrast(color) for color, *_ in plots.ROLES.values()) > 3
    assert min(contrast(color) for color, *_ in plots.CURVES) > 3
    assert contrast(plots.TEXT) > 4
    layout = role_scatter(results()).layout
    assert layout.paper_bgcolor == layout.plot_bgcolor == "rgba(0, 0, 0, 0)"
    assert layout.font.color == plots.TEXT
