"""What splitters and concept gradients do not do yet, as it should be; a mark goes with its fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import (
    GradientError,
    Granularity,
    InputError,
    ModelWithSplitPoints,
    SplitterForGeneration,
    TransformerBridge,
    demo,
)
from lensbridge.methods import concept_gradients
from lensbridge.methods.granularity import groups_of, samples_of, sentence_ends

OPEN = pytest.mark.xfail(strict=True)
RAW = {"concepts_x_gradients": False, "normalization": False}
CLOSE = 1e-5


@pytest.fixture(scope="module")
def bridge(tiny: Callable[..., nn.Module], tokenizer: Any) -> TransformerBridge:
    """A bridge around a GPT-2; no test here changes it."""
    return TransformerBridge(tiny("gpt2"), tokenizer)


@pytest.fixture
def splitter(bridge: TransformerBridge) -> SplitterForGeneration:
    """It is split behind its first layer."""
    return SplitterForGeneration(bridge, 0, batch_size=2)


# --- values -------------------------------------------------------------------------------------------------


@OPEN
def test_a_classifier_padded_in_front(new_classifier: Any, letters: Any, plain: Any) -> None:
    """A BERT classifier reads its first column; padded in front, classes and gradients stay each text's."""
    model, texts = new_classifier(), ["a", "zq", "Qxw,", "the, the", "some words. And more"]
    found = {}
    for side in ("right", "left"):
        tokenizer = letters("[CLS] $A [SEP]", padding_side=side)
        split = ModelWithSplitPoints(model, tokenizer, 1, batch_size=5)
        _, classes = split.get_activations(
            texts, include_predicted_classes=True, flatten_activations=False
        )
        gradients = split.concept_output_gradient(texts, torch.clone, torch.clone, **RAW)
        found[side] = [int(c) for c in classes], gradients
    assert found["left"][0] == found["right"][0]
    assert all(
        plain.gap(a, b) < CLOSE for a, b in zip(found["left"][1], found["right"][1], strict=True)
    )


@OPEN
def test_what_a_tokenizer_returns_of_two_texts(
    new_classifier: Any, letters: Any, plain: Any
) -> None:
    """token_type_ids of a BatchEncoding reach the model, or are refused; they are not dropped."""
    model = new_classifier()
    split = ModelWithSplitPoints(model, letters("[CLS] $A [SEP]"), 1)
    given = {
        "input_ids": torch.tensor([[1, 9, 10, 2]]),
        "attention_mask": torch.ones(1, 4, dtype=torch.long),
        "token_type_ids": torch.tensor([[0, 0, 1, 1]]),
    }
    path = "bert.encoder.layer.1"
    found, _ = split.get_activations(given, Granularity.ALL_TOKENS)
    assert plain.gap(found, plain.read(model, given, path)[path][0][0]) < CLOSE


@OPEN
@pytest.mark.parametrize("length", [4, 5])
def test_a_place_that_shows_no_row_a_token(splitter: Any, length: int) -> None:
    """Patterns are [batch, head, query, key]: refused, also where there are as many tokens as heads."""
    splitter.split_point = "blocks.1.attn.hook_pattern"
    with pytest.raises(InputError):
        splitter.get_activations("abcdefg"[:length])


@OPEN
def test_a_place_that_all_texts_share(splitter: Any) -> None:
    """GPT-2's position embeddings are [1, pos, d]: a row for each text, or an error of the library's."""
    splitter.split_point = "hook_pos_embed"
    found, _ = splitter.get_activations(["abc", "abd"])
    assert torch.equal(found[:3], found[3:])


@OPEN
def test_the_model_stops_behind_its_embeddings(splitter: Any) -> None:
    """No layer runs for what is there before the first one."""
    runs: list[int] = []
    splitter.split_point = "hook_embed"
    first = splitter.model.transformer.h[0].ln_1
    handle = first.register_forward_hook(lambda *given: runs.append(1))
    splitter.get_activations("abc")
    handle.remove()
    assert not runs


