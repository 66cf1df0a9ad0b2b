"""return_cache: which positions and points are kept, and where; what a generation leaves behind; ids and mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import HookNotFiredError, InputError, TransformerBridge

KEPT = ["**.hook_out", "**.hook_pattern"]


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def bridge(wrapped: Callable[[str], TransformerBridge]) -> TransformerBridge:
    """A bridge around a tiny Llama, shared; no test here leaves anything on it."""
    return wrapped("llama")


@pytest.fixture
def model(bridge: TransformerBridge) -> Any:
    """The model of `bridge`."""
    return bridge.original_model


@pytest.fixture
def cached(bridge: TransformerBridge, ids: Tensor) -> Callable[..., Any]:
    """``cached(names_filter=...)``: the cache of five greedy tokens behind nine; [2, 14]."""

    def run(**given: Any) -> Any:
        options = {"max_new_tokens": 5, "do_sample": False, "names_filter": KEPT, **given}
        return bridge.generate(ids, return_cache=True, **options)[1]

    return run


def same(cache: Any, wanted: Any) -> bool:
    """Whether two caches hold the same points with the same values."""
    return set(cache) == set(wanted) and all(torch.equal(cache[k], wanted[k]) for k in wanted)


# --- positions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what",
    [
        0,
        12,
        -1,
        -5,
        slice(3, 11),
        slice(-4, None),
        slice(9, None),
        slice(None, None, 3),
        slice(2, -3),
        slice(-8, -6),
        (1, 12, 4),
        (4, 6),
        [0, 5, -2],
        [13, 2, 2],
        torch.tensor([-1, 4]),
    ],
    ids=str,
)
def test_pos_slice(cached: Any, what: Any) -> None:
    """Positions are counted over prompt and answer; what is kept is what cutting the whole cache keeps."""
    cache, wanted = cached(pos_slice=what), cached().apply_slice_to_pos_dim(what)
    assert same(cache, wanted)
    assert torch.equal(cache.tokens, wanted.tokens)
    assert torch.equal(cache.mask, wanted.mask)
    assert len(wanted) > 20


def test_pos_slice_of_what_was_read_again(cached: Any) -> None:
    """Without keys and values kept, the last pass counts, also for a slice."""
    for what in (-2, slice(4, 12), [0, 13]):
        cache = cached(pos_slice=what, use_past_kv_cache=False)
        assert same(cache, cached(use_past_kv_cache=False).apply_slice_to_pos_dim(what))


def test_little_is_held(cached: Any, bridge: Any, ids: Tensor) -> None:
    """A slice of one position is stored as one position, not as a view of the whole prompt."""
    cache = cached(pos_slice=[3])
    for name, value in cache.items():
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), name


def test_no_positions(cached: Any) -> None:
    """An empty list keeps none, as an empty list of names does."""
    assert cached(pos_slice=[])["resid_post", 0].shape == (2, 0, 64)


@pytest.mark.parametrize("what", [14, -15, [3, 14], True, "last"])
def test_slices_that_are_none(cached: Any, what: Any) -> None:
    """Positions outside the text, and things that are no slice."""
    with pytest.raises(InputError, match=r"outside (the|a text of at most) 14 |a slice is None"):
        cached(pos_slice=what)


# --- points -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "count"),
    [
        ("blocks.1.hook_out", 1),
        ("blocks.*.hook_resid_post", 2),
        (lambda name: name.endswith("hook_pattern"), 2),
        (["blocks.0.hook_in", "unembed.hook_out"], 2),
        ([], 0),
    ],
    ids=["name", "alias", "predicate", "list", "nothing"],
)
def test_names_filter(cached: Any, generation: Any, names: Any, count: int) -> None:
    """A name, an alias, a predicate, a list, nothing: those points, with the values of the whole cache."""
    # The whole cache opens attention; with the kernel closed the same values differ by rounding.
    cache, whole = cached(names_filter=names), cached(names_filter=None)
    assert len(cache) == count
    assert all(generation.gap(value, whole[name]) < 1e-5 for name, value in cache.items())
    assert torch.equal(cache.tokens, whole.tokens)


def test_order(bridge: Any, generation: Any, ids: Tensor) -> None:
    """Points come in the order in which a plain run passes them."""
    given = {"max_new_tokens": 2, "names_filter": generation.everything}
    _, cache = bridge.generate(ids, return_cache=True, **given)
    assert list(cache) == list(bridge.run_with_cache(ids, names_filter=generation.everything)[1])


@pytest.mark.parametrize(
    "given", [{"names_filter": "blocks.0.hook_out"}, {"device": "cpu"}, {"pos_slice": 0}], ids=str
)
def test_what_to_keep_without_keeping(bridge: Any, ids: Tensor, given: Any) -> None:
    """Options of the cache without a cache are a mistake, and say so."""
    with pytest.raises(InputError, match=f"{next(iter(given))} says what to keep.*return_cache"):
        bridge.generate(ids, max_new_tokens=2, **given)


def test_default_points(cached: Any, bridge: Any, ids: Tensor) -> None:
    """Without a filter: what run_with_cache keeps without one; what multiplies memory only by name."""
    default = set(bridge.run_with_cache(ids)[1])
    assert set(cached(names_filter=None)) == default
    wide = "blocks.0.attn.hook_result"
    assert wide not in default
    cache = cached(names_filter=[wide, "blocks.0.hook_attn_out"])
    bias = bridge.original_model.model.layers[0].self_attn.o_proj.bias
    assert bias is None
    torch.testing.assert_close(
        cache[wide].sum(2), cache["blocks.0.hook_attn_out"], rtol=1e-5, atol=1e-5
    )


def test_a_point_that_no_step_passed(tiny: Any, inputs_of: Any) -> None:
    """Asked for by name and never reached: the images were not given."""
    given = inputs_of("llava", "vlm")
    bridge = TransformerBridge(tiny("llava", "vlm"), example=given)
    text = torch.randint(8, 60, (1, 5), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 2, "do_sample": False, "return_cache": True}
    with pytest.raises(HookNotFiredError, match="vision_blocks"):
        bridge.generate(text, names_filter="vision_blocks.0.hook_out", **options)
    _, cache = bridge.generate(text, **options)
    assert "blocks.0.hook_out" in cache
    assert not any(name.startswith("vision_") for name in cache)


# --- where to ---------------------------------------------------------------------------------------------


def test_device(cached: Any) -> None:
    """The cache is kept there; the run stays where it is."""
    assert same(cached(device="cpu"), cached())
    meta = cached(device="meta")
    assert {value.device.type for value in meta.values()} == {"meta"}
    assert {name: value.shape for name, value in meta.items()} == {
        name: value.shape for name, value in cached().items()
    }


@pytest.mark.parametrize("given", [{}, {"device": "cpu"}, {"pos_slice": slice(0, 11)}], ids=str)
def test_values_are_the_caches_own(bridge: Any, ids: Tensor, given: Any) -> None:
    """Hooks that edit in place at a later step do not reach what was kept at an earlier one."""
    held: list[Tensor] = []

    def spoil(x: Tensor, hook: Any) -> None:
        for old in held:
            old.fill_(99.0)
        held.append(x)

    options = {"max_new_tokens": 4, "do_sample": False, "names_filter": "blocks.0.hook_out"}
    _, wanted = bridge.generate(ids, return_cache=True, **options)
    with bridge.hooks([("blocks.0.hook_out", spoil)]):
        _, cache = bridge.generate(ids, return_cache=True, **options, **given)
    whole = wanted["resid_post", 0][:, : cache["resid_post", 0].shape[1]]
    # Each piece is what was there when it passed; only the last ones were never spoiled.
    assert torch.equal(cache["resid_post", 0][:, -1], whole[:, -1])
    assert torch.equal(cache["resid_post", 0], whole)


def test_sink(bridge: Any, cached: Any, ids: Tensor) -> None:
    """Every piece with its positions, as soon as it is there; joined they are the cache, which stays empty."""
    whole = cached()
    pieces: dict[str, list[Any]] = {}
    numbers: list[int] = []

    def take(name: str, value: Tensor, positions: Any) -> None:
        pieces.setdefault(name, []).append((positions, value))

    def hear(x: Tensor, hook: Any) -> None:
        # The pieces of a step are there before the next step begins.
        numbers.append(hook.step.number)
        done = {len(found) for name, found in pieces.items() if name.startswith("blocks")}
        assert done <= {hook.step.number}

    options = {"max_new_tokens": 5, "do_sample": False, "names_filter": KEPT}
    with bridge.hooks([("blocks.0.hook_in", hear)]):
        out, cache = bridge.generate(ids, sink=take, return_cache=True, **options)
    assert numbers == [0, 1, 2, 3, 4, 5]
    assert len(cache) == 0
    assert torch.equal(cache.tokens, out)
    assert set(pieces) == set(whole)
    for name, found in pieces.items():
        assert [list(p) for p, _ in found] == [list(range(9)), [9], [10], [11], [12], [13]]
        if not name.endswith("pattern"):
            assert torch.equal(torch.cat([value for _, value in found], dim=1), whole[name])
    pieces.clear()
    assert torch.equal(bridge.generate(ids, sink=take, **options), out)
    assert set(pieces) == set(whole)


def test_sink_and_slice(bridge: Any, cached: Any, ids: Tensor) -> None:
    """Positions that are not wanted are not handed over."""
    taken: list[Any] = []
    bridge.generate(
        ids,
        max_new_tokens=5,
        do_sample=False,
        names_filter=KEPT,
        pos_slice=slice(7, 11),
        sink=lambda name, value, positions: taken.append((name, list(positions), value)),
    )
    here = [(positions, value) for name, positions, value in taken if name == "blocks.1.hook_out"]
    assert [positions for positions, _ in here] == [[7, 8], [9], [10]]
    joined = torch.cat([value for _, value in here], dim=1)
    assert torch.equal(joined, cached()["resid_post", 1][:, 7:11])


def test_sink_of_another_tower(tiny: Any, ids: Tensor) -> None:
    """What an encoder shows comes once, whole, and at no positions of the text that is written."""
    bridge = TransformerBridge(tiny("t5", "seq2seq"))
    taken: list[Any] = []
    bridge.generate(
        ids,
        max_new_tokens=2,
        decoder_start_token_id=0,
        names_filter=["encoder_blocks.1.hook_out", "decoder_blocks.1.hook_out"],
        sink=lambda name, value, positions: taken.append((name[:7], value.shape[1], positions)),
    )
    assert taken == [("encoder", 9, None), *(("decoder", 1, range(k, k + 1)) for k in range(3))]


# --- what is left behind ----------------------------------------------------------------------------------


HOW = ["generate", "cache", "sink", "hf_generate", "stream"]


# The last token, in step 5, is read for a cache only.
@pytest.mark.parametrize(
    ("how", "step"),
    [*((how, step) for how in HOW for step in (0, 2)), ("cache", 5), ("sink", 5)],
)
def test_a_hook_that_fails(
    bridge: Any, model: Any, ids: Tensor, snapshot: Any, is_silent: Any, step: int, how: str
) -> None:
    """At whichever step: the error comes out, and model, registry and clock are as before."""
    before = snapshot(model)
    wanted = model.generate(ids, max_new_tokens=5, do_sample=False)

    def fail(x: Tensor, hook: Any) -> None:
        if hook.step.number == step:
            raise RuntimeError("boom")

    given = {"max_new_tokens": 5, "do_sample": False}
    calls: dict[str, Callable[[], Any]] = {
        "generate": lambda: bridge.generate(ids, **given),
        "cache": lambda: bridge.generate(ids, return_cache=True, **given),
        "sink": lambda: bridge.generate(ids, sink=lambda name, x, step: None, **given),
        "hf_generate": lambda: bridge.hf_generate(ids, **given),
        "stream": lambda: list(bridge.generate_stream(ids, **given)),
    }
    with (
        bridge.hooks([("blocks.1.attn.hook_pattern", fail)]),
        pytest.raises(RuntimeError, match="boom"),
    ):
        calls[how]()
    assert snapshot(model) == before
    assert is_silent(bridge)
    assert bridge.registry.clock.main is None
    assert bridge.registry.clock.others == {}
    assert torch.equal(bridge.generate(ids, **given), wanted)


@pytest.mark.parametrize("name", ["gpt2", "llama", "jamba"])
def test_nothing_is_left(
    wrapped: Any, ids: Tensor, snapshot: Any, is_silent: Any, name: str
) -> None:
    """After a generation with everything on, the model is what it was, the generation's settings too."""
    bridge = wrapped(name)
    before = snapshot(bridge.original_model)
    settings = bridge.original_model.generation_config.to_dict()
    bridge.generate(
        ids, max_new_tokens=3, return_cache=True, freq_penalty=1.0, temperature=0.7, top_p=0.9
    )
    assert snapshot(bridge.original_model) == before
    assert bridge.original_model.generation_config.to_dict() == settings
    assert is_silent(bridge)
    assert bridge.registry.clock.main is None


