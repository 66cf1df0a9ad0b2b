"""From an Architecture to hook points: which places exist, what they are called, how they are reached.

The one list of canonical points, with the parts of a branch in `attention_points` and `mlp_points`. Order is
execution order.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..hooks import HookPoint, HookRegistry
from . import places
from .architecture import Architecture, Attention, Block, Mlp, Tower
from .attention_points import attention, head_inputs
from .branch import BranchSpan
from .builder import IDS, STREAM, Builder
from .mlp_points import mixer, mlp
from .parameters import WeightTable
from .ranks import SPLIT, tensor_parallel, why_split
from .raw import RawPoints
from .whole import Whole

_NORM = ("in", "scale", "normalized", "out")


def build_registry(model: nn.Module, architecture: Architecture) -> HookRegistry:
    """Make every canonical point of a model; attaches nothing.

    Args:
        model: The Hugging Face model.
        architecture: Where its parts are.
    Returns:
        The registry; its ``absent`` says why a canonical name is missing.
    """
    build = Builder(model, architecture)
    for one in architecture.towers:
        tower(build, one)
    head(build)
    if tensor_parallel(model) > 1:
        build.hide(SPLIT, why_split(model))
    registry = HookRegistry(build.points, build.absent, build.unsettled, RawPoints(build, model))
    registry.layers = f"{architecture.main.prefix}blocks"
    registry.weights = WeightTable(model, architecture)
    registry.owner = Whole(model, architecture)
    return registry


def tower(build: Builder, one: Tower) -> None:
    """Embeddings, layers and final norm of a tower."""
    build.enter(one, None)
    prefix, absent = one.prefix, one.absent
    for part, path in (("embed", one.embed), ("pos_embed", one.pos_embed)):
        names = f"{prefix}{part}.hook_in", f"{prefix}{part}.hook_out"
        if path is None:
            build.lacks(absent.get(part) or one.unproved or "not seen", *names)
            continue
        turn = _turn(build, one, path)
        is_ids = isinstance(build.modules[path], nn.Embedding)
        if is_ids:
            build.add(names[0], path, places.whole_input(), IDS, turn=turn)
        else:
            build.lacks(f"{path} embeds no ids; see {names[1]}", names[0])
        build.add(names[1], path, places.whole_output(), STREAM, turn=turn)
    if one.ln_embed is not None:
        build.norm(f"{prefix}ln_embed", one.ln_embed, STREAM)
    if one.rotary is not None:
        # Position ids: of the hidden state it is also given, a rotary module reads only the dtype.
        position_ids = places.named_input(1, "position_ids")
        build.add(f"{prefix}rotary_emb.hook_in", one.rotary, position_ids, IDS)
        for index, part in enumerate(("cos", "sin")):
            name = f"{prefix}rotary_emb.hook_{part}"
            build.add(name, one.rotary, places.output_item(index), "batch pos d_rotary")
    else:
        names3 = [f"{prefix}rotary_emb.hook_{part}" for part in ("in", "cos", "sin")]
        build.lacks(absent.get("rotary_emb") or one.unproved, *names3)
    for index, layer in enumerate(one.blocks):
        build.enter(one, layer)
        block(build, f"{prefix}blocks.{index}", layer)
    build.enter(one, None)
    _missing_kinds(build, one)
    names4 = [f"{prefix}ln_final.hook_{part}" for part in _NORM]
    if one.ln_final is not None:
        build.norm(f"{prefix}ln_final", one.ln_final, STREAM)
    else:
        build.lacks(absent.get("ln_final") or one.unproved, *names4)


def _turn(build: Builder, one: Tower, path: str) -> tuple[int, int] | None:
    """Which call of an embedding is this tower's, where encoder and decoder share it."""
    if one.seen is None:
        return None
    times = len(one.seen.visits.get(path, ()))
    sharing = [t for t in build.architecture.towers if path in (t.embed, t.pos_embed)]
    return (sharing.index(one), times) if times == len(sharing) > 1 else None


