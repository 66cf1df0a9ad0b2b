"""Attributions against plain PyTorch, finite differences, real patching and captum."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge.hooks import (
    AbsentPointError,
    GradientError,
    HookNotFiredError,
    InputError,
    UnknownPointError,
)
from lensbridge.methods.attribution import (
    attribution_patching,
    gradients,
    input_x_gradient,
    integrated_gradients,
)

EMBED = "embed.hook_out"
RULES = (
    "gausslegendre",
    "riemann_left",
    "riemann_middle",
    "riemann_right",
    "riemann_trapezoid",
)
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
MASKS = {"none": None, "left": LEFT, "right": LEFT.flip(1)}
INNER = (
    "blocks.0.hook_in",
    "blocks.0.ln1.hook_scale",
    "blocks.0.attn.q.hook_out",
    "blocks.0.attn.hook_attn_scores",
    "blocks.0.attn.hook_pattern",
    "blocks.0.mlp.out.hook_in",
    "blocks.1.hook_attn_out",
)


@pytest.fixture(scope="module")
def wrapped(tiny: Callable[..., Any]) -> Callable[..., Any]:
    """``wrapped("gpt2")``: a bridge around a tiny model, built once; nothing here leaves a trace on it."""
    from lensbridge import TransformerBridge

    return cache(lambda name, kind="causal": TransformerBridge(tiny(name, kind)))


@pytest.fixture(scope="module")
def precise(tiny: Callable[..., Any]) -> Callable[..., Any]:
    """The same in float64, for finite differences."""
    from lensbridge import TransformerBridge

    return cache(lambda name: TransformerBridge(tiny(name).double()))


@pytest.fixture
def others() -> Tensor:
    """Other token ids, [2, 9]."""
    return torch.randint(8, 160, (2, 9), generator=torch.Generator().manual_seed(2))


def final_logit(token: int = 7) -> Callable[[Tensor], Tensor]:
    return lambda logits: logits[:, -1, token]


def gap(left: Tensor, right: Tensor) -> float:
    """Largest difference relative to the largest value."""
    assert left.shape == right.shape
    return float((left - right).abs().max() / right.abs().max())


def by_hand(model: nn.Module, ids: Tensor, token: int = 7) -> tuple[Tensor, Tensor]:
    """Embeddings and the gradient of the last logit of a token there, without lensbridge."""
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    total = model(inputs_embeds=embeddings).logits[:, -1, token].sum()
    return embeddings.detach(), torch.autograd.grad(total, embeddings)[0]


def patched(bridge: Any, input: Tensor, metric: Any, point: str, new: Tensor) -> Tensor:
    """The metric of a run in which a point shows something else."""
    with torch.no_grad(), bridge.hooks(fwd_hooks=[(point, lambda x, hook: new)]):
        return metric(bridge(input))


# --- gradients --------------------------------------------------------------------------------------------


def test_gradient_of_the_embeddings_is_that_of_plain_pytorch(
    bridge: Any, model: nn.Module, ids: Tensor
) -> None:
    """In every family; and input x gradient is their product."""
    value, gradient = by_hand(model, ids)
    found = gradients(bridge, ids, final_logit(), EMBED)
    assert list(found) == [EMBED]
    assert torch.equal(found[EMBED].value, value)
    assert gap(found[EMBED].gradient, gradient) < 1e-5
    assert gap(input_x_gradient(bridge, ids, 7), value * gradient) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt"])
def test_one_backward_pass_gives_the_slope_at_every_point(
    name: str, precise: Any, ids: Tensor
) -> None:
    """Against central differences in float64, along a random direction at each point by itself."""
    bridge, metric = precise(name), final_logit()
    points = [point for point in INNER if point in bridge.registry]
    assert len(points) >= 6
    found = gradients(bridge, ids, metric, points)
    assert list(found) == [bridge.registry.canonical(point) for point in points]
    for point in points:
        value, gradient = found[bridge.registry.canonical(point)]
        drawn = torch.randn(value.shape, generator=torch.Generator().manual_seed(3)).double()
        # Where the softmax is told to see nothing it stays that way.
        step = torch.where(value > -1e30, drawn, 0) * 1e-5
        ahead, behind = (
            patched(bridge, ids, metric, point, value + sign * step) for sign in (1, -1)
        )
        expected = (ahead - behind).sum() / 2e-5
        assert float((gradient * step).sum() / 1e-5) == pytest.approx(float(expected), rel=1e-5)


def test_filters_leave_out_what_has_no_gradient(wrapped: Any, ids: Tensor) -> None:
    """Ids have none; a glob that selects them is no error, a name is."""
    bridge = wrapped("llama")
    found = gradients(bridge, ids, 7, ["embed.*", "blocks.*.hook_out"])
    assert list(found) == [EMBED, "blocks.0.hook_out", "blocks.1.hook_out"]
    everything = gradients(bridge, ids, 7, None)
    wanted = {n for n, p in bridge.registry.items() if p.is_default and not p.is_index}
    assert set(everything) == wanted
    with pytest.raises(GradientError, match=r"embed\.hook_in holds whole numbers"):
        gradients(bridge, ids, 7, "embed.hook_in")
    with pytest.raises(UnknownPointError, match="nearest"):
        gradients(bridge, ids, 7, "blocks.0.hook_outt")


def test_a_point_the_metric_does_not_depend_on(wrapped: Any, ids: Tensor) -> None:
    """By name an error, by glob left out."""
    free = torch.ones(2, requires_grad=True)
    bridge = wrapped("gpt2")
    with pytest.raises(GradientError, match=r"no gradient reaches blocks\.0\.hook_out"):
        gradients(bridge, ids, lambda logits: 2 * free, "blocks.0.hook_out")
    assert gradients(bridge, ids, lambda logits: 2 * free, "blocks.*.hook_out") == {}
    assert free.grad is None


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_whatever_the_caller_is_in(around: Any, is_frozen: bool, tiny: Any, ids: Tensor) -> None:
    """Gradients off, inference mode, a frozen model: the same values, and the model is as it was."""
    from lensbridge import TransformerBridge

    model = tiny("gpt2").requires_grad_(not is_frozen)
    model.lm_head.weight.requires_grad_(is_frozen)  # some are, some are not
    bridge = TransformerBridge(model)
    before = [p.requires_grad for p in model.parameters()]
    expected = by_hand(tiny("gpt2"), ids)[1]
    with around():
        found = gradients(bridge, ids, 7, EMBED)[EMBED].gradient
        integrated = integrated_gradients(bridge, ids, 7, n_steps=4)
        patching = attribution_patching(bridge, ids, ids.flip(1), 7, EMBED)[EMBED]
    assert gap(found, expected) < 1e-5
    assert gap(integrated, integrated_gradients(bridge, ids, 7, n_steps=4)) < 1e-6
    assert gap(patching, attribution_patching(bridge, ids, ids.flip(1), 7, EMBED)[EMBED]) < 1e-6
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    assert not bridge.registry.live
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_metric_that_fails_leaves_nothing_behind(wrapped: Any, ids: Tensor) -> None:
    """Parameters trainable again, no hook on the model."""
    bridge = wrapped("gpt2")

    def broken(logits: Tensor) -> Tensor:
        raise ZeroDivisionError

    attempts: list[Callable[[], Any]] = [
        lambda: gradients(bridge, ids, broken, EMBED),
        lambda: integrated_gradients(bridge, ids, broken),
    ]
    for attempt in attempts:
        with pytest.raises(ZeroDivisionError):
            attempt()
        assert all(p.requires_grad for p in bridge.parameters())
        assert not bridge.registry.live


def test_the_callers_own_embeddings_get_no_gradient(wrapped: Any, ids: Tensor) -> None:
    """An input of the caller that requires gradients is read, and its ``.grad`` left alone."""
    bridge = wrapped("llama")
    given = bridge.original_model.get_input_embeddings()(ids).detach().requires_grad_()
    found = gradients(bridge, given, 7, "blocks.0.hook_in")["blocks.0.hook_in"]
    assert gap(found.gradient, by_hand(bridge.original_model, ids)[1]) < 1e-5
    assert given.grad is None
    assert not found.value.requires_grad


def test_values_the_model_overwrites(wrapped: Any, ids: Tensor) -> None:
    """Falcon adds to what its MLP made, in place: value and gradient are those of before."""
    bridge = wrapped("falcon")
    name = bridge.registry.canonical("blocks.0.hook_mlp_out")
    assert bridge.registry[name].is_volatile
    _, cache = bridge.run_with_cache(ids, names_filter=name)
    found = gradients(bridge, ids, 7, name)[name]
    assert torch.equal(found.value, cache[name])
    # Attention and MLP are added in one sum, so the gradient is the layer's.
    assert (
        gap(
            found.gradient,
            gradients(bridge, ids, 7, "blocks.0.hook_out")["blocks.0.hook_out"].gradient,
        )
        < 1e-6
    )


def test_hooks_of_the_caller_are_part_of_the_run(wrapped: Any, ids: Tensor) -> None:
    """An edit comes first; value and gradient are those behind it."""
    bridge = wrapped("gpt2")
    with bridge.hooks(fwd_hooks=[("blocks.1.hook_out", lambda x, hook: 2 * x)]):
        found = gradients(bridge, ids, 7, ["blocks.0.hook_out", "blocks.1.hook_out"])
    plain = gradients(bridge, ids, 7, ["blocks.1.hook_out"])["blocks.1.hook_out"]
    assert torch.equal(found["blocks.1.hook_out"].value, 2 * plain.value)
    with (
        pytest.raises(InputError, match="of its own"),
        bridge.hooks(fwd_hooks=[("blocks.1.hook_out", _refuse)]),
    ):
        gradients(bridge, ids, 7, ["blocks.0.hook_out"])


def _refuse(tensor: Tensor, hook: Any) -> None:
    raise InputError("an error of its own")


# --- metrics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", MASKS)
def test_a_token_is_its_logit_at_the_last_real_position(
    side: str, wrapped: Any, ids: Tensor
) -> None:
    """Under padding on either side, for one token or one a row."""
    bridge, mask = wrapped("gpt2"), MASKS[side]
    last = [5 if side == "right" else 8, 8]

    def metric(logits: Tensor) -> Tensor:
        return torch.stack([logits[0, last[0], 11], logits[1, last[1], 12]])

    expected = gradients(bridge, ids, metric, EMBED, attention_mask=mask)[EMBED].gradient
    for tokens in ([11, 12], (11, 12), torch.tensor([11, 12])):
        found = gradients(bridge, ids, tokens, EMBED, attention_mask=mask)[EMBED].gradient
        assert torch.equal(found, expected)
    both = gradients(bridge, ids, 11, EMBED, attention_mask=mask)[EMBED].gradient
    assert torch.equal(both[0], expected[0])
    assert not torch.equal(both[1], expected[1])
    assert not expected[0, last[0] + 1 :].any()


def test_a_row_attributed_alone_or_padded(wrapped: Any, ids: Tensor) -> None:
    """Left padding does not change the attributions of a row."""
    bridge = wrapped("llama")
    padded = integrated_gradients(
        bridge, ids, 11, n_steps=5, baseline_input=ids.flip(1), attention_mask=LEFT
    )
    alone = integrated_gradients(
        bridge, ids[:1, 3:], 11, n_steps=5, baseline_input=ids.flip(1)[:1, 3:]
    )
    assert gap(padded[:1, 3:], alone) < 1e-4


def test_text_and_mappings_are_inputs(tiny: Any, tokenizer: Any) -> None:
    """Text goes through the bridge's tokenizer; a mapping holds keywords of the forward."""
    from lensbridge import TransformerBridge

    bridge = TransformerBridge(tiny("gpt2"), tokenizer)
    inputs = bridge.prepare(["to be", "or not to be"])
    assert inputs.mask is not None
    text = input_x_gradient(bridge, ["to be", "or not to be"], 11)
    assert torch.equal(input_x_gradient(bridge, inputs.kwargs, 11), text)
    assert torch.equal(
        input_x_gradient(bridge, inputs.tokens, 11, attention_mask=inputs.mask), text
    )


