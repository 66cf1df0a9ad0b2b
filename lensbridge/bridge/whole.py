"""What a registry's points are in: the model, its architecture, and whoever wraps them."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..hooks import ArchitectureError, HookPoint, HookRegistry, InputError, Site
from .architecture import Architecture


@dataclass(eq=False)
class Whole:
    """A model as the arithmetic of its residual stream needs it.

    A registry has one as its ``owner``, so that what a run left behind can be put together after the run. It
    holds no more of the model than the points do; of the bridge it knows only as long as somebody else does.

    Attributes:
        model: The Hugging Face model.
        architecture: Where its parts are.
        bridge: Gives the bridge, or None when that is gone.
    """

    model: nn.Module
    architecture: Architecture
    bridge: weakref.ref[Any] | None = None

    @property
    def kind(self) -> str:
        """The model's class."""
        return type(self.model).__name__

    def parameter(self, name: str) -> Tensor:
        """A parameter or buffer of the model.

        Raises:
            ArchitectureError: It is offloaded, and nothing brings it back.
        """
        home, _, own = name.rpartition(".")
        module = self.model.get_submodule(home)
        with align_module_device(module):
            found = getattr(module, own).detach()
        if found.device.type == "meta":
            raise ArchitectureError(f"{name} is offloaded and does not come back: load it whole")
        return found

    def token(self, text: str) -> int:
        """The id of a text that is one token.

        Raises:
            InputError: The bridge is gone or has no tokenizer, or the text is not one token.
        """
        bridge = None if self.bridge is None else self.bridge()
        if bridge is None:
            raise InputError(
                f"{text!r} needs the bridge's tokenizer, and the bridge this cache is of is gone: give a "
                "token id"
            )
        return int(bridge.to_single_token(text))


def owner_of(registry: HookRegistry, what: str) -> Whole:
    """The model a registry's points are in.

    Raises:
        InputError: They are in no model that a bridge wraps.
    """
    owner = registry.owner
    if not isinstance(owner, Whole):
        raise InputError(
            f"{what} needs to know the model, and these points were not made by a TransformerBridge"
        )
    return owner


def module_of(point: HookPoint) -> nn.Module:
    """The module a point is at."""
    return next(owner.module for owner in point.owners if isinstance(owner, Site))
