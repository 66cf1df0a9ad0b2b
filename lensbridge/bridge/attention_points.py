"""The points of an attention part."""

from __future__ import annotations

from ..hooks import HookPoint
from . import places
from .architecture import Attention, Branch, Norm, Projection
from .attention import AttentionSpan
from .builder import STREAM, Builder
from .head_inputs import HeadInputs

_PARTS = ("q", "k", "v")


def _widths(attn: Attention) -> dict[str, tuple[int, int]]:
    return {
        "q": (attn.n_heads, attn.d_head),
        "k": (attn.n_key_value_heads, attn.d_head),
        "v": (attn.n_key_value_heads, attn.d_head_v),
    }


def attention(build: Builder, name: str, branch: Branch, attn: Attention) -> None:
    """Projections, the inside, the output projection."""
    block_name = name.rpartition(".")[0]
    if build.block is not None and attn.path == build.block.path:
        build.lacks(attn.absent["pattern"], f"{name}.hook_in")
    else:
        build.add(f"{name}.hook_in", attn.path, places.whole_input(), STREAM)
    for part, shares in zip(_PARTS, (attn.q, attn.k, attn.v), strict=True):
        head = "head" if part == "q" else "kv_head"
        ends = f"{name}.{part}.hook_in", f"{name}.{part}.hook_out"
        if shares is None:
            build.lacks(attn.absent.get(part, "not recognised"), *ends)
            continue
        projection(build, f"{name}.{part}", shares, _widths(attn)[part], f"batch pos {head} d_head")
    for part, norm in (("q_norm", attn.q_norm), ("k_norm", attn.k_norm)):
        if norm is None:
            names = [f"{name}.{part}.hook_{p}" for p in ("in", "scale", "normalized", "out")]
            build.lacks(f"attention has no {part} in this model", *names)
        else:
            head_norm(build, f"{name}.{part}", norm, "head" if part == "q_norm" else "kv_head")
    inside(build, name, attn)
    added = () if branch.ln_post else build.added(f"{block_name}.hook_{branch.name}_out", branch)
    exits = branch.makes or attn.path
    if attn.o is None:
        names = [f"{name}.{p}" for p in ("o.hook_in", "o.hook_out", "hook_result")]
        build.lacks("no layer with weights of its own reads what attention makes", *names)
    else:
        z = attn.n_heads, attn.d_head_v
        axes = "batch pos head d_head"
        build.add(f"{name}.o.hook_in", attn.o, places.input_heads(*z), axes)
        build.add(
            f"{name}.hook_result",
            attn.o,
            places.head_results(*z),
            "batch pos head d_model",
            is_default=False,
        )
        own = (f"{name}.hook_out", *added) if exits == attn.o else ()
        build.add(f"{name}.o.hook_out", attn.o, places.whole_output(), STREAM, *own)
    if exits != attn.o:
        build.add(f"{name}.hook_out", exits, places.whole_output(), build.stream, *added)


def head_norm(build: Builder, name: str, norm: Norm, head: str) -> None:
    """A norm on queries or keys: over each head, or over all of them at once."""
    visit = build.visit(norm.path)
    flat = visit is not None and getattr(visit.entering, "dim", int)() == 3
    build.norm(name, norm, "batch pos d_heads" if flat else f"batch pos {head} d_head")


