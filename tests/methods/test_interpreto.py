"""What scripts for interpreto's splitters do works the same through a thin shim: calls, shapes, errors.

The shim renames; what it cannot rename is a difference, and `docs/splitters.md` lists it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import (
    Aggregation,
    Granularity,
    InputError,
    LayerRangeError,
    ModelWithSplitPoints,
    PointError,
    SplitterForGeneration,
    demo,
)

TEXTS = ["Interpreto is magic", "ab", "Testing activations, and more. Yes!", "some words"]
CLOSE = 1e-5


# --- the shim -----------------------------------------------------------------------------------------------


class InitializationError(ValueError):
    """interpreto's: nothing to make a splitter of."""


class ModelPathError(ValueError):
    """interpreto's: no such place in the model."""


@contextmanager
def errors_of_interpreto() -> Iterator[None]:
    """Errors under the names that interpreto's callers catch."""
    try:
        yield
    except (PointError, LayerRangeError) as error:
        raise ModelPathError(str(error)) from error
    except InputError as error:
        raise InitializationError(str(error)) from error


class Shim:
    """interpreto's methods on one of our splitters."""

    def __init__(self, own: Any) -> None:
        self.own = own

    @property
    def _model(self) -> nn.Module:
        return self.own.model

    @property
    def split_point(self) -> str:
        """The place."""
        points = getattr(self.own, "split_points", None)
        return self.own.split_point if points is None else next(iter(points.values()))

    @split_point.setter
    def split_point(self, value: Any) -> None:
        with errors_of_interpreto():
            if isinstance(self.own, SplitterForGeneration):
                self.own.split_point = value
            else:
                self.own.split_points = value

    def get_latent_shape(self) -> torch.Size:
        """The shape at the place."""
        made = self.own.get_latent_shape()
        return next(iter(made.values())) if isinstance(made, dict) else made

    def get_activations(self, inputs: Any, **options: Any) -> Any:
        """With the keyword that interpreto's own tests pass."""
        if "include_all_tokens" in options:
            options["include_special_tokens"] = options.pop("include_all_tokens")
        return self.own.get_activations(inputs, **options)

    def _get_concept_output_gradients(
        self,
        inputs: Any,
        activations_to_concepts: Any,
        concepts_to_activations: Any,
        **options: Any,
    ) -> list[Tensor]:
        return self.own.concept_output_gradient(
            inputs, activations_to_concepts, concepts_to_activations, **options
        )


def for_generation(model: Any, split_point: Any, **options: Any) -> Shim:
    """interpreto's SplitterForGeneration."""
    with errors_of_interpreto():
        return Shim(SplitterForGeneration(model, split_point, **options))


def with_split_points(model: Any, split_points: Any, **options: Any) -> Shim:
    """interpreto's ModelWithSplitPoints."""
    with errors_of_interpreto():
        return Shim(ModelWithSplitPoints(model, split_points=split_points, **options))


@pytest.fixture(scope="module")
def gpt2(tiny: Callable[..., nn.Module]) -> nn.Module:
    """A GPT-2; no test here changes it."""
    return tiny("gpt2")


@pytest.fixture(scope="module")
def bert(new_classifier: Any) -> nn.Module:
    """A classifier; no test here changes it."""
    return new_classifier()


@pytest.fixture(params=["gpt2", "bert"])
def splitter(request: pytest.FixtureRequest, tokenizer: Any, letters: Any) -> Shim:
    """Both splitters, each with a model of its kind, split in the middle, two texts a batch."""
    model = request.getfixturevalue(request.param)
    if request.param == "gpt2":
        return for_generation(model, 1, tokenizer=tokenizer, batch_size=2)
    return with_split_points(model, 1, tokenizer=letters("[CLS] $A [SEP]"), batch_size=2)


# --- making one ---------------------------------------------------------------------------------------------


def test_what_it_is_made_of(gpt2: Any, bert: Any, tokenizer: Any) -> None:
    """A folder, or a model with its tokenizer; the rest are interpreto's errors."""
    assert isinstance(for_generation(str(demo.path()), 1)._model, nn.Module)
    assert for_generation(gpt2, 1, tokenizer=tokenizer)._model is gpt2
    with pytest.raises(InitializationError):
        for_generation(gpt2, 1)
    with pytest.raises(InitializationError):
        with_split_points(bert, 1)
    with pytest.raises(TypeError):
        for_generation(bert, 1, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="auto"):
        for_generation(gpt2, 1, tokenizer=tokenizer, device_map="auto")