@OPEN
def test_words_of_a_tokenizer_without_pre_tokenization() -> None:
    """Llama 2's and Gemma's kind numbers all tokens of a text as one word; words still begin at spaces."""
    import string

    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "▁", *string.ascii_letters]
    core = Tokenizer(models.BPE({x: i for i, x in enumerate(pieces)}, [], unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    (sample,) = samples_of(["a cat sat"], tokenizer, None)
    assert groups_of(sample, Granularity.WORD, None) == [[0, 1], [2, 3, 4, 5], [6, 7, 8, 9]]


@OPEN
def test_words_of_a_slow_word_piece_tokenizer() -> None:
    """Pieces that go on a word are marked instead of those that begin one."""

    class Slow:
        is_fast = False
        all_special_ids = (0,)

        def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[0, 1, 2, 3]]}

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [["[CLS]", "play", "##ing", "chess"][i] for i in ids]

    (sample,) = samples_of(["playing chess"], Slow(), None)
    assert groups_of(sample, Granularity.WORD, None) == [[1, 2], [3]]


@OPEN
@pytest.mark.parametrize(
    ("text", "ends"),
    [("He said \N{LEFT DOUBLE QUOTATION MARK}No.\N{RIGHT DOUBLE QUOTATION MARK} Then", [13])],
)
def test_sentences_that_end_in_curly_quotes(text: str, ends: list[int]) -> None:
    """As those that end in straight ones."""
    assert sentence_ends(text) == ends


# --- inputs -------------------------------------------------------------------------------------------------


@OPEN
@pytest.mark.parametrize("name", ["bloom", "t5"])
def test_a_model_without_a_limit(tiny: Any, tokenizer: Any, name: str) -> None:
    """No limit of the model and none of the tokenizer is no limit; now: OverflowError."""
    model = tiny(name, "seq2seq" if name == "t5" else "causal")
    assert tokenizer.model_max_length > 10**20
    found, _ = ModelWithSplitPoints(model, tokenizer, 0).get_activations(["abc"])
    assert found.shape == (3, 64)


@OPEN
def test_a_configuration_for_loading() -> None:
    """config= loads a checkpoint with it; now: TypeError, two values for config."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(demo.path(), attn_pdrop=0.25)
    assert SplitterForGeneration(demo.path(), 1, config=config).model.config.attn_pdrop == 0.25


@OPEN
def test_what_a_tokenizer_returns_unpadded(splitter: Any, tokenizer: Any) -> None:
    """Lists of unequal length are texts as they are."""
    expected, _ = splitter.get_activations(["abc", "ab"])
    assert torch.equal(splitter.get_activations(tokenizer(["abc", "ab"]))[0], expected)


@OPEN
@pytest.mark.parametrize(
    "given",
    [
        torch.zeros(0, 5, dtype=torch.long),
        {"attention_mask": torch.ones(1, 3)},
        {"input_ids": torch.tensor([[9, 10]]), "attention_mask": torch.ones(1, 3)},
        {"input_ids": torch.tensor([[9, 10]]), "attention_mask": torch.ones(2, 2)},
        torch.ones(1, 3, dtype=torch.bool),
    ],
    ids=range(5),
)
def test_what_is_no_input_is_refused(splitter: Any, given: Any) -> None:
    """No text, no ids, a mask that does not fit, no ids but a mask: InputError, not what PyTorch says."""
    with pytest.raises(InputError):
        splitter.get_activations(given)


@OPEN
def test_a_bridge_that_is_given_stays_as_it_is(
    bridge: Any, tokenizer: Any, new_tokenizer: Any
) -> None:
    """Another tokenizer for the splitter is none for the bridge, which others use."""
    try:
        SplitterForGeneration(bridge, 0, tokenizer=new_tokenizer(padding_side="left"))
        assert bridge.tokenizer is tokenizer
    finally:
        bridge.tokenizer = tokenizer


@OPEN
def test_the_tokenizer_does_not_keep_the_limit(bridge: Any, new_tokenizer: Any) -> None:
    """A fast tokenizer, saved afterwards, is the one that was given; now it has the model's limit."""
    tokenizer = new_tokenizer()
    before = tokenizer.backend_tokenizer.to_str()
    SplitterForGeneration(bridge.original_model, 0, tokenizer=tokenizer).get_activations(["abc"])
    assert tokenizer.backend_tokenizer.to_str() == before


