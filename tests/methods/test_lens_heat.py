"""The logit lens against the bare model's own end, its parts against the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge.demo import tasks
from lensbridge.hooks import ArchitectureError, InputError, LayerRangeError
from lensbridge.methods.lenses import logit_lens

ENDS: dict[str, Any] = {
    "gpt2": ("transformer.h.{i}", lambda m, x: m.lm_head(m.transformer.ln_f(x))),
    "llama": ("model.layers.{i}", lambda m, x: m.lm_head(m.model.norm(x))),
    "granite": (
        "model.layers.{i}",
        lambda m, x: m.lm_head(m.model.norm(x)) / m.config.logits_scaling,
    ),
    "mamba": ("backbone.layers.{i}", lambda m, x: m.lm_head(m.backbone.norm_f(x))),
    "gemma2": (
        "model.layers.{i}",
        lambda m, x: (
            m.config.final_logit_softcapping
            * torch.tanh(m.lm_head(m.model.norm(x)) / m.config.final_logit_softcapping)
        ),
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_depths_by_hand(lens_of: Any, plain: Any, ids: Tensor, name: str) -> None:
    """Norm, head, scale and cap of the bare model, on what its own layers took and made."""
    lens, (layers, end) = lens_of(name), ENDS[name]
    target = ids.roll(-1, 1)
    found = logit_lens(lens.bridge, ids, target=target, top_k=4)
    assert found.labels == ("blocks.0.hook_in", "blocks.0.hook_out", "blocks.1.hook_out")
    places = [layers.format(i=0) + "<", *(layers.format(i=i) for i in (0, 1))]
    seen = plain.read(lens.model, ids, *places)
    with torch.no_grad():
        for depth, place in enumerate(places):
            log_probs = end(lens.model, seen[place][0]).log_softmax(-1)
            best = log_probs.sort(dim=-1, descending=True, stable=True)
            torch.testing.assert_close(found.top_log_probs[depth], best.values[..., :4])
            own = log_probs.gather(-1, target[..., None])[..., 0]
            torch.testing.assert_close(found.target_log_probs[depth], own)
            ranks = (best.indices == target[..., None]).float().argmax(-1)
            assert torch.equal(found.target_ranks[depth], ranks)
            assert torch.equal(found.top_tokens[depth, ..., 0], best.indices[..., 0])
        said = lens.model(ids).logits.argmax(-1)
    assert torch.equal(found.top_tokens[-1, ..., 0], said)
    assert torch.equal(found.target, target)


@pytest.mark.parametrize("which", [("bert", "masked"), ("t5", "seq2seq")], ids=lambda x: x[0])
def test_other_ends(lens_of: Any, places: Any, ids: Tensor, which: Any) -> None:
    """A masked language model's head, a decoder behind an encoder: the last depth is the model itself."""
    lens = lens_of(*which)
    given = places.keywords(which[1], ids)
    found = logit_lens(lens.bridge, given, target=9)
    with torch.no_grad():
        log_probs = lens.model(**given).logits.log_softmax(-1)
    torch.testing.assert_close(found.target_log_probs[-1], log_probs[..., 9])
    assert found.labels[0].endswith("blocks.0.hook_in")
    assert len(found.labels) == 3


def test_layers_and_positions(lens_of: Any) -> None:
    """Some layers, some positions from each row's own end; padding is told."""
    bridge = lens_of("gpt2").bridge
    texts = ["abcdef", "xyz"]
    whole = logit_lens(bridge, texts, target="c", padding_side="left")
    some = logit_lens(
        bridge, texts, target="c", layers=[-1, 0], positions=[-1, -2], padding_side="left"
    )
    assert some.labels == ("blocks.1.hook_out", "blocks.0.hook_out")
    assert [row[:2] for row in some.words] == [("f", "e"), ("z", "y")]
    torch.testing.assert_close(some.target_log_probs[0], whole.target_log_probs[2, :, [-1, -2]])
    torch.testing.assert_close(some.target_log_probs[1], whole.target_log_probs[1, :, [-1, -2]])
    width = whole.mask.shape[1]
    assert whole.mask.sum(1).tolist() == [width, width - 3]
    assert some.mask.all()
    right = logit_lens(bridge, texts, target="c", positions=-1, padding_side="right")
    torch.testing.assert_close(
        right.target_log_probs[..., 0], some_end(whole), atol=1e-4, rtol=1e-3
    )
    first = logit_lens(bridge, texts, positions=0, padding_side="right")
    assert [row[0] for row in first.words] == [bridge.to_str_tokens(x)[0] for x in texts]


