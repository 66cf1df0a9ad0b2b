"""Text to ids and back: one rule for BOS and one for padding, whatever the tokenizer does by itself."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lensbridge import InputError, TransformerBridge

PAD, BOS, EOS, UNK = 0, 1, 2, 3
A, B, C = 14, 15, 16
"""string.printable holds the digits first, and four special tokens come before it."""

KINDS = {
    "plain": {},
    "prepends": {"template": "<bos> $A"},
    "appends": {"template": "$A <eos>"},
    "both": {"template": "<bos> $A <eos>"},
    "no_bos": {"bos_token": None},
    "no_pad": {"pad_token": None},
    "no_special": {"bos_token": None, "eos_token": None, "pad_token": None},
    "left": {"padding_side": "left"},
}


@pytest.fixture
def made(make_tokenizer: Callable[..., Any], tiny: Any) -> Callable[[str], Any]:
    """``made("prepends")``: a bridge whose tokenizer is of that kind."""

    def make(kind: str) -> Any:
        return TransformerBridge(tiny("gpt2"), make_tokenizer(**KINDS[kind]))

    return make


def test_the_alphabet() -> None:
    """The ids below are those of the letters."""
    assert [4 + string.printable.index(char) for char in "abc"] == [A, B, C]


# --- BOS --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "default", "with_bos", "without"),
    [
        ("plain", [BOS, A, B], [BOS, A, B], [A, B]),
        ("prepends", [BOS, A, B], [BOS, A, B], [A, B]),
        # EOS at the end of a prompt would end it: never asked for, always taken away.
        ("appends", [BOS, A, B], [BOS, A, B], [A, B]),
        ("both", [BOS, A, B], [BOS, A, B], [A, B]),
        # A model without BOS is not given one unasked; asked, EOS serves, as in TransformerLens.
        ("no_bos", [A, B], [EOS, A, B], [A, B]),
        ("no_pad", [BOS, A, B], [BOS, A, B], [A, B]),
    ],
)
def test_bos(
    made: Any, kind: str, default: list[int], with_bos: list[int], without: list[int]
) -> None:
    """prepend_bos None, True and False, in every place that takes text."""
    bridge = made(kind)
    for prepend, expected in ((None, default), (True, with_bos), (False, without)):
        assert bridge.to_tokens("ab", prepend_bos=prepend).tolist() == [expected]
        assert bridge.to_tokens(["ab", "ab"], prepend_bos=prepend).tolist() == [expected] * 2
        words = {PAD: "<pad>", BOS: "<bos>", EOS: "<eos>", A: "a", B: "b"}
        assert bridge.to_str_tokens("ab", prepend_bos=prepend) == [words[i] for i in expected]
        assert bridge.get_token_position("b", "ab", prepend_bos=prepend) == len(expected) - 1
        logits = bridge("ab", prepend_bos=prepend)
        assert torch.equal(logits, bridge(torch.tensor([expected])))


@pytest.mark.parametrize(
    ("kind", "prepends", "appends", "default"),
    [
        ("plain", False, False, True),
        ("prepends", True, False, True),
        ("appends", False, True, True),
        ("both", True, True, True),
        ("no_bos", False, False, False),
    ],
)
def test_what_the_config_says(
    made: Any, kind: str, prepends: bool, appends: bool, default: bool
) -> None:
    """cfg tells what the tokenizer does by itself and what the bridge will do."""
    cfg = made(kind).cfg
    assert cfg.tokenizer_prepends_bos == prepends
    assert cfg.tokenizer_appends_eos == appends
    assert cfg.default_prepend_bos == default


def test_the_default_can_be_changed(made: Any) -> None:
    """cfg.default_prepend_bos decides where the call does not."""
    bridge = made("prepends")
    bridge.cfg.default_prepend_bos = False
    assert bridge.to_tokens("ab").tolist() == [[A, B]]
    assert bridge.to_tokens("ab", prepend_bos=True).tolist() == [[BOS, A, B]]


def test_text_that_begins_with_bos(made: Any) -> None:
    """A BOS that the text itself spells is the text's; the tokenizer's own is added or not."""
    bridge = made("plain")
    start = bridge.to_tokens("ab")
    assert start.tolist() == [[BOS, A, B]]
    assert made("prepends").to_tokens("", prepend_bos=True).tolist() == [[BOS]]


def test_no_token_to_prepend(made: Any) -> None:
    """With neither BOS nor EOS, asking for BOS is an error."""
    bridge = made("no_special")
    assert bridge.to_tokens("ab").tolist() == [[A, B]]
    with pytest.raises(InputError, match="neither a BOS nor an EOS"):
        bridge.to_tokens("ab", prepend_bos=True)


def test_the_tokenizer_is_not_changed(made: Any) -> None:
    """The user's tokenizer keeps its own settings and habits."""
    for kind in KINDS:
        bridge = made(kind)
        tokenizer = bridge.tokenizer
        before = (
            tokenizer.pad_token,
            tokenizer.bos_token,
            tokenizer.padding_side,
            tokenizer("ab")["input_ids"],
        )
        bridge.to_tokens(["a", "abc"], padding_side="left")
        bridge(["a", "abc"])
        after = (
            tokenizer.pad_token,
            tokenizer.bos_token,
            tokenizer.padding_side,
            tokenizer("ab")["input_ids"],
        )
        assert after == before


