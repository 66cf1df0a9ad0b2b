"""Concept gradients: shares, batches, backward passes, what is left behind and what is refused."""

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
    UnknownPointError,
)
from lensbridge.methods import concept_gradients

TEXTS = ["words", "ab", "some, not so long"]
RAW = {"concepts_x_gradients": False, "normalization": False}
CLOSE = 1e-5
N_STATES = 3 * 17 * 64
"""Of TEXTS together, which are more than their concepts: a pass holds as many for each of its targets."""


class Linear:
    """Seven concepts of 64 features, and back."""

    def __init__(self) -> None:
        self.atoms = torch.randn(7, 64, generator=torch.Generator().manual_seed(5))

    def encode(self, rows: Tensor) -> Tensor:
        return rows @ torch.linalg.pinv(self.atoms)

    def decode(self, concepts: Tensor) -> Tensor:
        return concepts @ self.atoms


@pytest.fixture(scope="module")
def bridge(tiny: Callable[..., nn.Module], tokenizer: Any) -> TransformerBridge:
    """A bridge around a GPT-2; no test here changes it."""
    return TransformerBridge(tiny("gpt2"), tokenizer)


@pytest.fixture(scope="module")
def of(bridge: TransformerBridge) -> Callable[..., list[Tensor]]:
    """``of(TEXTS, targets=[0])``: gradients by concepts of `Linear`, neither multiplied nor normalised."""
    splitter = SplitterForGeneration(bridge, 0, batch_size=3)

    def gradients(
        inputs: Any, encode: Any = None, decode: Any = None, **options: Any
    ) -> list[Tensor]:
        linear = Linear()
        given = (encode or linear.encode, decode or linear.decode)
        return splitter.concept_output_gradient(inputs, *given, **{**RAW, **options})

    return gradients


@pytest.fixture(scope="module")
def whole(of: Any) -> list[Tensor]:
    """The gradients of all positions."""
    return of(TEXTS)


# --- shares -------------------------------------------------------------------------------------------------


