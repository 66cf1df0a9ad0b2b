"""Runs: what goes in, what comes out, where a run starts and stops, what is kept, and which hooks are heard."""

from __future__ import annotations

import re
import string
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

FLOAT = 1e-5
"""Relative float32 error of the same sums in another order (rows of another length, another kernel)."""

LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]])
SOME = ["gpt2", "llama", "gpt_neox"]
"""Learned positions with one joint projection, rotary with grouped heads, parallel blocks."""


def real_positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.fixture
def texts(tokenizer: Any) -> list[str]:
    return ["hello", "a longer text"]


def encoded(text: str) -> list[int]:
    """BOS, then one id a character."""
    return [1, *(4 + string.printable.index(char) for char in text)]


# --- what goes in -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SOME, indirect=True)
class TestInputs:
    def test_ids(self, bridge: Any, model: nn.Module, ids: Tensor) -> None:
        """[batch, pos], [pos], nested lists, int32, by position or as input_ids: the model's logits."""
        expected = model(ids).logits
        assert torch.equal(bridge(ids), expected)
        assert torch.equal(bridge(ids.tolist()), expected)
        assert torch.equal(bridge(ids.int()), expected)
        assert torch.equal(bridge(input=ids), expected)
        assert torch.equal(bridge(input_ids=ids), expected)
        row = model(ids[:1]).logits
        assert torch.equal(bridge(ids[0]), row)
        assert torch.equal(bridge(ids[0].tolist()), row)

    def test_text(self, bridge: Any, model: nn.Module) -> None:
        """A string is its characters behind BOS; prepend_bos=False leaves BOS away."""
        assert torch.equal(bridge("hello"), model(torch.tensor([encoded("hello")])).logits)
        bare = torch.tensor([encoded("hello")[1:]])
        assert torch.equal(bridge("hello", prepend_bos=False), model(bare).logits)
        pair = torch.tensor([encoded("hello"), encoded("world")])
        assert torch.equal(bridge(["hello", "world"]), model(pair).logits)
        assert torch.equal(bridge(("hello", "world")), model(pair).logits)

    def test_embeddings(self, bridge: Any, model: Any, ids: Tensor) -> None:
        """[batch, pos, d_model] goes in where the embedding comes out; the embedding does not fire."""
        embedded = model.get_input_embeddings()(ids).detach()
        assert torch.equal(bridge(embedded), model(inputs_embeds=embedded).logits)
        assert torch.equal(bridge(inputs_embeds=embedded), model(ids).logits)
        _, cache = bridge.run_with_cache(embedded)
        assert "hook_embed" not in cache
        assert "blocks.0.hook_in" in cache

    def test_one_token_and_one_row(
        self, bridge: Any, model: nn.Module, byhand: Any, ids: Tensor
    ) -> None:
        """A single token, a single row, with and without a mask, with every point listened to."""
        for cut in (ids[:1, :1], ids[:, :1], ids[:1]):
            expected = model(cut).logits
            for mask in (None, torch.ones_like(cut)):
                logits, cache = bridge.run_with_cache(
                    cut, names_filter=lambda name: True, attention_mask=mask
                )
                assert byhand.gap(logits, expected) < FLOAT
                shape = (len(cut), bridge.cfg.n_heads, cut.shape[1], cut.shape[1])
                assert cache["pattern", 0].shape == cache["attn_scores", 0].shape == shape

    def test_grad_mode_is_the_callers(self, bridge: Any, ids: Tensor) -> None:
        """Runs build a graph unless the caller says not; caches work in inference mode."""
        assert bridge(ids).requires_grad
        with torch.no_grad():
            assert not bridge(ids).requires_grad
        with torch.inference_mode():
            logits, cache = bridge.run_with_cache(ids)
            edited = bridge.run_with_hooks(
                ids, fwd_hooks=[("blocks.0.hook_out", lambda x, hook: x * 0)]
            )
        assert logits.is_inference()
        assert len(cache) > 40
        assert not torch.equal(edited, logits)


