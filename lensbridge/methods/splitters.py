"""Splitters: activations where a model is cut in two, one row for each token, word, sentence or text."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..bridge import TransformerBridge
from ..hooks import InputError, LayerRangeError, UnknownPointError
from .concept_gradients import ConceptGradients
from .granularity import Aggregation, Granularity, Sample, groups_of, rows_of, samples_of

Activations = Tensor | list[Tensor]


class BaseSplitter:
    """A model and the places it is split at.

    Args:
        model: A repo id or folder, a loaded model, or a bridge.
        split_points: Places: layer indices (the layer's output; negative from the end), hook points, or paths
            of modules (their output).
        tokenizer: Its tokenizer; a checkpoint and a bridge bring their own. It is not changed.
        automodel: The transformers class to load a checkpoint with.
        config: The configuration to load it with.
        batch_size: How many texts run together.
        device_map: Where to put the model: for a checkpoint as in accelerate, for a model a device.
        **kwargs: Passed to ``from_pretrained``.
    Raises:
        InputError: No tokenizer, or arguments that exclude each other.
        UnknownPointError, AbsentPointError, LayerRangeError: A split point that is not there.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module | TransformerBridge,
        split_points: Sequence[int | str],
        *,
        tokenizer: Any = None,
        automodel: Any = None,
        config: Any = None,
        batch_size: int = 1,
        device_map: Any = None,
        **kwargs: Any,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size is at least 1, got {batch_size}")
        self.bridge = self._wrapped(model, tokenizer, automodel, config, device_map, kwargs)
        if self.bridge.tokenizer is None:
            raise InputError("a splitter reads text: give the model's tokenizer as tokenizer=")
        self.batch_size = batch_size
        self._set_split_points(split_points)

    @staticmethod
    def _wrapped(
        model: Any,
        tokenizer: Any,
        automodel: Any,
        config: Any,
        device_map: Any,
        kwargs: dict[str, Any],
    ) -> TransformerBridge:
        if isinstance(model, (str, os.PathLike)):
            if config is not None:
                kwargs["config"] = config
            return TransformerBridge.boot_transformers(
                model, tokenizer=tokenizer, model_class=automodel, device_map=device_map, **kwargs
            )
        if kwargs or automodel is not None or config is not None:
            raise InputError(
                f"{', '.join([*kwargs, 'automodel', 'config'])} are for loading; this model is loaded already"
            )
        if device_map == "auto":
            raise InputError(
                "device_map='auto' places what is being loaded; give a repo id, or a device"
            )
        if isinstance(model, TransformerBridge):
            bridge = model
            if tokenizer is not None:
                bridge.tokenizer = tokenizer
        elif isinstance(model, nn.Module):
            bridge = TransformerBridge(model, tokenizer)
        else:
            raise TypeError(
                f"a splitter takes a repo id, a loaded model or a bridge, got {type(model).__name__}"
            )
        return bridge if device_map is None else bridge.to(device_map)

    # --- where -----------------------------------------------------------------------------------

    def _set_split_points(self, split_points: Sequence[int | str]) -> None:
        if not split_points:
            raise InputError(
                "give at least one split point: a layer, a hook point, or a module's path"
            )
        self._points = {self._name(point): self._point(point) for point in split_points}

    @staticmethod
    def _name(split_point: int | str) -> str:
        return str(split_point)

    def _point(self, split_point: Any) -> str:
        """The hook point behind a split point."""
        bridge = self.bridge
        blocks = bridge.architecture.blocks
        if isinstance(split_point, int) and not isinstance(split_point, bool):
            if not -len(blocks) <= split_point < len(blocks):
                raise LayerRangeError(
                    f"layer {split_point} is not one of this model's {len(blocks)} (0 to {len(blocks) - 1})"
                )
            return f"{bridge.registry.layers}.{split_point % len(blocks)}.hook_out"
        if not isinstance(split_point, str):
            raise InputError(
                f"a split point is a layer, a hook point or a module's path, got {split_point!r}"
            )
        paths = {block.path: index for index, block in enumerate(blocks)}
        if split_point in paths:
            return f"{bridge.registry.layers}.{paths[split_point]}.hook_out"
        try:
            return str(bridge.registry[split_point].name)
        except UnknownPointError:
            raw = f"raw:{split_point}.hook_out"
            if split_point not in dict(bridge.original_model.named_modules()):
                raise
            return str(bridge.registry[raw].name)

    @property
    def _stop(self) -> int | None:
        """The layer before which the model can stop; None where it must run on."""
        layers = [self._layer(name) for name in self._points.values()]
        known = [layer for layer in layers if layer is not None]
        return max(known) + 1 if len(known) == len(layers) else None

    def _layer(self, name: str) -> int | None:
        start = f"{self.bridge.registry.layers}."
        if name.startswith(start):
            return int(name.removeprefix(start).split(".")[0])
        path = name.removeprefix("raw:")
        inside = (
            index
            for index, block in enumerate(self.bridge.architecture.blocks)
            if path.startswith(block.path + ".")
        )
        return next(inside, None)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, as it was given."""
        return self.bridge.tokenizer

    @property
    def model(self) -> nn.Module:
        """The Hugging Face model."""
        return self.bridge.original_model

    @property
    def _classifies(self) -> bool:
        """Whether the model's logits are classes of a whole text."""
        return "ForSequenceClassification" in type(self.model).__name__

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Leave the parameters out of graphs, so that no backward pass touches their ``.grad``."""
        trained = [p for p in self.bridge.parameters() if p.requires_grad]
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    @property
    def device(self) -> torch.device | None:
        """Where the model takes its input."""
        return self.bridge.device

    # --- input -----------------------------------------------------------------------------------

    def samples(self, inputs: Any) -> list[Sample]:
        """Inputs as the model reads them.

        Raises:
            InputError: Not a list of texts, ids, or what a tokenizer returns.
        """
        tokenizer = self.tokenizer
        if isinstance(inputs, str):
            inputs = [inputs]
        if isinstance(inputs, Mapping):
            return self._given(inputs["input_ids"], inputs.get("attention_mask"))
        if isinstance(inputs, Tensor):
            return self._given(inputs, None)
        if not isinstance(inputs, (list, tuple)) or not all(isinstance(x, str) for x in inputs):
            raise InputError(
                "inputs are a list of texts, ids [batch, pos], or what a tokenizer returns, got "
                f"{type(inputs).__name__}"
            )
        if not inputs:
            raise InputError("an empty list of texts was given; give at least one")
        limits = [self.bridge.cfg.n_ctx, getattr(tokenizer, "model_max_length", None)]
        return samples_of(
            inputs, tokenizer, min((x for x in limits if x is not None), default=None)
        )

    def _given(self, ids: Any, mask: Any) -> list[Sample]:
        ids = torch.as_tensor(ids)
        if ids.dim() != 2 or ids.is_floating_point():
            raise InputError(
                f"token ids have shape [batch, pos], got {list(ids.shape)} {ids.dtype}"
            )
        real = torch.ones_like(ids) if mask is None else torch.as_tensor(mask)
        special = set(self.tokenizer.all_special_ids)
        rows = [row[keep.bool()].tolist() for row, keep in zip(ids, real, strict=True)]
        return [Sample(tuple(row), tuple(i in special for i in row)) for row in rows]

    def batches(
        self, samples: list[Sample], batch_size: int | None = None, tqdm_bar: bool = False
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Texts of like length together: indices, ids and mask, [batch, pos]."""
        size = self.batch_size if batch_size is None else batch_size
        order = sorted(range(len(samples)), key=lambda i: len(samples[i].ids), reverse=True)
        chunks: Any = [order[start : start + size] for start in range(0, len(order), size)]
        if tqdm_bar:
            from tqdm import tqdm

            chunks = tqdm(chunks, desc="Computing activations", unit="batch")
        left = self.bridge.cfg.default_padding_side == "left"
        pad = self.tokenizer.pad_token_id
        for chunk in chunks:
            width = len(samples[chunk[0]].ids)
            ids = torch.full((len(chunk), width), 0 if pad is None else pad)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(chunk):
                n = len(samples[index].ids)
                span = slice(width - n, width) if left else slice(0, n)
                ids[row, span] = torch.tensor(samples[index].ids)
                mask[row, span] = 1
            yield chunk, ids, mask

    def _run(
        self, ids: Tensor, mask: Tensor, forward_kwargs: Mapping[str, Any], *, to_end: bool = False
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """What the split points show on a batch; and the logits, where the model runs to its end."""
        padding = None if bool(mask.all()) else mask
        given: dict[str, Any] = {"attention_mask": padding, **forward_kwargs}
        stop = None if to_end else self._stop
        with torch.no_grad():
            out, cache = self.bridge.run_with_cache(
                ids,
                names_filter=list(self._points.values()),
                stop_at_layer=stop,
                return_type="logits" if to_end else None,
                **given,
            )
        return {key: cache[name] for key, name in self._points.items()}, out if to_end else None

    # --- activations -----------------------------------------------------------------------------

    def _collect(
        self,
        inputs: Any,
        granularity: Granularity,
        how: Aggregation,
        *,
        flatten: bool,
        tqdm_bar: bool,
        forward_kwargs: Mapping[str, Any] | None,
        device: Any,
        dtype: torch.dtype | None,
        predicts: bool = False,
    ) -> tuple[dict[str, Activations], Any]:
        samples = self.samples(inputs)
        cls_id = self.tokenizer.cls_token_id
        groups = [groups_of(sample, granularity, cls_id) for sample in samples]
        rows: dict[str, list[Any]] = {key: [None] * len(samples) for key in self._points}
        predicted: list[Any] = [None] * len(samples)
        for chunk, ids, mask in self.batches(samples, tqdm_bar=tqdm_bar):
            found, logits = self._run(ids, mask, forward_kwargs or {}, to_end=predicts)
            for key, states in found.items():
                if states.dim() < 3:
                    raise InputError(
                        f"split point {key!r} shows {list(states.shape)}, not [batch, pos, d]"
                    )
                flat = states.flatten(2)
                for row, index in enumerate(chunk):
                    real = flat[row][mask[row].bool().to(flat.device)]
                    made = rows_of(real, groups[index], how)
                    # A copy: a view would keep the whole batch.
                    rows[key][index] = made.to(device=device, dtype=dtype, copy=True)
            if logits is not None:
                for row, index in enumerate(chunk):
                    predicted[index] = logits[row].argmax(-1).cpu()
        acts = {key: torch.cat(found) if flatten else found for key, found in rows.items()}
        if not predicts:
            return acts, None
        if flatten:
            counts = torch.tensor([len(group) for group in groups])
            return acts, torch.stack(predicted).repeat_interleave(counts)
        return acts, predicted

    def _latent_shape(self) -> dict[str, torch.Size]:
        (sample,) = self.samples(["scan"])
        found, _ = self._run(torch.tensor([sample.ids]), torch.ones(1, len(sample.ids)), {})
        return {key: states.shape for key, states in found.items()}


class SplitterForGeneration(BaseSplitter):
    """Activations of a causal language model at one place, token by token.

    Args:
        model_or_repo_id: A repo id or folder, a loaded model, or a bridge.
        split_point: A layer index (its output; negative from the end), a hook point, or a module's path.
        automodel: The transformers class to load a checkpoint with.
        tokenizer: The tokenizer; a checkpoint and a bridge bring their own.
        config: The configuration to load a checkpoint with.
        batch_size: How many texts run together.
        device_map: Where to put the model.
        **kwargs: Passed to ``from_pretrained``.
    Raises:
        TypeError: The model is no causal language model.
        InputError: No tokenizer, or arguments that exclude each other.
        UnknownPointError, AbsentPointError, LayerRangeError: A split point that is not there.

    Example::

        splitter = SplitterForGeneration(model, 4, tokenizer=tokenizer, batch_size=8)
        activations, _ = splitter.get_activations(texts)      # [tokens, d_model]
    """

    def __init__(
        self,
        model_or_repo_id: str | os.PathLike[str] | nn.Module | TransformerBridge,
        split_point: int | str,
        *,
        automodel: Any = None,
        tokenizer: Any = None,
        config: Any = None,
        batch_size: int = 1,
        device_map: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model_or_repo_id,
            [split_point],
            tokenizer=tokenizer,
            automodel=automodel,
            config=config,
            batch_size=batch_size,
            device_map=device_map,
            **kwargs,
        )
        model: Any = self.model
        writes = getattr(model, "can_generate", None)
        if self.bridge.architecture.main.prefix == "decoder_" or not (writes and writes()):
            raise TypeError(
                f"SplitterForGeneration splits causal language models, and {type(model).__name__} is none; "
                "use ModelWithSplitPoints"
            )

    @property
    def split_point(self) -> str:
        """The hook point the model is split at. Setting it takes what the constructor takes."""
        return next(iter(self._points.values()))

    @split_point.setter
    def split_point(self, split_point: int | str) -> None:
        self._set_split_points([split_point])

    def inputs_to_activations(
        self, inputs: Any, forward_kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        """What the split point shows for one batch, padding included, [batch, pos, d].

        Args:
            inputs: As in `get_activations`.
            forward_kwargs: Further keywords of the model's forward.
        """
        samples = self.samples(inputs)
        ((order, ids, mask),) = self.batches(samples, batch_size=len(samples))
        (states,) = self._run(ids, mask, forward_kwargs or {})[0].values()
        return states[torch.tensor(order).argsort().to(states.device)]

    def get_activations(
        self,
        inputs: Any,
        include_special_tokens: bool = False,
        flatten_activations: bool = True,
        tqdm_bar: bool = False,
        forward_kwargs: Mapping[str, Any] | None = None,
        *,
        device: torch.device | str | None = "cpu",
        dtype: torch.dtype | None = torch.float32,
    ) -> tuple[Activations, None]:
        """A row for every token. Padding is left out; the model stops behind the split point.

        Args:
            inputs: A list of texts; ids [batch, pos]; or what a tokenizer returns.
            include_special_tokens: Keep the tokenizer's special tokens (``all_special_ids``).
            flatten_activations: One tensor [tokens, d] instead of a list of them, one for each text.
            tqdm_bar: Show a progress bar.
            forward_kwargs: Further keywords of the model's forward.
            device: Where to put the rows; None leaves them where the model is.
            dtype: Their dtype; None is the model's.
        Returns:
            The rows, in the order of the texts, and None, where a classifier would have predictions.
        """
        every = Granularity.ALL_TOKENS if include_special_tokens else Granularity.TOKEN
        acts, _ = self._collect(
            inputs,
            every,
            Aggregation.MEAN,
            flatten=flatten_activations,
            tqdm_bar=tqdm_bar,
            forward_kwargs=forward_kwargs,
            device=device,
            dtype=dtype,
        )
        return next(iter(acts.values())), None

    def concept_output_gradient(
        self,
        inputs: Any,
        encode: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
        targets: Any = None,
        activation_granularity: Granularity = Granularity.TOKEN,
        aggregation_strategy: Aggregation = Aggregation.MEAN,
        concepts_x_gradients: bool = True,
        normalization: bool = True,
        tqdm_bar: bool = False,
        batch_size: int | None = None,
    ) -> list[Tensor]:
        """How the logits change with the concepts the split point is rebuilt from.

        See `ModelWithSplitPoints.concept_output_gradient`.

        Args:
            inputs: As in `get_activations`.
            encode: Concepts [rows, c] of activations [rows, d].
            decode: Activations [rows, d] of concepts [rows, c]; differentiable.
            targets: Positions, whose likeliest next token's logit is meant; all unless given.
            activation_granularity: What a row stands for.
            aggregation_strategy: How the rows of several tokens become one, and are put back.
            concepts_x_gradients: Multiply gradients by the concepts.
            normalization: Divide by the sum of absolute values over rows and concepts, for each target.
            tqdm_bar: Show a progress bar.
            batch_size: How many texts run together; as in the constructor unless given.
        Returns:
            For each text a tensor [targets, rows, concepts], on the CPU.
        """
        return ConceptGradients(self, self.split_point, classifies=False).of(
            inputs,
            encode,
            decode,
            targets=targets,
            granularity=activation_granularity,
            how=aggregation_strategy,
            times_concepts=concepts_x_gradients,
            normalizes=normalization,
            tqdm_bar=tqdm_bar,
            batch_size=batch_size,
        )

    def get_latent_shape(self) -> torch.Size:
        """The shape of what the split point shows for a short text, [1, pos, d]."""
        return next(iter(self._latent_shape().values()))