@pytest.mark.parametrize(
    ("metric", "error", "message"),
    [
        (
            lambda logits: 3.0,
            InputError,
            r"one a row, \[2\]; of logits \[2, 9, 160\] it made float: 3.0",
        ),
        (lambda logits: logits[:, -1], InputError, r"it made shape \[2, 160\]"),
        (lambda logits: logits[0, :1, 0], InputError, r"it made shape \[1\]"),
        (lambda logits: logits.detach().sum(), GradientError, r"lose their graph"),
        (lambda logits: logits[:, -1].argmax(-1), GradientError, r"argmax"),
        (
            "Paris",
            InputError,
            r"the metric must be a token id or 2 of them, one a row; got 'Paris'",
        ),
        (2.5, InputError, r"got 2.5"),
        (True, InputError, r"got True"),
        ([1, 2, 3], InputError, r"2 of them, one a row; got 3"),
        (torch.tensor([1.0, 2.0]), InputError, r"must be a token id"),
        (160, InputError, r"id 160 is outside the vocabulary of 160"),
        ([4, -1], InputError, r"id -1 is outside"),
    ],
)
def test_metrics_that_are_none(
    metric: Any, error: Any, message: str, wrapped: Any, ids: Tensor
) -> None:
    """What was given and what is expected is said."""
    with pytest.raises(error, match=message):
        gradients(wrapped("gpt2"), ids, metric, EMBED)
    with pytest.raises(error, match=message):
        integrated_gradients(wrapped("gpt2"), ids, metric, n_steps=3)


