"""Datasets for causal head gating: what is a target, what is padding, and what is refused."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from lensbridge import InputError, TransformerBridge, demo
from lensbridge.methods.gating.data import CHGBatch, CHGDataset

PROMPTS = ["The capital of France is", "If you visit Italy, see its capital,"]
TARGETS = [" Paris", " Rome"]

CORPUS = [
    "The capital of France is Paris.",
    "If you visit Italy, see its capital, Rome.",
    "\n A^ B^ C\n D^ E^ F\n A B C D E F",
    "café Straße 🙂",
]


# --- tokenizers ---------------------------------------------------------------------------------------------


def byte_level(trim: bool = False) -> Any:
    """Like GPT-2's; ``trim`` is how RoBERTa's tells where tokens stand: without their space."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    core.train_from_iterator(CORPUS * 3, trainer)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=trim)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|end|>", eos_token="<|end|>")


def metaspace(legacy: bool = False) -> Any:
    """Like Llama's with SentencePiece: a space in front of every text, and BOS by itself."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=250, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    core.train_from_iterator(CORPUS * 3, trainer)
    core.decoder = decoders.Metaspace()
    if legacy:
        core.pre_tokenizer = pre_tokenizers.Sequence([])
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def tokenizers(tokenizer: Any, letters: Any) -> dict[str, Any]:
    return {
        "demo": AutoTokenizer.from_pretrained(demo.path()),
        "bytes": byte_level(),
        "trimmed bytes": byte_level(trim=True),
        "metaspace": metaspace(),
        "legacy metaspace": metaspace(legacy=True),
        "pieces": letters("[CLS] $A [SEP]"),
        "characters": tokenizer,
        "slow": ByT5Tokenizer(),
    }


NAMES = [
    "demo",
    "bytes",
    "trimmed bytes",
    "metaspace",
    "legacy metaspace",
    "pieces",
    "characters",
    "slow",
]


@pytest.fixture(params=NAMES)
def any_tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Any]) -> Any:
    return tokenizers[request.param]


def state_of(tokenizer: Any) -> dict[str, Any]:
    """Everything a call might change."""
    core = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else None
    names = ("padding_side", "truncation_side", "model_max_length", "special_tokens_map")
    return {
        "length": len(tokenizer),
        "vocabulary": tokenizer.get_vocab(),
        "backend": core,
        "pad": (tokenizer.pad_token, tokenizer.pad_token_id),
        "warned": dict(tokenizer.deprecation_warnings),
        **{name: getattr(tokenizer, name) for name in names},
    }


@contextmanager
def untouched(tokenizer: Any) -> Iterator[None]:
    before = state_of(tokenizer)
    yield
    assert state_of(tokenizer) == before


def target_text(tokenizer: Any, row: dict[str, torch.Tensor]) -> str:
    return tokenizer.decode(row["input_ids"][row["loss_mask"]])


# --- prompts and targets ------------------------------------------------------------------------------------


def test_targets_are_what_counts(any_tokenizer: Any, tiny: Callable[..., Any]) -> None:
    """Rows are what a bridge runs, and the tokens that count are the target's."""
    bridge = TransformerBridge(tiny("gpt2", vocab_size=1200), any_tokenizer)
    with untouched(any_tokenizer):
        data = CHGDataset.from_texts(PROMPTS, TARGETS, any_tokenizer)
    own = CHGDataset.from_texts(PROMPTS, TARGETS, bridge)
    for row, other, prompt, target in zip(data, own, PROMPTS, TARGETS, strict=True):
        ids = bridge.to_tokens(prompt + target, truncate=False)[0]
        assert row["input_ids"].tolist() == other["input_ids"].tolist() == ids.tolist()
        assert row["loss_mask"].tolist() == other["loss_mask"].tolist()
        assert target_text(any_tokenizer, row).replace(" ", "").replace("##", "") == target.strip()
        # They stand together, behind the prompt.
        places = row["loss_mask"].nonzero().flatten().tolist()
        assert places == list(range(places[0], places[-1] + 1))
        assert row["targets"] is row["input_ids"]


def test_by_hand(tokenizers: dict[str, Any]) -> None:
    """BOS in front, prompt, target."""
    own = tokenizers["demo"]
    data = CHGDataset.from_texts(PROMPTS[:1], [" Paris."], own)
    pieces = own.convert_ids_to_tokens(data[0]["input_ids"].tolist())
    expected = ["<|endoftext|>", "The", "Ġcapital", "Ġof", "ĠFrance", "Ġis", "ĠParis", "."]
    assert pieces == expected
    assert data[0]["loss_mask"].tolist() == [False] * 6 + [True] * 2
    bare = CHGDataset.from_texts(PROMPTS[:1], [" Paris."], own, prepend_bos=False)
    assert own.convert_ids_to_tokens(bare[0]["input_ids"].tolist()) == expected[1:]


@pytest.mark.parametrize("name", ["demo", "bytes", "metaspace", "legacy metaspace"])
def test_a_space_belongs_to_the_word_behind_it(tokenizers: dict[str, Any], name: str) -> None:
    """At the end of a prompt it would be torn off its word: refused, with what to write instead."""
    own = tokenizers[name]
    with untouched(own), pytest.raises(InputError) as caught:
        CHGDataset.from_texts([PROMPTS[0], PROMPTS[0] + " "], [" Paris", "Paris"], own)
    message = str(caught.value)
    assert message.startswith("row 1: the token ")
    assert "prompt 'The capital of France is', target ' Paris'" in message
    spaced = CHGDataset.from_texts(PROMPTS[:1], ["Paris"], own, separator=" ")
    joined = CHGDataset.from_texts(PROMPTS[:1], [" Paris"], own)
    assert spaced[0]["input_ids"].tolist() == joined[0]["input_ids"].tolist()
    assert spaced[0]["loss_mask"].tolist() == joined[0]["loss_mask"].tolist()


@pytest.mark.parametrize("name", ["trimmed bytes", "pieces"])
def test_a_space_at_the_end_is_no_trouble_where_it_is_no_token(
    tokenizers: dict[str, Any], name: str
) -> None:
    own = tokenizers[name]
    behind = CHGDataset.from_texts([PROMPTS[0] + " "], ["Paris"], own)
    before = CHGDataset.from_texts([PROMPTS[0]], [" Paris"], own)
    assert behind[0]["input_ids"].tolist() == before[0]["input_ids"].tolist()
    assert behind[0]["loss_mask"].tolist() == before[0]["loss_mask"].tolist()


