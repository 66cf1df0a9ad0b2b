"""Architecture: what the parts of a model are and where they sit. Frozen facts, no tensors, no behaviour."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
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
        path: Module path: the smallest module around the projections and the attention itself.
        q, k, v: Input projections.
        o: Path of the output projection.
        n_heads, n_key_value_heads: Query heads, and key/value heads (fewer when grouped).
        d_head, d_head_v: Width of a query/key head and of a value head.
        is_rotary: Whether q and k change between projection and product.
        q_norm, k_norm: Norms on q and k.
        is_cross: Whether keys and values come from another tower.
        nth: Which softmax inside the module is the attention's; None for a fused attention.
        is_direct: Whether pattern times v, as the projection made it, is what the output projection reads; no
            gate, norm or scale between.
        absent: Parts that could not be told apart, and why.
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
    is_cross: bool = False
    nth: int | None = None
    is_direct: bool = True
    absent: dict[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Mlp:
    """A feed-forward part, plain, gated or made of experts.

    Attributes:
        path: Module path; None when its layers sit directly in the block (OPT, BERT).
        inp: Projection into the hidden layer (the ungated one in a gated MLP).
        gate: Projection whose activation gates ``inp``; None in a plain MLP.
        out: Path of the projection back.
        d_mlp: Hidden width.
        router: Path of the module that scores the experts.
        n_experts: How many it scores.
        experts: Path of the module that is the experts, called with tokens, choices and weights.
        shared: Experts that every token passes.
    """

    path: str | None
    inp: Projection | None = None
    gate: Projection | None = None
    out: str | None = None
    d_mlp: int | None = None
    router: str | None = None
    n_experts: int | None = None
    experts: str | None = None
    shared: Mlp | None = None


@dataclass(frozen=True)
class Mixer:
    """A part that lets positions see each other without softmax attention: state space, convolution...

    Attributes:
        path: Module path.
        parts: Its layers by their canonical names: (``"conv"``, path), ...
        gate: What multiplies the mixed values before the last layer.
        silent: Layers whose weights are used without calling them.
    """

    path: str
    parts: tuple[tuple[str, str], ...] = ()
    gate: Projection | None = None
    silent: tuple[tuple[str, str], ...] = ()


Part = Attention | Mlp | Mixer


@dataclass(frozen=True)
class Branch:
    """Something that reads the residual stream and adds to it.

    Attributes:
        name: ``"attn"``, ``"cross_attn"``, ``"mixer"``, ``"mlp"``; a second one of a kind is ``"attn2"``.
        part: What computes.
        number: Which norm of the block is its own: 1 for ``ln1``.
        ln: The norm that belongs to it.
        place: Where that stands: ``"before"`` the branch, ``"after"`` the sum (BERT), or on the ``"stream"``
            itself, branch and skip alike (MiniMax).
        ln_post: A norm (or layer scale) between the branch and the sum.
        makes: The module whose output is what the branch makes, before ``ln_post``.
        adds: The module whose output enters the sum.
        reads: The module that reads the stream for this branch.
        joins: Whether it is added in one sum with the branch before it, both reading the same stream.
        skip, scale: Factors of stream and branch in the sum.
        skip_by, scale_by: Parameters of the model that multiply them as well.
        bias: Parameters that are added besides.
    """

    name: str
    part: Part
    number: int = 1
    ln: Norm | None = None
    place: str = "before"
    ln_post: Norm | None = None
    makes: str | None = None
    adds: str | None = None
    reads: str | None = None
    joins: bool = False
    skip: float = 1.0
    scale: float = 1.0
    skip_by: tuple[str, ...] = ()
    scale_by: tuple[str, ...] = ()
    bias: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """One layer.

    Attributes:
        path: Module path.
        branches: What it adds to the stream, in order.
        call: Which call of the module, where a model runs one layer several times.
        ln_out: Norm on the stream behind everything.
        inner: Attention inside a branch, which adds nothing to the stream by itself.
        is_chained: Whether it hands its output to the next layer as it is.
        unproved: Why its output is not known to be its input plus its branches; empty when that was shown.
    """

    path: str
    branches: tuple[Branch, ...] = ()
    call: int = 0
    ln_out: Norm | None = None
    inner: tuple[Branch, ...] = ()
    is_chained: bool = True
    unproved: str = ""

    def branch(self, name: str) -> Branch | None:
        """The branch of that name."""
        every = (*self.branches, *self.inner)
        return next((branch for branch in every if branch.name == name), None)

    @property
    def attn(self) -> Attention | None:
        """The (first) self-attention."""
        branch = self.branch("attn")
        return branch.part if branch is not None and isinstance(branch.part, Attention) else None

    @property
    def mlp(self) -> Mlp | None:
        """The (first) feed-forward part."""
        branch = self.branch("mlp")
        return branch.part if branch is not None and isinstance(branch.part, Mlp) else None

    @property
    def is_parallel(self) -> bool:
        """Whether branches run side by side."""
        return any(branch.joins for branch in self.branches)

    @property
    def kind(self) -> str:
        """What it is made of, in a few words: ``"attn + mlp"``, ``"mixer + mlp (experts)"``."""
        words = [
            branch.name
            + " (experts)" * (isinstance(branch.part, Mlp) and branch.part.router is not None)
            for branch in self.branches
        ]
        return " + ".join(words) or "unknown"


@dataclass(frozen=True)
class Tower:
    """A stack of layers and what stands before and behind it.

    Attributes:
        prefix: What its names begin with: nothing, ``"encoder_"``, ``"decoder_"``, ``"vision_"``...
        blocks: The layers, in order.
        embed: Path of the token (or patch) embedding.
        pos_embed: Path of a learned position embedding.
        rotary: Path of the module that computes rotary cosines and sines.
        ln_embed: Norm between the embeddings and the first layer.
        embed_scale: Factor between the token embedding and the stream (or that norm); None when more happens.
        ln_final: Norm behind the last layer.
        absent: Roles that were looked for and not found, with what was tried.
        root: Path of the model the tower was run in; empty for the whole.
        seen: The watched run that has shown it; None when none has.
        unproved: Why no run has shown any of this; empty when one has.
    """

    prefix: str
    blocks: tuple[Block, ...]
    embed: str | None = None
    pos_embed: str | None = None
    rotary: str | None = None
    ln_embed: Norm | None = None
    embed_scale: float | None = None
    ln_final: Norm | None = None
    absent: dict[str, str] = field(default_factory=dict, hash=False)
    root: str = ""
    seen: Any = field(default=None, repr=False, compare=False)
    unproved: str = ""


@dataclass(frozen=True)
class Architecture:
    """A whole model.

    Attributes:
        main: The tower that ends in the logits; a decoder where there is one.
        towers: All towers in the order they run, the main one among them.
        unembed: Path of the head.
        logit_scale: Factor between the head's output and the logits; None when more happens (a soft cap).
        projectors: What carries one tower's output to another, by name.
        absent: Roles that were looked for and not found, with what was tried.
    """

    main: Tower
    towers: tuple[Tower, ...]
    unembed: str | None = None
    logit_scale: float | None = 1.0
    projectors: tuple[tuple[str, str], ...] = ()
    absent: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The main tower's layers."""
        return self.main.blocks

    @property
    def unproved(self) -> str:
        """Why no run has shown the main tower; empty when one has."""
        return self.main.unproved

    @cached_property
    def elsewhere(self) -> tuple[str, ...]:
        """Prefixes of towers that do not read, position by position, the text that the main one continues."""
        main = self.main
        others = [tower for tower in self.towers if tower is not main]
        if main.prefix != "decoder_":
            others = [tower for tower in others if tower.root or _widths(tower) != _widths(main)]
        return tuple(tower.prefix for tower in others)

    def __str__(self) -> str:
        return "\n".join(_lines(self, ""))


