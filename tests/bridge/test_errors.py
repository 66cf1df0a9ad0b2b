"""Everything that goes wrong says what was asked, what was found and what to do, and leaves no trace."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import (
    AbsentPointError,
    ArchitectureError,
    GradientError,
    HookNotFiredError,
    HookValueError,
    InputError,
    LayerRangeError,
    LensError,
    SelectionError,
    TransformerBridge,
    UnknownPointError,
)


@pytest.fixture(params=["gpt2", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def fails(
    bridge: Any, model: nn.Module, ids: Tensor, snapshot: Any, is_silent: Any
) -> Callable[..., str]:
    """``fails(error, call, *words)``: the call raises that error, its message has the words, all is as before."""

    def check(error: type[Exception], call: Callable[[], Any], *words: str) -> str:
        before = snapshot(model)
        plain = bridge(ids)
        with pytest.raises(error) as caught:
            call()
        message = str(caught.value)
        assert isinstance(caught.value, LensError)
        for word in words:
            assert word in message, f"{word!r} is not in: {message}"
        assert snapshot(model) == before
        assert is_silent(bridge)
        assert torch.equal(bridge(ids), plain)
        return message

    return check


def zero(x: Tensor, hook: Any) -> Tensor:
    return x * 0


# --- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KeyError, UnknownPointError])
def test_unknown_names(bridge: Any, ids: Tensor, fails: Any, kind: type[Exception]) -> None:
    """A misspelt name, wherever a name is taken: the nearest ones are offered."""
    wrong, right = "blocks.1.hook_resid_psot", "blocks.1.hook_resid_post"
    fails(kind, lambda: bridge.run_with_cache(ids, names_filter=wrong), wrong, right)
    fails(
        kind,
        lambda: bridge.run_with_cache(ids, names_filter=["embed.hook_out", wrong]),
        wrong,
        right,
    )
    fails(
        kind,
        lambda: bridge.run_with_hooks(ids, fwd_hooks=[("embed.hook_out", zero), (wrong, zero)]),
        wrong,
        right,
    )
    fails(kind, lambda: bridge.run_with_hooks(ids, bwd_hooks=[(wrong, zero)]), wrong, right)
    fails(
        kind,
        lambda: bridge.run_with_hooks(ids, fwd_hooks=[(wrong, zero)], reset_hooks_end=False),
        wrong,
    )
    fails(kind, lambda: bridge.hooks(fwd_hooks=[(wrong, zero)]), wrong, right)
    fails(kind, lambda: bridge.add_hook(wrong, zero), wrong, right)
    fails(kind, lambda: bridge.get_hook_point(wrong), wrong, right)
    fails(kind, lambda: bridge.registry[wrong], wrong, right)


def test_layers_that_do_not_exist(bridge: Any, ids: Tensor, fails: Any) -> None:
    """A name in layer 7 of a model with two says which layers there are."""
    fails(
        UnknownPointError, lambda: bridge.get_hook_point("blocks.7.hook_out"), "blocks.7", "0 to 1"
    )
    fails(
        UnknownPointError,
        lambda: bridge.run_with_cache(ids, names_filter="blocks.7.hook_resid_mid"),
        "0 to 1",
    )


def test_filters_that_select_nothing(bridge: Any, ids: Tensor, fails: Any) -> None:
    """A glob, regex or predicate that fits no point is as wrong as a name."""
    fails(
        UnknownPointError,
        lambda: bridge.run_with_cache(ids, names_filter="blocks.*.hook_nose"),
        "hook_nose",
    )
    fails(
        UnknownPointError,
        lambda: bridge.run_with_cache(ids, names_filter=lambda name: False),
        "selects none",
    )
    fails(
        UnknownPointError,
        lambda: bridge.run_with_hooks(ids, fwd_hooks=[(lambda name: False, zero)]),
        "selects none",
    )


@pytest.mark.parametrize(
    ("family", "name", "reason"),
    [
        ("llama", "pos_embed.hook_out", "position embedding"),
        ("llama", "hook_pos_embed", "position embedding"),
        ("llama", "blocks.0.attn.q_norm.hook_out", "q_norm"),
        ("llama", "blocks.1.attn.hook_attn_in", "grouped"),
        ("gpt2", "blocks.0.attn.hook_rot_q", "hook_q"),
        ("gpt2", "rotary_emb.hook_cos", "rotary"),
        ("gpt2", "blocks.1.mlp.gate.hook_out", "not gated"),
        ("gpt_neox", "blocks.0.hook_resid_mid", "parallel"),
        ("phi", "blocks.0.ln2.hook_out", "ln2"),
        ("phi", "blocks.0.hook_resid_mid", "parallel"),
    ],
)
def test_absent_points(bridge: Any, ids: Tensor, fails: Any, name: str, reason: str) -> None:
    """A point that other models have: the message says why this one has not."""
    fails(AbsentPointError, lambda: bridge.get_hook_point(name), name, reason)
    fails(AbsentPointError, lambda: bridge.run_with_cache(ids, names_filter=name), name, reason)
    fails(AbsentPointError, lambda: bridge.run_with_cache(ids, names_filter=[name]), name, reason)
    fails(
        AbsentPointError, lambda: bridge.run_with_hooks(ids, fwd_hooks=[(name, zero)]), name, reason
    )
    assert reason in str(bridge.why(name))
    assert bridge.why("blocks.0.hook_out") is None
    _, cache = bridge.run_with_cache(ids)
    with pytest.raises(AbsentPointError, match=reason):
        cache[name]


@pytest.mark.parametrize("what", [3, 2.5, {"a": 1}.items, object(), ["embed.hook_out", 3]])
def test_filters_of_no_kind(bridge: Any, ids: Tensor, fails: Any, what: Any) -> None:
    """Something that selects nothing by nature says what would."""
    if callable(what):
        with pytest.raises(TypeError):  # not a predicate on names
            bridge.run_with_cache(ids, names_filter=what)
        return
    fails(SelectionError, lambda: bridge.run_with_cache(ids, names_filter=what), "a name", "a list")
    fails(SelectionError, lambda: bridge.run_with_hooks(ids, fwd_hooks=[(what, zero)]), "a name")
    fails(TypeError, lambda: bridge.add_hook(what, zero), "a name")


def test_unhashable_filters(bridge: Any, ids: Tensor, fails: Any) -> None:
    """Filters that cannot be hashed: a list is fine, a dict is no filter."""
    _, cache = bridge.run_with_cache(
        ids, names_filter=["embed.hook_out", ["blocks.0.hook_out"]][:1]
    )
    assert list(cache) == ["embed.hook_out"]
    fails(
        SelectionError,
        lambda: bridge.run_with_cache(ids, names_filter={"embed.hook_out": 1}),
        "dict",
    )
    fails(
        SelectionError,
        lambda: bridge.run_with_cache(ids, names_filter=[{"embed.hook_out": 1}]),
        "dict",
    )
    fails(SelectionError, lambda: bridge.run_with_cache(ids, names_filter=torch.ones(2)), "Tensor")


# --- hooks ------------------------------------------------------------------------------------------------


def wrong_shape(x: Tensor, hook: Any) -> Tensor:
    return x[..., :1]


def wrong_dtype(x: Tensor, hook: Any) -> Tensor:
    return x.double()


def wrong_device(x: Tensor, hook: Any) -> Tensor:
    return x.to("meta")


def wrong_type(x: Tensor, hook: Any) -> Any:
    return (x,)


@pytest.mark.parametrize(
    "point",
    [
        "blocks.0.hook_out",
        "blocks.0.attn.hook_q",
        "blocks.1.attn.hook_pattern",
        "blocks.0.mlp.hook_post",
    ],
)
@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (wrong_shape, ["1]"]),
        (wrong_dtype, ["torch.float64", "torch.float32"]),
        (wrong_device, ["meta", "cpu"]),
        (wrong_type, ["tuple", "None"]),
    ],
)
def test_values_that_do_not_fit(
    bridge: Any, ids: Tensor, fails: Any, point: str, fn: Any, words: list[str]
) -> None:
    """Wrong shape, dtype, device or type: the point, both sides, and the function with its file."""
    name = bridge.registry.canonical(point)
    shape = list(bridge.run_with_cache(ids, names_filter=point)[1][point].shape)
    message = fails(
        HookValueError,
        lambda: bridge.run_with_hooks(ids, fwd_hooks=[(point, fn)]),
        name,
        fn.__name__,
        "test_errors.py",
        *words,
    )
    if fn is not wrong_type:
        assert str(shape) in message


def test_gradients_that_do_not_fit(
    bridge: Any, model: nn.Module, ids: Tensor, is_silent: Any
) -> None:
    """A backward hook's value is checked like a forward hook's."""
    point = "blocks.0.hook_out"
    loss = bridge.run_with_hooks(ids, return_type="loss", bwd_hooks=[(point, wrong_shape)])
    with pytest.raises(HookValueError, match=r"blocks.0.hook_out.*\[2, 9, 1\].*\[2, 9, 64\]"):
        loss.backward()
    model.zero_grad(set_to_none=True)
    assert is_silent(bridge)


def test_backward_hooks_without_gradients(bridge: Any, ids: Tensor, fails: Any) -> None:
    """Under no_grad or inference_mode, and at ids, a backward hook can hear nothing: said at once."""
    hooks = [("blocks.0.hook_out", zero)]
    for mode in (torch.no_grad, torch.inference_mode):

        def run(mode: Any = mode) -> None:
            with mode():
                bridge.run_with_hooks(ids, bwd_hooks=hooks)

        fails(GradientError, run, "blocks.0.hook_out", mode.__name__)
    fails(
        GradientError,
        lambda: bridge.run_with_hooks(ids, bwd_hooks=[("embed.hook_in", zero)]),
        "embed.hook_in",
        "int64",
    )


def test_malformed_hooks(bridge: Any, ids: Tensor, fails: Any) -> None:
    """Pairs that are none, functions that cannot be called."""
    fails(InputError, lambda: bridge.run_with_hooks(ids, fwd_hooks=["blocks.0.hook_out"]), "pair")
    fails(
        InputError,
        lambda: bridge.run_with_hooks(ids, fwd_hooks=[("blocks.0.hook_out", zero, "fwd")]),
        "pair",
    )
    fails(
        InputError,
        lambda: bridge.run_with_hooks(ids, fwd_hooks=[("blocks.0.hook_out", 3)]),
        "callable",
        "blocks.0.hook_out",
    )
    fails(InputError, lambda: bridge.add_hook("blocks.0.hook_out", None), "callable")


def test_hooks_that_never_fired(bridge: Any, model: nn.Module, ids: Tensor, fails: Any) -> None:
    """A hook whose point the run went past is named, with its function; a filter must fire somewhere."""
    residual = bridge(ids, stop_at_layer=1).detach()
    late = {"start_at_layer": 1}
    point = "blocks.0.hook_out"
    fails(
        HookNotFiredError,
        lambda: bridge.run_with_hooks(residual, fwd_hooks=[(point, zero)], **late),
        point,
        "zero",
    )
    fails(
        HookNotFiredError,
        lambda: bridge.run_with_hooks(residual, fwd_hooks=[("blocks.0.**", zero)], **late),
        "blocks.0",
    )
    fails(
        HookNotFiredError,
        lambda: bridge.run_with_cache(residual, names_filter=[point], **late),
        point,
    )
    fails(
        HookNotFiredError,
        lambda: bridge.run_with_cache(residual, names_filter="embed.hook_out", **late),
        "embed",
    )
    embedded = model.get_input_embeddings()(ids)
    fails(
        HookNotFiredError,
        lambda: bridge.run_with_hooks(embedded, fwd_hooks=[("hook_embed", zero)]),
        "embed.hook_out",
    )

    def scope() -> None:
        with bridge.hooks(fwd_hooks=[(point, zero), ("blocks.1.hook_out", zero)]):
            bridge(residual, **late)

    fails(HookNotFiredError, scope, point)
    # A filter that fires somewhere is content, and so is a scope in which nothing ran.
    bridge.run_with_hooks(residual, fwd_hooks=[("blocks.*.hook_out", zero)], **late)
    with bridge.hooks(fwd_hooks=[(point, zero)]):
        pass


def test_an_error_inside_is_not_hidden_by_one_about_firing(bridge: Any, ids: Tensor) -> None:
    """The exception of the block comes out, not a complaint about hooks that had no chance."""
    with (
        pytest.raises(ZeroDivisionError),
        bridge.hooks(
            fwd_hooks=[("blocks.1.hook_out", zero), ("blocks.0.hook_in", lambda x, hook: 1 / 0)]
        ),
    ):
        bridge(ids)


# --- inputs -----------------------------------------------------------------------------------------------


def test_text_without_a_tokenizer(bridge: Any, model: nn.Module, ids: Tensor, fails: Any) -> None:
    """Every way of giving text is refused, with what to do."""
    bare = TransformerBridge(model)
    for call in (
        lambda: bare("hello"),
        lambda: bare(["hello", "world"]),
        lambda: bare.run_with_cache("hello"),
        lambda: bare.to_tokens("hello"),
        lambda: bare.to_string([1, 2]),
        lambda: bare.to_str_tokens("hello"),
        lambda: bare.to_single_token("h"),
        lambda: bare.to_single_str_token(5),
        lambda: bare.get_token_position("h", "hello"),
        lambda: bare.hf_generate("hello"),
        lambda: bare(ids, return_type="predictions"),
    ):
        fails(InputError, call, "tokenizer")
    assert bare.get_token_position(int(ids[0, 3]), ids[0, 3:]) == 0


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], ["empty list"]),
        ((), ["empty list"]),
        (torch.tensor([], dtype=torch.long), ["empty", "0]"]),
        (torch.zeros(2, 0, dtype=torch.long), ["empty", "[2, 0]"]),
        (["hello", 3], ["all text", "all token ids"]),
        ([[1, 2], [3]], ["integers"]),
        (torch.ones(2, 3, 4, dtype=torch.long), ["[2, 3, 4]", "[batch, pos]"]),
        (torch.ones(2, 3), ["d_model"]),
        (torch.ones(2, 3, dtype=torch.bool), ["integers", "bool"]),
        ({"input_ids": 3}, ["integers"]),
        (None, ["nothing to run"]),
    ],
)
def test_inputs_that_are_none(bridge: Any, fails: Any, value: Any, words: list[str]) -> None:
    """Empty, ragged, mixed, of a wrong shape or kind."""
    fails(InputError, lambda: bridge(value), *words)
    fails(InputError, lambda: bridge.run_with_cache(value), *words)


def test_text_with_no_tokens(bridge: Any, fails: Any) -> None:
    """An empty string has BOS; without BOS it has nothing."""
    assert bridge("").shape[1] == 1
    fails(InputError, lambda: bridge("", prepend_bos=False), "no tokens", "prepend_bos")
    fails(InputError, lambda: bridge(["a", ""], prepend_bos=False), "no tokens")


@pytest.mark.parametrize("bad", [160, 4000, -1])
def test_tokens_beyond_the_vocabulary(bridge: Any, ids: Tensor, fails: Any, bad: int) -> None:
    """The id, and the size of the vocabulary."""
    tokens = ids.clone()
    tokens[1, 4] = bad
    words = [str(bad), "160"]
    fails(InputError, lambda: bridge(tokens), *words)
    fails(InputError, lambda: bridge.run_with_cache(tokens), *words)
    fails(InputError, lambda: bridge(input_ids=tokens), *words)
    fails(InputError, lambda: bridge(tokens, stop_at_layer=1), *words)
    fails(InputError, lambda: bridge.hf_generate(tokens, max_new_tokens=2), *words)
    fails(InputError, lambda: bridge.to_single_str_token(bad), *words)


@pytest.mark.parametrize("family", ["gpt2"], indirect=True)
def test_more_tokens_than_positions(bridge: Any, fails: Any) -> None:
    """With learned positions, a longer input cannot run: both lengths are said. Text is cut instead."""
    fails(InputError, lambda: bridge(torch.ones(1, 65, dtype=torch.long)), "65", "64")
    assert bridge("a" * 100).shape[1] == 64


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_an_index_error_of_the_users_own_stays_one(bridge: Any) -> None:
    """A hook's IndexError on a long input is not mistaken for too many tokens."""
    longer = torch.ones(1, 70, dtype=torch.long)
    assert bridge(longer).shape[1] == 70
    with pytest.raises(IndexError, match="mine") as caught:
        bridge.run_with_hooks(longer, fwd_hooks=[("blocks.0.hook_out", lambda x, hook: _raise())])
    assert not isinstance(caught.value, LensError)


