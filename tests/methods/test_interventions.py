"""Interventions do to the output what a plain PyTorch hook at the same module does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import (
    AbsentPointError,
    HookValueError,
    InputError,
    LayerRangeError,
    TransformerBridge,
    UnknownPointError,
)
from lensbridge.methods import InterventionSpec, LensAPI, apply_interventions

MODELS = [("llama", "causal"), ("gemma2", "causal"), ("gpt_neox", "causal"), ("bert", "masked")]


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(params=MODELS, ids=lambda model: model[0])
def which(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Each kind of residual stream in turn."""
    return request.param


@pytest.fixture
def lens(
    which: tuple[str, str], lens_of: Callable[..., LensAPI], left_alone: Any
) -> Iterator[LensAPI]:
    """After every test the model is as it was, and nobody listens."""
    with left_alone(lens_of(*which)) as lens:
        yield lens


def run(lens: LensAPI, ids: Tensor, *specs: InterventionSpec) -> Tensor:
    """The Hugging Face model's own output inside the interventions."""
    with lens.intervene(*specs):
        return lens.model(ids).logits


def test_every_site(
    lens: LensAPI, which: tuple[str, str], places: Any, plain: Any, ids: Tensor
) -> None:
    """At every site with a module, in every layer, the output is bit for bit that of a hook on the module."""
    sites = {
        site: place
        for site, place in places.PLACES[which].items()
        if site != "post_attn_residual" or which[0] == "bert"
    }
    untouched = lens.model(ids).logits
    for site, place in sites.items():
        for layer in places.layers_of(place):
            found = run(lens, ids, InterventionSpec(site, plain.noisy, layer))
            by_hand = plain.edited(lens.model, ids, place.format(i=layer), plain.noisy)
            assert torch.equal(found, by_hand), (site, layer)
            assert plain.gap(found, untouched) > 1e-3, (site, layer)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_stream_between(
    lens_of: Callable[..., LensAPI], places: Any, plain: Any, ids: Tensor, name: str
) -> None:
    """Between attention and MLP the new stream is read by the MLP and carried past it."""
    lens, sites = lens_of(name), places.PLACES[name, "causal"]
    for layer in (0, 1):
        streams: list[Tensor] = []
        block, attn = (sites[site].format(i=layer) for site in ("block_input", "attn_output"))

        def added(x: Tensor, streams: list[Tensor] = streams) -> Tensor:
            """What attention must add for the stream behind it to be the edited one."""
            return plain.noisy(streams[0] + x) - streams[0]

        with plain.watching(lens.model, block, lambda x, count, s=streams: s.append(x)):
            by_hand = plain.edited(lens.model, ids, attn, added)
        found = run(lens, ids, InterventionSpec("post_attn_residual", plain.noisy, layer))
        assert plain.gap(found, by_hand) < 5e-6
        assert plain.gap(found, lens.model(ids).logits) > 1e-3


def test_the_models_logits(lens: LensAPI, ids: Tensor) -> None:
    """The site logits is what the head gives out: whatever the model does behind it follows."""
    untouched = lens.model(ids).logits
    found = run(lens, ids, InterventionSpec("logits", lambda x: x.roll(1, -1)))
    assert torch.equal(found, untouched.roll(1, -1))


def test_behind_the_head_comes_the_cap(tiny: Callable[..., Any], ids: Tensor) -> None:
    """Gemma 2 caps what an intervention makes of the head's scores, as it caps the scores."""
    model = tiny("gemma2", final_logit_softcapping=2.0)
    head: list[Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda module, args, out: head.append(out))
    model(ids)
    handle.remove()
    with apply_interventions(model, InterventionSpec("logits", lambda x: 3 * x)):
        found = model(ids).logits
    torch.testing.assert_close(found, 2 * torch.tanh(3 * head[0] / 2))


def test_a_layers_logits_go_nowhere(llama: LensAPI) -> None:
    """Logits read off a layer feed nothing: with a layer they are refused, and the message says what to do."""
    with (
        pytest.raises(InputError, match="intervene on 'block_output'"),
        llama.intervene(InterventionSpec("logits", torch.zeros_like, 0)),
    ):
        pass


def test_heads_side_by_side(tiny: Callable[..., Any], ids: Tensor) -> None:
    """At attn_o_proj_pre the transform is given all heads in one dimension; a head is a slice of it."""
    shapes: list[torch.Size] = []

    def without_head(x: Tensor) -> Tensor:
        shapes.append(x.shape)
        return torch.cat([x[..., :16], torch.zeros_like(x[..., 16:32]), x[..., 32:]], -1)

    lens = LensAPI(tiny("llama"))
    found = run(lens, ids, InterventionSpec("attn_o_proj_pre", without_head, -1))
    assert shapes == [(2, 9, 64)]
    lens.model.model.layers[1].self_attn.o_proj.weight[:, 16:32] = 0
    torch.testing.assert_close(found, lens.model(ids).logits)