# --- what comes out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SOME, indirect=True)
class TestReturns:
    def test_loss(self, bridge: Any, model: nn.Module, ids: Tensor) -> None:
        """The mean, over positions, of minus the log-probability of the next token."""
        logprobs = model(ids).logits.log_softmax(-1)
        each = torch.stack(
            [
                torch.stack([-logprobs[row, pos, ids[row, pos + 1]] for pos in range(8)])
                for row in range(2)
            ]
        )
        torch.testing.assert_close(bridge(ids, return_type="loss"), each.mean())
        torch.testing.assert_close(bridge(ids, return_type="loss", loss_per_token=True), each)
        logits, loss = bridge(ids, return_type="both")
        assert torch.equal(logits, model(ids).logits)
        torch.testing.assert_close(loss, each.mean())
        torch.testing.assert_close(bridge(ids, "loss"), each.mean())
        torch.testing.assert_close(loss, model(ids, labels=ids).loss)

    @pytest.mark.parametrize("mask", [LEFT, LEFT.flip(1)], ids=["left", "right"])
    def test_loss_of_a_padded_batch(
        self, bridge: Any, model: nn.Module, ids: Tensor, mask: Tensor
    ) -> None:
        """Only predictions from a real token of a real token count; the others are zero per token."""
        logprobs = model(
            ids, attention_mask=mask, position_ids=real_positions(mask)
        ).logits.log_softmax(-1)
        each = torch.zeros(2, 8)
        count = 0
        for row in range(2):
            for pos in range(8):
                if mask[row, pos] and mask[row, pos + 1]:
                    each[row, pos] = -logprobs[row, pos, ids[row, pos + 1]]
                    count += 1
        assert count == 13
        given = {"attention_mask": mask}
        if mask[0, 0]:
            given["position_ids"] = real_positions(mask)
        torch.testing.assert_close(bridge(ids, return_type="loss", **given), each.sum() / count)
        torch.testing.assert_close(
            bridge(ids, return_type="loss", loss_per_token=True, **given), each
        )

    def test_loss_of_texts(self, bridge: Any, texts: list[str]) -> None:
        """Texts of unequal length: the loss of the tokens of both, each text on its own."""
        each = [bridge(text, return_type="loss", loss_per_token=True).flatten() for text in texts]
        for side in ("left", "right"):
            loss = bridge(texts, return_type="loss", padding_side=side)
            torch.testing.assert_close(loss, torch.cat(each).mean(), rtol=1e-5, atol=1e-6)

    def test_loss_from_embeddings_needs_tokens(self, bridge: Any, model: Any, ids: Tensor) -> None:
        """tokens= says what the embeddings stood for."""
        embedded = model.get_input_embeddings()(ids).detach()
        loss = bridge(embedded, return_type="loss", tokens=ids)
        torch.testing.assert_close(loss, bridge(ids, return_type="loss"))

    def test_none_and_predictions(self, bridge: Any, model: nn.Module, texts: list[str]) -> None:
        """None returns nothing; predictions is the likeliest next token of each row, at its last real token."""
        assert bridge("hello", return_type=None) is None
        single = []
        for text in texts:
            best = model(torch.tensor([encoded(text)])).logits[0, -1].argmax()
            single.append(bridge.to_string(best[None]))
            assert bridge(text, return_type="predictions") == single[-1]
        for side in ("left", "right"):
            assert bridge(texts, return_type="predictions", padding_side=side) == single

    def test_hugging_face_keywords(self, bridge: Any, model: Any, ids: Tensor) -> None:
        """Keywords of the forward go through and mean what they mean there."""
        assert torch.equal(bridge(ids, use_cache=False), model(ids).logits)
        assert torch.equal(bridge(ids, output_hidden_states=True), model(ids).logits)
        kept = bridge(ids, logits_to_keep=2)
        assert torch.equal(kept, model(ids, logits_to_keep=2).logits)
        assert kept.shape[1] == 2
        assert torch.equal(bridge(ids, return_dict=False), model(ids).logits)
        positions = torch.arange(3, 12)[None].expand(2, -1)
        assert torch.equal(
            bridge(ids, position_ids=positions), model(ids, position_ids=positions).logits
        )


# --- stopping and starting --------------------------------------------------------------------------------


