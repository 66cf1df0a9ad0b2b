"""How the residual stream at a place is a sum: what enters it, and what has happened to all of it since.

Facts only, no tensors: a list of steps, read off the architecture, that `residual` carries out on what a run
left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ..hooks import ArchitectureError, HookRegistry, InputError, LayerRangeError
from .architecture import Architecture, Attention, Block, Branch, Mlp, Norm
from .seen import into
from .whole import Whole

EMBEDS = ("embed", "pos_embed", "rest", "whole")


@dataclass(frozen=True)
class Source:
    """What some summands of the stream are.

    Attributes:
        kind: ``"embed"``, ``"pos_embed"``, ``"rest"`` (what else the first layer is given), ``"whole"``
            (all of that), ``"branch"``, ``"head"``, ``"neuron"`` or ``"bias"``.
        name: The point they are read at; of a bias, what it is called.
        layer: Which layer adds them; -1 for what enters the first.
        branch: Which branch of it.
    """

    kind: str
    name: str
    layer: int = -1
    branch: str = ""

    def points(self, which: Sequence[int]) -> list[str]:
        """A label for each summand: the point it was read at, with its number there."""
        if self.kind in ("head", "neuron"):
            return [f"{self.name}[{index}]" for index in which]
        return [self.name]

    def labels(self, which: Sequence[int]) -> list[str]:
        """A label for each summand, as the field has them: ``0_attn_out``, ``L0H3``, ``L0N17``."""
        if self.kind in ("head", "neuron"):
            letter, usual = ("H", "attn") if self.kind == "head" else ("N", "mlp")
            own = "" if self.branch == usual else f"_{self.branch}"
            return [f"L{self.layer}{letter}{index}{own}" for index in which]
        if self.kind == "branch":
            return [f"{self.layer}_{self.branch}_out"]
        return [{"rest": "embed_rest", "whole": "0_pre"}.get(self.kind, self.kind)]


# --- steps --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Enter:
    """The stream begins: embeddings, apart where they are summands, and a norm behind them.

    Attributes:
        at: The point they are a sum at: what the norm reads, or the first layer.
        parts: Those that are known by name, and their factors; None where the watched run did not show one,
            so that it must be seen in the values.
        has_rest: Whether there are others.
        norm: Name and facts of the norm between them and the first layer.
        first: What the first layer reads.
    """

    at: str
    parts: tuple[tuple[Source, float | None], ...]
    has_rest: bool
    norm: tuple[str, Norm] | None
    first: str


@dataclass(frozen=True)
class Add:
    """A branch adds what it made, whole or in parts.

    Attributes:
        source: What, and how it is split.
        whole: The point that shows all of it, before ``norm``.
        norm: Name and facts of the norm between the branch and the sum, where the parts are read before it.
        factor: What it is multiplied by.
        by: Parameters that multiply it as well.
    """

    source: Source
    whole: str
    norm: tuple[str, Norm] | None = None
    factor: float = 1.0
    by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Multiply:
    """The stream is multiplied by a number and by parameters."""

    factor: float
    by: tuple[str, ...]


@dataclass(frozen=True)
class Normed:
    """The stream passes a norm."""

    name: str
    norm: Norm


@dataclass(frozen=True)
class Constant:
    """A parameter of the model is added."""

    name: str


@dataclass(frozen=True)
class Check:
    """Here the stream is what this point shows."""

    name: str


Step = Enter | Add | Multiply | Normed | Constant | Check


def _every(branch: Branch) -> bool:
    return True


@dataclass(frozen=True)
class Wanted:
    """Which summands are asked for.

    Attributes:
        branches: Tells of a branch.
        enters: Whether what enters the first layer is.
        heads: Whether attentions are split into their heads.
        neurons: Whether plain MLPs are split into their neurons.
        only_parts: Leave out branches that are not split.
        checks: Hold every layer's sum against the run.
    """

    branches: Callable[[Branch], bool] = field(default=_every)
    enters: bool = True
    heads: bool = False
    neurons: bool = False
    only_parts: bool = False
    checks: bool = False


# --- reading them off ---------------------------------------------------------------------------------------


def layer_number(architecture: Architecture, layer: int | None) -> int:
    """A place on the stream: a layer's input, or behind the last one (the number of layers, -1 or None).

    Raises:
        LayerRangeError: No such layer.
    """
    count = len(architecture.blocks)
    if layer is None or layer == -1:
        return count
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= count:
        raise LayerRangeError(
            f"layer={layer!r}: the stream is taken at the input of a layer, 0 to {count - 1}, or behind the "
            f"last one, as {count}, -1 or None"
        )
    return layer


def refuse_sum(
    whole: Whole, registry: HookRegistry, layer: int, *, is_inside: bool = False
) -> None:
    """Refuse a model whose stream is not known to be a sum up to a place.

    Args:
        whole: The model.
        registry: Its points.
        layer: The place: the input of this layer.
        is_inside: Whether the place is inside that layer.
    Raises:
        ArchitectureError: It is not; says where and why.
    """
    architecture = whole.architecture
    if architecture.unproved:
        raise ArchitectureError(
            f"nothing is known of {whole.kind}'s layers: {architecture.unproved}"
        )
    for index, block in enumerate(architecture.blocks[: layer + is_inside]):
        here = f"{registry.layers}.{index}"
        if block.unproved:
            raise ArchitectureError(
                f"what {here} makes is not known to be a sum of parts: {block.unproved}"
            )
        if not block.is_chained and index + 1 < len(architecture.blocks) and index < layer:
            raise ArchitectureError(
                f"what {here} makes is not what the next layer reads: {whole.kind} changes it between"
            )
    refuse_streams(whole, registry)


def refuse_streams(whole: Whole, registry: HookRegistry) -> None:
    """Refuse a model whose stream is not one of [batch, pos, d_model]."""
    axes = registry[f"{registry.layers}.0.hook_in"].axes
    if axes != "batch pos d_model":
        raise ArchitectureError(f"the stream of {whole.kind} is [{axes}], not [batch pos d_model]")


def stream_steps(
    whole: Whole, registry: HookRegistry, layer: int, wanted: Wanted, *, mlp_input: bool = False
) -> list[Step]:
    """What the stream that enters a layer is a sum of.

    Args:
        whole: The model.
        registry: Its points.
        layer: Which layer; the number of layers means behind the last.
        wanted: Which summands.
        mlp_input: What that layer's MLP reads (before its own norm) instead of what the layer does.
    """
    blocks, layers = whole.architecture.blocks, registry.layers
    made: list[Step] = [_enter(whole.architecture, registry)] if wanted.enters else []
    for index in range(layer):
        made += _layer(registry, blocks[index], f"{layers}.{index}", index, wanted)
        if wanted.checks:
            made.append(Check(f"{layers}.{index}.hook_out"))
    if mlp_input:
        end = before_mlp(blocks[layer], f"{layers}.{layer}")
        made += _layer(registry, blocks[layer], f"{layers}.{layer}", layer, wanted, end)
    return made


def needed(steps: Iterable[Step], *, embeds: bool) -> list[tuple[str, ...]]:
    """The points whose values some steps need; where there are several names, any of them will do.

    Args:
        steps: The steps.
        embeds: Whether the run embedded tokens; given embeddings as they are, it passed no embedding.
    """
    found: list[tuple[str, ...]] = []
    for step in steps:
        match step:
            case Enter():
                found += [(source.name,) for source, _ in step.parts if embeds]
                found += [(step.at,), *_scale(step.norm), (step.first,)]
            case Add() if step.source.kind == "head":
                z = f"{step.source.name.removesuffix('.hook_result')}.o.hook_in"
                found += [(z, step.source.name), *_scale(step.norm)]
            case Add():
                found += [(step.source.name,), *_scale(step.norm)]
            case Normed():
                found += _scale((step.name, step.norm))
            case _:
                pass
    return list(dict.fromkeys(found))


def _scale(norm: tuple[str, Norm] | None) -> list[tuple[str, ...]]:
    return [] if norm is None or not norm[1].is_open else [(f"{norm[0]}.hook_scale",)]


def refuse_head(whole: Whole, registry: HookRegistry, *, linearise: bool) -> None:
    """Refuse a model whose logits are more than a factor of what its head makes.

    Args:
        whole: The model.
        registry: Its points.
        linearise: Take what the head makes for the logits.
    Raises:
        ArchitectureError: They are (a soft cap, a mask).
        AbsentPointError: It has no head.
    """
    head = registry["unembed.hook_in"]
    if whole.architecture.logit_scale is None and not linearise:
        raise ArchitectureError(
            f"more than a factor stands between the head of {whole.kind} and its logits (a soft cap, a mask, "
            f"a bias), so they are no sum of what reaches {head.name}; linearise=True attributes what the "
            "head makes"
        )


def leaving(whole: Whole) -> list[Step]:
    """From the last layer to what the head reads."""
    tower = whole.architecture.main
    if tower.ln_final is None:
        return []
    name = f"{tower.prefix}ln_final"
    return [Normed(name, tower.ln_final), Check(f"{name}.hook_out")]


def before_mlp(block: Block, here: str) -> int:
    """How many branches have added to the stream that a layer's MLP reads.

    Raises:
        InputError: The layer has no MLP.
    """
    start = 0
    for index, branch in enumerate(block.branches):
        start = start if branch.joins else index  # side by side, all read what the first reads
        if isinstance(branch.part, Mlp):
            return start
    raise InputError(f"mlp_input: {here} has no MLP; it is {block.kind}")


def norm_at(
    whole: Whole, registry: HookRegistry, layer: int, *, mlp_input: bool
) -> tuple[str, Norm] | None:
    """The norm that reads the stream at a place; None where the stream is read as it is."""
    tower = whole.architecture.main
    if layer == len(tower.blocks):
        return None if tower.ln_final is None else (f"{tower.prefix}ln_final", tower.ln_final)
    block, here = tower.blocks[layer], f"{registry.layers}.{layer}"
    if mlp_input:
        before_mlp(block, here)
        branch = next(b for b in block.branches if isinstance(b.part, Mlp))
    else:
        branch = block.branches[0]
    if branch.ln is None or branch.place == "after":
        return None
    return f"{here}.ln{branch.number}", branch.ln


def _enter(architecture: Architecture, registry: HookRegistry) -> Enter:
    tower = architecture.main
    first = f"{registry.layers}.0.hook_in"
    scales = (("embed", tower.embed_scale), ("pos_embed", 1.0))
    parts = tuple(
        (Source(part, f"{tower.prefix}{part}.hook_out"), scale)
        for part, scale in scales
        if f"{tower.prefix}{part}.hook_out" in registry
    )
    norm = None
    if tower.ln_embed is not None and tower.ln_embed.is_open:
        name = f"{tower.prefix}ln_embed"
        if all(f"{name}.{end}" in registry for end in ("hook_in", "hook_scale", "hook_out")):
            norm = name, tower.ln_embed
    at = first if norm is None else f"{norm[0]}.hook_in"
    known = sum(scale is not None for _, scale in parts)
    return Enter(at, parts, _summands(architecture) > known > 0, norm, first)


def _summands(architecture: Architecture) -> int:
    """Of how many things the watched run saw the first layer's input (or its norm's) made."""
    tower = architecture.main
    if tower.seen is None:
        return 0
    block = tower.blocks[0]
    terms = tower.seen.before.get(into(block.path, block.call)) or {}
    if tower.ln_embed is not None:
        visit = tower.seen.one(tower.ln_embed.path)
        terms = {} if visit is None else visit.terms_in or {}
    return len(terms)


def _layer(
    registry: HookRegistry,
    block: Block,
    here: str,
    index: int,
    wanted: Wanted,
    end: int | None = None,
) -> Iterator[Step]:
    """What a layer does to the stream; up to a branch, if one is given."""
    branches = block.branches if end is None else block.branches[:end]
    for branch, after in zip(branches, (*branches[1:], None), strict=False):
        norm = f"{here}.ln{branch.number}"
        if branch.place == "stream" and not branch.joins and branch.ln is not None:
            yield Normed(norm, branch.ln)
        if branch.skip != 1.0 or branch.skip_by:
            yield Multiply(branch.skip, branch.skip_by)
        if wanted.branches(branch):
            yield from _added(registry, here, index, branch, wanted)
        yield from (Constant(name) for name in branch.bias)
        if branch.place == "after" and not (after is not None and after.joins) and branch.ln:
            yield Normed(norm, branch.ln)
    if end is None and block.ln_out is not None:
        yield Normed(f"{here}.ln_out", block.ln_out)


def _added(
    registry: HookRegistry, here: str, index: int, branch: Branch, wanted: Wanted
) -> Iterator[Add]:
    name = f"{here}.{branch.name}"
    post = None
    if branch.ln_post is not None:
        post = f"{here}.ln{branch.number}_post", branch.ln_post
    for kind, point in (
        ("head", f"{name}.hook_result" if has_heads(branch) else ""),
        ("neuron", f"{name}.out.hook_in" if has_neurons(branch) else ""),
    ):
        if (wanted.heads if kind == "head" else wanted.neurons) and point in registry:
            source = Source(kind, point, index, branch.name)
            yield Add(source, f"{name}.hook_out", post, branch.scale, branch.scale_by)
            return
    if not wanted.only_parts:
        out = f"{here}.hook_{branch.name}_out"
        source = Source("branch", out, index, branch.name)
        yield Add(source, out, None, branch.scale, branch.scale_by)


def has_heads(branch: Branch) -> bool:
    """Whether a branch is attention with an output projection, so that its heads add up."""
    return isinstance(branch.part, Attention) and branch.part.o is not None


def has_neurons(branch: Branch) -> bool:
    """Whether a branch is a plain or gated MLP, so that its neurons add up."""
    part = branch.part
    if not isinstance(part, Mlp) or part.router is not None:
        return False
    return part.inp is not None and part.out is not None
