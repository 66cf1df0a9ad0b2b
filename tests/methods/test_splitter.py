"""SplitterForGeneration: rows against plain hooks, batches against single texts, what is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import InputError, SplitterForGeneration

TEXTS = ["hello there, you", "a", "some words", "xyz and so on and on", "four"]
PATHS = {"gpt2": "transformer.h.1", "llama": "model.layers.1"}
CLOSE = 1e-5


@pytest.fixture(params=sorted(PATHS))
def name(request: pytest.FixtureRequest) -> str:
    """An architecture with learned positions, and one with rotary ones."""
    return request.param


@pytest.fixture(scope="module")
def model_of(tiny: Callable[..., nn.Module]) -> Callable[[str], nn.Module]:
    """Tiny models of three layers, built once; no test here changes them."""
    built = {name: tiny(name, num_hidden_layers=3) for name in PATHS}
    return built.__getitem__


@pytest.fixture
def model(model_of: Any, name: str) -> nn.Module:
    """The architecture's model."""
    return model_of(name)


@pytest.fixture(scope="module")
def splitter(model_of: Any, tokenizer: Any) -> SplitterForGeneration:
    """A GPT-2 split behind its middle layer, two texts a batch; no test here changes it."""
    return SplitterForGeneration(model_of("gpt2"), 1, tokenizer=tokenizer, batch_size=2)


@pytest.fixture
def seen(plain: Any) -> Callable[..., Tensor]:
    """``seen(model, path, ids)``: what a plain hook sees at one row of ids, [pos, d]."""

    def see(model: nn.Module, path: str, ids: Any) -> Tensor:
        row = torch.as_tensor(ids).reshape(1, -1)
        return plain.read(model, row, path)[path][0][0]

    return see


# --- values -------------------------------------------------------------------------------------------------


def test_rows_are_what_a_hook_sees(model: Any, name: str, tokenizer: Any, seen: Any) -> None:
    """One text a batch: the bits that a plain hook sees in the untouched model."""
    splitter = SplitterForGeneration(model, 1, tokenizer=tokenizer)
    found, predictions = splitter.get_activations(TEXTS, flatten_activations=False)
    assert predictions is None
    assert len(found) == len(TEXTS)
    for rows, text in zip(found, TEXTS, strict=True):
        assert torch.equal(rows, seen(model, PATHS[name], tokenizer(text)["input_ids"]))


@pytest.mark.parametrize(
    ("side", "pad", "batch_size"),
    [("left", "<pad>", 2), ("left", None, 5), ("right", "<pad>", 5), ("right", None, 2)],
)
def test_a_batch_is_its_texts(
    model: Any,
    name: str,
    new_tokenizer: Any,
    seen: Any,
    plain: Any,
    side: str,
    pad: Any,
    batch_size: int,
) -> None:
    """Unequal lengths, padded on either side, with and without a pad token: each text as it is alone."""
    tokenizer = new_tokenizer(padding_side=side, pad_token=pad)
    splitter = SplitterForGeneration(model, 1, tokenizer=tokenizer, batch_size=batch_size)
    assert splitter.bridge.cfg.default_padding_side == side
    found, _ = splitter.get_activations(TEXTS, flatten_activations=False)
    for rows, text in zip(found, TEXTS, strict=True):
        assert plain.gap(rows, seen(model, PATHS[name], tokenizer(text)["input_ids"])) < CLOSE


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_goes_behind(model_of: Any, new_tokenizer: Any, seen: Any, side: str) -> None:
    """Whatever side the tokenizer and the bridge say: there a causal model does not look."""
    tokenizer = new_tokenizer(padding_side=side)
    splitter = SplitterForGeneration(model_of("gpt2"), 1, tokenizer=tokenizer, batch_size=2)
    given: list[Tensor] = []
    embed: Any = splitter.model.get_submodule("transformer.wte")
    handle = embed.register_forward_hook(lambda m, args, out: given.append(args[0]))
    found = splitter.inputs_to_activations(["a", "abc"])
    splitter.get_activations(["a", "abc"])
    handle.remove()
    a, b, c = tokenizer("abc")["input_ids"]
    assert [x.tolist() for x in given] == [[[a, b, c], [a, 0, 0]]] * 2
    torch.testing.assert_close(
        found[0, :1], seen(splitter.model, PATHS["gpt2"], [a]), atol=CLOSE, rtol=CLOSE
    )


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("rwkv", "rwkv.blocks.1"),
        ("recurrent_gemma", "model.layers.1"),
        ("xlstm", "backbone.blocks.1"),
        ("roberta", "roberta.encoder.layer.1"),
    ],
)
def test_models_that_are_not_to_be_padded_in_front(
    tiny: Any, new_tokenizer: Any, seen: Any, plain: Any, name: str, path: str
) -> None:
    """A state runs through padding in front, or positions are counted from it; the tokenizer may say so."""
    model, tokenizer = tiny(name), new_tokenizer(padding_side="left")
    splitter = SplitterForGeneration(model, 1, tokenizer=tokenizer, batch_size=5)
    found, _ = splitter.get_activations(TEXTS, flatten_activations=False)
    for rows, text in zip(found, TEXTS, strict=True):
        assert plain.gap(rows, seen(model, path, tokenizer(text)["input_ids"])) < CLOSE