def deep(fresh: Callable[..., Any], family: str) -> Any:
    """Three layers, so that there is a middle one."""
    if family == "qwen3_wide_head":
        return fresh(family, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    more = {"layer_types": ["full_attention"] * 3} if family.startswith("qwen") else {}
    return fresh(family, num_hidden_layers=3, **more)


def test_stop_at_every_layer(fresh: Any, family: str, ids: Tensor) -> None:
    """stop_at_layer=k is hidden state k bit for bit, for every k and its negative; nothing after it runs."""
    bridge = deep(fresh, family)
    expected = bridge.run_with_cache(ids, names_filter=["blocks.*.hook_in", "blocks.2.hook_out"])[1]
    hidden = bridge.original_model(ids, output_hidden_states=True).hidden_states
    assert bridge.cfg.n_layers == 3
    ran: list[str] = []
    everything = [(lambda name: True, lambda x, hook: ran.append(hook.name))]
    for layer in range(4):
        ran.clear()
        residual = bridge.run_with_hooks(ids, fwd_hooks=everything, stop_at_layer=layer)
        name = "blocks.2.hook_out" if layer == 3 else f"blocks.{layer}.hook_in"
        if layer < 3:
            assert torch.equal(bridge(ids, stop_at_layer=layer), hidden[layer])
        assert torch.equal(bridge(ids, stop_at_layer=layer), expected[name])
        assert residual.shape == hidden[0].shape
        late = [f"blocks.{later}." for later in range(layer, 3)] + ["ln_final", "unembed"]
        assert not [n for n in ran if n.startswith(tuple(late))]
        reached = {
            n for n in bridge.registry if n.startswith(tuple(f"blocks.{i}." for i in range(layer)))
        }
        assert reached <= set(ran)
    for negative in (-1, -2, -3):
        assert torch.equal(bridge(ids, stop_at_layer=negative), hidden[3 + negative])


def test_stopped_cache(fresh: Any, family: str, ids: Tensor) -> None:
    """A stopped run returns the stream and caches what ran, with edits on the way taken into account."""
    bridge = deep(fresh, family)
    residual, cache = bridge.run_with_cache(ids, stop_at_layer=2)
    assert torch.equal(residual, cache["resid_post", 1])
    assert not [name for name in cache if name.startswith(("blocks.2", "ln_final", "unembed"))]
    zero = [("blocks.1.hook_out", lambda x, hook: x * 0)]
    assert not bridge.run_with_hooks(ids, fwd_hooks=zero, stop_at_layer=2).any()
    last = [("blocks.2.hook_out", lambda x, hook: x * 0)]
    assert not bridge.run_with_hooks(ids, fwd_hooks=last, stop_at_layer=3).any()
    # The hook is on a point the run was told not to reach: that is no error.
    out = bridge.run_with_hooks(ids, fwd_hooks=last, stop_at_layer=2)
    assert out.any()


@pytest.mark.parametrize("mask", [None, LEFT, LEFT.flip(1)], ids=["full", "left", "right"])
def test_start_at_every_layer(fresh: Any, family: str, ids: Tensor, mask: Tensor | None) -> None:
    """From the residual stream entering layer k, the rest of the run is the full run, bit for bit."""
    bridge = deep(fresh, family)
    given = {} if mask is None else {"attention_mask": mask}
    names = ["blocks.*.hook_in", "blocks.2.hook_out", "ln_final.hook_out"]
    full, cache = bridge.run_with_cache(ids, names_filter=names, **given)
    for layer in range(4):
        residual = cache[f"blocks.{layer}.hook_in"] if layer < 3 else cache["blocks.2.hook_out"]
        kept = residual.clone()
        assert torch.equal(bridge(residual, start_at_layer=layer, **given), full), layer
        assert torch.equal(residual, kept)
        for stop in range(layer, 4):
            target = cache[f"blocks.{stop}.hook_in"] if stop < 3 else cache["blocks.2.hook_out"]
            out = bridge(residual, start_at_layer=layer, stop_at_layer=stop, **given)
            assert torch.equal(out, target), (layer, stop)
    assert torch.equal(bridge(cache["blocks.2.hook_in"], start_at_layer=-1, **given), full)
    assert torch.equal(bridge(cache["blocks.1.hook_in"], start_at_layer=-2, **given), full)


def test_skipped_layers_fire_nothing(fresh: Any, family: str, ids: Tensor) -> None:
    """Started at layer 2: no point of layers 0 and 1 fires, each of the rest once, and caches hold the same."""
    bridge = deep(fresh, family)
    _, full = bridge.run_with_cache(ids)
    residual = full["resid_pre", 2]
    fired: list[str] = []
    bridge.run_with_hooks(
        residual,
        start_at_layer=2,
        fwd_hooks=[(lambda name: True, lambda x, hook: fired.append(hook.name))],
    )
    assert not [name for name in fired if name.startswith(("blocks.0.", "blocks.1."))]
    later = [
        name for name in bridge.registry if name.startswith(("blocks.2.", "ln_final", "unembed"))
    ]
    assert sorted(name for name in fired if name in later) == sorted(later)
    assert len(fired) == len(set(fired))
    _, cache = bridge.run_with_cache(residual, start_at_layer=2)
    assert not [name for name in cache if name.startswith(("blocks.0.", "blocks.1."))]
    for name in cache:
        if name.startswith(("blocks.2.", "ln_final", "unembed")):
            assert torch.equal(cache[name], full[name]), name


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_first_late_start_disturbs_no_hook(fresh: Any, family: str, ids: Tensor) -> None:
    """Whatever the bridge must find out for its first late start, the user's hooks and caches see none of it."""
    residual = fresh(family)(ids, stop_at_layer=1)
    bridge = fresh(family)
    shapes: list[Any] = []
    bridge.run_with_hooks(
        residual,
        start_at_layer=1,
        fwd_hooks=[("blocks.1.hook_in", lambda x, hook: shapes.append(tuple(x.shape)))],
    )
    assert shapes == [(2, 9, 64)]
    bridge = fresh(family)
    _, cache = bridge.run_with_cache(
        residual, start_at_layer=1, names_filter=lambda name: name.startswith("blocks")
    )
    assert not [name for name in cache if name.startswith("blocks.0")]


@pytest.mark.parametrize("family", SOME, indirect=True)
def test_gradient_flows_to_the_residual(bridge: Any, byhand: Any, ids: Tensor) -> None:
    """The gradient at the given stream is the gradient at that place of the full run."""
    _, cache = bridge.run_with_cache(
        ids,
        return_type="loss",
        incl_bwd=True,
        names_filter=["blocks.0.hook_in", "blocks.1.hook_in"],
    )
    for layer in range(2):
        residual = cache["resid_pre", layer].clone().requires_grad_()
        loss = bridge(residual, start_at_layer=layer, return_type="loss", tokens=ids)
        (grad,) = torch.autograd.grad(loss, residual)
        assert byhand.gap(grad, cache[f"blocks.{layer}.hook_in_grad"]) < FLOAT


@pytest.mark.parametrize("family", SOME, indirect=True)
def test_late_start_with_edits(bridge: Any, hand: Any, ids: Tensor) -> None:
    """Hooks behind the start act as in a full run."""
    edit = [("blocks.1.attn.hook_z", lambda x, hook: x.roll(1, 1))]
    residual = bridge(ids, stop_at_layer=1)
    logits = bridge.run_with_hooks(residual, start_at_layer=1, fwd_hooks=edit)
    with hand.editing("blocks.1.attn.o.hook_in", lambda x: x.roll(1, 1)):
        assert torch.equal(logits, hand.logits(ids))
    first = [("blocks.0.hook_in", lambda x, hook: x * 2)]
    embedded = bridge(ids, stop_at_layer=0)
    doubled = bridge.run_with_hooks(embedded, start_at_layer=0, fwd_hooks=first)
    assert torch.equal(doubled, bridge(embedded * 2, start_at_layer=0))


# --- padding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_unequal_texts_are_each_text_alone(
    bridge: Any, byhand: Any, texts: list[str], side: str
) -> None:
    """Row by row, at real tokens, every point of a padded batch is that of the text on its own."""
    # A sliding window cuts its masks anew for each length: the same values all the same.
    with torch.no_grad():
        logits, batch = bridge.run_with_cache(
            texts, padding_side=side, names_filter=lambda name: True
        )
        lengths = [len(encoded(text)) for text in texts]
        assert lengths[0] < lengths[1]
        wrong = {}
        for row, text in enumerate(texts):
            alone, single = bridge.run_with_cache(text, names_filter=lambda name: True)
            real = slice(-lengths[row], None) if side == "left" else slice(0, lengths[row])
            assert byhand.gap(logits[row, real], alone[0]) < FLOAT
            for name, point in bridge.registry.items():
                one, other = batch[name], single[name]
                one = one[row if len(one) > 1 else 0]
                if point.axes.endswith("query key"):
                    one, other = one[:, real, real], other[0]
                elif len(batch[name]) == 1 and side == "right":
                    one, other = one[real], other[0]  # positions that all rows share
                else:
                    one, other = one[real], other[0]
                gap = byhand.gap(one.clamp(min=-1e30), other.clamp(min=-1e30))
                if gap > FLOAT:
                    wrong[f"{name} of row {row}"] = gap
        assert not wrong