@pytest.mark.usefixtures("unchecked")
def test_no_object_of_another_kind(tokenizer: Any) -> None:
    """A number is no model, None is no place."""
    with pytest.raises(TypeError):
        for_generation(3, 1, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="None"):
        for_generation(str(demo.path()), None)


@pytest.mark.parametrize("place", ["transformer.h.1", "transformer.h.1.mlp", "lm_head", 1])
def test_places(gpt2: Any, tokenizer: Any, place: Any) -> None:
    """Paths of modules that return one tensor or a tuple, and layers by number; set later, checked as well."""
    made = for_generation(gpt2, place, tokenizer=tokenizer)
    width = 160 if place == "lm_head" else 64
    assert made.get_latent_shape() == torch.Size([1, 4, width])
    assert made.get_activations(TEXTS)[0].shape == (sum(map(len, TEXTS)), width)
    for wrong in (17, "transformer.h.17", "no.such.path"):
        with pytest.raises(ModelPathError):
            for_generation(gpt2, wrong, tokenizer=tokenizer)
        with pytest.raises(ModelPathError):
            made.split_point = wrong
    made.split_point = 0
    assert made.split_point == "blocks.0.hook_out"
    assert made.get_latent_shape() == torch.Size([1, 4, 64])


def test_a_layer_by_its_number(splitter: Shim) -> None:
    """It is the layer's output, as its path says it."""
    by_number, _ = splitter.get_activations(TEXTS)
    blocks = splitter.own.bridge.architecture.blocks
    splitter.split_point = blocks[1].path
    assert torch.equal(splitter.get_activations(TEXTS)[0], by_number)


# --- activations --------------------------------------------------------------------------------------------


def test_one_tensor_or_a_list(splitter: Shim) -> None:
    """Pairs of activations and predictions; joined, the list is the tensor; float32 on the CPU, no graph."""
    flat, none = splitter.get_activations(TEXTS)
    parts, nothing = splitter.get_activations(TEXTS, flatten_activations=False)
    assert none is nothing is None
    assert len(parts) == len(TEXTS)
    assert all(part.dim() == 2 for part in parts)
    assert torch.equal(torch.cat(parts), flat)
    assert (flat.dtype, flat.device.type, flat.requires_grad) == (torch.float32, "cpu", False)


def test_half_precision_comes_back_whole(tiny: Any, tokenizer: Any) -> None:
    """A bfloat16 model's activations are float32."""
    made = for_generation(tiny("gpt2").bfloat16(), 1, tokenizer=tokenizer)
    assert made._model.dtype == torch.bfloat16
    assert made.get_activations(TEXTS)[0].dtype == torch.float32


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches_change_nothing(splitter: Shim, plain: Any, batch_size: int) -> None:
    """Whatever runs together."""
    expected, _ = splitter.get_activations(TEXTS)
    splitter.own.batch_size = batch_size
    assert plain.gap(splitter.get_activations(TEXTS)[0], expected) < CLOSE


def test_special_tokens(gpt2: Any, letters: Any) -> None:
    """Left out unless asked for; asked for, every token has a row, each its own."""
    made = for_generation(gpt2, 1, tokenizer=letters("[CLS] $A [SEP]"))
    some, _ = made.get_activations(["abc"])
    every, _ = made.get_activations(["abc"], include_all_tokens=True)
    assert (len(some), len(every)) == (3, 5)
    assert torch.equal(every[1:4], some)
    assert len(every.unique(dim=0)) == 5


def test_ids_are_as_good_as_text(splitter: Shim, plain: Any) -> None:
    """Token ids, and what the tokenizer returns, give what the text gives."""
    tokenizer = splitter.own.tokenizer
    text = TEXTS[0].replace(" ", "")
    expected, _ = splitter.get_activations([text])
    encoded = tokenizer([text], return_tensors="pt")
    assert plain.gap(splitter.get_activations(encoded["input_ids"])[0], expected) < CLOSE
    assert plain.gap(splitter.get_activations(encoded)[0], expected) < CLOSE
    batch, _ = splitter.get_activations(tokenizer(TEXTS, return_tensors="pt", padding=True))
    assert plain.gap(batch, splitter.get_activations(TEXTS)[0]) < CLOSE


@pytest.mark.parametrize("wrong", [[], 3, torch.tensor([1, 2]), torch.zeros(1, 2, 3).long()])
def test_wrong_inputs(splitter: Shim, wrong: Any) -> None:
    """ValueErrors."""
    with pytest.raises(ValueError, match=r"inputs|list|shape"):
        splitter.get_activations(wrong)


