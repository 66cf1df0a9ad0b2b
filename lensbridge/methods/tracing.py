"""Tracing: what a model holds at named sites, and what its own end would make of every layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..bridge import Inputs, TransformerBridge
from ..hooks import HookPoint, InputError, UnknownPointError
from .sites import LOGITS, SITES, layer_index, place_of, places_of

DEFAULT_SITES = ("block_output", "final_norm", LOGITS)


@dataclass
class TraceResult:
    """What a trace holds.

    Attributes:
        activations: Site -> layer -> tensor; the layer is None at places that are no layer's.
        final_logits: The model's logits, [batch, pos, d_vocab]; None if it has no head.
        input_ids: The ids that were run, [batch, pos]; None where embeddings were.
        attention_mask: 1 at real tokens; None where all are.
        metadata: ``requested_layers`` and ``requested_sites``.
    """

    activations: dict[str, dict[int | None, Tensor]]
    final_logits: Tensor | None
    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def get(self, site: str, layer: int | None = None) -> Tensor:
        """The tensor of a site.

        Args:
            site: As it was asked for.
            layer: Which layer, for sites that are in every layer; negative counts from the end.
        Raises:
            UnknownPointError: The trace has no such site or layer; says what it has.
        """
        if site not in self.activations:
            raise UnknownPointError(
                f"the trace has no site {site!r}; it has {', '.join(self.activations)}"
            )
        held = self.activations[site]
        index = self._index(layer, held)
        if index not in held:
            layers = "no layers: leave the layer out" if None in held else f"layers {list(held)}"
            raise UnknownPointError(
                f"site {site!r} was not traced at layer {layer}; it has {layers}"
            )
        return held[index]

    def has(self, site: str, layer: int | None = None) -> bool:
        """Whether the trace holds a site."""
        held = self.activations.get(site, {})
        return self._index(layer, held) in held

    def _index(self, layer: int | None, held: Mapping[int | None, Tensor]) -> int | None:
        """A layer, negative ones counted from the end."""
        is_negative = layer is not None and layer < 0 and None not in held
        return (
            layer + self.metadata.get("n_layers", 0) if is_negative and layer is not None else layer
        )

    @property
    def available_sites(self) -> list[str]:
        """The sites the trace holds."""
        return list(self.activations)

    def _final(self) -> Tensor:
        if self.final_logits is None:
            raise InputError("the trace has no logits: the model was loaded without its head")
        return self.final_logits

    def final_log_probs(self) -> Tensor:
        """Log-probabilities of the model's prediction, in nats, [batch, pos, d_vocab]."""
        return self._final().float().log_softmax(-1)

    def final_probs(self) -> Tensor:
        """Probabilities of the model's prediction, [batch, pos, d_vocab]."""
        return self._final().float().softmax(-1)

    def layer_log_probs(self, layer: int) -> Tensor:
        """Log-probabilities of the prediction read off a layer's output; needs the site ``logits``."""
        return self.get(LOGITS, layer).float().log_softmax(-1)

    def layer_probs(self, layer: int) -> Tensor:
        """Probabilities of the prediction read off a layer's output; needs the site ``logits``."""
        return self.get(LOGITS, layer).float().softmax(-1)