@pytest.mark.parametrize("family", SOME, indirect=True)
class TestPadding:
    def test_mask_brings_positions(self, bridge: Any, model: nn.Module, ids: Tensor) -> None:
        """A mask with padding in front: positions count real tokens, without being asked."""
        expected = model(ids, attention_mask=LEFT, position_ids=real_positions(LEFT)).logits
        assert torch.equal(bridge(ids, attention_mask=LEFT), expected)
        assert torch.equal(bridge(ids, attention_mask=LEFT.bool()), expected)
        assert torch.equal(bridge(ids, attention_mask=LEFT.tolist()), expected)
        if bridge.cfg.positional_embedding_type == "standard":  # rotary positions are relative
            bare = model(ids, attention_mask=LEFT).logits
            assert not torch.equal(bare[0, 3:], expected[0, 3:])

    def test_row_of_a_left_padded_batch_is_the_row_alone(
        self, bridge: Any, byhand: Any, ids: Tensor
    ) -> None:
        """The padded row's real tokens get the logits they get alone."""
        logits = bridge(ids, attention_mask=LEFT)
        assert byhand.gap(logits[0, 3:], bridge(ids[:1, 3:])[0]) < FLOAT
        assert byhand.gap(logits[1], bridge(ids[1:])[0]) < FLOAT

    def test_explicit_positions_win(self, bridge: Any, model: nn.Module, ids: Tensor) -> None:
        """The caller's position_ids are used as they are."""
        positions = torch.arange(9).flip(0)[None].expand(2, -1)
        expected = model(ids, attention_mask=LEFT, position_ids=positions).logits
        assert torch.equal(bridge(ids, attention_mask=LEFT, position_ids=positions), expected)

    def test_right_padding_and_full_masks_add_nothing(
        self, bridge: Any, model: nn.Module, ids: Tensor
    ) -> None:
        """A mask without padding in front changes no position; a full one changes nothing."""
        right = LEFT.flip(1)
        assert torch.equal(
            bridge(ids, attention_mask=right), model(ids, attention_mask=right).logits
        )
        full = torch.ones_like(ids)
        assert torch.equal(bridge(ids, attention_mask=full), model(ids, attention_mask=full).logits)

    def test_embeddings_with_a_mask(self, bridge: Any, model: Any, ids: Tensor) -> None:
        """Masks do for embeddings what they do for ids."""
        embedded = model.get_input_embeddings()(ids).detach()
        assert torch.equal(bridge(embedded, attention_mask=LEFT), bridge(ids, attention_mask=LEFT))


