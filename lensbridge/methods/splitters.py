"""SplitterForGeneration: activations where a causal language model is cut in two, token by token."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..bridge import TransformerBridge
from ..hooks import HookPoint, InputError
from .base_splitter import BaseSplitter
from .batches import Activations
from .granularity import Aggregation, Granularity, Groups


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
        batch, *others = self.batches(
            samples, [Groups([], [])] * len(samples), batch_size=len(samples)
        )
        if others:
            raise InputError(
                f"{type(self.model).__name__} cannot be told what is padding: give texts of one length"
            )
        order = torch.tensor(batch.texts).argsort()

        def take(shown: Tensor, hook: HookPoint) -> Tensor:
            batch.states(shown, hook)
            return shown.expand(len(order), *shown.shape[1:])[order.to(shown.device)]

        return next(iter(self._run(batch, take, forward_kwargs)[0].values()))

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

    def get_latent_shape(self) -> torch.Size:
        """The shape of what the split point shows for a short text, [1, pos, d]."""
        return next(iter(self._latent_shape().values()))
