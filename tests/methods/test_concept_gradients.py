"""Concept gradients against central differences of the untouched model, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import Aggregation, Granularity, ModelWithSplitPoints, SplitterForGeneration

TEXTS = ["words", "ab", "some, not"]
RAW = {"concepts_x_gradients": False, "normalization": False}
PRECISE = 1e-6
STEP = 1e-5
"""Of central differences: their own error is of the order of STEP squared, and 1e-16 / STEP by rounding."""


class Dictionary:
    """How concepts are made of rows [n, d] and rows of concepts; drawn at random."""

    def __init__(self, kind: str, d: int, n: int = 10) -> None:
        random = torch.Generator().manual_seed(3)
        self.kind = kind
        self.weights = torch.randn(d, n, generator=random, dtype=torch.double) / d**0.5
        self.atoms = torch.randn(n, d, generator=random, dtype=torch.double)

    def encode(self, rows: Tensor) -> Tensor:
        if self.kind == "identity":
            return rows
        made = rows.double() @ self.weights
        return made.relu() if self.kind == "sae" else made

    def decode(self, concepts: Tensor) -> Tensor:
        if self.kind == "identity":
            return concepts
        # What is no linear map, too: its slope is another at every text.
        return (concepts.tanh() if self.kind == "curved" else concepts) @ self.atoms + 0.1


class ByHand:
    """A model's outputs as a function of concepts, by a plain hook on the module whose output is rebuilt."""

    def __init__(self, plain: Any, model: nn.Module, path: str, given: dict[str, Tensor]) -> None:
        self.plain = plain
        self.model = model
        self.path = path
        self.given = given
        self.states = plain.read(model, given, path)[path][0]

    def concepts(
        self, dictionary: Dictionary, groups: list[list[int]], how: Aggregation = Aggregation.MEAN
    ) -> Tensor:
        """The concepts of each group of tokens, [row, concept]."""
        return dictionary.encode(torch.stack([how.aggregate(self.states[0, g]) for g in groups]))

    def outputs(
        self, concepts: Tensor, dictionary: Dictionary, groups: list[list[int]], how: Any
    ) -> Tensor:
        """What the model makes of many versions of the concepts, [version, row, concept], all in one run."""
        n = len(concepts)

        def put(states: Tensor) -> Tensor:
            states = states.clone()
            for row, group in enumerate(groups):
                share = len(group) if how is Aggregation.SUM else 1
                states[:, group] = dictionary.decode(concepts[:, row])[:, None] / share
            return states

        given = {key: value.repeat(n, 1) for key, value in self.given.items()}
        logits = self.plain.edited(self.model, given, self.path, put)
        return logits if logits.dim() == 2 else logits.max(-1).values

    def differences(
        self, dictionary: Dictionary, groups: list[list[int]], how: Aggregation = Aggregation.MEAN
    ) -> Tensor:
        """Central differences of every output by every concept, [output, row, concept]."""
        concepts = self.concepts(dictionary, groups, how)
        moves = STEP * torch.eye(concepts.numel(), dtype=torch.double).view(-1, *concepts.shape)
        after = self.outputs(concepts + moves, dictionary, groups, how)
        before = self.outputs(concepts - moves, dictionary, groups, how)
        return ((after - before) / (2 * STEP)).T.unflatten(1, concepts.shape)


@pytest.fixture(scope="module")
def model_of(tiny: Callable[..., nn.Module]) -> Callable[[str], nn.Module]:
    """Tiny models in double precision, built once; no test here changes them."""
    return {name: tiny(name).double() for name in ("gpt2", "llama", "gpt_neox")}.__getitem__


@pytest.fixture(scope="module")
def classifier(new_classifier: Any) -> Any:
    """A tiny BERT with three classes, in double precision."""
    return new_classifier().double()


@pytest.fixture
def in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama's norm as Hugging Face writes it, without its step down to float32."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def one_each(length: int) -> list[list[int]]:
    return [[i] for i in range(length)]


def by_hand(plain: Any, model: nn.Module, path: str, tokenizer: Any, text: str) -> ByHand:
    return ByHand(plain, model, path, {"input_ids": torch.tensor([tokenizer(text)["input_ids"]])})