# --- run_with_cache ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SOME, indirect=True)
class TestCacheOptions:
    def test_filters(self, bridge: Any, ids: Tensor) -> None:
        """A name, an alias, a glob, a regex, a predicate on either kind of name, lists of these, nothing."""
        out = [f"blocks.{i}.hook_out" for i in range(2)]
        pattern = [f"blocks.{i}.attn.hook_pattern" for i in range(2)]
        cases: list[tuple[Any, list[str]]] = [
            ("blocks.1.hook_out", out[1:]),
            ("blocks.1.hook_resid_post", out[1:]),
            ("blocks.*.hook_out", out),
            ("blocks.*.hook_resid_post", out),
            ("blocks.[!0].hook_out", out[1:]),
            ("**.hook_pattern", pattern),
            (re.compile(r"hook_pattern$"), pattern),
            (lambda name: name.endswith("hook_pattern"), pattern),
            (lambda name: name.endswith("resid_post"), out),
            (["blocks.1.hook_out", "blocks.0.hook_resid_post"], out),
            (
                ("blocks.*.hook_out", re.compile("pattern$")),
                [pattern[0], out[0], pattern[1], out[1]],
            ),
            ({"blocks.0.hook_out"}, out[:1]),
            ([], []),
        ]
        for names_filter, expected in cases:
            logits, cache = bridge.run_with_cache(ids, names_filter=names_filter)
            assert list(cache) == expected, names_filter
            assert logits.shape == (2, 9, 160)

    def test_order_is_execution_order(self, bridge: Any, ids: Tensor) -> None:
        """Keys come in the order in which the points fire; the stream's points in the order of the layers."""
        fired: list[str] = []
        bridge.run_with_hooks(
            ids, fwd_hooks=[(lambda name: True, lambda x, hook: fired.append(hook.name))]
        )
        _, cache = bridge.run_with_cache(ids, names_filter=lambda name: True)
        # Inputs of leaf modules may be recorded right after the module, all else in the order of the run.
        stream = [name for name in fired if name.endswith("hook_out") or "attn.hook" in name]
        assert [name for name in cache if name in stream] == stream
        assert next(iter(cache)) in ("embed.hook_in", "embed.hook_out")
        assert list(cache)[-1] == "unembed.hook_out"

    def test_device(self, bridge: Any, ids: Tensor) -> None:
        """device= says where the cache is kept; the run stays where it is."""
        logits, cache = bridge.run_with_cache(ids, device="meta")
        assert logits.device.type == "cpu"
        assert {value.device.type for value in cache.values()} == {"meta"}
        _, kept = bridge.run_with_cache(ids, device="cpu")
        _, plain = bridge.run_with_cache(ids)
        assert all(torch.equal(kept[name], plain[name]) for name in plain)

    def test_remove_batch_dim(self, bridge: Any, ids: Tensor) -> None:
        """One row: every tensor loses its first dimension."""
        _, plain = bridge.run_with_cache(ids[:1])
        _, cache = bridge.run_with_cache(ids[:1], remove_batch_dim=True)
        assert all(torch.equal(cache[name], plain[name][0]) for name in plain)
        assert not cache.has_batch_dim

    @pytest.mark.parametrize(
        ("given", "index"),
        [
            (-1, -1),
            (3, 3),
            ((1, 5), slice(1, 5)),
            ((1, 9, 3), slice(1, 9, 3)),
            (slice(2, None), slice(2, None)),
            ([0, 4, -1], [0, 4, -1]),
            (torch.tensor([2, 5]), [2, 5]),
        ],
    )
    def test_pos_slice(self, bridge: Any, ids: Tensor, given: Any, index: Any) -> None:
        """pos_slice keeps those positions of every point: queries of patterns, positions of heads."""
        _, full = bridge.run_with_cache(ids, names_filter=lambda name: True)
        _, cache = bridge.run_with_cache(ids, names_filter=lambda name: True, pos_slice=given)
        assert list(cache) == list(full)
        for name, value in full.items():
            dim = 2 if bridge.registry[name].axes.endswith("query key") else 1
            cut = value[:, :, index] if dim == 2 else value[:, index]
            assert torch.equal(cache[name], cut), name

    def test_pos_slice_of_gradients(self, bridge: Any, ids: Tensor) -> None:
        """Gradients are cut as their values are."""
        given: dict[str, Any] = {"return_type": "loss", "incl_bwd": True}
        _, full = bridge.run_with_cache(ids, **given)
        _, cache = bridge.run_with_cache(ids, pos_slice=-1, **given)
        for name, value in full.items():
            dim = 2 if "pattern" in name or "scores" in name else 1
            assert torch.equal(cache.cache_dict[name], value.select(dim, -1)), name

    def test_plain_dictionary(self, bridge: Any, ids: Tensor) -> None:
        """return_cache_object=False gives a dict of tensors."""
        _, cache = bridge.run_with_cache(ids, return_cache_object=False)
        assert type(cache) is dict
        _, full = bridge.run_with_cache(ids)
        assert list(cache) == list(full)

    def test_return_types(self, bridge: Any, ids: Tensor) -> None:
        """The first value is what forward returns."""
        assert bridge.run_with_cache(ids, return_type=None)[0] is None
        loss = bridge(ids, return_type="loss")
        # The whole cache opens attention.
        torch.testing.assert_close(bridge.run_with_cache(ids, "loss")[0], loss)
        logits, again = bridge.run_with_cache(
            ids, return_type="both", names_filter="blocks.0.hook_out"
        )[0]
        assert torch.equal(logits, bridge(ids))
        assert torch.equal(again, loss)

    def test_cache_holds_no_graph(self, bridge: Any, ids: Tensor) -> None:
        """Cached tensors are detached and do not change when the run's outputs are edited."""
        logits, cache = bridge.run_with_cache(ids)
        assert not any(value.requires_grad for value in cache.values())
        assert logits.requires_grad

    def test_caching_under_edits(self, bridge: Any, hand: Any, byhand: Any, ids: Tensor) -> None:
        """Inside a scope the cache shows the edited run, the edited point as edited."""
        edit = [("blocks.0.hook_out", lambda x, hook: x * 0.5)]
        with bridge.hooks(fwd_hooks=edit):
            logits, cache = bridge.run_with_cache(
                ids, names_filter=lambda name: not byhand.is_inside(name)
            )
        with hand.editing("blocks.0.hook_out", lambda x: x * 0.5):
            assert torch.equal(logits, hand.logits(ids))
            assert torch.equal(cache["blocks.1.hook_in"], hand.read("blocks.1.hook_in", ids))
        assert torch.equal(cache["resid_post", 0], cache["resid_pre", 1])