class TransformerTracer:
    """Reads named sites of a model.

    Args:
        model: A bridge, or a model to wrap.
        adapter: Not needed: any model works. Taken for code written for inteprelens.
    """

    def __init__(self, model: TransformerBridge | nn.Module, adapter: Any = None) -> None:
        self.bridge = model if isinstance(model, TransformerBridge) else TransformerBridge(model)
        self.adapter = adapter

    def trace(
        self,
        input_ids: Any = None,
        *,
        texts: Any = None,
        attention_mask: Any = None,
        layers: Iterable[int] | int | None = None,
        sites: Iterable[str] | str | None = None,
        detach: bool = True,
        clone: bool = True,
        **model_kwargs: Any,
    ) -> TraceResult:
        """Run the model and keep what it holds at some sites.

        Args:
            input_ids: Token ids, [batch, pos].
            texts: Text instead, a string or a list.
            attention_mask: 1 at real tokens, for ids.
            layers: Which layers, negative from the end; unless given, all that have the site.
            sites: Names of `lensbridge.methods.sites.SITES`, ``logits``, or of hook points; block outputs,
                final norm and logits of every layer unless given.
            detach: Without a graph (the model is then run without gradients).
            clone: Copies, which later changes of the model's tensors cannot reach.
            **model_kwargs: ``prepend_bos``, ``padding_side``, or any keyword of the model's forward.
        Raises:
            InputError: Neither text nor ids, or both; ``logits`` of a model without a head (unasked, they are
                left out).
            UnknownPointError, AbsentPointError, LayerRangeError: A site or layer that is not there.
        """
        bridge = self.bridge
        value = one_input(texts, input_ids, model_kwargs)
        inputs = bridge.prepare(value, attention_mask=attention_mask, **model_kwargs)
        asked = [sites] if isinstance(sites, str) else list(sites or ())
        wanted = _defaults(bridge) if sites is None else asked
        chosen = _layers(layers, bridge)
        sought = [site for site in wanted if site != LOGITS]
        named = None if layers is None else chosen
        places = [place for site in sought for place in places_of(site, named, bridge)]
        held: dict[str, Tensor] = {}

        def keep(tensor: Tensor, hook: HookPoint) -> None:
            value = tensor.detach() if detach else tensor
            held[str(hook.name)] = value.clone() if clone or hook.is_volatile else value

        lensed = chosen if LOGITS in wanted else []
        ends = [place_of("block_output", layer, bridge) for layer in lensed]
        points = {id(place.point): place.point for place in [*places, *ends]}
        with torch.no_grad() if detach else nullcontext():
            with bridge.registry.hooks() as scope:
                scope.observe(list(points.values()), keep, must_fire=True)
                try:
                    logits = bridge(**inputs.kwargs)
                except InputError as error:
                    # A model without a head has run to its end, and then there are no logits to return.
                    if len(held) < len(points):
                        raise
                    if LOGITS in asked:
                        raise InputError(
                            f"no logits to trace: {error}, or leave {LOGITS!r} out of sites="
                        ) from error
                    logits, ends = None, []
                    wanted = [site for site in wanted if site != LOGITS]
            found: dict[str, dict[int | None, Tensor]] = {site: {} for site in wanted}
            for place in places:
                found[place.site][place.layer] = place.read(held[str(place.point.name)])
            for end in ends:
                found[LOGITS][end.layer] = read_off(bridge, held[str(end.point.name)], inputs)
        metadata = {
            "requested_layers": chosen,
            "requested_sites": wanted,
            "n_layers": len(bridge.architecture.blocks),
        }
        final = None if logits is None else logits.detach() if detach else logits
        return TraceResult(found, final, inputs.tokens, inputs.mask, metadata)


def _defaults(bridge: TransformerBridge) -> list[str]:
    """The sites that are traced unasked; an encoder without a final norm is traced without it."""
    end = SITES["final_norm"].format(tower=bridge.architecture.main.prefix)
    return [site for site in DEFAULT_SITES if site != "final_norm" or end in bridge.registry]


def one_input(texts: Any, input_ids: Any, others: Mapping[str, Any]) -> Any:
    """The input that was given.

    Raises:
        InputError: None or two.
    """
    if texts is not None and input_ids is not None:
        raise InputError("give texts or input_ids, not both")
    if texts is None and input_ids is None and not others:
        raise InputError("nothing to run: give texts= or input_ids=")
    return input_ids if texts is None else texts


def _layers(layers: Iterable[int] | int | None, bridge: TransformerBridge) -> list[int]:
    if layers is None:
        return list(range(len(bridge.architecture.blocks)))
    given = [layers] if isinstance(layers, int) else list(layers)
    return [layer_index(layer, bridge) for layer in given]


def read_off(bridge: TransformerBridge, stream: Tensor, inputs: Inputs) -> Tensor:
    """What the model's own norm, head and soft cap make of a layer's output (nostalgebraist's logit lens).

    Args:
        bridge: The model.
        stream: The output, [batch, pos, d_model].
        inputs: Of the run it is from.
    Returns:
        Logits, [batch, pos, d_vocab]; hooks that are set are not heard.
    """
    given = dict(inputs.kwargs)
    is_decoder = bridge.architecture.main.prefix == "decoder_"
    # The stream stands in for what the layers' own tower would have read.
    for name in (
        ("decoder_input_ids", "decoder_inputs_embeds")
        if is_decoder
        else ("input_ids", "inputs_embeds")
    ):
        given.pop(name, None)
    # Hooks that are set belong to the run that was traced.
    with bridge.registry.silenced():
        return bridge(stream, start_at_layer=len(bridge.architecture.blocks), **given)
