"""Interventions as data: what to change, where, in which layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..bridge import TransformerBridge
from ..hooks import HookPoint, InputError
from .sites import LOGITS, Place, Transform, place_of, places_of


@dataclass(frozen=True)
class InterventionSpec:
    """A change at a site.

    Attributes:
        site: One of `lensbridge.methods.sites.SITES`, ``logits`` (what the head makes, before a soft cap), or
            a hook point.
        transform: Given the tensor as the site shows it; returns the one to go on with.
        layer: Which layer, negative from the end; None for all that have the site, or for a place that is no
            layer's.
    """

    site: str
    transform: Transform
    layer: int | None = None


@contextmanager
def apply_interventions(
    model: TransformerBridge | nn.Module,
    specs: InterventionSpec | Iterable[InterventionSpec],
    *,
    adapter: Any = None,
) -> Iterator[TransformerBridge]:
    """Carry out interventions in every run inside a ``with`` block, also when the model itself is called.

    Args:
        model: A bridge, or a model to wrap.
        specs: What to change; several at one place apply in this order.
        adapter: Not needed: any model works. Taken for code written for inteprelens.
    Yields:
        The bridge.
    Raises:
        InputError: Not a spec, or a transform that is no function.
        UnknownPointError, AbsentPointError, LayerRangeError: No such site or layer; nothing is set.
        HookValueError: In a run, when a transform returns something unfit.
    """
    bridge = model if isinstance(model, TransformerBridge) else TransformerBridge(model)
    given = [specs] if isinstance(specs, InterventionSpec) else list(specs)
    hooks = []
    for spec in given:
        if not isinstance(spec, InterventionSpec):
            raise InputError(
                f"an intervention is an InterventionSpec(site, transform, layer), got {spec!r}"
            )
        if not callable(spec.transform):
            raise InputError(
                f"the transform for {spec.site!r} is {type(spec.transform).__name__}, not a function"
            )
        places = _places(spec, bridge)
        hooks += [(place.point, _writing(place, spec.transform)) for place in places]
    with bridge.hooks(fwd_hooks=hooks):
        yield bridge


def _places(spec: InterventionSpec, bridge: TransformerBridge) -> list[Place]:
    if spec.site == LOGITS:
        if spec.layer is not None:
            raise InputError(
                "a layer's logits are read off its output and go nowhere: intervene on 'block_output', or "
                "on 'logits' without a layer"
            )
        return [Place(LOGITS, None, bridge.registry["unembed.hook_out"])]
    if spec.layer is not None:
        return [place_of(spec.site, spec.layer, bridge)]
    return places_of(spec.site, None, bridge)


def _writing(place: Place, transform: Transform) -> Any:
    def write(tensor: Tensor, hook: HookPoint) -> Any:
        new = transform(place.read(tensor))
        return None if new is None else place.write(new, tensor)

    return write
