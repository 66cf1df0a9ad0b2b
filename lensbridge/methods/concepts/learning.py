"""How explainers learn their concepts: from rows of activations, or from texts as the model reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...bridge import TransformerBridge
from ...hooks import InputError
from ..numbers import whole
from . import fitting
from .losses import criterion_of
from .models import Autoencoder
from .place import Place
from .stream_fit import StreamFit
from .streaming import Streaming, source_of
from .training import Trainer, TrainingOptions

_WINDOW = 1_000_000
"""A concept is dead that no row of an epoch had, or none of so many rows."""


class Learning:
    """What of an explainer learns."""

    kind: ClassVar[str]
    nb_concepts: int
    options: dict[str, Any]
    place: Place
    _model: Autoencoder
    _fitted: bool

    def _new(self, seed: int, device: torch.device) -> Autoencoder:
        """An autoencoder that has learnt nothing."""
        raise NotImplementedError

    def fit(
        self,
        activations: Any,
        *,
        use_amp: bool | torch.dtype = False,
        batch_size: int = 1024,
        criterion: Any = None,
        optimizer_class: Any = torch.optim.Adam,
        optimizer_kwargs: Mapping[str, Any] | None = None,
        scheduler_class: Any = None,
        scheduler_kwargs: Mapping[str, Any] | None = None,
        lr: float = 1e-3,
        nb_epochs: int = 20,
        clip_grad: float | None = None,
        monitoring: int | None = None,
        device: torch.device | str | None = None,
        max_nan_fallbacks: int = 5,
        overwrite: bool = False,
        seed: int = 0,
        dead_window: int | None = None,
        progress: bool = False,
        checkpoint: str | Path | None = None,
        resume: bool = False,
        stream: Streaming | None = None,
    ) -> dict[str, list[Any]]:
        """Learn the concepts of activations, or of what the model makes of texts.

        Texts run through the model as they are needed; their activations pass through a buffer that mixes
        them, and are not kept. So do the rows of any iterable, a store on disk for instance. The same seed
        gives the same concepts on the same machine; the caller's random state is left alone.

        Args:
            activations: Floats [n, d], or a list of such; or texts, or an iterable of texts or of rows, such
                as what `extract_to` wrote.
            use_amp: Compute in half precision: bfloat16 where the device has it, or the dtype given. A batch
                whose loss is not finite is done again in full precision.
            batch_size: Rows a step.
            criterion: What is lowered, of (x, x_hat, pre_codes, codes, dictionary): a class, an instance, a
                function, or one of `SAELossClasses`. It sees inputs scaled so that their distances from the
                mean are sqrt(d) on average (not without ``bias``). None is the kind's own loss: the squared
                error, its penalty for codes that are not sparse, and a loss that revives dead concepts.
            optimizer_class: An optimizer of torch's.
            optimizer_kwargs: For it; ``lr`` there goes before ``lr`` here.
            scheduler_class: A learning rate scheduler, stepped after each batch.
            scheduler_kwargs: For it.
            lr: Learning rate.
            nb_epochs: How often the rows are gone through.
            clip_grad: The most that the gradient's norm may be.
            monitoring: 1 also keeps learning rate and loss of each step, 2 norms of parameters and gradients.
            device: Where to train, and stay; where it is unless given.
            max_nan_fallbacks: After so many of them the rest of the epoch is in full precision.
            overwrite: Start anew, if it has been fitted.
            seed: Of the first weights and of the order of rows.
            dead_window: A concept is dead that none of so many rows had; the rows of an epoch, at most a
                million, unless given.
            progress: Show a bar with the figures so far.
            checkpoint: A file to keep the state in, after each epoch.
            resume: Go on from it where it exists; the result is bit for bit that of an uninterrupted fit.
            stream: Sizes for texts and iterables. Rows are scaled by what fills the buffer first.
        Returns:
            For each epoch, over its batches: ``loss``, ``l0`` (codes a row), ``explained_variance``, and
            ``dead`` (the share of concepts not seen within the window at its end). With ``use_amp``,
            ``nan_fallbacks``.
        Raises:
            InputError: It has been fitted; activations of another width, empty, or with NaN; an option out of
                range; a loss that is not finite; a checkpoint of another fit. Nothing has changed then.
        """
        settings = settings_of(
            use_amp=use_amp,
            batch_size=batch_size,
            criterion=criterion,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            scheduler_class=scheduler_class,
            scheduler_kwargs=scheduler_kwargs,
            lr=lr,
            nb_epochs=nb_epochs,
            clip_grad=clip_grad,
            monitoring=monitoring,
            device=device,
            max_nan_fallbacks=max_nan_fallbacks,
            overwrite=overwrite,
            seed=seed,
            dead_window=dead_window,
            progress=progress,
            checkpoint=checkpoint,
            resume=resume,
            stream=stream,
        )
        if not _is_whole(activations):
            return _streamed([self], activations, settings)[0]
        if stream is not None:
            raise InputError("stream= is for texts and iterables: these activations are all here")
        self.check_new(settings)
        rows = fitting.rows_of(activations, self.place.width)
        trainer = self.new_trainer(settings, len(rows))
        fitting.fit_rows(trainer, rows, settings.schedule, self.identity(settings, len(rows)))
        self.take(trainer)
        return trainer.history

    def check_new(self, settings: Settings) -> None:
        """Refuse to forget what has been learnt, unless that is wanted."""
        if self._fitted and not settings.overwrite:
            raise InputError(
                f"this {type(self).__name__} has been fitted: overwrite=True starts anew, and forgets it"
            )

    def new_trainer(self, settings: Settings, n_rows: int) -> Trainer:
        """What trains a new autoencoder, for epochs of so many rows."""
        schedule = settings.schedule
        with torch.inference_mode(False):
            return Trainer(
                self._new(schedule.seed, settings.device or self._model.device),
                settings.training,
                n_steps=-(-n_rows // schedule.batch_size) * schedule.nb_epochs,
                dead_window=settings.dead_window or min(n_rows, _WINDOW),
            )

    def identity(self, settings: Settings, n_rows: int | None = None) -> dict[str, Any]:
        """What tells one fit from another."""
        window = settings.dead_window or (n_rows and min(n_rows, _WINDOW))
        return {
            "kind": self.kind,
            "concepts": self.nb_concepts,
            "width": self.place.width,
            "options": fitting.described(self.options),
            "training": fitting.described(vars(settings.training)),
            "batch_size": settings.schedule.batch_size,
            "seed": settings.schedule.seed,
            "dead_window": window,
        }

    def take(self, trainer: Trainer) -> None:
        """Be what was trained."""
        with torch.inference_mode(False):
            self._model = fitting.finished(trainer.model)
        self._fitted = True


def fit_together(
    explainers: Sequence[Any], activations: Any, **options: Any
) -> list[dict[str, list[Any]]]:
    """Fit several explainers of one model, at one place or several, in one pass of the model an epoch.

    Each learns what it would learn by itself.

    Args:
        explainers: What to fit.
        activations: Texts, or an iterable of texts; or rows: an iterable of mappings from hook points to
            floats [n, d], such as what `extract_to` wrote (or of such floats, where all are at one place).
        **options: As in `SAEExplainer.fit`, for all of them.
    Returns:
        The history of each.
    Raises:
        InputError: Explainers of several models, or one twice; or what `SAEExplainer.fit` refuses.
    """
    explainers = list(explainers)
    if not explainers or not all(isinstance(own, Learning) for own in explainers):
        raise InputError(f"fit_together takes a list of explainers, got {explainers!r}")
    if len({id(own) for own in explainers}) < len(explainers):
        raise InputError("an explainer is given twice")
    if isinstance(activations, (list, tuple)) and _is_whole(activations):
        activations = [fitting.rows_of(activations, explainers[0].place.width)]
    return _streamed(explainers, activations, settings_of(**options))


def _is_whole(activations: Any) -> bool:
    """Whether all rows are there at once."""
    if isinstance(activations, (list, tuple)):
        return all(isinstance(part, Tensor) for part in activations)
    return isinstance(activations, Tensor)


def _streamed(
    explainers: Sequence[Any], given: Any, settings: Settings
) -> list[dict[str, list[Any]]]:
    for own in explainers:
        own.check_new(settings)
    places = [own.place.name for own in explainers]
    width = {own.place.name: own.place.width for own in explainers}
    bridge, tokenizer = _one_model(explainers)
    how = settings.stream
    source = source_of(given, bridge, tokenizer, list(width), how)
    identities = [own.identity(settings) for own in explainers]
    found = StreamFit(
        places,
        lambda n_rows: [own.new_trainer(settings, n_rows) for own in explainers],
        source,
        how,
        settings.schedule,
        {"places": places, "fits": identities},
        width,
        settings.device or explainers[0].device,
    ).run()
    for own, trainer in zip(explainers, found, strict=True):
        own.take(trainer)
    return [trainer.history for trainer in found]


def _one_model(explainers: Sequence[Learning]) -> tuple[TransformerBridge, Any]:
    """The model of all explainers, and the tokenizer."""
    bridge = explainers[0].place.bridge
    if any(own.place.bridge.original_model is not bridge.original_model for own in explainers):
        raise InputError("these explainers are of several models: fit those of one together")
    return bridge, explainers[0].place.tokenizer


# --- options --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """The options of a fit, checked."""

    training: TrainingOptions
    schedule: fitting.Schedule
    stream: Streaming
    device: torch.device | None
    dead_window: int | None
    overwrite: bool


def settings_of(
    *,
    batch_size: int = 1024,
    nb_epochs: int = 20,
    seed: int = 0,
    progress: bool = False,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    criterion: Any = None,
    max_nan_fallbacks: int = 5,
    device: torch.device | str | None = None,
    dead_window: int | None = None,
    overwrite: bool = False,
    stream: Streaming | None = None,
    **training: Any,
) -> Settings:
    """The options of `SAEExplainer.fit`, checked.

    Raises:
        InputError: One out of range.
    """
    schedule = fitting.Schedule(
        whole("batch_size", batch_size),
        whole("nb_epochs", nb_epochs),
        whole("seed", seed, 0),
        progress,
        None if checkpoint is None else Path(checkpoint),
        resume,
    )
    if resume and schedule.checkpoint is None:
        raise InputError("resume=True goes on from a checkpoint: say where it is, checkpoint=")
    return Settings(
        TrainingOptions(
            criterion=criterion_of(criterion),
            max_nan_fallbacks=whole("max_nan_fallbacks", max_nan_fallbacks, 0),
            **training,
        ),
        schedule,
        Streaming() if stream is None else stream,
        None if device is None else torch.device(device),
        None if dead_window is None else whole("dead_window", dead_window),
        overwrite,
    )
