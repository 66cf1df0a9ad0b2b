"""Zero residue: after booting and after any run, however it ended, the model is what it was."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _len_torch_function_stack


class BurstError(Exception):
    """What a hook raises on purpose."""


def burst(x: Tensor, hook: Any) -> None:
    raise BurstError(hook.name)


def interrupt(x: Tensor, hook: Any) -> None:
    raise KeyboardInterrupt


def clone(x: Tensor, hook: Any) -> Tensor:
    return x.clone()


def look(x: Tensor, hook: Any) -> None:
    pass


OPENED = "blocks.*.attn.hook_pattern"
"""Listening here opens every attention layer."""

MIDDLE = "blocks.0.hook_resid_mid"
"""An edit here is substituted until the block ends; parallel blocks have no such place."""


@pytest.fixture(autouse=True)
def _no_mode_for_the_next_test() -> Any:
    """A mode that one test finds open must not spoil those after it."""
    yield
    while _len_torch_function_stack():
        torch.overrides._pop_mode()


def a_run_of_everything(bridge: Any, ids: Tensor) -> None:
    bridge(ids)
    bridge.run_with_cache(ids, names_filter=lambda name: True)
    bridge.run_with_hooks(ids, fwd_hooks=[(lambda name: True, clone)])
    bridge.run_with_cache(ids, return_type="loss", incl_bwd=True)
    bridge.run_with_hooks(
        ids, bwd_hooks=[(lambda name: not name.endswith(("embed.hook_in", "emb.hook_in")), look)]
    )


def stopped(bridge: Any, ids: Tensor) -> None:
    for layer in (0, 1, 2, -1):
        bridge.run_with_cache(ids, stop_at_layer=layer)
        bridge.run_with_hooks(ids, fwd_hooks=[(OPENED, clone)], stop_at_layer=layer)


def started_late(bridge: Any, ids: Tensor) -> None:
    residual = bridge(ids, stop_at_layer=1)
    bridge.run_with_cache(residual, start_at_layer=1)
    bridge(residual, start_at_layer=1, stop_at_layer=2)
    bridge(residual, start_at_layer=1, stop_at_layer=1)
    with pytest.raises(BurstError):
        bridge.run_with_hooks(residual, start_at_layer=1, fwd_hooks=[("blocks.1.hook_in", burst)])
    with pytest.raises(KeyboardInterrupt):
        bridge.run_with_hooks(
            residual, start_at_layer=1, fwd_hooks=[("blocks.1.hook_in", interrupt)]
        )


def raising_everywhere(fn: Callable[..., None], error: type[BaseException]) -> Callable[..., None]:
    def act(bridge: Any, ids: Tensor) -> None:
        mid = [(MIDDLE, clone)] if MIDDLE in bridge.registry else []
        for name in bridge.registry:
            if name.startswith("blocks.1."):
                continue
            # Attention is open in every layer, the stream is being substituted, and then this point fails.
            with pytest.raises(error):
                bridge.run_with_hooks(ids, fwd_hooks=[*mid, (OPENED, clone), (name, fn)])
            assert _len_torch_function_stack() == 0, name

    return act


def interrupted_backward(bridge: Any, ids: Tensor) -> None:
    for error, fn in ((BurstError, burst), (KeyboardInterrupt, interrupt)):
        for name in ("blocks.0.attn.hook_pattern", "blocks.0.hook_out"):
            with pytest.raises(error), bridge.hooks(bwd_hooks=[(name, fn)]):
                bridge.run_with_cache(ids, return_type="loss", incl_bwd=True)


def refused(bridge: Any, ids: Tensor) -> None:
    for call in (
        lambda: bridge.run_with_cache(ids, names_filter="blocks.0.hook_nonsense"),
        lambda: bridge.run_with_hooks(
            ids, fwd_hooks=[("blocks.0.hook_out", clone), ("nowhere", clone)]
        ),
        lambda: bridge(ids, stop_at_layer=9),
        lambda: bridge(ids + 1000),
        lambda: bridge.run_with_hooks(
            ids, fwd_hooks=[("blocks.0.hook_out", lambda x, hook: x[:1])]
        ),
        lambda: bridge.run_with_hooks(ids, fwd_hooks=[("blocks.1.hook_in", clone)], nonsense=3),
        lambda: bridge(torch.tensor([[]], dtype=torch.long)),
    ):
        with pytest.raises(Exception, match=r".{20}"):
            call()


@pytest.mark.parametrize(
    "act",
    [
        a_run_of_everything,
        stopped,
        started_late,
        raising_everywhere(burst, BurstError),
        raising_everywhere(interrupt, KeyboardInterrupt),
        interrupted_backward,
        refused,
    ],
    ids=["success", "stop", "start", "error", "interrupt", "backward", "refused"],
)
def test_nothing_is_left(
    tiny: Any,
    family: str,
    tokenizer: Any,
    ids: Tensor,
    snapshot: Any,
    is_silent: Any,
    act: Callable[[Any, Tensor], None],
) -> None:
    """Before booting, after booting and after the run: the same modules, hooks, config, weights and modes."""
    from lensbridge import TransformerBridge

    model = tiny(family)
    before = snapshot(model)
    expected = model(ids).logits
    bridge = TransformerBridge(model, tokenizer)
    assert snapshot(model) == before
    act(bridge, ids)
    assert snapshot(model) == before
    assert is_silent(bridge)
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(bridge(ids), expected)


def test_hooks_go_with_their_listeners(
    bridge: Any, model: nn.Module, snapshot: Any, ids: Tensor
) -> None:
    """A listener that stays keeps the hooks of its own module, and they go when it goes."""
    before = snapshot(model)
    listener = bridge.get_hook_point("blocks.0.hook_out").add_hook(look)
    busy = [path for path, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    assert busy == [bridge.architecture.blocks[0].path]
    bridge(ids)
    with pytest.raises(BurstError):
        bridge.run_with_hooks(ids, fwd_hooks=[("blocks.0.hook_out", burst)])
    assert [path for path, m in model.named_modules() if m._forward_hooks] == busy
    listener.remove()
    assert snapshot(model) == before


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("error", [BurstError, KeyboardInterrupt])
def test_the_model_called_directly(
    fresh: Any, family: str, snapshot: Any, ids: Tensor, error: type[BaseException]
) -> None:
    """Hooks added to stay, and the model itself called (by a trainer, say): a failure leaves no mode open."""
    bridge = fresh(family)
    model = bridge.original_model
    before = snapshot(model)
    fn = burst if error is BurstError else interrupt
    bridge.add_hook(MIDDLE, clone)
    bridge.add_hook("blocks.0.attn.hook_pattern", fn)
    with pytest.raises(error):
        model(ids)
    bridge.reset_hooks()
    assert snapshot(model) == before
    with (
        pytest.raises(error),
        bridge.hooks(fwd_hooks=[(MIDDLE, clone), ("blocks.0.mlp.hook_post", fn)]),
    ):
        model(ids)
    assert snapshot(model) == before


# --- copies -----------------------------------------------------------------------------------------------


def test_weights_are_not_copied(tiny: Any, family: str) -> None:
    """The bridge hands out the model's own parameters, and there are no others."""
    from lensbridge import TransformerBridge

    model = tiny(family)
    held = {name: p.data_ptr() for name, p in model.named_parameters()}
    bridge = TransformerBridge(model)
    assert bridge.original_model is model
    assert {name: p.data_ptr() for name, p in bridge.named_parameters()} == held
    assert {name: t.data_ptr() for name, t in bridge.state_dict().items()} == {
        name: t.data_ptr() for name, t in model.state_dict().items()
    }
    assert all(
        one is other for one, other in zip(bridge.parameters(), model.parameters(), strict=True)
    )