# --- integrated gradients ---------------------------------------------------------------------------------


def integrated_by_hand(model: nn.Module, ids: Tensor, start: Tensor, n_steps: int) -> Tensor:
    """The middle rule over embeddings, one step at a time, without lensbridge."""
    end = model.get_input_embeddings()(ids).detach()
    total = torch.zeros_like(end)
    for step in range(n_steps):
        at = (start + (step + 0.5) / n_steps * (end - start)).requires_grad_()
        logit = model(inputs_embeds=at).logits[:, -1, 7].sum()
        total += torch.autograd.grad(logit, at)[0] / n_steps
    return (end - start) * total


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma", "phi"])
def test_integrated_gradients_of_the_embeddings_by_hand(
    name: str, wrapped: Any, ids: Tensor, others: Tensor
) -> None:
    """From zeros, from a tensor that expands, and from another input."""
    bridge = wrapped(name)
    model: Any = bridge.original_model
    vector = torch.linspace(-1, 1, 64)
    options: dict[str, Any] = {"n_steps": 6, "method": "riemann_middle"}
    there = model.get_input_embeddings()(others).detach()
    cases: list[tuple[dict[str, Any], Tensor]] = [
        ({}, torch.zeros_like(there)),
        ({"baseline": vector}, vector.expand_as(there)),
        ({"baseline": there}, there),
        ({"baseline_input": others}, there),
    ]
    for given, start in cases:
        found = integrated_gradients(bridge, ids, final_logit(), **given, **options)
        assert gap(found, integrated_by_hand(model, ids, start, 6)) < 1e-4