def head(build: Builder) -> None:
    """The head, and what carries one tower's output to another."""
    a = build.architecture
    build.enter(a.main, None)
    if a.unembed is not None:
        build.add("unembed.hook_in", a.unembed, places.whole_input(), STREAM)
        build.add("unembed.hook_out", a.unembed, places.whole_output(), "batch pos d_vocab")
    else:
        build.lacks(a.absent.get("unembed", "no head"), "unembed.hook_in", "unembed.hook_out")
    taken: set[str] = set()
    for own, path in a.projectors:
        name = "projector" if "projector" not in taken else f"projector_{own}"
        if name not in taken:
            projector(build, name, path)
        taken.add(name)


def projector(build: Builder, name: str, path: str) -> None:
    """What carries a tower's output to the text model; images may not have been in the watched run."""
    visit = build.visit(path)
    for end, tap in (("hook_in", places.whole_input()), ("hook_out", places.whole_output())):
        value = None if visit is None else visit.entering if end == "hook_in" else visit.value
        if isinstance(value, Tensor) and value.dim() in (2, 3):
            axes = STREAM if value.dim() == 3 else "pos d_model"
            build.add(f"{name}.{end}", path, tap, axes)
        else:
            point = HookPoint(f"{name}.{end}", axes="...", is_default=False)
            build.site(path).add(tap, point)
            build.points.append(point)


# --- a block ----------------------------------------------------------------------------------


def block(build: Builder, name: str, one: Block) -> None:
    """Everything in a layer."""
    build.add(f"{name}.hook_in", one.path, places.whole_input(), build.stream)
    _missing(build, name, one)
    if one.unproved:
        ends = ["hook_attn_out", "hook_mlp_out", "hook_mlp_in", "hook_resid_mid"]
        ends += [f"hook_{branch.name}_out" for branch in one.branches]
        build.lacks(one.unproved, *(f"{name}.{end}" for end in ends))
    for index, branch in enumerate(one.branches):
        if branch.ln is not None and branch.place != "after" and not _shares(one, index):
            read = (f"{name}.hook_mlp_in",) if branch.name == "mlp" else ()
            build.norm(f"{name}.ln{branch.number}", branch.ln, build.stream, in_aliases=read)
        elif branch.name == "mlp" and branch.place == "before" and _shares(one, index):
            why = f"the MLP reads the stream through the norm of {one.branches[index - 1].name}"
            build.lacks(f"{why}; see ln{branch.number}.hook_in", f"{name}.hook_mlp_in")
        part = f"{name}.{branch.name}"
        if isinstance(branch.part, Attention):
            head_inputs(build, part, branch, branch.part)
            attention(build, part, branch, branch.part)
        elif isinstance(branch.part, Mlp):
            mlp(build, part, branch, branch.part)
        else:
            mixer(build, part, branch, branch.part)
        if branch.ln_post is not None:
            added = build.added(f"{name}.hook_{branch.name}_out", branch)
            build.norm(f"{name}.ln{branch.number}_post", branch.ln_post, build.stream, *added)
        between(build, name, one, index)
        if branch.ln is not None and branch.place == "after":
            build.norm(f"{name}.ln{branch.number}", branch.ln, build.stream)
    for branch in one.inner:
        if isinstance(branch.part, Attention):
            attention(build, f"{name}.{branch.name}", branch, branch.part)
    if one.ln_out is not None:
        build.norm(f"{name}.ln_out", one.ln_out, build.stream)
    build.add(f"{name}.hook_out", one.path, places.whole_output(), build.stream)


def _shares(one: Block, index: int) -> bool:
    """Whether a branch has the norm of the one before it."""
    return index > 0 and one.branches[index].ln == one.branches[index - 1].ln


