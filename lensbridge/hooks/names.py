"""The grammar of point names: canonical names, the familiar aliases, and TransformerLens shorthand."""

from __future__ import annotations

import re

from .errors import InputError

ALIASES: dict[str, tuple[str, ...]] = {
    "embed.hook_out": ("hook_embed",),
    "pos_embed.hook_out": ("hook_pos_embed",),
    "blocks.{i}.hook_in": ("blocks.{i}.hook_resid_pre",),
    "blocks.{i}.hook_out": ("blocks.{i}.hook_resid_post",),
    "blocks.{i}.attn.q.hook_out": ("blocks.{i}.attn.hook_q",),
    "blocks.{i}.attn.k.hook_out": ("blocks.{i}.attn.hook_k",),
    "blocks.{i}.attn.v.hook_out": ("blocks.{i}.attn.hook_v",),
    "blocks.{i}.attn.q_norm.hook_out": ("blocks.{i}.attn.hook_q_normed",),
    "blocks.{i}.attn.k_norm.hook_out": ("blocks.{i}.attn.hook_k_normed",),
    "blocks.{i}.attn.o.hook_in": ("blocks.{i}.attn.hook_z",),
    "blocks.{i}.mlp.gate.hook_out": ("blocks.{i}.mlp.hook_pre",),
    "blocks.{i}.mlp.out.hook_in": ("blocks.{i}.mlp.hook_post",),
    "unembed.hook_out": ("hook_unembed",),
}
"""Aliases that hold in every model.

Those that depend on the block are given where the block is known: ``hook_attn_out`` and ``hook_mlp_out`` name
what is added to the stream, so they follow a norm after the branch; ``hook_mlp_in`` is what the norm before
the MLP reads, or the MLP itself where none is before it; ``mlp.hook_pre`` is the gate of a gated MLP and the
only input projection of a plain one."""

_KINDS = re.compile(r"\.((?:cross_)?(attn|mlp)(?:\d+|\.shared)?)(?=\.)")

_IN_ATTENTION = (
    "q",
    "k",
    "v",
    "z",
    "pattern",
    "attn_scores",
    "rot_q",
    "rot_k",
    "result",
    "q_normed",
    "k_normed",
)
_IN_MLP = ("pre", "post", "pre_linear")
_SHORT = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "key": "k",
    "query": "q",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_post": "post",
}
_PARTS = {"a": "attn", "attention": "attn", "m": "mlp", "b": None, "block": None, "blocks": None}
_TOP = ("embed", "pos_embed", "unembed")


def aliases_of(name: str) -> tuple[str, ...]:
    """The familiar aliases of a canonical name."""
    match = re.match(r"(.*?)blocks\.(\d+)(\..*)", name)
    if match is None:
        return ALIASES.get(name, ())
    tower, layer, rest = match.groups()
    part = _KINDS.match(rest)
    # A cross-attention or a second MLP has the names of the first of its kind.
    kind, own = (part.group(2), part.group(1)) if part is not None else ("", "")
    found = ALIASES.get("blocks.{i}" + (rest.replace(own, kind, 1) if own else rest), ())
    names = [tower + alias.replace("{i}", layer) for alias in found]
    return tuple(name.replace(f".{kind}.", f".{own}.", 1) if own else name for name in names)


def act_name(name: str, layer: int | None = None, part: str | None = None) -> str:
    """The full name behind TransformerLens shorthand.

    ``act_name("resid_post", 3)``, ``act_name("k6")``, ``act_name("pattern", 3)``,
    ``act_name("normalized", 4, "ln2")``, ``act_name("scale")`` (of the final norm).

    Args:
        name: Shorthand, or a full name, which is returned as it is.
        layer: Layer index, not negative.
        part: Which norm, for ``scale`` and ``normalized``; any other part is put before ``hook_``.
    Raises:
        InputError: The shorthand needs a layer and has none.
    """
    if "." in name or name.startswith("hook_"):
        return name
    squeezed = re.fullmatch(r"([a-z_]+?)(\d+)([a-z]\w*)?", name)
    if squeezed is not None and layer is None:
        name, layer, part = squeezed.group(1), int(squeezed.group(2)), squeezed.group(3) or part
    name = _SHORT.get(name, name)
    if name in _TOP:
        return f"hook_{name}"
    if layer is None:
        if name in ("scale", "normalized"):
            return f"ln_final.hook_{name}"
        raise InputError(f"{name!r} is inside a layer: say which, as in ({name!r}, 0)")
    if part is None and name in _IN_ATTENTION:
        part = "attn"
    elif part is None and name in _IN_MLP:
        part = "mlp"
    part = _PARTS.get(part or "b", part)
    return f"blocks.{layer}.{part}.hook_{name}" if part else f"blocks.{layer}.hook_{name}"