@pytest.mark.parametrize(
    "point",
    [
        EMBED,
        "blocks.0.attn.hook_attn_scores",
        "blocks.0.attn.hook_pattern",
        "blocks.0.attn.v.hook_out",
        "blocks.0.hook_resid_mid",
        "blocks.1.mlp.out.hook_in",
        "blocks.1.hook_out",
        "ln_final.hook_out",
    ],
)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_completeness(name: str, point: str, wrapped: Any, ids: Tensor, others: Tensor) -> None:
    """At any point the attributions of a row sum to the change of the metric; the delta says by how much not."""
    bridge = wrapped(name)
    made, delta = integrated_gradients(
        bridge,
        ids,
        7,
        point=point,
        baseline_input=others,
        n_steps=40,
        return_convergence_delta=True,
    )
    _, cache = bridge.run_with_cache(others, names_filter=point)
    with torch.no_grad():
        change = final_logit()(bridge(ids)) - patched(
            bridge, ids, final_logit(), point, cache[point]
        )
    assert float(change.abs().max()) > 1e-3
    sums = made.flatten(1).sum(1)
    assert float((sums - change).abs().max()) < 2e-3 * float(change.abs().max())
    assert torch.allclose(delta, sums - change, atol=2e-6)


def test_more_steps_are_nearer(wrapped: Any, ids: Tensor, others: Tensor) -> None:
    """Each rule converges on the same attributions, as fast as it should."""
    bridge = wrapped("gpt2")

    def missed(rule: str, n_steps: int) -> float:
        options: dict[str, Any] = {"method": rule, "n_steps": n_steps}
        _, delta = integrated_gradients(
            bridge, ids, 7, baseline_input=others, return_convergence_delta=True, **options
        )
        return float(delta.abs().max())

    assert missed("gausslegendre", 20) < 1e-5
    for rule, order in (("riemann_left", 2), ("riemann_right", 2), ("riemann_middle", 4)):
        assert missed(rule, 16) < missed(rule, 8) * 1.5 / order, rule
    assert missed("riemann_trapezoid", 17) < missed("riemann_trapezoid", 9) * 1.5 / 4


