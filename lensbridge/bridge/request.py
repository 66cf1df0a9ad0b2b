"""What was asked of a generation, as keywords of Hugging Face's ``generate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..hooks import InputError
from .inputs import Inputs, is_encoder_decoder, is_text, prepare, takes
from .sampling import FrequencyPenalty, as_criteria
from .tokens import PaddingSide, Tokens

_INPUTS = (
    "input_ids",
    "inputs",
    "inputs_embeds",
    "decoder_input_ids",
    "input_features",
    "input_values",
)


@dataclass
class Request:
    """A generation that was asked for.

    Attributes:
        options: Keywords of Hugging Face's ``generate``.
        prompt: The ids given, [batch, pos]: those to continue, or those an encoder reads; or None.
        start: What a decoder starts from, [batch, 1].
        mask: 1 at real tokens of a prompt that is continued.
        returns: ``"tokens"``, ``"str"``, or ``"texts"``: a list of strings, also for one.
        length: How many new tokens at most; None where only Hugging Face knows.
    """

    options: dict[str, Any]
    prompt: Tensor | None
    start: Tensor | None = None
    mask: Tensor | None = None
    returns: Literal["tokens", "str", "texts"] = "tokens"
    length: int | None = None

    @property
    def continued(self) -> int | None:
        """How many positions of ids are continued; None where no ids are."""
        return None if self.start is not None or self.prompt is None else self.prompt.shape[1]


def prompt_of(
    model: nn.Module,
    tokens: Tokens,
    value: Any,
    options: dict[str, Any],
    *,
    device: torch.device | None,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide | None = None,
    attention_mask: Any = None,
) -> Request:
    """The input; position ids and a decoder's ids are left to ``generate``, which makes them itself.

    Args:
        model: What generates.
        tokens: Turns text to ids.
        value: Text, ids, embeddings, or None where the options bring the input.
        options: Further keywords of ``generate``.
        device: Where the model takes its input.
        prepend_bos: As in `TransformerBridge.forward`.
        padding_side: ``"right"`` is refused where new tokens would follow padding.
        attention_mask: 1 at real tokens, for ids.
    Raises:
        InputError: The model cannot generate, or the input cannot be used.
    """
    if not callable(getattr(model, "generate", None)):
        raise InputError(
            f"{type(model).__name__} cannot generate: it has no language-model head; load the model with "
            "one (AutoModelForCausalLM, AutoModelForSeq2SeqLM, ...)"
        )
    if padding_side not in (None, "left", "right"):
        raise InputError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
    is_decoder = is_encoder_decoder(model)
    if value is None and any(options.get(name) is not None for name in _INPUTS):
        ids = options.get("input_ids", options.get("inputs"))
        ids = ids if isinstance(ids, Tensor) and not ids.is_floating_point() else None
        mask = None if attention_mask is None else torch.as_tensor(attention_mask)
        made: dict[str, Any] = {} if mask is None else {"attention_mask": mask}
        start = options.get("decoder_input_ids")
        if is_decoder and start is None:
            given = {
                name: options[name] for name in _INPUTS if takes(model, name) and name in options
            }
            made_up = prepare(
                model, tokens, ids, device=device, **({} if ids is not None else given)
            )
            start = made_up.kwargs["decoder_input_ids"][:, :1]
        inputs = Inputs(made, ids, mask)
    else:
        # What is continued is padded in front; what an encoder reads, behind, where positions are learned.
        side: PaddingSide = (padding_side or "right") if is_decoder else "left"
        inputs = prepare(
            model,
            tokens,
            "" if value is None else value,
            device=device,
            prepend_bos=prepend_bos,
            padding_side=side,
            attention_mask=attention_mask,
            truncate=False,
        )
        inputs.kwargs.pop("position_ids", None)
        start = inputs.kwargs.pop("decoder_input_ids", None)
        start = options.get("decoder_input_ids") if start is None else start[:, :1]
        ids = inputs.kwargs.get("input_ids")
        if (
            is_text(value)
            and "attention_mask" not in inputs.kwargs
            and takes(model, "attention_mask")
        ):
            # Else a padding token that was typed would be taken for padding.
            inputs.kwargs["attention_mask"] = torch.ones_like(inputs.kwargs["input_ids"])
    if not is_decoder:
        _check_side(inputs.mask, padding_side)
    return Request({**inputs.kwargs, **options}, ids, start, None if is_decoder else inputs.mask)


def _check_side(mask: Tensor | None, padding_side: PaddingSide | None) -> None:
    if mask is None or mask.dim() != 2 or bool(mask.all()):
        return
    if padding_side == "right" or not bool(mask[:, -1].all()):
        raise InputError(
            "the prompts are padded behind, where the new tokens go; pad them in front (padding_side='left')"
        )


def set_sampling(
    request: Request,
    model: Any,
    *,
    max_new_tokens: int | None,
    do_sample: bool | None,
    top_k: int | None,
    temperature: float | int | None,
    freq_penalty: float | int,
    stopping_criteria: Any,
    **given: Any,
) -> None:
    """How the next token is chosen and when to stop; what is None is left to the model's own settings."""
    options = request.options
    config = options.get("generation_config")
    own = getattr(model, "generation_config", None)
    if do_sample is None and config is None:
        do_sample = True
    if temperature == 0:
        do_sample, temperature = False, None
    if do_sample and top_k is None and config is None and getattr(own, "top_k", None) is None:
        top_k = 0  # transformers would cut at 50 without being asked
    if max_new_tokens is None and config is None and options.get("max_length") is None:
        max_new_tokens = 10
    if max_new_tokens is not None and max_new_tokens < 0:
        raise InputError(f"max_new_tokens is 0 or more, got {max_new_tokens}")
    given.update(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        top_k=top_k,
        temperature=temperature,
        stopping_criteria=as_criteria(stopping_criteria),
    )
    options.update({name: value for name, value in given.items() if value is not None})
    request.length = max_new_tokens
    if freq_penalty:
        mask = None if request.continued is None else request.mask
        penalty = FrequencyPenalty(float(freq_penalty), mask)
        options["logits_processor"] = [*(options.get("logits_processor") or ()), penalty]