# --- hooks ------------------------------------------------------------------------------------------------


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.mark.parametrize("family", ["gpt2", "llama"], indirect=True)
class TestHooks:
    @staticmethod
    def note(log: list[str], tag: str = "") -> Callable[[Tensor, Any], None]:
        return lambda x, hook: log.append(tag or hook.name)

    def test_filters_and_aliases(self, bridge: Any, ids: Tensor, log: list[str]) -> None:
        """A pair's first item may be whatever selects points."""
        point = bridge.get_hook_point("blocks.1.hook_out")
        for what in (
            "blocks.1.hook_resid_post",
            point,
            re.compile(r"1\.hook_resid_post"),
            ["blocks.1.hook_out"],
        ):
            log.clear()
            bridge.run_with_hooks(ids, fwd_hooks=[(what, self.note(log))])
            assert log == ["blocks.1.hook_out"]

    def test_hooks_go_after_the_run(self, bridge: Any, ids: Tensor, log: list[str]) -> None:
        """run_with_hooks leaves nothing set; reset_hooks_end=False leaves its hooks until reset."""
        hooks = [("blocks.0.hook_out", self.note(log))]
        bridge.run_with_hooks(ids, fwd_hooks=hooks)
        bridge(ids)
        assert len(log) == 1
        bridge.run_with_hooks(ids, fwd_hooks=hooks, reset_hooks_end=False)
        bridge(ids)
        assert len(log) == 3
        bridge.reset_hooks()
        bridge(ids)
        assert len(log) == 3

    @pytest.mark.parametrize("reset", [True, False])
    def test_hooks_from_an_iterator(
        self, bridge: Any, ids: Tensor, log: list[str], reset: bool
    ) -> None:
        """fwd_hooks may be any iterable, a generator too."""

        def pairs() -> Iterator[tuple[str, Any]]:
            yield "blocks.0.hook_out", self.note(log)
            yield "blocks.1.hook_out", self.note(log)

        bridge.run_with_hooks(ids, fwd_hooks=pairs(), reset_hooks_end=reset)
        bridge.reset_hooks()
        assert log == ["blocks.0.hook_out", "blocks.1.hook_out"]

    def test_permanent_hooks(self, bridge: Any, ids: Tensor, log: list[str]) -> None:
        """They survive reset_hooks() and go with including_permanent=True."""
        (listener,) = bridge.add_perma_hook("blocks.0.hook_out", self.note(log, "stays"))
        bridge.add_hook("blocks.0.hook_out", self.note(log, "goes"))
        bridge(ids)
        assert log == ["stays", "goes"]
        bridge.reset_hooks()
        bridge(ids)
        assert log == ["stays", "goes", "stays"]
        assert bridge.list_hooks() == {"blocks.0.hook_out": [listener]}
        bridge.reset_hooks(including_permanent=True)
        bridge(ids)
        assert log == ["stays", "goes", "stays"]
        assert bridge.list_hooks() == {}

    def test_scopes_nest(self, bridge: Any, ids: Tensor, log: list[str]) -> None:
        """Inner scopes add to outer ones; runs with hooks inside a scope leave the scope's hooks alone."""
        with bridge.hooks(fwd_hooks=[("blocks.0.hook_out", self.note(log, "outer"))]):
            with bridge.hooks(fwd_hooks=[("blocks.0.hook_out", self.note(log, "inner"))]):
                bridge(ids)
            assert log == ["outer", "inner"]
            bridge.run_with_hooks(ids, fwd_hooks=[("blocks.0.hook_out", self.note(log, "run"))])
            assert log == ["outer", "inner", "outer", "run"]
            bridge.run_with_cache(ids)
            bridge(ids)
        assert log == ["outer", "inner", "outer", "run", "outer", "outer"]
        bridge(ids)
        assert len(log) == 6

    def test_a_hook_may_run_the_model(self, bridge: Any, ids: Tensor, byhand: Any) -> None:
        """A run inside a hook (with hooks of its own) does not disturb the run around it."""
        from lensbridge import LensError

        inner: list[Any] = []
        plain = bridge(ids)
        zero = [("blocks.1.hook_out", lambda x, hook: x * 0)]
        expected = bridge.run_with_hooks(ids[:, :4], fwd_hooks=zero)

        def nested(x: Tensor, hook: Any) -> None:
            if not inner:
                inner.append(None)  # the run below passes here too
                inner[0] = bridge.run_with_hooks(ids[:, :4], fwd_hooks=zero)

        inside = ("blocks.0.attn.hook_pattern", lambda x, hook: x.clone())
        logits = bridge.run_with_hooks(ids, fwd_hooks=[("blocks.0.hook_out", nested), inside])
        assert byhand.gap(inner[0], expected) < FLOAT
        assert byhand.gap(logits, plain) < FLOAT
        # Inside attention that is being watched there is no second run, and it says so.
        for name in ("blocks.0.attn.hook_q", "blocks.0.attn.hook_pattern"):
            inner.clear()
            with pytest.raises(LensError, match="from inside a hook"):
                bridge.run_with_hooks(ids, fwd_hooks=[(name, nested), inside])
            assert torch.equal(bridge(ids), plain)

    def test_context(self, bridge: Any, ids: Tensor) -> None:
        """Hooks may keep notes in hook.ctx; they last until cleared."""

        def count(x: Tensor, hook: Any) -> None:
            hook.ctx["count"] = hook.ctx.get("count", 0) + 1

        point = bridge.get_hook_point("blocks.0.hook_out")
        for _ in range(2):
            bridge.run_with_hooks(ids, fwd_hooks=[(point, count)])
        assert point.ctx == {"count": 2}
        bridge.run_with_hooks(ids, fwd_hooks=[(point, count)], clear_contexts=True)
        assert point.ctx == {}
        bridge.run_with_hooks(ids, fwd_hooks=[(point, count)])
        bridge.reset_hooks()
        assert point.ctx == {}

    def test_scope_around_the_model_itself(
        self, bridge: Any, model: nn.Module, hand: Any, ids: Tensor
    ) -> None:
        """Inside a scope the hooks act on the model, whoever calls it."""
        with bridge.hooks(fwd_hooks=[("blocks.0.hook_out", lambda x, hook: x * 0.5)]):
            logits = model(ids).logits
        with hand.editing("blocks.0.hook_out", lambda x: x * 0.5):
            assert torch.equal(logits, hand.logits(ids))
        assert torch.equal(model(ids).logits, hand.logits(ids))

    def test_levels(self, bridge: Any, ids: Tensor, log: list[str]) -> None:
        """reset_hooks(level=) removes what was added at that depth."""
        bridge.add_hook("blocks.0.hook_out", self.note(log, "zero"))
        with bridge.hooks():
            bridge.add_hook("blocks.0.hook_out", self.note(log, "one"))
        bridge(ids)
        assert log == ["zero", "one"]
        bridge.reset_hooks(level=1)
        bridge(ids)
        assert log == ["zero", "one", "zero"]
        bridge.reset_hooks()