@pytest.mark.parametrize("rule", RULES)
def test_a_linear_metric_needs_no_steps(rule: str, wrapped: Any, ids: Tensor) -> None:
    """Behind the final norm the logit is linear: every rule gives value times weight, whatever the steps."""
    bridge = wrapped("gpt2")
    model: Any = bridge.original_model
    _, cache = bridge.run_with_cache(ids, names_filter="unembed.hook_in")
    expected = torch.zeros_like(cache["unembed.hook_in"])
    expected[:, -1] = cache["unembed.hook_in"][:, -1] * model.lm_head.weight[7].detach()
    for n_steps in (2, 3, 7):
        found = integrated_gradients(
            bridge, ids, 7, point="unembed.hook_in", method=rule, n_steps=n_steps
        )
        assert gap(found, expected) < 1e-5


def test_steps_as_rows_or_one_by_one(wrapped: Any, ids: Tensor, others: Tensor) -> None:
    """The batch size changes how many rows are run at once and nothing else; a metric sees its own rows."""
    bridge = wrapped("gpt2")
    sizes: list[int] = []
    rows = torch.tensor([5, 9])

    def metric(logits: Tensor) -> Tensor:
        return logits[torch.arange(2), -1, rows]

    def note(tensor: Tensor, hook: Any) -> None:
        sizes.append(len(tensor))

    def run(**options: Any) -> Tensor:
        sizes.clear()
        with bridge.registry.hooks() as scope:
            scope.observe([bridge.registry["blocks.0.hook_in"]], note)
            return integrated_gradients(
                bridge,
                ids,
                metric,
                baseline_input=others,
                n_steps=7,
                attention_mask=LEFT,
                **options,
            )

    whole = run()
    assert sizes == [2, 2, 14]
    assert gap(run(batch_size=3), whole) < 1e-5
    assert sizes == [2, 2, 6, 6, 2]
    assert gap(run(batch_size=100), whole) < 1e-5
    assert sizes == [2, 2, 14]
    with bridge.hooks(fwd_hooks=[("blocks.1.hook_in", lambda x, hook: x + torch.zeros(2, 9, 64))]):
        assert gap(run(), whole) < 1e-5  # a hook that knows two rows
    assert sizes == [2] * 9
    assert gap(run(position_ids=torch.arange(9).expand(2, 9)), whole) > 1e-3
    assert sizes == [2, 2, 14]


def test_a_point_without_rows(wrapped: Any, ids: Tensor) -> None:
    """Position embeddings are one row for all: steps run one by one, and the delta is one number."""
    bridge = wrapped("gpt2")
    options: dict[str, Any] = {"point": "pos_embed.hook_out", "method": "riemann_left"}
    made, delta = integrated_gradients(
        bridge, ids, 7, n_steps=3, return_convergence_delta=True, **options
    )
    assert made.shape == (1, 9, 64)
    zeros = torch.zeros(1, 9, 64)
    with torch.no_grad():
        change = final_logit()(bridge(ids)) - patched(
            bridge, ids, final_logit(), "pos_embed.hook_out", zeros
        )
    assert delta.shape == ()
    assert float(delta) == pytest.approx(float(made.sum() - change.sum()), rel=1e-3)
    made = integrated_gradients(bridge, ids, 7, n_steps=30, point="pos_embed.hook_out")
    assert float(made.sum()) == pytest.approx(float(change.sum()), rel=1e-3)


def test_a_scalar_metric(wrapped: Any, ids: Tensor, others: Tensor) -> None:
    """One number for all rows: the gradient of a mean is the mean's, and the delta is one number."""
    bridge = wrapped("gpt2")
    options: dict[str, Any] = {"baseline_input": others, "n_steps": 10}
    by_row = integrated_gradients(bridge, ids, 7, **options)
    mean, delta = integrated_gradients(
        bridge, ids, lambda x: x[:, -1, 7].mean(), return_convergence_delta=True, **options
    )
    assert gap(mean * 2, by_row) < 1e-5
    assert delta.shape == ()
    assert abs(float(delta)) < 1e-3 * float(mean.abs().sum())