def test_a_token_of_both_is_refused(tokenizers: dict[str, Any]) -> None:
    own = tokenizers["demo"]
    with untouched(own), pytest.raises(InputError) as caught:
        CHGDataset.from_texts(["The capital of Fra"], ["nce"], own)
    assert "row 0: the token 'ĠFrance' is the end of the prompt and the beginning" in str(
        caught.value
    )
    assert "' Fra' + 'nce'" in str(caught.value)
    assert "cut the text where a token begins" in str(caught.value)
    apart = CHGDataset.from_texts(["The capital of Fra"], ["nce"], own, join="tokens")
    ids = own("The capital of Fra").input_ids, own("nce").input_ids
    assert apart[0]["input_ids"].tolist() == [own.bos_token_id, *ids[0], *ids[1]]
    assert int(apart[0]["loss_mask"].sum()) == len(ids[1])


def test_tokenized_apart_special_tokens_stay_at_the_ends(tokenizers: dict[str, Any]) -> None:
    own = tokenizers["pieces"]
    apart = CHGDataset.from_texts(["ab"], ["cd"], own, join="tokens")
    assert own.convert_ids_to_tokens(apart[0]["input_ids"].tolist()) == [
        "[CLS]", "a", "##b", "c", "##d", "[SEP]",
    ]  # fmt: skip
    assert apart[0]["loss_mask"].tolist() == [False, False, False, True, True, False]


