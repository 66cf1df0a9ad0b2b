"""Raw points: any module of the model by its own path, ``raw:model.layers.3.self_attn.indexer``.

They are made when first asked for. What passes there is shown as it is: the first tensor of what the module
returns, or, with ``.hook_in``, of what it is called with.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from torch import nn

from ..hooks import AbsentPointError, HookPoint, UnknownPointError
from . import places
from .builder import Builder
from .ranks import is_split, why_split

_RAW = "raw:"


class RawPoints:
    """Points for the modules of a model under their own names.

    Args:
        build: The builder of the model's canonical points, whose sites they share.
        model: The model.
    """

    def __init__(self, build: Builder, model: nn.Module) -> None:
        self.build = build
        self.model = model

    def knows(self, name: str) -> bool:
        """Whether a name is a raw one."""
        return name.startswith(_RAW)

    def names(self, matches: Callable[[str], Any]) -> list[str]:
        """Raw names that match, in the order of the module tree.

        Raises:
            UnknownPointError: None does.
        """
        found = [f"{_RAW}{path}" for path in self.build.modules if path]
        chosen = [name for name in found if matches(name)]
        chosen += [f"{name}.hook_in" for name in found if matches(f"{name}.hook_in")]
        if not chosen:
            raise UnknownPointError(
                f"no module of the model matches; its modules are called like {', '.join(found[:4])}"
            )
        return chosen

    def make(self, name: str) -> HookPoint:
        """The point of a raw name.

        Raises:
            UnknownPointError: The model has no module of that path.
            AbsentPointError: Each process has its own part of it.
        """
        path = name.removeprefix(_RAW)
        is_input = path.endswith(".hook_in")
        path = path.removesuffix(".hook_in").removesuffix(".hook_out")
        modules = self.build.modules
        if not path or path not in modules:
            near = get_close_matches(path, list(modules), n=4, cutoff=0.4)
            hint = f"; nearest: {', '.join(_RAW + p for p in near)}" if near else ""
            raise UnknownPointError(f"the model has no module {path!r}{hint}")
        if is_split(self.model, path):
            raise AbsentPointError(f"{name} cannot be read here: {why_split(self.model)}")
        point = HookPoint(name, axes="...", is_default=False)
        tap = places.whole_input() if is_input else places.whole_output()
        self.build.enter(self.build.architecture.main, None)
        self.build.site(path).add(tap, point)
        return point
