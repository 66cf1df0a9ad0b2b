"""Points and who listens there: the part of a bridge that faces its registry."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from ..hooks import HookPoint, HookRegistry, HookScope, InputError, Listener, Splice
from ..hooks.registry import Selection
from .architecture import Architecture
from .config import BridgeConfig
from .view import BlocksView, PartView, belongs

Hooks = Iterable[Any]
"""Pairs (name or filter, function)."""


class Listening:
    """Hook points and the functions set on them."""

    registry: HookRegistry
    architecture: Architecture
    cfg: BridgeConfig

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """Every point by canonical name and by alias."""
        return self.registry.hook_dict

    def hook_points(self) -> list[HookPoint]:
        """Every point, in execution order."""
        return list(self.registry.values())

    def get_hook_point(self, name: str) -> HookPoint:
        """The point behind a name or alias.

        Raises:
            UnknownPointError, AbsentPointError: No such point; the message says the nearest, or why not.
        """
        return self.registry[name]

    def why(self, name: str) -> str | None:
        """Why this model lacks a canonical point; None when it has it."""
        return self.registry.why(name)

    def set_use_attn_result(self, use: bool = True) -> None:
        """Whether "every point" includes what each head adds to the stream (``attn.hook_result``)."""
        self._include(use, "**.hook_result")

    def set_use_split_qkv_input(self, use: bool = True) -> None:
        """Whether "every point" includes each head's own copy of its input (``hook_q_input``, ...)."""
        self._include(use, "**.hook_[qkv]_input")

    def set_use_attn_in(self, use: bool = True) -> None:
        """Whether "every point" includes ``attn.hook_attn_in``."""
        self._include(use, "**.hook_attn_in")

    def _include(self, use: bool, names: str) -> None:
        for point in self.registry.select(names):
            point.__dict__["is_default"] = use
        self.registry.forget_selections()

    @cached_property
    def blocks(self) -> BlocksView:
        """The layers' points: ``bridge.blocks[0].attn.hook_pattern``."""
        main = self.architecture.main
        return BlocksView(self.registry, len(main.blocks), f"{main.prefix}blocks")

    def __getattr__(self, name: str) -> Any:
        """Parts of other towers: ``bridge.encoder_blocks[0]``, ``bridge.vision_ln_final``."""
        towers = self.__dict__["architecture"].towers if "architecture" in self.__dict__ else ()
        for tower in towers:
            if name == f"{tower.prefix}blocks":
                return BlocksView(self.registry, len(tower.blocks), name)
            if tower.prefix and belongs(name, tower):
                return PartView(self.registry, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def embed(self) -> PartView:
        """The token embedding's points."""
        return PartView(self.registry, "embed")

    @property
    def pos_embed(self) -> PartView:
        """The position embedding's points."""
        return PartView(self.registry, "pos_embed")

    @property
    def ln_final(self) -> PartView:
        """The final norm's points."""
        return PartView(self.registry, "ln_final")

    @property
    def unembed(self) -> PartView:
        """The head's points."""
        return PartView(self.registry, "unembed")

    def hooks(
        self,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        *,
        clear_contexts: bool = False,
    ) -> HookScope:
        """Hooks for the length of a ``with`` block.

        Args:
            fwd_hooks: Pairs (name or filter, ``fn(tensor, hook)``).
            bwd_hooks: Pairs (name or filter, ``fn(grad, hook)``).
            clear_contexts: Empty the points' ``ctx`` afterwards.
        Raises:
            HookNotFiredError: On leaving, when the model ran and a forward hook was never reached.
        """
        return self.registry.hooks(fwd_hooks, bwd_hooks, clear_contexts=clear_contexts)

    def splice(self, sae: Any, at: str, *, include_error: bool = True, name: str = "sae") -> Splice:
        """Put a sparse autoencoder, or another coder, into the model at a point.

        It stays until the splice is removed, or to the end of a ``with`` block. Behind the point's name come
        ``.sae.hook_in``, ``.sae.hook_acts`` [batch, pos, concept], ``.sae.hook_error`` and
        ``.sae.hook_out``: points like all others, to be cached, ablated, clamped and steered with, in
        generation too.

        Args:
            sae: With ``encode_activations`` and ``decode_concepts``, or ``encode`` and ``decode``, on
                rows [n, d]; and with ``d_in`` or ``get_dictionary()`` [concept, d], which say how wide
                those are.
            at: The point. Heads are laid side by side for a coder that is as wide as all of them.
            include_error: Add again what the reconstruction misses: then nothing changes until something is
                edited.
            name: What to call it in names, if several stand at one point.
        Raises:
            InputError: No coder, or a point without positions and features.
            UnknownPointError, AbsentPointError: No such point.
            PointError: The name is taken there.
            HookValueError: In a run, when what passes has another width.
        """
        point = self.registry[at]
        for ways in (("encode_activations", "decode_concepts"), ("encode", "decode")):
            encode, decode = (getattr(sae, way, None) for way in ways)
            if callable(encode) and callable(decode):
                break
        else:
            raise InputError(
                f"a coder has encode and decode (or encode_activations and decode_concepts), and "
                f"{type(sae).__name__} has not"
            )
        width = getattr(sae, "d_in", None)
        if width is None and callable(getattr(sae, "get_dictionary", None)):
            width = sae.get_dictionary().shape[-1]
        if not isinstance(width, int):
            raise InputError(
                f"{type(sae).__name__} does not say how wide its rows are: give it d_in"
            )
        return Splice(
            self.registry, point, encode, decode, width, include_error=include_error, name=name
        )

    def add_hook(
        self,
        name: Selection,
        hook: Any,
        dir: str = "fwd",
        *,
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> list[Listener]:
        """Listen until `reset_hooks` (or, if permanent, until removed); returns the listeners."""
        return self.registry.add_hook(
            name, hook, dir, is_permanent=is_permanent, level=level, prepend=prepend
        )

    def add_perma_hook(self, name: Selection, hook: Any, dir: str = "fwd") -> list[Listener]:
        """Listen through every `reset_hooks`."""
        return self.registry.add_hook(name, hook, dir, is_permanent=True)

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: str = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove listeners from every point."""
        self.registry.reset(clear_contexts, direction, including_permanent, level)

    def clear_contexts(self) -> None:
        """Empty every point's ``ctx``."""
        for point in self.registry.values():
            point.clear_context()

    def list_hooks(
        self,
        name_filter: Selection = None,
        dir: str = "both",
        including_permanent: bool = True,
    ) -> dict[str, list[Listener]]:
        """Who listens where: listeners by canonical name, silent points left out."""
        points = self.hook_points() if name_filter is None else self.registry.select(name_filter)
        found = {
            str(point.name): [
                listener
                for listener in (*point.fwd, *point.bwd)
                if dir in ("both", listener.direction)
                and (including_permanent or not listener.is_permanent)
            ]
            for point in points
        }
        return {name: listeners for name, listeners in found.items() if listeners}