def test_one_tensor_is_the_list_joined(splitter: Any) -> None:
    """Flattened, the rows of all texts follow each other in the order of the texts."""
    parts, _ = splitter.get_activations(TEXTS, flatten_activations=False)
    assert [len(part) for part in parts] == [len(text) for text in TEXTS]
    assert torch.equal(splitter.get_activations(TEXTS)[0], torch.cat(parts))


def test_texts_of_like_length_run_together(splitter: Any) -> None:
    """Batches are cut from the texts sorted by length, longest first, and each runs once."""
    widths: list[tuple[int, ...]] = []
    handle = splitter.model.transformer.wte.register_forward_hook(
        lambda m, args, out: widths.append(tuple(args[0].shape))
    )
    splitter.get_activations(TEXTS)
    handle.remove()
    assert widths == [(2, 20), (2, 10), (1, 1)]


def test_a_whole_batch_as_the_model_sees_it(splitter: Any, plain: Any) -> None:
    """inputs_to_activations gives one padded batch in the order of the texts, whatever their lengths."""
    found = splitter.inputs_to_activations(["a", "abcd", "ab"])
    assert found.shape == (3, 4, 64)
    rows, _ = splitter.get_activations(["a", "abcd", "ab"])
    mine = torch.cat([found[0, :1], found[1], found[2, :2]])
    assert plain.gap(mine, rows) < CLOSE


def test_the_shape_of_a_short_text(splitter: Any) -> None:
    """get_latent_shape is the shape a run of the text "scan" has."""
    assert splitter.get_latent_shape() == (1, 4, 64) == splitter.inputs_to_activations("scan").shape


def test_keywords_of_the_forward(splitter: Any, plain: Any, tokenizer: Any) -> None:
    """forward_kwargs reach the model, like in a call of it."""
    ids = torch.tensor([tokenizer("words")["input_ids"]])
    positions = torch.tensor([[7, 8, 9, 10, 11]])
    given = {"input_ids": ids, "position_ids": positions}
    expected = plain.read(splitter.model, given, PATHS["gpt2"])[PATHS["gpt2"]][0]
    moved = {"position_ids": positions}
    found, _ = splitter.get_activations("words", forward_kwargs=moved)
    assert torch.equal(found, expected[0])
    assert torch.equal(splitter.inputs_to_activations("words", moved), expected)
    assert plain.gap(splitter.get_activations("words")[0], expected[0]) > 1e-2


