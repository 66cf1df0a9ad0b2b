"""What is known of a model's parameters: their names, which are tied, who else uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...hooks import ArchitectureError
from ..architecture import Architecture, Tower
from ..matrix import linear_map
from ..seen import first_item
from .flow import Flow


class Facts:
    """A model's parameters and what a watched run showed of them.

    Args:
        model: The Hugging Face model.
        architecture: Its parts.
        flow: What the run showed.
        run: Runs the model on something small.
    """

    def __init__(
        self, model: nn.Module, architecture: Architecture, flow: Flow, run: Callable[[], Any]
    ) -> None:
        self.model = model
        self.architecture = architecture
        self.flow = flow
        self.run = run
        self.names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.names.setdefault(id(parameter), []).append(name)
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.head = f"{architecture.unembed}.weight" if architecture.unembed else ""
        tied = self.parameters.get(self.head)
        self.tied = [] if tied is None else [n for n in self.names[id(tied)] if n != self.head]
        self.untying: str | None = None
        self.towers = [t for t in architecture.towers if self.is_passed(t)]

    def is_passed(self, tower: Tower) -> bool:
        """Whether the run used anything of a tower's first layer."""
        start = tower.blocks[0].path + "." if tower.blocks else "-"
        return any(name.startswith(start) for name in self.flow.touched)

    def shared(self, name: str) -> str:
        """What else a parameter is; empty when nothing."""
        others = [n for n in self.names[id(self.parameters[name])] if n != name]
        return others[0] if others else ""

    def also(self, name: str) -> list[str]:
        """All names of a parameter."""
        held = self.parameters.get(name)
        return [] if held is None else self.names[id(held)]

    def is_tied(self, name: str) -> bool:
        """Whether a parameter is embedding and head at once."""
        return bool(self.tied) and name in (self.head, *self.tied)

    def why_tied(self) -> str:
        """Why the head cannot be given a matrix of its own; empty when it can."""
        if self.untying is None:
            self.untying = why_not_untied(self.model, self.head, self.tied, self.run)
        return self.untying

    def bias_used(self, bias: str) -> str:
        """What else than its own layer uses a bias; empty when nothing does."""
        if other := self.shared(bias):
            return f"{bias} is {other} as well"
        home = bias.rpartition(".")[0]
        uses = self.flow.uses.get(bias, ())
        return next((f"{bias} is used by {u}" for u in uses if not u.endswith(f" in {home}")), "")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is its weight and at most its bias, and nothing else."""
    weight = module._parameters.get("weight")
    if not isinstance(module, (nn.Linear, Conv1D)) or weight is None:
        return False
    try:
        matrix, _ = linear_map(module, None, weight)
    except ArchitectureError:
        return False
    return matrix.data_ptr() == weight.data_ptr()


# --- tied embeddings -----------------------------------------------------------------------------


def tying_configs(model: nn.Module) -> list[Any]:
    """The configurations in a model that say its embeddings are tied."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        nested = [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
        for one in (config, *nested):
            if one is not None and getattr(one, "tie_word_embeddings", False):
                found[id(one)] = one
    return list(found.values())


@contextmanager
def _said_untied(model: nn.Module) -> Iterator[None]:
    configs = tying_configs(model)
    try:
        for config in configs:
            config.tie_word_embeddings = False
        yield
    finally:
        for config in configs:
            config.tie_word_embeddings = True


def why_not_untied(model: nn.Module, head: str, tied: list[str], run: Callable[[], Any]) -> str:
    """Why the head cannot be given a matrix of its own; empty when it can."""
    declared: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    if not set(declared) & {head, *tied} or not tying_configs(model):
        return f"{head} is {tied[0]} as well, and the model's class does not say how to part them"
    with torch.no_grad():
        before: Any = first_item(run())
        with _said_untied(model):
            after: Any = first_item(run())
    if not isinstance(before, Tensor) or not torch.allclose(before, after, rtol=1e-4, atol=1e-5):
        return (
            f"{head} is {tied[0]} as well, and {type(model).__name__} computes something else when its "
            "config says that they are not tied"
        )
    return ""