# --- language models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["identity", "linear", "sae", "curved"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_gpt2(model_of: Any, new_tokenizer: Any, plain: Any, kind: str, side: str) -> None:
    """Every target, row and concept of a padded batch is the central difference at that text alone."""
    tokenizer = new_tokenizer(padding_side=side)
    model, dictionary = model_of("gpt2"), Dictionary(kind, 64)
    splitter = SplitterForGeneration(model, 0, tokenizer=tokenizer, batch_size=3)
    found = splitter.concept_output_gradient(TEXTS, dictionary.encode, dictionary.decode, **RAW)
    for gradient, text in zip(found, TEXTS, strict=True):
        expected = by_hand(plain, model, "transformer.h.0", tokenizer, text)
        groups = one_each(len(text))
        if kind == "sae":
            active = expected.concepts(dictionary, groups) > 0
            assert active.any()
            assert not active.all()
        assert gradient.dtype == torch.double
        assert plain.gap(gradient, expected.differences(dictionary, groups)) < PRECISE


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
@pytest.mark.parametrize("kind", ["identity", "linear", "sae"])
def test_rotary_models(model_of: Any, tokenizer: Any, plain: Any, name: str, kind: str) -> None:
    """Llama, its norm in double precision too, and GPT-NeoX."""
    model, dictionary = model_of(name), Dictionary(kind, 64)
    path = "model.layers.0" if name == "llama" else "gpt_neox.layers.0"
    splitter = SplitterForGeneration(model, 0, tokenizer=tokenizer, batch_size=3)
    found = splitter.concept_output_gradient(TEXTS, dictionary.encode, dictionary.decode, **RAW)
    for gradient, text in zip(found, TEXTS, strict=True):
        expected = by_hand(plain, model, path, tokenizer, text)
        assert plain.gap(gradient, expected.differences(dictionary, one_each(len(text)))) < PRECISE


@pytest.mark.parametrize("kind", ["identity", "linear", "sae"])
def test_llama_as_it_is(
    model_of: Any, tokenizer: Any, plain: Any, kind: str, request: pytest.FixtureRequest
) -> None:
    """The model whose norm goes through float32 has the gradient of the one whose norm does not.

    Its own differences are no measure: rounded to float32, its outputs move in steps of 1e-7 of their size,
    which at STEP is 1e-2 of a slope (measured: 1e-2 to 4e-2). Its gradient is rounded once a norm (measured:
    1e-7 to 4e-7).
    """
    model, dictionary = model_of("llama"), Dictionary(kind, 64)
    splitter = SplitterForGeneration(model, 0, tokenizer=tokenizer, batch_size=3)
    found = splitter.concept_output_gradient(TEXTS, dictionary.encode, dictionary.decode, **RAW)
    request.getfixturevalue("in_double")
    for gradient, text in zip(found, TEXTS, strict=True):
        expected = by_hand(plain, model, "model.layers.0", tokenizer, text)
        assert plain.gap(gradient, expected.differences(dictionary, one_each(len(text)))) < 3e-6


@pytest.mark.parametrize(
    ("said", "path"),
    [
        ("transformer.h.1.mlp", "transformer.h.1.mlp"),
        ("hook_embed", "transformer.wte"),
        (1, "transformer.h.1"),
        ("blocks.1.attn.hook_z", "transformer.h.1.attn.c_proj<"),
    ],
)
def test_other_places(model_of: Any, tokenizer: Any, plain: Any, said: Any, path: str) -> None:
    """What is rebuilt may be any place: the embeddings, part of a layer, the last layer's output, heads."""
    model, dictionary = model_of("gpt2"), Dictionary("linear", 64)
    splitter = SplitterForGeneration(model, said, tokenizer=tokenizer)
    (found,) = splitter.concept_output_gradient(
        "words", dictionary.encode, dictionary.decode, **RAW
    )
    expected = by_hand(plain, model, path, tokenizer, "words")
    assert plain.gap(found, expected.differences(dictionary, one_each(5))) < PRECISE


def test_heads_are_side_by_side_in_concepts_too(model_of: Any, tokenizer: Any) -> None:
    """A place with heads gives encode the rows that get_activations gives, one text after the other."""
    splitter = SplitterForGeneration(
        model_of("gpt2"), "blocks.1.attn.hook_z", tokenizer=tokenizer, batch_size=2
    )
    rows, _ = splitter.get_activations(["abc", "a"], dtype=None)
    given: list[Tensor] = []

    def encode(x: Tensor) -> Tensor:
        given.append(x)
        return x

    splitter.concept_output_gradient(["abc", "a"], encode, torch.clone)
    assert torch.equal(given[0], rows)
    assert rows.shape == (4, 64)


def test_later_rows_do_not_matter(model_of: Any, tokenizer: Any) -> None:
    """A position's logit does not depend on what stands behind it, and depends on everything else."""
    splitter = SplitterForGeneration(model_of("gpt2"), 0, tokenizer=tokenizer)
    (found,) = splitter.concept_output_gradient("words", torch.clone, torch.clone, **RAW)
    depends = found.abs().amax(-1) > 0
    assert torch.equal(depends, torch.ones(5, 5).tril().bool())


# --- classifiers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["identity", "linear", "sae"])
def test_bert(classifier: Any, letters: Any, plain: Any, kind: str) -> None:
    """The classes of a text by the concepts of its tokens; [CLS] and [SEP] stay as they are."""
    tokenizer, dictionary = letters("[CLS] $A [SEP]"), Dictionary(kind, 32)
    split = ModelWithSplitPoints(classifier, tokenizer, 1, batch_size=3)
    texts = ["words", "ab", "Some not"]
    found = split.concept_output_gradient(texts, dictionary.encode, dictionary.decode, **RAW)
    for gradient, text in zip(found, texts, strict=True):
        given = tokenizer(text, return_tensors="pt")
        expected = ByHand(plain, classifier, "bert.encoder.layer.1", {**given})
        groups = [[i] for i in range(1, given["input_ids"].shape[1] - 1)]
        assert gradient.shape[0] == 3
        assert plain.gap(gradient, expected.differences(dictionary, groups)) < PRECISE


