"""Generating with compiled models: hooks fire, the caller is told once, and what has no hooks stays compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig

from lensbridge import TransformerBridge


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


class Backend:
    """A compiler that changes nothing and counts: graphs made, and runs of them."""

    def __init__(self) -> None:
        self.graphs = 0
        self.runs = 0

    def __deepcopy__(self, memo: Any) -> Backend:
        return self  # transformers copies its settings, and this with them

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


@pytest.fixture
def backend() -> Backend:
    return Backend()


@pytest.fixture
def settings(backend: Backend) -> Any:
    """Settings with which transformers compiles on any device; by itself it does so on accelerators only."""
    config: Any = CompileConfig(backend=backend, fullgraph=False, mode=None)
    config._compile_all_devices = True
    return config


def ours(caught: Any) -> list[str]:
    """What lensbridge said; dynamo warns of its own matters."""
    texts = [str(warning.message) for warning in caught]
    return [text for text in texts if "compiled code passes hooks by" in text]


@pytest.mark.parametrize("how", ["module.compile", "torch.compile"])
def test_a_compiled_model(
    tiny: Any, generation: Any, backend: Backend, ids: Tensor, how: str
) -> None:
    """Tokens with hooks, with a cache and without are those of the bare model, though it ran compiled first."""
    given = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False}
    wanted = generation.greedy(tiny("mistral"), ids, 4, eos_token_id=159)
    model = tiny("mistral")
    steps: list[Any] = []
    hooks = [("blocks.1.hook_out", lambda x, hook: steps.append(hook.step.positions))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled: Any = model
        if how == "module.compile":
            model.compile(backend=backend)
        else:
            compiled = torch.compile(model, backend=backend)
        bridge = TransformerBridge(compiled)
        bridge(ids)
        assert backend.runs > 0
        assert torch.equal(bridge.generate(ids, **given), wanted)
        assert ours(caught) == []
        before = backend.runs
        for _ in range(2):
            with bridge.hooks(hooks):
                assert torch.equal(bridge.generate(ids, **given), wanted)
        out, cache = bridge.generate(ids, return_cache=True, **given)
        pieces = list(bridge.generate_stream(ids, 4, do_sample=False, stop_at_eos=False))
        assert torch.equal(out, wanted)
        assert torch.equal(torch.cat(pieces, dim=1), wanted)
        assert len(ours(caught)) == 1
    assert steps == [range(9), range(9, 10), range(10, 11), range(11, 12)] * 2
    _, again = TransformerBridge(tiny("mistral")).run_with_cache(out)
    assert generation.differing(cache, again) == {}
    # The stream had no hooks: it may run compiled. Nothing else did.
    after = backend.runs
    with warnings.catch_warnings(), bridge.hooks(hooks):
        warnings.simplefilter("ignore")
        bridge.generate(ids, **given)
    assert backend.runs == after
    assert torch.equal(bridge(ids), tiny("mistral")(ids).logits)
    assert backend.runs > after >= before


@pytest.mark.parametrize("cache", [False, True])
def test_transformers_compiles_by_itself(
    tiny: Any, generation: Any, backend: Backend, settings: Any, ids: Tensor, cache: bool
) -> None:
    """With a fixed store transformers compiles unasked: with hooks it is kept from it, without it is not."""
    wanted = generation.greedy(tiny("llama"), ids, 4)
    bridge = TransformerBridge(tiny("llama"))
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    options["cache_implementation"] = "static"
    options["compile_config"] = settings
    steps: list[Any] = []

    def edit(x: Tensor, hook: Any) -> None:
        steps.append(hook.step.number)

    def compiled_runs() -> int:
        before = backend.runs
        assert torch.equal(bridge.generate(ids, **options), wanted)
        return backend.runs - before

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert compiled_runs() >= 3
        assert ours(caught) == []
        runs = backend.runs
        for _ in range(2):
            if cache:
                out, kept = bridge.generate(ids, return_cache=True, **options)
            else:
                with bridge.hooks([("blocks.1.hook_out", edit)]):
                    out = bridge.generate(ids, **options)
            assert torch.equal(out, wanted)
        assert backend.runs == runs
        assert len(ours(caught)) == 1
        if cache:
            compiled_runs()  # transformers keeps the store, which has grown by the last token
        graphs = backend.graphs
        assert compiled_runs() >= 3
        assert backend.graphs == graphs
    if cache:
        _, again = bridge.run_with_cache(wanted)
        assert generation.differing(kept, again) == {}
    else:
        assert steps == [0, 1, 2, 3] * 2


def test_an_edit_where_transformers_compiles(
    tiny: Any, generation: Any, plain: Any, backend: Backend, settings: Any, ids: Tensor
) -> None:
    """An edit acts at every step though the steps had been compiled, as the same edit by a plain hook."""
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    bridge, bare = TransformerBridge(tiny("llama")), tiny("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bridge.generate(ids, compile_config=settings, **options)
        assert backend.runs > 0
        with bridge.hooks([("blocks.0.hook_out", lambda x, hook: x.roll(1, -1))]):
            found = bridge.generate(ids, compile_config=settings, **options)
    with plain.watching(bare, "model.layers.0", lambda x, count: x.roll(1, -1)):
        assert torch.equal(found, bare.generate(ids, **options))
    assert not torch.equal(found, bare.generate(ids, **options))