def _raise() -> None:
    raise IndexError("mine")


@pytest.mark.parametrize("what", ["stop_at_layer", "start_at_layer"])
def test_layers_out_of_range(bridge: Any, ids: Tensor, fails: Any, what: str) -> None:
    """Beyond either end: the number of layers is said; no other kind of layer is taken."""
    value = bridge(ids, stop_at_layer=0).detach() if what == "start_at_layer" else ids
    for layer in (3, -3, 100):
        fails(
            LayerRangeError,
            lambda layer=layer: bridge(value, **{what: layer}),
            str(layer),
            "2 layers",
            what,
        )
        fails(
            IndexError,
            lambda layer=layer: bridge.run_with_cache(value, **{what: layer}),
            str(layer),
        )
    fails(InputError, lambda: bridge(value, **{what: True}), what, "int")


def test_start_needs_a_stream(bridge: Any, ids: Tensor, fails: Any) -> None:
    """start_at_layer takes the residual stream, of the model's width, and stops no earlier than it starts."""
    fails(InputError, lambda: bridge(ids, start_at_layer=1), "residual stream", "[batch, pos, 64]")
    fails(InputError, lambda: bridge("hello", start_at_layer=1), "residual stream", "str")
    fails(InputError, lambda: bridge(torch.ones(2, 9, 32), start_at_layer=1), "[2, 9, 32]", "64")
    fails(InputError, lambda: bridge(torch.ones(9, 64), start_at_layer=1), "[9, 64]")
    residual = torch.ones(2, 9, 64)
    fails(
        InputError,
        lambda: bridge(residual, start_at_layer=1, stop_at_layer=0),
        "stop_at_layer=0",
        "start_at_layer=1",
    )
    fails(InputError, lambda: bridge(residual, start_at_layer=1, return_type="loss"), "tokens=")