def test_the_first_token_alone(classifier: Any, letters: Any, plain: Any) -> None:
    """With CLS_TOKEN only its place is rebuilt."""
    tokenizer, dictionary = letters("[CLS] $A [SEP]"), Dictionary("linear", 32)
    split = ModelWithSplitPoints(classifier, tokenizer, [0, -1])
    for said, path in ((0, "bert.encoder.layer.0"), (-1, "bert.encoder.layer.2")):
        (found,) = split.concept_output_gradient(
            "words", dictionary.encode, dictionary.decode, None, said, Granularity.CLS_TOKEN, **RAW
        )
        expected = ByHand(plain, classifier, path, {**tokenizer("words", return_tensors="pt")})
        assert found.shape == (3, 1, 10)
        assert plain.gap(found, expected.differences(dictionary, [[0]])) < PRECISE


def test_all_tokens(classifier: Any, letters: Any, plain: Any) -> None:
    """With ALL_TOKENS special tokens are rebuilt too; padding still is not."""
    tokenizer, dictionary = letters("[CLS] $A [SEP]"), Dictionary("linear", 32)
    split = ModelWithSplitPoints(classifier, tokenizer, 0, batch_size=2)
    found = split.concept_output_gradient(
        ["words", "ab"],
        dictionary.encode,
        dictionary.decode,
        activation_granularity=Granularity.ALL_TOKENS,
        **RAW,
    )
    for gradient, text in zip(found, ["words", "ab"], strict=True):
        expected = ByHand(
            plain, classifier, "bert.encoder.layer.0", {**tokenizer(text, return_tensors="pt")}
        )
        assert (
            plain.gap(gradient, expected.differences(dictionary, one_each(len(text) + 2))) < PRECISE
        )


# --- rows of several tokens ---------------------------------------------------------------------------------

CUTS = {
    Granularity.WORD: [[[0, 1], [2], [3, 4, 5]], [[0, 1, 2], [3]]],
    Granularity.SENTENCE: [[[0, 1, 2], [3, 4, 5]], [[0, 1, 2, 3]]],
}


@pytest.mark.parametrize("how", Aggregation)
@pytest.mark.parametrize("granularity", CUTS)
def test_rows_are_put_back_in_all_their_places(
    model_of: Any, letters: Any, plain: Any, granularity: Granularity, how: Aggregation
) -> None:
    """What a row is decoded to stands in each of its tokens' places; of a sum, its share."""
    tokenizer, dictionary = letters(padding_side="left"), Dictionary("linear", 64)
    model, texts = model_of("gpt2"), ["Hi. you", "abc!"]
    splitter = SplitterForGeneration(model, 0, tokenizer=tokenizer, batch_size=2)
    found = splitter.concept_output_gradient(
        texts,
        dictionary.encode,
        dictionary.decode,
        activation_granularity=granularity,
        aggregation_strategy=how,
        **RAW,
    )
    for gradient, text, groups in zip(found, texts, CUTS[granularity], strict=True):
        expected = by_hand(plain, model, "transformer.h.0", tokenizer, text)
        assert plain.gap(gradient, expected.differences(dictionary, groups, how)) < PRECISE


# --- what a probe of the embedded model finds ---------------------------------------------------------------


def test_paris_follows_from_france() -> None:
    """At the middle layer, of 128 directions, the one that tells France from other countries has the largest
    share in " Paris"; in " Rome" it has none to speak of."""
    from lensbridge import demo
    from lensbridge.demo.tasks import CAPITAL_FRAMES, CAPITALS

    splitter = SplitterForGeneration(demo.path(), 2, batch_size=64)
    seen, *probed = [frame for frame in CAPITAL_FRAMES if frame.answer == "capital"]

    def mean_of(country: str) -> Tensor:
        return splitter.get_activations([frame.prompt(country) for frame in probed])[0].mean(0)

    means = torch.stack([mean_of(country) for country in CAPITALS])
    center = means.mean(0)
    france = means[list(CAPITALS).index("France")] - center
    basis, _ = torch.linalg.qr(torch.cat([france[:, None], torch.eye(128)], dim=1))
    basis[:, 0] = france / france.norm()

    prompts = [seen.prompt("France"), seen.prompt("Italy")]
    for prompt, answer in zip(prompts, (" Paris", " Rome"), strict=True):
        assert splitter.bridge(prompt, prepend_bos=False, return_type="predictions") == answer
    of_paris, of_rome = splitter.concept_output_gradient(
        prompts, lambda rows: (rows - center) @ basis, lambda c: c @ basis.T + center, targets=[-1]
    )
    shares = of_paris[0].sum(0)
    assert shares.argmax() == 0
    assert shares[0] > 2 * shares[1:].max()
    assert of_rome[0].sum(0)[0] < shares[0] / 10