@OPEN
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("said", [1, "blocks.1.hook_out"])
def test_one_place_can_be_set(bridge: Any, said: Any) -> None:
    """split_points takes what the constructor takes; now a name is taken for a list of letters."""
    split = ModelWithSplitPoints(bridge, None, 0)
    split.split_points = said
    assert split.split_points == {str(said): "blocks.1.hook_out"}


# --- gradients ----------------------------------------------------------------------------------------------


@OPEN
def test_a_decode_that_does_not_use_the_concepts(splitter: Any) -> None:
    """A decode with parameters of its own is not differentiable by that: an error, not zeros."""
    down = nn.Linear(64, 64)
    with pytest.raises(GradientError, match="not differentiable"):
        splitter.concept_output_gradient(["abc"], torch.clone, lambda c: down(c.detach()))


@OPEN
def test_heads_are_side_by_side_in_concepts_too(splitter: Any) -> None:
    """A place with heads gives encode the rows that get_activations gives."""
    splitter.split_point = "blocks.1.attn.hook_z"
    rows, _ = splitter.get_activations("abc")
    given: list[Tensor] = []

    def encode(x: Tensor) -> Tensor:
        given.append(x)
        return x

    (found,) = splitter.concept_output_gradient("abc", encode, torch.clone)
    assert torch.equal(given[0], rows)
    assert found.shape == (3, 3, 64)


@OPEN
@pytest.mark.parametrize("options", [{}, {"targets": [[]]}])
def test_nothing_to_differentiate(splitter: Any, options: dict[str, Any]) -> None:
    """A batch without rows, or without targets, has empty gradients; beside other texts it has already."""
    text = "abc" if options else "<eos>"
    (found,) = splitter.concept_output_gradient([text], torch.clone, torch.clone, **options)
    assert found.shape == ((0, 3, 64) if options else (1, 0, 64))


@OPEN
@pytest.mark.parametrize(
    "targets", [1.5, [["a"], [0]], [[True], [0]], [[0.5], [0]], [None, [0]]], ids=str
)
def test_targets_that_are_none(splitter: Any, targets: Any) -> None:
    """What is no whole number is an InputError wherever it stands, as the docstring says."""
    with pytest.raises(InputError):
        splitter.concept_output_gradient(["abc", "ab"], torch.clone, torch.clone, targets=targets)


@OPEN
def test_targets_of_numpy(splitter: Any) -> None:
    """NumPy's whole numbers are whole numbers."""
    import numpy as np

    found = splitter.concept_output_gradient(["abc"], torch.clone, torch.clone, np.array([0, 1]))
    assert found[0].shape == (2, 3, 64)


@OPEN
@pytest.mark.parametrize("size", [0, -1])
def test_batches_of_nothing(splitter: Any, size: int) -> None:
    """A batch size below 1 is refused, as in the constructor; now -1 returns a list of None."""
    with pytest.raises(InputError):
        splitter.concept_output_gradient(["abc"], torch.clone, torch.clone, batch_size=size)


@OPEN
def test_a_decode_that_returns_no_tensor(splitter: Any) -> None:
    """An error that says what decode gave."""
    with pytest.raises(InputError):
        splitter.concept_output_gradient(["abc"], torch.clone, lambda c: (c,))


@OPEN
def test_gradients_do_not_keep_the_batch(splitter: Any) -> None:
    """Each text's gradients hold no more memory than their own, however they were asked for."""
    for found in splitter.concept_output_gradient(["abcdef", "a"], torch.clone, torch.clone, **RAW):
        assert found.untyped_storage().nbytes() == found.numel() * 4


@OPEN
def test_how_many_targets_fit_counts_the_logits(
    splitter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backward pass of k targets holds k gradients of all logits, [k, batch, pos, vocabulary], too."""
    n_logits = 12 * 160
    monkeypatch.setattr(concept_gradients, "_AT_ONCE", 2 * n_logits)
    rows: list[int] = []
    grad = torch.autograd.grad

    def spy(outputs: Any, inputs: Any, given: Any, **options: Any) -> Any:
        rows.append(len(given))
        return grad(outputs, inputs, given, **options)

    monkeypatch.setattr(torch.autograd, "grad", spy)
    splitter.concept_output_gradient(
        ["abcdefabcdef"], lambda x: x[:, :1], lambda c: c.expand(-1, 64)
    )
    assert max(rows) <= 2
