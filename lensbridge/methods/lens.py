"""LensAPI: tracing, scoring, interventions and gradients of one model, in the words of inteprelens."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..bridge import TransformerBridge
from . import gradients
from .adapter import ModelAdapter
from .gating.lens_fit import Fitting
from .interventions import InterventionSpec, apply_interventions
from .scoring import TokenScores
from .tracing import TraceResult, TransformerTracer, one_input


class LensAPI(Fitting):
    """One model and what can be asked of it; the model is neither moved nor frozen nor switched in mode.

    Args:
        model: A bridge, or a loaded model to wrap.
        tokenizer: Its tokenizer; a bridge brings its own.
        adapter: Not needed: any model works. Taken for code written for inteprelens.
        device: Where to move the model; it stays where it is unless given.

    Example::

        lens = LensAPI(model, tokenizer)
        trace = lens.trace(texts=["The capital of France is"], sites=["block_output", "logits"])
        trace.layer_probs(0)
        lens.score(texts=["Paris is in France"]).perplexity()
        lens.fit(["The capital of France is"], [" Paris"]).summary()
    """

    def __init__(
        self,
        model: TransformerBridge | nn.Module,
        tokenizer: Any = None,
        adapter: Any = None,
        device: torch.device | str | None = None,
    ) -> None:
        if isinstance(model, TransformerBridge):
            self.bridge = model
            if tokenizer is not None:
                model.tokenizer = tokenizer
        else:
            self.bridge = TransformerBridge(model, tokenizer)
        if device is not None:
            self.bridge.to(device)
        self.adapter = ModelAdapter(self.bridge)

    @classmethod
    def from_pretrained(
        cls,
        model_name: str | os.PathLike[str],
        device: torch.device | str | None = None,
        torch_dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        **model_kwargs: Any,
    ) -> LensAPI:
        """Load a checkpoint by name or path; see `TransformerBridge.boot_transformers`.

        Args:
            model_name: Hub name or local folder.
            device: Where to put the model.
            torch_dtype: Parameter dtype; ``dtype=`` says the same. float32 unless given.
            trust_remote_code: Run code that comes with the checkpoint.
            **model_kwargs: As in `TransformerBridge.boot_transformers`.
        """
        model_kwargs.setdefault("dtype", torch_dtype)
        bridge = TransformerBridge.boot_transformers(
            model_name, device=device, trust_remote_code=trust_remote_code, **model_kwargs
        )
        return cls(bridge)

    @property
    def model(self) -> nn.Module:
        """The Hugging Face model."""
        return self.bridge.original_model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, or None."""
        return self.bridge.tokenizer

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return self.adapter.num_layers

    @property
    def num_heads(self) -> int | None:
        """Query heads of a layer; None where layers have no attention."""
        return self.adapter.num_heads

    def __repr__(self) -> str:
        return f"LensAPI({self.bridge!r})"

    # --- reading ---------------------------------------------------------------------------------

    def trace(
        self,
        *,
        texts: Any = None,
        input_ids: Any = None,
        attention_mask: Any = None,
        layers: Iterable[int] | int | None = None,
        sites: Iterable[str] | str | None = None,
        detach: bool = True,
        clone: bool = True,
        **model_kwargs: Any,
    ) -> TraceResult:
        """What the model holds at named sites; see `TransformerTracer.trace`.

        Args:
            texts: A string or a list.
            input_ids: Token ids instead, [batch, pos].
            attention_mask: 1 at real tokens, for ids.
            layers: Which layers; all unless given.
            sites: Which sites; block outputs, final norm and logits unless given.
            detach: Without a graph.
            clone: Copies.
            **model_kwargs: ``prepend_bos``, ``padding_side``, or any keyword of the model's forward.
        """
        return TransformerTracer(self.bridge).trace(
            input_ids,
            texts=texts,
            attention_mask=attention_mask,
            layers=layers,
            sites=sites,
            detach=detach,
            clone=clone,
            **model_kwargs,
        )

    def score(
        self,
        texts: Any = None,
        *,
        input_ids: Any = None,
        attention_mask: Any = None,
        temperature: float | int | None = 1.0,
        **model_kwargs: Any,
    ) -> TokenScores:
        """What the model predicts at every position of some texts.

        Args:
            texts: A string or a list.
            input_ids: Token ids instead, [batch, pos].
            attention_mask: 1 at real tokens, for ids.
            temperature: Divides the logits in probabilities and log-probabilities.
            **model_kwargs: ``prepend_bos``, ``padding_side``, or any keyword of the model's forward.
        Raises:
            InputError: No input or two, or a temperature that is not above 0.
        """
        bridge = self.bridge
        value = one_input(texts, input_ids, model_kwargs)
        inputs = bridge.prepare(value, attention_mask=attention_mask, **model_kwargs)
        heat = 1.0 if temperature is None else temperature
        TokenScores(torch.zeros(1, 1, 1), torch.zeros(1, 1, dtype=torch.long), temperature=heat)
        with torch.no_grad():
            logits: Tensor = bridge(**inputs.kwargs)
        ids = (
            torch.zeros(logits.shape[:2], dtype=torch.long)
            if inputs.tokens is None
            else inputs.tokens
        )
        return TokenScores(
            logits,
            ids.to(logits.device),
            inputs.mask,
            temperature=heat,
            is_causal=inputs.tokens is not None and self._is_causal,
        )

    @property
    def _is_causal(self) -> bool:
        model: Any = self.bridge.original_model
        return self.bridge.architecture.main.prefix == "decoder_" or bool(
            getattr(model, "can_generate", lambda: False)()
        )

    # --- changing --------------------------------------------------------------------------------

    def intervene(self, *specs: InterventionSpec) -> AbstractContextManager[TransformerBridge]:
        """Carry out interventions for the length of a ``with`` block; see `apply_interventions`."""
        return apply_interventions(self.bridge, specs)

    # --- gradients -------------------------------------------------------------------------------

    def capture_gradients(
        self, target: Any, site: Any = "output"
    ) -> AbstractContextManager[list[tuple[Tensor | None, ...]]]:
        """`lensbridge.capture_gradients`, names looked up in this model."""
        return gradients.capture_gradients(target, site, bridge=self.bridge)

    def capture_backward_pre(
        self, target: Any
    ) -> AbstractContextManager[list[tuple[Tensor | None, ...]]]:
        """`lensbridge.capture_backward_pre`, names looked up in this model."""
        return gradients.capture_backward_pre(target, bridge=self.bridge)

    def capture_kwargs_hook(
        self, target: Any, modify: Any = None
    ) -> AbstractContextManager[list[dict[str, Any]]]:
        """`lensbridge.capture_kwargs_hook`, names looked up in this model."""
        return gradients.capture_kwargs_hook(target, modify, bridge=self.bridge)

    def tensor_grad_hook(
        self, target: Any, retain_grad: bool = True
    ) -> AbstractContextManager[list[Tensor]]:
        """`lensbridge.tensor_grad_hook`, names looked up in this model."""
        return gradients.tensor_grad_hook(target, retain_grad, bridge=self.bridge)

    def autograd_node_hook(
        self, target: Any
    ) -> AbstractContextManager[list[tuple[Tensor | None, ...]]]:
        """`lensbridge.autograd_node_hook`, names looked up in this model."""
        return gradients.autograd_node_hook(target, bridge=self.bridge)
