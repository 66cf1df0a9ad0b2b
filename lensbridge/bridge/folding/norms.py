"""Norms in front of what reads them: whether their weights can go into it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ..architecture import Norm, Tower
from .facts import Facts, is_linear
from .flow import Read
from .step import NormFold, Step


def norms_of(tower: Tower) -> Iterator[tuple[str, Norm, str]]:
    """The norms of a tower: name, norm, and why it is no norm in front of something (empty if it is)."""
    for index, block in enumerate(tower.blocks):
        start = f"{tower.prefix}blocks.{index}."
        for branch in block.branches:
            name = f"{start}ln{branch.number}"
            if branch.ln is not None:
                yield name, branch.ln, _BEHIND[branch.place]
            if branch.ln_post is not None:
                yield f"{name}_post", branch.ln_post, _BEHIND["post"]
        if block.ln_out is not None:
            yield f"{start}ln_out", block.ln_out, _BEHIND["after"]
    if tower.ln_embed is not None:
        yield f"{tower.prefix}ln_embed", tower.ln_embed, _BEHIND["after"]
    if tower.ln_final is not None:
        yield f"{tower.prefix}ln_final", tower.ln_final, ""


_BEHIND = {
    "before": "",
    "after": "it stands on the stream: what it makes is read and added to as well",
    "stream": "it stands on the stream: what it makes is read and added to as well",
    "post": "it stands behind its branch: what it makes is added to the stream",
}


def fold_norms(facts: Facts, step: Step, tower: Tower) -> None:
    """The norms in front of what reads them."""
    done: set[str] = set()
    for name, norm, behind in norms_of(tower):
        if norm.path in done:
            continue
        done.add(norm.path)
        if behind:
            step.notes[name] = behind
            continue
        module = facts.model.get_submodule(norm.path)
        if next(module.parameters(), None) is None:
            step.notes[name] = "it has no weight"
            continue
        why = why_not_folded(facts, norm, tower)
        if why:
            step.left[name] = why
            continue
        reads = tuple(sorted(facts.flow.norms[norm.path].reads))
        reads = tuple(Read(facts.head, r.dim) if facts.is_tied(r.parameter) else r for r in reads)
        bias = module._parameters.get("bias")
        keeps = ""
        if bias is not None and bool((bias != 0).any()):
            keeps = why_bias_stays(facts, norm, reads)
            if keeps and (why := _undividable(norm, module)):
                step.left[name] = f"{keeps}, and {why}"
                continue
        if facts.flow.norms[norm.path].is_returned:
            step.notes[name] = (
                "the model returns what it makes besides, which is without the weight then"
            )
        if keeps:
            step.notes[name] = f"its bias stays, divided by its weight: {keeps}"
        step.todo.append(NormFold(norm, reads, bool(keeps)))
        step.unties |= any(facts.is_tied(r.parameter) for r in reads)


def why_not_folded(facts: Facts, norm: Norm, tower: Tower) -> str:
    """Why what a norm multiplies by cannot go into what reads it; empty when it can."""
    seen = facts.flow.norms[norm.path]
    if not norm.is_open:
        return f"{norm.path} is neither a LayerNorm nor an RMSNorm that is known"
    if seen.others:
        return f"what it makes is not read by linear layers alone ({next(iter(seen.others))})"
    if seen.is_answer:
        return "what it makes is what the model returns"
    if not seen.reads:
        return "nothing was seen to read what it makes"
    for part in ("weight", "bias"):
        own = f"{norm.path}.{part}"
        if own in facts.parameters and (facts.shared(own) or facts.flow.uses.get(own)):
            return f"{own} is used elsewhere too"
    for read in seen.reads:
        if why := why_not_scaled(facts, read, norm):
            return why
    home = next((b.path for b in tower.blocks if norm.path.startswith(b.path + ".")), None)
    unused = next(
        (
            name
            for name, parameter in facts.parameters.items()
            if home is not None
            and name.startswith(home + ".")
            and parameter.dim() > 1
            and not facts.flow.touched & set(facts.names[id(parameter)])
        ),
        None,
    )
    if unused is not None:
        return f"{unused} was not used in the watched run and may read it in another"
    return ""


def why_not_scaled(facts: Facts, read: Read, norm: Norm) -> str:
    """Why a parameter cannot be multiplied along a dimension; empty when it can."""
    name = read.parameter
    uses = set(facts.flow.uses.get(name, ()))
    partners = [r for r in facts.flow.partners if r.parameter == name]
    if any(r.dim != read.dim for r in partners) or facts.flow.partners[read] != {norm.path}:
        return f"{name} also multiplies something that does not come from {norm.path}"
    if facts.is_tied(name):
        if uses - {"embedding"}:
            return f"{name} has another use ({min(uses - {'embedding'})})"
        return facts.why_tied()
    if uses:
        return f"{name} has another use ({min(uses)})"
    if other := facts.shared(name):
        return f"{name} is {other} as well"
    return ""


def why_bias_stays(facts: Facts, norm: Norm, reads: tuple[Read, ...]) -> str:
    """Why a norm's bias cannot go into the biases of what reads it; empty when it can."""
    if facts.flow.norms[norm.path].is_scaled:
        return "it is scaled on the way to what reads it"
    for read in reads:
        home = read.parameter.rpartition(".")[0]
        if not is_linear(facts.model.get_submodule(home)):
            return f"{read.parameter} is not the weight of a plain linear layer"
        bias = f"{home}.bias"
        if bias not in facts.parameters:
            return f"{home} has no bias to take it"
        if home != facts.architecture.unembed and (why := facts.bias_used(bias)):
            return why
    return ""


def _undividable(norm: Norm, module: nn.Module) -> str:
    weight, bias = module._parameters.get("weight"), module._parameters["bias"]
    if weight is None or bias is None:
        return ""
    ratio = bias.detach() / (weight.detach() + norm.offset)
    return "" if bool(torch.isfinite(ratio).all()) else "its weight is zero somewhere"