def test_the_variable_may_be_in_an_encoder(wrapped: Any, ids: Tensor, others: Tensor) -> None:
    """What the encoder of T5 reads, against plain PyTorch."""
    bridge = wrapped("t5", "seq2seq")
    model: Any = bridge.original_model
    found = integrated_gradients(
        bridge,
        ids,
        7,
        point="encoder_embed.hook_out",
        baseline_input=others,
        n_steps=4,
        method="riemann_right",
        decoder_input_ids=others,
    )
    end, start = (model.get_input_embeddings()(x).detach() for x in (ids, others))
    total = torch.zeros_like(end)
    for step in range(1, 5):
        at = (start + step / 4 * (end - start)).requires_grad_()
        logits = model(inputs_embeds=at, decoder_input_ids=others).logits
        total += torch.autograd.grad(logits[:, -1, 7].sum(), at)[0] / 4
    assert gap(found, (end - start) * total) < 1e-4


def test_behind_an_image(wrapped: Any, inputs_of: Any) -> None:
    """Images are repeated with the rows they belong to."""
    bridge, given = wrapped("llava", "vlm"), inputs_of("llava", "vlm")
    options: dict[str, Any] = {"point": "blocks.1.hook_in", "n_steps": 4, "baseline": torch.ones(1)}
    found = integrated_gradients(bridge, given, 7, **options)
    assert gap(found, integrated_gradients(bridge, given, 7, batch_size=1, **options)) < 1e-5


def test_half_precision(tiny: Any, ids: Tensor, others: Tensor) -> None:
    """Attributions of a bfloat16 model are float32 and near those of the float32 model."""
    from lensbridge import TransformerBridge

    half, full = TransformerBridge(tiny("gpt2").bfloat16()), TransformerBridge(tiny("gpt2"))
    found = integrated_gradients(half, ids, 7, n_steps=8, baseline_input=others)
    assert found.dtype == torch.float32
    assert gap(found, integrated_gradients(full, ids, 7, n_steps=8, baseline_input=others)) < 0.1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "simpson"}, InputError, r"gausslegendre.*riemann_trapezoid; got 'simpson'"),
        ({"n_steps": 0}, InputError, r"from 1, got 0"),
        ({"n_steps": 1, "method": "riemann_trapezoid"}, InputError, r"from 2, got 1"),
        ({"batch_size": 0}, InputError, r"batch_size .* got 0"),
        ({"baseline": 0.0}, InputError, r"a baseline is a tensor, got float: 0\.0"),
        (
            {"baseline": torch.zeros(63)},
            InputError,
            r"shape \[63\] and embed.hook_out \[2, 9, 64\]",
        ),
        ({"baseline": torch.zeros(1, 2, 9, 64)}, InputError, r"expands to it"),
        ({"baseline": torch.zeros(64), "baseline_input": 1}, InputError, "not both"),
        ({"point": "embed.hook_in"}, GradientError, "whole numbers"),
        ({"point": "pos_embed.hook_in2"}, UnknownPointError, "nearest"),
        ({"point": "rotary_emb.hook_cos"}, AbsentPointError, "no module beside"),
    ],
)
def test_options_that_cannot_be(
    options: Any, error: Any, message: str, wrapped: Any, ids: Tensor
) -> None:
    """Said before anything is integrated."""
    with pytest.raises(error, match=message):
        integrated_gradients(wrapped("gpt2"), ids, 7, **options)


def test_a_baseline_of_another_length(wrapped: Any, ids: Tensor) -> None:
    """Another input must have as many tokens."""
    with pytest.raises(InputError, match=r"\[2, 8, 64\] and embed.hook_out \[2, 9, 64\]"):
        integrated_gradients(wrapped("gpt2"), ids, 7, baseline_input=ids[:, :8])


def test_a_point_that_is_passed_twice(wrapped: Any, ids: Tensor) -> None:
    """Nanochat has one norm module for everything: no one value to integrate over."""
    with pytest.raises(InputError, match="more than once"):
        integrated_gradients(wrapped("nanochat"), ids, 7, point="raw:model.norm")