# --- generating -------------------------------------------------------------------------------------------


class TestHfGenerate:
    def test_is_generate(self, bridge: Any, model: Any, ids: Tensor) -> None:
        """The ids are those of the model's own generate."""
        given = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(bridge.hf_generate(ids, **given), model.generate(ids, **given))
        text = torch.tensor([encoded("hello")])
        assert torch.equal(bridge.hf_generate("hello", **given), model.generate(text, **given))

    def test_unequal_texts(self, bridge: Any, texts: list[str]) -> None:
        """Texts are padded on the left: each goes on as it does alone."""
        given = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        out = bridge.hf_generate(texts, **given)
        for row, text in enumerate(texts):
            alone = bridge.hf_generate(text, **given)
            assert torch.equal(out[row, -4:], alone[0, -4:])

    @pytest.mark.parametrize("point", ["blocks.0.hook_out", "blocks.1.attn.hook_z"])
    def test_hooks_at_every_step(self, bridge: Any, hand: Any, ids: Tensor, point: str) -> None:
        """An edit acts at the prompt and at each step with keys and values kept, as by hand."""
        given = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        lengths: list[int] = []

        def half(x: Tensor, hook: Any) -> Tensor:
            lengths.append(x.shape[1])
            return x * 0.5

        with bridge.hooks(fwd_hooks=[(point, half)]):
            out = bridge.hf_generate(ids, **given)
        with hand.editing(bridge.registry.canonical(point), lambda x: x * 0.5):
            assert torch.equal(out, hand.model.generate(ids, **given))
        assert lengths == [9, 1, 1, 1, 1]

    def test_pattern_at_every_step(self, bridge: Any, byhand: Any, ids: Tensor) -> None:
        """With the cache on, step by step, the patterns are the rows of the pattern of the whole text."""
        given = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        steps: list[Tensor] = []
        with bridge.hooks(
            fwd_hooks=[("blocks.1.attn.hook_pattern", lambda x, hook: steps.append(x.clone()))]
        ):
            out = bridge.hf_generate(ids, **given)
        _, cache = bridge.run_with_cache(out[:, :-1], names_filter="blocks.1.attn.hook_pattern")
        whole = cache["pattern", 1]
        assert [step.shape[2] for step in steps] == [9, 1, 1, 1]
        assert byhand.gap(steps[0], whole[:, :, :9, :9]) < FLOAT
        for index, step in enumerate(steps[1:], 9):
            row = whole[:, :, index : index + 1, : index + 1]
            seen = step.shape[-1]  # a sliding window keeps the last keys only
            assert byhand.gap(step, row[..., -seen:]) < FLOAT
            assert not row[..., :-seen].any()


