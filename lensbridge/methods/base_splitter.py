"""BaseSplitter: a model, the places it is cut at, and runs that end there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..bridge import TransformerBridge
from ..hooks import (
    HookPoint,
    InputError,
    UnknownPointError,
)
from .batches import Activations, Batch, Rows, cut
from .concept_gradients import ConceptGradients
from .granularity import Aggregation, Granularity, Groups, groups_of
from .reading import no_cache, pad_id_of, point_at, read_points, takes_mask
from .samples import Sample, samples_given, samples_of

_PLANS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways of placing a model over devices that are made while it is loaded."""


class BaseSplitter:
    """A model and the places it is split at.

    Args:
        model: A repo id or folder, a loaded model, or a bridge.
        split_points: Places: layer indices (the layer's output; negative from the end), hook points, or paths
            of modules (their output).
        tokenizer: Its tokenizer; a checkpoint and a bridge bring their own, in whose place this one is used.
            None of them is changed.
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
        split_points: int | str | Sequence[int | str],
        *,
        tokenizer: Any = None,
        automodel: Any = None,
        config: Any = None,
        batch_size: int = 1,
        device_map: Any = None,
        **kwargs: Any,
    ) -> None:
        self.batch_size = _positive(batch_size)
        if tokenizer is not None and not callable(tokenizer):
            raise InputError(f"tokenizer= is a tokenizer, got {type(tokenizer).__name__}")
        loading = {"automodel": automodel, "config": config, **kwargs}
        self.bridge = _wrapped(
            model, tokenizer, device_map, {k: v for k, v in loading.items() if v is not None}
        )
        self._tokenizer = tokenizer
        if self.tokenizer is None:
            raise InputError("a splitter reads text: give the model's tokenizer as tokenizer=")
        self._set_split_points(split_points)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, as it was given."""
        return self.bridge.tokenizer if self._tokenizer is None else self._tokenizer

    @property
    def model(self) -> nn.Module:
        """The Hugging Face model."""
        return self.bridge.original_model

    @property
    def device(self) -> torch.device | None:
        """Where the model takes its input."""
        return self.bridge.device

    # --- where -----------------------------------------------------------------------------------

    def _set_split_points(self, split_points: int | str | Sequence[int | str]) -> None:
        points = [split_points] if isinstance(split_points, (int, str)) else list(split_points)
        if not points:
            raise InputError(
                "give at least one split point: a layer, a hook point, or a module's path"
            )
        found = {str(point): self._point(point) for point in points}
        if len(found) < len(points):
            raise InputError(f"a split point is given twice: {', '.join(map(str, points))}")
        self._points = found

    def _point(self, split_point: Any) -> str:
        """The hook point behind a split point."""
        return str(point_at(split_point, self.bridge).name)

    # --- input -----------------------------------------------------------------------------------

    def samples(self, inputs: Any, granularity: Granularity = Granularity.TOKEN) -> list[Sample]:
        """Inputs as the model reads them.

        Args:
            inputs: A text or a list of texts; ids [batch, pos]; or what a tokenizer returns.
            granularity: What rows are wanted: only for words and sentences they are looked for.
        Raises:
            InputError: Something else, or a text without tokens.
        """
        detailed = granularity in (Granularity.WORD, Granularity.SENTENCE)
        if isinstance(inputs, str):
            inputs = [inputs]
        if isinstance(inputs, Tensor):
            inputs = {"input_ids": inputs}
        if isinstance(inputs, Mapping):
            return samples_given(inputs, self.tokenizer, detailed=detailed)
        if not isinstance(inputs, (list, tuple)) or not all(isinstance(x, str) for x in inputs):
            raise InputError(
                "inputs are a list of texts, ids [batch, pos], or what a tokenizer returns, got "
                f"{type(inputs).__name__}"
            )
        if not inputs:
            raise InputError("an empty list of texts was given; give at least one")
        return samples_of(inputs, self.tokenizer, self.bridge.cfg.n_ctx, detailed=detailed)

    def groups(self, samples: Sequence[Sample], granularity: Granularity) -> list[Groups]:
        """The tokens of each row of each text.

        Raises:
            InputError: A granularity the texts cannot give.
        """
        cls_id = self.tokenizer.cls_token_id
        return [groups_of(sample, granularity, cls_id) for sample in samples]

    def batches(
        self,
        samples: Sequence[Sample],
        groups: Sequence[Groups],
        how: Aggregation = Aggregation.MEAN,
        batch_size: int | None = None,
        tqdm_bar: bool = False,
    ) -> Iterator[Batch]:
        """Texts of like length together, the longest first.

        Padding goes behind the texts, whatever the tokenizer says: there causal models do not look, encoders
        keep the column they classify by, and positions are what they are without it. Models that classify by
        their last column (XLNet) have it in front.

        Args:
            samples: The texts.
            groups: The tokens of each of their rows.
            how: How the rows of several tokens become one.
            batch_size: How many texts run together; as in the constructor unless given.
            tqdm_bar: Show a progress bar.
        Raises:
            InputError: A batch size below 1.
        """
        size = _positive(self.batch_size if batch_size is None else batch_size)
        chunks: Any = cut(samples, size, pads=takes_mask(self.bridge.unwrapped_model))
        if tqdm_bar:
            from tqdm import tqdm

            chunks = tqdm(chunks, desc="Computing activations", unit="batch")
        config: Any = getattr(self.model, "config", None)
        for chunk in chunks:
            yield Batch(
                chunk,
                [samples[i] for i in chunk],
                [groups[i] for i in chunk],
                how,
                pad_id=self._pad_id,
                in_front=getattr(config, "summary_type", None) == "last",
            )

    @property
    def _pad_id(self) -> int:
        """What to fill up with: models that look for a text's end go by the token in their configuration."""
        return pad_id_of(self.bridge, self.tokenizer)

    @property
    def _classifies(self) -> bool:
        """Whether the model's logits are classes of a whole text."""
        return "ForSequenceClassification" in type(self.bridge.unwrapped_model).__name__

    def options(self, batch: Batch) -> dict[str, Any]:
        """Keywords of the model's forward for a batch: what it is told beside the ids."""
        return {**batch.inputs(), **no_cache(self.bridge)}

    # --- activations -----------------------------------------------------------------------------

    def _run(
        self,
        batch: Batch,
        take: Callable[[Tensor, HookPoint], Tensor],
        forward_kwargs: Mapping[str, Any] | None = None,
        *,
        to_end: bool = False,
    ) -> tuple[dict[str, Tensor], Any]:
        """Run the model until every split point was passed.

        Args:
            batch: What to run on.
            take: What to keep of what a point shows. It copies: some models write into it later on.
            forward_kwargs: Further keywords of the model's forward.
            to_end: Run on to the logits.
        Returns:
            What was taken, by split point, and the logits or None.
        """
        points = [self.bridge.registry[name] for name in self._points.values()]
        found, logits = read_points(
            self.bridge,
            points,
            take,
            lambda: self.bridge(
                batch.ids,
                return_type="logits" if to_end else None,
                **{**self.options(batch), **(forward_kwargs or {})},
            ),
            to_end=to_end,
        )
        return {key: found[name] for key, name in self._points.items()}, logits

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
        samples = self.samples(inputs, granularity)
        groups = self.groups(samples, granularity)
        counts = [len(own.sizes) for own in groups]
        rows = {key: Rows(counts, flatten) for key in self._points}
        predicted: list[Any] = [None] * len(samples)
        for batch in self.batches(samples, groups, how, None, tqdm_bar):

            def take(shown: Tensor, hook: HookPoint, batch: Batch = batch) -> Tensor:
                return batch.rows(batch.states(shown, hook)).to(device=device, dtype=dtype)

            found, logits = self._run(batch, take, forward_kwargs, to_end=predicts)
            for key, made in found.items():
                rows[key].put(batch.texts, made)
            if logits is not None:
                for index, classes in zip(batch.texts, logits.argmax(-1).cpu(), strict=True):
                    predicted[index] = classes
        acts = {key: kept.result() for key, kept in rows.items()}
        if not predicts:
            return acts, None
        each = torch.tensor(counts)
        return acts, torch.stack(predicted).repeat_interleave(each) if flatten else predicted

    def _latent_shape(self) -> dict[str, torch.Size]:
        """The shape of what each split point shows of a short text."""
        samples = self.samples(["scan"])
        (batch,) = self.batches(samples, [Groups([], [])])
        shapes: dict[str, torch.Size] = {}

        def look(shown: Tensor, hook: HookPoint) -> Tensor:
            batch.states(shown, hook)
            shapes[str(hook.name)] = shown.shape
            return shown

        self._run(batch, look)
        return {key: shapes[name] for key, name in self._points.items()}

    # --- gradients -------------------------------------------------------------------------------

    def concept_output_gradient(
        self,
        inputs: Any,
        encode: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
        targets: Any = None,
        split_point: int | str | None = None,
        activation_granularity: Granularity = Granularity.TOKEN,
        aggregation_strategy: Aggregation = Aggregation.MEAN,
        concepts_x_gradients: bool = True,
        normalization: bool = True,
        tqdm_bar: bool = False,
        batch_size: int | None = None,
    ) -> list[Tensor]:
        """How the outputs change with the concepts that a split point is rebuilt from.

        Args:
            inputs: As in `get_activations`.
            encode: Concepts [rows, c] of activations [rows, d].
            decode: Activations [rows, d] of concepts [rows, c]; differentiable.
            targets: Which outputs: classes of a classifier; positions of a text, whose likeliest next token's
                logit is meant (negative from the text's end). One list for all texts, or a list of lists. All
                of them unless given.
            split_point: Which, as it was given, where there are several.
            activation_granularity: What a row stands for; ``SAMPLE`` cannot be put back.
            aggregation_strategy: How the rows of several tokens become one, and are put back.
            concepts_x_gradients: Multiply gradients by the concepts.
            normalization: Divide by the sum of absolute values over rows and concepts, for each target;
                targets that nothing changes stay zero.
            tqdm_bar: Show a progress bar.
            batch_size: How many texts run together; as in the constructor unless given.
        Returns:
            For each text a tensor [targets, rows, concepts], on the CPU.
        Raises:
            InputError: A target that is not there, concepts or activations of the wrong shape, or SAMPLE.
            GradientError: ``decode`` is not differentiable, or the model is not.
        """
        if split_point is None and len(self._points) > 1:
            raise InputError(f"say which split point: {', '.join(self._points)}")
        key = next(iter(self._points)) if split_point is None else str(split_point)
        if key not in self._points:
            raise UnknownPointError(
                f"{split_point!r} is none of the split points: {', '.join(self._points)}"
            )
        return ConceptGradients(self, self._points[key]).of(
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


def _wrapped(
    model: Any, tokenizer: Any, device_map: Any, loading: dict[str, Any]
) -> TransformerBridge:
    """A bridge around what a splitter was given."""
    if isinstance(model, (str, os.PathLike)):
        kind = loading.pop("automodel", None)
        return TransformerBridge.boot_transformers(
            model, tokenizer=tokenizer, model_class=kind, device_map=device_map, **loading
        )
    if loading:
        raise InputError(f"{', '.join(loading)}: for loading, but this model is loaded already")
    if isinstance(device_map, Mapping) or device_map in _PLANS:
        raise InputError(
            f"device_map={device_map!r} places what is being loaded; give a repo id, or a device"
        )
    if not isinstance(model, (nn.Module, TransformerBridge)):
        raise TypeError(
            f"a splitter takes a repo id, a loaded model or a bridge, got {type(model).__name__}"
        )
    bridge = model if isinstance(model, TransformerBridge) else TransformerBridge(model, tokenizer)
    return bridge if device_map is None else bridge.to(device_map)


def _positive(batch_size: Any) -> int:
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise InputError(f"batch_size is at least 1, got {batch_size!r}")
    return batch_size