def test_options_that_do_not_exist(bridge: Any, ids: Tensor, fails: Any) -> None:
    """Return types, keywords (misspelt ones too), masks of another shape."""
    fails(InputError, lambda: bridge(ids, return_type="logit"), "logit", "'both'")
    fails(InputError, lambda: bridge(ids, stop_at_later=1), "stop_at_later")
    fails(
        InputError,
        lambda: bridge(ids, output_hidden_sates=True),
        "output_hidden_sates",
        "output_hidden_states",
    )
    fails(
        InputError, lambda: bridge.run_with_cache(ids, name_filter="embed.hook_out"), "name_filter"
    )
    fails(InputError, lambda: bridge(ids, attention_mask=torch.ones(2, 4)), "[2, 4]", "[2, 9]")
    fails(InputError, lambda: bridge(ids, attention_mask=torch.ones(3, 9)), "[3, 9]")
    fails(InputError, lambda: bridge("hello", attention_mask=torch.ones(1, 6)), "mask")
    fails(InputError, lambda: bridge.run_with_cache(ids, "logits", False), "by name")


def test_options_that_need_another(bridge: Any, model: Any, ids: Tensor, fails: Any) -> None:
    """incl_bwd needs the loss, the loss needs tokens, one row has a batch dimension to remove."""
    fails(InputError, lambda: bridge.run_with_cache(ids, incl_bwd=True), "return_type='loss'")
    fails(
        InputError,
        lambda: bridge.run_with_cache(ids, incl_bwd=True, return_type="loss", loss_per_token=True),
        "loss_per_token",
    )
    embedded = model.get_input_embeddings()(ids)
    fails(InputError, lambda: bridge(embedded, return_type="loss"), "tokens=")
    fails(
        InputError,
        lambda: bridge.run_with_cache(ids, remove_batch_dim=True),
        "batch dimension",
        "2",
    )
    fails(InputError, lambda: bridge.run_with_cache(ids, pos_slice=True), "bool")