def test_another_tokenizer(made: Any, make_tokenizer: Any) -> None:
    """Setting bridge.tokenizer reads its rules anew; None takes text away."""
    bridge = made("plain")
    bridge.tokenizer = make_tokenizer(**KINDS["no_bos"])
    assert bridge.to_tokens("ab").tolist() == [[A, B]]
    assert not bridge.cfg.default_prepend_bos
    bridge.tokenizer = None
    with pytest.raises(InputError, match="tokenizer"):
        bridge.to_tokens("ab")


# --- padding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "pad"),
    [("plain", PAD), ("prepends", PAD), ("both", PAD), ("no_pad", EOS), ("no_special", 0)],
)
def test_padding(made: Any, kind: str, pad: int) -> None:
    """Shorter rows are filled on the side asked for: with the pad token, else EOS, else 0."""
    bridge = made(kind)
    bos = [] if kind == "no_special" else [BOS]
    short, whole = [*bos, A], [*bos, A, B, C]
    fill = [pad, pad]
    assert bridge.to_tokens(["a", "abc"]).tolist() == [short + fill, whole]
    assert bridge.to_tokens(["a", "abc"], padding_side="right").tolist() == [short + fill, whole]
    assert bridge.to_tokens(["a", "abc"], padding_side="left").tolist() == [fill + short, whole]


def test_the_tokenizers_side_is_the_default(made: Any) -> None:
    """padding_side="left" on the tokenizer, or in cfg."""
    bridge = made("left")
    assert bridge.cfg.default_padding_side == "left"
    assert bridge.to_tokens(["a", "ab"]).tolist() == [[PAD, BOS, A], [BOS, A, B]]
    bridge.cfg.default_padding_side = "right"
    assert bridge.to_tokens(["a", "ab"]).tolist() == [[BOS, A, PAD], [BOS, A, B]]