def test_copies_and_files(bridge: Any, model: Any, ids: Tensor, tmp_path: Path) -> None:
    """deepcopy, torch.save and save_pretrained of a bridged model that has been run give the same model."""
    bridge.run_with_cache(ids)
    expected = model(ids).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(ids).logits, expected)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(again(ids).logits, expected)
    twin.zero_grad()
    for p in twin.parameters():
        p.data.zero_()
    assert torch.equal(bridge(ids), expected)


def test_a_copied_bridge_is_a_bridge_of_the_copy(fresh: Any, ids: Tensor) -> None:
    """copy.deepcopy(bridge) listens to its own model and not to the one it was copied from."""
    bridge = fresh("llama")
    bridge.run_with_cache(ids)
    twin = copy.deepcopy(bridge)
    for p in twin.parameters():
        p.data.mul_(0.5)
    _, cache = twin.run_with_cache(ids, names_filter="blocks.0.hook_out")
    assert torch.equal(
        cache["resid_post", 0], twin.original_model(ids, output_hidden_states=True).hidden_states[1]
    )
    assert not torch.equal(twin(ids), bridge(ids))


# --- two at once ------------------------------------------------------------------------------------------


def test_two_bridges_on_one_model(
    bridge: Any, model: nn.Module, snapshot: Any, byhand: Any, ids: Tensor
) -> None:
    """Scopes of two bridges on one model nest and interleave; each takes away its own."""
    from lensbridge import TransformerBridge

    before = snapshot(model)
    other = TransformerBridge(model)
    plain = bridge(ids)
    seen: list[str] = []

    def note(who: str) -> Callable[[Tensor, Any], None]:
        return lambda x, hook: seen.append(f"{who} {hook.name}")

    one = bridge.hooks(fwd_hooks=[(OPENED, note("one")), ("blocks.0.hook_out", note("one"))])
    two = other.hooks(fwd_hooks=[(OPENED, note("two")), ("blocks.0.hook_out", note("two"))])
    one.__enter__()
    two.__enter__()
    assert byhand.gap(model(ids).logits, plain) < 1e-5
    names = [f"blocks.{i}.attn.hook_pattern" for i in range(2)] + ["blocks.0.hook_out"]
    assert sorted(seen) == sorted(f"{who} {name}" for who in ("one", "two") for name in names)
    seen.clear()
    one.__exit__(None, None, None)  # the outer one first
    assert byhand.gap(bridge(ids), plain) < 1e-5
    assert sorted(seen) == sorted(f"two {name}" for name in names)
    two.__exit__(None, None, None)
    seen.clear()
    assert torch.equal(other(ids), plain)
    assert seen == []
    assert snapshot(model) == before