def test_a_point_that_is_not_passed(wrapped: Any, inputs_of: Any, ids: Tensor) -> None:
    """Text alone does not pass the vision tower."""
    point = "vision_blocks.0.hook_out"
    with pytest.raises(HookNotFiredError):
        integrated_gradients(wrapped("llava", "vlm"), ids, 7, point=point)
    with pytest.raises(HookNotFiredError):
        gradients(wrapped("llava", "vlm"), ids, 7, [point])
    assert point not in gradients(wrapped("llava", "vlm"), ids, 7, "**.hook_out")


# --- attribution patching ---------------------------------------------------------------------------------


@pytest.mark.parametrize("into", ["corrupted", "clean"])
@pytest.mark.parametrize("point", ["ln_final.hook_out", "unembed.hook_in", "unembed.hook_out"])
def test_where_the_metric_is_linear_it_is_patching(
    point: str, into: str, wrapped: Any, ids: Tensor, others: Tensor
) -> None:
    """Position by position, each patched by itself in a run."""
    bridge = wrapped("gpt2")
    metric = lambda logits: logits[:, 3, 7] - 2 * logits[:, -1, 5]  # noqa: E731
    found = attribution_patching(bridge, ids, others, metric, point, into=into)[
        bridge.registry.canonical(point)
    ]
    here, other = (others, ids) if into == "corrupted" else (ids, others)
    _, source = bridge.run_with_cache(other, names_filter=point)
    before = metric(bridge(here)).detach()
    for position in range(9):

        def patch(tensor: Tensor, hook: Any, position: int = position) -> Tensor:
            changed = tensor.clone()
            changed[:, position] = source[point][:, position]
            return changed

        with torch.no_grad(), bridge.hooks(fwd_hooks=[(point, patch)]):
            effect = metric(bridge(here)) - before
        assert torch.allclose(found[:, position].sum(-1), effect, atol=2e-6)
        assert bool(effect.any()) == (position in (3, 8))


def test_a_stream_without_a_norm(ids: Tensor, others: Tensor, tiny: Any) -> None:
    """With the final norm taken out, the last layer's output is linear too: the layer is patched whole."""
    from lensbridge import TransformerBridge

    model: Any = tiny("gpt2")
    model.transformer.ln_f = nn.Identity()
    bridge = TransformerBridge(model)
    found = attribution_patching(bridge, ids, others, final_logit(), "blocks.1.hook_out")
    _, clean = bridge.run_with_cache(ids, names_filter="blocks.1.hook_out")
    effect = patched(
        bridge, others, final_logit(), "blocks.1.hook_out", clean["blocks.1.hook_out"]
    ) - final_logit()(bridge(others))
    assert gap(found["blocks.1.hook_out"].sum((1, 2)), effect.detach()) < 1e-5
    assert (
        gap(effect.detach(), (final_logit()(bridge(ids)) - final_logit()(bridge(others))).detach())
        < 1e-5
    )


@pytest.mark.parametrize("into", ["corrupted", "clean"])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_elsewhere_it_is_the_slope_of_patching(
    name: str, into: str, precise: Any, ids: Tensor, others: Tensor
) -> None:
    """A hundred thousandth of the way from one activation to the other changes the metric by that share of it."""
    bridge, metric = precise(name), final_logit()
    points = [EMBED, "blocks.0.attn.hook_pattern", "blocks.0.mlp.out.hook_in", "blocks.1.hook_out"]
    found = attribution_patching(bridge, ids, others, metric, points, into=into)
    here, other = (others, ids) if into == "corrupted" else (ids, others)
    _, own = bridge.run_with_cache(here, names_filter=points)
    _, source = bridge.run_with_cache(other, names_filter=points)
    assert list(found) == list(own)
    for point in points:
        step = 1e-5 * (source[point] - own[point])
        ahead, behind = (
            patched(bridge, here, metric, point, own[point] + sign * step) for sign in (1, -1)
        )
        slope = (ahead - behind) / 2e-5
        assert gap(found[point].flatten(1).sum(1), slope) < 1e-5


