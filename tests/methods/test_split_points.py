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
    for said in (1, "blocks.1.hook_out"):
        split.split_points = said
        assert split.split_points == {str(said): "blocks.1.hook_out"}


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


@pytest.mark.parametrize(
    ("name", "path"), [("t5", "encoder.block.0"), ("bart", "model.encoder.layers.0")]
)
def test_the_decoder_does_not_run_for_the_encoder(
    tiny: Any, new_tokenizer: Any, name: str, path: str
) -> None:
    """Nothing runs behind an encoder's layer, not even the encoder's next one."""
    model, runs = tiny(name, "seq2seq"), []
    split = ModelWithSplitPoints(model, new_tokenizer(model_max_length=64), path)
    for other in (path.replace("0", "1"), path.replace("encoder", "decoder")):
        model.get_submodule(other).register_forward_hook(lambda *given: runs.append(1))
    split.get_activations(["abc"])
    assert not runs


def test_rows_of_a_decoder(tiny: Any, new_tokenizer: Any, plain: Any) -> None:
    """A decoder reads the text shifted right; padded or alone, whatever side the tokenizer says."""
    model, tokenizer = tiny("t5", "seq2seq"), new_tokenizer(padding_side="left")
    split = ModelWithSplitPoints(model, tokenizer, 1, batch_size=2)
    found, _ = split.get_activations(["some words", "abc"], flatten_activations=False)
    for rows, text in zip(found, ["some words", "abc"], strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        shifted = torch.nn.functional.pad(ids[:, :-1], (1, 0))
        given = {"input_ids": ids, "decoder_input_ids": shifted}
        path = "decoder.block.1"
        assert plain.gap(rows, plain.read(model, given, path)[path][0][0]) < CLOSE


@pytest.mark.parametrize("name", ["bloom", "t5"])
def test_a_model_without_a_limit(tiny: Any, tokenizer: Any, name: str) -> None:
    """No limit of the model and none of the tokenizer is no limit."""
    model = tiny(name, "seq2seq" if name == "t5" else "causal")
    assert tokenizer.model_max_length > 10**20
    found, _ = ModelWithSplitPoints(model, tokenizer, 0).get_activations(["abc"])
    assert found.shape == (3, 64)


def test_a_model_that_is_not_told_of_padding(tiny: Any, tokenizer: Any, plain: Any) -> None:
    """FNet takes no mask and mixes all that is there: only texts of one length run together."""
    model, widths = tiny("fnet", "masked"), []
    split = ModelWithSplitPoints(model, tokenizer, 0, batch_size=8)
    handle = model.fnet.embeddings.register_forward_hook(
        lambda m, args, out: widths.append(tuple(out.shape[:2]))
    )
    texts = ["abc", "a b c", "xyz", "a", "cba"]
    found, _ = split.get_activations(texts, flatten_activations=False)
    handle.remove()
    assert widths == [(1, 5), (3, 3), (1, 1)]
    path = "fnet.encoder.layer.0"
    for rows, text in zip(found, texts, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert plain.gap(rows, plain.read(model, ids, path)[path][0][0]) < CLOSE


# --- pairs of texts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_a_tokenizer_returns_of_two_texts(
    model: Any, split_of: Any, plain: Any, batch_size: int
) -> None:
    """token_type_ids reach the model, padded or not, beside texts without; so do they for gradients."""
    rows = [
        ([1, 9, 10, 2, 11, 2], [0, 0, 0, 0, 1, 1]),
        ([1, 9, 2], [0, 0, 0]),
        ([1, 9, 10, 2], [0, 0, 1, 1]),
    ]
    given = {"input_ids": [ids for ids, _ in rows], "token_type_ids": [types for _, types in rows]}
    split = split_of("left", batch_size)
    found, _ = split.get_activations(given, Granularity.ALL_TOKENS, flatten_activations=False)
    gradients = split.concept_output_gradient(
        given, torch.clone, torch.clone, activation_granularity=Granularity.ALL_TOKENS
    )
    for own, gradient, (ids, types) in zip(found, gradients, rows, strict=True):
        alone = {"input_ids": torch.tensor([ids]), "token_type_ids": torch.tensor([types])}
        assert plain.gap(own, plain.read(model, alone, BLOCK)[BLOCK][0][0]) < CLOSE
        (expected,) = split.concept_output_gradient(
            alone, torch.clone, torch.clone, activation_granularity=Granularity.ALL_TOKENS
        )
        assert plain.gap(gradient, expected) < CLOSE
    (plainly, _), (second, _) = (
        split.get_activations({"input_ids": [ids]}, Granularity.ALL_TOKENS) for ids, _ in rows[1:]
    )
    assert plain.gap(plainly, found[1]) < CLOSE
    assert plain.gap(second, found[2]) > 1e-2


def test_a_model_that_knows_no_pairs(tiny: Any, tokenizer: Any) -> None:
    """Types that a model does not read are refused, not dropped; where all are the first they say nothing."""
    split = ModelWithSplitPoints(tiny("llama"), tokenizer, 1)
    given = {"input_ids": [[9, 10]], "token_type_ids": [[0, 1]]}
    with pytest.raises(InputError, match="token_type_ids"):
        split.get_activations(given)
    expected, _ = split.get_activations({"input_ids": [[9, 10]]})
    given["token_type_ids"] = [[0, 0]]
    assert torch.equal(split.get_activations(given)[0], expected)


# --- classifiers --------------------------------------------------------------------------------------------


def test_a_classifier_padded_in_front(new_classifier: Any, letters: Any, plain: Any) -> None:
    """A BERT classifier reads its first column; padded in front, classes and gradients stay each text's."""
    model, texts = new_classifier(), ["a", "zq", "Qxw,", "the, the", "some words. And more"]
    raw = {"concepts_x_gradients": False, "normalization": False}
    for side in ("right", "left"):
        split = ModelWithSplitPoints(
            model, letters("[CLS] $A [SEP]", padding_side=side), 1, batch_size=5
        )
        _, classes = split.get_activations(
            texts, include_predicted_classes=True, flatten_activations=False
        )
        gradients = split.concept_output_gradient(texts, torch.clone, torch.clone, **raw)
        for text, found, gradient in zip(texts, classes, gradients, strict=True):
            with torch.no_grad():
                alone = model(**split.tokenizer(text, return_tensors="pt")).logits.argmax()
            assert found == alone
            (expected,) = split.concept_output_gradient(text, torch.clone, torch.clone, **raw)
            assert plain.gap(gradient, expected) < CLOSE


@pytest.fixture(scope="module")
def other_classifiers() -> Callable[..., Any]:
    """``other_classifiers("xlnet", pad_token_id=7)``: tiny ones that do not read their first column."""
    import transformers as hf

    def make(name: str, **options: Any) -> Any:
        sizes = {"vocab_size": 160, "num_labels": 3}
        config = {
            "xlnet": lambda **o: hf.XLNetConfig(d_model=32, n_layer=2, n_head=2, d_inner=64, **o),
            "gpt2": lambda **o: hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, **o),
        }[name](**{**sizes, **options})
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model = hf.AutoModelForSequenceClassification.from_config(config).eval()
            for parameter in model.parameters():
                parameter.data += 0.2 * torch.randn_like(parameter)
        return model

    return make


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("xlnet", {}),  # reads the last column
        ("gpt2", {"pad_token_id": 0}),  # looks for the last token that is no padding
        ("gpt2", {"pad_token_id": 150}),  # by another id than the tokenizer's
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_classifiers_that_read_another_column(
    other_classifiers: Any, letters: Any, plain: Any, name: str, options: Any, side: str
) -> None:
    """Classes, rows and gradients of a batch are those of each text alone."""
    model = other_classifiers(name, **options)
    tokenizer = letters("$A [SEP]", padding_side=side)
    split = ModelWithSplitPoints(model, tokenizer, 0, batch_size=4)
    texts = ["Qxw,", "a", "the, the", "zq"]
    rows, classes = split.get_activations(
        texts, include_predicted_classes=True, flatten_activations=False
    )
    gradients = split.concept_output_gradient(texts, torch.clone, torch.clone)
    assert len({int(c) for c in classes}) > 1
    for text, own, found, gradient in zip(texts, rows, classes, gradients, strict=True):
        with torch.no_grad():
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            assert found == model(ids).logits.argmax()
        assert plain.gap(own, split.get_activations(text)[0]) < CLOSE
        (expected,) = split.concept_output_gradient(text, torch.clone, torch.clone)
        assert plain.gap(gradient, expected) < CLOSE


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