def test_times_the_concepts(
    of: Any, whole: list[Tensor], bridge: Any, tokenizer: Any, plain: Any
) -> None:
    """concepts_x_gradients multiplies each gradient by the concept of its row, as a plain hook gives it."""
    found = of(TEXTS, concepts_x_gradients=True)
    for product, gradient, text in zip(found, whole, TEXTS, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        states = plain.read(bridge.original_model, ids, "transformer.h.0")["transformer.h.0"][0][0]
        assert plain.gap(product, gradient * Linear().encode(states)) < CLOSE


@pytest.mark.parametrize("times", [True, False])
def test_shares_sum_to_one(of: Any, plain: Any, times: bool) -> None:
    """Normalised, each target's absolute values sum to one, and keep their proportions and signs."""
    shares = of(TEXTS, concepts_x_gradients=times, normalization=True)
    for share, raw in zip(shares, of(TEXTS, concepts_x_gradients=times), strict=True):
        total = raw.abs().sum((1, 2), keepdim=True)
        assert (total > 0).all()
        torch.testing.assert_close(share.abs().sum((1, 2)), torch.ones(len(share)))
        assert plain.gap(share * total, raw) < CLOSE


def test_shares_are_what_is_given_unasked(bridge: Any, of: Any) -> None:
    """Products and normalisation are the defaults."""
    linear, splitter = Linear(), SplitterForGeneration(bridge, 0, batch_size=3)
    found = splitter.concept_output_gradient(TEXTS, linear.encode, linear.decode)
    expected = of(TEXTS, concepts_x_gradients=True, normalization=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("times", [True, False])
@pytest.mark.parametrize("normalizes", [True, False])
def test_a_target_that_nothing_changes(of: Any, times: bool, normalizes: bool) -> None:
    """Before the first rebuilt token all is zero, not NaN; later targets are not touched by that."""
    options = {"concepts_x_gradients": times, "normalization": normalizes}
    (found,) = of(["<bos><bos>ab"], **options)
    assert found.shape == (4, 2, 7)
    assert torch.equal(found[:2], torch.zeros(2, 2, 7))
    assert (found[2:].abs().sum((1, 2)) > 0).all()
    assert found.isfinite().all()


# --- batches and passes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["last", "cls_index"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_batch_is_its_texts(
    of: Any,
    whole: list[Tensor],
    bridge: Any,
    plain: Any,
    kind: str,
    batch_size: int,
    monkeypatch: Any,
) -> None:
    """Whatever runs together, padded on whichever side, each text has its own gradient, in its place."""
    # "last" has padding in front.
    monkeypatch.setattr(bridge.original_model.config, "summary_type", kind)
    for gradient, expected in zip(of(TEXTS, batch_size=batch_size), whole, strict=True):
        assert plain.gap(gradient, expected) < CLOSE


class Passes:
    """How many backward passes there were, and for how many outputs each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of: list[int] = []
        grad = torch.autograd.grad

        def spy(outputs: Any, inputs: Any, *rows: Any, **options: Any) -> Any:
            # Without rows it is the pass through the head, of which there is one.
            self.of += [len(x) if options["is_grads_batched"] else 1 for x in rows]
            return grad(outputs, inputs, *rows, **options)

        monkeypatch.setattr(torch.autograd, "grad", spy)


def test_all_targets_take_one_pass_a_batch(
    of: Any, bridge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run of the model and one backward pass for a batch's targets, however many there are."""
    passes, runs = Passes(monkeypatch), []
    handle = bridge.original_model.lm_head.register_forward_hook(lambda *given: runs.append(1))
    of(TEXTS, batch_size=2)
    handle.remove()
    assert passes.of == [17, 2]
    assert len(runs) == 2


@pytest.mark.parametrize(("at_once", "expected"), [(1, [1] * 17), (N_STATES * 5 + 1, [5, 5, 5, 2])])
def test_targets_in_several_passes(
    of: Any,
    whole: list[Tensor],
    plain: Any,
    at_once: int,
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the targets' gradients do not fit together, they are computed in turn, and are the same."""
    monkeypatch.setattr(concept_gradients, "_AT_ONCE_ON_CPU", at_once)
    passes = Passes(monkeypatch)
    for gradient, every in zip(of(TEXTS), whole, strict=True):
        assert plain.gap(gradient, every) < CLOSE
    assert passes.of == expected


@pytest.mark.parametrize(("n", "expected"), [(1, [1] * 12), (2, [2] * 6), (7, [7, 5]), (12, [12])])
@pytest.mark.parametrize(
    ("said", "encode", "decode", "size"),
    [
        # few concepts: the states that go into the head are more
        (0, lambda x: x[:, :1], lambda c: c.expand(-1, 64), 64),
        # many concepts
        (0, lambda x: x.repeat(1, 4), lambda c: c[:, :64], 256),
        # the logits themselves, behind the head
        ("lm_head", lambda x: x[:, :1], lambda c: c.expand(-1, 160), 160),
    ],
)
def test_how_many_targets_fit_counts_what_there_is_most_of(
    bridge: Any,
    n: int,
    expected: list[int],
    said: Any,
    encode: Any,
    decode: Any,
    size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The backward pass of k targets holds k gradients of concepts, and of what it starts from."""
    monkeypatch.setattr(concept_gradients, "_AT_ONCE_ON_CPU", n * 12 * size)
    passes = Passes(monkeypatch)
    SplitterForGeneration(bridge, said).concept_output_gradient("abcdefabcdef", encode, decode)
    assert passes.of == expected


def test_a_text_without_rows_beside_others(of: Any, whole: list[Tensor], plain: Any) -> None:
    """A text of special tokens alone has targets and no rows."""
    found = of(["words", "<eos>"])
    assert found[1].shape == (1, 0, 7)
    assert plain.gap(found[0], whole[0]) < CLOSE


def test_a_bar_changes_no_value(
    of: Any, whole: list[Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    """tqdm_bar shows batches on stderr."""
    assert capsys.readouterr() == ("", "")
    found = of(TEXTS, tqdm_bar=True)
    assert "1/1" in capsys.readouterr().err
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))


@pytest.mark.parametrize(
    ("text", "targets", "shape"), [("<eos>", None, (1, 0, 7)), ("abc", [[]], (0, 3, 7))]
)
@pytest.mark.parametrize("shares", [True, False])
def test_nothing_to_differentiate(
    of: Any, text: str, targets: Any, shape: tuple[int, ...], shares: bool
) -> None:
    """A batch without rows, or without targets, has empty gradients, as beside other texts."""
    (found,) = of([text], targets=targets, normalization=shares, concepts_x_gradients=shares)
    assert found.shape == shape


def test_gradients_do_not_keep_the_batch(of: Any) -> None:
    """Each text's gradients hold no more memory than their own, however they were asked for."""
    for options in ({}, {"normalization": True}, {"concepts_x_gradients": True}, {"targets": [0]}):
        for found in of(["abcdef", "a", "<eos>"], **options):
            assert found.untyped_storage().nbytes() == found.numel() * 4


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_batches_of_nothing(of: Any, size: Any) -> None:
    """A batch size that is none is refused, as in the constructor."""
    with pytest.raises(InputError, match=f"batch_size is at least 1, got {size}"):
        of(TEXTS, batch_size=size)


def test_inputs_are_those_of_activations(
    of: Any, whole: list[Tensor], tokenizer: Any, plain: Any
) -> None:
    """Ids and what a tokenizer returns are taken too; what is no input is refused."""
    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    for gradient, every in zip(of(encoded), whole, strict=True):
        assert plain.gap(gradient, every) < CLOSE
    assert plain.gap(of(torch.tensor([tokenizer("words")["input_ids"]]))[0], whole[0]) < CLOSE
    with pytest.raises(InputError, match="empty list"):
        of([])


def test_half_precision(tiny: Any, tokenizer: Any, whole: list[Tensor]) -> None:
    """Concepts of a bfloat16 model are made in float32; their gradients are float32, near the true ones."""
    splitter = SplitterForGeneration(tiny("gpt2").bfloat16(), 0, tokenizer=tokenizer, batch_size=3)
    given, linear = [], Linear()

    def encode(rows: Tensor) -> Tensor:
        given.append(rows.dtype)
        return linear.encode(rows)

    found = splitter.concept_output_gradient(TEXTS, encode, linear.decode, **RAW)
    assert given == [torch.float32]
    for gradient, every in zip(found, whole, strict=True):
        assert gradient.dtype == torch.float32
        # Eight bits of mantissa, through two layers; the likeliest token may be another where two are close.
        assert torch.cosine_similarity(gradient.flatten(), every.flatten(), 0) > 0.9


# --- nothing is left behind ---------------------------------------------------------------------------------


class Sae(nn.Module):
    """A sparse autoencoder with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 12)
        self.down = nn.Linear(12, 64)

    @staticmethod
    def fixed(rows: Tensor) -> Tensor:
        """A linear map that has a graph of its own."""
        return nn.Linear(64, 64)(rows)

    def encode(self, rows: Tensor) -> Tensor:
        return self.up(rows).relu()

    def decode(self, concepts: Tensor) -> Tensor:
        return self.down(concepts)


@pytest.mark.parametrize("fails", [False, True])
def test_parameters_are_left_alone(
    tiny: Any, tokenizer: Any, snapshot: Any, is_silent: Any, fails: bool
) -> None:
    """No .grad on any, requires_grad as it was, also after an error; the same for hooks and modes."""
    model, sae = tiny("gpt2"), Sae()
    model.transformer.wte.weight.requires_grad_(False)
    splitter = SplitterForGeneration(model, 0, tokenizer=tokenizer, batch_size=3)
    before = snapshot(model)

    def decode(concepts: Tensor) -> Tensor:
        assert not any(p.requires_grad for p in model.parameters())
        if fails:
            raise ZeroDivisionError
        return sae.decode(concepts)

    if fails:
        with pytest.raises(ZeroDivisionError):
            splitter.concept_output_gradient(TEXTS, sae.encode, decode)
    else:
        splitter.concept_output_gradient(TEXTS, sae.encode, decode)
    assert snapshot(model) == before
    assert is_silent(splitter.bridge)
    assert not model.transformer.wte.weight.requires_grad
    assert model.transformer.h[0].ln_1.weight.requires_grad
    assert all(p.grad is None for p in [*model.parameters(), *sae.parameters()])
    assert all(p.requires_grad for p in sae.parameters())


def test_a_gradient_that_was_there_stays(tiny: Any, tokenizer: Any) -> None:
    """What a training step has accumulated is neither added to nor taken away."""
    model = tiny("gpt2")
    model(torch.tensor([[9, 10, 11]])).logits.sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    splitter = SplitterForGeneration(model, 0, tokenizer=tokenizer)
    splitter.concept_output_gradient(TEXTS, torch.clone, torch.clone)
    assert all(
        torch.equal(p.grad, kept) for p, kept in zip(model.parameters(), before, strict=True)
    )


def test_modes_around_it(of: Any, whole: list[Tensor]) -> None:
    """It works under no_grad, leaves that on, and its results have no graph."""
    with torch.no_grad():
        found = of(TEXTS)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
    assert not any(x.requires_grad or x.grad_fn for x in of(TEXTS, concepts_x_gradients=True))


def test_under_inference_mode(of: Any, whole: list[Tensor]) -> None:
    """It works there too, padded and all; what was made there cannot be differentiated, and is refused."""
    linear = Linear()
    with torch.inference_mode():
        found = of(TEXTS, linear.encode, linear.decode)
        assert torch.is_inference_mode_enabled()
        weights = torch.randn(64, 64)
        with pytest.raises(GradientError, match=r"decode .*inference_mode"):
            of(TEXTS, torch.clone, lambda c: c @ weights)
        with pytest.raises(RuntimeError, match="oh"):
            of(TEXTS, torch.clone, fails)
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
    assert not any(x.is_inference() for x in found)


def fails(concepts: Tensor) -> Tensor:
    """A decode with an error of its own."""
    raise RuntimeError("oh")


def test_a_model_made_under_inference_mode(tiny: Any, tokenizer: Any) -> None:
    """It has activations, and nothing can be differentiated through it: an error that says so."""
    with torch.inference_mode():
        splitter = SplitterForGeneration(tiny("gpt2"), 0, tokenizer=tokenizer)
    assert splitter.get_activations("abc")[0].shape == (3, 64)
    with pytest.raises(GradientError, match=r"made under torch\.inference_mode"):
        splitter.concept_output_gradient("abc", torch.clone, torch.clone)


def test_a_model_that_writes_into_its_state(tiny: Any, tokenizer: Any, plain: Any) -> None:
    """RWKV keeps its state by writing into it, which no graph bears; where it need not, there is one."""
    model, path = tiny("rwkv"), "rwkv.blocks.0"
    splitter = SplitterForGeneration(model, 0, tokenizer=tokenizer, batch_size=2)
    found = splitter.concept_output_gradient(["abc", "abcde"], torch.clone, torch.clone, **RAW)
    for gradient, text in zip(found, ["abc", "abcde"], strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        leaf = plain.read(model, ids, path)[path][0].requires_grad_()
        given = {"input_ids": ids, "use_cache": False}
        with plain.watching(model, path, lambda value, count, leaf=leaf: leaf * 1):
            best = model(**given).logits[0].max(-1).values
        by_hand = [torch.autograd.grad(x, leaf, retain_graph=True)[0][0] for x in best]
        assert plain.gap(gradient, torch.stack(by_hand)) < CLOSE


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("said", [0, "blocks.0.mlp.hook_out"])
def test_checkpointed_layers(tiny: Any, tokenizer: Any, said: Any, plain: Any) -> None:
    """Layers that are computed again in the backward pass are rebuilt there too."""
    model = tiny("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    splitter = SplitterForGeneration(model, said, tokenizer=tokenizer)
    calls: list[int] = []

    def encode(rows: Tensor) -> Tensor:
        calls.append(1)
        return rows / 2

    (expected,) = splitter.concept_output_gradient("words", encode, lambda c: 2 * c, **RAW)
    model.train().gradient_checkpointing_enable()
    (found,) = splitter.concept_output_gradient("words", encode, lambda c: 2 * c, **RAW)
    assert model.training
    assert len(calls) == 2
    assert plain.gap(found, expected) < CLOSE


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encode", "decode", "error", "message"),
    [
        (lambda a: a[:-1], None, InputError, r"encode gave \[23, 64\] for 24 rows"),
        (lambda a: a[:, 0], None, InputError, r"encode gave \[24\] for 24 rows"),
        (lambda a: a[None], None, InputError, r"encode gave \[1, 24, 64\]"),
        (lambda a: (a, a), None, InputError, "encode gave .*tuple"),
        (torch.clone, lambda c: c[:-1], InputError, r"decode gave \[23, 64\].* \[24, 64\]"),
        (torch.clone, lambda c: c[:, :9], InputError, r"decode gave \[24, 9\]"),
        (torch.clone, lambda c: c.detach(), GradientError, "decode is not differentiable"),
        (torch.clone, lambda c: c.sign().detach(), GradientError, "decode is not differentiable"),
        (
            torch.clone,
            lambda c: Sae.fixed(c.detach()),
            GradientError,
            "decode is not differentiable",
        ),
        (torch.clone, lambda c: (c,), InputError, r"decode gave tuple; .* \[24, 64\]"),
        (torch.clone, lambda c: None, InputError, "decode gave NoneType"),
        (lambda a: a.long(), None, InputError, r"encode gave torch.int64 \[24, 64\].*floats"),
        (lambda a: None, None, InputError, "encode gave NoneType"),
    ],
    ids=range(13),
)
def test_what_is_no_dictionary(of: Any, encode: Any, decode: Any, error: Any, message: str) -> None:
    """Concepts that are not one row a row, rows that do not fit, a decode without a slope."""
    with pytest.raises(error, match=message):
        of(TEXTS, encode, decode)


def test_one_row_a_text_cannot_be_put_back(of: Any) -> None:
    """SAMPLE is refused; so is a granularity that the texts do not give."""
    with pytest.raises(InputError, match="SAMPLE"):
        of(TEXTS, activation_granularity=Granularity.SAMPLE)
    with pytest.raises(InputError, match="CLS_TOKEN"):
        of(TEXTS, activation_granularity=Granularity.CLS_TOKEN)


def test_which_of_several_places(bridge: Any, whole: list[Tensor], plain: Any) -> None:
    """Where there are several split points one has to be named, as it was given."""
    linear, split = (
        Linear(),
        ModelWithSplitPoints(bridge, None, [0, "blocks.1.hook_out"], batch_size=3),
    )
    with pytest.raises(InputError, match=r"which split point: 0, blocks\.1\.hook_out"):
        split.concept_output_gradient(TEXTS, linear.encode, linear.decode)
    for other in (1, "blocks.0.hook_out"):
        with pytest.raises(UnknownPointError, match="none of the split points"):
            split.concept_output_gradient(TEXTS, linear.encode, linear.decode, split_point=other)
    for said, is_first in ((0, True), ("0", True), ("blocks.1.hook_out", False)):
        found = split.concept_output_gradient(
            TEXTS, linear.encode, linear.decode, None, said, **RAW
        )
        assert (plain.gap(found[0], whole[0]) < CLOSE) == is_first


def test_a_model_without_logits(tiny: Any, tokenizer: Any) -> None:
    """A model without a head has nothing to differentiate, and says so."""
    split = ModelWithSplitPoints(tiny("bert", "textenc"), tokenizer, 0)
    with pytest.raises(InputError, match="no logits"):
        split.concept_output_gradient(TEXTS, torch.clone, torch.clone)


def test_a_place_that_has_no_gradient(tiny: Any, tokenizer: Any) -> None:
    """Choices are whole numbers, and some models run layers without gradients: refused, each for its reason."""
    split = ModelWithSplitPoints(tiny("mixtral"), tokenizer, "blocks.0.mlp.router.hook_experts")
    assert split.get_activations("abc")[0].shape == (3, 2)
    with pytest.raises(InputError, match=r"int64.*only floats"):
        split.concept_output_gradient("abc", torch.clone, torch.clone)
    split = ModelWithSplitPoints(tiny("hrm_text"), tokenizer, 0)
    with pytest.raises(GradientError, match="without gradients"):
        split.concept_output_gradient("abc", torch.clone, torch.clone)


class Ahead(nn.Linear):
    """A head that has nothing to say of the first position."""

    def forward(self, states: Tensor) -> Tensor:
        return super().forward(states[:, 1:])


def test_logits_that_are_no_positions(tiny: Any, tokenizer: Any) -> None:
    """Outputs that belong to no token of the text are refused with their shape."""
    model = tiny("gpt2", tie_word_embeddings=False)
    model.lm_head = Ahead(64, 160)
    split = ModelWithSplitPoints(model, tokenizer, 0)
    with pytest.raises(InputError, match=r"logits have shape \[1, 2, 160\].* 1 x 3 tokens"):
        split.concept_output_gradient("abc", torch.clone, torch.clone)
