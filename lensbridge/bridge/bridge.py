"""TransformerBridge: a Hugging Face model and the names of the places in it."""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..hooks import HookRegistry, InputError, LensError
from ..hooks.registry import Selection
from . import boot
from .architecture import Architecture, Tower
from .composition import Composition
from .config import BridgeConfig, read_config
from .example import FAILURES, examples
from .fold import Processing
from .generate import Generation
from .infer import architecture_of
from .inputs import Inputs, is_encoder_decoder, prepare
from .listening import Hooks, Listening
from .past import with_copied_past
from .points import build_registry
from .ranks import check_whole
from .record import frozen, record_run, whereabouts
from .run import RETURN_TYPES, Stack, lm_loss, logits_of
from .seen import first_item
from .slicing import SliceInput
from .state import ModelState
from .text import TextMethods
from .tokens import PaddingSide
from .verify import Verification, verify_run, verify_tower
from .view import belongs, outline

_Self = TypeVar("_Self", bound="TransformerBridge")


class TransformerBridge(ModelState, Listening, Composition, TextMethods, Generation, Processing):
    """A Hugging Face model with canonical, named hook points.

    Nothing in the model is wrapped, replaced or copied. With no hook set, calling the bridge runs exactly the
    code that calling the model runs; while hooks are set, PyTorch hooks sit on the modules concerned and
    nowhere else; afterwards the model is as it was.

    Args:
        model: A loaded transformers model (compiled, quantised or dispatched ones too).
        tokenizer: Its tokenizer; without one, text is refused and token ids work.
        processor: What turns images or sound into the model's inputs; see `prepare_multimodal_inputs`. Its
            tokenizer is used unless one is given.
        example: Keywords of the model's forward to tell its parts by. Needed only for models, or towers of
            them, whose input cannot be made up; an input of the real kind is best, a small one is enough.
    Raises:
        ArchitectureError: The model's layers could not be found, or are not all in this process.

    Example::

        bridge = TransformerBridge(model, tokenizer)
        logits, cache = bridge.run_with_cache("The capital of France is")
        cache["pattern", 0]                     # [batch, head, query, key]
        with bridge.hooks(fwd_hooks=[("blocks.0.hook_out", lambda x, hook: 0 * x)]):
            bridge("The capital of France is")
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        processor: Any = None,
        example: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(
                f"TransformerBridge wraps a loaded model, got {type(model).__name__}; to load one by "
                "name use TransformerBridge.boot_transformers(name)"
            )
        self.original_model = model
        inner = model._modules.get("_orig_mod")  # what torch.compile(model) keeps inside
        self._inner: nn.Module = model if inner is None else inner
        check_whole(self._inner)
        self.architecture: Architecture = architecture_of(self._inner, example)
        self.registry: HookRegistry = build_registry(self._inner, self.architecture)
        self.registry.owner.bridge = weakref.ref(self)
        self.cfg: BridgeConfig = read_config(self._inner, self.architecture)
        self._stack = Stack(model, self._inner, self.registry, self.architecture)
        embed = self.architecture.main.embed
        self._entry = self._inner if embed is None else self._inner.get_submodule(embed)
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", None) if tokenizer is None else tokenizer
        self._given = example

    # --- getting one -----------------------------------------------------------------------------

    @classmethod
    def boot_transformers(
        cls: type[_Self],
        model_name: str | os.PathLike[str],
        hf_config_overrides: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        tokenizer: Any = None,
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
    ) -> _Self:
        """Load a checkpoint by name or path and wrap it.

        Args:
            model_name: Hub name or local folder.
            hf_config_overrides: Values to set in the Hugging Face config before the model is built.
            device: Where to put the model; not together with ``device_map`` or ``n_devices``.
            dtype: Parameter dtype; float32 unless given.
            tokenizer: Use this one instead of the checkpoint's.
            load_weights: False builds the model with random weights, from the config alone.
            trust_remote_code: Run code that comes with the checkpoint.
            model_class: The transformers class to load with; found from the config unless given.
            hf_model: A loaded model to wrap as it is; then nothing is loaded.
            device_map: Where to put which part, as in accelerate.
            max_memory: How much of which device to use, as in accelerate.
            n_devices: Balance the layers over this many CUDA devices.
            n_ctx: Context length to set in the config.
            revision: Branch, tag or commit.
            checkpoint_index: Which training checkpoint, for families that publish them; -1 is the last.
            checkpoint_value: The same by training step.
            **hf_kwargs: Passed to ``from_pretrained``: ``config``, ``attn_implementation``...
        Raises:
            InputError: Arguments that exclude each other.
        """
        model, tokenizer, processor = boot.load(
            os.fspath(model_name),
            hf_config_overrides=hf_config_overrides,
            device=device,
            dtype=dtype,
            tokenizer=tokenizer,
            load_weights=load_weights,
            trust_remote_code=trust_remote_code,
            model_class=model_class,
            hf_model=hf_model,
            device_map=device_map,
            n_devices=n_devices,
            max_memory=max_memory,
            n_ctx=n_ctx,
            revision=revision,
            checkpoint_index=checkpoint_index,
            checkpoint_value=checkpoint_value,
            **hf_kwargs,
        )
        return cls(model, tokenizer, processor)

    from_pretrained = boot_transformers

    @classmethod
    def boot_native(
        cls: type[_Self],
        config: BridgeConfig | Mapping[str, Any],
        tokenizer: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> _Self:
        """A small new model with random weights; see `lensbridge.bridge.boot.native`.

        Args:
            config: Sizes; a mapping is turned into a `BridgeConfig`.
            tokenizer: Optional.
            device: Overrides that of the config.
            dtype: Overrides that of the config.
        """
        cfg = config if isinstance(config, BridgeConfig) else BridgeConfig(**config)
        model = boot.native(cfg)
        return cls(model.to(device=device, dtype=dtype), tokenizer)

    def __deepcopy__(self, memo: dict[int, Any]) -> TransformerBridge:
        model = copy.deepcopy(self.original_model, memo)
        return type(self)(model, self.tokenizer, self.processor, self._given)

    def __reduce__(self) -> tuple[Any, ...]:
        given = self.original_model, self.tokenizer, self.processor, self._given
        return type(self), given

    def __repr__(self) -> str:
        c = self.cfg
        known = (
            f"{c.n_layers} layers",
            c.d_model and f"d_model {c.d_model}",
            c.n_heads and f"{c.n_heads} heads",
            c.d_vocab and f"vocabulary {c.d_vocab}",
        )
        sizes = ", ".join(text for text in known if text)
        return f"TransformerBridge({c.architecture}: {sizes}; {len(self.registry)} hook points)"

    def __str__(self) -> str:
        unproved = self.architecture.unproved
        note = f"\nnot watched: {unproved}" if unproved else ""
        return f"{self!r}{note}\n{outline(self.registry, self.architecture)}"

    # --- proving ---------------------------------------------------------------------------------

    @torch.no_grad()
    def verify(self, tokens: Int[Tensor, "batch pos"] | None = None, **inputs: Any) -> Verification:
        """Check on one run that every name means what it says; ``print(bridge.verify())``.

        Towers that this run does not pass (the vision tower of a model run on text) are run by themselves.

        Args:
            tokens: Ids to run on.
            **inputs: Other keywords for the model's forward; without any input a small one is made.
        Returns:
            Every identity with its error.
        """
        if tokens is not None:
            inputs["input_ids"] = tokens
        if not inputs:
            inputs = self._example()
        inputs = {
            name: value.to(self.device) if isinstance(value, Tensor) and self.device else value
            for name, value in inputs.items()
        }
        alone = [tower for tower in self.architecture.towers if tower.root]
        reached = self._reached(inputs, alone)
        elsewhere = [tower for tower in alone if tower not in reached]
        names = [
            name for name in self.registry if not any(belongs(name, tower) for tower in elsewhere)
        ]
        checks = verify_run(
            self._inner,
            self.architecture,
            self.registry,
            lambda: first_item(self._stack.call(inputs)),
            names,
        )
        for tower in elsewhere:
            checks += verify_tower(self._inner, self.architecture, self.registry, tower)
        return Verification(tuple(checks))

    def _example(self) -> dict[str, Any]:
        if self._given is not None:
            return dict(self._given)
        reasons: list[str] = []
        for given in examples(self._inner, self.device or "cpu"):
            try:
                self._stack.call(given)
            except FAILURES as error:
                reasons.append(f"{', '.join(given)}: {error}")
                continue
            return given
        raise InputError(
            f"no example input is known on which {type(self._inner).__name__} runs; pass the keywords of "
            f"its forward to verify() ({'; '.join(reasons)[:300]})"
        )

    def _reached(self, inputs: dict[str, Any], towers: list[Tower]) -> list[Tower]:
        """Those of some towers whose layers a run passes."""
        firsts = {f"{tower.prefix}blocks.0.hook_in": tower for tower in towers}
        wanted = {name for name in firsts if name in self.registry}
        if not wanted:
            return []
        run = lambda: self._stack.call(inputs)  # noqa: E731
        _, cache = record_run(self.registry, run, names_filter=wanted.__contains__)
        return [firsts[name] for name in wanted if name in cache]

    # --- running ---------------------------------------------------------------------------------

    def prepare(
        self,
        input: Any = None,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        attention_mask: Any = None,
        **hf_kwargs: Any,
    ) -> Inputs:
        """What `forward` makes of an input before it runs: ``bridge(**bridge.prepare(text).kwargs)``.

        Args:
            input: As in `forward`.
            prepend_bos: As in `forward`.
            padding_side: As in `forward`.
            attention_mask: As in `forward`.
            **hf_kwargs: As in `forward`.
        Returns:
            Keywords for the model's forward (``kwargs``), the ids (``tokens``) and the mask of real ones
            (``mask``; None where all are), [batch, pos].
        """
        return prepare(
            self._inner,
            self._tokens,
            input,
            device=self.device,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            attention_mask=attention_mask,
            **hf_kwargs,
        )

    def forward(
        self,
        input: Any = None,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        attention_mask: Any = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
        **hf_kwargs: Any,
    ) -> Any:
        """Run the model.

        Args:
            input: A string, a list of strings, token ids ([pos] or [batch, pos]), embeddings
                ([batch, pos, d_model]), or, with ``start_at_layer``, the residual stream entering that layer.
            return_type: ``"logits"`` [batch, pos, d_vocab]; ``"loss"``, the mean next-token loss in nats;
                ``"both"``, a pair of the two; ``"predictions"``, the likeliest next token as text; None.
            loss_per_token: Losses [batch, pos - 1] instead of the mean.
            prepend_bos: Whether text gets a BOS token; None follows ``cfg.default_prepend_bos``.
            padding_side: Where shorter texts are padded; None follows the tokenizer.
            attention_mask: 1 at real tokens, for token ids. Where it shows padding in front, position ids
                follow it.
            start_at_layer: Skip the layers before this one.
            stop_at_layer: Run nothing from this layer on and return the residual stream entering it,
                [batch, pos, d_model]. Negative counts from the end; ``n_layers`` is behind the last layer.
            tokens: The ids behind ``input`` when that is embeddings or a residual stream, for the loss.
            **hf_kwargs: Anything the Hugging Face forward takes.
        Returns:
            What ``return_type`` says; with ``stop_at_layer``, the residual stream.
        Raises:
            InputError: An input or argument that cannot be used.
            LayerRangeError: A layer this model does not have.
        """
        return self._forward(
            input,
            return_type=return_type,
            loss_per_token=loss_per_token,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            attention_mask=attention_mask,
            start_at_layer=start_at_layer,
            stop_at_layer=stop_at_layer,
            tokens=tokens,
            **hf_kwargs,
        )

    __call__ = forward

    def _forward(
        self,
        input: Any = None,
        *,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        attention_mask: Any = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
        told: Callable[[Inputs], None] | None = None,
        **hf_kwargs: Any,
    ) -> Any:
        """`forward`, which tells what was run as well."""
        if return_type not in RETURN_TYPES:
            raise InputError(f"return_type must be one of {RETURN_TYPES}, got {return_type!r}")
        start = (
            None if start_at_layer is None else self._stack.layer(start_at_layer, "start_at_layer")
        )
        stop = None if stop_at_layer is None else self._stack.layer(stop_at_layer, "stop_at_layer")
        if start is not None:
            self._check_residual(input)
            if stop is not None and stop < start:
                raise InputError(f"stop_at_layer={stop} comes before start_at_layer={start}")
        # A copy: some models scale what they embed in place.
        value = input if start is None else input.detach().clone()
        if start is not None and is_encoder_decoder(self._inner):
            self._enter_decoder(value, hf_kwargs)
            value = None
        inputs = self.prepare(value, prepend_bos, padding_side, attention_mask, **hf_kwargs)
        if tokens is not None:
            inputs.tokens = tokens
        if told is not None:
            told(inputs)
        out = self._run(inputs, input, start, stop)
        return out if stop is not None else self._answer(out, inputs, return_type, loss_per_token)

    def _enter_decoder(self, residual: Tensor, given: dict[str, Any]) -> None:
        """Prepare a run that enters a decoder late: its stream is given, the encoder's side must be."""
        if not {"encoder_outputs", "input_ids", "inputs_embeds"} & set(given):
            raise InputError(
                "start_at_layer enters the decoder: say what it attends to, as encoder_outputs= or input_ids="
            )
        if "decoder_input_ids" not in given:
            given.setdefault("decoder_inputs_embeds", residual)

    def _run(self, inputs: Inputs, residual: Any, start: int | None, stop: int | None) -> Any:
        if start is not None and start == stop:
            return residual
        try:
            if start is not None:
                if start:  # the skipped layers would be left behind the others
                    inputs.kwargs = with_copied_past(inputs.kwargs)
                with self._stack.entered_at(start, residual):
                    return self._go(inputs, stop)
            return self._go(inputs, stop)
        except (IndexError, RuntimeError) as error:
            self._explain(error, inputs)
            raise

    def _explain(self, error: Exception, inputs: Inputs) -> None:
        """Where a lookup of tokens or positions failed, say which token or length it was."""
        if inputs.tokens is None or isinstance(error, LensError):
            return
        self._tokens.check_ids(inputs.tokens)
        n_ctx, length = self.cfg.n_ctx, inputs.tokens.shape[1]
        if self.architecture.main.pos_embed is not None and n_ctx is not None and length > n_ctx:
            raise InputError(
                f"{length} tokens are more than the {n_ctx} this model has positions for"
            ) from error

    def _go(self, inputs: Inputs, stop: int | None) -> Any:
        if stop is None:
            return self._stack.call(inputs.kwargs)
        return self._stack.call_until(stop, inputs.kwargs)

    def _check_residual(self, residual: Any) -> None:
        wanted = f"[batch, pos, {self.cfg.d_model}]"
        if not isinstance(residual, Tensor) or not residual.is_floating_point():
            raise InputError(
                f"start_at_layer takes the residual stream entering that layer, {wanted}, "
                f"got {type(residual).__name__}"
            )
        if residual.dim() != 3 or residual.shape[-1] != self.cfg.d_model:
            raise InputError(f"the residual stream has shape {wanted}, got {list(residual.shape)}")

    def _answer(self, out: Any, inputs: Inputs, return_type: str | None, per_token: bool) -> Any:
        if return_type is None:
            return None
        logits = logits_of(out, self.original_model)
        if return_type == "logits":
            return logits
        if return_type == "predictions":
            return self._predictions(logits, inputs)
        if inputs.tokens is None:
            raise InputError(
                f"return_type={return_type!r} needs the token ids, and the input was not tokens; "
                "pass them as tokens="
            )
        loss = lm_loss(logits, inputs.tokens, inputs.mask, per_token=per_token)
        return loss if return_type == "loss" else (logits, loss)

    def _predictions(self, logits: Tensor, inputs: Inputs) -> str | list[str]:
        rows = torch.arange(len(logits), device=logits.device)
        last = torch.full_like(rows, logits.shape[1] - 1)
        if inputs.mask is not None:
            where = torch.arange(logits.shape[1], device=logits.device)
            last = (where * inputs.mask.to(logits.device)).argmax(-1)
        text = self._tokens.to_string(logits[rows, last].argmax(-1)[:, None])
        return text[0] if len(text) == 1 else text

    def run_with_cache(
        self,
        input: Any = None,
        *args: Any,
        names_filter: Selection = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        pos_slice: SliceInput = None,
        return_cache_object: bool = True,
        return_type: str | None = "logits",
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run and keep what the points show.

        Args:
            input: As in `forward`.
            *args: Further positional arguments of `forward`, from ``return_type`` on.
            names_filter: What to keep: None for every point except those that multiply memory by the
                number of heads, or a name, alias, glob, predicate on names, or a list of these.
            device: Where to keep the tensors.
            remove_batch_dim: Drop the batch dimension of the cached tensors (one row only).
            incl_bwd: Differentiate the loss and keep gradients as ``<name>_grad``; needs
                ``return_type="loss"``. No parameter's ``.grad`` is touched.
            pos_slice: Positions to keep.
            return_cache_object: False gives a plain dictionary.
            return_type: As in `forward`.
            **kwargs: As in `forward`.
        Returns:
            What `forward` returns, and the `ActivationCache`, in the order the model produced it.
        Raises:
            UnknownPointError, AbsentPointError: A filter that selects nothing.
            HookNotFiredError: A point asked for by name that the run did not pass.
        """
        if args:
            if len(args) > 1:
                raise InputError(
                    "run_with_cache takes input and return_type by position, the rest by name"
                )
            return_type = args[0]
        backward: Callable[[Any], Tensor] | None = None
        if incl_bwd:
            if return_type not in ("loss", "both") or kwargs.get("loss_per_token"):
                raise InputError(
                    "incl_bwd=True differentiates the loss: pass return_type='loss' (or 'both'), "
                    f"without loss_per_token; got return_type={return_type!r}"
                )

            def backward(out: Any) -> Tensor:
                return out if return_type == "loss" else out[1]

        ran: list[Inputs] = []

        def run() -> Any:
            return self._forward(input, return_type=return_type, told=ran.append, **kwargs)

        with frozen(self._inner) if incl_bwd else nullcontext():
            out, cache = record_run(
                self.registry,
                run,
                names_filter=names_filter,
                device=device,
                pos_slice=pos_slice,
                backward=backward,
            )
        cache.tokens, cache.mask = whereabouts(ran[-1], pos_slice, device)
        if remove_batch_dim:
            cache.remove_batch_dim()
        return out, cache if return_cache_object else cache.cache_dict

    def run_with_hooks(
        self,
        input: Any = None,
        *args: Any,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run with hooks set for this run.

        Args:
            input: As in `forward`.
            *args: Further positional arguments of `forward`, from ``return_type`` on.
            fwd_hooks: Pairs (name or filter, ``fn(tensor, hook)``); a returned tensor replaces the value.
            bwd_hooks: Pairs (name or filter, ``fn(grad, hook)``). They belong to this run's graph and fire
                when it is differentiated, also after this call has returned.
            reset_hooks_end: False leaves the hooks set, until `reset_hooks`.
            clear_contexts: Empty the points' ``ctx`` afterwards.
            **kwargs: As in `forward`.
        Returns:
            What `forward` returns.
        Raises:
            HookNotFiredError: A forward hook's point was not reached (unless the run was stopped before it).
        """
        if reset_hooks_end:
            with self.hooks(fwd_hooks, bwd_hooks, clear_contexts=clear_contexts):
                return self.forward(input, *args, **kwargs)
        fwd_hooks, bwd_hooks = list(fwd_hooks), list(bwd_hooks)
        # Resolve all names before anything is set.
        with self.hooks(fwd_hooks, bwd_hooks):
            pass
        for dir, pairs in (("fwd", fwd_hooks), ("bwd", bwd_hooks)):
            for name, fn in pairs:
                self.add_hook(name, fn, dir)
        return self.forward(input, *args, **kwargs)