def _lines(part: object, indent: str) -> Iterator[str]:
    for item in fields(part):  # type: ignore[arg-type]
        value = getattr(part, item.name)
        if item.name in ("seen", "main") or value in (None, {}, (), "", False):
            continue
        if item.name == "towers":
            for tower in value:
                yield f"{indent}tower {tower.prefix or '(main)'}:"
                yield from _lines(tower, indent + "  ")
        elif item.name == "blocks":
            yield from _runs_of_blocks(value, indent)
        elif item.name == "branches":
            for branch in value:
                yield f"{indent}{branch.name}:"
                yield from _lines(branch, indent + "  ")
        elif isinstance(value, (Attention, Mlp, Mixer)):
            yield from _lines(value, indent)
        else:
            yield f"{indent}{item.name}: {value}"


def _runs_of_blocks(blocks: tuple[Block, ...], indent: str) -> Iterator[str]:
    """Each kind of layer once, with the indices of its kind."""
    kinds: dict[str, list[int]] = {}
    for index, block in enumerate(blocks):
        kinds.setdefault(block.kind, []).append(index)
    for kind, indices in kinds.items():
        yield f"{indent}blocks {', '.join(map(str, indices))}: {kind}; the first of them"
        yield from _lines(blocks[indices[0]], indent + "  ")


def _widths(tower: Tower) -> tuple[int, ...]:
    """Rows and positions of the stream that enters a tower in the run it was watched in."""
    visits = tower.seen.visits.get(tower.blocks[0].path, ()) if tower.seen and tower.blocks else ()
    shape = getattr(visits[0].entering, "shape", ()) if visits else ()
    return tuple(shape[:2])
