"""Architecture: what the parts of a model are and where they sit. Frozen facts, no tensors, no behaviour."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Norm:
    """A normalisation module.

    Attributes:
        path: Module path in the model.
        center: Whether the mean is subtracted (LayerNorm) or not (RMSNorm).
        eps: Added to the variance.
        offset: Added to the weight before it multiplies (1 in Gemma).
        is_open: Whether the three facts above reproduce the module, so that the normalised value and the
            scale inside it can be named.
    """

    path: str
    center: bool = False
    eps: float = 0.0
    offset: float = 0.0
    is_open: bool = False


@dataclass(frozen=True)
class Split:
    """How one output holds several projections side by side.

    The last dimension is ``groups`` runs, each with a stretch for every projection: GPT-2 has one group of
    (q, k, v); GPT-NeoX one group a head; Phi-3 one group with fewer k and v.

    Attributes:
        groups: Number of runs.
        sizes: Width of each projection's stretch within a run.
    """

    groups: int
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Projection:
    """A linear map, whole or a share of a joint one.

    Attributes:
        path: Module path.
        split: How the module's output is shared; None when the whole output is this projection.
        index: Which share.
    """

    path: str
    split: Split | None = None
    index: int = 0


@dataclass(frozen=True)
class Attention:
    """An attention module and its parts.

    Attributes:
        path: Module path.
        q, k, v: Input projections.
        o: Path of the output projection.
        n_heads, n_key_value_heads: Query heads, and key/value heads (fewer when grouped).
        d_head, d_head_v: Width of a query/key head and of a value head.
        is_rotary: Whether q and k are rotated between projection and product.
        q_norm, k_norm: Norms on q and k.
        is_softmax: Whether a softmax attention was seen inside (or none has looked).
        is_direct: Whether pattern times v, as the projection made it, is what the output projection reads; no
            gate, norm or scale between (or none has looked).
    """

    path: str
    q: Projection | None
    k: Projection | None
    v: Projection | None
    o: str | None
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_head_v: int
    is_rotary: bool
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    is_softmax: bool = True
    is_direct: bool = True


@dataclass(frozen=True)
class Mlp:
    """A feed-forward part.

    Attributes:
        path: Module path; None when its layers sit directly in the block (OPT).
        inp: Projection into the hidden layer (the ungated one in a gated MLP).
        gate: Projection whose activation gates ``inp``; None in a plain MLP.
        out: Path of the projection back.
        d_mlp: Hidden width.
    """

    path: str | None
    inp: Projection | None
    gate: Projection | None
    out: str | None
    d_mlp: int | None


@dataclass(frozen=True)
class Block:
    """One layer.

    Attributes:
        path: Module path.
        ln1, ln2: Norms before attention and before the MLP.
        ln1_post, ln2_post: Norms between attention (MLP) and the residual sum.
        attn, mlp: The two branches.
        is_parallel: Whether both branches read the residual stream entering the block.
        is_post_norm: Whether ``ln1`` and ``ln2`` stand behind the sums (BERT), not before the branches.
        mid: Module that reads the stream between attention and MLP.
        attn_out, mlp_out: Modules whose outputs are added to the stream.
        skip_scale, attn_scale, mlp_scale: Factors with which stream and outputs enter the sum.
        unproved: Why the above is only what the names propose; empty when a run has shown it.
    """

    path: str
    attn: Attention | None
    mlp: Mlp | None
    ln1: Norm | None = None
    ln2: Norm | None = None
    ln1_post: Norm | None = None
    ln2_post: Norm | None = None
    is_parallel: bool = False
    is_post_norm: bool = False
    mid: str | None = None
    attn_out: str | None = None
    mlp_out: str | None = None
    skip_scale: float = 1.0
    attn_scale: float = 1.0
    mlp_scale: float = 1.0
    unproved: str = ""


@dataclass(frozen=True)
class Architecture:
    """A whole model.

    Attributes:
        embed: Path of the token embedding.
        blocks: The layers, in order.
        pos_embed: Path of a learned position embedding.
        rotary: Path of the module that computes rotary cosines and sines.
        ln_final: Norm before the head.
        unembed: Path of the head.
        absent: Roles that were looked for and not found, with what was tried.
        seen: The watched run that has shown it; None when none has.
        unproved: Why no run has shown any of this; empty when one has.
    """

    embed: str | None
    blocks: tuple[Block, ...]
    pos_embed: str | None = None
    rotary: str | None = None
    ln_final: Norm | None = None
    unembed: str | None = None
    absent: dict[str, str] = field(default_factory=dict, hash=False)
    seen: Any = field(default=None, repr=False, compare=False)
    unproved: str = ""

    def __str__(self) -> str:
        return "\n".join(_lines(self, ""))


def _lines(part: object, indent: str) -> Iterator[str]:
    for item in fields(part):  # type: ignore[arg-type]
        value = getattr(part, item.name)
        if item.name == "blocks":
            yield f"{indent}blocks: {len(value)}, the first of them"
            if value:
                yield from _lines(value[0], indent + "  ")
        elif isinstance(value, (Attention, Mlp)):
            yield f"{indent}{item.name}:"
            yield from _lines(value, indent + "  ")
        elif item.name != "seen" and value not in (None, {}, (), "", False):
            yield f"{indent}{item.name}: {value}"
