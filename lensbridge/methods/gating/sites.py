"""Where gates multiply: one number a head, a group of heads, a part or a feature."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ...bridge import TransformerBridge
from ...hooks import AbsentPointError, InputError, PointError

HEADS, KV_GROUPS, ATTN, MLP = TARGETS = ("heads", "kv_groups", "attn", "mlp")
"""What can be gated by name: query heads, heads that share keys and values, whole branches."""

POINTS = {
    HEADS: "blocks.{}.attn.hook_z",
    KV_GROUPS: "blocks.{}.attn.hook_z",
    ATTN: "blocks.{}.hook_attn_out",
    MLP: "blocks.{}.hook_mlp_out",
}


@dataclass(frozen=True)
class GateSite:
    """A point whose value gates multiply.

    Attributes:
        name: The hook point.
        layer: Which layer the gates are counted to.
        size: How many gates there are.
        axis: The axis of the value that they run along, counted from the end (-2 for heads of
            [batch, pos, head, d_head], -1 for features); None for one gate on all of it.
        share: How many entries of the axis, one behind the other, have one gate in common.
    """

    name: str
    layer: int
    size: int
    axis: int | None = -2
    share: int = 1

    def spread(
        self, gates: Float[Tensor, "sets gate"], value: Float[Tensor, "row *rest"]
    ) -> Float[Tensor, "sets *ones"]:
        """Gates laid out to multiply a value.

        Raises:
            InputError: The value has no axis of that length, or other rows.
        """
        if len(gates) not in (1, len(value)):
            raise InputError(
                f"the run has {len(value)} rows at {self.name} and there are gates for {len(gates)}; "
                "give one "
                "set for all rows, [layer, head], or one a row, [batch, layer, head]"
            )
        if self.axis is None:
            return gates.view(-1, *[1] * (value.dim() - 1))
        if value.dim() < 1 - self.axis or value.shape[self.axis] != self.size * self.share:
            raise InputError(
                f"{self.name} holds {list(value.shape)}; {self.size} gates over {self.share} entries each do "
                f"not fit its axis {self.axis}"
            )
        spread = gates.repeat_interleave(self.share, -1) if self.share > 1 else gates
        ahead = value.dim() + self.axis - 1
        return spread.view(len(gates), *[1] * ahead, -1, *[1] * (-self.axis - 1))


Target = str | Sequence[Any]
"""One of `TARGETS`, or `GateSite` objects of your own, one a layer."""


def sites_of(
    bridge: TransformerBridge, target: Target, layers: Iterable[int] | int | None
) -> list[GateSite]:
    """The sites of a target, in order of their layers.

    Args:
        bridge: The model.
        target: One of `TARGETS`, or the sites themselves.
        layers: Only these, negative ones from the end; None for all that have such a point.
    Raises:
        InputError: An unknown target, sites that are none, or layers with different numbers of gates.
        AbsentPointError: No layer, or not one that was named, has the point.
    """
    if not isinstance(target, str):
        sites = list(target)
        if not sites or any(not isinstance(site, GateSite) for site in sites):
            raise InputError(f"sites to gate are GateSite(name, layer, size, axis), got {target!r}")
        for site in sites:
            if site.name not in bridge.registry:
                raise bridge.registry.missing(site.name)
    elif target in TARGETS:
        sites = _named(bridge, target, layers)
    else:
        raise InputError(f"target must be one of {', '.join(TARGETS)} or GateSites, got {target!r}")
    sizes = {site.size for site in sites}
    if len(sizes) > 1:
        by_size = {n: [s.layer for s in sites if s.size == n] for n in sorted(sizes)}
        raise InputError(
            f"the layers do not have equally many gates (how many: which layers): {by_size}; choose "
            "some that "
            "do with layers="
        )
    return sorted(sites, key=lambda site: site.layer)


def _named(
    bridge: TransformerBridge, target: str, layers: Iterable[int] | int | None
) -> list[GateSite]:
    blocks = bridge.architecture.blocks
    if layers is None:
        wanted = list(range(len(blocks)))
    else:
        given = [layers] if isinstance(layers, int) else list(layers)
        outside = [i for i in given if not -len(blocks) <= i < len(blocks)]
        if outside or not given:
            raise InputError(
                f"layers must be some of 0 to {len(blocks) - 1} (or negative, from the end), got {given}"
            )
        wanted = sorted({i % len(blocks) for i in given})
    sites, missing = [], []
    for layer in wanted:
        name = _point(bridge, POINTS[target].format(layer))
        attn = blocks[layer].attn
        if name is None:
            missing.append(layer)
        elif target in (ATTN, MLP):
            sites.append(GateSite(name, layer, 1, axis=None))
        elif attn is None:
            missing.append(layer)
        elif target == HEADS:
            sites.append(GateSite(name, layer, attn.n_heads))
        else:
            groups = attn.n_key_value_heads
            sites.append(GateSite(name, layer, groups, share=attn.n_heads // groups))
    if not sites or (missing and layers is not None):
        raise _lacking(bridge, target, missing)
    return sites


def _point(bridge: TransformerBridge, name: str) -> str | None:
    prefix = bridge.architecture.main.prefix
    full = f"{prefix}{name}"
    return full if full in bridge.registry else None


def _lacking(bridge: TransformerBridge, target: str, layers: list[int]) -> PointError:
    model = type(bridge.original_model).__name__
    if not layers:
        return AbsentPointError(f"{model} has no layers that could be gated")
    name = bridge.architecture.main.prefix + POINTS[target].format(layers[0])
    why = bridge.registry.why(name)
    return AbsentPointError(
        f"{model} has nothing to gate for target={target!r}: no {name}"
        + (f" ({why})" if why else "")
    )