def test_a_classifier_from_a_folder(model: Any, letters: Any, split_of: Any, tmp_path: Any) -> None:
    """It is loaded as what it was saved from, and predicts what it did; another class can be asked for."""
    from transformers import BertForMaskedLM

    model.save_pretrained(tmp_path)
    letters("[CLS] $A [SEP]").save_pretrained(tmp_path)
    expected = split_of().get_activations(TEXTS, include_predicted_classes=True)
    for config in (None, model.config):
        split = ModelWithSplitPoints(tmp_path, split_points=1, config=config)
        assert type(split.model) is type(model)
        found = split.get_activations(TEXTS, include_predicted_classes=True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # Only layers are loaded of what is no such model; transformers says which heads are made up.
    other = ModelWithSplitPoints(tmp_path, split_points=1, automodel=BertForMaskedLM)
    assert type(other.model) is BertForMaskedLM
    assert torch.equal(other.get_activations(TEXTS)[0], split_of().get_activations(TEXTS)[0])


def test_only_classifiers_predict_classes(tiny: Any, tokenizer: Any) -> None:
    """A language model's likeliest tokens are no classes of a text."""
    split = ModelWithSplitPoints(tiny("gpt2"), tokenizer, 1)
    with pytest.raises(InputError, match="GPT2LMHeadModel predicts no class"):
        split.get_activations(["abc"], include_predicted_classes=True)