def test_positions_beyond_the_text(bridge: Any, ids: Tensor, fails: Any) -> None:
    """pos_slice of a position that is not there names it and the length."""
    fails(InputError, lambda: bridge.run_with_cache(ids, pos_slice=9), "9")
    fails(InputError, lambda: bridge.run_with_cache(ids, pos_slice=[0, -10]), "-10")


# --- models -----------------------------------------------------------------------------------------------


def test_what_is_no_model() -> None:
    """A module that Hugging Face did not build."""
    with pytest.raises(ArchitectureError, match=r"Linear.*config"):
        TransformerBridge(nn.Linear(2, 2))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_without_a_head(tiny: Any, family: str, ids: Tensor) -> None:
    """The trunk alone has streams and caches; logits are what it lacks, and it says so."""
    model: Any = tiny(family)
    trunk = model.base_model
    bridge = TransformerBridge(trunk)
    with pytest.raises(AbsentPointError, match="head"):
        bridge.get_hook_point("unembed.hook_out")
    with pytest.raises(InputError, match=r"no logits.*return_type=None"):
        bridge(ids)
    _, cache = bridge.run_with_cache(ids, return_type=None)
    assert torch.equal(
        cache["ln_final.hook_out"],
        bridge.run_with_cache(ids, return_type=None)[1]["ln_final.hook_out"],
    )
    assert torch.equal(
        bridge(ids, stop_at_layer=1), model(ids, output_hidden_states=True).hidden_states[1]
    )


