"""From whatever the user has - text, ids, embeddings, a mask - to the keywords of a Hugging Face forward."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks import InputError
from .tokens import PaddingSide, Tokens, as_ids, positions_from_mask


@dataclass
class Inputs:
    """A prepared input.

    Attributes:
        kwargs: Keywords for the model's forward.
        tokens: The ids, [batch, pos]; None when embeddings were given.
        mask: 1 at real tokens; None when every token is real.
    """

    kwargs: dict[str, Any]
    tokens: Tensor | None
    mask: Tensor | None


def prepare(
    model: nn.Module,
    tokens: Tokens,
    value: Any,
    *,
    device: torch.device | None,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide | None = None,
    attention_mask: Any = None,
    truncate: bool = True,
    **given: Any,
) -> Inputs:
    """Turn an input into keywords for the model.

    Strings are tokenized (and, if ``truncate``, cut at the context length); several of unequal length are
    padded, with mask and position ids. A mask given with token ids gets its position ids too when it shows
    padding in front. What the caller passes wins.

    Raises:
        InputError: Nothing usable was given, or a keyword the model does not know.
    """
    # The usual case, kept short: plain ids that are already where the model is.
    is_plain = (
        type(value) is Tensor
        and value.dtype is torch.long
        and value.dim() == 2
        and not given
        and not is_encoder_decoder(model)
    )
    if (
        is_plain
        and attention_mask is None
        and value.is_cpu
        and value.device == device
        and value.numel()
    ):
        return Inputs({"input_ids": value}, value, None)
    check_keywords(model, given)
    if is_text(value):
        if attention_mask is not None:
            raise InputError("text makes its own attention mask; pass token ids to bring one")
        ids, mask = tokens.batch(value, prepend_bos, padding_side, truncate=truncate)
        # Without padding the model is called as it would be on bare ids, fast kernels and all.
        padding = None if bool(mask.all()) else mask
        return _with_mask(model, {"input_ids": ids}, ids, padding, device, given)
    if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
        main = getattr(model, "main_input_name", "input_ids")
        if main != "input_ids":
            # Images or sound, where that is what the model is made for.
            return _with_mask(model, {main: value}, None, attention_mask, device, given)
        if value.dim() != 3:
            raise InputError(
                f"embeddings have shape [batch, pos, d_model], got {list(value.shape)}"
            )
        return _with_mask(
            model,
            {"inputs_embeds": value},
            None,
            _as_mask(attention_mask, value.shape[:2]),
            device,
            given,
        )
    if value is None:
        if not given:
            raise InputError("nothing to run: give text, token ids or embeddings")
        return _with_mask(model, {}, given.get("input_ids"), attention_mask, device, given)
    ids = as_ids(value)
    if ids.dim() == 1:
        ids = ids[None]
    if ids.dim() != 2 or ids.numel() == 0:
        raise InputError(
            f"token ids have shape [pos] or [batch, pos] and are not empty, got {list(ids.shape)}"
        )
    if ids.device.type not in ("cpu", "meta"):
        # On an accelerator an id beyond the vocabulary kills the process; on the CPU it only raises.
        tokens.check_ids(ids)
    return _with_mask(
        model, {"input_ids": ids}, ids, _as_mask(attention_mask, ids.shape), device, given
    )


def _with_mask(
    model: nn.Module,
    kwargs: dict[str, Any],
    ids: Tensor | None,
    mask: Tensor | None,
    device: torch.device | None,
    given: dict[str, Any],
) -> Inputs:
    if mask is not None:
        kwargs["attention_mask"] = mask
        if (
            mask.dim() == 2
            and "position_ids" not in given
            and _has_gap(mask)
            and takes_positions(model)
        ):
            positions = positions_from_mask(mask) + first_position(model)
            # With a past the mask covers it too; the positions are those of what is new.
            kwargs["position_ids"] = positions if ids is None else positions[:, -ids.shape[1] :]
    kwargs = {**kwargs, **given}
    if is_encoder_decoder(model):
        ids, mask = _for_decoder(model, kwargs, ids, mask)
    if device is not None:
        kwargs = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in kwargs.items()}
        ids = None if ids is None else ids.to(device)
        mask = None if mask is None else mask.to(device)
    return Inputs(kwargs, ids, mask)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model reads one sequence and writes another."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _for_decoder(
    model: nn.Module, kwargs: dict[str, Any], ids: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Give the decoder its ids - the input's, shifted right, unless the caller brought some; and its mask."""
    kind: Any = type(model)
    names, _ = _parameters(kind)
    real = kwargs.get("decoder_attention_mask")
    brought = {"decoder_input_ids", "decoder_inputs_embeds", "labels", "encoder_outputs"} & set(
        kwargs
    )
    if "decoder_input_ids" in names and not brought:
        config: Any = model.config
        text = config.get_text_config(decoder=True)
        start = next(
            (
                found
                for source in (config, text)
                for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id")
                if isinstance(found := getattr(source, name, None), int)
            ),
            0,
        )
        if ids is None:
            rows = next(len(v) for v in kwargs.values() if isinstance(v, Tensor))
            kwargs["decoder_input_ids"] = torch.full((rows, 1), start)
        else:
            first = torch.full_like(ids[:, :1], start)
            if mask is not None and mask.dim() == 2:
                # Padding goes behind, where a decoder does not look: rows stay what they are alone.
                order = mask.long().argsort(dim=1, descending=True, stable=True)
                ids, real = ids.gather(1, order), mask.gather(1, order)
            kwargs["decoder_input_ids"] = torch.cat([first, ids[:, :-1]], dim=1)
    return kwargs.get("decoder_input_ids"), real


