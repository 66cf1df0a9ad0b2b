"""A page about concepts: one HTML file that needs nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..granularity import Granularity
from .effects import logit_effects, top_tokens
from .examples import ALL, ConceptExample, TopKInputs, splitter_of

AROUND = 12
"""Tokens that are shown on either side of an example."""
BARS = 24

STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --paper: #fff; --line: #d9dde5; --heat: 230, 126, 34;
  --bar: #3b6ea8; --soft: #667085; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaf0; --paper: #14171d; --line: #333a46;
  --bar: #7fb0e6; --soft: #98a2b3; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 62rem; padding: 1.5rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 0 0 .4rem; }
section { border-top: 1px solid var(--line); padding: 1.1rem 0; }
nav { display: flex; flex-wrap: wrap; gap: .4rem; font-size: .85rem; }
a { color: var(--bar); }
.facts, .value { color: var(--soft); font-size: .85rem; }
.row { display: flex; gap: 1.5rem; flex-wrap: wrap; }
ol { list-style: none; margin: .4rem 0; padding: 0; }
li { display: flex; gap: .8rem; align-items: baseline; overflow-wrap: anywhere; }
li .value { flex: 0 0 4rem; text-align: right; font-variant-numeric: tabular-nums; }
.token { border-radius: 3px; white-space: pre-wrap; }
table { border-collapse: collapse; font-size: .85rem; } td { padding: 0 .6rem 0 0; white-space: pre; }
svg rect { fill: var(--bar); }
"""


def dashboard(
    explainer: Any,
    inputs: Sequence[str],
    path: str | Path,
    *,
    concepts: int | Iterable[int] | str = ALL,
    k: int = 10,
    labels: dict[int, str | None] | None = None,
    title: str | None = None,
) -> Path:
    """Write a page: for each concept its strongest tokens in context, its logit effects and its histogram.

    Args:
        explainer: A fitted explainer.
        inputs: Texts to look through.
        path: Where to write it.
        concepts: Which concepts; ``"all"`` for every one.
        k: Examples, and tokens on either side, a concept.
        labels: Names of concepts, as `label_concepts` gives them.
        title: What stands above; the explainer and its place unless given.
    Returns:
        Where it was written.
    Raises:
        InputError: No texts, or concepts that are not there.
    """
    texts = list(inputs)
    found = TopKInputs(explainer, Granularity.TOKEN, k=k, use_unique=False).examples(
        concepts, texts
    )
    read = _read(explainer, texts)
    effects = _effects(explainer)
    head = title or f"{type(explainer).__name__} at {explainer.split_point}"
    parts = [
        _section(
            concept,
            (labels or {}).get(concept),
            examples,
            read,
            None if effects is None else top_tokens(_bridge(explainer), effects[concept], k),
        )
        for concept, examples in found.items()
    ]
    count = sum(len(one.tokens) for one in read)
    links = " ".join(f'<a href="#c{concept}">{concept}</a>' for concept in found)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(head)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        f"<h1>{escape(head)}</h1><p class=facts>{len(texts)} texts, {count} tokens, "
        f"{len(found)} concepts</p><nav aria-label=Concepts>{links}</nav>{''.join(parts)}</html>\n"
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target


def _bridge(explainer: Any) -> Any:
    return explainer.splitter.bridge


def _effects(explainer: Any) -> Tensor | None:
    """Logit effects, where the concepts are directions of the residual stream of a model with a head."""
    bridge = _bridge(explainer)
    rows = explainer.get_dictionary()
    has_head = "unembed.hook_in" in bridge.registry
    return (
        logit_effects(bridge, rows) if has_head and rows.shape[-1] == bridge.cfg.d_model else None
    )


@dataclass(frozen=True)
class _Read:
    """A text as it was read.

    Attributes:
        tokens: What its tokens are in the text, special ones left out.
        places: Where each of them is among all its tokens.
        codes: Its concepts.
    """

    tokens: list[str]
    places: list[int]
    codes: Float[Tensor, "token concept"]