@pytest.mark.parametrize("kind", ["no_pad", "no_bos"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_that_looks_like_text(made: Any, byhand: Any, kind: str, side: str) -> None:
    """Where EOS pads and EOS is BOS too, the real first token is still no padding."""
    bridge = made(kind)
    logits = bridge(["a", "abc"], padding_side=side, prepend_bos=True)
    alone = bridge("a", prepend_bos=True)
    real = slice(-2, None) if side == "left" else slice(0, 2)
    assert byhand.gap(logits[0, real], alone[0]) < 1e-5


def test_truncation(made: Any) -> None:
    """Text is cut at the context length unless truncate=False."""
    bridge = made("plain")
    assert bridge.to_tokens("a" * 100).shape == (1, 64)
    assert bridge.to_tokens("a" * 100, truncate=False).shape == (1, 101)
    assert bridge.to_tokens(["a" * 100, "b"]).shape == (2, 64)


def test_where_and_what(made: Any) -> None:
    """Ids are int64 and where the model is."""
    tokens = made("plain").to_tokens("ab")
    assert tokens.dtype == torch.long
    assert tokens.device == torch.device("cpu")
    assert made("plain").to_tokens("ab", move_to_device=False).device == torch.device("cpu")


# --- back to text -----------------------------------------------------------------------------------------


def test_to_string(made: Any) -> None:
    """A string for one row, a list for a batch, from tensors and lists."""
    bridge = made("plain")
    assert bridge.to_string(torch.tensor([A, B])) == "ab"
    assert bridge.to_string([A, B]) == "ab"
    assert bridge.to_string(torch.tensor([[A, B], [B, C]])) == ["ab", "bc"]
    assert bridge.to_string([[A, B], [B, C]]) == ["ab", "bc"]
    assert bridge.to_string(torch.tensor(A)) == "a"
    assert bridge.to_string(A) == "a"
    assert bridge.to_string(bridge.to_tokens("ab c", prepend_bos=False)) == ["ab c"]
    assert bridge.to_string([]) == ""
    assert bridge.to_string(torch.tensor([], dtype=torch.long)) == ""
    with pytest.raises(InputError, match=r"\[1, 1, 1\]"):
        bridge.to_string([[[A]]])
    with pytest.raises(InputError, match="integers"):
        bridge.to_string(torch.tensor([1.5]))


def test_to_str_tokens(made: Any) -> None:
    """Of text, of several, of ids in each shape."""
    bridge = made("plain")
    assert bridge.to_str_tokens("a b") == ["<bos>", "a", " ", "b"]
    assert bridge.to_str_tokens("a b", prepend_bos=False) == ["a", " ", "b"]
    assert bridge.to_str_tokens(["a", "bc"]) == [["<bos>", "a"], ["<bos>", "b", "c"]]
    assert bridge.to_str_tokens(torch.tensor([A, B])) == ["a", "b"]
    assert bridge.to_str_tokens(torch.tensor([[A, B]])) == ["a", "b"]
    assert bridge.to_str_tokens(torch.tensor([[A, B], [B, C]])) == [["a", "b"], ["b", "c"]]
    assert bridge.to_str_tokens([A, C]) == ["a", "c"]


def test_single_tokens(made: Any) -> None:
    """One token there and back; several, none and unknown ids are errors that show them."""
    for kind in ("plain", "both", "no_bos"):
        bridge = made(kind)
        assert bridge.to_single_token("b") == B
        assert bridge.to_single_str_token(B) == "b"
        with pytest.raises(InputError, match=r"'ab' is 2 tokens.*'a', 'b'"):
            bridge.to_single_token("ab")
        with pytest.raises(InputError, match="0 tokens"):
            bridge.to_single_token("")


def test_token_position(made: Any) -> None:
    """First or last, by text or id, in text or ids, with BOS and padding counted."""
    bridge = made("plain")
    assert bridge.get_token_position("b", "abcb") == 2
    assert bridge.get_token_position("b", "abcb", mode="last") == 4
    assert bridge.get_token_position(B, "abcb", prepend_bos=False) == 1
    assert bridge.get_token_position("b", torch.tensor([A, B])) == 1
    assert bridge.get_token_position("b", [[A, B]]) == 1
    with pytest.raises(InputError, match=r"not found.*'c'"):
        bridge.get_token_position("c", "ab")
    with pytest.raises(InputError, match="2"):
        bridge.get_token_position("b", torch.tensor([[A, B], [B, C]]))
    with pytest.raises(InputError, match="2 tokens"):
        bridge.get_token_position("ab", "abcb")


def test_nothing_to_tokenize(made: Any) -> None:
    """An empty list is an error, not an empty batch."""
    with pytest.raises(InputError, match="empty list"):
        made("plain").to_tokens([])


# --- positions of padded rows -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "takes"),
    [
        ("gpt2", "causal", True),
        ("llama", "causal", True),
        ("opt", "causal", True),
        ("bert", "masked", True),
        # These count positions from behind the padding index and find padding by its id.
        ("roberta", "causal", False),
        ("roberta", "masked", False),
        ("xlm-roberta", "masked", False),
        ("ibert", "masked", False),
        ("luke", "masked", False),
        ("longformer", "masked", False),
    ],
)
def test_position_ids_of_padded_rows(tiny: Any, name: str, kind: str, takes: bool) -> None:
    """Left padding brings position ids along, except where the model counts from its padding index."""
    model = tiny(name, kind)
    pad = model.config.pad_token_id
    ids = torch.tensor([[PAD, PAD, 20, 21, 22], [30, 31, 32, 33, 34]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ids[0, :2] = PAD if pad is None else pad
    given: list[dict[str, Any]] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(dict(kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        batch = TransformerBridge(model)(ids, attention_mask=mask)
        handle.remove()
        assert ("position_ids" in given[-1]) == takes
        if takes:
            assert given[-1]["position_ids"][0, 2:].tolist() == [0, 1, 2]
            assert given[-1]["position_ids"][1].tolist() == [0, 1, 2, 3, 4]
        if name == "ibert":
            return  # it rounds to steps that depend on the largest value in the batch
        for row, start in ((0, 2), (1, 0)):
            alone = model(ids[row : row + 1, start:]).logits
            torch.testing.assert_close(batch[row : row + 1, start:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "causal"), ("roberta", "masked")])
def test_right_padding_needs_no_positions(tiny: Any, name: str, kind: str) -> None:
    """Padding behind the tokens leaves positions as they are, and none are passed."""
    model = tiny(name, kind)
    given: list[dict[str, Any]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(dict(kwargs)), with_kwargs=True
    )
    ids = torch.tensor([[20, 21, 22, 1, 1], [30, 31, 32, 33, 34]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        TransformerBridge(model)(ids, attention_mask=mask)
    assert "position_ids" not in given[-1]
