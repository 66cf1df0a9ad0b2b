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
    "qwen2_moe": "Qwen2-MoE",
    "bamba": "Bamba",
    "qwen3_5": "Qwen3.5",
    "bert": "BERT",
    "t5": "T5",
    "vit": "ViT",
}
"""Model types in tests/tiny_configs.json, and what to call them."""

KINDS = {"bert": "masked", "t5": "seq2seq", "vit": "vision"}
"""Under which kind of model those that are no causal language models stand there."""

TOWERS = ("encoder_", "decoder_", "vision_", "audio_")
"""What the names of a tower begin with; the points are the same in each."""

OWN = (
    r"ln_embed\.|blocks\.\{i\}\.(cross_attn|mixer|ln3|mlp\.(router|experts|shared))\."
    r"|blocks\.\{i\}\.hook_resid_mid2$"
)
"""Points of parts that a plain decoder does not know, so that it has no reason to give for lacking them."""

SECTIONS = {
    "Before the layers": r"(embed|pos_embed|ln_embed|rotary_emb)\.",
    "Residual stream": r"blocks\.\{i\}\.hook_",
    "Norms of a layer": r"blocks\.\{i\}\.ln",
    "Attention": r"blocks\.\{i\}\.attn\.",
    "Cross-attention": r"blocks\.\{i\}\.cross_attn\.",
    "MLP": r"blocks\.\{i\}\.mlp\.(hook_|in\.|gate\.|out\.)",
    "Experts": r"blocks\.\{i\}\.mlp\.(router|experts|shared)\.",
    "Mixers": r"blocks\.\{i\}\.mixer\.",
    "After the layers": r"(ln_final|unembed)\.",
}

INTRODUCTIONS = {
    "Norms of a layer": "`ln1` belongs to a layer's first branch, `ln2` to the second, `ln3` to a third; in "
    "a plain layer these are attention and the MLP. A norm stands before its branch, or, as in BERT, "
    "behind the sum. There it reads the sum, and what it puts out is the stream.",
    "Cross-attention": "The attention of a decoder that looks at the encoder's output. Its queries are made "
    "of the stream, its keys and values of the other tower.",
    "Experts": "In a mixture of experts. Where the experts are one module called with tokens, choices and "
    "weights, the choices have names; where a model loops over its experts, they are absent.",
    "Mixers": "State-space, recurrent and linear-attention parts. Their layers are called by what they do: "
    "`in`, `z`, `gate`, `ba`, `b`, `a`, `conv`, `q`, `k`, `v`, `x`, `dt`, `norm`, `out`. Listed are those of "
    "two hybrids. A layer whose weights the mixer uses without calling it, as most do with `conv`, is absent "
    "and says so.",
}

# --- what the points mean ---------------------------------------------------------------------------------

_NORMS = {
    "ln_embed": "the norm between the embeddings and the first layer",
    "blocks.{i}.ln1": "the first branch's norm",
    "blocks.{i}.ln1_post": "the norm between the first branch and the residual sum",
    "blocks.{i}.ln2": "the second branch's norm",
    "blocks.{i}.ln2_post": "the norm between the second branch and the residual sum",
    "blocks.{i}.ln3": "the third branch's norm",
    "blocks.{i}.attn.q_norm": "the norm on each head's queries",
    "blocks.{i}.attn.k_norm": "the norm on each head's keys",
    "ln_final": "the norm before the unembedding",
}
_IN_NORM = {
    "hook_in": "What {norm} reads; an edit reaches what it puts out and nothing else.",
    "hook_scale": "What {norm} divides by: standard deviation (LayerNorm) or root mean square (RMSNorm), "
    "with eps, in float32.",
    "hook_normalized": "The value inside {norm} after the division, before weight and bias.",
    "hook_out": "What {norm} puts out.",
}