def _read(explainer: Any, texts: list[str]) -> list[_Read]:
    split = splitter_of(explainer)
    samples = split.samples(texts, Granularity.SENTENCE)
    groups = split.groups(samples, Granularity.TOKEN)
    rows, _ = split.get_activations(texts, Granularity.TOKEN, flatten_activations=False)
    made = []
    for sample, group, x in zip(samples, groups, rows, strict=True):
        if sample.text is None or sample.spans is None:
            tokens = [split.tokenizer.decode([sample.ids[i]]) for i in group.tokens]
        else:
            begins = [sample.spans[i][0] for i in group.tokens] + [len(sample.text)]
            # What stands between two tokens (spaces that belong to none) goes with the first.
            tokens = [sample.text[a:b] for a, b in itertools.pairwise(begins)]
        codes = explainer.encode_activations(x).detach().float().cpu()
        made.append(_Read(tokens, list(group.tokens), codes))
    return made


def _section(
    concept: int,
    label: str | None,
    examples: list[ConceptExample],
    read: list[_Read],
    effects: Any,
) -> str:
    every = torch.cat([one.codes[:, concept] for one in read])
    active = every[every != 0]
    name = f": {escape(label)}" if label else ""
    facts = f"active on {len(active) / max(len(every), 1):.2%} of tokens"
    if len(active):
        facts += f", at most {float(active.max()):.3g}"
    body = f'<section id="c{concept}"><h2>Concept {concept}{name}</h2><p class=facts>{facts}</p>'
    if not examples:
        return body + "<p>Never active on these texts.</p></section>"
    top = examples[0].activation
    items = []
    for example in examples:
        one = read[example.sample]
        at = one.places.index(example.tokens[0])
        items.append(_line(example, one.tokens, one.codes[:, concept], at, top))
    body += f"<ol>{''.join(items)}</ol><div class=row>{_histogram(active)}"
    if effects is not None:
        body += _table("speaks for", effects[0]) + _table("speaks against", effects[1])
    return body + "</div></section>"


def _line(
    example: ConceptExample, tokens: list[str], row: Float[Tensor, " token"], at: int, top: float
) -> str:
    first, last = max(at - AROUND, 0), min(at + AROUND + 1, len(tokens))
    spans = []
    for index in range(first, last):
        value = max(float(row[index]), 0.0)
        text = escape(tokens[index])
        if value:
            heat = f"background: rgba(var(--heat), {min(value / top, 1):.2f})"
            text = f'<span class=token style="{heat}" title="{value:.3g}">{text}</span>'
        spans.append(f"<b>{text}</b>" if index == at else text)
    start, end = ("…" if first else ""), ("…" if last < len(tokens) else "")
    return (
        f"<li><span class=value>{example.activation:.3g}</span>"
        f"<span class=token>{start}{''.join(spans)}{end}</span></li>"
    )


def _histogram(active: Float[Tensor, " n"]) -> str:
    """Bars of how often the concept is how active."""
    low, high = float(active.min()), float(active.max())
    counts = torch.histc(active, BARS, min=min(low, 0.0), max=high) if high > low else None
    bars = [float(len(active))] if counts is None else counts.tolist()
    tallest, width = max(bars), 240 / len(bars)
    drawn = "".join(
        f'<rect x="{n * width:.1f}" y="{60 - 60 * bar / tallest:.1f}" width="{width - 1:.1f}" '
        f'height="{60 * bar / tallest:.1f}"/>'
        for n, bar in enumerate(bars)
    )
    words = f"Histogram of {len(active)} activations from {min(low, 0.0):.3g} to {high:.3g}"
    return (
        f'<figure><svg role="img" aria-label="{words}" width="240" height="60">{drawn}</svg>'
        f"<figcaption class=facts>{words}</figcaption></figure>"
    )


def _table(name: str, tokens: list[tuple[str, float]]) -> str:
    rows = "".join(
        f"<tr><td>{escape(repr(token))}</td><td class=value>{value:+.2f}</td></tr>"
        for token, value in tokens
    )
    return f"<table><caption class=facts>{name}</caption>{rows}</table>"
