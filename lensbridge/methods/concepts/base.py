"""SAEExplainer: concepts of a model's activations at one place, learnt by a sparse autoencoder."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from ...bridge import TransformerBridge
from ...hooks import InputError, NotFittedError
from ..granularity import Aggregation, Granularity
from ..numbers import whole
from . import fitting
from .engine import engine
from .learning import Learning
from .models import Autoencoder
from .place import Place, Source
from .training import seeded


class SAEExplainer(Learning):
    """A sparse autoencoder of the activations at one place of a model.

    A row of activations is rebuilt as ``codes @ get_dictionary() + b_dec``: few codes, none below zero,
    times atoms of length 1. Without ``bias`` there is no ``b_dec``, and inputs are not scaled while training.

    Subclasses name the kind of autoencoder, which is overcomplete's (``pip install 'lensbridge[sae]'``).

    Args:
        splitter: A splitter, or a bridge.
        nb_concepts: How many concepts.
        split_point: The place: for a bridge, and where a splitter has several.
        encoder_module: One of overcomplete's encoders by name, or a module giving pre-codes and codes;
            None for one linear layer, which starts as the atoms.
        dictionary_params: For overcomplete's dictionary layer.
        device: Where the autoencoder is.
        **kwargs: Of the kind: ``bias``, and for instance ``top_k``.
    Raises:
        InputError: A number of concepts below 1, more codes a row than concepts, an option that the kind does
            not have; or overcomplete is missing.
        UnknownPointError, AbsentPointError, LayerRangeError: A split point that is not there.
    """

    kind: ClassVar[str]
    """The name of overcomplete's class."""
    has_differentiable_concept_encoder = True
    has_differentiable_concept_decoder = True

    def __init__(
        self,
        splitter: Source,
        *,
        nb_concepts: int,
        split_point: int | str | None = None,
        encoder_module: nn.Module | str | None = None,
        dictionary_params: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        **kwargs: Any,
    ) -> None:
        if not isinstance(getattr(self, "kind", None), str):
            raise TypeError("SAEExplainer is abstract: use TopKSAEConcepts, or another kind")
        self.nb_concepts = whole("nb_concepts", nb_concepts)
        self.options = {
            **kwargs,
            "encoder_module": encoder_module,
            "dictionary_params": None if dictionary_params is None else dict(dictionary_params),
        }
        self.place = Place(splitter, split_point)
        self._fitted = False
        self._model = self._new(0, torch.device(device))

    def _new(self, seed: int, device: torch.device) -> Autoencoder:
        """An autoencoder that has learnt nothing."""
        options = dict(self.options)
        if isinstance(options["encoder_module"], nn.Module):
            options["encoder_module"] = copy.deepcopy(options["encoder_module"])
        made = getattr(engine(), self.kind)
        with seeded(seed, torch.device("cpu")):
            try:
                model = made(self.place.width, self.nb_concepts, **options)
            except (TypeError, AssertionError) as error:
                raise InputError(
                    f"{type(self).__name__} cannot be made with {_given(options)}: {error}"
                ) from error
        return model.to(device)

    # --- what it is ----------------------------------------------------------------------------------

    @property
    def concept_model(self) -> Autoencoder:
        """The autoencoder, overcomplete's class with what lensbridge mends."""
        return self._model

    @property
    def splitter(self) -> Any:
        """The splitter that was given, or one made for the bridge."""
        return self.place.splitter

    @property
    def bridge(self) -> TransformerBridge:
        """The model."""
        return self.place.bridge

    @property
    def split_point(self) -> str:
        """The hook point whose activations are explained."""
        return self.place.name

    @property
    def d(self) -> int:
        """Width of the activations."""
        return self.place.width

    @property
    def is_fitted(self) -> bool:
        """Whether it has learnt its concepts."""
        return self._fitted

    @property
    def device(self) -> torch.device:
        """Where the autoencoder is."""
        return self._model.device

    def to(self, device: torch.device | str) -> SAEExplainer:
        """Move the autoencoder."""
        self._model.to(device)
        return self

    # --- use -----------------------------------------------------------------------------------------

    def encode_activations(self, activations: Num[Tensor, "row d"]) -> Float[Tensor, "row concept"]:
        """Codes of activations; with a graph only if they have one.

        Raises:
            NotFittedError: It has not been fitted.
            InputError: Something else than floats [n, d].
        """
        rows = self._checked(activations, self.d, "activations")
        with self._graph(rows):
            return self._model.encode(rows)[1]

    def decode_concepts(
        self,
        concepts: Num[Tensor, "row concept"],
        activations: Num[Tensor, "row d"] | None = None,
    ) -> Float[Tensor, "row d"]:
        """Activations of codes; with a graph only if they have one.

        Args:
            concepts: Codes.
            activations: What they are codes of: only of autoencoders that normalise each row, as some of
                SAELens's do, which need its size back.
        Raises:
            NotFittedError: It has not been fitted.
            InputError: Something else than floats [n, nb_concepts], or activations are needed.
        """
        codes = self._checked(concepts, self.nb_concepts, "concepts")
        if self._model.row_norm == "none":
            with self._graph(codes):
                return self._model.decode(codes)
        if activations is None:
            raise InputError(
                f"this autoencoder normalises each row ({self._model.row_norm}), and codes alone do not say "
                "its size: give the activations, too"
            )
        rows = self._checked(activations, self.d, "activations")
        with self._graph(codes):
            return self._model.denormalised(self._model.decode(codes), rows)

    activations_to_concepts = encode_activations
    concepts_to_activations = decode_concepts

    def get_dictionary(self) -> Float[Tensor, "concept d"]:
        """The atoms; a copy.

        Raises:
            NotFittedError: It has not been fitted.
        """
        self._check_fitted()
        return self._model.get_dictionary().detach().clone()

    @property
    def b_dec(self) -> Float[Tensor, " d"]:
        """What is added to ``codes @ get_dictionary()``; zeros without a bias. A copy."""
        self._check_fitted()
        return self._model.offset.detach().clone()

    def concept_output_gradient(
        self,
        inputs: Any,
        targets: Any = None,
        split_point: int | str | None = None,
        activation_granularity: Granularity = Granularity.TOKEN,
        aggregation_strategy: Aggregation = Aggregation.MEAN,
        concepts_x_gradients: bool = True,
        normalization: bool = True,
        tqdm_bar: bool = False,
        batch_size: int | None = None,
    ) -> list[Tensor]:
        """How the model's outputs change with the concepts; see `BaseSplitter.concept_output_gradient`.

        Args:
            inputs: Texts, ids, or what a tokenizer returns.
            targets: Which outputs; all unless given.
            split_point: Where, by any of its names; it can only be the explainer's.
            activation_granularity: What a row stands for.
            aggregation_strategy: How the rows of several tokens become one.
            concepts_x_gradients: Multiply gradients by the concepts.
            normalization: Divide by the sum of absolute values, for each target.
            tqdm_bar: Show a progress bar.
            batch_size: How many texts run together.
        Returns:
            For each text a tensor [targets, rows, concepts], on the CPU.
        Raises:
            NotFittedError: It has not been fitted.
            InputError: Another split point, or what the splitter refuses.
        """
        self._check_fitted()
        if split_point is not None and Place.named(self.bridge, split_point) != self.split_point:
            raise InputError(
                f"these are concepts at {self.place.name}, and the gradient was asked at {split_point!r}"
            )
        return self.splitter.concept_output_gradient(
            inputs,
            self.encode_activations,
            self.decode_concepts,
            targets=targets,
            split_point=self.place.among,
            activation_granularity=activation_granularity,
            aggregation_strategy=aggregation_strategy,
            concepts_x_gradients=concepts_x_gradients,
            normalization=normalization,
            tqdm_bar=tqdm_bar,
            batch_size=batch_size,
        )

    def interpret(self, *args: Any, **kwargs: Any) -> Any:
        """Not here, as in interpreto: interpretations are objects that take an explainer."""
        raise NotImplementedError(
            "an explainer does not interpret its concepts itself: make TopKInputs(explainer, ...) and call "
            "its interpret"
        )

    # --- files ---------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the explainer to one file, without the model it explains.

        Raises:
            NotFittedError: It has not been fitted.
            InputError: An option that a file cannot hold.
        """
        from .files import save

        self._check_fitted()
        save(self, Path(path))

    @classmethod
    def load(
        cls,
        path: str | Path,
        splitter: Source,
        *,
        split_point: int | str | None = None,
        encoder_module: nn.Module | None = None,
        device: torch.device | str = "cpu",
    ) -> SAEExplainer:
        """Read an explainer that `save` wrote.

        Args:
            path: The file.
            splitter: A splitter or a bridge of the model it explains.
            split_point: Its place, if it is not clear from the file (for a bridge, the file's is taken).
            encoder_module: The encoder, where it was one of the caller's: its class is not in the file.
            device: Where to put it.
        Raises:
            FileNotFoundError: No such file.
            InputError: No such file format; another kind; or another hook point or width than the model's.
        """
        from .files import load

        return load(cls, Path(path), splitter, split_point, encoder_module, device)

    def adopt(
        self, state: Mapping[str, Tensor], *, centers: bool = True, row_norm: str = "none"
    ) -> None:
        """Take over the weights of a trained autoencoder of this kind.

        Args:
            state: What ``concept_model.state_dict()`` gives of it.
            centers: Whether ``b_dec`` is taken off what the encoder is shown.
            row_norm: How each row is normalised before (`models.ROW_NORMS`).
        Raises:
            InputError: Weights of other names or shapes.
        """
        model = self._new(0, self.device)
        try:
            model.load_state_dict(dict(state))
        except RuntimeError as error:
            raise InputError(f"these are no weights of a {type(self).__name__}: {error}") from error
        model.centers, model.row_norm = centers, row_norm
        self._model = model.eval().requires_grad_(False)
        self._fitted = True

    # --- parts ---------------------------------------------------------------------------------------

    def _check_fitted(self) -> None:
        if not self._fitted:
            raise NotFittedError(f"this {type(self).__name__} has learnt no concepts yet: call fit")

    def _checked(self, given: Tensor, width: int, what: str) -> Tensor:
        self._check_fitted()
        if not isinstance(given, Tensor) or given.dim() != 2 or not given.is_floating_point():
            said = (
                f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else type(given)
            )
            raise InputError(f"{what} are floats [n, {width}]; got {said}")
        if given.shape[1] != width:
            raise InputError(f"{what} are {width} wide here, got {list(given.shape)}")
        return given.to(self.device, self._model.b_dec.dtype)

    @staticmethod
    def _graph(given: Tensor) -> Any:
        # Parameters need no gradient any more, but a caller may have asked it of them.
        return nullcontext() if given.requires_grad else torch.no_grad()


def _given(options: Mapping[str, Any]) -> str:
    named: Sequence[str] = [
        f"{name}={fitting.described(value)!r}"
        for name, value in options.items()
        if value is not None
    ]
    return ", ".join(named) or "these options"