@pytest.mark.parametrize("cache", [False, True])
def test_hooks_are_attached_once(
    bridge: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch, cache: bool
) -> None:
    """PyTorch's hooks are set before the first step and not again at any other, however many there are."""
    count = [0]
    for name in ("register_forward_hook", "register_forward_pre_hook"):
        own = getattr(nn.Module, name)

        def counting(module: Any, *args: Any, own: Any = own, **kwargs: Any) -> Any:
            count[0] += 1
            return own(module, *args, **kwargs)

        monkeypatch.setattr(nn.Module, name, counting)
    counts = []
    for n in (1, 6):
        count[0] = 0
        with bridge.hooks([("blocks.*.hook_out", lambda x, hook: None)]):
            bridge.generate(
                ids,
                max_new_tokens=n,
                do_sample=False,
                stop_at_eos=False,
                **({"return_cache": True, "names_filter": "**.hook_out"} if cache else {}),
            )
        counts.append(count[0])
    assert counts[0] == counts[1] > 1


@pytest.mark.parametrize("cache", [False, True])
def test_a_run_inside_a_step(bridge: Any, model: Any, ids: Tensor, cache: bool) -> None:
    """A hook may run the bridge; it has its own step, and the generation goes on at its own."""
    inside: list[Any] = []
    steps: list[int] = []

    def outer(x: Tensor, hook: Any) -> None:
        if inside and inside[-1] is None:
            return  # the run below passes here too
        at = hook.step
        steps.append(at.number)
        if at.number == 2:
            inside.append(None)
            inner = [("blocks.1.hook_in", lambda y, point: inside.append(point.step.positions))]
            logits = bridge.run_with_hooks(ids[:, :4], fwd_hooks=inner)
            assert torch.equal(logits, wanted)
            assert hook.step == at

    wanted = bridge(ids[:, :4])
    tokens = model.generate(ids, max_new_tokens=5, do_sample=False)
    given: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    if cache:
        given |= {"return_cache": True, "names_filter": "blocks.1.mlp.hook_out"}
    with bridge.hooks([("blocks.0.hook_out", outer)]):
        out = bridge.generate(ids, **given)
    assert torch.equal(out[0] if cache else out, tokens)
    assert inside == [None, range(4)]
    assert steps == [0, 1, 2, 3, 4, 5][: 5 + cache]


