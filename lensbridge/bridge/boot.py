"""Getting a model: from a checkpoint through transformers, or small and new from a BridgeConfig."""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

import torch
from torch import nn

from ..hooks import InputError
from .config import BridgeConfig

_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


def load(
    name_or_path: str,
    *,
    hf_config_overrides: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: Any = None,
    config: Any = None,
    load_weights: bool = True,
    trust_remote_code: bool = False,
    model_class: Any = None,
    hf_model: nn.Module | None = None,
    device_map: Any = None,
    n_devices: int | None = None,
    max_memory: dict[Any, Any] | None = None,
    n_ctx: int | None = None,
    revision: str | None = None,
    checkpoint_index: int | None = None,
    checkpoint_value: int | None = None,
    **hf_kwargs: Any,
) -> tuple[nn.Module, Any, Any]:
    """Load a model, its tokenizer, and the processor of one that sees or hears.

    The arguments are those of `TransformerBridge.boot_transformers`.
    """
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    placed = [
        name for name, v in (("device_map", device_map), ("n_devices", n_devices)) if v is not None
    ]
    if device is not None and placed:
        raise InputError(f"give device or {placed[0]}, not both")
    if hf_model is not None:
        clash = {
            "config": config,
            "hf_config_overrides": hf_config_overrides,
            "load_weights": None if load_weights else False,
            "model_class": model_class,
            "device_map": device_map,
            "n_devices": n_devices,
            "max_memory": max_memory,
            "n_ctx": n_ctx,
            "revision": revision,
            "checkpoint_index": checkpoint_index,
            "checkpoint_value": checkpoint_value,
            **hf_kwargs,
        }
        given = [name for name, value in clash.items() if value is not None]
        if given:
            raise InputError(f"{given[0]} cannot be applied to hf_model, which is used as it is")
        model = (
            hf_model
            if device is None and dtype is None
            else hf_model.to(device=device, dtype=dtype)
        )
        return model, tokenizer, None
    if device is not None:
        device = torch.device(device)
    revision = _revision(name_or_path, revision, checkpoint_index, checkpoint_value)
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    hub = {name: value for name, value in hub.items() if value is not None}
    if config is None or isinstance(config, (str, os.PathLike)):
        config = AutoConfig.from_pretrained(config or name_or_path, **hub)
    else:
        config = copy.deepcopy(config)  # the overrides are not for the caller's
    for name, value in (hf_config_overrides or {}).items():
        setattr(config, name, value)
    if n_ctx is not None:
        _set_context(config, n_ctx)
    kind = model_class or _auto_class(config)
    if load_weights:
        if n_devices is not None:
            device_map, max_memory = _balance(n_devices, max_memory)
        model = kind.from_pretrained(
            name_or_path,
            config=config,
            dtype=dtype or torch.float32,
            **({} if device_map is None else {"device_map": device_map}),
            **({} if max_memory is None else {"max_memory": max_memory}),
            **hub,
            **hf_kwargs,
        )
    else:
        if placed:
            raise InputError(f"{placed[0]} needs weights to place; leave out load_weights=False")
        build = kind.from_config if hasattr(kind, "from_config") else kind._from_config
        model = build(config, dtype=dtype or torch.float32, **hf_kwargs)
    if device is not None:
        model = model.to(device)
    processor = None
    if _sees_or_hears(model):
        processor = _load_if_there(transformers.AutoProcessor, name_or_path, hub)
    if tokenizer is None:
        tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None and getattr(model, "main_input_name", "input_ids") == "input_ids":
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **hub)
    return model.eval(), tokenizer, processor


def _sees_or_hears(model: nn.Module) -> bool:
    return getattr(model, "main_input_name", "input_ids") != "input_ids" or any(
        hasattr(getattr(model, "config", None), f"{sense}_config") for sense in ("vision", "audio")
    )


def _load_if_there(kind: Any, name_or_path: str, hub: dict[str, Any]) -> Any:
    """A processor, or None where the checkpoint has none or a library for it is missing."""
    try:
        return kind.from_pretrained(name_or_path, **hub)
    except (OSError, ValueError, ImportError) as error:
        warnings.warn(
            f"{name_or_path} is wrapped without a processor ({str(error)[:200]}); text works, images and "
            "sound need bridge.processor to be set",
            stacklevel=4,
        )
        return None


def _auto_class(config: Any) -> Any:
    """The Auto class that builds a language model of this configuration, most specific first."""
    import transformers

    for name in (
        "CausalLM",
        "Seq2SeqLM",
        "MaskedLM",
        "ImageTextToText",
        "SpeechSeq2Seq",
        "CTC",
        "ImageClassification",
    ):
        auto = getattr(transformers, f"AutoModelFor{name}")
        if type(config) in auto._model_mapping:
            return auto
    return transformers.AutoModel


def _set_context(config: Any, n_ctx: int) -> None:
    text = config.get_text_config()
    for name in _CONTEXT_FIELDS:
        if getattr(text, name, None) is not None:
            setattr(text, name, n_ctx)
            return
    raise InputError(
        f"n_ctx={n_ctx}: {type(text).__name__} has no context length (tried {', '.join(_CONTEXT_FIELDS)})"
    )


