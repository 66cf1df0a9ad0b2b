"""Every architecture that writes: tokens and block outputs are those of Hugging Face's own loop.

What a block shows during a generation is held against plain PyTorch hooks on the block while the model generates
alone. Every exception is listed with the reason; a name that is no longer one must leave its list.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

pytestmark = pytest.mark.sweep

CONFIGS = json.loads((Path(__file__).parents[1] / "tiny_configs.json").read_text())
KINDS = ("causal", "seq2seq", "vlm", "speech")
ENTRIES = [(kind, name) for kind in KINDS for name in sorted(CONFIGS[kind])]
NEW = 4
FLOAT = 1e-4

REFUSED = {
    ("causal", "musicgen"): "unsupported operand type(s) for *: 'Tensor' and 'NoneType'",
    ("causal", "musicgen_melody"): "unsupported operand type(s) for *: 'Tensor' and 'NoneType'",
    ("causal", "reformer"): "number of subscripts in the equation",
    ("speech", "kyutai_speech_to_text"): "'NoneType' object has no attribute 'shape'",
    ("speech", "pop2piano"): "`composer_to_feature_token` was not found",
    ("speech", "vibevoice"): "requires `diffusers`",
    ("speech", "voxtral_realtime"): "Input length of input_ids is 8, but `max_length` is set to 8",
    ("vlm", "qwen2_5_omni_thinker"): "no attribute 'vision_start_token_id'",
    ("vlm", "qwen3_omni_moe_thinker"): "no attribute 'vision_start_token_id'",
}
"""What transformers itself does not generate with, on a tiny model and these inputs, and what it says."""

ELSEWHERE = {
    ("causal", "blt"): "blocks run on patches of bytes, whose number is another",
    ("causal", "cpmant"): "positions of its own stand before the text",
    ("causal", "prophetnet"): "three streams, of which two predict further ahead, lie side by side",
    (
        "seq2seq",
        "prophetnet",
    ): "three streams, of which two predict further ahead, lie side by side",
    (
        "causal",
        "rwkv",
    ): "from kept states of several rows, transformers makes a position of each row",
    (
        "causal",
        "xlnet",
    ): "its modules return [pos, batch, d_model], and read a mask and two tokens again",
    (
        "vlm",
        "gemma3n",
    ): "four streams of one row are taken for an image: the last step alone is kept",
    ("vlm", "git"): "the image stands before the text in the stream",
}
"""What cannot be compared by position, or is left out of the cache."""


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Annotations are enforced wherever else models are wrapped; here that would take most of the time.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    # Architectures warn of their own matters: deprecated options, slow paths.
    with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng([]):
        warnings.simplefilter("ignore")
        yield


def given(model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Keywords of ``generate``: the entry's own inputs, or three prompts."""
    made: dict[str, Any] = dict(inputs)
    if not made:
        seed = torch.Generator().manual_seed(0)
        made["input_ids"] = torch.randint(3, 100, (3, 8), generator=seed)
    if model.config.is_encoder_decoder:
        made["decoder_start_token_id"] = 0
    return {**made, "max_new_tokens": NEW, "do_sample": False}


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def by_hand(model: Any, paths: list[str], options: dict[str, Any]) -> tuple[Tensor, Any]:
    """The model's own answer; for each block, its output in each pass."""
    passes: list[dict[str, list[Tensor]]] = [{}]
    loops = [m for m in model.modules() if hasattr(m, "prepare_inputs_for_generation")]

    def begin(module: Any, args: Any) -> None:
        if passes[-1]:
            passes.append({})

    def keep(path: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, args: Any, out: Any) -> None:
            passes[-1].setdefault(path, []).append(first(out).clone())

        return hook

    handles = [module.register_forward_pre_hook(begin) for module in loops]
    handles += [model.get_submodule(path).register_forward_hook(keep(path)) for path in set(paths)]
    try:
        wanted = model.generate(**options)
    finally:
        for handle in handles:
            handle.remove()
    # A module that runs several times a pass is as many blocks.
    nth = [paths[:index].count(path) for index, path in enumerate(paths)]
    return wanted, [[seen[p][n] for seen in passes] for p, n in zip(paths, nth, strict=True)]


def joined(values: list[Tensor], dim: int) -> Tensor:
    """What the passes showed of each position."""
    widths = [value.shape[dim] for value in values]
    if widths[1] == widths[0] + 1:
        return values[-1]  # the whole text is read again at each step
    return torch.cat(values, dim)


def differing(bridge: Any, cache: Any, seen: Any) -> str:
    """Where block outputs of a live cache are not those seen by hand; empty if nowhere."""
    wrong = []
    for index, values in enumerate(seen):
        name = f"{bridge.architecture.main.prefix}blocks.{index}.hook_out"
        if name not in cache:
            wrong.append(f"{name}: {cache.left_out.get(name, 'absent')}")
            continue
        value, dim = cache[name], bridge.registry[name].axes.split().index("pos")
        wanted = joined(values, dim)
        if value.shape[dim] != wanted.shape[dim] + 1:  # the last token is in the cache only
            wrong.append(f"{name}: {list(value.shape)} where {list(wanted.shape)} was seen")
            continue
        gap = (value.narrow(dim, 0, wanted.shape[dim]) - wanted).abs().max() / wanted.abs().max()
        if not gap <= FLOAT:
            wrong.append(f"{name}: {gap:.1e}")
    return "; ".join(wrong)


@pytest.mark.parametrize(("kind", "name"), ENTRIES, ids=lambda part: part)
def test_generation(
    tiny: Callable[..., nn.Module],
    inputs_of: Callable[..., dict[str, Tensor]],
    kind: str,
    name: str,
) -> None:
    """The same tokens with no hooks, with a hook on every point and with a cache; its blocks as by hand."""
    from lensbridge import TransformerBridge

    model: Any = tiny(name, kind)
    inputs = inputs_of(name, kind)
    bridge = TransformerBridge(model, example=inputs or None)
    options = given(model, inputs)
    paths = [block.path for block in bridge.architecture.blocks]
    try:
        wanted, seen = by_hand(model, paths, options)
    except Exception as error:
        if REFUSED.get((kind, name), "not listed") in str(error):
            return
        raise
    assert (kind, name) not in REFUSED, "refused no longer: take it off the list"
    assert all(len(values) == NEW for values in seen)
    assert torch.equal(bridge.generate(**options), wanted)
    heard: set[str] = set()
    with bridge.hooks([(None, lambda x, hook: heard.add(hook.name))]):
        assert torch.equal(bridge.generate(**options), wanted)
    assert len(heard) > len(paths)
    out, cache = bridge.generate(**options, return_cache=True, names_filter="**.hook_out")
    assert torch.equal(out, wanted)
    try:
        why = differing(bridge, cache, seen)
    except (RuntimeError, ValueError) as error:  # axes of another kind
        why = str(error)
    if (kind, name) in ELSEWHERE:
        assert why, "an exception no longer: take it off the list"
    else:
        assert not why, why