def _missing(build: Builder, name: str, one: Block) -> None:
    """Say why the names of a plain block are not there."""
    why = one.unproved or f"this layer is {one.kind}"
    numbers = {f"ln{b.number}" for b in one.branches if b.ln is not None} | {
        f"ln{b.number}_post" for b in one.branches if b.ln_post is not None
    }
    for part in ("ln1", "ln1_post", "ln2", "ln2_post"):
        if part not in numbers:
            reason = one.unproved or f"this model's blocks have no {part} (no norm in that place)"
            build.lacks(reason, *(f"{name}.{part}.hook_{p}" for p in _NORM))
    for part, points in (("attn", _ATTENTION), ("mlp", _MLP)):
        if one.branch(part) is None:
            build.lacks(why, *(f"{name}.{part}.{point}" for point in points))
            build.lacks(why, f"{name}.hook_{part}_out")


def _missing_kinds(build: Builder, one: Tower) -> None:
    """Say of whole kinds of parts that this tower has none."""
    kinds = {branch.name for part in one.blocks for branch in (*part.branches, *part.inner)}
    has_experts = any(part.mlp is not None and part.mlp.router is not None for part in one.blocks)
    for part, ends in (("cross_attn", _ATTENTION), ("mixer", _ENDS)):
        if part not in kinds:
            why = f"no layer of this tower has a {part.replace('attn', 'attention').replace('_', '-')}"
            build.lacks(why, *(f"{one.prefix}blocks.{{i}}.{part}.{end}" for end in ends))
    if not has_experts:
        names = [f"mlp.{p}.{end}" for p in ("router", "experts", "shared") for end in _ENDS]
        names += ["mlp.router.hook_experts", "mlp.router.hook_weights"]
        why = "the MLPs of this tower are not made of experts"
        build.lacks(why, *(f"{one.prefix}blocks.{{i}}.{name}" for name in names))


def between(build: Builder, name: str, one: Block, index: int) -> None:
    """The stream between a branch and the next."""
    branches = one.branches
    last = index == len(branches) - 1
    count = sum(not branch.joins for branch in branches[: index + 1])
    mid = f"{name}.hook_resid_mid" + (str(count) if count > 1 else "")
    if one.unproved:
        build.lacks(one.unproved, mid)
        return
    if last:
        if index == 0:
            build.lacks("this layer is one branch; the stream has no value between", mid)
        return
    if branches[index + 1].joins:
        first, second = (_WORDS.get(b.name, b.name) for b in branches[index : index + 2])
        build.lacks(
            f"{first} and {second} run in parallel here and are added in one sum, so the stream has no "
            "value between them",
            mid,
        )
        return
    branch = branches[index]
    reader = branch.ln.path if branch.place == "after" and branch.ln else branches[index + 1].reads
    visit = build.visit(reader)
    if reader is None or visit is None:
        build.lacks("no module was seen to read the stream between the two", mid)
        return
    if branch.place != "after" and not build.seen.is_summand(visit.entering):  # type: ignore[union-attr]
        build.lacks(
            f"{reader} reads a copy of the stream; the sum goes on with another tensor", mid
        )
        return
    point = HookPoint(mid, build.aliases(mid), axes=build.stream)
    span = BranchSpan(point)
    reason, layout, is_volatile, sizes = build.verdict(
        mid, reader, places.whole_input(), build.stream
    )
    if reason:
        build.lacks(reason, mid)
        return
    point.__dict__.update(is_volatile=is_volatile, sizes=sizes)
    build.site(reader).add(build.laid(span.tap(), layout), point)
    if layout == "flat":
        build.note_rows(point)
    build.site(one.path).set_span(span)
    build.points.append(point)


_WORDS = {"attn": "attention", "mlp": "MLP", "mixer": "mixer"}
_ENDS = ("hook_in", "hook_out")
_ATTENTION = (
    *_ENDS,
    *(f"{part}.{end}" for part in ("q", "k", "v", "o") for end in _ENDS),
    *(f"hook_{part}" for part in ("rot_q", "rot_k", "attn_scores", "pattern", "result")),
)
_MLP = (*_ENDS, *(f"{part}.{end}" for part in ("in", "gate", "out") for end in _ENDS))