def set_ends(
    request: Request, model: Any, tokens: Tokens, stop_at_eos: bool, eos_token_id: Any
) -> None:
    """Where rows end, and what they are filled with afterwards."""
    options = request.options
    settings = options.get("generation_config"), getattr(model, "generation_config", None)
    known = [x for s in settings if (x := getattr(s, "eos_token_id", None)) is not None]
    candidates = [x for x in (eos_token_id, *known, tokens.eos_id) if x is not None]
    eos = candidates[0] if candidates else None
    if not stop_at_eos:
        # None would be filled in from the model; an id that no model has ends nothing.
        options["eos_token_id"] = torch.iinfo(torch.int32).max
    elif eos_token_id is not None or (eos is not None and not known):
        options["eos_token_id"] = eos
    has_pad = any(getattr(s, "pad_token_id", None) is not None for s in settings)
    if "pad_token_id" not in options and not has_pad and "eos_token_id" in options:
        first = eos[0] if isinstance(eos, (list, tuple)) else eos
        options["pad_token_id"] = tokens.pad_id if first is None else first
        prompt = request.prompt if request.start is None else None
        if not stop_at_eos and prompt is not None and takes(model, "attention_mask"):
            # Else ends in the prompt would be taken for padding.
            options.setdefault("attention_mask", torch.ones_like(prompt))


def check_room(request: Request, n_ctx: int, *, reads_last: bool) -> None:
    """Refuse what would fail at a position the model has no embedding for, before any work is done.

    Args:
        request: What to generate.
        n_ctx: How many positions the model has.
        reads_last: Whether the last token is read too, for a cache.
    """
    length = request.continued
    if length is None:
        return
    if length > n_ctx:
        raise InputError(f"{length} tokens are more than the {n_ctx} this model has positions for")
    new, most = request.length, n_ctx - length + (0 if reads_last else 1)
    if new is not None and new > most:
        raise InputError(
            f"a prompt of {length} and max_new_tokens={new} do not fit: this model has {n_ctx} positions, "
            f"enough for {most} new tokens" + (" that are all cached" if reads_last else "")
        )
