"""What writes into the stream, and the head: whether the mean of it can be taken away."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..architecture import Attention, Branch, Mixer, Tower
from .facts import Facts, is_linear
from .norms import norms_of
from .step import Centering, Step


def center_stream(facts: Facts, step: Step, tower: Tower) -> None:
    """Everything that writes into the stream, where only norms that subtract the mean read it."""
    norms = [norm for _, norm, _ in norms_of(tower)]
    if norms and all(norm.is_open and not norm.center for norm in norms):
        why = (
            f"norms that keep the mean (RMSNorm) read the stream, {norms[0].path} the first of them"
        )
        step.left[f"{tower.prefix}blocks"] = why
        return
    for name, path in writers(facts, tower):
        if path is None:
            step.left[name] = "what writes into the stream here is not one linear layer"
            continue
        found, why = centering(facts, path)
        if found is None:
            step.left.setdefault(name, why)
        elif found not in step.todo:
            step.todo.append(found)
            step.unties |= facts.is_tied(found.weight)


def writers(facts: Facts, tower: Tower) -> Iterator[tuple[str, str | None]]:
    """What writes into a tower's stream: name and path."""
    roots = [(f"{tower.prefix}{part}", getattr(tower, part)) for part in ("embed", "pos_embed")]
    yield from ((name, path) for name, path in roots if path is not None)
    # Segments, languages: looked up and added without a name of their own.
    known = {n for _, path in roots if path for n in facts.also(f"{path}.weight")}
    for name, uses in facts.flow.uses.items():
        path = name.rpartition(".")[0]
        if "embedding" in uses and name in facts.flow.absorbed and name not in known:
            yield path, path
    for index, block in enumerate(tower.blocks):
        start = f"{tower.prefix}blocks.{index}."
        if block.unproved:
            yield f"{start[:-1]}", None
        for branch in block.branches:
            yield start + branch.name, None if branch.ln_post else _out_of(branch)


def centering(facts: Facts, path: str) -> tuple[Centering | None, str]:
    """How the mean of what a module writes is taken away, or why it cannot be."""
    module = facts.model.get_submodule(path)
    name = f"{path}.weight"
    if name not in facts.parameters:
        return None, f"{path} has no matrix of its own"
    seen = next(
        (n for n in facts.names[id(facts.parameters[name])] if n in facts.flow.touched), name
    )
    if seen in facts.flow.spoiled:
        return None, f"its mean matters: {facts.flow.spoiled[seen]}"
    if seen not in facts.flow.absorbed:
        return None, "it was not seen to reach a norm that subtracts the mean"
    is_embedding = isinstance(module, nn.Embedding)
    others = [r for r in facts.flow.partners if r.parameter == seen]
    if is_embedding and others:
        if not facts.is_tied(name):
            return None, f"{name} is looked up and multiplied by"
        if why := facts.why_tied():
            return None, why
    uses = set(facts.flow.uses.get(seen, ())) - ({"embedding"} if is_embedding else set())
    if uses:
        return None, f"{name} has another use ({min(uses)})"
    if not is_embedding and not is_linear(module):
        return None, f"{path} is a {type(module).__name__}, not a plain linear layer"
    if not is_embedding and (other := facts.shared(name)):
        return None, f"{name} is {other} as well"
    if is_embedding and name == facts.head:
        return None, f"{name} is the head's"
    bias = f"{path}.bias" if f"{path}.bias" in facts.parameters else None
    if bias is not None and (why := facts.bias_used(bias)):
        return None, why
    return Centering(name, 0 if isinstance(module, nn.Linear) else 1, bias), ""


def center_head(facts: Facts, step: Step) -> None:
    """The head, if its matrix is nothing else; whether its mean matters is tried by `folding_probe`."""
    path = facts.architecture.unembed
    if path is None:
        step.left["unembed"] = facts.architecture.absent.get("unembed", "the model has no head")
        return
    module = facts.model.get_submodule(path)
    uses = [r for r in facts.flow.partners if r.parameter in (facts.head, *facts.tied)]
    others = set().union(*(facts.flow.uses.get(n, {}) for n in (facts.head, *facts.tied))) - {
        "embedding"
    }
    if not isinstance(module, nn.Linear) or not is_linear(module):
        step.left["unembed"] = f"{path} is a {type(module).__name__}, not a linear layer"
        return
    if len(uses) != 1 or others:
        use = min(others, default="a second product")
        step.left["unembed"] = f"{facts.head} has another use ({use})"
        return
    if facts.tied and (why := facts.why_tied()):
        step.left["unembed"] = why
        return
    step.todo.append(Centering(facts.head, 0, f"{path}.bias" if module.bias is not None else None))
    step.unties = bool(facts.tied)


def _out_of(branch: Branch) -> str | None:
    """Path of the linear layer that makes what a branch adds."""
    part = branch.part
    if isinstance(part, Attention):
        return part.o
    if isinstance(part, Mixer):
        return dict(part.parts).get("out")
    return None if part.router is not None or part.experts is not None else part.out