# --- wrong types ------------------------------------------------------------------------------------------

WRONG_TYPES = """
import torch
from lensbridge import InputError, TransformerBridge
bridge = TransformerBridge.boot_native(dict(d_model=16, n_layers=2, n_heads=2, d_vocab=50, n_ctx=16))
ids = torch.ones(1, 4, dtype=torch.long)
residual = torch.ones(1, 4, 16)
zero = lambda x, hook: x * 0
CALLS = [
    (lambda: TransformerBridge("gpt2"), "boot_transformers"),
    (lambda: TransformerBridge(None), "loaded model"),
    (lambda: bridge(ids, stop_at_layer=1.0), "stop_at_layer"),
    (lambda: bridge(residual, start_at_layer="1"), "start_at_layer"),
    (lambda: bridge.add_hook("blocks.0.hook_out", zero, dir="sideways"), "sideways"),
    (lambda: bridge.add_hook("blocks.0.hook_out", "zero"), "callable"),
    (lambda: bridge.to_single_token(3), "int"),
    (lambda: bridge.to_single_str_token("a"), "str"),
    (lambda: bridge.to_tokens(3), "int"),
    (lambda: bridge.run_with_cache(ids, pos_slice="last"), "str"),
]
for call, word in CALLS:
    try:
        call()
    except InputError as error:
        assert word in str(error), str(error)
    else:
        raise AssertionError(word)
assert not bridge.list_hooks()
print("all refused")
"""


def test_wrong_types_without_the_tests_type_checks() -> None:
    """What these tests' run-time checks of annotations would stop first is stopped for users, too, and explained."""
    run = subprocess.run(
        [sys.executable, "-c", WRONG_TYPES], capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == "all refused", run.stderr


def test_standing_hooks_that_never_fire(bridge: Any, ids: Tensor) -> None:
    """A hook set by add_hook that a run does not pass is named; passed again, all is well."""
    residual = bridge(ids, stop_at_layer=1)
    bridge.add_hook("blocks.0.hook_out", lambda x, hook: None)
    bridge.add_hook(lambda name: name.endswith("hook_resid_post"), lambda x, hook: None)
    bridge(ids)
    with pytest.raises(HookNotFiredError, match=r"blocks\.0\.hook_out"):
        bridge(residual, start_at_layer=1)
    assert torch.equal(bridge(ids, stop_at_layer=0), bridge(ids, stop_at_layer=0))
    bridge.reset_hooks()
    assert torch.equal(bridge(residual, start_at_layer=1), bridge(ids))