def test_patching_by_default_covers_every_point(wrapped: Any, ids: Tensor, others: Tensor) -> None:
    """Every default point with a gradient, shaped like its tensor; equal runs attribute nothing."""
    bridge = wrapped("llama")
    found = attribution_patching(bridge, ids, others, 7)
    _, cache = bridge.run_with_cache(ids)
    wanted = {name for name in cache if not bridge.registry[name].is_index}
    assert {name: x.shape for name, x in found.items()} == {n: cache[n].shape for n in wanted}
    # The rotation depends on positions alone.
    same = {name for name, x in found.items() if not bool(x.any())}
    assert same == {"rotary_emb.hook_cos", "rotary_emb.hook_sin"}
    nothing = attribution_patching(bridge, ids, ids, 7)
    assert all(
        float(x.abs().max()) < 1e-4 * float(found[n].abs().max() + 1) for n, x in nothing.items()
    )


def test_masked_scores_count_for_nothing(wrapped: Any, ids: Tensor, others: Tensor) -> None:
    """They are minus infinity in every run; a line from zeros to there is refused."""
    bridge, point = wrapped("llama"), "blocks.0.attn.hook_attn_scores"
    masked = torch.ones(9, 9).triu(1).bool()
    for found in (
        input_x_gradient(bridge, ids, 7, point=point),
        attribution_patching(bridge, ids, others, 7, point)[point],
        integrated_gradients(bridge, ids, 7, point=point, baseline_input=others, n_steps=3),
    ):
        assert not found[..., masked].any()
        assert bool(found[:, :, -1].any())
        assert bool(found.isfinite().all())
    with pytest.raises(InputError, match="infinite at the same places"):
        integrated_gradients(bridge, ids, 7, point=point)


def test_patching_refuses(wrapped: Any, ids: Tensor) -> None:
    """Runs of unequal length, and a direction that is none."""
    with pytest.raises(InputError, match=r"\[2, 8, 64\] in the corrupted run and \[2, 9, 64\] in"):
        attribution_patching(wrapped("gpt2"), ids, ids[:, 1:], 7, EMBED)
    with pytest.raises(InputError, match="'corrupted' or 'clean', got 'both'"):
        attribution_patching(wrapped("gpt2"), ids, ids, 7, EMBED, into="both")


# --- captum -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def attr() -> Any:
    """captum's attributions, where it is installed."""
    return pytest.importorskip("captum.attr")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("rule", RULES)
def test_integrated_gradients_are_captums(
    name: str, rule: str, attr: Any, wrapped: Any, ids: Tensor, others: Tensor
) -> None:
    """At the embedding layer, from another input, and from zeros; the deltas too."""
    bridge = wrapped(name)
    model: Any = bridge.original_model
    # captum's trapezoid has weights that sum to 1 - 1 / n.
    share = 1 - 1 / 12 if rule == "riemann_trapezoid" else 1.0
    whole = attr.LayerIntegratedGradients(
        lambda x: model(x).logits[:, -1], model.get_input_embeddings()
    )
    options: dict[str, Any] = {"n_steps": 12, "method": rule}
    expected, missed = whole.attribute(
        ids, baselines=others, target=7, return_convergence_delta=True, **options
    )
    found, delta = integrated_gradients(
        bridge, ids, 7, baseline_input=others, return_convergence_delta=True, **options
    )
    assert gap(found * share, expected.detach()) < 1e-5
    if share == 1:
        assert torch.allclose(delta, missed.float(), atol=1e-6)
    embeddings = model.get_input_embeddings()(ids).detach()
    plain = attr.IntegratedGradients(lambda x: model(inputs_embeds=x).logits[:, -1])
    expected = plain.attribute(embeddings, target=7, **options)
    found = integrated_gradients(bridge, ids, 7, **options)
    assert gap(found * share, expected.detach()) < 1e-4


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_input_x_gradient_is_captums(name: str, attr: Any, wrapped: Any, ids: Tensor) -> None:
    """At the embeddings, and behind a layer."""
    bridge = wrapped(name)
    model: Any = bridge.original_model
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    plain = attr.InputXGradient(lambda x: model(inputs_embeds=x).logits[:, -1])
    expected = plain.attribute(embeddings, target=7).detach()
    assert gap(input_x_gradient(bridge, ids, 7), expected) < 1e-5
    layer = model.get_submodule(bridge.architecture.blocks[0].path)
    behind = attr.LayerGradientXActivation(lambda x: model(x).logits[:, -1], layer)
    expected = behind.attribute(ids, target=7)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert (
        gap(input_x_gradient(bridge, ids, 7, point="blocks.0.hook_out"), expected.detach()) < 1e-5
    )