def test_a_slow_tokenizer_that_tears_a_prompt(new_tokenizer: Callable[..., Any]) -> None:
    """Found by comparing with the prompt alone."""
    own = new_tokenizer()
    core = Tokenizer(models.WordLevel({"<unk>": 0, "ab": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    own = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="ab")
    slow = _Slow(own)
    with pytest.raises(
        InputError, match=r"row 1: with the target behind it the prompt is tokenized"
    ):
        CHGDataset.from_texts(["a", "a"], [" b", "b"], slow)
    data = CHGDataset.from_texts(["a"], ["b"], slow, separator=" ")
    assert data[0]["input_ids"].tolist() == [1, 2, 3]
    assert data[0]["loss_mask"].tolist() == [False, False, True]
    apart = CHGDataset.from_texts(["a"], ["b"], slow, join="tokens")
    assert apart[0]["input_ids"].tolist() == [1, 2, 3]


class _Slow:
    """A tokenizer that knows no places."""

    is_fast = False

    def __init__(self, fast: Any) -> None:
        self._fast = fast

    def __call__(self, *args: Any, return_offsets_mapping: bool = False, **options: Any) -> Any:
        assert not return_offsets_mapping
        return self._fast(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fast, name)


def test_white_space_is_left_alone(tokenizers: dict[str, Any]) -> None:
    """No prompt is stripped of it; none is added."""
    own = tokenizers["bytes"]
    prompts = ["Question:\n\n", "  two  spaces", "tab\t"]
    data = CHGDataset.from_texts(prompts, ["Yes", " No", "\n x"], own)
    for row, text in zip(data, ["Question:\n\nYes", "  two  spaces No", "tab\t\n x"], strict=True):
        assert own.decode(row["input_ids"][1:]) == text
    assert [target_text(own, row) for row in data] == ["Yes", " No", "\n x"]


def test_a_separator_by_itself_is_not_predicted(tokenizers: dict[str, Any]) -> None:
    own = tokenizers["bytes"]
    data = CHGDataset.from_texts(["2 + 2"], ["4"], own, separator=" =\n")
    assert own.decode(data[0]["input_ids"][1:]) == "2 + 2 =\n4"
    assert target_text(own, data[0]) == "4"
    with pytest.raises(InputError, match="write the separator at the end of the prompts"):
        CHGDataset.from_texts(["2 + 2"], ["4"], own, separator=" ", join="tokens")


@settings(max_examples=80, deadline=None)
@given(
    st.text("aPris \n🙂é.", min_size=1, max_size=8), st.text("aPris \n🙂é.", min_size=1, max_size=8)
)
def test_a_row_is_split_where_the_text_is_or_refused(prompt: str, target: str) -> None:
    own = _shared_byte_level()
    places = own(prompt + target, return_offsets_mapping=True)["offset_mapping"]
    if any(a < len(prompt) < b for a, b in places):
        with pytest.raises(
            InputError, match="the end of the prompt and the beginning of the target"
        ):
            CHGDataset.from_texts([prompt], [target], own)
        return
    row = CHGDataset.from_texts([prompt], [target], own)[0]
    assert own.decode(row["input_ids"][row["loss_mask"]]) == target
    assert own.decode(row["input_ids"][~row["loss_mask"]][1:]) == prompt


_MADE: list[Any] = []


def _shared_byte_level() -> Any:
    if not _MADE:
        _MADE.append(byte_level())
    return _MADE[0]


# --- foils --------------------------------------------------------------------------------------------------


def test_foils_stand_where_the_targets_do(tokenizers: dict[str, Any]) -> None:
    own = tokenizers["demo"]
    data = CHGDataset.from_texts(PROMPTS, TARGETS, own, foils=[" Rome", " Paris"])
    for row, foil in zip(data, [" Rome", " Paris"], strict=True):
        assert own.decode(row["foils"][row["loss_mask"]]) == foil
        assert torch.equal(row["foils"][~row["loss_mask"]], row["input_ids"][~row["loss_mask"]])


@pytest.mark.parametrize(
    ("foils", "message"),
    [
        (
            [" Rome and more", " Rome"],
            "row 0: the foil ' Rome and more' is .* tokens and the target",
        ),
        ([" Rome", " Rome"], "row 1: the foil ' Rome' is the target"),
        ([" Rome"], "2 texts and 1 foils"),
        ([" Rome", ""], "row 1: the foil is empty"),
        ("Rome", "foils is a list of strings"),
    ],
)
def test_foils_that_are_none(tokenizers: dict[str, Any], foils: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CHGDataset.from_texts(PROMPTS, TARGETS, tokenizers["demo"], foils=foils)


def test_a_foil_that_changes_the_prompt() -> None:
    """By joining its last token, or by what it makes of a look ahead."""
    core = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "d": 3, "da": 4}, [("d", "a")]))
    own = PreTrainedTokenizerFast(tokenizer_object=core)
    good = CHGDataset.from_texts(["ad"], ["b"], own, foils=["c"])
    assert good[0]["foils"].tolist() == [0, 3, 2]
    with pytest.raises(InputError, match=r"row 0: the token 'da' is .* the beginning of the foil"):
        CHGDataset.from_texts(["ad"], ["b"], own, foils=["a"])
    core = Tokenizer(models.WordLevel({"x": 0, "y": 1, "xy": 2, "b": 3, "c": 4}, unk_token="x"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("xy(?=c)|."), behavior="isolated")
    own = PreTrainedTokenizerFast(tokenizer_object=core)
    with pytest.raises(
        InputError, match="with the foil 'c' behind it the prompt is tokenized other"
    ):
        CHGDataset.from_texts(["xy"], ["b"], own, foils=["c"])


# --- bugs of others, each of them ---------------------------------------------------------------------------


def test_the_padding_token_inside_a_row_is_data(tokenizers: dict[str, Any]) -> None:
    """Also where the padding token is the end-of-text token, which texts contain."""
    own = tokenizers["demo"]
    end = own.eos_token
    data = CHGDataset.from_texts(
        [f"One{end} two{end}", "One"], [" Paris", " a Rome Rome Rome is"], own
    )
    data.pad_token_id = own.eos_token_id
    batch = data.batch([0, 1])
    lengths = [len(row["input_ids"]) for row in data]
    assert batch.attention_mask.sum(1).tolist() == lengths
    assert batch.input_ids.shape == (2, max(lengths))
    first = batch.input_ids[0, : lengths[0]]
    assert int((first == own.eos_token_id).sum()) == 3
    assert batch.loss_mask[0, : lengths[0]].tolist() == data[0]["loss_mask"].tolist()


def test_a_length_never_cuts_a_target(tokenizers: dict[str, Any]) -> None:
    own = tokenizers["demo"]
    long = "The capital of France is Paris. " * 4 + "The capital of Italy is"
    whole = CHGDataset.from_texts([PROMPTS[0], long], TARGETS, own)
    n = len(whole[1]["input_ids"])
    assert (
        CHGDataset.from_texts([PROMPTS[0], long], TARGETS, own, max_length=n)[1][
            "input_ids"
        ].tolist()
        == whole[1]["input_ids"].tolist()
    )
    with pytest.raises(
        InputError, match=rf"1 of 2 rows are too long, max_length is {n - 1}: 1 \({n} tokens\)"
    ):
        CHGDataset.from_texts([PROMPTS[0], long], TARGETS, own, max_length=n - 1)
    for size in (n - 1, 6, 2):
        cut = CHGDataset.from_texts(
            [PROMPTS[0], long], TARGETS, own, max_length=size, truncate_prompt=True
        )[1]
        assert len(cut["input_ids"]) == size
        assert target_text(own, cut) == " Rome"
        # BOS stays, and what is next to the target.
        assert int(cut["input_ids"][0]) == own.bos_token_id
        assert torch.equal(cut["input_ids"][1:], whole[1]["input_ids"][n - size + 1 :])
    with pytest.raises(InputError, match="row 0: its target is 1 tokens, which do not fit into 1"):
        CHGDataset.from_texts(PROMPTS, TARGETS, own, max_length=1, truncate_prompt=True)
    with pytest.raises(InputError, match="max_length must be at least 1"):
        CHGDataset.from_texts(PROMPTS, TARGETS, own, max_length=0)


def test_cut_rows_keep_their_foils_in_place(tokenizers: dict[str, Any]) -> None:
    own = tokenizers["demo"]
    data = CHGDataset.from_texts(
        PROMPTS,
        TARGETS,
        own,
        foils=TARGETS[::-1],
        max_length=4,
        truncate_prompt=True,
        prepend_bos=False,
    )
    for row, foil in zip(data, TARGETS[::-1], strict=True):
        assert len(row["input_ids"]) == len(row["foils"]) == 4
        assert own.decode(row["foils"][row["loss_mask"]]) == foil
    # Without BOS something of the prompt must stay to predict from.
    with pytest.raises(InputError, match="row 0: its target is 1 tokens"):
        CHGDataset.from_texts(
            PROMPTS, TARGETS, own, max_length=1, truncate_prompt=True, prepend_bos=False
        )


def test_the_tokenizers_own_limit_cuts_nothing(new_tokenizer: Callable[..., Any]) -> None:
    """Nor does it warn, or set a mark that it has."""
    own = new_tokenizer(model_max_length=8)
    with untouched(own):
        data = CHGDataset.from_texts(["A prompt of many characters"], [" x"], own)
    assert len(data[0]["input_ids"]) == 1 + len("A prompt of many characters x")
    assert target_text(own, data[0]) == " x"


def test_a_bridges_context_is_a_limit(tiny: Callable[..., Any], tokenizer: Any) -> None:
    bridge = TransformerBridge(tiny("gpt2"), tokenizer)
    assert bridge.cfg.n_ctx == 64
    long = "x" * 70
    with pytest.raises(InputError, match=r"the model reads 64: 0 \(73 tokens\)"):
        CHGDataset.from_texts([long], [" y"], bridge)
    cut = CHGDataset.from_texts([long], [" y"], bridge, truncate_prompt=True)
    assert len(cut[0]["input_ids"]) == 64
    assert len(CHGDataset.from_texts([long], [" y"], bridge, max_length=100)[0]["input_ids"]) == 73


def test_without_a_padding_token(new_tokenizer: Callable[..., Any]) -> None:
    """EOS serves, and the tokenizer is not given one."""
    own = new_tokenizer(pad_token=None)
    with untouched(own):
        data = CHGDataset.from_texts(["ab", "abc"], ["d", "d"], own)
        batch = data.batch([0, 1])
    assert own.pad_token is None
    assert batch.input_ids[0].tolist() == [*data[0]["input_ids"].tolist(), own.eos_token_id]
    assert batch.attention_mask[0].tolist() == [1, 1, 1, 1, 0]


def test_a_tokenizer_is_left_as_it_was(new_tokenizer: Callable[..., Any]) -> None:
    """Its length, its special tokens, and how its backend cuts and pads; after errors, too."""
    own = new_tokenizer(mask_token="<unk>")
    own.padding_side = "left"
    core = own.backend_tokenizer
    core.enable_truncation(3, direction="left")
    core.enable_padding(direction="left", pad_id=2, pad_token="<eos>", length=12)
    with untouched(own):
        data = CHGDataset.from_texts(["abcdef"], ["gh"], own, foils=["ij"])
        assert own.decode(data[0]["input_ids"]) == "<bos>abcdefgh"
        CHGDataset.from_concatenated_texts(["abc"], own)
        CHGDataset.from_labels(["abc"], [1], own)
        CHGDataset.from_masked(["ab<unk>"], ["c"], own)
        CHGDataset.from_pattern_task("aba", own, num_samples=2)
        for bad in ({"max_length": 2}, {"foils": ["ijk"]}, {"join": "?"}):
            with pytest.raises(InputError):
                CHGDataset.from_texts(["abcdef"], ["gh"], own, **bad)


@pytest.mark.parametrize(
    ("texts", "targets", "message"),
    [
        (["a", "b"], ["c"], "2 texts and 1 targets; give one of each a row"),
        ([], [], "texts is empty"),
        (["a"], [""], "row 0: the target is empty"),
        ("a", "b", "texts is a list of strings, one a row; got 'a'"),
        (["a", 4], ["b", "c"], "row 1 of texts is int, expected str: 4"),
        (["a"], [None], "row 0 of targets is NoneType"),
        (None, ["a"], "texts is a list of strings"),
    ],
)
def test_lists_that_do_not_go_together(
    tokenizer: Any, texts: Any, targets: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        CHGDataset.from_texts(texts, targets, tokenizer)


def test_a_target_without_tokens(tokenizers: dict[str, Any]) -> None:
    """White space, to a tokenizer that drops it."""
    with pytest.raises(InputError, match=r"row 1: the target ' ' has no tokens"):
        CHGDataset.from_texts(["ab", "ab"], [" c", " "], tokenizers["pieces"])


def test_something_must_predict(tokenizers: dict[str, Any]) -> None:
    own = tokenizers["demo"]
    from_bos = CHGDataset.from_texts([""], ["The"], own)
    assert from_bos[0]["loss_mask"].tolist() == [False, True]
    with pytest.raises(
        InputError, match="row 0: its first token is to be predicted, and nothing stands before it"
    ):
        CHGDataset.from_texts([""], ["The"], own, prepend_bos=False)


def test_other_joins(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="join must be 'text' or 'tokens', got 'words'"):
        CHGDataset.from_texts(["a"], ["b"], tokenizer, join="words")


# --- batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_either_side_of_padding_gives_the_same(
    tiny: Callable[..., Any], tokenizer: Any, name: str
) -> None:
    """Log-probabilities of targets in padded batches are those of single rows on the bare model."""
    model = tiny(name)
    bridge = TransformerBridge(model, tokenizer)
    data = CHGDataset.from_texts(["abc", "a longer one", "x"], ["de", "f", "ghi"], bridge)
    expected = []
    with torch.no_grad():
        for row in data:
            ids = row["input_ids"]
            scores = model(ids[None]).logits[0].log_softmax(-1)
            expected += [float(scores[i - 1, ids[i]]) for i in row["loss_mask"].nonzero().flatten()]
        for side in ("right", "left"):
            batch = data.batch(range(3), side)
            logits = bridge(batch.input_ids, attention_mask=batch.attention_mask)
            scores = logits.log_softmax(-1)[:, :-1]
            found = scores.gather(-1, batch.targets[:, 1:, None])[..., 0][batch.loss_mask[:, 1:]]
            torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_batches_by_hand() -> None:
    data = CHGDataset(
        [torch.tensor([5, 6, 6, 7]), torch.tensor([0, 8], dtype=torch.int32)],
        [torch.tensor([False, False, False, True]), torch.tensor([0, 1])],
        targets=[torch.tensor([5, 6, 6, 9]), torch.tensor([0, 4])],
        foils=[torch.tensor([1, 1, 1, 2]), torch.tensor([1, 3])],
        pad_token_id=11,
    )
    right, left = data.batch([1, 0]), data.batch([1, 0], padding_side="left")
    assert right.input_ids.tolist() == [[0, 8, 11, 11], [5, 6, 6, 7]]
    assert left.input_ids.tolist() == [[11, 11, 0, 8], [5, 6, 6, 7]]
    assert right.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert left.attention_mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert right.loss_mask.int().tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]
    assert left.loss_mask.int().tolist() == [[0, 0, 0, 1], [0, 0, 0, 1]]
    assert right.targets.tolist() == [[0, 4, 11, 11], [5, 6, 6, 9]]
    assert left.foils is not None
    assert left.foils.tolist() == [[11, 11, 1, 3], [1, 1, 1, 2]]
    assert right.input_ids.dtype == right.targets.dtype == right.attention_mask.dtype == torch.long
    assert right.loss_mask.dtype == torch.bool
    assert right.labels is None
    assert len(right) == 2
    # No column is nothing but padding.
    assert data.batch([1]).input_ids.tolist() == [[0, 8]]


