"""From an Architecture to weights: which there are, what they are called, how each is read.

The one list of weights, as `points` is that of hook points. A weight is read when it is asked for: a view of
the model's parameter wherever its layout allows one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..hooks import AbsentPointError, ArchitectureError, PointError, UnknownPointError
from . import experts
from .architecture import (
    Architecture,
    Attention,
    Block,
    Mixer,
    Mlp,
    Norm,
    Projection,
    Tower,
)
from .factored import FactoredMatrix
from .linear import Linear, entering_width, visit_of
from .lookup import is_lookup, position_rows, rows_of
from .matrix import first_float, is_matrix
from .ranks import own_parameter
from .seen import Visit


@dataclass(frozen=True)
class Weight:
    """One weight of a model.

    Attributes:
        name: ``"blocks.0.attn.W_Q"``.
        axes: ``"head d_model d_head"``; empty for a product of two (``QK``, ``OV``).
        read: Gives it.
        repeats: How many query heads share one of its heads.
    """

    name: str
    axes: str
    read: Callable[[], Any]
    repeats: int = 1


class WeightTable(Mapping[str, Weight]):
    """Every weight of a model by name, in the order of the model.

    Args:
        model: The Hugging Face model.
        architecture: Where its parts are.
    """

    def __init__(self, model: nn.Module, architecture: Architecture) -> None:
        self.model = model
        self.architecture = architecture
        self.absent: dict[str, str] = {}
        """Names of weights that other models have, with the reason."""

    @cached_property
    def _held(self) -> dict[str, Weight]:
        held: dict[str, Weight] = {}
        for weight in _Finder(self).every():
            held.setdefault(weight.name, weight)
        return held

    def __getitem__(self, name: str) -> Weight:
        if name in self._held:
            return self._held[name]
        raise self.missing(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def why(self, name: str) -> str | None:
        """Why a weight is absent; None where that is not known."""
        return None if name in self._held else self.absent.get(name)

    def missing(self, name: str) -> PointError:
        """The exception for a name that leads to no weight."""
        reason = self.why(name)
        if reason is not None:
            return AbsentPointError(f"this model has no {name}: {reason}")
        own = name.rpartition(".")[2]
        alike = [held for held in self._held if held.rpartition(".")[2] == own][:3]
        hint = f"; weights of that kind: {', '.join(alike)}" if alike else ""
        return UnknownPointError(f"no weight is called {name!r}{hint}")

    def read(self, name: str, *, expand_groups: bool = False) -> Any:
        """A weight, or the `FactoredMatrix` of a product.

        Args:
            name: Its name.
            expand_groups: Repeat heads that several query heads share.
        Raises:
            UnknownPointError, AbsentPointError: There is none.
        """
        weight = self[name]
        try:
            value = weight.read()
        except ArchitectureError as error:
            raise AbsentPointError(f"this model has no {name}: {error}") from error
        if expand_groups and weight.repeats > 1:
            return value.repeat_interleave(weight.repeats, dim=0)
        return value

    def read_or_none(self, name: str) -> Any:
        """A weight, or None where `read` says why there is none."""
        try:
            return self.read(name)
        except AbsentPointError:
            return None


class _Finder:
    """Goes through an architecture and says what weights there are."""

    def __init__(self, table: Any) -> None:
        # A `WeightTable`; annotated so, checkers ask how many it has, which is what this finds out.
        self.model = table.model
        self.architecture = table.architecture
        self.absent = table.absent
        self.table = table

    def every(self) -> Iterator[Weight]:
        """All weights, in the order of the model."""
        for tower in self.architecture.towers:
            yield from self.tower(tower)
        main, head = self.architecture.main, self.architecture.unembed
        if head is None:
            why = self.architecture.absent.get("unembed", "no head")
            self.lacks(why, "unembed.W_U", "unembed.b_U")
        else:
            full = Linear(self.model, main, None, head)
            yield Weight("unembed.W_U", "d_model d_vocab", full.weight)
            yield Weight("unembed.b_U", "d_vocab", full.bias)

    def lacks(self, why: str, *names: str) -> None:
        for name in names:
            self.absent.setdefault(name, why)

    # --- a tower -----------------------------------------------------------------------------------------

    def tower(self, tower: Tower) -> Iterator[Weight]:
        prefix = tower.prefix
        for part, own, path in (
            ("embed", "W_E", tower.embed),
            ("pos_embed", "W_pos", tower.pos_embed),
        ):
            name = f"{prefix}{part}.{own}"
            if path is None:
                self.lacks(tower.absent.get(part) or tower.unproved or "not seen", name)
                continue
            module = self.model.get_submodule(path)
            if not is_lookup(module):
                self.lacks(f"{path} embeds no ids", name)
            elif part == "pos_embed":
                yield Weight(name, "n_ctx d_model", partial(position_rows, module))
            else:
                yield Weight(name, "d_vocab d_model", partial(rows_of, module))
        if tower.ln_embed is not None:
            yield from self.norm(f"{prefix}ln_embed", tower.ln_embed, tower)
        for index, block in enumerate(tower.blocks):
            yield from self.block(tower, f"{prefix}blocks.{index}", block)
        if tower.ln_final is not None:
            yield from self.norm(f"{prefix}ln_final", tower.ln_final, tower)
        else:
            why = tower.absent.get("ln_final") or tower.unproved or "not seen"
            self.lacks(why, f"{prefix}ln_final.w", f"{prefix}ln_final.b")

    def block(self, tower: Tower, name: str, block: Block) -> Iterator[Weight]:
        for branch in (*block.branches, *block.inner):
            part = branch.part
            home = f"{name}.{branch.name}"
            if branch.ln is not None:
                yield from self.norm(f"{name}.ln{branch.number}", branch.ln, tower, block)
            if isinstance(part, Attention):
                yield from self.attention(tower, block, home, part)
            elif isinstance(part, Mlp):
                yield from self.mlp(tower, block, home, part)
            else:
                yield from self.mixer(tower, block, home, part)
            if branch.ln_post is not None:
                yield from self.norm(f"{name}.ln{branch.number}_post", branch.ln_post, tower, block)
        if block.ln_out is not None:
            yield from self.norm(f"{name}.ln_out", block.ln_out, tower, block)
        why = tower.unproved or block.unproved or f"this layer is {block.kind}"
        for part_name, owns in (("attn", _ATTENTION), ("mlp", _MLP)):
            if block.branch(part_name) is None:
                self.lacks(why, *(f"{name}.{part_name}.{own}" for own in owns))
        for ln in ("ln1", "ln2", "ln1_post", "ln2_post"):
            why = f"this model's blocks have no {ln} (no norm in that place)"
            self.lacks(why, f"{name}.{ln}.w", f"{name}.{ln}.b")

    def norm(
        self, name: str, norm: Norm, tower: Tower, block: Block | None = None
    ) -> Iterator[Weight]:
        """The weight and bias of a norm: ``normalized * w + b``, an offset included in ``w``."""
        if not norm.is_open:
            why = f"the formula of {norm.path} is not known"
            self.lacks(why, f"{name}.w", f"{name}.b")
            return
        width = entering_width(visit_of(tower, block, norm.path))
        for own, parameter in (("w", "weight"), ("b", "bias")):
            read = partial(self.affine, norm, parameter, width)
            yield Weight(f"{name}.{own}", "d", read)

    def affine(self, norm: Norm, parameter: str, width: int | None) -> Tensor:
        """A norm's weight or bias; ones or zeros where it has none."""
        module = self.model.get_submodule(norm.path)
        with align_module_device(module):
            held = own_parameter(module, parameter)
            other = next((p for p in module._parameters.values() if p is not None), None)
        if other is not None and width is not None and len(other) != width:
            raise ArchitectureError(f"{norm.path} normalises another axis than the last")
        if held is not None:
            return held + norm.offset if parameter == "weight" and norm.offset else held
        like = first_float(self.model) if other is None else other
        width = width if other is None else len(other)
        if width is None:
            raise ArchitectureError(f"{norm.path} has no weights")
        return like.new_full((width,), float(parameter == "weight"))

    # --- attention ---------------------------------------------------------------------------------------

    def attention(self, tower: Tower, block: Block, home: str, attn: Attention) -> Iterator[Weight]:
        widths = {
            "Q": (attn.q, attn.n_heads, attn.d_head),
            "K": (attn.k, attn.n_key_value_heads, attn.d_head),
            "V": (attn.v, attn.n_key_value_heads, attn.d_head_v),
        }
        for letter, (share, n, d) in widths.items():
            names = f"{home}.W_{letter}", f"{home}.b_{letter}"
            if share is None:
                self.lacks(attn.absent.get(letter.lower(), "not recognised"), *names)
                continue
            why = self.not_of_stream(tower, block, attn, share, letter)
            if why:
                self.lacks(why, *names)
                continue
            linear = Linear(self.model, tower, block, share.path, share)
            axis = "head" if letter == "Q" else "kv_head"
            repeats = attn.n_heads // n
            matrix, bias = partial(linear.heads_in, n, d), partial(linear.heads_bias, n, d)
            yield Weight(names[0], f"{axis} d_model d_head", matrix, repeats)
            yield Weight(names[1], f"{axis} d_head", bias, repeats)
        if attn.o is None:
            why = "no layer with weights of its own reads what attention makes"
            self.lacks(why, f"{home}.W_O", f"{home}.b_O")
        else:
            linear = Linear(self.model, tower, block, attn.o)
            matrix = partial(linear.heads_out, attn.n_heads, attn.d_head_v)
            yield Weight(f"{home}.W_O", "head d_head d_model", matrix)
            yield Weight(f"{home}.b_O", "d_model", linear.bias)
        for own, left, right in (("QK", "W_Q", "W_K"), ("OV", "W_V", "W_O")):
            lacking = [part for part in (left, right) if f"{home}.{part}" in self.absent]
            if lacking:
                self.lacks(self.absent[f"{home}.{lacking[0]}"], f"{home}.{own}")
            else:
                yield Weight(f"{home}.{own}", "", partial(self.product, home, left, right))
        for part, norm in (("q_norm", attn.q_norm), ("k_norm", attn.k_norm)):
            if norm is not None:
                yield from self.norm(f"{home}.{part}", norm, tower, block)

    def product(self, home: str, left: str, right: str) -> FactoredMatrix:
        a, b = (self.table.read(f"{home}.{part}", expand_groups=True) for part in (left, right))
        return FactoredMatrix(a, b.mT if right == "W_K" else b)

    def not_of_stream(
        self, tower: Tower, block: Block, attn: Attention, share: Projection, letter: str
    ) -> str:
        """Why a projection does not map what the attention reads; empty when it does."""
        visit, whole = visit_of(tower, block, share.path), visit_of(tower, block, attn.path)
        if visit is None:
            return ""
        part = letter.lower()
        before = "" if attn.path == block.path else self.inner_layer(attn, share, visit)
        width = entering_width(whole)
        own = entering_width(visit)
        if not before and (own == width or width is None or (attn.is_cross and letter != "Q")):
            return ""
        made = f"what {before} makes" if before else f"something {own} wide"
        return (
            f"{share.path} does not read the stream but {made}, so no single matrix leads from the stream "
            f"to {part}; its own matrix is that of {part}.hook_in -> {part}.hook_out"
        )

    def inner_layer(self, attn: Attention, share: Projection, visit: Visit) -> str:
        """A matrix of the attention part that stands before a projection."""
        inside = dict(self.model.get_submodule(attn.path).named_modules())
        for root in visit.roots_in:
            module = inside.get(root.path.removeprefix(f"{attn.path}."))  # "attended 0" is none
            if root.path == share.path or module is None:
                continue
            if any(p is not None and p.dim() == 2 for p in module._parameters.values()):
                return root.path
        return ""

    # --- MLPs and mixers ---------------------------------------------------------------------------------

    def mlp(self, tower: Tower, block: Block, home: str, part: Mlp) -> Iterator[Weight]:
        if part.router is not None:
            yield from self.mixture(home, part)
        else:
            yield from self.layers(tower, block, home, part)
        if part.shared is not None:
            yield from self.mlp(tower, block, f"{home}.shared", part.shared)

    def layers(self, tower: Tower, block: Block, home: str, part: Mlp) -> Iterator[Weight]:
        for own, share in (("in", part.inp), ("gate", part.gate)):
            names = f"{home}.W_{own}", f"{home}.b_{own}"
            if share is None:
                why = "the MLP is not gated" if own == "gate" else "not recognised"
                self.lacks(why, *names)
                continue
            linear = Linear(self.model, tower, block, share.path, share)
            yield Weight(names[0], "d_model d_mlp", linear.weight)
            yield Weight(names[1], "d_mlp", linear.bias)
        if part.out is None:
            self.lacks("not recognised", f"{home}.W_out", f"{home}.b_out")
        else:
            linear = Linear(self.model, tower, block, part.out)
            yield Weight(f"{home}.W_out", "d_mlp d_model", linear.weight)
            yield Weight(f"{home}.b_out", "d_model", linear.bias)

    def mixture(self, home: str, part: Mlp) -> Iterator[Weight]:
        """A mixture of experts: the same names with an axis for the expert, and the router."""
        module, why = experts.find(self.model, part)
        for own, axes in experts.AXES.items():
            if module is None:
                self.lacks(why, f"{home}.{own}")
            elif own.endswith("gate") and not experts.is_gated(module):
                self.lacks("the experts are not gated", f"{home}.{own}")
            else:
                yield Weight(f"{home}.{own}", axes, partial(experts.read, module, own))
        router: Any = self.model.get_submodule(str(part.router))
        for own, axes in (("W", "d_model expert"), ("b", "expert")):
            read = partial(experts.read_router, router, own, part.n_experts)
            yield Weight(f"{home}.router.{own}", axes, read)

    def mixer(self, tower: Tower, block: Block, home: str, part: Mixer) -> Iterator[Weight]:
        for layer, path in part.parts:
            is_share = layer == "gate" and part.gate is not None
            if is_share or not is_matrix(self.model.get_submodule(path)):
                continue
            linear = Linear(self.model, tower, block, path)
            yield Weight(f"{home}.{layer}.W", "d_in d_out", linear.weight)
            yield Weight(f"{home}.{layer}.b", "d_out", linear.bias)


_ATTENTION = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O", "QK", "OV")
_MLP = ("W_in", "W_gate", "W_out", "b_in", "b_gate", "b_out")