EDITED = [
    "blocks.0.hook_out",
    "blocks.0.attn.hook_q",
    "blocks.0.attn.hook_pattern",
    "blocks.0.attn.hook_attn_scores",
    MIDDLE,
    "blocks.0.mlp.hook_post",
]


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox_sequential"], indirect=True)
@pytest.mark.parametrize("name", EDITED)
def test_two_bridges_edit_one_point(
    bridge: Any, model: nn.Module, byhand: Any, ids: Tensor, name: str
) -> None:
    """Two edits of one place by two bridges act one after the other, as by one bridge."""
    from lensbridge import TransformerBridge

    other = TransformerBridge(model)
    half, shift = (name, lambda x, hook: x * 0.5), (name, lambda x, hook: x.roll(1, 1))
    expected = bridge.run_with_hooks(ids, fwd_hooks=[half, shift])  # the order does not matter here
    with bridge.hooks(fwd_hooks=[half]):
        logits = other.run_with_hooks(ids, fwd_hooks=[shift])
    assert byhand.gap(logits, expected) < 1e-5
    assert byhand.gap(logits, bridge.run_with_hooks(ids, fwd_hooks=[shift])) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2"], indirect=True)
@pytest.mark.parametrize("error", [BurstError, KeyboardInterrupt])
def test_two_bridges_and_a_failure(
    bridge: Any, model: nn.Module, snapshot: Any, ids: Tensor, error: type[BaseException]
) -> None:
    """A failure in one bridge's hook, while the other has the same layer open, ends both."""
    from lensbridge import TransformerBridge

    before = snapshot(model)
    other = TransformerBridge(model)
    plain = bridge(ids)
    fn = burst if error is BurstError else interrupt
    with pytest.raises(error), bridge.hooks(fwd_hooks=[(OPENED, clone), (MIDDLE, clone)]):
        other.run_with_hooks(
            ids, fwd_hooks=[(OPENED, clone), (MIDDLE, clone), ("blocks.0.mlp.hook_post", fn)]
        )
    assert snapshot(model) == before
    assert torch.equal(other(ids), plain)


