"""ModelWithSplitPoints: several places in one pass, every granularity by hand, a classifier's predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import Aggregation, Granularity, InputError, ModelWithSplitPoints

CLOSE = 1e-5
BLOCK = "bert.encoder.layer.1"
TEXTS = ['Hi you. "No!" ok', "a", "some words. And more words"]

TOKENS = {
    # the tokens of each row of TEXTS, by hand; [CLS] is 0, the letters and marks follow, [SEP] is last
    Granularity.CLS_TOKEN: [[[0]], [[0]], [[0]]],
    Granularity.ALL_TOKENS: [[[i] for i in range(15)], [[0], [1], [2]], [[i] for i in range(24)]],
    Granularity.TOKEN: [[[i] for i in range(1, 14)], [[1]], [[i] for i in range(1, 23)]],
    Granularity.WORD: [
        [[1, 2], [3, 4, 5], [6], [7], [8, 9], [10], [11], [12, 13]],
        [[1]],
        [[1, 2, 3, 4], [5, 6, 7, 8, 9], [10], [11, 12, 13], [14, 15, 16, 17], [18, 19, 20, 21, 22]],
    ],
    Granularity.SENTENCE: [
        [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11], [12, 13]],
        [[1]],
        [list(range(1, 11)), list(range(11, 23))],
    ],
    Granularity.SAMPLE: [[list(range(1, 14))], [[1]], [list(range(1, 23))]],
}


def made(rows: Tensor, how: Aggregation) -> Tensor:
    """One row of several, written another way than the library's."""
    if how is Aggregation.MEAN:
        return rows.sum(0) / len(rows)
    if how is Aggregation.SUM:
        return torch.einsum("nd->d", rows)
    top, bottom = rows.amax(0), rows.amin(0)
    if how is Aggregation.SIGNED_MAX:
        return torch.where(top.abs() >= bottom.abs(), top, bottom)
    return top if how is Aggregation.MAX else bottom


@pytest.fixture(scope="module")
def model(new_classifier: Callable[..., nn.Module]) -> nn.Module:
    """A tiny BERT with three classes; no test here changes it."""
    return new_classifier()


@pytest.fixture(scope="module")
def split_of(model: nn.Module, letters: Any) -> Callable[..., ModelWithSplitPoints]:
    """``split_of("left", 3, [1])``: the classifier split, with a tokenizer that pads on that side."""

    def make(side: str = "right", batch_size: int = 1, points: Any = 1) -> ModelWithSplitPoints:
        tokenizer = letters("[CLS] $A [SEP]", padding_side=side)
        return ModelWithSplitPoints(model, tokenizer, points, batch_size=batch_size)

    return make


@pytest.fixture(scope="module")
def states(model: nn.Module, letters: Any, plain: Any) -> list[Tensor]:
    """What a plain hook behind layer 1 sees at each of TEXTS alone, [pos, d]."""
    tokenizer = letters("[CLS] $A [SEP]")
    encoded = [tokenizer(text, return_tensors="pt") for text in TEXTS]
    return [plain.read(model, {**given}, BLOCK)[BLOCK][0][0] for given in encoded]


# --- rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", Granularity)
@pytest.mark.parametrize(("side", "batch_size"), [("right", 1), ("right", 3), ("left", 3)])
def test_rows_by_hand(
    split_of: Any,
    states: list[Tensor],
    plain: Any,
    granularity: Granularity,
    side: str,
    batch_size: int,
) -> None:
    """The mean over the tokens counted off by hand, of what a plain hook sees at each text alone."""
    split = split_of(side, batch_size)
    found, predictions = split.get_activations(TEXTS, granularity, flatten_activations=False)
    assert predictions is None
    for rows, own, groups in zip(found, states, TOKENS[granularity], strict=True):
        assert plain.gap(rows, torch.stack([own[group].mean(0) for group in groups])) < CLOSE
    assert torch.equal(split.get_activations(TEXTS, granularity)[0], torch.cat(found))


