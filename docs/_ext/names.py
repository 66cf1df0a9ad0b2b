"""The reference of hook points, written from the registries of tiny models at every build of these pages.

As a Sphinx extension it writes ``docs/generated/points.md``, which ``docs/names.md`` includes. What a point
means is the table here; which points there are, their axes and aliases, and why a family lacks one is asked
of the library. The two must name the same points, or the build fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sphinx.application import Sphinx

    from lensbridge import HookRegistry

DOCS = Path(__file__).resolve().parents[1]
CONFIGS = DOCS.parent / "tests" / "tiny_configs.json"
TARGET = DOCS / "generated" / "points.md"

FAMILIES = {
    "gpt2": "GPT-2",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "phi3": "Phi-3",
    "gpt_neox": "GPT-NeoX",
    "phi": "Phi",
}
"""Model types in tests/tiny_configs.json, and what to call them."""

SECTIONS = {
    "Before the layers": r"(embed|pos_embed|rotary_emb)\.",
    "Residual stream": r"blocks\.\{i\}\.hook_",
    "Norms of a layer": r"blocks\.\{i\}\.ln",
    "Attention": r"blocks\.\{i\}\.attn\.",
    "MLP": r"blocks\.\{i\}\.mlp\.",
    "After the layers": r"(ln_final|unembed)\.",
}

# --- what the points mean ---------------------------------------------------------------------------------

_NORMS = {
    "blocks.{i}.ln1": "the norm before attention",
    "blocks.{i}.ln1_post": "the norm between attention and the residual sum",
    "blocks.{i}.ln2": "the norm before the MLP",
    "blocks.{i}.ln2_post": "the norm between the MLP and the residual sum",
    "blocks.{i}.attn.q_norm": "the norm on each head's queries",
    "blocks.{i}.attn.k_norm": "the norm on each head's keys",
    "ln_final": "the norm before the unembedding",
}
_IN_NORM = {
    "hook_in": "What {norm} reads; an edit reaches nothing else.",
    "hook_scale": "What {norm} divides by: standard deviation (LayerNorm) or root mean square (RMSNorm), "
    "with eps, in float32.",
    "hook_normalized": "The value inside {norm} after the division, before weight and bias.",
    "hook_out": "What {norm} puts out.",
}

_SENTENCES = {
    "embed.hook_in": "Token ids.",
    "embed.hook_out": "What the token embedding puts out.",
    "pos_embed.hook_in": "Position ids; one row when all rows of the batch share them.",
    "pos_embed.hook_out": "Position embeddings; one row when all rows of the batch share them.",
    "rotary_emb.hook_in": "Position ids; one row when all rows of the batch share them.",
    "rotary_emb.hook_cos": "Cosines of the rotation at each position, for every layer.",
    "rotary_emb.hook_sin": "Sines of the rotation at each position, for every layer.",
    "blocks.{i}.hook_in": "The residual stream entering the layer.",
    "blocks.{i}.hook_resid_mid": "The residual stream between attention and MLP; an edit reaches the MLP "
    "and the stream after it.",
    "blocks.{i}.hook_out": "The residual stream leaving the layer.",
    "blocks.{i}.ln2.hook_in": "What the norm before the MLP reads; an edit leaves the stream alone.",
    "blocks.{i}.attn.hook_attn_in": "The stream before `ln1`, one copy a head; an edit changes what that "
    "head's q, k and v are made of.",
    "blocks.{i}.attn.hook_q_input": "The stream before `ln1`, one copy a head; an edit changes what that "
    "head's q is made of.",
    "blocks.{i}.attn.hook_k_input": "The stream before `ln1`, one copy a key/value head; an edit "
    "changes what that head's k is made of.",
    "blocks.{i}.attn.hook_v_input": "The stream before `ln1`, one copy a key/value head; an edit "
    "changes what that head's v is made of.",
    "blocks.{i}.attn.hook_in": "What the attention module is called with.",
    "blocks.{i}.attn.q.hook_in": "What the q projection reads; an edit leaves k and v alone, in a joint "
    "projection too.",
    "blocks.{i}.attn.q.hook_out": "Queries by head, before any norm or rotation.",
    "blocks.{i}.attn.k.hook_in": "What the k projection reads; an edit leaves q and v alone, in a joint "
    "projection too.",
    "blocks.{i}.attn.k.hook_out": "Keys by head, before any norm or rotation; grouped heads come once.",
    "blocks.{i}.attn.v.hook_in": "What the v projection reads; an edit leaves q and k alone, in a joint "
    "projection too.",
    "blocks.{i}.attn.v.hook_out": "Values by head; grouped heads come once.",
    "blocks.{i}.attn.hook_rot_q": "Queries after rotation, as they enter the product with the keys.",
    "blocks.{i}.attn.hook_rot_k": "Keys after rotation, grouped heads once; with a KV cache, all so far.",
    "blocks.{i}.attn.hook_attn_scores": "What goes into the softmax: scaled, masked, and soft-capped where "
    "the model does so.",
    "blocks.{i}.attn.hook_pattern": "What comes out of the softmax and multiplies v.",
    "blocks.{i}.attn.o.hook_in": "z: what each head read, the pattern times v, as W_O gets it.",
    "blocks.{i}.attn.hook_result": "What each head adds to the stream: z through its share of W_O, without "
    "the bias.",
    "blocks.{i}.attn.o.hook_out": "What the output projection puts out, bias included.",
    "blocks.{i}.attn.hook_out": "What the attention module returns.",
    "blocks.{i}.mlp.hook_in": "What the MLP is called with.",
    "blocks.{i}.mlp.gate.hook_in": "What the gate projection reads; an edit leaves `mlp.in` alone.",
    "blocks.{i}.mlp.gate.hook_out": "The gate before its activation function.",
    "blocks.{i}.mlp.in.hook_in": "What the input projection reads; an edit leaves `mlp.gate` alone.",
    "blocks.{i}.mlp.in.hook_out": "The hidden layer before the activation function; in a gated MLP, what the "
    "activated gate multiplies.",
    "blocks.{i}.mlp.out.hook_in": "The hidden layer after activation and gate: the neurons.",
    "blocks.{i}.mlp.out.hook_out": "What the output projection puts out, bias included.",
    "blocks.{i}.mlp.hook_out": "What the MLP returns.",
    "unembed.hook_in": "What the unembedding reads.",
    "unembed.hook_out": "Logits, before a soft cap where the model has one.",
}

SENTENCES: dict[str, str] = {
    **{
        f"{place}.{point}": sentence.format(norm=norm)
        for place, norm in _NORMS.items()
        for point, sentence in _IN_NORM.items()
    },
    **_SENTENCES,
}
"""Canonical name with ``{i}`` for the layer -> what the point means."""


class NamesError(Exception):
    """The table of sentences and the library's registries do not name the same points."""