def some_end(lens: Any) -> Tensor:
    return lens.target_log_probs[:, :, -1]


def test_targets(lens_of: Any, ids: Tensor) -> None:
    """An id, a string, one a row, one a place: the same numbers."""
    bridge = lens_of("gpt2").bridge
    a, b = (bridge.to_single_token(x) for x in "ab")
    found = [
        logit_lens(bridge, ids, target=target).target_log_probs
        for target in (["a", b], [a, b], torch.tensor([a, b]), torch.tensor([[a] * 9, [b] * 9]))
    ]
    for other in found[1:]:
        assert torch.equal(found[0], other)
    one = logit_lens(bridge, ids, target="a").target_log_probs
    assert torch.equal(one[:, 0], found[0][:, 0])
    assert logit_lens(bridge, ids).target_log_probs is None


def test_what_a_lens_says(lens_of: Any, ids: Tensor) -> None:
    """A line for each depth with its likeliest tokens behind the last real one."""
    lens = logit_lens(lens_of("gpt2").bridge, "abc")
    lines = repr(lens).splitlines()
    assert lines[0] == "LogitLens(1 x 4 positions; of the first row, after 'c':"
    assert [line.split()[0] for line in lines[1:]] == list(lens.labels)
    word, p = (
        lens.top_words("blocks.1.hook_out")[-1][0],
        float(lens.top_log_probs[2, 0, -1, 0].exp()),
    )
    assert f"{word!r} {p:.2f}" in lines[3]
    with pytest.raises(
        InputError, match=r"nothing was read at 'blocks\.7'; there are blocks\.0\.hook_in"
    ):
        lens.top_words("blocks.7")


def test_hooks_of_the_caller_count_once(lens_of: Any, ids: Tensor) -> None:
    """An edit changes the run that is read, and not the reading."""
    bridge = lens_of("gpt2").bridge
    calls = []

    def doubled(x: Tensor, hook: Any) -> Tensor:
        calls.append(1)
        return x * 2

    with bridge.hooks(fwd_hooks=[("ln_final.hook_out", doubled)]):
        found = logit_lens(bridge, ids, target=9)
    assert len(calls) == 1
    expected = logit_lens(bridge, ids, target=9)
    assert torch.equal(found.target_log_probs, expected.target_log_probs)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"layers": []}, InputError, "layers is empty"),
        ({"layers": 2}, LayerRangeError, "layer 2 is not one"),
        ({"positions": [9]}, InputError, r"positions \[9\]: rows have \[9, 9\] of 9, from 0"),
        ({"positions": [0.5]}, InputError, "positions are whole numbers"),
        ({"top_k": 0}, InputError, "top_k counts tokens"),
        ({"target": [1, 2, 3]}, InputError, "target must be a token id or 2 of them"),
        ({"target": torch.ones(2, 4).long()}, InputError, r"\[2, 9\], got \[2, 4\]"),
        ({"components": "neurons"}, InputError, "components is True, False or 'heads'"),
        ({"components": True, "layers": 1}, InputError, "leave layers out"),
    ],
)
def test_refusals(
    lens_of: Any, left_alone: Any, ids: Tensor, options: Any, kind: Any, message: str
) -> None:
    """What was given, what was expected."""
    with left_alone(lens_of("gpt2")) as lens, pytest.raises(kind, match=message):
        logit_lens(lens.bridge, ids, **options)