def test_rows_are_kept_as_given() -> None:
    ids = torch.tensor([5, 6, 7])
    data = CHGDataset([ids], [torch.tensor([False, True, False])])
    assert data.input_ids[0] is ids
    assert data[0]["targets"] is ids
    assert data[-1]["input_ids"] is ids


def test_repeating_and_moving() -> None:
    data = CHGDataset.from_tokens(
        [[5, 6], [7, 8]], [[False, True], [False, True]], foils=[[1, 2], [3, 4]]
    )
    batch = data.batch([0, 1])
    twice = batch.repeat(2)
    assert twice.input_ids.tolist() == [[5, 6], [5, 6], [7, 8], [7, 8]]
    assert twice.foils is not None
    assert twice.foils.tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]
    assert twice.labels is None
    assert len(twice) == 4
    moved = batch.to("meta")
    assert isinstance(moved, CHGBatch)
    assert moved.loss_mask.device.type == "meta"
    assert moved.foils is not None
    assert moved.foils.device.type == "meta"
    with pytest.raises(InputError, match="at least once, got 0"):
        batch.repeat(0)


def test_a_loader_of_torch() -> None:
    data = CHGDataset.from_tokens([[5, 6], [7, 8, 9], [1, 2]], [[0, 1], [0, 0, 1], [0, 1]])
    batches = list(DataLoader(data, batch_size=2, collate_fn=data.collate))
    assert [batch.input_ids.tolist() for batch in batches] == [[[5, 6, 0], [7, 8, 9]], [[1, 2]]]
    assert len(pickle.loads(pickle.dumps(data))) == 3


@pytest.mark.parametrize("indices", [[], [3], [0, -4]])
def test_rows_that_are_not_there(indices: list[int]) -> None:
    data = CHGDataset.from_tokens([[5, 6]] * 3, [[0, 1]] * 3)
    for take in (data.batch, data.subset):
        with pytest.raises(InputError, match="row"):
            take(indices)
    with pytest.raises(IndexError, match="row 3 of a dataset of 3"):
        data[3]
    with pytest.raises(InputError, match="padding_side must be"):
        data.batch([0], "top")


