"""Where a model's layers are: every stack of them, and which tower of the model it belongs to."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..hooks import ArchitectureError
from . import table
from .seen import has_weights


@dataclass(frozen=True)
class Stack:
    """Layers that run one after the other.

    Attributes:
        path: Where they are: the list that holds them, or what holds the lists.
        blocks: Paths of the layers, in the order they stand.
        prefix: What the names of this tower begin with.
    """

    path: str
    blocks: tuple[str, ...]
    prefix: str = ""


def text_config(model: nn.Module) -> Any:
    """The configuration of the text model (a multimodal model nests it)."""
    config = getattr(model, "config", None)
    if config is None:
        raise ArchitectureError(
            f"{type(model).__name__} has no Hugging Face config; TransformerBridge wraps transformers models"
        )
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def find_stacks(model: nn.Module) -> tuple[Stack, ...]:
    """Every stack of layers, the main one last.

    Raises:
        ArchitectureError: There is none.
    """
    row = table.row_of(model)
    if row.get("blocks") == "":
        return (Stack("", ()),)
    if "blocks" in row:
        found = [Stack(row["blocks"], tuple(_rowed(model, row["blocks"])))]
    else:
        found = list(_stacks(model, "", _declared(model), 2))
        found = found or list(_stacks(model, "", frozenset(), 1))  # convolutions, one to a layer
    if not found:
        name = type(model).__name__
        raise ArchitectureError(
            f"{name} has no list of layers that could be found (an nn.ModuleList or nn.Sequential whose "
            "items hold matrices and a norm); its modules are: "
            f"{', '.join(n for n, _ in model.named_children())}. To say where they are: "
            f'lensbridge.add_row("{name}", blocks="<path of the list, or a glob over layers>") '
            "(see the docs, 'A new architecture')"
        )
    main = max(found, key=lambda stack: _rank(model, stack))
    prefixes = _prefixes(model, found, main)
    named = [Stack(s.path, s.blocks, prefixes[s.path]) for s in found]
    named.sort(key=lambda stack: stack.path == main.path)
    return tuple(named)


def _declared(model: nn.Module) -> frozenset[str]:
    """Classes that transformers itself says are layers."""
    names: set[str] = set()
    for module in model.modules():
        recorded = getattr(type(module), "_can_record_outputs", None) or {}
        held = recorded.get("hidden_states") if isinstance(recorded, dict) else None
        for item in held if isinstance(held, (list, tuple)) else [held]:
            kind = getattr(item, "target_class", item)
            if isinstance(kind, type):
                names.add(kind.__name__)
    return frozenset(names)


def _stacks(home: nn.Module, path: str, declared: frozenset[str], matrices: int) -> Iterator[Stack]:
    for name, child in home.named_children():
        where = f"{path}.{name}" if path else name
        if any(word in name for word in table.NOT_LAYERS):
            continue
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child):
            blocks = tuple(_layers(child, where, declared, matrices))
            if blocks:
                yield Stack(where, blocks)
                continue
        yield from _stacks(child, where, declared, matrices)


def _rowed(model: nn.Module, where: str) -> Iterator[str]:
    """The layers a row speaks of: the items of a list, or the modules a glob matches."""
    paths = [path for path, _ in model.named_modules()]
    if where in paths:
        children = model.get_submodule(where).named_children()
        yield from (f"{where}.{name}" for name, _ in children)
        return
    found = [path for path in paths if fnmatch.fnmatchcase(path, where)]
    found = [path for path in found if path.count(".") == where.count(".")]
    if not found:
        raise ArchitectureError(
            f"the row of {type(model).__name__} says its layers are at {where!r}, where there is nothing"
        )
    yield from sorted(found, key=lambda path: [int(n) for n in re.findall(r"\d+", path)])


def _layers(stack: nn.Module, path: str, declared: frozenset[str], matrices: int) -> Iterator[str]:
    """The layers in a list of layers or of stages."""
    for name, item in stack.named_children():
        where = f"{path}.{name}"
        if type(item).__name__ in declared:
            yield where
            continue
        inner = [
            (f"{where}.{n}", m)
            for n, m in _lists_in(item)
            if len({type(x) for x in m.children()}) == 1
            and all(is_layer(x, matrices) or isinstance(x, nn.ModuleList) for x in m.children())
        ]
        if isinstance(item, (nn.ModuleList, nn.Sequential)) and not inner:
            yield from _layers(item, where, declared, matrices)
        elif inner:
            for inner_path, module in inner:
                yield from _layers(module, inner_path, declared, matrices)
        elif is_layer(item, matrices):
            yield where


def _lists_in(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child):
            yield name, child


def is_layer(module: nn.Module, least: int = 2) -> bool:
    """Whether a module could be a layer: matrices (two in a transformer, or more), and a norm."""
    matrices = norms = 0
    for part in module.modules():
        matrices += has_weights(part)
        norms += "norm" in type(part).__name__.lower() or (
            not part._modules
            and any(p is not None for p in part._parameters.values())
            and not has_weights(part)
        )
    return matrices >= least and norms >= 1


def _rank(model: nn.Module, stack: Stack) -> tuple[Any, ...]:
    """How likely a stack is the one that ends in the logits."""
    config = text_config(model)
    path = stack.path
    is_text = not any(word in path for word in table.VISION + table.AUDIO)
    words = path.split(".")
    is_decoder = "decoder" in path or not any("encoder" in w for w in words)
    n_layers = getattr(config, "num_hidden_layers", None)
    return is_text, is_decoder, len(stack.blocks) == n_layers, _size(model, stack)


def _prefixes(model: nn.Module, found: list[Stack], main: Stack) -> dict[str, str]:
    """What each tower's names begin with; all different."""
    both_ways = any(re.search(r"(^|\.)encoder(\.|$)", s.path) for s in found if _is_text(s)) and (
        re.search(r"(^|\.)\w*decoder(\.|$)", main.path) is not None
    )
    others = sorted((s for s in found if s is not main), key=lambda s: -_size(model, s))
    taken: dict[str, str] = {}
    for stack in [main, *others]:
        words = [w for w in stack.path.split(".") if not w.isdigit()]
        own = next(
            (w for w in reversed(words) if w not in table.GENERIC), words[max(-2, -len(words))]
        )
        if stack is main:
            prefix = "decoder_" if both_ways else ""
        elif any(word in stack.path for word in table.VISION):
            prefix = "vision_"
        elif any(word in stack.path for word in table.AUDIO):
            prefix = "audio_"
        elif both_ways and "encoder" in words and "encoder_" not in taken.values():
            prefix = "encoder_"
        else:
            prefix = f"{own}_"
        if prefix in taken.values():  # a second tower of a kind
            prefix = f"{prefix}{own}_"
        while prefix in taken.values():
            prefix = f"{prefix}other_"
        taken[stack.path] = prefix
    return taken


def _size(model: nn.Module, stack: Stack) -> int:
    return sum(p.numel() for block in stack.blocks for p in model.get_submodule(block).parameters())


def _is_text(stack: Stack) -> bool:
    return not any(word in stack.path for word in table.VISION + table.AUDIO)