def test_a_bar_changes_no_value(splitter: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """tqdm_bar shows batches on stderr; without it nothing is written."""
    quiet, _ = splitter.get_activations(TEXTS)
    assert capsys.readouterr() == ("", "")
    shown, _ = splitter.get_activations(TEXTS, tqdm_bar=True)
    assert "Computing activations" in (bar := capsys.readouterr().err)
    assert "3/3" in bar
    assert torch.equal(quiet, shown)


# --- special tokens -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_special_tokens_written_in_the_text(
    model: Any, name: str, new_tokenizer: Any, seen: Any, plain: Any, side: str
) -> None:
    """An EOS or an unknown token in a text has no row unless asked for; asked for, it has its own."""
    tokenizer = new_tokenizer(padding_side=side)
    splitter = SplitterForGeneration(model, 1, tokenizer=tokenizer, batch_size=3)
    texts = ["ab<eos>cd", "a longer text here", "<bos>\N{SNOWMAN}z"]
    kept = [[0, 1, 3, 4], list(range(18)), [2]]
    expected = [seen(model, PATHS[name], tokenizer(text)["input_ids"]) for text in texts]
    some, _ = splitter.get_activations(texts, flatten_activations=False)
    every, _ = splitter.get_activations(texts, True, flatten_activations=False)
    for own, rows, keep, whole in zip(expected, some, kept, every, strict=True):
        assert plain.gap(rows, own[keep]) < CLOSE
        assert plain.gap(whole, own) < CLOSE


def test_special_tokens_that_the_tokenizer_adds(
    model: Any, name: str, letters: Any, seen: Any, plain: Any
) -> None:
    """The model reads what the tokenizer adds; the rows leave it out unless asked."""
    tokenizer = letters("[CLS] $A [SEP]")
    splitter = SplitterForGeneration(model, 1, tokenizer=tokenizer, batch_size=2)
    some, _ = splitter.get_activations(["Hi.", "longer"], flatten_activations=False)
    every, _ = splitter.get_activations(["Hi.", "longer"], True, flatten_activations=False)
    for text, rows, whole in zip(["Hi.", "longer"], some, every, strict=True):
        own = seen(model, PATHS[name], tokenizer(text)["input_ids"])
        assert plain.gap(whole, own) < CLOSE
        assert plain.gap(rows, own[1:-1]) < CLOSE


def test_texts_without_rows(splitter: Any, letters: Any, model_of: Any) -> None:
    """A text of special tokens alone has none, and does not disturb the others."""
    found, _ = splitter.get_activations(["<eos>", "ab"], flatten_activations=False)
    assert [tuple(rows.shape) for rows in found] == [(0, 64), (2, 64)]
    assert splitter.get_activations(["<eos>"])[0].shape == (0, 64)
    added = SplitterForGeneration(model_of("gpt2"), 1, tokenizer=letters("[CLS] $A"))
    assert added.get_activations([""])[0].shape == (0, 64)
    assert added.get_activations([""], True)[0].shape == (1, 64)


# --- what is taken ------------------------------------------------------------------------------------------


