"""The points of MLPs, experts and mixers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..hooks import HookPoint
from . import places
from .architecture import Branch, Mixer, Mlp
from .attention_points import projection
from .builder import CHOICES, STREAM, Builder
from .router import RouterSpan

_HIDDEN = "batch pos d_mlp"
_READ_STREAM = ("in", "z", "q", "k", "v", "ba", "b", "a")


def mlp(build: Builder, name: str, branch: Branch, part: Mlp) -> None:
    """A plain or gated MLP, or a mixture of experts."""
    block_name = name.rpartition(".")[0]
    added = () if branch.ln_post else build.added(f"{block_name}.hook_{branch.name}_out", branch)
    exits = branch.makes or part.path or part.out
    unnormed = branch.name == "mlp" and (branch.ln is None or branch.place == "after")
    read = (f"{block_name}.hook_mlp_in",) if unnormed else ()
    layers(build, name, part, [f"{name}.hook_out", *added] if exits == part.out else [], read)
    if part.router is not None:
        experts(build, name, part, part.router)
    if exits is not None and exits != part.out:
        build.add(f"{name}.hook_out", exits, places.whole_output(), build.stream, *added)


def layers(
    build: Builder, name: str, part: Mlp, out_aliases: list[str], in_aliases: tuple[str, ...] = ()
) -> None:
    """The projections of an MLP."""
    entry = part.path or (None if part.inp is None else part.inp.path)
    if entry is not None:
        build.add(f"{name}.hook_in", entry, places.whole_input(), STREAM, *in_aliases)
    if part.gate is not None:
        projection(build, f"{name}.gate", part.gate, None, _HIDDEN)
    else:
        why = "experts have their layers inside" if part.router else "the MLP is not gated"
        build.lacks(why, f"{name}.gate.hook_in", f"{name}.gate.hook_out")
    if part.inp is None:
        why = (
            "experts have their layers inside; see mlp.experts" if part.router else "not recognised"
        )
        names = [
            f"{name}.{p}" for p in ("in.hook_in", "in.hook_out", "out.hook_in", "out.hook_out")
        ]
        build.lacks(why, *(names if part.out is None else names[:2]))
    else:
        alias = f"{name}.hook_pre_linear" if part.gate is not None else f"{name}.hook_pre"
        projection(build, f"{name}.in", part.inp, None, _HIDDEN, alias)
    if part.out is not None:
        build.add(f"{name}.out.hook_in", part.out, places.whole_input(), _HIDDEN)
        build.add(f"{name}.out.hook_out", part.out, places.whole_output(), STREAM, *out_aliases)


def experts(build: Builder, name: str, part: Mlp, router: str) -> None:
    """Router, experts, shared experts."""
    visit = build.visit(router)
    build.add(f"{name}.router.hook_in", router, places.whole_input(), STREAM)
    logits = f"{name}.router.hook_out"
    axes = "batch pos expert"
    if visit is not None and isinstance(visit.output, Tensor):
        build.add(logits, router, places.whole_output(), axes)
    elif visit is not None and part.n_experts is not None:
        point = HookPoint(logits, build.aliases(logits), axes=build.axes(axes))
        build.site(router).set_span(RouterSpan(point, part.n_experts, build.rows))
        build.note_rows(point)
        build.points.append(point)
    else:
        build.lacks("the router's scores were not seen being made", logits)
    chosen = [f"{name}.router.hook_experts", f"{name}.router.hook_weights"]
    call = build.visit(part.experts)
    if part.experts is None or call is None:
        build.lacks("the experts are not one module that is called once with choices", *chosen)
        build.lacks(
            "the experts are not one module", f"{name}.experts.hook_in", f"{name}.experts.hook_out"
        )
    else:
        for index, value in list(enumerate(call.args))[1:]:
            _choice(build, chosen, part.experts, index, value)
        build.add(f"{name}.experts.hook_in", part.experts, places.whole_input(), STREAM)
        build.add(f"{name}.experts.hook_out", part.experts, places.whole_output(), STREAM)
    if part.shared is not None and part.shared.path is not None:
        layers(build, f"{name}.shared", part.shared, [])
        build.add(f"{name}.shared.hook_out", part.shared.path, places.whole_output(), STREAM)


def _choice(build: Builder, names: list[str], path: str, index: int, value: Any) -> None:
    if not isinstance(value, Tensor):
        return
    whole = value.dtype in (torch.long, torch.int)
    name = names[0] if whole else names[1]
    if not any(point.name == name for point in build.points[-4:]):
        build.add(name, path, places.input_at(index), CHOICES, is_index=whole)


def mixer(build: Builder, name: str, branch: Branch, part: Mixer) -> None:
    """A state-space, recurrent or linear-attention part and its layers."""
    block_name = name.rpartition(".")[0]
    build.add(f"{name}.hook_in", part.path, places.whole_input(), STREAM)
    for layer, path in part.parts:
        if layer == "gate" and part.gate is not None:
            continue
        axes = "batch channel pos" if layer == "conv" else "batch pos d_inner"
        if layer != "conv":
            reads = STREAM if layer in _READ_STREAM else axes
            build.add(f"{name}.{layer}.hook_in", path, places.whole_input(), reads)
        made = STREAM if layer == "out" else axes
        build.add(f"{name}.{layer}.hook_out", path, places.whole_output(), made)
    if part.gate is not None:
        tap = places.projection_output(part.gate, None)
        build.add(f"{name}.gate.hook_out", part.gate.path, tap, "batch pos d_inner")
    elif not any(layer == "gate" for layer, _ in part.parts):
        why = "no share of a joint projection was seen to multiply what the last layer reads"
        build.lacks(why, f"{name}.gate.hook_in", f"{name}.gate.hook_out")
    for layer, path in part.silent:
        why = f"the model uses the weights of {path} without calling it"
        build.lacks(why, f"{name}.{layer}.hook_in", f"{name}.{layer}.hook_out")
    added = () if branch.ln_post else build.added(f"{block_name}.hook_{branch.name}_out", branch)
    build.add(
        f"{name}.hook_out", branch.makes or part.path, places.whole_output(), build.stream, *added
    )