@pytest.mark.parametrize("how", Aggregation)
@pytest.mark.parametrize(
    "granularity", [Granularity.WORD, Granularity.SENTENCE, Granularity.SAMPLE]
)
def test_aggregations_by_hand(
    split_of: Any, states: list[Tensor], plain: Any, granularity: Granularity, how: Aggregation
) -> None:
    """Every way of making a row of several tokens, on real activations."""
    found, _ = split_of(batch_size=3).get_activations(
        TEXTS,
        activation_granularity=granularity,
        aggregation_strategy=how,
        flatten_activations=False,
    )
    for rows, own, groups in zip(found, states, TOKENS[granularity], strict=True):
        assert plain.gap(rows, torch.stack([made(own[group], how) for group in groups])) < CLOSE


def test_the_enums_are_at_hand() -> None:
    """The class names its granularities and aggregations, as interpreto's does."""
    assert ModelWithSplitPoints.activation_granularities is Granularity
    assert ModelWithSplitPoints.aggregation_strategies is Aggregation


def test_what_a_granularity_needs(split_of: Any, model: Any, letters: Any) -> None:
    """Ids have no words; texts without a CLS token have no row for it; SAMPLE has one row a text."""
    ids = torch.tensor([[1, 9, 10, 2]])
    split = split_of()
    for granularity in (Granularity.WORD, Granularity.SENTENCE):
        with pytest.raises(InputError, match="needs text"):
            split.get_activations(ids, granularity)
    assert split.get_activations(ids, Granularity.CLS_TOKEN)[0].shape == (1, 32)
    assert split.get_activations(ids, Granularity.SAMPLE)[0].shape == (1, 32)
    bare = ModelWithSplitPoints(model, letters(), 1)
    with pytest.raises(InputError, match="CLS_TOKEN needs texts that begin with"):
        bare.get_activations(["abc"], Granularity.CLS_TOKEN)


def test_dtype_device_and_memory(split_of: Any) -> None:
    """As for a single point: float32 copies on the CPU unless asked otherwise."""
    split = split_of(batch_size=3, points=[0, 2])
    found, _ = split.get_activations(TEXTS, Granularity.WORD, flatten_activations=False)
    for rows in [*found["0"], *found["2"]]:
        assert rows.untyped_storage().nbytes() == rows.numel() * 4
    other, _ = split.get_activations(TEXTS, Granularity.WORD, dtype=torch.half, device="meta")
    assert (other["2"].dtype, other["2"].device.type) == (torch.half, "meta")


# --- places -------------------------------------------------------------------------------------------------


def test_several_places_in_one_pass(split_of: Any, model: Any, plain: Any, letters: Any) -> None:
    """One run a batch serves all, each under the name it was given; no layer behind the last of them runs."""
    inside = "bert.encoder.layer.0.output.dense"
    split = split_of("left", 2, [0, "blocks.0.mlp.hook_out", 1, inside])
    runs = [0, 0, 0]

    def count(layer: int) -> Callable[..., None]:
        return lambda *given: runs.__setitem__(layer, runs[layer] + 1)

    layers = enumerate(model.bert.encoder.layer)
    handles = [layer.attention.register_forward_hook(count(i)) for i, layer in layers]
    found, _ = split.get_activations(TEXTS)
    for handle in handles:
        handle.remove()
    assert runs == [2, 2, 0]
    assert list(found) == ["0", "blocks.0.mlp.hook_out", "1", inside]
    places = ["bert.encoder.layer.0", inside, BLOCK, inside]
    given = letters("[CLS] $A [SEP]")(TEXTS[0], return_tensors="pt")
    seen = plain.read(model, {**given}, *places)
    for rows, place in zip(found.values(), places, strict=True):
        assert rows.shape == (13 + 1 + 22, 32)
        assert plain.gap(rows[:13], seen[place][0][0, 1:14]) < CLOSE