@pytest.mark.parametrize("wrong", [lambda x: x.transpose(0, 1), lambda x: x[:, :1]])
def test_heads_of_a_wrong_shape(llama: LensAPI, ids: Tensor, wrong: Any) -> None:
    """At attn_o_proj_pre too, a tensor of another shape is refused."""
    message = r"site 'attn_o_proj_pre' of layer 0 returned .*the value there is \[2, 9, 64\]"
    with pytest.raises(HookValueError, match=message):
        run(llama, ids, InterventionSpec("attn_o_proj_pre", wrong, 0))


@pytest.mark.parametrize("site", ["block_output", "attn_o_proj_pre"])
def test_in_place(llama: LensAPI, ids: Tensor, site: str) -> None:
    """A transform that edits its tensor and returns nothing does the same as one that returns a new one."""

    def halve(x: Tensor) -> None:
        x *= 0.5

    in_place = run(llama, ids, InterventionSpec(site, halve, 0))
    assert torch.equal(in_place, run(llama, ids, InterventionSpec(site, lambda x: x * 0.5, 0)))
    assert not torch.equal(in_place, llama.model(ids).logits)


@pytest.mark.parametrize("site", ["mlp_output", "attn_o_proj_pre", "block_input"])
def test_all_layers(
    lens: LensAPI, which: tuple[str, str], places: Any, plain: Any, ids: Tensor, site: str
) -> None:
    """Without a layer the intervention is in each of them."""
    place = places.PLACES[which][site]
    with ExitStack() as stack:
        for i in (0, 1):
            see = lambda x, count: plain.noisy(x)  # noqa: E731
            stack.enter_context(plain.watching(lens.model, place.format(i=i), see))
        by_hand = lens.model(ids).logits
    assert torch.equal(run(lens, ids, InterventionSpec(site, plain.noisy)), by_hand)
    one = run(lens, ids, InterventionSpec(site, plain.noisy, 0))
    assert plain.gap(one, by_hand) > 1e-3


def test_all_layers_that_have_it(lens_of: Callable[..., LensAPI], plain: Any, ids: Tensor) -> None:
    """Without a layer the intervention is in the layers that have the site, as a trace is."""
    jamba = lens_of("jamba")
    by_hand = plain.edited(jamba.model, ids, "model.layers.1.self_attn", plain.noisy)
    assert torch.equal(run(jamba, ids, InterventionSpec("attn_output", plain.noisy)), by_hand)


def test_several_in_order(llama: LensAPI, plain: Any, ids: Tensor) -> None:
    """Interventions at one place apply one after the other, those at other places besides."""
    double = InterventionSpec("mlp_output", lambda x: 2 * x, 0)
    shift = InterventionSpec("mlp_output", lambda x: x + 1, 0)
    last = InterventionSpec("block_output", lambda x: x.flip(-1), -1)
    for specs, fn in (
        ((double, shift, last), lambda x: 2 * x + 1),
        ((last, shift, double), lambda x: 2 * (x + 1)),
    ):
        see = lambda x, count: x.flip(-1)  # noqa: E731
        with plain.watching(llama.model, "model.layers.1", see):
            by_hand = plain.edited(llama.model, ids, "model.layers.0.mlp", fn)
        assert torch.equal(run(llama, ids, *specs), by_hand)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("blocks.1.hook_resid_pre", None), ("hook_in", 1), ("raw:model.layers.0", None)],
)
def test_other_names(llama: LensAPI, plain: Any, ids: Tensor, name: str, layer: int | None) -> None:
    """Hook points are sites as they are for a trace: one tensor, whatever it is called."""
    by_hand = plain.edited(llama.model, ids, "model.layers.0", plain.noisy)
    assert torch.equal(run(llama, ids, InterventionSpec(name, plain.noisy, layer)), by_hand)


def test_pattern(llama: LensAPI, ids: Tensor) -> None:
    """A pattern that looks at the first token alone gives every position that token's value."""
    first = lambda x: torch.zeros_like(x).index_fill_(-1, torch.tensor(0), 1.0)  # noqa: E731
    with llama.intervene(InterventionSpec("pattern", first, 1)):
        trace = llama.trace(input_ids=ids, sites=["z", "v"], layers=1)
    value = trace.get("v", 1).repeat_interleave(2, 2)
    torch.testing.assert_close(trace.get("z", 1), value[:, :1].expand(2, 9, 4, 16))


def test_while_it_lasts(llama: LensAPI, plain: Any, ids: Tensor) -> None:
    """The bridge is yielded; its runs and the model's own are changed, as often as they come, and none after."""
    spec = InterventionSpec("mlp_output", plain.noisy, 0)
    by_hand = plain.edited(llama.model, ids, "model.layers.0.mlp", plain.noisy)
    untouched = llama.model(ids).logits
    with apply_interventions(llama.bridge, spec) as inner:
        assert inner is llama.bridge
        for _ in range(2):
            assert torch.equal(llama.model(ids).logits, by_hand)
            assert torch.equal(inner(ids), by_hand)
    assert torch.equal(llama.model(ids).logits, untouched)