_SENTENCES = {
    "embed.hook_in": "Token ids.",
    "embed.hook_out": "What the token embedding puts out; of an image, the patch embedding.",
    "pos_embed.hook_in": "Position ids; one row when all rows of the batch share them.",
    "pos_embed.hook_out": "Position embeddings; one row when all rows of the batch share them.",
    "rotary_emb.hook_in": "Position ids; one row when all rows of the batch share them.",
    "rotary_emb.hook_cos": "Cosines of the rotation at each position, for every layer.",
    "rotary_emb.hook_sin": "Sines of the rotation at each position, for every layer.",
    "blocks.{i}.hook_in": "The residual stream entering the layer.",
    "blocks.{i}.hook_resid_mid": "The residual stream between the first branch and the second (attention and "
    "MLP in a plain layer); an edit reaches the second and the stream after it.",
    "blocks.{i}.hook_resid_mid2": "The same between the second branch and a third.",
    "blocks.{i}.hook_out": "The residual stream leaving the layer.",
    "blocks.{i}.ln1.hook_in": "What the first branch's norm reads; where that stands before the branch, an "
    "edit leaves the stream alone.",
    "blocks.{i}.ln2.hook_in": "What the second branch's norm reads; where that stands before the branch, an "
    "edit leaves the stream alone.",
    "blocks.{i}.ln3.hook_in": "What the third branch's norm reads; where that stands before the branch, an "
    "edit leaves the stream alone.",
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
    "blocks.{i}.mlp.router.hook_in": "What the router scores.",
    "blocks.{i}.mlp.router.hook_out": "The router's logits, where it makes them; an edit is what it then "
    "chooses from, so it reroutes.",
    "blocks.{i}.mlp.router.hook_experts": "Indices of the chosen experts, as these are called with them.",
    "blocks.{i}.mlp.router.hook_weights": "By how much each chosen expert counts.",
    "blocks.{i}.mlp.experts.hook_in": "What the experts are called with.",
    "blocks.{i}.mlp.experts.hook_out": "What the chosen experts make, weighted and summed.",
    "blocks.{i}.mlp.shared.hook_in": "What the shared experts, which every token passes, are called with.",
    "blocks.{i}.mlp.shared.hook_out": "What the shared experts make, before any gate on them.",
    "blocks.{i}.mixer.hook_in": "What the mixer is called with.",
    "blocks.{i}.mixer.hook_out": "What the mixer returns.",
    "unembed.hook_in": "What the unembedding reads.",
    "unembed.hook_out": "Logits, before a soft cap where the model has one.",
}

_MIXER = {
    "in": ("the input projection", "often several values side by side"),
    "z": ("the z projection", "the gate before its activation"),
    "b": ("the b projection", "how much of each position is written to the state"),
    "a": ("the a projection", "how fast the state fades"),
    "norm": ("the norm before the output projection", "gated where the model gates there"),
    "out": ("the output projection", "bias included"),
}
_CROSS = {
    "q.hook_in": "What the q projection reads.",
    "q.hook_out": "Queries by head, one a position of the decoder.",
    "k.hook_in": "What the k projection reads: the encoder's output.",
    "k.hook_out": "Keys by head, one a position of the encoder.",
    "v.hook_in": "What the v projection reads: the encoder's output.",
    "v.hook_out": "Values by head, one a position of the encoder.",
}


def _same(start: str, part: str, names: Iterable[str]) -> dict[str, str]:
    """The sentences of one part for another that works alike."""
    old, new = (f"`{x.rpartition('}.')[2]}." for x in (start, part))
    return {f"{part}.{name}": _SENTENCES[f"{start}.{name}"].replace(old, new) for name in names}


_INSIDE = (
    "hook_in",
    "hook_attn_scores",
    "hook_pattern",
    "o.hook_in",
    "hook_result",
    "o.hook_out",
    "hook_out",
)
_LAYERS = [f"{part}.{end}" for part in ("gate", "in", "out") for end in ("hook_in", "hook_out")]

