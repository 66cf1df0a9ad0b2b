"""Sites: short names for the places inteprelens knows, and which hook points they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from ..bridge import TransformerBridge
from ..hooks import (
    HookPoint,
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
stands there. ``logits`` is the tenth site: of a layer, what the model's own end makes of its output."""

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

    def write(self, new: Tensor, old: Tensor) -> Tensor:
        """What the point is given for a changed tensor of the site."""
        return new.reshape(old.shape) if self.merges_heads and isinstance(new, Tensor) else new


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


def unknown(site: str, bridge: TransformerBridge) -> UnknownPointError:
    """The exception for a site that leads nowhere."""
    near = get_close_matches(site, [*SITES, LOGITS], n=3, cutoff=0.5)
    near = near or bridge.registry.nearest(site) or [*SITES, LOGITS]
    return UnknownPointError(
        f"{site!r} is neither a site ({', '.join([*SITES, LOGITS])}) nor a hook point; nearest: "
        + ", ".join(near)
    )


Transform = Callable[[Tensor], Tensor]