def _balance(n_devices: int, max_memory: dict[Any, Any] | None) -> tuple[str, dict[Any, Any]]:
    available = torch.cuda.device_count()
    if not 1 <= n_devices <= available:
        raise InputError(f"n_devices={n_devices}, but {available} CUDA devices are here")
    if max_memory is None:
        max_memory = {i: torch.cuda.get_device_properties(i).total_memory for i in range(n_devices)}
    return "balanced", max_memory


# Families that publish training checkpoints as revisions: prefix of the name, steps, name of a revision.
_CHECKPOINTS = (
    ("EleutherAI/pythia", (0, *(2**i for i in range(10)), *range(1000, 143001, 1000)), "step{}"),
    (
        "stanford-crfm/",
        (
            *range(0, 100, 10),
            *range(100, 2000, 50),
            *range(2000, 20000, 100),
            *range(20000, 400001, 1000),
        ),
        "checkpoint-{}",
    ),
)


def _revision(name: str, revision: str | None, index: int | None, value: int | None) -> str | None:
    if index is None and value is None:
        return revision
    if revision is not None or (index is not None and value is not None):
        raise InputError("give one of revision, checkpoint_index and checkpoint_value")
    for prefix, steps, form in _CHECKPOINTS:
        if not name.startswith(prefix):
            continue
        if index is not None and -len(steps) <= index < len(steps):
            return form.format(steps[index])
        if value in steps:
            return form.format(value)
        asked = f"checkpoint_value={value}" if index is None else f"checkpoint_index={index}"
        raise InputError(
            f"{asked} is not one of the {len(steps)} published steps, {steps[0]} to {steps[-1]}"
        )
    raise InputError(
        f"{name} is not known to publish checkpoints (known: "
        f"{', '.join(prefix for prefix, _, _ in _CHECKPOINTS)}); name the revision instead"
    )


def native(config: BridgeConfig) -> nn.Module:
    """A new, randomly initialised Hugging Face model of the given sizes.

    Learned positions with LayerNorm make a GPT-2, rotary positions with RMSNorm and a gated MLP a Llama.
    The caller's random state is left as it was; the same ``seed`` gives the same weights.

    Raises:
        InputError: A size is missing, or no Hugging Face model combines the options.
    """
    missing = [name for name in ("n_heads", "d_vocab", "n_ctx") if getattr(config, name) is None]
    if missing:
        raise InputError(f"boot_native needs {', '.join(missing)} in the BridgeConfig")
    if config.d_model % config.n_heads:  # type: ignore[operator]
        raise InputError(f"d_model={config.d_model} is not a multiple of n_heads={config.n_heads}")
    norm = config.normalization_type or "RMS"
    positions = config.positional_embedding_type or ("standard" if norm == "LN" else "rotary")
    build = {("LN", "standard"): _gpt2, ("RMS", "rotary"): _llama}.get((norm, positions))
    if build is None:
        raise InputError(
            f"normalization_type={norm!r} with positional_embedding_type={positions!r}: boot_native makes "
            "'LN' with 'standard' (a GPT-2) or 'RMS' with 'rotary' (a Llama)"
        )
    if config.parallel_attn_mlp:
        raise InputError(
            "parallel_attn_mlp=True: boot_native makes models with one branch after the other"
        )
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices):
        torch.manual_seed(0 if config.seed is None else config.seed)
        model = build(config)
    return model.to(device=config.device, dtype=config.dtype).eval()


def _gpt2(config: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    if config.gated_mlp or config.n_key_value_heads not in (None, config.n_heads):
        raise InputError(
            "a native model with learned positions has a plain MLP and ungrouped heads"
        )
    if config.d_head not in (None, config.d_model // config.n_heads):
        raise InputError(
            f"d_head={config.d_head}: with learned positions a head has d_model / n_heads = "
            f"{config.d_model // config.n_heads}"
        )
    made = GPT2Config(
        vocab_size=config.d_vocab,
        n_positions=config.n_ctx,
        n_embd=config.d_model,
        n_layer=config.n_layers,
        n_head=config.n_heads,
        n_inner=config.d_mlp,
        activation_function=config.act_fn or "gelu_new",
        layer_norm_epsilon=config.eps or 1e-5,
        initializer_range=config.initializer_range,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(made)


def _llama(config: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    if config.gated_mlp is False:
        raise InputError("a native model with rotary positions has a gated MLP")
    made = LlamaConfig(
        vocab_size=config.d_vocab,
        max_position_embeddings=config.n_ctx,
        hidden_size=config.d_model,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_key_value_heads or config.n_heads,
        head_dim=config.d_head or config.d_model // config.n_heads,
        intermediate_size=config.d_mlp or 4 * config.d_model,
        hidden_act=config.act_fn or "silu",
        rms_norm_eps=config.eps or 1e-5,
        initializer_range=config.initializer_range,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(made)