SENTENCES: dict[str, str] = {
    **{
        f"{place}.{point}": sentence.format(norm=norm)
        for place, norm in _NORMS.items()
        for point, sentence in _IN_NORM.items()
    },
    **_SENTENCES,
    **_same("blocks.{i}.attn", "blocks.{i}.cross_attn", _INSIDE),
    **{f"blocks.{{i}}.cross_attn.{name}": sentence for name, sentence in _CROSS.items()},
    **_same("blocks.{i}.mlp", "blocks.{i}.mlp.shared", _LAYERS),
    **{
        f"blocks.{{i}}.mixer.{part}.hook_in": f"What {one} reads."
        for part, (one, _) in _MIXER.items()
    },
    **{
        f"blocks.{{i}}.mixer.{part}.hook_out": f"What {one} puts out: {what}."
        for part, (one, what) in _MIXER.items()
    },
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
        absent: Reason -> the families that lack the point for it; empty where they lack the whole part.
    """

    name: str
    axes: str
    is_default: bool
    families: list[str] = field(default_factory=list)
    aliases: dict[str, list[str]] = field(default_factory=dict)
    absent: dict[str, list[str]] = field(default_factory=dict)


def template(name: str) -> str:
    """``decoder_blocks.3.self_attn.hook_out`` as ``blocks.{i}.attn.hook_out``."""
    bare = re.sub(rf"^({'|'.join(TOWERS)})", "", name).replace(".self_attn.", ".attn.")
    return re.sub(r"\bblocks\.\d+\.", "blocks.{i}.", bare)


def registry_of(family: str) -> HookRegistry:
    """The points of a tiny model of a family; its weights are never looked at."""
    import transformers

    from lensbridge import TransformerBridge

    entry: Any = json.loads(CONFIGS.read_text(encoding="utf-8"))[KINDS.get(family, "causal")][
        family
    ]
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
            for alias in map(template, hook.aliases):
                if alias != name:  # a decoder's attn is also its self_attn
                    _note(point.aliases.setdefault(alias, []), family)
            previous = name
    for point in points.values():
        for family, registry in registries.items():
            # A name may be another's alias where two places are one (attn.hook_out in BERT).
            if family not in point.families and point.name not in map(template, registry.aliases):
                reason = _reason(registry, point.name)
                if not (reason or re.match(OWN, point.name)):
                    raise NamesError(f"{family} lacks {point.name} and does not say why")
                _note(point.absent.setdefault(reason, []), family)
    return [points[name] for name in order]


def _reason(registry: HookRegistry, name: str) -> str:
    """Why a model has no such point in any tower or layer; a layer with the rest of the part knows best."""
    reasons = [
        registry.why(f"{tower}{name}".replace("{i}", layer))
        for tower in ("", *TOWERS)
        for layer in ("0", "1")
    ]
    found = [reason for reason in reasons if reason]
    return next((r for r in found if not r.startswith("this layer is")), "".join(found[:1]))


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
        listed = [point for point in points if _section(point.name) == title]
        shared = listed[0].families if all(p.families == listed[0].families for p in listed) else []
        if title in INTRODUCTIONS:
            lines += [INTRODUCTIONS[title] + f" Listed as in {_names(shared)}." * bool(shared), ""]
        for point in listed:
            lines += [*_entry(point, sentences[point.name], shared), ""]
    lines += ["## Aliases", "", "| alias | point |", "|---|---|"]
    lines += [f"| {alias} | {name} |" for alias, name in sorted(_aliases(points))]
    return "\n".join([*lines, ""])


def _entry(point: Point, sentence: str, of_all: list[str]) -> Iterator[str]:
    yield f"`{point.name}` [{point.axes}]"
    yield f": {sentence}" + ("" if point.is_default else " Computed when named.")
    if point.aliases:
        shown = [
            f"`{alias}`" + _only(families, point.families)
            for alias, families in point.aliases.items()
        ]
        yield f"  Also {', '.join(shown)}."
    if point.families == of_all:
        return  # the section says where they are
    reasons = {reason: families for reason, families in point.absent.items() if reason}
    if len(reasons) < len(point.absent):
        yield f"  Only in {_names(point.families)}."
        return
    if len(reasons) == 1 and len(point.families) < len(*reasons.values()):
        yield f"  Only in {_names(point.families)}; in the others, {next(iter(reasons))}."
        return
    for reason, families in reasons.items():
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
            is_shared = sum(alias in (other.name, *other.aliases) for other in points) > 1
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
