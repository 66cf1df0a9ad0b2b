"""ActivationCache: what a run left behind, by any name its points go by."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..hooks import HookRegistry, InputError, LayerRangeError, UnknownPointError
from ..hooks.names import act_name
from .cache_file import read_cache, write_cache
from .slicing import SliceInput, pos_dim, take
from .sums_parts import PartSums
from .sums_resid import ResidSums

_GRAD = "_grad"


class ActivationCache(ResidSums, PartSums, Mapping[str, Tensor]):
    """Activations by canonical name, in the order the model produced them.

    Keys may be canonical names, aliases, or TransformerLens shorthand with a layer, which may be negative:
    ``cache["blocks.0.hook_out"]``, ``cache["blocks.0.hook_resid_post"]``, ``cache["resid_post", -1]``,
    ``cache["pattern", 3]``, ``cache["normalized", 4, "ln2"]``. Gradients are under ``<name>_grad``.

    Args:
        activations: Tensors by canonical name.
        registry: The points, for aliases and for error messages.
        has_batch_dim: Whether dimension 0 is the batch.
        mask: 1 at real tokens, 0 at padding, [batch, pos], over the positions that are cached; None where no
            padding was told of.
        tokens: The ids the model read, [batch, pos]; None where they are not known.
        left_out: Points that fired and could not be kept, with the reason.
    """

    def __init__(
        self,
        activations: dict[str, Tensor],
        registry: HookRegistry,
        *,
        has_batch_dim: bool = True,
        mask: Tensor | None = None,
        tokens: Tensor | None = None,
        left_out: Mapping[str, str] | None = None,
    ) -> None:
        self.cache_dict = activations
        self.registry = registry
        self.has_batch_dim = has_batch_dim
        self.mask = mask
        self.tokens = tokens
        self.left_out = dict(left_out or {})

    # --- mapping ---------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> Tensor:
        held = self.cache_dict.get(key) if isinstance(key, str) else None
        return self.cache_dict[self._find(key)] if held is None else held

    def __contains__(self, key: object) -> bool:
        try:
            self._find(key)
        except (KeyError, InputError, LayerRangeError):
            return False
        return True

    def get(self, key: Any, default: Any = None) -> Any:
        """The tensor, or the default where there is none of that name, layer or shape of key."""
        try:
            return self[key]
        except (KeyError, InputError, LayerRangeError):
            return default

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def __len__(self) -> int:
        return len(self.cache_dict)

    def __repr__(self) -> str:
        size = sum(t.numel() * t.element_size() for t in self.cache_dict.values())
        batch = "" if self.has_batch_dim else ", no batch dimension"
        return f"ActivationCache({len(self)} activations, {size / 2**20:.1f} MiB at most{batch})"

    def _find(self, key: Any) -> str:
        name = self._full_name(key)
        gone = self._of_a_splice(name)
        if gone is not None:
            return gone
        is_grad = name.endswith(_GRAD) and name not in self.registry
        bare = name[: -len(_GRAD)] if is_grad else name
        canonical = self.registry.canonical(bare) + (_GRAD if is_grad else "")
        if canonical not in self.cache_dict:
            held = ", ".join(list(self.cache_dict)[:4]) or "nothing"
            why = self.left_out.get(canonical)
            if why is not None:
                raise UnknownPointError(
                    f"{name!r} is not in this cache: its values do not line up with the text ({why})"
                )
            what = "gradient of it (incl_bwd=True asks for gradients)" if is_grad else "such point"
            if not (is_grad or self.registry[bare].is_default):
                what = "such point: it multiplies memory, so it is computed only when names_filter names it"
            raise UnknownPointError(
                f"{name!r} exists in the model but the run cached no {what}; cached: {held}"
                + (f" and {len(self) - 4} more" if len(self) > 4 else "")
            )
        return canonical

    def _of_a_splice(self, name: str) -> str | None:
        """The canonical name of a value whose point has gone since, with the coder it belonged to."""
        host, *rest = name.rsplit(".", 2)
        if name in self.registry or host not in self.registry:
            return None
        full = ".".join([self.registry.canonical(host), *rest])
        return full if full in self.cache_dict else None

    def _full_name(self, key: Any) -> str:
        if isinstance(key, str):
            return key if key in self.registry else self._from_shorthand(key)
        if isinstance(key, tuple) and 1 <= len(key) <= 3 and isinstance(key[0], str):
            name, layer, part = (*key, None, None)[:3]
            if layer is not None:
                layer = self._layer(layer)
            return self._in_main_tower(act_name(name, layer, part))
        raise InputError(f"a cache key is a name or (name, layer[, part]), got {key!r}")

    def _from_shorthand(self, key: str) -> str:
        try:
            full = act_name(key)
            return key if full == key else self._in_main_tower(full)
        except InputError:
            return key  # let the registry suggest names

    def _in_main_tower(self, name: str) -> str:
        """Shorthand speaks of the tower that ends in the logits, whatever its layers are called."""
        return re.sub(r"^blocks(?=\.)", self.registry.layers, name)

    def _layer(self, layer: Any) -> int:
        if not isinstance(layer, int):
            raise InputError(f"a layer is an int, got {layer!r}")
        count = 1 + max(
            (
                p.layer()
                for n, p in self.registry.items()
                if n.startswith(f"{self.registry.layers}.")
            ),
            default=-1,
        )
        if not -count <= layer < count:
            raise LayerRangeError(
                f"layer {layer} is not one of this model's {count} (0 to {count - 1})"
            )
        return layer % count

    # --- moving and cutting ----------------------------------------------------------------------

    def map(self, fn: Callable[[str, Tensor], Tensor], **state: Any) -> ActivationCache:
        """A new cache with every tensor changed by ``fn(name, tensor)``."""
        made = {name: fn(name, tensor) for name, tensor in self.cache_dict.items()}
        kept: dict[str, Any] = {
            "has_batch_dim": self.has_batch_dim,
            "mask": self.mask,
            "tokens": self.tokens,
            "left_out": self.left_out,
        }
        return ActivationCache(made, self.registry, **{**kept, **state})

    def _cut(self, what: SliceInput, dim: int) -> dict[str, Any]:
        """Mask and tokens, sliced as the tensors are."""
        held = {"mask": self.mask, "tokens": self.tokens}
        return {k: None if x is None else take(x, what, dim) for k, x in held.items()}

    def toggle_autodiff(self, mode: bool = False) -> None:
        """Switch gradients on or off in this thread, everywhere, until they are switched again.

        TransformerLens has it; ``with torch.no_grad():`` ends by itself.
        """
        torch.set_grad_enabled(mode)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> ActivationCache:
        """Move every tensor (floating ones to ``dtype`` too), in place; returns itself."""
        for name, tensor in self.cache_dict.items():
            wanted = dtype if tensor.is_floating_point() else None
            self.cache_dict[name] = tensor.to(
                device=device or tensor.device, dtype=wanted or tensor.dtype
            )
        self.mask, self.tokens = (
            x if x is None or device is None else x.to(device) for x in (self.mask, self.tokens)
        )
        return self

    def remove_batch_dim(self) -> ActivationCache:
        """Drop a batch dimension of size one, in place; returns itself.

        Raises:
            InputError: Some tensor's first dimension is larger than one.
        """
        if self.has_batch_dim:
            wide = [name for name, tensor in self.cache_dict.items() if tensor.shape[0] != 1]
            if wide:
                raise InputError(
                    f"cannot remove the batch dimension: {wide[0]} has "
                    f"{self.cache_dict[wide[0]].shape[0]} rows"
                )
            for name, tensor in self.cache_dict.items():
                self.cache_dict[name] = tensor[0]
            for name, value in self._cut(0, 0).items():
                setattr(self, name, value)
            self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self, batch_slice: SliceInput) -> ActivationCache:
        """A new cache with rows picked; an int drops the dimension. Tensors are views where they can be."""
        if not self.has_batch_dim:
            raise InputError("this cache has no batch dimension to slice")

        def cut(name: str, tensor: Tensor) -> Tensor:
            # A value that is shared by the whole batch (position embeddings) has one row for all of them.
            rows = 0 if isinstance(batch_slice, int) else slice(None)
            return take(
                tensor, rows if tensor.shape[0] == 1 and self._rows() != 1 else batch_slice, 0
            )

        state = self._cut(batch_slice, 0)
        return self.map(cut, has_batch_dim=not isinstance(batch_slice, int), **state)

    def apply_slice_to_pos_dim(self, pos_slice: SliceInput) -> ActivationCache:
        """A new cache with positions picked (query positions of scores and patterns)."""
        shift = 0 if self.has_batch_dim else 1
        state = self._cut(pos_slice, 1 - shift)
        return self.map(
            lambda name, tensor: take(tensor, pos_slice, self._pos_dim(name) - shift), **state
        )

    # --- files -----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write this cache to a safetensors file, with mask, tokens and what was left out; `load` reads it.

        Args:
            path: The file; one that is there is replaced when the new one is whole.
        """
        facts = {"has_batch_dim": self.has_batch_dim, "left_out": self.left_out}
        beside = {"mask": self.mask, "tokens": self.tokens}
        write_cache(path, self.registry, self.cache_dict, beside, facts)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], bridge: Any, device: torch.device | str | None = None
    ) -> ActivationCache:
        """Read what `save` wrote.

        Args:
            path: The file.
            bridge: A `TransformerBridge` on the model it is of.
            device: Where to put the tensors; the CPU unless given.
        Raises:
            FileNotFoundError: No such file.
            InputError: No such cache, or one of a model with other layers, names or widths.
        """
        values, beside, facts = read_cache(path, bridge.registry)
        made = cls(
            values,
            bridge.registry,
            has_batch_dim=facts["has_batch_dim"],
            mask=beside["mask"],
            tokens=beside["tokens"],
            left_out=facts["left_out"],
        )
        return made if device is None else made.to(device)

    def _rows(self) -> int:
        return max((tensor.shape[0] for tensor in self.cache_dict.values()), default=0)

    def _pos_dim(self, name: str) -> int:
        return pos_dim(self.registry[name.removesuffix(_GRAD)].axes)
