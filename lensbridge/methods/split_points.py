"""ModelWithSplitPoints: several split points, every granularity, predictions of classifiers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..bridge import TransformerBridge
from ..hooks import InputError
from .base_splitter import BaseSplitter
from .batches import Activations
from .granularity import Aggregation, Granularity


class ModelWithSplitPoints(BaseSplitter):
    """Activations of any model at several places, one row for each token, word, sentence or text.

    Args:
        model_or_repo_id: A repo id or folder, a loaded model, or a bridge.
        tokenizer: The tokenizer; a checkpoint and a bridge bring their own.
        split_points: Layer indices, hook points, or paths of modules; one, or a list.
        automodel: The transformers class to load a checkpoint with; unless given, the one it was saved from.
        config: The configuration to load it with.
        batch_size: How many texts run together.
        device_map: Where to put the model.
        **kwargs: Passed to ``from_pretrained``.
    Raises:
        InputError: No tokenizer, or arguments that exclude each other.
        UnknownPointError, AbsentPointError, LayerRangeError: A split point that is not there.

    Example::

        split = ModelWithSplitPoints(model, tokenizer, [2, "blocks.3.mlp.hook_out"], batch_size=8)
        acts, _ = split.get_activations(texts, activation_granularity=Granularity.WORD)
        acts["2"]                                          # [words, d_model]
    """

    activation_granularities = Granularity
    aggregation_strategies = Aggregation

    def __init__(
        self,
        model_or_repo_id: str | os.PathLike[str] | nn.Module | TransformerBridge,
        tokenizer: Any = None,
        split_points: int | str | Sequence[int | str] = (),
        *,
        automodel: Any = None,
        config: Any = None,
        batch_size: int = 1,
        device_map: Any = None,
        **kwargs: Any,
    ) -> None:
        if automodel is None and isinstance(model_or_repo_id, (str, os.PathLike)):
            automodel = _saved_from(config or model_or_repo_id, kwargs)
        super().__init__(
            model_or_repo_id,
            split_points,
            tokenizer=tokenizer,
            automodel=automodel,
            config=config,
            batch_size=batch_size,
            device_map=device_map,
            **kwargs,
        )

    @property
    def split_points(self) -> dict[str, str]:
        """The hook point behind each split point, by the name it was given. Can be set, to one or a list."""
        return dict(self._points)

    @split_points.setter
    def split_points(self, split_points: int | str | Sequence[int | str]) -> None:
        self._set_split_points(split_points)

    def get_activations(
        self,
        inputs: Any,
        activation_granularity: Granularity = Granularity.TOKEN,
        aggregation_strategy: Aggregation = Aggregation.MEAN,
        tqdm_bar: bool = False,
        include_predicted_classes: bool = False,
        flatten_activations: bool = True,
        forward_kwargs: Mapping[str, Any] | None = None,
        *,
        device: torch.device | str | None = "cpu",
        dtype: torch.dtype | None = torch.float32,
    ) -> tuple[Activations | dict[str, Activations], Any]:
        """Rows of activations at every split point, from one forward pass a batch.

        Args:
            inputs: A list of texts; ids [batch, pos]; or what a tokenizer returns.
            activation_granularity: What a row stands for; padding is left out of all of them.
            aggregation_strategy: How the rows of several tokens become one.
            tqdm_bar: Show a progress bar.
            include_predicted_classes: Also return what a classifier predicts for each text.
            flatten_activations: One tensor [rows, d] instead of a list of them, one for each text.
            forward_kwargs: Further keywords of the model's forward.
            device: Where to put the rows; None leaves them where the model is.
            dtype: Their dtype; None is the model's.
        Returns:
            The rows, in the order of the texts: of the only split point, or by split point's name where there
            are several; and the predicted class of each row ([rows], or one a text), or None.
        Raises:
            InputError: A granularity the input cannot give, or predictions of what is no classifier.
        """
        if include_predicted_classes and not self._classifies:
            raise InputError(
                f"{type(self.model).__name__} predicts no class of a text: include_predicted_classes is for "
                "sequence classifiers"
            )
        acts, predicted = self._collect(
            inputs,
            activation_granularity,
            aggregation_strategy,
            flatten=flatten_activations,
            tqdm_bar=tqdm_bar,
            forward_kwargs=forward_kwargs,
            device=device,
            dtype=dtype,
            predicts=include_predicted_classes,
        )
        return (acts if len(acts) > 1 else next(iter(acts.values()))), predicted

    def get_latent_shape(self) -> dict[str, torch.Size]:
        """The shape of what each split point shows for a short text, [1, pos, d]."""
        return self._latent_shape()


def _saved_from(source: Any, options: Mapping[str, Any]) -> Any:
    """The transformers class a checkpoint was saved from; None where it does not say, or has code of its own.

    Without it a classifier would be loaded as the language model of its kind, with a head made up.
    """
    import transformers

    if isinstance(source, (str, os.PathLike)):
        hub = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
        source = transformers.AutoConfig.from_pretrained(source, **hub)
    names = getattr(source, "architectures", None) or ()
    return next((kind for name in names if (kind := getattr(transformers, name, None))), None)
