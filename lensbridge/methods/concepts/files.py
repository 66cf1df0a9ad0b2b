"""Explainers in files of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...bridge import read_tensors, write_tensors
from ...hooks import InputError
from ..splitters import SplitterForGeneration
from .base import SAEExplainer
from .explainers import KINDS
from .place import Place, Source

KIND = "lensbridge concepts"
_MODULE = "a module of the caller's"


def save(explainer: SAEExplainer, path: Path) -> None:
    """Write a fitted explainer; see `SAEExplainer.save`."""
    model = explainer.concept_model
    options = dict(explainer.options)
    if isinstance(options["encoder_module"], nn.Module):
        options["encoder_module"] = _MODULE
    params = dict(options["dictionary_params"] or {})
    params.pop("initializer", None)
    options["dictionary_params"] = params or None
    tensors = {f"model/{name}": x for name, x in model.state_dict().items()}
    for name in [name for name, value in options.items() if isinstance(value, Tensor)]:
        tensors[f"option/{name}"] = options.pop(name)
    try:
        json.dumps(options)
    except TypeError as error:
        raise InputError(
            f"a file holds numbers, texts and tensors, no functions: {error}"
        ) from error
    facts = {
        "kind": KIND,
        "class": type(explainer).__name__,
        "engine": explainer.kind,
        "nb_concepts": explainer.nb_concepts,
        "d": explainer.d,
        "split_point": explainer.split_point,
        "centers": model.centers,
        "row_norm": model.row_norm,
        "options": options,
    }
    write_tensors(path, tensors, facts)


def load(
    cls: type[SAEExplainer],
    path: Path,
    source: Source,
    split_point: int | str | None,
    encoder_module: nn.Module | None,
    device: torch.device | str,
) -> SAEExplainer:
    """Read what `save` wrote; see `SAEExplainer.load`."""
    tensors, facts = read_tensors(path, KIND)
    if facts["engine"] not in KINDS:
        raise InputError(f"{path} holds a {facts['class']}, which this lensbridge does not know")
    kind = KINDS[facts["engine"]]
    if not issubclass(kind, cls):
        raise InputError(f"{path} holds {kind.__name__}, not {cls.__name__}")
    place = place_for(path, source, split_point, facts["split_point"], facts["d"])
    options: dict[str, Any] = dict(facts["options"])
    if options["encoder_module"] == _MODULE:
        if encoder_module is None:
            raise InputError(
                f"{path} was written with an encoder of the caller's own: give one like it, encoder_module="
            )
        options["encoder_module"] = encoder_module
    elif encoder_module is not None:
        raise InputError(f"{path} holds its encoder: leave encoder_module out")
    options |= {
        name.removeprefix("option/"): x for name, x in tensors.items() if name.startswith("option/")
    }
    made = kind(
        place.source,
        nb_concepts=facts["nb_concepts"],
        split_point=place.key,
        device=device,
        **options,
    )
    state = {
        name.removeprefix("model/"): x for name, x in tensors.items() if name.startswith("model/")
    }
    made.adopt(state, centers=facts["centers"], row_norm=facts["row_norm"])
    return made


def place_for(
    path: Path, source: Source, split_point: int | str | None, hook: str | None, width: int
) -> Place:
    """The place that a file's autoencoder belongs to.

    Raises:
        InputError: It belongs to another hook point, or is of another width, than what was given.
    """
    if split_point is None and not isinstance(source, SplitterForGeneration):
        split_point = hook
    place = Place(source, split_point)
    if hook is not None and place.name != Place.named(place.bridge, hook):
        raise InputError(f"{path} holds concepts of {hook}, and this is {place.name}")
    if place.width != width:
        raise InputError(
            f"{path} holds concepts of activations {width} wide, and {place.name} of this model is "
            f"{place.width} wide"
        )
    return place