# --- what the library says ----------------------------------------------------------------------------------


@dataclass
class Point:
    """One canonical point over all families.

    Attributes:
        name: Canonical name, ``{i}`` for the layer.
        axes: Its dimensions.
        is_default: Whether "every point" includes it.
        families: Those that have it.
        aliases: Alias -> the families in which it is one.
        absent: Reason -> the families that lack the point for it.
    """

    name: str
    axes: str
    is_default: bool
    families: list[str] = field(default_factory=list)
    aliases: dict[str, list[str]] = field(default_factory=dict)
    absent: dict[str, list[str]] = field(default_factory=dict)


def template(name: str) -> str:
    """``blocks.3.hook_out`` as ``blocks.{i}.hook_out``."""
    return re.sub(r"\bblocks\.\d+\.", "blocks.{i}.", name)


def registry_of(family: str) -> HookRegistry:
    """The points of a tiny model of a family; its weights are never looked at."""
    import transformers

    from lensbridge import TransformerBridge

    entry: Any = json.loads(CONFIGS.read_text(encoding="utf-8"))["causal"][family]
    config = getattr(transformers, entry["config_class"])(**entry["config"])
    with torch.random.fork_rng([]):
        model = getattr(transformers, entry["class"])(config)
    return TransformerBridge(model).registry


