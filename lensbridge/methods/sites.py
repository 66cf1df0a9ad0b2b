"""Sites: short names for the places inteprelens knows, and which hook points they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from ..bridge import TransformerBridge
from ..hooks import (
    AbsentPointError,
    HookPoint,
    HookValueError,
    InputError,
    LayerRangeError,
    PointError,
    UnknownPointError,
    act_name,
)

SITES: dict[str, str] = {
    "block_input": "{blocks}.{i}.hook_in",
    "attn_o_proj_pre": "{blocks}.{i}.attn.o.hook_in",
    "attn_output": "{blocks}.{i}.hook_attn_out",
    "post_attn_residual": "{blocks}.{i}.hook_resid_mid",
    "mlp_input": "{blocks}.{i}.mlp.hook_in",
    "mlp_output": "{blocks}.{i}.hook_mlp_out",
    "block_output": "{blocks}.{i}.hook_out",
    "final_norm": "{tower}ln_final.hook_out",
    "lm_head_input": "unembed.hook_in",
}
"""Site -> hook point. ``attn_output`` and ``mlp_output`` are what is added to the stream, behind a norm that
stands there and before a factor (Granite's residual multiplier). ``logits`` is the tenth site: of a layer,
what the model's own end makes of its output."""

LOGITS = "logits"


@dataclass(frozen=True)
class Place:
    """Where a site is.

    Attributes:
        site: What it was called.
        layer: Which layer; None for a place that is no layer's.
        point: The hook point.
        merges_heads: Whether the site shows heads side by side in one dimension.
    """

    site: str
    layer: int | None
    point: HookPoint
    merges_heads: bool = False

    def read(self, tensor: Tensor) -> Tensor:
        """The tensor as the site shows it."""
        return tensor.flatten(-2) if self.merges_heads else tensor

    def write(self, new: Any, old: Tensor) -> Tensor:
        """What the point is given for a changed tensor of the site.

        Raises:
            HookValueError: It is none, or of another shape.
        """
        where = f"site {self.site!r}" + ("" if self.layer is None else f" of layer {self.layer}")
        if not isinstance(new, Tensor):
            raise HookValueError(
                f"the transform at {where} returned {type(new).__name__}, not a tensor"
            )
        wanted = self.read(old).shape
        if new.shape != wanted:
            raise HookValueError(
                f"the transform at {where} returned {list(new.shape)}; the value there is {list(wanted)}"
            )
        return new.reshape(old.shape)


def is_per_layer(site: str, bridge: TransformerBridge) -> bool:
    """Whether a site is in every layer, so that a layer must be named.

    Raises:
        UnknownPointError: No site and no point is called that; the nearest are listed.
    """
    if site in SITES or site == LOGITS:
        return site == LOGITS or "{i}" in SITES[site]
    if site in bridge.registry or site.startswith("raw:"):
        return False
    if _in_layer(site, 0, bridge) is not None:
        return True
    raise unknown(site, bridge)


def place_of(site: str, layer: int | None, bridge: TransformerBridge) -> Place:
    """The place of a site.

    Args:
        site: One of `SITES`; a hook point's name or alias; or, with a layer, a part of one
            (``"attn.hook_pattern"``) or its short form (``"pattern"``).
        layer: Which layer; negative counts from the end.
        bridge: The model.
    Raises:
        UnknownPointError: No site and no point is called that; the nearest are listed.
        AbsentPointError: This model has no such place; says why.
        LayerRangeError: A layer this model does not have.
        InputError: A site of a layer without a layer, or the other way round.
    """
    if not is_per_layer(site, bridge):
        if layer is not None:
            raise InputError(f"site {site!r} is no layer's: leave the layer out (got {layer})")
        name = SITES.get(site, site).format(tower=bridge.architecture.main.prefix)
        return Place(site, None, bridge.registry[name])
    if layer is None:
        raise InputError(f"site {site!r} is in every layer: say which")
    index = layer_index(layer, bridge)
    if site in SITES:
        name = SITES[site].format(blocks=bridge.registry.layers, i=index)
        return Place(site, index, _point(site, name, bridge), site == "attn_o_proj_pre")
    full = _in_layer(site, index, bridge)
    if full is None:
        raise bridge.registry.missing(f"{bridge.registry.layers}.{index}.{site}")
    return Place(site, index, bridge.registry[full])


def places_of(site: Any, layers: list[int] | None, bridge: TransformerBridge) -> list[Place]:
    """Every place of a site.

    Args:
        site: As in `place_of`.
        layers: Which layers; None for all that have it.
        bridge: The model.
    Raises:
        UnknownPointError, LayerRangeError, InputError: As in `place_of`.
        AbsentPointError: A layer that was named lacks it, or every layer does.
    """
    if not isinstance(site, str):
        raise InputError(f"a site is a name, got {type(site).__name__}: {site!r}")
    if not site:
        raise unknown(site, bridge)
    if not is_per_layer(site, bridge):
        return [place_of(site, None, bridge)]
    found, reasons = [], []
    for layer in range(len(bridge.architecture.blocks)) if layers is None else layers:
        try:
            found.append(place_of(site, layer, bridge))
        except AbsentPointError as error:  # noqa: PERF203 - a few layers
            reasons.append(error)
    if reasons and not (layers is None and found):
        raise reasons[0]
    return found


def _point(site: str, name: str, bridge: TransformerBridge) -> HookPoint:
    try:
        return bridge.registry[name]
    except PointError as error:
        raise type(error)(f"site {site!r}: {error}") from None


def layer_index(layer: Any, bridge: TransformerBridge) -> int:
    """A layer, negative ones counted from the end.

    Raises:
        LayerRangeError: A layer this model does not have.
    """
    count = len(bridge.architecture.blocks)
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise InputError(f"a layer is an int, got {type(layer).__name__}: {layer!r}")
    if not -count <= layer < count:
        raise LayerRangeError(
            f"layer {layer} is not one of this model's {count} (0 to {count - 1})"
        )
    return layer % count


def _in_layer(site: str, layer: int, bridge: TransformerBridge) -> str | None:
    """The name of a point of a layer, from what follows the layer's own name or from its short form."""
    blocks = bridge.registry.layers
    names = [f"{blocks}.{layer}.{site}"]
    try:
        names.append(act_name(site, layer).replace("blocks.", f"{blocks}.", 1))
    except InputError:
        names.append("")
    held = bridge.registry
    for name in names:
        if name in held or (name and held.why(name) is not None):
            return name
    # A hybrid's first layer may lack what later ones have.
    tails = {known.partition(f"{blocks}.")[2].partition(".")[2] for known in held.hook_dict}
    short = names[1].partition(f"{blocks}.{layer}.")[2]
    return next(
        (n for n, tail in zip(names, (site, short), strict=True) if tail in tails and tail), None
    )


def unknown(site: str, bridge: TransformerBridge) -> PointError:
    """The exception for a site that leads nowhere."""
    if site.startswith(f"{bridge.registry.layers}."):
        return bridge.registry.missing(site)
    start = f"{bridge.registry.layers}.0."
    inside = [name.removeprefix(start) for name in bridge.hook_dict if name.startswith(start)]
    near = get_close_matches(site, [*SITES, LOGITS, *inside], n=3, cutoff=0.5)
    near = near or bridge.registry.nearest(site) or [*SITES, LOGITS]
    return UnknownPointError(
        f"{site!r} is neither a site ({', '.join([*SITES, LOGITS])}) nor a hook point; nearest: "
        + ", ".join(near)
    )


Transform = Callable[[Tensor], Tensor]