def test_models_without_predictions(
    lens_of: Any, new_classifier: Any, tiny: Any, ids: Tensor
) -> None:
    """No head, or a head that says one thing of a text: refused with the reason."""
    from lensbridge import TransformerBridge

    with pytest.raises(InputError, match="BertForSequenceClassification are "):
        logit_lens(TransformerBridge(new_classifier()), ids)
    with pytest.raises(InputError, match="head"):
        logit_lens(TransformerBridge(tiny("gpt2").transformer), ids)


# --- parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("components", [True, "heads"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "granite", "gemma2", "gpt_neox", "olmo2"])
def test_parts_sum_to_the_logits(lens_of: Any, ids: Tensor, name: str, components: Any) -> None:
    """The logits of all parts sum to what the head makes, less its bias: read back from log-probabilities."""
    lens = lens_of(name)
    found = logit_lens(lens.bridge, ids, components=components, top_k=160)
    # All tokens of the vocabulary, in their order; each part up to a constant.
    order = found.top_tokens.argsort(-1)
    logits = found.top_log_probs.gather(-1, order).sum(0)
    with torch.no_grad(), lens.bridge.hooks() as scope:
        held: dict[str, Tensor] = {}
        scope.observe([lens.bridge.registry["unembed.hook_out"]], lambda x, hook: held.update(x=x))
        lens.bridge(ids)
    scale = lens.bridge.architecture.logit_scale or 1.0
    expected = held["x"] * scale
    torch.testing.assert_close(
        logits - logits.mean(-1, keepdim=True),
        expected - expected.mean(-1, keepdim=True),
        atol=2e-3,
        rtol=1e-3,
    )
    heads = [label for label in found.labels if "hook_result" in label]
    assert len(heads) == (8 if components == "heads" else 0)


def test_a_part_by_hand(lens_of: Any, plain: Any, ids: Tensor) -> None:
    """An MLP's output divided by the scale the final norm had for the whole, through the head."""
    lens = lens_of("llama")
    found = logit_lens(lens.bridge, ids, target=9, components=True)
    seen = plain.read(lens.model, ids, "model.layers.1.mlp", "model.norm<")
    whole = seen["model.norm<"][0]
    with torch.no_grad():
        scale = (whole.square().mean(-1, keepdim=True) + lens.model.config.rms_norm_eps).sqrt()
        part = seen["model.layers.1.mlp"][0] / scale * lens.model.model.norm.weight
        expected = lens.model.lm_head(part).log_softmax(-1)[..., 9]
    depth = found.labels.index("blocks.1.hook_mlp_out")
    torch.testing.assert_close(found.target_log_probs[depth], expected)
    with pytest.raises(ArchitectureError, match="more than one linear map"):
        logit_lens(lens_of("bert", "masked").bridge, ids, components=True)


# --- the demo model -----------------------------------------------------------------------------------------


def test_the_demo_says_the_capital_early(demo_lens: Any) -> None:
    """Of 48 capitals in 8 questions: the model says all, and most already before its last layer."""
    frames = [frame for frame in tasks.CAPITAL_FRAMES if frame.answer == "capital"]
    asked = [(f.prompt(land), f" {city}") for f in frames for land, city in tasks.CAPITALS.items()]
    prompts, answers = zip(*asked, strict=True)
    lens = logit_lens(demo_lens.bridge, list(prompts), target=list(answers), positions=-1)
    first = (lens.target_ranks[..., 0] == 0).float().view(5, len(frames), -1)
    assert lens.labels[3] == "blocks.2.hook_out"  # what the last of the four layers reads
    assert first[4].mean() == 1.0
    assert first[3].mean() > 0.6  # 0.65
    assert first[:3].max(0).values.mean() < 0.05
    assert (first[3].mean(0) > 0.5).float().mean() > 0.5  # capitals that most questions bring out