def test_a_string_and_a_tuple_are_texts(splitter: Any) -> None:
    """One string is a list of one; a tuple is a list."""
    assert torch.equal(splitter.get_activations("abc")[0], splitter.get_activations(["abc"])[0])
    expected, _ = splitter.get_activations(TEXTS)
    assert torch.equal(splitter.get_activations(tuple(TEXTS))[0], expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_a_tokenizer_returns(splitter: Any, new_tokenizer: Any, side: str, plain: Any) -> None:
    """A BatchEncoding, or its lists, padded on either side, are the texts they were made of."""
    expected, _ = splitter.get_activations(TEXTS)
    encoded = new_tokenizer(padding_side=side)(TEXTS, padding=True, return_tensors="pt")
    assert not encoded["attention_mask"].all()
    assert plain.gap(splitter.get_activations(encoded)[0], expected) < CLOSE
    lists = {key: value.tolist() for key, value in encoded.items()}
    assert plain.gap(splitter.get_activations(lists)[0], expected) < CLOSE


def test_ids(splitter: Any, tokenizer: Any, seen: Any) -> None:
    """Ids are read as they are; of special ones the rows are left out, as in a text."""
    ids = torch.tensor([[9, 10, 2, 11], [1, 12, 13, 14]])
    found, _ = splitter.get_activations(ids, flatten_activations=False)
    every, _ = splitter.get_activations(ids, True, flatten_activations=False)
    for rows, whole, own, keep in zip(found, every, ids, [[0, 1, 3], [1, 2, 3]], strict=True):
        expected = seen(splitter.model, PATHS["gpt2"], own)
        torch.testing.assert_close(whole, expected, atol=CLOSE, rtol=CLOSE)
        assert torch.equal(rows, whole[keep])


def test_a_text_longer_than_the_model_reads(splitter: Any, tokenizer: Any, seen: Any) -> None:
    """It is cut at the model's context; ids that long are an error."""
    text = "abcdefgh" * 10
    found, _ = splitter.get_activations(text)
    ids = tokenizer(text)["input_ids"][:64]
    assert torch.equal(found, seen(splitter.model, PATHS["gpt2"], ids))
    with pytest.raises(InputError, match="80 tokens"):
        splitter.get_activations(torch.tensor([tokenizer(text)["input_ids"]]))


def test_what_a_tokenizer_returns_unpadded(splitter: Any, tokenizer: Any) -> None:
    """Lists of unequal length are texts as they are."""
    expected, _ = splitter.get_activations(["abc", "ab"])
    assert torch.equal(splitter.get_activations(tokenizer(["abc", "ab"]))[0], expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "empty list"),
        ((), "empty list"),
        (["ab", ""], "text 1 has no tokens"),
        (["ab", 3], "list of texts"),
        ([["ab"]], "list of texts"),
        (3, "list of texts.*int"),
        (None, "NoneType"),
        (iter(["ab"]), "iterator"),
        (torch.tensor([9, 10]), r"\[batch, pos\], got \[2\]"),
        (torch.tensor([[[9, 10]]]), r"got \[1, 1, 2\]"),
        (torch.tensor([[9.0, 10.0]]), "float32"),
        ({"input_ids": [9, 10]}, r"got \[2\]"),
        (torch.zeros(0, 5, dtype=torch.long), r"got \[0, 5\]"),
        (torch.ones(1, 3, dtype=torch.bool), "bool"),
        ({"attention_mask": torch.ones(1, 3)}, "no input_ids"),
        (
            {"input_ids": torch.tensor([[9, 10]]), "attention_mask": torch.ones(1, 3)},
            "attention_mask",
        ),
        (
            {"input_ids": torch.tensor([[9, 10]]), "attention_mask": torch.ones(2, 2)},
            "attention_mask",
        ),
    ],
)
def test_what_is_no_input_is_refused(splitter: Any, given: Any, message: str) -> None:
    """Each wrong input is an InputError that says what was given, from every method that takes one."""
    for method in (splitter.get_activations, splitter.inputs_to_activations):
        with pytest.raises(InputError, match=message):
            method(given)


def test_options_that_do_not_exist_are_refused(splitter: Any) -> None:
    """A misspelt option is an error; it does not vanish."""
    with pytest.raises(TypeError, match="include_all_tokens"):
        splitter.get_activations(TEXTS, include_all_tokens=True)


# --- dtype, device, memory ----------------------------------------------------------------------------------


def test_dtype_and_device(tiny: Any, tokenizer: Any, seen: Any) -> None:
    """Rows are float32 on the CPU unless asked otherwise; None leaves them as the model made them."""
    model = tiny("gpt2").bfloat16()
    splitter = SplitterForGeneration(model, 1, tokenizer=tokenizer)
    expected = seen(model, "transformer.h.1", tokenizer("words")["input_ids"])
    assert expected.dtype == torch.bfloat16
    own, _ = splitter.get_activations(["words"], device=None, dtype=None)
    assert own.dtype == torch.bfloat16
    assert torch.equal(own, expected)
    assert torch.equal(splitter.get_activations(["words"])[0], expected.float())
    assert torch.equal(
        splitter.get_activations(["words"], dtype=torch.double)[0], expected.double()
    )
    assert splitter.get_activations(["words"], device="meta")[0].device.type == "meta"