def test_two_threads(fresh: Any, byhand: Any, ids: Tensor) -> None:
    """Two threads, each with its own bridge and model, edit and record at the same time without a mix-up."""
    bridges = [fresh("llama"), fresh("gpt2")]
    barrier = threading.Barrier(2)

    def work(bridge: Any, factor: float) -> list[Tensor]:
        found = []
        edits = [(OPENED, lambda x, hook: x * factor), (MIDDLE, lambda x, hook: x * factor)]
        with torch.no_grad():
            for _ in range(15):
                with bridge.hooks(fwd_hooks=edits):
                    logits, cache = bridge.run_with_cache(ids)
                found.append(
                    torch.cat([logits.flatten(), *(t.flatten().float() for t in cache.values())])
                )
        return found

    alone = [work(bridge, 0.5 + index)[0] for index, bridge in enumerate(bridges)]
    together: dict[int, Any] = {}

    def run(index: int) -> None:
        barrier.wait()
        try:
            together[index] = work(bridges[index], 0.5 + index)
        except BaseException as error:  # noqa: BLE001 - shown by the assertion below
            together[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert not isinstance(together[index], BaseException), together[index]
        assert all(torch.equal(found, alone[index]) for found in together[index])
    assert _len_torch_function_stack() == 0


# --- memory -----------------------------------------------------------------------------------------------


def test_a_bridge_can_be_thrown_away(tiny: Any, tokenizer: Any, ids: Tensor) -> None:
    """Nothing keeps a bridge alive but its user: not the model, not a module-level table."""
    from lensbridge import TransformerBridge

    model = tiny("llama")
    bridge = TransformerBridge(model, tokenizer)
    bridge.run_with_cache(ids)
    with pytest.raises(KeyboardInterrupt):
        bridge.run_with_hooks(ids, fwd_hooks=[(MIDDLE, clone), (OPENED, interrupt)])
    traces = [weakref.ref(bridge), weakref.ref(bridge.registry)]
    del bridge
    gc.collect()
    assert [trace() for trace in traces] == [None, None]
    trace = weakref.ref(model)
    del model
    gc.collect()
    assert trace() is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox"], indirect=True)
@pytest.mark.parametrize("ending", ["success", "error", "interrupt", "stop"])
def test_no_activation_is_kept(bridge: Any, ids: Tensor, ending: str) -> None:
    """After a run with every point edited, no value that a hook saw or made is still in memory."""
    traces: list[weakref.ref[Tensor]] = []

    def edit(x: Tensor, hook: Any) -> Tensor:
        new = x.clone()
        traces.extend((weakref.ref(x), weakref.ref(new)))
        return new

    last = {"error": burst, "interrupt": interrupt}.get(ending, look)
    stop = 1 if ending == "stop" else None
    with torch.no_grad():
        try:
            bridge.run_with_hooks(
                ids,
                fwd_hooks=[(lambda name: True, edit), ("blocks.0.mlp.hook_post", last)],
                stop_at_layer=stop,
                return_type=None,
            )
        except (BurstError, KeyboardInterrupt) as error:
            error.__traceback__ = None
            assert ending in ("error", "interrupt")
    gc.collect()
    kept = [t for trace in traces if (t := trace()) is not None and t is not ids]
    assert len(traces) > 20
    assert not kept