def _has_gap(mask: Tensor) -> bool:
    """Whether a masked token stands before a real one in some row."""
    return bool((mask[:, 1:].long() > mask[:, :-1].long()).any())


@cache
def _parameters(kind: Any) -> tuple[frozenset[str], bool]:
    parameters = inspect.signature(kind.forward).parameters.values()
    names = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} - {
        "self"
    }
    return frozenset(names), any(p.kind is p.VAR_KEYWORD for p in parameters)


def takes(model: nn.Module, name: str) -> bool:
    """Whether a model's forward has a parameter of that name."""
    kind: Any = type(model)
    return name in _parameters(kind)[0]


@cache
def _shared_keywords() -> frozenset[str]:
    from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
    from transformers.utils.generic import TransformersKwargs

    # Names only: their annotations mention things those modules import for type checkers alone.
    shared = {*TransformersKwargs.__annotations__, *FlashAttentionKwargs.__annotations__}
    return frozenset(
        {*shared, "output_attentions", "output_hidden_states", "return_dict", "use_cache"}
    )


def takes_positions(model: nn.Module) -> bool:
    """Whether position ids can and should be passed with a left-padded mask.

    Models whose positions start behind the padding index (RoBERTa) derive them from the ids themselves.
    """
    kind: Any = type(model)  # to mypy, a class of modules is not hashable
    names, _ = _parameters(kind)
    return "position_ids" in names and not any(
        getattr(module, "padding_idx", None) is not None and "position" in path
        for path, module in model.named_modules()
    )


def first_position(model: nn.Module) -> int:
    """Where a model starts counting: 0, unless it keeps its positions and they start elsewhere (MRA)."""
    for module in model.modules():
        held = module._buffers.get("position_ids")
        if held is not None and held.numel() and held.device.type != "meta":
            return int(held.flatten()[0])
    return 0


def check_keywords(model: nn.Module, given: dict[str, Any]) -> None:
    """Refuse keywords that would vanish in the model's ``**kwargs``."""
    if not given:
        return
    kind: Any = type(model)
    names, takes_any = _parameters(kind)
    unknown = [name for name in given if name not in names]
    if takes_any:
        unknown = [name for name in unknown if name not in _shared_keywords()]
    if unknown:
        near = get_close_matches(unknown[0], sorted({*names, *_shared_keywords()}), n=3)
        raise InputError(
            f"unknown argument {unknown[0]!r}: neither the bridge nor {type(model).__name__}.forward knows it"
            + (f"; did you mean {', '.join(near)}?" if near else "")
        )


def _as_mask(mask: Any, shape: Any) -> Tensor | None:
    if mask is None:
        return None
    mask = torch.as_tensor(mask)
    if mask.dim() == 1:
        mask = mask[None]
    if mask.dim() == 2 and mask.dtype == torch.bool:
        mask = mask.long()
    if mask.dim() == 2 and (mask.shape[0] != shape[0] or mask.shape[1] < shape[1]):
        raise InputError(f"attention_mask has shape {list(mask.shape)} but the input {list(shape)}")
    return mask


def is_text(value: Any) -> bool:
    """Whether an input is a string or a list of strings.

    Raises:
        InputError: An empty list, or one of text and other things.
    """
    if isinstance(value, str):
        return True
    if not isinstance(value, (list, tuple)):
        return False
    if not value:
        raise InputError("an empty list was given; give at least one string or token id")
    texts = [isinstance(item, str) for item in value]
    if any(texts) and not all(texts):
        raise InputError("a list of inputs must be all text or all token ids")
    return all(texts)