def test_a_bare_model(tiny: Callable[..., nn.Module], plain: Any, ids: Tensor) -> None:
    """A model is wrapped; one spec needs no list, and an adapter is taken and not needed."""
    model = tiny("llama")
    spec = InterventionSpec("block_output", plain.noisy, 0)
    by_hand = plain.edited(model, ids, "model.layers.0", plain.noisy)
    for specs in (spec, [spec], iter([spec])):
        with apply_interventions(model, specs, adapter="ignored") as bridge:
            assert isinstance(bridge, TransformerBridge)
            assert torch.equal(model(ids).logits, by_hand)


def test_scores_and_generation_are_changed(llama: LensAPI, ids: Tensor) -> None:
    """What is scored and generated inside is the changed model's."""
    only_five = lambda x: torch.full_like(x, -50.0).index_fill_(-1, torch.tensor(5), 50.0)  # noqa: E731
    with llama.intervene(InterventionSpec("logits", only_five)):
        torch.testing.assert_close(
            llama.score(input_ids=ids).final_token_probs()[:, 5], torch.ones(2)
        )
        out = llama.model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out[:, 9:].tolist() == [[5, 5, 5]] * 2


# --- errors -------------------------------------------------------------------------------------------------

GOOD = InterventionSpec("mlp_output", torch.zeros_like)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (("mlp_outputs", 0), UnknownPointError, "nearest: mlp_output"),
        (("mlp_output", 2), LayerRangeError, "not one of this model's 2"),
        (("mlp_output", -3), LayerRangeError, "not one of this model's 2"),
        (("final_norm", 0), InputError, "is no layer's: leave the layer out"),
        (("blocks.0.hook_out", 0), InputError, "leave the layer out"),
        (("blocks.0.attn.q_norm.hook_out", None), AbsentPointError, "no point"),
    ],
)
def test_places_that_are_not_there(
    llama: LensAPI, ids: Tensor, spec: tuple[str, int | None], error: type[Exception], message: str
) -> None:
    """One bad spec among good ones is refused on entering; nothing was set, so the model runs as ever."""
    untouched = llama.model(ids).logits
    bad = InterventionSpec(spec[0], torch.zeros_like, spec[1])
    with pytest.raises(error, match=message), llama.intervene(GOOD, bad):
        pass
    assert torch.equal(llama.model(ids).logits, untouched)


def test_no_stream_between_parallel_branches(lens_of: Callable[..., LensAPI]) -> None:
    """Where attention and MLP run side by side there is nothing between them to change."""
    neox = lens_of("gpt_neox")
    with (
        pytest.raises(AbsentPointError, match="'post_attn_residual'"),
        neox.intervene(InterventionSpec("post_attn_residual", torch.zeros_like)),
    ):
        pass


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([GOOD, "mlp_output"], "an intervention is an InterventionSpec.*got 'mlp_output'"),
        ([GOOD, ("mlp_output", 0)], r"got \('mlp_output', 0\)"),
    ],
)
def test_what_is_no_spec(llama: LensAPI, specs: list[Any], message: str, unchecked: None) -> None:
    """Something else than a spec is refused and shown."""
    with pytest.raises(InputError, match=message), apply_interventions(llama.bridge, specs):
        pass


def test_what_is_no_function(llama: LensAPI, unchecked: None) -> None:
    """A transform must be a function."""
    spec = InterventionSpec("mlp_output", 0.5)
    with (
        pytest.raises(InputError, match="'mlp_output' is float, not a function"),
        llama.intervene(spec),
    ):
        pass


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: x[:, :1], r"'block_output' of layer 1 returned \[2, 1, 64\].* is \[2, 9, 64\]"),
        (lambda x: x.transpose(0, 1), r"layer 1 returned \[9, 2, 64\].* is \[2, 9, 64\]"),
        (lambda x: x.double(), r"blocks\.1\.hook_out.*torch\.float64.*torch\.float32"),
        (lambda x: 3, "'block_output' of layer 1 returned int, not a tensor"),
        (lambda x: x[0, 0].tolist(), "'block_output' of layer 1 returned list, not a tensor"),
    ],
)
def test_unfit_values(llama: LensAPI, ids: Tensor, wrong: Any, message: str) -> None:
    """A transform that gives another shape or dtype, or no tensor, is refused in the run, with the place."""
    with pytest.raises(HookValueError, match=message):
        run(llama, ids, InterventionSpec("block_output", wrong, 1))


def test_errors_in_a_transform(llama: LensAPI, ids: Tensor) -> None:
    """What a transform raises comes through."""

    def fail(x: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(llama, ids, InterventionSpec("block_output", fail))