# --- parts --------------------------------------------------------------------------------------------------


def test_splitting() -> None:
    """By its own generator: the same seed the same rows, none lost, none twice."""
    data = CHGDataset.from_tokens([[5, i] for i in range(10)], [[0, 1]] * 10, pad_token_id=3)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = data.split(0.7, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert (len(first), len(second)) == (7, 3)
    taken = [[int(row["input_ids"][1]) for row in part] for part in (first, second)]
    assert sorted(taken[0] + taken[1]) == list(range(10))
    again = [[int(row["input_ids"][1]) for row in part] for part in data.split(0.7, seed=1)]
    assert again == taken
    other = [[int(row["input_ids"][1]) for row in part] for part in data.split(0.7, seed=2)]
    assert other != taken
    assert first.pad_token_id == 3


@pytest.mark.parametrize("fraction", [0, 1, 0.01, 0.99, -1, 2, float("nan")])
def test_splits_that_leave_nothing(fraction: float, unchecked: None) -> None:
    data = CHGDataset.from_tokens([[5, 6]] * 4, [[0, 1]] * 4)
    with pytest.raises(InputError, match="leaves at least one row to either side"):
        data.split(fraction)


def test_subsets_take_everything_along() -> None:
    data = CHGDataset.from_tokens(
        [[5, 6], [7, 8]],
        [[0, 1], [0, 1]],
        targets=[[5, 1], [7, 2]],
        foils=[[5, 3], [7, 4]],
        causal=False,
        pad_token_id=9,
    )
    part = data.subset([-1])
    assert {name: value.tolist() for name, value in part[0].items()} == {
        "input_ids": [7, 8], "loss_mask": [False, True], "targets": [7, 2], "foils": [7, 4],
    }  # fmt: skip
    assert not part.causal
    assert part.pad_token_id == 9
    labelled = CHGDataset.from_tokens([[5, 6], [7, 8]], labels=[2, 3], foils=[0, 1])
    assert labelled.subset(torch.tensor([1])).batch([0]).labels.tolist() == [3]
    assert labelled.subset([1, 0]).batch([0, 1]).foils.tolist() == [1, 0]


def test_what_a_dataset_says_of_itself() -> None:
    data = CHGDataset.from_tokens(
        [[5, 6], [7, 8, 9]], [[0, 1], [0, 1, 1]], foils=[[1, 1], [1, 1, 1]]
    )
    assert repr(data) == "CHGDataset(2 rows of 2 to 3 tokens, 1 to 2 to predict, with foils)"
    assert (
        repr(CHGDataset.from_tokens([[5]], labels=[1]))
        == "CHGDataset(1 rows of 1 tokens, with labels)"
    )


# --- tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_given_rows_is_cut_off(side: str) -> None:
    ids = (
        torch.tensor([[0, 5, 0, 6], [0, 0, 7, 8]])
        if side == "left"
        else torch.tensor([[5, 0, 6, 0], [7, 8, 0, 0]])
    )
    mask = (
        torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]])
        if side == "left"
        else torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    )
    loss = torch.zeros_like(ids, dtype=torch.bool)
    loss[0, 3 if side == "left" else 2] = True
    loss[1, 3 if side == "left" else 1] = True
    data = CHGDataset.from_tokens(ids, loss, attention_mask=mask, pad_token_id=0, targets=ids + 1)
    assert [row["input_ids"].tolist() for row in data] == [[5, 0, 6], [7, 8]]
    assert [row["loss_mask"].tolist() for row in data] == [[False, False, True], [False, True]]
    assert [row["targets"].tolist() for row in data] == [[6, 1, 7], [8, 9]]


@pytest.mark.parametrize("ids", [[[0, 5, 6]], [[5, 6, 0]]])
def test_padding_is_not_guessed(ids: list[list[int]]) -> None:
    """A padding token at the edge of a rectangle may be either; in the middle, or in rows of their own, not."""
    loss = torch.tensor([[False, True, False]])
    given = torch.tensor(ids)
    with pytest.raises(
        InputError,
        match="row 0 begins or ends with the padding token 0, which may be padding or not",
    ):
        CHGDataset.from_tokens(given, loss, pad_token_id=0)
    whole = torch.ones_like(given)
    for data in (
        CHGDataset.from_tokens(given, loss, pad_token_id=0, attention_mask=whole),
        CHGDataset.from_tokens(list(given), list(loss), pad_token_id=0),
        CHGDataset.from_tokens(given, loss),
    ):
        assert data[0]["input_ids"].tolist() == ids[0]
    middle = CHGDataset.from_tokens(torch.tensor([[5, 0, 6]]), loss, pad_token_id=0)
    assert middle[0]["input_ids"].tolist() == [5, 0, 6]