# --- ids and mask -----------------------------------------------------------------------------------------


@pytest.fixture
def padded(bridge: Any, generation: Any) -> Any:
    """The cache of three tokens behind three prompts padded in front; [3, 11]."""
    ids, mask = generation.prompts()
    given = {"max_new_tokens": 3, "do_sample": False, "names_filter": KEPT}
    return bridge.generate(ids, attention_mask=mask, return_cache=True, **given)[1]


def test_ids_and_mask_are_cut_with_the_values(padded: Any) -> None:
    """Slices of positions and rows cut what belongs to them, an index drops the dimension."""
    tokens, mask = padded.tokens, padded.mask
    assert tokens.shape == mask.shape == (3, 11)
    assert not mask.all()
    for what in (slice(2, 9), [0, -1], (1, 11, 2), 4):
        cut = padded.apply_slice_to_pos_dim(what)
        index = slice(*what) if isinstance(what, tuple) else what
        assert torch.equal(cut.tokens, tokens[:, index])
        assert torch.equal(cut.mask, mask[:, index])
        assert torch.equal(cut["resid_post", 1], padded["resid_post", 1][:, index])
    for rows in (slice(1, 3), [2, 0], 1):
        cut = padded.apply_slice_to_batch_dim(rows)
        assert torch.equal(cut.tokens, tokens[rows])
        assert torch.equal(cut.mask, mask[rows])
        assert torch.equal(cut["resid_post", 1], padded["resid_post", 1][rows])
    both = padded.apply_slice_to_batch_dim(0).apply_slice_to_pos_dim(slice(3, None))
    assert torch.equal(both.tokens, tokens[0, 3:])
    assert torch.equal(both.mask, mask[0, 3:])
    assert both.mask.all()


def test_ids_and_mask_without_a_batch_dimension(padded: Any) -> None:
    """remove_batch_dim takes it from them too."""
    single = padded.apply_slice_to_batch_dim([1])
    tokens, mask = single.tokens, single.mask
    single.remove_batch_dim()
    assert torch.equal(single.tokens, tokens[0])
    assert torch.equal(single.mask, mask[0])
    assert single["resid_post", 0].shape == (11, 64)
    cut = single.apply_slice_to_pos_dim(-1)
    assert cut.tokens.shape == cut.mask.shape == ()
    assert cut.tokens == tokens[0, -1]


def test_ids_and_mask_move_and_keep_their_type(padded: Any) -> None:
    """to() moves them with the values; a dtype is one for values."""
    assert padded.to(dtype=torch.float16).tokens.dtype == torch.long
    assert padded["resid_post", 0].dtype == torch.float16
    padded.to("meta")
    assert padded.tokens.device.type == padded.mask.device.type == "meta"
