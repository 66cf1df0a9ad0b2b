"""Which tokens and sentences of a document a circuit of heads makes a summary from, by gradients."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..bridge import TransformerBridge
from ..hooks import GradientError, InputError
from .attribution import gradients
from .gating import CHG
from .spans import AGGREGATIONS, Reader, aggregate_to_sentences, check_spans, spans_in

METHODS = ("norm", "input_x_gradient")
"""How a gradient at a token's embedding becomes one number."""


class CausalCircuitAttribution:
    """What each token or sentence of a document counts for in a text that follows it.

    It is read off gradients at the token embeddings, with heads gated: given the facilitating heads of
    causal head gating, it is what counts through that circuit. Nothing of the model is changed: it may be
    frozen or not, in training mode or not, and checkpointed or not (torch's newer kind of checkpointing,
    ``use_reentrant=False``, which is transformers' default).

    Args:
        model: A bridge, or a causal language model to wrap.
        tokenizer: Its tokenizer; a bridge brings its own. Only documents and summaries need it.
    Raises:
        InputError: A model that does not predict what follows a text.

    Example::

        circuit = CausalCircuitAttribution(bridge)
        circuit.compute_sentence_importance(document, sentences, summary, mask)
    """

    def __init__(self, model: TransformerBridge | nn.Module, tokenizer: Any = None) -> None:
        self.bridge = (
            model if isinstance(model, TransformerBridge) else TransformerBridge(model, tokenizer)
        )
        self._source = self.bridge if tokenizer is None else tokenizer
        inner: Any = self.bridge.unwrapped_model
        can_generate: Callable[[], bool] = getattr(inner, "can_generate", bool)
        if not can_generate() or self.bridge.architecture.main.prefix == "decoder_":
            raise InputError(
                f"{type(inner).__name__} does not predict what follows a text; this needs a causal language "
                "model, such as AutoModelForCausalLM loads"
            )

    def __repr__(self) -> str:
        return f"CausalCircuitAttribution({self.bridge!r})"

    # --- tokens ----------------------------------------------------------------------------------

    def compute_token_gradients(
        self,
        input_ids: Any,
        target_ids: Any,
        mask: Any = None,
        *,
        full_target: bool = False,
        method: str = "norm",
    ) -> Float[Tensor, " pos"]:
        """What each token of an input counts for in what follows.

        With l the log-probability of the target's first token (with ``full_target``, the mean over its
        tokens, each given those before it) and e a token's embedding, ``"norm"`` is the length of dl/de,
        and ``"input_x_gradient"`` is e * dl/de: what speaks for the target is positive.

        Args:
            input_ids: Ids of the input, [1, pos] or [pos].
            target_ids: Ids of what follows, [target] or [1, target].
            mask: A gate for each head, [layer, head], from 0 (silent) to 1 (as it is); None for all ones.
            full_target: All of the target instead of its first token.
            method: ``"norm"`` or ``"input_x_gradient"``.
        Returns:
            In nats per unit of embedding (``"norm"``) or nats, in float32 at least.
        Raises:
            InputError: Ids or a mask that do not fit the model, an empty input or target, or another method.
            GradientError: A gradient that is not finite.
        """
        if method not in METHODS:
            raise InputError(f"method must be one of {METHODS}, got {method!r}")
        ids = self._ids(input_ids, "the input")
        targets = self._ids(target_ids, "the target")
        counted = targets if full_target else targets[:1]
        row = torch.cat([ids, counted[:-1]])
        self._check_length(len(row), len(ids))

        def log_prob(logits: Tensor) -> Tensor:
            logits = logits[0, -len(counted) :]
            wide = logits if logits.dtype == torch.float64 else logits.float()
            at = counted.to(wide.device)[:, None]
            return wide.log_softmax(-1).gather(-1, at).mean()

        # What nobody asks for need not be unembedded: documents are long and vocabularies large.
        less: dict[str, Any] = {"logits_to_keep": len(counted), "use_cache": False}
        inner: Any = self.bridge.unwrapped_model
        taken = inspect.signature(type(inner).forward).parameters
        less = {name: value for name, value in less.items() if name in taken}
        name = self.bridge.registry.canonical("embed.hook_out")
        with _gated(self.bridge, mask):
            at = gradients(self.bridge, row[None], log_prob, [name], **less)[name]
        gradient = at.gradient[0, : len(ids)]
        gradient = gradient if gradient.dtype == torch.float64 else gradient.float()
        if not bool(gradient.isfinite().all()):
            bad = int((~gradient.isfinite().all(-1)).nonzero()[0])
            raise GradientError(
                f"the gradient at token {bad} is not finite: the model's {at.gradient.dtype} cannot hold it; "
                "run it in bfloat16 or float32"
            )
        if method == "norm":
            return gradient.norm(dim=-1)
        return (gradient * at.value[0, : len(ids)].to(gradient)).sum(-1)

    def _ids(self, given: Any, what: str) -> Tensor:
        """Ids of one row, [pos]."""
        ids = torch.as_tensor(given)
        ids = ids[0] if ids.dim() == 2 and len(ids) == 1 else ids
        if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise InputError(
                f"{what} is one row of token ids, [pos] or [1, pos]; got {ids.dtype} {list(ids.shape)}"
            )
        if not len(ids):
            raise InputError(f"{what} has no tokens")
        size = self.bridge.cfg.d_vocab
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (size is not None and high >= size):
            bad = low if low < 0 else high
            raise InputError(f"{what} holds id {bad}, which is outside the vocabulary of {size}")
        return ids.long().to(self.bridge.device or ids.device)

    def _check_length(self, length: int, own: int) -> None:
        limit = self.bridge.cfg.n_ctx
        if limit is not None and length > limit:
            raise InputError(
                f"input ({own} tokens) and target together are {length} tokens, more than the {limit} the "
                "model reads; cut them (max_input_tokens=, max_target_tokens=)"
            )

    # --- sentences -------------------------------------------------------------------------------

    def sentence_spans(self, document: str, sentences: Sequence[str]) -> list[tuple[int, int]]:
        """Which positions of the model's input, BOS included, each sentence of a document takes.

        Args:
            document: The whole text.
            sentences: Parts of it, in its order; see `get_sentence_token_spans`.
        Raises:
            InputError: As in `get_sentence_token_spans`.
        """
        reader = Reader(self._source)
        front = reader.around()[0]
        return spans_in(document, sentences, reader.read([document])[0], len(front))

    def compute_sentence_importance(
        self,
        document: str,
        sentences: Sequence[str],
        summary: str,
        facilitating_mask: Any = None,
        *,
        spans: Sequence[tuple[int, int]] | None = None,
        use_full_target: bool = True,
        aggregation: str = "mean",
        max_input_tokens: int | None = None,
        max_target_tokens: int | None = None,
        normalize: bool = True,
    ) -> Float[Tensor, " sentence"]:
        """What each sentence of a document counts for in its summary.

        The summary follows the document directly, so an instruction ("In short:") is written at the end of
        the document; ``sentences`` need not cover it. A sentence's importance is made of its tokens'
        gradient norms; see `compute_token_gradients`.

        Args:
            document: The text; it gets a BOS token as in the bridge's runs.
            sentences: Its sentences, in its order.
            summary: What follows it.
            facilitating_mask: A gate for each head, [layer, head]; None for all ones.
            spans: Positions of the sentences, if they are known: see `sentence_spans`.
            use_full_target: All of the summary; False for its first token alone, which is faster.
            aggregation: ``"mean"``, ``"sum"`` or ``"max"`` over a sentence's tokens.
            max_input_tokens: Where to cut the document, BOS included; no sentence may lie behind the cut.
            max_target_tokens: Where to cut the summary.
            normalize: Divide by the largest, which is then 1. Where nothing counts, all are 0.
        Raises:
            InputError: A sentence that is not in the document or not wholly before the cut, an empty summary,
                or an option that cannot be.
            GradientError: A gradient that is not finite.
        """
        if aggregation not in AGGREGATIONS:
            raise InputError(f"aggregation must be one of {AGGREGATIONS}, got {aggregation!r}")
        reader = Reader(self._source)
        front = reader.around()[0]
        whole, target = reader.read([document, summary])
        ids = [*front, *whole.ids]
        if spans is None:
            spans = spans_in(document, sentences, whole, len(front))
        elif len(spans) != len(sentences):
            raise InputError(f"there are {len(sentences)} sentences and {len(spans)} spans")
        check_spans(spans, len(ids))
        length = _cut(len(ids), max_input_tokens, "max_input_tokens")
        for index, (start, end) in enumerate(spans):
            if end > length:
                raise InputError(
                    f"sentence {index} ({sentences[index][:60]!r}) takes tokens {start} to {end - 1}, and "
                    f"the document is cut to {length}: raise max_input_tokens or leave the sentence out"
                )
        if not target.ids:
            raise InputError(f"the summary has no tokens: {summary!r}")
        values = self.compute_token_gradients(
            torch.tensor(ids[:length]),
            torch.tensor(
                target.ids[: _cut(len(target.ids), max_target_tokens, "max_target_tokens")]
            ),
            facilitating_mask,
            full_target=use_full_target,
        )
        found = aggregate_to_sentences(values, spans, aggregation)
        largest = found.max()
        return found / largest if normalize and bool(largest > 0) else found

    def compute_sentence_importance_batch(
        self,
        documents: Sequence[str],
        sentences: Sequence[Sequence[str]],
        summaries: Sequence[str],
        facilitating_mask: Any = None,
        **options: Any,
    ) -> list[Float[Tensor, " _"]]:
        """The same for several documents, one after the other.

        Args:
            documents: The texts.
            sentences: The sentences of each.
            summaries: What follows each.
            facilitating_mask: Gates for all of them.
            **options: As in `compute_sentence_importance`; ``spans`` has those of each document.
        Raises:
            InputError: Lists of unequal length; or as in `compute_sentence_importance`, with the number of
                the document.
        """
        counts = {"documents": documents, "lists of sentences": sentences, "summaries": summaries}
        spans = options.pop("spans", None)
        if spans is not None:
            counts["lists of spans"] = spans
        if len({len(items) for items in counts.values()}) > 1:
            told = ", ".join(f"{len(items)} {name}" for name, items in counts.items())
            raise InputError(f"there are {told}; give one of each a document")
        found = []
        for index, (document, own, summary) in enumerate(
            zip(documents, sentences, summaries, strict=True)
        ):
            given = None if spans is None else spans[index]
            try:
                importance = self.compute_sentence_importance(
                    document, own, summary, facilitating_mask, spans=given, **options
                )
            except InputError as error:
                raise InputError(f"document {index}: {error}") from error
            found.append(importance)
        return found


def _cut(length: int, limit: int | None, name: str) -> int:
    if limit is None:
        return length
    if limit < 1:
        raise InputError(f"{name} must be at least 1, or None; got {limit}")
    return min(length, limit)


def _gated(bridge: TransformerBridge, mask: Any) -> AbstractContextManager[Any]:
    """Heads multiplied by gates, for the length of a block that the backward pass is in as well."""
    if mask is None:
        return nullcontext()
    gates = torch.as_tensor(mask).detach()
    if gates.dim() != 2:
        raise InputError(f"one mask is looked through, [layer, head]; got {list(gates.shape)}")
    if not bool(((gates >= 0) & (gates <= 1)).all()):
        low, high = float(gates.min()), float(gates.max())
        raise InputError(
            "gates lie from 0 to 1, "
            + ("got nan" if math.isnan(low) else f"got {low:.3g} to {high:.3g}")
            + "; of logits give mask.sigmoid()"
        )

    return CHG(bridge).gated(gates)