ROW, LOSS = [[5, 6, 7]], [[0, 0, 1]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": []}, "at least one row; input_ids is empty"),
        ({"loss_masks": None}, "give loss_masks"),
        ({"loss_masks": [[0, 0, 0]]}, "row 0 has no loss token: its mask is False everywhere"),
        (
            {"loss_masks": [[1, 0, 0]]},
            "row 0: its first token is to be predicted, and nothing stands before",
        ),
        ({"loss_masks": [[0, 0, 2]]}, "row 0 of loss_masks holds other values"),
        ({"loss_masks": [[0, 1]]}, r"row 0 of loss_masks is \[2\] and of input_ids \[3\]"),
        ({"loss_masks": [[0, 0, 1]] * 2}, "1 rows of input_ids and 2 rows of loss_masks"),
        ({"targets": [[5, 6]]}, r"row 0 of targets is \[2\]"),
        (
            {"targets": [[-100, -100, 7]]},
            "row 0 of targets holds -100; token ids are numbers from 0",
        ),
        ({"foils": [[5, 6, 7.5]]}, "row 0 of foils holds torch.float32"),
        ({"input_ids": [[]], "loss_masks": [[]]}, "row 0 has no tokens"),
        ({"input_ids": [[5, -1, 7]]}, "row 0 of input_ids holds -1"),
        ({"input_ids": torch.ones(1, 3)}, "row 0 of input_ids holds torch.float32"),
        ({"input_ids": torch.ones(3)}, r"one tensor \[row, pos\]; got \[3\]"),
        ({"input_ids": [[[5]]]}, r"row 0 is \[1, 1\]"),
        ({"input_ids": "abc"}, "input_ids is a list of rows.*got str"),
        ({"input_ids": [["a", "b", "c"]]}, "input_ids is a list of rows.*row 0 is"),
        ({"pad_token_id": -1}, "pad_token_id is an id from 0, got -1"),
        ({"labels": [-1]}, "row 0 of labels is a class, a number from 0; got -1"),
        ({"labels": [1.5]}, "row 0 of labels is a class"),
        ({"labels": [1, 2]}, "1 rows and 2 labels"),
        ({"labels": [1], "foils": [1, 2]}, "1 rows and 2 foils"),
        ({"attention_mask": [[1, 0, 1]]}, "row 0: its attention mask has a hole"),
        ({"attention_mask": [[0, 0, 0]]}, "row 0 has no tokens: its attention mask is 0"),
        ({"attention_mask": [[1, 1]]}, r"row 0 of attention_mask is \[2\]"),
        ({"attention_mask": [[1, 1, 1]] * 2}, "rows of attention_mask"),
        ({"attention_mask": [[1, 1, 0]]}, "row 0 has no loss token"),
        ({"attention_mask": [[0, 1, 1]], "loss_masks": [[0, 1]]}, r"row 0 of loss_masks is \[2\]"),
    ],
)
def test_tokens_that_are_none(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CHGDataset.from_tokens(**{"input_ids": ROW, "loss_masks": LOSS, **given})


def test_the_row_is_named() -> None:
    rows = [torch.tensor([1, 2, 3])] * 5
    masks = [torch.tensor([False, True, True])] * 5
    masks[3] = torch.zeros(3, dtype=torch.bool)
    with pytest.raises(InputError, match="row 3 has no loss token"):
        CHGDataset(rows, masks)


# --- last tokens, masks, labels -----------------------------------------------------------------------------


def test_only_the_last_token(any_tokenizer: Any, tiny: Callable[..., Any]) -> None:
    texts = [a + b for a, b in zip(PROMPTS, TARGETS, strict=True)]
    with untouched(any_tokenizer):
        data = CHGDataset.from_concatenated_texts(texts, any_tokenizer)
    bridge = TransformerBridge(tiny("gpt2", vocab_size=1200), any_tokenizer)
    behind = 1 if any_tokenizer.sep_token_id is not None else 0
    for row, text in zip(data, texts, strict=True):
        assert row["input_ids"].tolist() == bridge.to_tokens(text, truncate=False)[0].tolist()
        assert row["loss_mask"].nonzero().tolist() == [[len(row["input_ids"]) - 1 - behind]]
    cut = CHGDataset.from_concatenated_texts(
        texts, any_tokenizer, max_length=5, truncate_prompt=True
    )
    assert [len(row["input_ids"]) for row in cut] == [5, 5]
    assert all(int(row["loss_mask"].sum()) == 1 for row in cut)
    with pytest.raises(InputError, match="row 0 has no tokens"):
        CHGDataset.from_concatenated_texts([""], any_tokenizer)


@pytest.fixture(scope="session")
def masked_tokenizer() -> Any:
    vocabulary = [
        "[PAD]",
        "[CLS]",
        "[SEP]",
        "[UNK]",
        "[MASK]",
        "Paris",
        "Rome",
        "is",
        "nice",
        "##r",
    ]
    core = Tokenizer(models.WordPiece({x: i for i, x in enumerate(vocabulary)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[MASK]",
    )


def test_masks_are_filled(masked_tokenizer: Any) -> None:
    with untouched(masked_tokenizer):
        data = CHGDataset.from_masked(
            ["[MASK] is nice", "Rome is [MASK] [MASK]"],
            ["Paris", ["nice", 9]],
            masked_tokenizer,
            foils=["Rome", "Paris Rome"],
        )
    assert not data.causal
    assert [row["input_ids"].tolist() for row in data] == [[1, 4, 7, 8, 2], [1, 6, 7, 4, 4, 2]]
    assert [row["loss_mask"].nonzero().flatten().tolist() for row in data] == [[1], [3, 4]]
    assert [row["targets"].tolist() for row in data] == [[1, 5, 7, 8, 2], [1, 6, 7, 8, 9, 2]]
    assert [row["foils"].tolist() for row in data] == [[1, 6, 7, 8, 2], [1, 6, 7, 5, 6, 2]]
    batch = data.batch([0, 1])
    assert batch.targets[0].tolist() == [1, 5, 7, 8, 2, 0]
    assert batch.attention_mask[0].tolist() == [1, 1, 1, 1, 1, 0]
    # A mask may stand first: what predicts it is the mask itself.
    bare = CHGDataset.from_tokens([[4, 7]], [[1, 0]], targets=[[5, 7]], causal=False)
    assert bare[0]["targets"].tolist() == [5, 7]


@pytest.mark.parametrize(
    ("texts", "targets", "message"),
    [
        (["Paris is nice"], ["Rome"], r"row 0 has no '\[MASK\]' in it"),
        (
            ["[MASK] is"],
            ["Paris Rome"],
            r"row 0: the target 'Paris Rome' is 2 tokens \(Paris, Rome\)",
        ),
        (["[MASK] is"], [""], "row 0: the target '' is 0 tokens"),
        (["[MASK] [MASK]"], [5], "row 0: the target 5 is 1 tokens"),
        (
            ["[MASK] is"],
            [None],
            "row 0: the target is text, a token id, or a list of these; got None",
        ),
        (["[MASK] is"], "Paris", "targets is a list"),
        (["[MASK] is"], ["Paris", "Rome"], "1 texts and 2 targets"),
    ],
)
def test_masks_that_cannot_be_filled(
    masked_tokenizer: Any, texts: Any, targets: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        CHGDataset.from_masked(texts, targets, masked_tokenizer)


def test_masked_rows_are_not_cut(masked_tokenizer: Any, tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"max_length is 4: 0 \(5 tokens\); leave them out$"):
        CHGDataset.from_masked(["[MASK] is nice"], ["Paris"], masked_tokenizer, max_length=4)
    with pytest.raises(InputError, match="no mask token"):
        CHGDataset.from_masked(["a"], ["b"], tokenizer)


def test_texts_with_classes(letters: Any, tiny: Callable[..., Any]) -> None:
    own = letters("[CLS] $A [SEP]")
    with untouched(own):
        data = CHGDataset.from_labels(["ab", "c"], torch.tensor([2, 0]), own, foils=[1, 1])
    bridge = TransformerBridge(tiny("bert", "masked"), own)
    for row, text in zip(data, ["ab", "c"], strict=True):
        assert row["input_ids"].tolist() == bridge.to_tokens(text)[0].tolist()
        assert not row["loss_mask"].any()
    batch = data.batch([0, 1])
    assert batch.labels is not None
    assert batch.foils is not None
    assert batch.labels.tolist() == [2, 0]
    assert batch.foils.tolist() == [1, 1]
    assert batch.repeat(2).labels.tolist() == [2, 2, 0, 0]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert (int(data[0]["labels"]), int(data[0]["foils"])) == (2, 1)


def test_texts_that_are_too_long(letters: Any) -> None:
    own = letters("[CLS] $A [SEP]")
    with pytest.raises(InputError, match=r"row 1 has 5 tokens, more than 4; pass truncate=True"):
        CHGDataset.from_labels(["a", "abc"], [0, 1], own, max_length=4)
    cut = CHGDataset.from_labels(["a", "abc"], [0, 1], own, max_length=4, truncate=True)
    pieces = own.convert_ids_to_tokens(cut[1]["input_ids"].tolist())
    assert pieces == ["[CLS]", "a", "##b", "[SEP]"]
    with pytest.raises(InputError, match="row 0 has no tokens"):
        CHGDataset.from_labels([""], [0], own)
    with pytest.raises(InputError, match="2 rows and 1 labels"):
        CHGDataset.from_labels(["a", "b"], [0], own)


# --- the pattern task ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["aba", "abb"])
@pytest.mark.parametrize("name", ["demo", "bytes", "characters", "trimmed bytes"])
def test_the_pattern_is_what_the_last_word_follows(
    tokenizers: dict[str, Any], pattern: str, name: str
) -> None:
    own = tokenizers[name]
    with untouched(own):
        data = CHGDataset.from_pattern_task(pattern, own, num_samples=20, num_lines=3, vocab_size=6)
    assert len(data) == 20
    assert len({len(row["input_ids"]) for row in data}) == 1
    for row in data:
        # To the tokenizer of characters a line break is unknown.
        text = own.decode(row["input_ids"][1:]).replace("<unk>", "\n")
        lines = [
            [word.strip() for word in line.split("^")] for line in text.strip("\n").split("\n")
        ]
        assert len(lines) == 3
        for a, b, c in lines:
            assert a != b
            assert c == (a if pattern == "aba" else b)
        words = [word for line in lines for word in line[:2]]
        assert len(set(words)) == 6
        assert row["loss_mask"].nonzero().tolist() == [[len(row["input_ids"]) - 1]]
        assert own.decode(row["input_ids"][-1:]).strip() == lines[-1][2]
        other = lines[-1][1] if pattern == "aba" else lines[-1][0]
        assert own.decode(row["foils"][-1:]).strip() == other
        # Each word is the same one token wherever it stands.
        ids = row["input_ids"].tolist()
        assert ids.count(ids[-1]) == 2
        assert ids.count(int(row["foils"][-1])) == 1


@pytest.mark.parametrize("legacy", [False, True])
def test_patterns_of_sentencepiece(legacy: bool) -> None:
    """A letter is one token with the space before it; one that joins the mark behind it will not do."""
    marks = ["<unk>", "▁", "^", "\n"]
    pieces = [*marks, *"ABCDE", *(f"▁{x}" for x in "ABCDE"), "▁E^"]
    merges = [("▁", x) for x in "ABCDE"] + [("▁E", "^")]
    core = Tokenizer(models.BPE({x: i for i, x in enumerate(pieces)}, merges, unk_token="<unk>"))
    core.decoder = decoders.Metaspace()
    if legacy:
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace()
    own = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    data = CHGDataset.from_pattern_task("abb", own, 5, num_lines=2, vocab_size=4)
    for row in data:
        ids = row["input_ids"].tolist()
        words = [piece for piece in own.convert_ids_to_tokens(ids) if piece not in marks]
        assert all(len(word) == 2 for word in words)
        assert words[1::3] == words[2::3]
        assert ids[-1] == ids[-3]
    with pytest.raises(InputError, match="only 4 letters are one token each"):
        CHGDataset.from_pattern_task("abb", own, 5, num_lines=2, vocab_size=5)


def test_words_of_the_vocabulary(tokenizers: dict[str, Any]) -> None:
    own = tokenizers["demo"]
    options = {"num_samples": 30, "use_vocab_tokens": True, "vocab_size": 40, "num_lines": 4}
    data = CHGDataset.from_pattern_task("aba", own, **options)
    words = {
        word.strip(" \n")
        for row in data
        for word in own.decode(row["input_ids"][1:]).replace("\n", "^").split("^")
    }
    words.discard("")
    assert all(len(word) > 1 and word.isalpha() for word in words)
    assert all(len(own(f" {word}").input_ids) == 1 for word in words)
    assert 20 < len(words) <= 40


def test_the_same_rows_everywhere(tokenizers: dict[str, Any], unchecked: None) -> None:
    """Whatever the hash seed of the process; the global generators neither matter nor move.

    (Checking types at run time draws from Python's.)
    """
    own = tokenizers["demo"]
    random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), torch.get_rng_state()
    data = CHGDataset.from_pattern_task("aba", own, num_samples=2, num_lines=2)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert [own.decode(row["input_ids"][1:]) for row in data] == PINNED["letters"]
    words = CHGDataset.from_pattern_task(
        "abb", own, num_samples=1, num_lines=2, use_vocab_tokens=True, seed=7
    )
    assert [own.decode(row["input_ids"][1:]) for row in words] == PINNED["words"]
    other = CHGDataset.from_pattern_task("aba", own, num_samples=2, num_lines=2, seed=1)
    assert other[0]["input_ids"].tolist() != data[0]["input_ids"].tolist()


PINNED = {
    "letters": ["\n H^ N^ H\n W^ L^ W", "\n H^ I^ H\n a^ F^ a"],
    "words": ["\n Nigeria^ cit^ cit\n Bogota^ Dakar^ Dakar"],
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "abc"}, "pattern must be one of .*got 'abc'"),
        ({"num_samples": 0}, "at least 1, got 0 and 5"),
        ({"num_lines": 0}, "at least 1, got 1000 and 0"),
        (
            {"vocab_size": 9},
            "5 lines have 10 different words, so vocab_size must be at least that; got 9",
        ),
        ({"vocab_size": 60}, "only 52 letters are one token each.*or pass use_vocab_tokens=True"),
        (
            {"vocab_size": 5000, "use_vocab_tokens": True},
            "words of the vocabulary are one token each",
        ),
    ],
)
def test_patterns_that_cannot_be(tokenizer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CHGDataset.from_pattern_task(**{"pattern": "aba", "tokenizer": tokenizer, **options})


def test_patterns_need_places() -> None:
    with pytest.raises(InputError, match="needs a fast tokenizer"):
        CHGDataset.from_pattern_task("aba", ByT5Tokenizer())


def test_patterns_fit_the_model(tiny: Callable[..., Any], tokenizer: Any) -> None:
    bridge = TransformerBridge(tiny("gpt2"), tokenizer)
    assert len(CHGDataset.from_pattern_task("aba", bridge, num_samples=2)) == 2
    with pytest.raises(InputError, match="rows are too long, the model reads 64"):
        CHGDataset.from_pattern_task("aba", bridge, num_samples=2, num_lines=8)


# --- files --------------------------------------------------------------------------------------------------


@pytest.fixture
def tsv(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.tsv"
    path.write_text(
        'id\tprompt\ttarget\n1\t2 + 2 =\t 4\n2\t"two\nlines, ""quoted"""\t NA\n\n', "utf-8"
    )
    return path


def test_tab_separated_files(tsv: Path, tokenizers: dict[str, Any]) -> None:
    """Numbers and NA are text like any other."""
    own = tokenizers["bytes"]
    data = CHGDataset.from_tsv(tsv, own, "prompt", "target")
    assert [own.decode(row["input_ids"][1:]) for row in data] == [
        "2 + 2 = 4",
        'two\nlines, "quoted" NA',
    ]
    assert [target_text(own, row) for row in data] == [" 4", " NA"]
    by_number = CHGDataset.from_tsv(str(tsv), own, 1, 2, max_samples=1, prepend_bos=False)
    assert [own.decode(row["input_ids"]) for row in by_number] == ["2 + 2 = 4"]
    last = CHGDataset.from_tsv(tsv, own, "prompt", "target", last_token_only=True)
    assert [int(row["loss_mask"].sum()) for row in last] == [1, 1]
    tsv.write_text("a\t b\nc\t d", "utf-8")
    assert len(CHGDataset.from_tsv(tsv, own, header=False)) == 2
    assert len(CHGDataset.from_tsv(tsv, own)) == 1


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            None,
            {"input_column": "question"},
            r"has no column 'question'; its columns are \['id', 'prompt', 'target'\]",
        ),
        (None, {"target_column": 3}, "has no column 3"),
        (None, {"target_column": -1}, "has no column -1"),
        (
            None,
            {"input_column": "prompt", "header": False},
            "columns have no names; give 'prompt' as a number",
        ),
        ("a\tb\n1\t2\n3", {}, r"line 3: there are 1 columns, and column 1 is wanted"),
        ("a\tb\n", {}, "has no rows below its header"),
        ("", {"header": False}, "has no rows$"),
        (None, {"max_samples": 0}, "max_samples must be at least 1"),
        ('a\tb\n"1\t2', {}, "line 2 is not tab-separated text"),
    ],
)
def test_files_that_are_not(
    tsv: Path, tokenizer: Any, text: str | None, options: dict[str, Any], message: str
) -> None:
    if text is not None:
        tsv.write_text(text, "utf-8")
    with pytest.raises(InputError, match=message):
        CHGDataset.from_tsv(tsv, tokenizer, **options)