# --- compiled models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["module.compile", "torch.compile"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_compiled_models(fresh: Any, byhand: Any, ids: Tensor, family: str, how: str) -> None:
    """Hooks on a compiled model fire though the first call came before them, and its plain calls stay compiled."""
    from lensbridge import TransformerBridge

    plain = fresh(family)
    hand = byhand.ByHand(plain.original_model, family)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = plain.original_model
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # dynamo warns of its own matters
        if how == "module.compile":
            model.compile(backend=backend)
            bridge = TransformerBridge(model)
        else:
            compiled: Any = torch.compile(model, backend=backend)
            bridge = TransformerBridge(compiled)
        expected = hand.logits(ids)
        assert torch.equal(bridge(ids), expected)
        assert graphs
        _, cache = bridge.run_with_cache(ids, names_filter="blocks.*.hook_out")
        assert list(cache) == ["blocks.0.hook_out", "blocks.1.hook_out"]
        assert torch.equal(cache["resid_post", 0], hand.read("blocks.0.hook_out", ids))
        for name in (
            "blocks.0.attn.hook_pattern",
            "blocks.0.hook_resid_mid",
            "blocks.1.attn.k.hook_in",
        ):
            logits = bridge.run_with_hooks(ids, fwd_hooks=[(name, lambda x, hook: x * 0.5)])
            with hand.editing(name, lambda x: x * 0.5):
                assert byhand.gap(logits, hand.logits(ids)) < FLOAT
        assert torch.equal(bridge(ids, stop_at_layer=1), cache["resid_post", 0])
        assert torch.equal(bridge(cache["resid_post", 0], start_at_layer=1), expected)
        count = len(graphs)
        assert torch.equal(bridge(ids), expected)
        assert len(graphs) == count
    torch._dynamo.reset()