def test_rows_do_not_keep_the_batch(splitter: Any) -> None:
    """Each text's rows are a copy of their own size, without a graph."""
    for options in ({}, {"device": None, "dtype": None}):
        found, _ = splitter.get_activations([*TEXTS, "<eos>"], flatten_activations=False, **options)
        for rows in found:
            assert rows.untyped_storage().nbytes() == rows.numel() * 4
            assert not rows.requires_grad


def test_the_model_and_the_tokenizer_stay_as_they_were(
    model: Any, tokenizer: Any, snapshot: Any, is_silent: Any
) -> None:
    """No embedding is added, no pad token set, no hook left, no parameter or mode changed."""
    before, core = snapshot(model), tokenizer.backend_tokenizer.to_str()
    named = {**tokenizer.special_tokens_map, "side": tokenizer.padding_side, "size": len(tokenizer)}
    splitter = SplitterForGeneration(model, 1, tokenizer=tokenizer, batch_size=2)
    splitter.get_activations(TEXTS)
    splitter.get_latent_shape()
    splitter.concept_output_gradient(TEXTS[:2], torch.clone, torch.clone)
    with pytest.raises(InputError, match="no_such"):
        splitter.get_activations(TEXTS, forward_kwargs={"no_such": 1})
    assert snapshot(model) == before
    assert is_silent(splitter.bridge)
    assert splitter.tokenizer is tokenizer
    after = {**tokenizer.special_tokens_map, "side": tokenizer.padding_side, "size": len(tokenizer)}
    assert after == named
    assert tokenizer.backend_tokenizer.to_str() == core


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("size", [0, -1, 1.5, True, None])
def test_batches_of_nothing(splitter: Any, size: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch size that was set to what is none is refused, as in the constructor."""
    monkeypatch.setattr(splitter, "batch_size", size)
    with pytest.raises(InputError, match=f"batch_size is at least 1, got {size}"):
        splitter.get_activations(TEXTS)


# --- modes and other hooks ----------------------------------------------------------------------------------


def test_under_inference_mode(splitter: Any) -> None:
    """It works there; rows are the same."""
    expected, _ = splitter.get_activations(TEXTS)
    with torch.inference_mode():
        assert torch.equal(splitter.get_activations(TEXTS)[0], expected)
        assert splitter.get_latent_shape() == (1, 4, 64)


def test_hooks_of_others(splitter: Any, plain: Any) -> None:
    """Hooks that are set on the bridge work; those behind the split point owe nothing to a run cut short."""
    bridge, calls = splitter.bridge, []
    expected, _ = splitter.get_activations("abc")
    with bridge.hooks(
        fwd_hooks=[
            ("blocks.1.hook_in", lambda x, hook: 0 * x),
            ("blocks.2.hook_out", lambda x, hook: calls.append(1)),
        ]
    ):
        moved, _ = splitter.get_activations("abc")
    assert plain.gap(moved, expected) > 0.1
    assert not calls
    bridge.add_hook("blocks.2.hook_out", lambda x, hook: calls.append(1))
    try:
        assert torch.equal(splitter.get_activations("abc")[0], expected)
        splitter.split_point = "transformer.h.1.mlp.c_fc"
        splitter.get_activations("abc")
    finally:
        bridge.reset_hooks()
        splitter.split_point = 1
    assert not calls


def test_what_is_shown_is_taken_at_once(tiny: Any, tokenizer: Any, seen: Any) -> None:
    """Falcon adds to its MLP's output in place; the rows are what the MLP gave."""
    model = tiny("falcon")
    splitter = SplitterForGeneration(model, "transformer.h.0.mlp", tokenizer=tokenizer)
    found, _ = splitter.get_activations("words")
    copies: list[Tensor] = []
    handle = model.get_submodule("transformer.h.0.mlp").register_forward_hook(
        lambda m, args, out: copies.append(out.clone())
    )
    seen(model, "transformer.h.0", tokenizer("words")["input_ids"])
    handle.remove()
    assert torch.equal(found, copies[0][0])