PAIRS = [
    {"q": "ab", "a": " c", "n": 4},
    {"q": "de", "a": " f", "n": 5},
    {"q": "gh", "a": " i", "n": 6},
]


def test_datasets_of_every_kind(tokenizer: Any, tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    held = Dataset.from_list(PAIRS)
    texts = ["ab c", "de f"]
    for dataset in (
        held,
        held.to_iterable_dataset(),
        DatasetDict({"train": held}),
        PAIRS,
        iter(PAIRS),
        {"train": PAIRS},
    ):
        data = CHGDataset.from_huggingface(dataset, "q", "a", tokenizer, max_samples=2)
        assert [tokenizer.decode(row["input_ids"][1:]) for row in data] == texts
        assert [target_text(tokenizer, row) for row in data] == [" c", " f"]
    made = CHGDataset.from_huggingface(
        PAIRS,
        lambda row: row["q"].upper(),
        lambda row: f" {row['n']}",
        tokenizer,
        prepend_bos=False,
    )
    assert [tokenizer.decode(row["input_ids"]) for row in made] == ["AB 4", "DE 5", "GH 6"]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in PAIRS), "utf-8")
    for streaming in (True, False):
        options = {"data_files": str(path), "cache_dir": str(tmp_path), "streaming": streaming}
        data = CHGDataset.from_huggingface(
            "json", "q", "a", tokenizer, max_samples=2, load_options=options
        )
        assert [tokenizer.decode(row["input_ids"][1:]) for row in data] == texts