def test_one_place_is_a_tensor_several_are_a_dictionary(split_of: Any) -> None:
    """A single point gives its rows bare; points that are one place by two names have equal rows."""
    bare, _ = split_of(points=[1]).get_activations(TEXTS)
    assert torch.equal(bare, split_of(points=1).get_activations(TEXTS)[0])
    twice, _ = split_of(points=[1, "blocks.1.hook_out"]).get_activations(TEXTS)
    assert list(twice) == ["1", "blocks.1.hook_out"]
    assert torch.equal(twice["1"], bare)
    assert torch.equal(twice["blocks.1.hook_out"], bare)


def test_places_can_be_moved(split_of: Any) -> None:
    """split_points tells the point behind each name, and can be set; a wrong one changes nothing."""
    split = split_of(points=[0, -1])
    assert split.split_points == {"0": "blocks.0.hook_out", "-1": "blocks.2.hook_out"}
    assert split.get_latent_shape() == {"0": (1, 6, 32), "-1": (1, 6, 32)}
    split.split_points = ["bert.encoder.layer.1.intermediate"]
    with pytest.raises(IndexError, match="layer 9"):
        split.split_points = [0, 9]
    assert list(split.split_points) == ["bert.encoder.layer.1.intermediate"]
    assert split.get_latent_shape() == {"bert.encoder.layer.1.intermediate": (1, 6, 64)}
    assert split.get_activations(TEXTS)[0].shape == (13 + 1 + 22, 64)


@pytest.mark.parametrize(
    ("name", "path"), [("t5", "encoder.block.0"), ("bart", "model.encoder.layers.0")]
)
def test_encoders_of_other_models(
    tiny: Any, new_tokenizer: Any, plain: Any, name: str, path: str
) -> None:
    """The encoder of a model that also has a decoder, padded or alone."""
    model, tokenizer = tiny(name, "seq2seq"), new_tokenizer(model_max_length=64)
    split = ModelWithSplitPoints(model, tokenizer, path, batch_size=2)
    found, _ = split.get_activations(["some words", "abc"], flatten_activations=False)
    for rows, text in zip(found, ["some words", "abc"], strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        given = {"input_ids": ids, "decoder_input_ids": ids}
        assert plain.gap(rows, plain.read(model, given, path)[path][0][0]) < CLOSE


# --- predictions --------------------------------------------------------------------------------------------


def test_predictions_of_a_classifier(split_of: Any, model: Any, letters: Any) -> None:
    """The class the model gives each text alone; repeated for each of its rows where they are joined."""
    texts = [*TEXTS, "zq", "Qxw,", "the, the"]
    tokenizer = letters("[CLS] $A [SEP]")
    with torch.no_grad():
        classes = [model(**tokenizer(text, return_tensors="pt")).logits.argmax() for text in texts]
    assert len({int(c) for c in classes}) > 1
    split = split_of("right", 4)
    rows, found = split.get_activations(
        texts, Granularity.WORD, include_predicted_classes=True, flatten_activations=False
    )
    assert [int(c) for c in found] == [int(c) for c in classes]
    assert all(c.shape == () for c in found)
    flat, each = split.get_activations(texts, Granularity.WORD, include_predicted_classes=True)
    assert torch.equal(flat, torch.cat(rows))
    assert each.tolist() == [int(c) for c, own in zip(classes, rows, strict=True) for _ in own]
    assert each.shape == (len(flat),)


def test_only_classifiers_predict_classes(tiny: Any, tokenizer: Any) -> None:
    """A language model's likeliest tokens are no classes of a text."""
    split = ModelWithSplitPoints(tiny("gpt2"), tokenizer, 1)
    with pytest.raises(InputError, match="GPT2LMHeadModel predicts no class"):
        split.get_activations(["abc"], include_predicted_classes=True)