COUNTS = {
    # rows of "Hi you. No! Ok": [CLS], 2 and 3 letters, a mark, 2 letters, a mark, 2 letters, [SEP]
    Granularity.CLS_TOKEN: 1,
    Granularity.ALL_TOKENS: 13,
    Granularity.TOKEN: 11,
    Granularity.WORD: 6,
    Granularity.SENTENCE: 3,
    Granularity.SAMPLE: 1,
}


@pytest.mark.parametrize("granularity", COUNTS)
@pytest.mark.parametrize("how", Aggregation)
def test_granularities(bert: Any, letters: Any, granularity: Granularity, how: Aggregation) -> None:
    """As many rows as interpreto makes, without its rows of padding; classes once a row or once a text."""
    tokenizer = letters("[CLS] $A [SEP]")
    made = with_split_points(bert, 1, tokenizer=tokenizer, batch_size=2)
    options = {"activation_granularity": granularity, "aggregation_strategy": how}
    texts = ["Hi you. No! Ok", "a"]
    parts, classes = made.get_activations(
        texts, **options, flatten_activations=False, include_predicted_classes=True
    )
    alone = {Granularity.ALL_TOKENS: 3}.get(granularity, 1)
    assert [tuple(part.shape) for part in parts] == [(COUNTS[granularity], 32), (alone, 32)]
    assert [c.shape for c in classes] == [()] * 2
    flat, each = made.get_activations(texts, **options, include_predicted_classes=True)
    assert torch.equal(flat, torch.cat(parts))
    assert each.tolist() == [int(classes[0])] * COUNTS[granularity] + [int(classes[1])] * alone


def test_classes_of_classifiers_only(gpt2: Any, tokenizer: Any) -> None:
    """A ValueError elsewhere."""
    made = with_split_points(gpt2, 1, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="predict"):
        made.get_activations(TEXTS, include_predicted_classes=True)


# --- gradients ----------------------------------------------------------------------------------------------


ATOMS = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))


def encode(rows: Tensor) -> Tensor:
    return (rows @ ATOMS[:, : rows.shape[1]].T).relu()


def decode_to(width: int) -> Callable[[Tensor], Tensor]:
    return lambda concepts: concepts @ ATOMS[:, :width]


def test_shapes_of_gradients(splitter: Shim) -> None:
    """One tensor a text: targets, rows, concepts; targets are positions, or classes of a classifier."""
    width = splitter.get_latent_shape()[-1]
    found = splitter._get_concept_output_gradients(TEXTS, encode, decode_to(width))
    rows, _ = splitter.get_activations(TEXTS, flatten_activations=False)
    classifies = isinstance(splitter.own, ModelWithSplitPoints)
    for gradient, own in zip(found, rows, strict=True):
        assert gradient.shape == (3 if classifies else len(own), len(own), 7)
        assert gradient.device.type == "cpu"


@pytest.mark.parametrize("targets", [[0], [1, 0], [-1], [0, 1, -1]])
def test_explicit_targets(splitter: Shim, targets: list[int], plain: Any) -> None:
    """In the order given; of all targets these, and the same in other batches."""
    decode = decode_to(splitter.get_latent_shape()[-1])
    every = splitter._get_concept_output_gradients(TEXTS, encode, decode)
    found = splitter._get_concept_output_gradients(
        TEXTS, encode, decode, targets=targets, batch_size=3
    )
    for gradient, whole in zip(found, every, strict=True):
        assert plain.gap(gradient, whole[targets]) < CLOSE


@pytest.mark.parametrize("granularity", [*COUNTS])
def test_gradients_by_granularity(bert: Any, letters: Any, granularity: Granularity) -> None:
    """Rows as activations have them; a whole text's row cannot be put back: a ValueError."""
    made = with_split_points(bert, 1, tokenizer=letters("[CLS] $A [SEP]"))

    def gradients() -> list[Tensor]:
        return made._get_concept_output_gradients(
            ["Hi you. No! Ok"], encode, decode_to(32), activation_granularity=granularity
        )

    if granularity is Granularity.SAMPLE:
        with pytest.raises(ValueError, match="SAMPLE"):
            gradients()
    else:
        (found,) = gradients()
        assert found.shape == (3, COUNTS[granularity], 7)
        torch.testing.assert_close(found.abs().sum((1, 2)), torch.ones(3))
