"""Figures of fitted gates. They are plotly's: data can be read off them, `write_html(path)` makes a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from jaxtyping import Bool
from torch import Tensor

from ...hooks import InputError
from ..figures import (
    BLUE,
    DIVERGING,
    GREEN,
    GREY,
    PURPLE,
    TEXT,
    VERMILION,
    plotly,
    styled,
)
from .fitting import NEGATIVE, POSITIVE
from .results import (
    FACILITATING,
    INCONSISTENT,
    INTERFERING,
    IRRELEVANT,
    LABELS,
    UNDECIDED,
    CHGResults,
    Head,
)
from .validation import AblationCurve

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Shapes and dashes say what colours say again.
ROLES = {
    FACILITATING: (BLUE, "circle", "solid"),
    INTERFERING: (VERMILION, "x", "dash"),
    IRRELEVANT: (GREY, "circle-open", "dot"),
    INCONSISTENT: (PURPLE, "diamond", "dashdot"),
    UNDECIDED: (GREEN, "triangle-up", "longdash"),
}
CURVES = ((BLUE, "solid"), (VERMILION, "dash"), (GREEN, "dot"), (PURPLE, "dashdot"))

SCORES = ("facilitation", "interference", "irrelevance")
UNITS = {"heads": "head", "kv_groups": "KV group", "attn": "attention", "mlp": "MLP"}
UNSURE = "?"


def role_scatter(results: CHGResults, threshold: float = 0.5) -> Figure:
    """G+ against G-: heads that help lie at the top right, idle ones at the bottom right, harmful ones left.

    Args:
        results: Of a fit with both regularised stages.
        threshold: Above it a gate is open; for the colours, which are roles.
    Returns:
        A trace for each role that occurs, a dot for each head at the means over masks. What is shown at a dot
        when it is pointed to has the scores with their 95 % intervals.
    Raises:
        InputError: A stage was not fitted, or plotly is not installed.
    """
    go = plotly()
    open_, closed = (results.gates(stage).mean(0) for stage in (POSITIVE, NEGATIVE))
    labels, told = results.labels(threshold), _told(results)
    figure = go.Figure()
    for role in LABELS:
        heads = [head for head, label in labels.items() if label == role]
        if not heads:
            continue
        places = [_place(results, head) for head in heads]
        color, symbol, _ = ROLES[role]
        figure.add_scatter(
            x=[float(open_[place]) for place in places],
            y=[float(closed[place]) for place in places],
            mode="markers",
            name=f"{role} ({len(heads)})",  # dots of one place hide each other
            legendgroup=role,
            marker={"color": color, "symbol": symbol, "size": 10, "opacity": 0.85},
            customdata=heads,
            hovertext=[f"{told[head]}<br>{role}" for head in heads],
            hoverinfo="text",
        )
    for draw in (figure.add_hline, figure.add_vline):
        draw(threshold, line={"color": TEXT, "dash": "dot", "width": 1})
    edge = {"range": [-0.05, 1.05]}
    figure.update_xaxes(title="G+ (pushed open)", constrain="domain", **edge)
    figure.update_yaxes(title="G- (pushed shut)", scaleanchor="x", **edge)
    return styled(figure, "Roles")


def head_heatmaps(results: CHGResults) -> Figure:
    """The three scores of each head, layer by layer, side by side.

    Args:
        results: Of a fit with both regularised stages.
    Returns:
        Three heat maps, of facilitation, interference and irrelevance, the means over masks; a head is marked
        with "?" where the 95 % interval of the score holds 0.5 inside it.
    Raises:
        InputError: A stage was not fitted, or plotly is not installed.
    """
    plotly()
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 3, subplot_titles=SCORES, shared_yaxes=True, horizontal_spacing=0.03)
    ends, told = results.intervals(), _told(results)
    layers = [str(layer) for layer in results.layers]
    for column, name in enumerate(SCORES, 1):
        low, high = ends[name]
        figure.add_heatmap(
            z=getattr(results, name)().tolist(),
            x=list(range(results.num_heads)),
            y=layers,
            name=name,
            text=_marked((low < 0.5) & (high > 0.5)),
            texttemplate="%{text}",
            hovertext=[
                [told[layer, head] for head in range(results.num_heads)] for layer in results.layers
            ],
            hoverinfo="text",
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            row=1,
            col=column,
        )
    figure.update_xaxes(title=UNITS.get(results.target, "gate"), dtick=_every(results.num_heads))
    figure.update_yaxes(type="category", autorange="reversed", dtick=_every(len(layers)))
    figure.update_yaxes(title="layer", col=1)
    figure.update_layout(coloraxis={"colorscale": "Cividis", "cmin": 0, "cmax": 1})
    return styled(figure, None)


def gate_trajectories(
    results: CHGResults,
    stage: str,
    mask_idx: int | None = None,
    heads: Iterable[Head] | None = None,
) -> Figure:
    """Gates over the updates of a stage, as often as they were kept (``history_every``).

    Args:
        results: Of a fit.
        stage: ``"none"``, ``"positive"`` or ``"negative"``.
        mask_idx: Of this mask; None for the mean over masks.
        heads: Which, as (layer, head); None for all.
    Returns:
        A line for each head, in the colour of its role; where roles are not known, because a stage was not
        fitted, of whether its gate ends up open.
    Raises:
        InputError: A stage, mask or head that is not there, or plotly is not installed.
    """
    go = plotly()
    if stage not in results.history:
        kept = ", ".join(results.history) or "no stage"
        raise InputError(f"no gates on the way were kept of stage {stage!r}; there are of {kept}")
    if mask_idx is not None and not -results.num_masks <= mask_idx < results.num_masks:
        raise InputError(f"mask_idx={mask_idx}: there are masks 0 to {results.num_masks - 1}")
    history = results.history[stage]
    gates = history.mean(1) if mask_idx is None else history[:, mask_idx]
    chosen = _heads_of(results) if heads is None else list(heads)
    if not chosen:
        raise InputError(
            "there are no heads to plot: heads= lists (layer, head), or is None for all"
        )
    places = {head: _place(results, head) for head in chosen}
    groups = _groups(results, stage, mask_idx)
    figure, shown = go.Figure(), set()
    for head, (row, column) in places.items():
        group, color, dash = groups[head]
        figure.add_scatter(
            x=results.updates[stage],
            y=gates[:, row, column].tolist(),
            mode="lines",
            name=group,
            legendgroup=group,
            showlegend=group not in shown,
            line={"color": color, "dash": dash, "width": 1.5},
            customdata=[head] * len(gates),
            hovertemplate=f"{_named(results, head)}<br>update %{{x}}: %{{y:.3f}}<extra></extra>",
        )
        shown.add(group)
    figure.update_xaxes(title="update")
    figure.update_yaxes(title="gate", range=[-0.02, 1.02])
    over = "mean over masks" if mask_idx is None else f"mask {mask_idx % results.num_masks}"
    return styled(figure, f"Stage {stage!r}, {over}")


def ablation_plot(curves: Mapping[str, AblationCurve], full: float | None = None) -> Figure:
    """Scores as heads are closed in one order or another.

    Args:
        curves: What `ablation_curve` gave, by name.
        full: A score to draw a line at: the whole model's, or what a task is done well with.
    Returns:
        A line for each curve.
    Raises:
        InputError: No curves, or plotly is not installed.
    """
    go = plotly()
    if not curves:
        raise InputError(
            "there are no curves to plot: give ablation_plot({name: ablation_curve(...)})"
        )
    figure = go.Figure()
    for index, (name, curve) in enumerate(curves.items()):
        color, dash = CURVES[index % len(CURVES)]
        figure.add_scatter(
            x=curve.closed,
            y=curve.scores.tolist(),
            mode="lines+markers",
            name=name,
            line={"color": color, "dash": dash},
            hovertext=[_last_closed(curve, count) for count in curve.closed],
            hovertemplate="%{x} closed%{hovertext}: %{y:.3f}<extra>%{fullData.name}</extra>",
        )
    if full is not None:
        figure.add_hline(full, line={"color": TEXT, "dash": "dot", "width": 1})
    figure.update_xaxes(title="heads closed")
    figure.update_yaxes(title="score")
    return styled(figure, "Closing heads one after the other")


def cooccurrence_heatmap(
    results: CHGResults, stage: str = NEGATIVE, threshold: float = 0.5
) -> Figure:
    """Which heads masks keep together (blue), and which in each other's place (red).

    Args:
        results: Of a fit of several masks.
        stage: Whose gates.
        threshold: Above it a gate is open.
    Returns:
        `CHGResults.cooccurrence` for the heads that are open in some masks and shut in others; of the rest
        there is nothing to say.
    Raises:
        InputError: The stage was not fitted, there is no such head, or plotly is not installed.
    """
    go = plotly()
    together = results.cooccurrence(stage, threshold)
    varies = ~together.diagonal().isnan()
    if not bool(varies.any()):
        raise InputError(
            f"in stage {stage!r} all masks (there are {results.num_masks}) agree on which gates are open, so "
            "no two gates go together or apart"
        )
    heads = [head for head, does in zip(_heads_of(results), varies.tolist(), strict=True) if does]
    names = [f"{layer}.{head}" for layer, head in heads]
    figure = go.Figure()
    figure.add_heatmap(
        z=together[varies][:, varies].tolist(),
        x=names,
        y=names,
        zmin=-1,
        zmax=1,
        colorscale=DIVERGING,
        xgap=1,
        ygap=1,
        hovertemplate="%{y} and %{x}: %{z:.2f}<extra></extra>",
    )
    figure.update_xaxes(type="category", title="layer.head", constrain="domain")
    figure.update_yaxes(type="category", autorange="reversed", scaleanchor="x", constrain="domain")
    return styled(figure, "Kept together, or in each other's place")


# --- parts --------------------------------------------------------------------------------------------------


def _heads_of(results: CHGResults) -> list[Head]:
    return [(layer, head) for layer in results.layers for head in range(results.num_heads)]


def _place(results: CHGResults, head: Head) -> tuple[int, int]:
    """Which row and column of a mask a head has."""
    layer, number = head
    if layer not in results.layers or not 0 <= number < results.num_heads:
        raise InputError(
            f"(layer, head) {tuple(head)}: there are layers {results.layers} with heads 0 to "
            f"{results.num_heads - 1}"
        )
    return results.layers.index(layer), number


def _named(results: CHGResults, head: Head) -> str:
    return f"layer {head[0]}, {UNITS.get(results.target, 'gate')} {head[1]}"


def _told(results: CHGResults) -> dict[Head, str]:
    """What is said of each head when it is pointed to: its scores, with their intervals."""
    ends = results.intervals()
    scores = {name: getattr(results, name)() for name in SCORES}
    told = {}
    for head in _heads_of(results):
        at = _place(results, head)
        lines = [_named(results, head)]
        for name in SCORES:
            low, high = (float(end[at]) for end in ends[name])
            lines.append(f"{name} {float(scores[name][at]):.3f} ({low:.3f} to {high:.3f})")
        told[head] = "<br>".join(lines)
    return told


def _groups(
    results: CHGResults, stage: str, mask_idx: int | None
) -> dict[Head, tuple[str, str, str]]:
    """The name, the colour and the dash of the group each head's line belongs to."""
    if POSITIVE in results.masks and NEGATIVE in results.masks:
        labels = results.labels(mask_idx=mask_idx)
        return {head: (label, ROLES[label][0], ROLES[label][2]) for head, label in labels.items()}
    gates = results.history[stage][-1]
    last = gates.mean(0) if mask_idx is None else gates[mask_idx]
    ends = (last > 0.5).flatten().tolist()
    return {
        head: ("open", *CURVES[0]) if is_open else ("shut", *CURVES[1])
        for head, is_open in zip(_heads_of(results), ends, strict=True)
    }


def _last_closed(curve: AblationCurve, count: int) -> str:
    if count == 0:
        return ""
    layer, head = curve.heads[count - 1]
    return f", last layer {layer}, head {head}"


def _marked(unsure: Bool[Tensor, "layer head"]) -> list[list[str]]:
    return [[UNSURE if one else "" for one in row] for row in unsure.tolist()]


def _every(count: int) -> int:
    """How far apart ticks are, so that there are no more than about sixteen."""
    return max(1, -(-count // 16))