def test_a_stream_is_read_no_further(tokenizer: Any) -> None:
    def endless() -> Iterator[dict[str, Any]]:
        yield from PAIRS[:2]
        raise AssertionError("read on")

    assert len(CHGDataset.from_huggingface(endless(), "q", "a", tokenizer, max_samples=2)) == 2


@pytest.mark.parametrize(
    ("dataset", "columns", "options", "message"),
    [
        (
            PAIRS,
            ("question", "a"),
            {},
            r"row 0 has no column 'question'; its columns are \['q', 'a', 'n'\]",
        ),
        ([*PAIRS, {"q": "x"}], ("q", "a"), {}, r"row 3 has no column 'a'"),
        (PAIRS, ("q", "n"), {}, "row 0: column 'n' is int, expected str: 4; a function of the row"),
        (PAIRS, ("q", lambda row: row["n"]), {}, "row 0: what the function made is int"),
        ({"test": PAIRS}, ("q", "a"), {}, "no split 'train'; there are test"),
        ([], ("q", "a"), {}, "the dataset has no rows"),
        (["ab"], ("q", "a"), {}, "row 0 of the dataset is str, expected a mapping"),
        (3, ("q", "a"), {}, "an iterable of mappings, got int"),
        (PAIRS, ("q", "a"), {"load_options": {"name": "main"}}, "this dataset is loaded already"),
        (PAIRS, ("q", "a"), {"max_samples": -1}, "max_samples must be at least 1"),
    ],
)
def test_datasets_that_are_none(
    tokenizer: Any, dataset: Any, columns: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        CHGDataset.from_huggingface(dataset, columns[0], columns[1], tokenizer, **options)