def collect(registries: Mapping[str, HookRegistry]) -> list[Point]:
    """Every canonical point of any family, in execution order.

    Args:
        registries: Registry by family.
    Raises:
        NamesError: Families disagree about a point's axes, or one lacks a point and does not say why.
    """
    points: dict[str, Point] = {}
    order: list[str] = []
    for family, registry in registries.items():
        previous = None
        for full, hook in registry.items():
            name = template(full)
            point = points.get(name)
            if point is None:
                point = points[name] = Point(name, hook.axes, hook.is_default)
                order.insert(0 if previous is None else order.index(previous) + 1, name)
            if hook.axes != point.axes:
                raise NamesError(f"{name} is [{point.axes}] elsewhere, in {family} [{hook.axes}]")
            _note(point.families, family)
            for alias in hook.aliases:
                _note(point.aliases.setdefault(template(alias), []), family)
            previous = name
    for point in points.values():
        for family, registry in registries.items():
            if family not in point.families:
                reason = registry.why(point.name.replace("{i}", "0"))
                if reason is None:
                    raise NamesError(f"{family} lacks {point.name} and does not say why")
                _note(point.absent.setdefault(reason, []), family)
    return [points[name] for name in order]


def _note(families: list[str], family: str) -> None:
    if family not in families:
        families.append(family)


def check(points: Iterable[Point], sentences: Mapping[str, str]) -> None:
    """Hold the table against the registries.

    Raises:
        NamesError: A point has no sentence, or a sentence no point.
    """
    names = {point.name for point in points}
    problems = [f"  no sentence for the point {name}" for name in sorted(names - set(sentences))]
    problems += [f"  no point for the sentence {name}" for name in sorted(set(sentences) - names)]
    problems += [
        f"  no section for the point {name}" for name in sorted(names) if _section(name) is None
    ]
    if problems:
        here = "docs/_ext/names.py (SENTENCES, SECTIONS, FAMILIES)"
        raise NamesError("\n".join([f"{here} and the registries disagree:", *problems]))


def _section(name: str) -> str | None:
    return next((title for title, form in SECTIONS.items() if re.match(form, name)), None)


# --- the page -----------------------------------------------------------------------------------------------


def page(points: list[Point], sentences: Mapping[str, str]) -> str:
    """The reference in Markdown.

    Raises:
        NamesError: The points and the sentences do not fit.
    """
    check(points, sentences)
    lines: list[str] = []
    for title in SECTIONS:
        lines += [f"## {title}", ""]
        for point in points:
            if _section(point.name) == title:
                lines += [*_entry(point, sentences[point.name]), ""]
    lines += ["## Aliases", "", "| alias | point |", "|---|---|"]
    lines += [f"| {alias} | {name} |" for alias, name in sorted(_aliases(points))]
    return "\n".join([*lines, ""])


def _entry(point: Point, sentence: str) -> Iterator[str]:
    yield f"`{point.name}` [{point.axes}]"
    yield f": {sentence}" + ("" if point.is_default else " Computed when named.")
    if point.aliases:
        shown = [
            f"`{alias}`" + _only(families, point.families)
            for alias, families in point.aliases.items()
        ]
        yield f"  Also {', '.join(shown)}."
    if len(point.absent) == 1 and len(point.families) < len(*point.absent.values()):
        yield f"  Only in {_names(point.families)}; in the others, {next(iter(point.absent))}."
        return
    for reason, families in point.absent.items():
        yield f"  Absent in {_names(families)}: {reason}."


def _only(families: list[str], of: list[str]) -> str:
    if len(families) == len(of):
        return ""
    others = [family for family in of if family not in families]
    if len(others) < len(families):
        return f" (not in {_names(others)})"
    return f" (in {_names(families)})"


def _aliases(points: list[Point]) -> Iterator[tuple[str, str]]:
    for point in points:
        for alias, families in point.aliases.items():
            is_shared = sum(alias in other.aliases for other in points) > 1
            yield f"`{alias}`", f"`{point.name}`{_only(families, [*FAMILIES]) * is_shared}"


def _names(families: Iterable[str]) -> str:
    return ", ".join(FAMILIES.get(family, family) for family in families)


def write(target: Path = TARGET) -> None:
    """Write the page, unless it is there and the same."""
    text = page(collect({family: registry_of(family) for family in FAMILIES}), SENTENCES)
    target.parent.mkdir(exist_ok=True)
    if not target.exists() or target.read_text(encoding="utf-8") != text:
        target.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx's entry."""
    from sphinx.errors import ExtensionError

    def build(_: Sphinx) -> None:
        try:
            write()
        except NamesError as error:
            raise ExtensionError(str(error)) from error

    app.connect("builder-inited", build)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
