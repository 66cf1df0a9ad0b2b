"""Figures, drawn by plotly: attention patterns, lenses, patches, heads. Each keeps the numbers it shows."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..bridge import TransformerBridge
from ..hooks import HookPoint, InputError
from .measured import prepared
from .patch_grid import PatchGrid, sites_at

if TYPE_CHECKING:
    from .heads import HeadScores
    from .lenses import LogitLens

# Of the palette of Okabe and Ito (2008), made for every kind of colour vision: those that stand out from
# white and from black alike.
BLUE, VERMILION, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7F7F7F"
DIVERGING = [[0, VERMILION], [0.5, "#F2F2F2"], [1, BLUE]]
TEXT, LINES, CLEAR = "#7A7A7A", "rgba(127, 127, 127, 0.25)", "rgba(0, 0, 0, 0)"
"""Readable on white and on black; the page shows through."""


@dataclass(frozen=True)
class Plot:
    """A figure and its numbers. A notebook shows it; `save` makes a page that needs no network.

    Attributes:
        data: What is drawn; which dimensions it has is told where it is made.
        figure: Plotly's figure, to restyle it, or to have plotly show it, which brings its script once.
    """

    data: Tensor
    figure: Any

    def __repr__(self) -> str:
        return f"Plot({self.figure.layout.title.text}, data {list(self.data.shape)})"

    @property
    def html(self) -> str:
        """A whole page, plotly's script inside."""
        page: str = self.figure.to_html(
            include_plotlyjs=True,
            include_mathjax=False,
            config={"responsive": True, "displaylogo": False},
        )
        return page

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `html` to a file, and say which."""
        made = Path(path)
        made.write_text(self.html, encoding="utf-8")
        return made

    def _repr_html_(self) -> str:
        """The page in a frame of its own, so that nothing around it matters."""
        return f'<iframe srcdoc="{escape(self.html)}" style="width:100%;height:480px;border:0"></iframe>'


def attention_plot(
    bridge: TransformerBridge,
    input: Any,
    *,
    layers: Iterable[int] | int | None = None,
    heads: Iterable[int] | None = None,
) -> Plot:
    """Attention of every head on one text: a slider goes through the heads.

    Args:
        bridge: The model.
        input: A text, or token ids of one row.
        layers: Which, negative from the end; None for all that have attention.
        heads: Which; None for all.
    Returns:
        A heat map, attending tokens downwards, attended ones across; data [layer, head, query, key].
    Raises:
        InputError: More than one row, heads that are not there, layers of different numbers of heads, or
            plotly is not installed.
        AbsentPointError, LayerRangeError: No layer, or not one that was named, has a pattern.
    """
    go = plotly()
    places = sites_at(bridge, "pattern", layers)
    with torch.inference_mode(False), torch.no_grad():
        inputs = prepared(bridge, input, {})
        held: dict[str, Tensor] = {}

        def keep(pattern: Tensor, hook: HookPoint) -> None:
            held[str(hook.name)] = pattern.float().cpu().clone()

        with bridge.registry.hooks() as scope:
            scope.observe([place.point for place in places], keep, must_fire=True)
            bridge(**inputs.kwargs, return_type=None)
    found = [held[str(place.point.name)] for place in places]
    if len(found[0]) != 1:
        raise InputError(f"attention is drawn for one row, got {len(found[0])}")
    sizes = sorted({x.shape[1] for x in found})
    if len(sizes) > 1:
        raise InputError(f"the layers have {sizes} heads: draw those that are alike with layers=")
    chosen = list(range(sizes[0])) if heads is None else list(heads)
    outside = [head for head in chosen if not 0 <= head < sizes[0]]
    if outside or not chosen:
        raise InputError(f"heads are some of 0 to {sizes[0] - 1}, got {chosen}")
    data = torch.cat(found)[:, chosen]
    words = _words(bridge, inputs.tokens, data.shape[-1])
    figure = go.Figure()
    steps: list[Any] = []
    for row, place in enumerate(places):
        for column, head in enumerate(chosen):
            # Rounded: thousands of digits that nobody sees make a heavy page.
            rounded = [[round(x, 4) for x in line] for line in data[row, column].tolist()]
            name = f"{place.layer}.{head}"
            steps.append(
                {"label": name, "method": "restyle", "args": [{"z": [rounded], "name": [name]}]}
            )
    first = steps[0]["args"][0]
    figure.add_heatmap(
        z=first["z"][0],
        name=first["name"][0],
        zmin=0,
        zmax=1,
        colorscale="Cividis",
        hovertemplate="%{y} to %{x}: %{z:.3f}<extra>%{fullData.name}</extra>",
    )
    _ticks(figure.update_xaxes, words[: data.shape[-1]], "attended to")
    _ticks(figure.update_yaxes, words[: data.shape[-2]], "attends")
    figure.update_yaxes(autorange="reversed", scaleanchor="x", constrain="domain")
    figure.update_xaxes(constrain="domain")
    figure.update_layout(
        sliders=[{"steps": steps, "currentvalue": {"prefix": "layer.head "}, "pad": {"t": 70}}]
    )
    return Plot(data, styled(figure, "Attention"))


def lens_plot(lens: LogitLens, *, row: int = 0) -> Plot:
    """What each depth would predict at each position.

    Args:
        lens: What `lensbridge.logit_lens` gave.
        row: Which text.
    Returns:
        A heat map, the model's end on top: the likeliest token in each cell, and the probability of the
        target, if there is one, else of that token, as its colour; data [depth, pos]. Pointed to, a cell
        says its likeliest tokens.
    Raises:
        InputError: There is no such row, or plotly is not installed.
    """
    go = plotly()
    rows = lens.top_tokens.shape[1]
    if not 0 <= row < rows:
        raise InputError(f"row {row}: there are {rows}, from 0")
    real = lens.mask[row].nonzero().flatten()
    best = lens.top_log_probs[:, row, real].exp()
    target = lens.target_log_probs
    data = best[..., 0] if target is None else target[:, row, real].exp()
    texts, hovers = [], []
    for depth in range(len(lens.labels)):
        told = lens.top_words(depth, row)
        texts.append([_shown(told[int(at)][0]) for at in real.tolist()])
        hovers.append(
            [
                "<br>".join(
                    f"{_shown(word)} {float(p):.3f}"
                    for word, p in zip(told[int(at)], best[depth, i], strict=True)
                )
                for i, at in enumerate(real.tolist())
            ]
        )
    figure = go.Figure()
    figure.add_heatmap(
        z=data.tolist(),
        text=texts,
        texttemplate="%{text}",
        customdata=hovers,
        zmin=0,
        zmax=1,
        colorscale="Cividis",
        colorbar={"title": "probability" if target is None else "of the target"},
        hovertemplate="%{y}<br>%{customdata}<extra></extra>",
        xgap=1,
        ygap=1,
    )
    _ticks(figure.update_xaxes, [_shown(lens.words[row][int(at)]) for at in real.tolist()], None)
    _ticks(figure.update_yaxes, [label.replace(".hook_", ".") for label in lens.labels], None)
    return Plot(data, styled(figure, "Logit lens"))


def patch_plot(grid: PatchGrid, *, normalised: bool = True) -> Plot:
    """What patches did, on the scale from the corrupted run (0) to the clean one (1).

    Args:
        grid: What `lensbridge.activation_patch` or `lensbridge.path_patch` gave.
        normalised: False for the metric's own values.
    Returns:
        A heat map, or bars for one axis; the last axis runs across, the others down; data as `grid.values`.
    Raises:
        InputError: The grid is a single number, or has no scale, or plotly is not installed.
    """
    go = plotly()
    if not grid.axes:
        raise InputError("one patch is a number, not a figure: read grid.values")
    data = grid.normalised if normalised else grid.values
    across = _labels(grid, len(grid.axes) - 1)
    title = (
        f"{grid.site}, {'first order' if grid.is_estimate else 'patched'} into the {grid.into} run"
    )
    middle = 0.0 if normalised else (grid.corrupted if grid.into == "corrupted" else grid.clean)
    far = float((data - middle).abs().max()) or 1.0
    scale = {"colorscale": DIVERGING, "cmin": middle - far, "cmax": middle + far}
    what = "0 corrupted, 1 clean" if normalised else "metric"
    figure = go.Figure()
    if data.dim() == 1:
        figure.add_bar(
            x=list(range(len(data))),
            y=data.tolist(),
            marker={"color": data.tolist(), **scale},
            customdata=across,
            hovertemplate="%{customdata}: %{y:.3f}<extra></extra>",
        )
        figure.update_yaxes(title=what)
    else:
        down = [""]
        for axis in range(len(grid.axes) - 1):
            own = _labels(grid, axis)
            down = [f"{a}.{b}" if a else b for a in down for b in own]
        figure.add_heatmap(
            z=data.flatten(0, -2).tolist(),
            customdata=[[f"{row}, {column}" for column in across] for row in down],
            colorscale=DIVERGING,
            zmin=scale["cmin"],
            zmax=scale["cmax"],
            colorbar={"title": what},
            hovertemplate="%{customdata}: %{z:.3f}<extra></extra>",
            xgap=1,
            ygap=1,
        )
        _ticks(figure.update_yaxes, down, ".".join(grid.axes[:-1]))
        figure.update_yaxes(autorange="reversed")
    _ticks(figure.update_xaxes, across, grid.axes[-1])
    return Plot(data, styled(figure, title))


def head_plot(scores: HeadScores) -> Plot:
    """A score of each head, layer by layer.

    Args:
        scores: Of a detector.
    Returns:
        A heat map; data [layer, head].
    Raises:
        InputError: plotly is not installed.
    """
    figure = plotly().Figure()
    there = (~scores.scores.isnan()).tolist()
    figure.add_heatmap(
        z=[  # nan is no JSON
            [x if is_there else None for x, is_there in zip(row, own, strict=True)]
            for row, own in zip(scores.scores.tolist(), there, strict=True)
        ],
        colorscale="Cividis",
        colorbar={"title": "score"},
        customdata=[
            [f"{n}.{head}" for head in range(scores.scores.shape[1])] for n in scores.layers
        ],
        hovertemplate="%{customdata}: %{z:.3f}<extra></extra>",
        xgap=1,
        ygap=1,
    )
    _ticks(figure.update_xaxes, [str(head) for head in range(scores.scores.shape[1])], "head")
    _ticks(figure.update_yaxes, [str(layer) for layer in scores.layers], "layer")
    figure.update_yaxes(autorange="reversed")
    return Plot(scores.scores, styled(figure, scores.kind.replace("_", " ")))


def head_scatter(x: HeadScores | PatchGrid, y: HeadScores | PatchGrid) -> Plot:
    """Two scores of each head against each other: detectors, patches, or one of each.

    Args:
        x: Scores, or a grid of layers and heads.
        y: The same heads' scores.
    Returns:
        A dot for each head; data [head, 2].
    Raises:
        InputError: Other heads, a grid of something else, or plotly is not installed.
    """
    go = plotly()
    (names, across, title_x), (others, up, title_y) = _of_heads(x), _of_heads(y)
    if names != others:
        raise InputError(
            f"x has the heads {_few(names)} and y {_few(others)}: give scores of the same"
        )
    data = torch.stack([across, up], -1)
    figure = go.Figure()
    figure.add_scatter(
        x=across.tolist(),
        y=up.tolist(),
        mode="markers",
        marker={"color": BLUE, "size": 9, "opacity": 0.8},
        text=names,
        hovertemplate="%{text}: %{x:.3f}, %{y:.3f}<extra></extra>",
    )
    figure.update_xaxes(title=title_x)
    figure.update_yaxes(title=title_y)
    return Plot(data, styled(figure, "Heads"))


# --- parts --------------------------------------------------------------------------------------------------


def plotly() -> Any:
    """``plotly.graph_objects``.

    Raises:
        InputError: It is not installed.
    """
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise InputError("figures need plotly: pip install 'lensbridge[plots]'") from error
    return go


def styled(figure: Any, title: str | None) -> Any:
    """A figure as all here look."""
    figure.update_layout(
        template="none",
        title={"text": title, "x": 0, "xref": "paper"},
        font={"color": TEXT},
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        hovermode="closest",
        margin={"t": 60, "r": 20},
    )
    figure.update_xaxes(gridcolor=LINES, zeroline=False, automargin=True)
    figure.update_yaxes(gridcolor=LINES, zeroline=False, automargin=True)
    return figure


def _ticks(update: Any, labels: Sequence[str], title: str | None) -> None:
    """Labels at whole numbers; as categories, equal ones would fall together."""
    update(tickmode="array", tickvals=list(range(len(labels))), ticktext=list(labels), title=title)


def _shown(word: str) -> str:
    """A token as a label: what plotly reads as markup taken literally, spaces and line breaks seen."""
    return escape(word.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "·"), quote=False)


def _words(bridge: TransformerBridge, tokens: Tensor | None, length: int) -> list[str]:
    """The tokens of one row with their positions; positions alone where there are none."""
    if tokens is None or bridge.tokenizer is None or tokens.shape[1] != length:
        return [str(i) for i in range(length)]
    row = tokens[0].tolist()
    return [f"{i} {_shown(bridge.to_single_str_token(token))}" for i, token in enumerate(row)]


def _labels(grid: PatchGrid, axis: int) -> list[str]:
    """What the entries of an axis are called; a position with its token."""
    found = []
    for label in grid.labels[axis]:
        parts = label if isinstance(label, tuple) else (label,)
        text = "+".join("" if part is None else str(part) for part in parts) or grid.site
        if grid.tokens is not None and grid.axes[axis] in ("pos", "key"):
            length = len(grid.tokens)
            text += " " + "".join(
                _shown(grid.tokens[part])
                for part in parts
                if part is not None and -length <= part < length
            )
        found.append(text)
    return found


def _of_heads(scores: HeadScores | PatchGrid) -> tuple[list[str], Float[Tensor, " head"], str]:
    """Names and numbers of heads, and what the numbers are."""
    if isinstance(scores, PatchGrid):
        if scores.axes not in (("layer", "head"), ("layer", "kv_head")):
            raise InputError(f"a grid of heads is [layer, head], got [{', '.join(scores.axes)}]")
        layers, values = scores.labels[0], scores.values
        heads = list(scores.labels[1])
        title = f"{scores.site}, {'first order' if scores.is_estimate else 'patched'}"
        values = scores.effects
    else:
        layers, heads, values = scores.layers, list(range(scores.scores.shape[1])), scores.scores
        title = scores.kind.replace("_", " ")
    names = [f"{layer}.{head}" for layer in layers for head in heads]
    there = ~values.flatten().isnan()
    return (
        [name for name, is_there in zip(names, there.tolist(), strict=True) if is_there],
        values.flatten()[there],
        title,
    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f", ... ({len(names)})" if len(names) > 4 else "")