def head_inputs(build: Builder, name: str, branch: Branch, attn: Attention) -> None:
    """What each head reads of the stream: one copy a head, before the norm."""
    block_name = name.rpartition(".")[0]
    plain = branch.name == "attn"
    names = {part: f"{name}.hook_{part}_input" for part in _PARTS}
    all_name = f"{name}.hook_attn_in"
    short = {part: (f"{block_name}.hook_{part}_input",) if plain else () for part in _PARTS}
    all_short = (f"{block_name}.hook_attn_in",) if plain else ()
    shares = {"q": attn.q, "k": attn.k, "v": attn.v}
    ln = build.visit(branch.ln.path if branch.ln is not None else None)
    reading = [build.visit(None if share is None else share.path) for share in shares.values()]
    if (
        branch.ln is None
        or ln is None
        or branch.place == "after"
        or any(visit is None or visit.terms_in != ln.terms_out for visit in reading)
        or build.layout(ln.value, STREAM) != ""
    ):
        every = [*names.values(), *(x for xs in short.values() for x in xs)]
        build.lacks(
            "q, k and v do not all read the output of a norm of the stream",
            all_name,
            *all_short,
            *every,
        )
        return
    inputs = HeadInputs(build.modules[branch.ln.path])
    site = build.site(branch.ln.path)
    widths = _widths(attn)
    actions = {part: inputs.action(part, shares[part], widths[part]) for part in names}  # type: ignore[arg-type]
    if attn.n_heads == attn.n_key_value_heads:
        every_head = HookPoint(
            all_name,
            build.aliases(all_name, *all_short),
            axes="batch pos head d_model",
            is_default=False,
        )
        site.add(inputs.tap(None, attn.n_heads), every_head)
        for part in names:
            build.site(shares[part].path).add(actions[part], every_head)  # type: ignore[union-attr]
        build.points.append(every_head)
    else:
        build.lacks(
            "keys and values are grouped, so heads do not share one input; use hook_q_input, "
            "hook_k_input and hook_v_input",
            all_name,
            *all_short,
        )
    for part, full in names.items():
        axes = "batch pos head d_model" if part == "q" else "batch pos kv_head d_model"
        point = HookPoint(full, build.aliases(full, *short[part]), axes=axes, is_default=False)
        site.add(inputs.tap(part, widths[part][0]), point)
        build.site(shares[part].path).add(actions[part], point)  # type: ignore[union-attr]
        build.points.append(point)


def inside(build: Builder, name: str, attn: Attention) -> None:
    """Scores and pattern, and q and k as they enter the product."""
    if build.visit(attn.path) is None:
        names = [f"{name}.hook_{part}" for part in ("rot_q", "rot_k", "attn_scores", "pattern")]
        build.lacks(f"the model calls {attn.path} more than once in one pass", *names)
        return
    if "pattern" in attn.absent:
        names = [f"{name}.hook_{part}" for part in ("rot_q", "rot_k", "attn_scores", "pattern")]
        build.lacks(attn.absent["pattern"], *names)
        return
    square = "batch head query key"
    scores = HookPoint(
        f"{name}.hook_attn_scores", build.aliases(f"{name}.hook_attn_scores"), axes=square
    )
    pattern = HookPoint(f"{name}.hook_pattern", build.aliases(f"{name}.hook_pattern"), axes=square)
    rotated: tuple[HookPoint | None, HookPoint | None] = (None, None)
    names = [f"{name}.hook_rot_q", f"{name}.hook_rot_k"]
    if "rot" in attn.absent:
        build.lacks(attn.absent["rot"], *names)
    elif attn.is_rotary:
        rotated = (
            HookPoint(names[0], build.aliases(names[0]), axes="batch pos head d_head"),
            HookPoint(names[1], build.aliases(names[1]), axes="batch pos kv_head d_head"),
        )
    else:
        build.lacks("this model does not rotate q and k; use attn.hook_q and attn.hook_k", *names)
    span = AttentionSpan(
        attn.n_heads, attn.n_key_value_heads, scores, pattern, *rotated, nth=attn.nth
    )
    build.site(attn.path).set_span(span)
    for point in span.points:
        point.__dict__["sizes"] = {
            "head": attn.n_heads,
            "kv_head": attn.n_key_value_heads,
            "d_head": attn.d_head,
        }
    build.points.extend(span.points)


def projection(
    build: Builder,
    name: str,
    share: Projection,
    heads: tuple[int, int] | None,
    axes: str,
    *aliases: str,
) -> None:
    """What a projection reads and makes."""
    if share.split is None:
        build.add(f"{name}.hook_in", share.path, places.whole_input(), STREAM)
    else:
        tap, action = places.shared_input(share, share.split)
        point = build.add(f"{name}.hook_in", share.path, tap, STREAM)
        if point is not None:
            build.site(share.path).add(action, point)
    build.add(
        f"{name}.hook_out", share.path, places.projection_output(share, heads), axes, *aliases
    )
