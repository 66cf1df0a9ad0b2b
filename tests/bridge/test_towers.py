"""Models with more than one stack of layers, or another than a causal one: encoders, decoders, vision, sound.

Every value is compared with what plain PyTorch hooks read in the bare model, every edit with the same edit by
plain hooks, every pattern with the attentions Hugging Face reports under eager.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lensbridge import InputError, LensError, TransformerBridge

FLOAT = 5e-6
_BART = {
    "encoder": "model.encoder.layers",
    "decoder": "model.decoder.layers",
    "attn": "self_attn",
    "cross": "encoder_attn",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "out_proj",
    "down": "fc2",
}
SEQ2SEQ: dict[str, dict[str, str]] = {
    "t5": {
        "encoder": "encoder.block",
        "decoder": "decoder.block",
        "attn": "layer.0.SelfAttention",
        "cross": "layer.1.EncDecAttention",
        "q": "q",
        "k": "k",
        "v": "v",
        "o": "o",
        "down": "layer.2.DenseReluDense.wo",
    },
    "bart": _BART,
    "marian": _BART,
    "whisper": _BART,
    "t5gemma": {**_BART, "cross": "cross_attn", "o": "o_proj", "down": "mlp.down_proj"},
}
MASKED = {
    # name -> (layers, attention's output projection in one)
    "bert": ("bert.encoder.layer", "attention.output.dense"),
    "roberta": ("roberta.encoder.layer", "attention.output.dense"),
    "modernbert": ("model.layers", "attn.Wo"),
    "distilbert": ("distilbert.transformer.layer", "attention.out_lin"),
}


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


_BUILT: dict[tuple[str, str], TransformerBridge] = {}


@pytest.fixture
def built(tiny: Callable[..., nn.Module], plain: Any) -> Callable[..., TransformerBridge]:
    """``built("seq2seq", "t5")``: a bridge built once; no test here leaves anything on it."""

    def build(kind: str, name: str, *, needs_example: bool = False) -> TransformerBridge:
        if (kind, name) not in _BUILT:
            given = plain.examples(kind, name) if needs_example else None
            _BUILT[kind, name] = TransformerBridge(tiny(name, kind), example=given)
        return _BUILT[kind, name]

    return build


@pytest.fixture
def two(built: Callable[..., TransformerBridge], name: str) -> TransformerBridge:
    """The bridge of an encoder-decoder."""
    return built("speech" if name == "whisper" else "seq2seq", name)


@pytest.fixture
def both(name: str, plain: Any) -> dict[str, Tensor]:
    """Inputs of both sides, of different lengths."""
    if name == "whisper":
        return plain.examples("speech", "whisper")
    seed = torch.Generator().manual_seed(4)
    ids = {"input_ids": (2, 9), "decoder_input_ids": (2, 6)}
    return {key: torch.randint(8, 160, shape, generator=seed) for key, shape in ids.items()}


@pytest.fixture
def eager(
    tiny: Callable[..., nn.Module], plain: Any
) -> Callable[[str, str, dict[str, Tensor]], Any]:
    """``eager("masked", "bert", inputs)``: the bare model's output with its attentions."""

    def run(kind: str, name: str, given: dict[str, Tensor]) -> Any:
        model: Any = tiny(name, kind)
        model.set_attn_implementation("eager")
        return model(**given, output_attentions=True, output_hidden_states=True)

    return run


def flat(x: Tensor) -> Tensor:
    """[batch, pos, head, d_head] as the model has it."""
    return x.flatten(-2) if x.dim() == 4 else x


def edit(
    bridge: TransformerBridge, given: dict[str, Tensor], name: str, fn: Callable[[Tensor], Tensor]
) -> Tensor:
    return bridge.run_with_hooks(fwd_hooks=[(name, lambda x, hook: fn(x))], **given)


def by_head(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn`` on flat heads, as an edit of [batch, pos, head, d_head]."""
    return lambda x: fn(x.flatten(-2)).view(x.shape)


def places(name: str) -> dict[str, str]:
    """Point -> place in the bare model, for the second layer of both sides."""
    at = SEQ2SEQ[name]
    found: dict[str, str] = {}
    for side in ("encoder", "decoder"):
        layer = f"{at[side]}.1"
        found[f"{side}_blocks.1.hook_in"] = f"{layer}<"
        found[f"{side}_blocks.1.hook_out"] = layer
        parts = [("attn", at["attn"])] + [("cross_attn", at["cross"])] * (side == "decoder")
        for part, path in parts:
            for role in "qkv":
                found[f"{side}_blocks.1.{part}.{role}.hook_out"] = f"{layer}.{path}.{at[role]}"
            found[f"{side}_blocks.1.{part}.o.hook_in"] = f"{layer}.{path}.{at['o']}<"
            found[f"{side}_blocks.1.{part}.o.hook_out"] = f"{layer}.{path}.{at['o']}"
            found[f"{side}_blocks.1.{part}.hook_out"] = f"{layer}.{path}"
    found["decoder_blocks.1.mlp.hook_post"] = f"{at['decoder']}.1.{at['down']}<"
    return found


# --- encoder and decoder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SEQ2SEQ))
class TestTwoSides:
    """Encoder-decoders."""

    def test_points_are_read_by_hand(
        self, two: Any, name: str, both: dict[str, Tensor], plain: Any
    ) -> None:
        """Stream, projections and mixed values of both sides are the bare model's."""
        expected = plain.read(two.original_model, both, *places(name).values())
        _, cache = two.run_with_cache(names_filter=list(places(name)), **both)
        for point, place in places(name).items():
            assert len(expected[place]) == 1
            assert torch.equal(flat(cache[point]), expected[place][0]), point

    def test_edits_are_those_by_hand(
        self, two: Any, name: str, both: dict[str, Tensor], plain: Any
    ) -> None:
        """An edit at each of these points is the same edit by a plain hook, and matters."""
        untouched = two.original_model(**both).logits
        for point, place in places(name).items():
            heads = two.registry[point].axes.count("head") > 0
            fn = by_head(plain.noisy) if heads else plain.noisy
            found = edit(two, both, point, fn)
            expected = plain.edited(two.original_model, both, place, plain.noisy)
            assert torch.equal(found, expected), point
            assert plain.gap(found, untouched) > 1e-4, point

    def test_patterns_are_the_attentions(
        self, two: Any, name: str, both: dict[str, Tensor], eager: Any, plain: Any
    ) -> None:
        """Self and cross patterns of both sides are what Hugging Face reports."""
        out = eager("speech" if name == "whisper" else "seq2seq", name, both)
        _, cache = two.run_with_cache(names_filter="**.hook_pattern", **both)
        for layer in range(2):
            for point, theirs in (
                (f"encoder_blocks.{layer}.attn", out.encoder_attentions),
                (f"decoder_blocks.{layer}.attn", out.decoder_attentions),
                (f"decoder_blocks.{layer}.cross_attn", out.cross_attentions),
            ):
                ours = cache[f"{point}.hook_pattern"]
                assert plain.gap(ours, theirs[layer]) < FLOAT, point
        # Queries are the decoder's, keys the encoder's.
        long = out.encoder_attentions[0].shape[-1]
        assert cache["decoder_blocks.0.cross_attn.hook_pattern"].shape[-2:] == (
            both["decoder_input_ids"].shape[1],
            long,
        )

    def test_a_dark_head_of_cross_attention(
        self, two: Any, name: str, both: dict[str, Tensor], plain: Any
    ) -> None:
        """A cross-attention head that looks nowhere writes nothing: pattern and z agree with the hand."""
        at = SEQ2SEQ[name]
        head = torch.tensor([2])
        dark = edit(
            two,
            both,
            "decoder_blocks.0.cross_attn.hook_pattern",
            lambda x: x.index_fill(1, head, 0.0),
        )
        place = f"{at['decoder']}.0.{at['cross']}.{at['o']}<"

        def fn(x: Tensor) -> Tensor:
            return x.unflatten(-1, (4, 16)).index_fill(-2, head, 0.0).flatten(-2)

        expected = plain.edited(two.original_model, both, place, fn)
        assert plain.gap(dark, expected) < FLOAT
        assert plain.gap(dark, two.original_model(**both).logits) > 1e-4

    def test_the_stream_between_three_parts(
        self, two: Any, name: str, both: dict[str, Tensor], plain: Any
    ) -> None:
        """hook_resid_mid and hook_resid_mid2 are the sums before and after cross-attention."""
        start = "decoder_blocks.1"
        names = ["hook_in", "hook_attn_out", "hook_resid_mid", "hook_cross_attn_out"]
        names += ["hook_resid_mid2", "hook_mlp_out", "hook_out"]
        _, cache = two.run_with_cache(names_filter=[f"{start}.{n}" for n in names], **both)
        value = {n: cache[f"{start}.{n}"] for n in names}
        block = two.architecture.main.blocks[1]
        after = [
            two.original_model.get_submodule(branch.ln.path)
            if branch.place == "after"
            else nn.Identity()
            for branch in block.branches
        ]
        mid = value["hook_in"] + value["hook_attn_out"]
        assert plain.gap(value["hook_resid_mid"], mid) < FLOAT
        mid2 = after[0](mid) + value["hook_cross_attn_out"]
        assert plain.gap(value["hook_resid_mid2"], mid2) < FLOAT
        out = after[2](after[1](mid2) + value["hook_mlp_out"])
        assert plain.gap(value["hook_out"], out) < FLOAT

    def test_proved(self, two: Any, name: str) -> None:
        """Every identity holds on both sides, and the kinds of layers are told."""
        proof = two.verify()
        assert proof.holds, str(proof)
        where = {check.where.partition(".")[0] for check in proof.checks}
        assert {"encoder_blocks", "decoder_blocks"} <= where
        assert two.layer_types() == ["attn + cross_attn + mlp"] * 2
        assert two.layer_types(tower="encoder_") == ["attn + mlp"] * 2


def test_an_edit_of_resid_mid2_in_t5(built: Any, both_t5: dict[str, Tensor], plain: Any) -> None:
    """T5's last sublayer reads the stream behind cross-attention; an edit reaches it and the skip."""
    bridge = built("seq2seq", "t5")
    found = edit(bridge, both_t5, "decoder_blocks.0.hook_resid_mid2", plain.noisy)
    place = "decoder.block.0.layer.2<"
    assert torch.equal(found, plain.edited(bridge.original_model, both_t5, place, plain.noisy))


def test_an_edit_of_resid_mid2_in_whisper(built: Any, plain: Any) -> None:
    """Whisper's layer goes on inline behind cross-attention: the rest of it by hand."""
    bridge = built("speech", "whisper")
    model, given = bridge.original_model, plain.examples("speech", "whisper")
    at = "model.decoder.layers.0"
    layer: Any = model.get_submodule(at)
    mid = plain.read(model, given, f"{at}.final_layer_norm<")[f"{at}.final_layer_norm<"][0]
    mid = plain.noisy(mid)
    behind = mid + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(mid))))
    found = edit(bridge, given, "decoder_blocks.0.hook_resid_mid2", plain.noisy)
    assert torch.equal(found, plain.edited(model, given, at, lambda x: behind))


@pytest.fixture
def both_t5() -> dict[str, Tensor]:
    """Inputs of both sides, of different lengths."""
    seed = torch.Generator().manual_seed(4)
    ids = {"input_ids": (2, 9), "decoder_input_ids": (2, 6)}
    return {key: torch.randint(8, 160, shape, generator=seed) for key, shape in ids.items()}


@pytest.mark.parametrize("name", ["t5", "bart", "marian", "t5gemma"])
def test_decoder_ids_are_the_input_shifted_right(tiny: Any, name: str, ids: Tensor) -> None:
    """bridge(ids) feeds the decoder what Hugging Face makes of ids as labels."""
    # t5gemma keeps its start token with the text model's.
    start = {"bos_token_id": 7} if name == "t5gemma" else {"decoder_start_token_id": 7}
    model = tiny(name, "seq2seq")
    for key, value in start.items():
        setattr(model.config, key, value)
        setattr(model.config.get_text_config(decoder=True), key, value)
    bridge = TransformerBridge(model)
    shifted = model.prepare_decoder_input_ids_from_labels(ids)
    assert torch.equal(shifted, torch.cat([torch.full((2, 1), 7), ids[:, :-1]], dim=1))
    expected = model(input_ids=ids, decoder_input_ids=shifted).logits
    assert torch.equal(bridge(ids), expected)
    logits, cache = bridge.run_with_cache(ids, names_filter="decoder_embed.hook_in")
    assert torch.equal(logits, expected)
    assert torch.equal(cache["decoder_embed.hook_in"], shifted)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_loss_of_an_encoder_decoder(
    built: Any, name: str, ids: Tensor, both_t5: dict[str, Tensor]
) -> None:
    """The loss is that of the decoder's next tokens, whoever brought them."""
    bridge = built("seq2seq", name)
    logits = bridge(ids)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, :-1].flatten())
    torch.testing.assert_close(bridge(ids, return_type="loss"), expected)
    logits, loss = bridge(return_type="both", **both_t5)
    wanted = both_t5["decoder_input_ids"][:, 1:]
    torch.testing.assert_close(
        loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted.flatten())
    )


@pytest.mark.parametrize("name", ["t5", "bart", "marian"])
def test_generating(tiny: Any, name: str, ids: Tensor, plain: Any) -> None:
    """The decoder begins with its start token alone, as in Hugging Face's own generate; hooks are live."""
    model = tiny(name, "seq2seq")
    model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id = 7
    given = {"max_new_tokens": 4, "do_sample": False}
    bridge = TransformerBridge(model)
    assert torch.equal(bridge.hf_generate(ids, **given), model.generate(ids, **given))
    at = SEQ2SEQ[name]["encoder"]
    with bridge.hooks(fwd_hooks=[("encoder_blocks.0.hook_out", lambda x, hook: plain.noisy(x))]):
        found = bridge.hf_generate(ids, output_logits=True, return_dict_in_generate=True, **given)
    with plain.watching(model, f"{at}.0", lambda x, count: plain.noisy(x)):
        wanted = model.generate(ids, output_logits=True, return_dict_in_generate=True, **given)
    assert torch.equal(torch.stack(found.logits), torch.stack(wanted.logits))


@pytest.mark.parametrize("name", ["t5", "bart", "marian"])
def test_padded_texts_on_two_sides(tiny: Any, tokenizer: Any, name: str, plain: Any) -> None:
    """Rows of a padded batch give what they give alone, and padding is no part of the loss."""
    bridge = TransformerBridge(tiny(name, "seq2seq"), tokenizer)
    texts = ["abcdef", "xyz"]
    batch = bridge(texts, padding_side="right")
    losses = []
    for row, text in enumerate(texts):
        alone, loss = bridge(text, return_type="both", loss_per_token=True)
        assert plain.gap(batch[row : row + 1, : alone.shape[1]], alone) < FLOAT
        losses.append(loss.flatten())
    mean = bridge(texts, padding_side="right", return_type="loss")
    torch.testing.assert_close(mean, torch.cat(losses).mean())


def test_left_padded_texts_on_two_sides(tiny: Any, tokenizer: Any, plain: Any) -> None:
    """T5 counts positions from each other, so rows padded in front give what they give alone, too.

    The decoder's own padding is behind.
    """
    bridge = TransformerBridge(tiny("t5", "seq2seq"), tokenizer)
    batch = bridge(["abcdef", "xyz"], padding_side="left")
    alone = bridge("xyz")
    assert plain.gap(batch[1:, : alone.shape[1]], alone) < FLOAT


@pytest.mark.parametrize("name", ["t5", "bart", "marian", "t5gemma"])
def test_each_side_has_its_own_embeddings(
    built: Any, name: str, both_t5: dict[str, Tensor], plain: Any
) -> None:
    """One matrix serves both sides, yet each has its own value: an edit of one is that side's alone."""
    bridge = built("seq2seq", name)
    model = bridge.original_model
    ids, decoder_ids = both_t5.values()
    _, cache = bridge.run_with_cache(names_filter="*_embed.hook_*", **both_t5)
    assert torch.equal(cache["encoder_embed.hook_in"], ids)
    assert torch.equal(cache["decoder_embed.hook_in"], decoder_ids)
    found = edit(bridge, both_t5, "encoder_embed.hook_out", plain.noisy)
    embeds = plain.noisy(cache["encoder_embed.hook_out"])
    expected = model(inputs_embeds=embeds, decoder_input_ids=decoder_ids).logits
    assert plain.gap(found, expected) < FLOAT
    found = edit(bridge, both_t5, "decoder_embed.hook_out", plain.noisy)
    embeds = plain.noisy(cache["decoder_embed.hook_out"])
    expected = model(input_ids=ids, decoder_inputs_embeds=embeds).logits
    assert plain.gap(found, expected) < FLOAT


@pytest.mark.parametrize(
    "name", ["bigbird_pegasus", "blenderbot-small", "led", "m2m_100", "plbart", "prophetnet"]
)
def test_embeddings_are_of_tokens(built: Any, name: str, both_t5: dict[str, Tensor]) -> None:
    """What is called an embedding embeds that side's ids: positions are not passed off as tokens."""
    bridge = built("seq2seq", name)
    ids = dict(zip(("encoder_embed", "decoder_embed"), both_t5.values(), strict=True))
    for part, wanted in ids.items():
        if f"{part}.hook_out" not in bridge.registry:
            assert bridge.why(f"{part}.hook_out"), part
            continue
        _, cache = bridge.run_with_cache(names_filter=f"{part}.hook_*", **both_t5)
        assert torch.equal(cache[f"{part}.hook_in"], wanted), part


@pytest.mark.parametrize("name", sorted(SEQ2SEQ))
def test_mlp_in_is_what_the_mlp_is_given(two: Any, name: str, both: dict[str, Tensor]) -> None:
    """hook_mlp_in is the stream before the MLP's own norm, wherever the layer has its norms."""
    start = "decoder_blocks.1"
    names = [f"{start}.hook_mlp_in", f"{start}.hook_resid_mid2", f"{start}.mlp.hook_in"]
    _, cache = two.run_with_cache(names_filter=names, **both)
    branch = two.architecture.main.blocks[1].branch("mlp")
    # Before the sum there is no norm where norms stand behind: then the MLP is given the stream itself.
    wanted = names[2] if branch.place == "after" else names[1]
    assert torch.equal(cache[names[0]], cache[wanted])


def test_whisper_without_decoder_ids(built: Any, plain: Any) -> None:
    """Sound alone: the decoder is given its start token."""
    bridge = built("speech", "whisper")
    features = plain.examples("speech", "whisper")["input_features"]
    start = torch.full((2, 1), 4)
    expected = bridge.original_model(input_features=features, decoder_input_ids=start).logits
    assert torch.equal(bridge(input_features=features), expected)
    assert torch.equal(bridge(features), expected)


# --- encoders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MASKED))
class TestEncoders:
    """Models whose every position sees every other."""

    def test_stream_and_patterns(
        self, built: Any, name: str, ids: Tensor, eager: Any, plain: Any
    ) -> None:
        """hook_out of each layer and the patterns are what Hugging Face reports; nothing is causal."""
        bridge = built("masked", name)
        out = eager("masked", name, {"input_ids": ids})
        _, cache = bridge.run_with_cache(ids)
        for layer in range(2):
            assert plain.gap(cache["pattern", layer], out.attentions[layer]) < FLOAT
            assert plain.gap(cache["resid_pre", layer], out.hidden_states[layer]) < FLOAT
            assert cache["pattern", layer][:, :, 0, 1:3].min() > 0
        seen = plain.read(bridge.original_model, {"input_ids": ids}, f"{MASKED[name][0]}.1")
        _, outside = bridge.run_with_cache(ids, names_filter="blocks.1.hook_out")
        assert torch.equal(outside["resid_post", 1], seen[f"{MASKED[name][0]}.1"][0])

    def test_edits(self, built: Any, name: str, ids: Tensor, plain: Any) -> None:
        """Edits of the stream and of z are those by plain hooks."""
        bridge = built("masked", name)
        given = {"input_ids": ids}
        layers, dense = MASKED[name]
        found = edit(bridge, given, "blocks.0.hook_out", plain.noisy)
        expected = plain.edited(bridge.original_model, given, f"{layers}.0", plain.noisy)
        assert torch.equal(found, expected)
        found = edit(bridge, given, "blocks.1.attn.hook_z", by_head(plain.noisy))
        place = f"{layers}.1.{dense}<"
        assert torch.equal(found, plain.edited(bridge.original_model, given, place, plain.noisy))

    def test_padding(self, built: Any, name: str, ids: Tensor, plain: Any) -> None:
        """A padded row gives what the row alone gives, and nothing looks at padding."""
        bridge = built("masked", name)
        pad = bridge.original_model.config.pad_token_id
        short, mask = ids.clone(), torch.ones_like(ids)
        short[0, 6:], mask[0, 6:] = pad, 0
        logits, cache = bridge.run_with_cache(short, attention_mask=mask)
        assert plain.gap(logits[:1, :6], bridge(ids[:1, :6])) < FLOAT
        assert not cache["pattern", 1][0, :, :6, 6:].any()

    def test_proved(self, built: Any, name: str) -> None:
        """Every identity holds, one name for each embedding."""
        bridge = built("masked", name)
        proof = bridge.verify()
        assert proof.holds, str(proof)
        assert {"embed.hook_in", "embed.hook_out", "unembed.hook_out"} <= set(bridge.registry)


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta"])
def test_mlp_in_of_an_encoder(built: Any, name: str, ids: Tensor) -> None:
    """With norms behind the sums, the MLP is given the stream as it is: hook_mlp_in is that."""
    bridge = built("masked", name)
    _, cache = bridge.run_with_cache(ids, names_filter=["blocks.0.hook_mlp_in", "blocks.0.mlp.**"])
    assert torch.equal(cache["blocks.0.hook_mlp_in"], cache["blocks.0.mlp.in.hook_in"])


# --- one layer, called several times ------------------------------------------------------------------------

ALBERT = "albert.encoder.albert_layer_groups.0.albert_layers.0"


def test_a_layer_that_runs_twice(built: Any, ids: Tensor, plain: Any) -> None:
    """ALBERT has one layer: blocks.0 and blocks.1 are its calls, values and edits each their own."""
    bridge = built("masked", "albert")
    model, given = bridge.original_model, {"input_ids": ids}
    assert bridge.cfg.n_layers == 2
    seen = plain.read(model, given, ALBERT, f"{ALBERT}<", f"{ALBERT}.ffn_output")
    assert len(seen[ALBERT]) == 2
    _, cache = bridge.run_with_cache(ids, names_filter=["blocks.*.hook_*", "blocks.*.mlp.**"])
    for call in range(2):
        assert torch.equal(cache["resid_pre", call], seen[f"{ALBERT}<"][call])
        assert torch.equal(cache["resid_post", call], seen[ALBERT][call])
        assert torch.equal(cache["mlp_out", call], seen[f"{ALBERT}.ffn_output"][call])
        for point, place in (("hook_out", ALBERT), ("mlp.out.hook_out", f"{ALBERT}.ffn_output")):
            found = edit(bridge, given, f"blocks.{call}.{point}", plain.noisy)
            assert torch.equal(found, plain.edited(model, given, place, plain.noisy, call=call))
    assert torch.equal(bridge(ids), model(ids).logits)


def test_both_calls_edited(built: Any, ids: Tensor, plain: Any) -> None:
    """Edits of both calls in one run compose; a glob reaches both."""
    bridge = built("masked", "albert")
    model, given = bridge.original_model, {"input_ids": ids}
    found = edit(bridge, given, "blocks.*.hook_mlp_out", plain.noisy)
    assert torch.equal(
        found, plain.edited(model, given, f"{ALBERT}.ffn_output", plain.noisy, call=None)
    )


def test_patterns_of_a_layer_that_runs_twice(
    built: Any, ids: Tensor, eager: Any, plain: Any
) -> None:
    """Each call has its own pattern."""
    bridge = built("masked", "albert")
    out = eager("masked", "albert", {"input_ids": ids})
    _, cache = bridge.run_with_cache(ids, names_filter="blocks.*.attn.hook_pattern")
    for call in range(2):
        assert plain.gap(cache["pattern", call], out.attentions[call]) < FLOAT


def test_alberts_positions_are_positions(built: Any, ids: Tensor) -> None:
    """The mapping between embedding and layers is no position embedding."""
    bridge = built("masked", "albert")
    assert bridge.architecture.main.pos_embed in (
        None,
        "albert.embeddings.position_embeddings",
    )


# --- entering and leaving in the middle ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "modernbert", "distilbert", "albert"])
def test_stopping_and_starting(built: Any, name: str, ids: Tensor, plain: Any) -> None:
    """Run up to a layer, then on from there: the whole run, or refused; never something else."""
    bridge = built("masked", name)
    half = bridge(ids, stop_at_layer=1)
    _, cache = bridge.run_with_cache(ids, names_filter="blocks.1.hook_in")
    assert torch.equal(half, cache["resid_pre", 1])
    try:
        found = bridge(half, start_at_layer=1)
    except LensError:
        return
    assert plain.gap(found, bridge(ids)) < FLOAT


@pytest.mark.parametrize("name", ["t5", "bart", "t5gemma"])
def test_starting_in_a_decoder(
    built: Any, name: str, both_t5: dict[str, Tensor], plain: Any
) -> None:
    """A decoder's stream goes on with the encoder's output beside it; what T5's first layer hands on counts."""
    bridge = built("seq2seq", name)
    model: Any = bridge.original_model
    half = bridge(stop_at_layer=1, **both_t5)
    encoded = model.get_encoder()(both_t5["input_ids"])
    given = {"encoder_outputs": encoded, "decoder_input_ids": both_t5["decoder_input_ids"]}
    try:
        found = bridge(half, start_at_layer=1, **given)
    except LensError:
        return
    assert plain.gap(found, model(**both_t5).logits) < FLOAT


@pytest.mark.parametrize("name", ["t5", "bart", "t5gemma"])
def test_starting_in_a_decoder_without_the_encoder(
    built: Any, name: str, both_t5: dict[str, Tensor]
) -> None:
    """Without anything for the encoder there is nothing to attend to, and the stream is not encoded instead."""
    bridge = built("seq2seq", name)
    half = bridge(stop_at_layer=1, **both_t5)
    with pytest.raises(InputError):
        bridge(half, start_at_layer=1)


# --- images -------------------------------------------------------------------------------------------------


@pytest.fixture
def pixels() -> Tensor:
    """Images, [2, 3, 32, 32]."""
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def test_vision_transformer(built: Any, pixels: Tensor, eager: Any, plain: Any) -> None:
    """ViT: images by position, stream and patterns as Hugging Face reports them, edits as by hand."""
    bridge = built("vision", "vit")
    model, given = bridge.original_model, {"pixel_values": pixels}
    assert torch.equal(bridge(pixels), model(pixels).logits)
    out = eager("vision", "vit", given)
    _, cache = bridge.run_with_cache(pixels)
    for layer in range(2):
        assert plain.gap(cache["pattern", layer], out.attentions[layer]) < FLOAT
        assert plain.gap(cache["resid_pre", layer], out.hidden_states[layer]) < FLOAT
    path = bridge.architecture.blocks[0].path
    found = edit(bridge, given, "blocks.0.hook_out", plain.noisy)
    assert torch.equal(found, plain.edited(model, given, path, plain.noisy))
    proof = bridge.verify()
    assert proof.holds, str(proof)


def test_windows(built: Any, plain: Any) -> None:
    """Swin: stages are layers; their streams, and attention in windows, are read and edited as by hand."""
    bridge = built("vision", "swin")
    model = bridge.original_model
    given = plain.examples("vision", "swin")
    at = "swin.encoder.layers.1"
    path = f"{at}.blocks.0.attention"
    points = {
        "blocks.1.hook_in": f"{at}<",
        "blocks.1.hook_out": at,
        "blocks.1.attn.q.hook_out": f"{path}.q_proj",
        "blocks.1.attn.o.hook_out": f"{path}.o_proj",
        "blocks.1.mlp.hook_post": f"{at}.blocks.0.mlp.fc2<",
    }
    seen = plain.read(model, given, *points.values())
    _, cache = bridge.run_with_cache(names_filter=list(points), **given)
    for point, place in points.items():
        assert torch.equal(flat(cache[point]), seen[place][0]), point
        fn = by_head(plain.noisy) if cache[point].dim() == 4 else plain.noisy
        found = edit(bridge, given, point, fn)
        assert torch.equal(found, plain.edited(model, given, place, plain.noisy)), point
    _, inside = bridge.run_with_cache(names_filter="blocks.1.attn.hook_pattern", **given)
    rows = inside["pattern", 1].sum(-1)
    assert plain.gap(rows, torch.ones_like(rows)) < FLOAT


def test_two_towers(built: Any, plain: Any) -> None:
    """CLIP: an edit in one tower moves that tower's embedding, as by hand, and leaves the other's alone."""
    bridge = built("contrastive", "clip")
    model: Any = bridge.original_model
    given = plain.examples("contrastive", "clip")
    before = model(**given)
    towers = {
        "blocks": ("text_model.encoder.layers", "text_embeds", "image_embeds"),
        "vision_blocks": ("vision_model.encoder.layers", "image_embeds", "text_embeds"),
    }
    for start, (path, own, other) in towers.items():
        places = [f"{path}.0<", f"{path}.0", f"{path}.1.mlp.fc2<", f"{path}.1.self_attn.q_proj"]
        points = ["0.hook_in", "0.hook_out", "1.mlp.hook_post", "1.attn.hook_q"]
        seen = plain.read(model, given, *places)
        wanted = [f"{start}.{p}" for p in points]
        _, cache = bridge.run_with_cache(names_filter=wanted, return_type=None, **given)
        for point, place in zip(points, places, strict=True):
            assert torch.equal(flat(cache[f"{start}.{point}"]), seen[place][0]), point
        name = f"{start}.0.hook_out"
        with bridge.hooks(fwd_hooks=[(name, lambda x, hook: plain.noisy(x))]):
            ours = model(**given)
        see = lambda value, count: plain.noisy(value)  # noqa: E731
        with plain.watching(model, f"{path}.0", see):
            theirs = model(**given)
        assert torch.equal(ours[own], theirs[own])
        assert plain.gap(ours[own], before[own]) > 1e-3
        assert torch.equal(ours[other], before[other])
    proof = bridge.verify(**given)
    assert proof.holds, str(proof)


# --- text with images ---------------------------------------------------------------------------------------

MULTIMODAL = {
    # name -> (vision layers, one layer's MLP output layer, the text model's layers)
    "llava": ("model.vision_tower.encoder.layers", "mlp.fc2", "model.language_model.layers"),
    "qwen2_vl": ("model.visual.blocks", "mlp.fc2", "model.language_model.layers"),
}


@pytest.mark.parametrize("name", sorted(MULTIMODAL))
class TestTextWithImages:
    """The text tower has the plain names, the vision tower those with vision_."""

    def test_points_of_both_towers(self, built: Any, name: str, plain: Any) -> None:
        """With pixel values, points of both towers fire with the bare model's values."""
        bridge = built("vlm", name, needs_example=True)
        model, given = bridge.original_model, plain.examples("vlm", name)
        vision, down, text = MULTIMODAL[name]
        points = {
            "vision_blocks.0.hook_in": f"{vision}.0<",
            "vision_blocks.0.hook_out": f"{vision}.0",
            "vision_blocks.0.mlp.hook_post": f"{vision}.0.{down}<",
            "vision_blocks.0.hook_mlp_out": f"{vision}.0.mlp",
            "blocks.1.hook_in": f"{text}.1<",
            "blocks.1.attn.hook_q": f"{text}.1.self_attn.q_proj",
            "blocks.1.hook_out": f"{text}.1",
        }
        seen = plain.read(model, given, *points.values())
        logits, cache = bridge.run_with_cache(names_filter=list(points), **given)
        assert torch.equal(logits, model(**given).logits)
        for point, place in points.items():
            value = cache[point].flatten(-2) if point.endswith("hook_q") else cache[point]
            assert torch.equal(value, seen[place][0]), point

    def test_edits_of_the_image_reach_the_text(self, built: Any, name: str, plain: Any) -> None:
        """An edit in the vision tower changes the text's logits as the same edit by hand."""
        bridge = built("vlm", name, needs_example=True)
        model, given = bridge.original_model, plain.examples("vlm", name)
        vision, down, _ = MULTIMODAL[name]
        for point, place in (("hook_out", ""), ("mlp.hook_post", f".{down}<")):
            found = edit(bridge, given, f"vision_blocks.0.{point}", plain.noisy)
            expected = plain.edited(model, given, f"{vision}.0{place}", plain.noisy)
            assert torch.equal(found, expected), point
            assert plain.gap(found, model(**given).logits) > 1e-5, point

    def test_attention_in_the_vision_tower(self, built: Any, name: str, plain: Any) -> None:
        """Queries, keys and values, and what heads make, are there and edited as by hand."""
        bridge = built("vlm", name, needs_example=True)
        model, given = bridge.original_model, plain.examples("vlm", name)
        start = "vision_blocks.0.attn"
        wanted = [f"{start}.{p}" for p in ("hook_q", "hook_k", "hook_v", "hook_z")]
        assert not [n for n in wanted if n not in bridge.registry.hook_dict], bridge.why(wanted[1])
        attn = bridge.architecture.towers[0].blocks[0].attn
        assert attn is not None
        _, cache = bridge.run_with_cache(names_filter=wanted, **given)
        seen = plain.read(model, given, *{attn.q.path, attn.k.path, attn.v.path})
        made = [seen[path][0] for path in dict.fromkeys((attn.q.path, attn.k.path, attn.v.path))]
        ours = torch.cat([cache[n].flatten(-2) for n in wanted[:3]], dim=-1)
        assert torch.equal(ours, torch.cat(made, dim=-1))
        found = edit(bridge, given, wanted[3], by_head(plain.noisy))
        assert torch.equal(found, plain.edited(model, given, f"{attn.o}<", plain.noisy))

    def test_text_alone(self, built: Any, name: str, ids: Tensor) -> None:
        """Without an image the model is a text model, and the vision tower is not passed."""
        bridge = built("vlm", name, needs_example=True)
        plain_ids = ids.clamp(min=20)
        logits, cache = bridge.run_with_cache(plain_ids)
        assert torch.equal(bridge(plain_ids), bridge.original_model(plain_ids).logits)
        assert logits.shape[:2] == ids.shape
        assert not [n for n in cache if n.startswith("vision_")]

    def test_proved(self, built: Any, name: str, plain: Any) -> None:
        """Every identity holds in both towers, in one run."""
        bridge = built("vlm", name, needs_example=True)
        proof = bridge.verify(**plain.examples("vlm", name))
        assert proof.holds, str(proof)
        assert {"vision_blocks.0", "blocks.0"} <= {check.where for check in proof.checks}


def test_the_projector_is_a_raw_point(built: Any, plain: Any) -> None:
    """What carries the image to the text is known by name, and read and edited under its own path."""
    bridge = built("vlm", "llava", needs_example=True)
    given = plain.examples("vlm", "llava")
    (_, path), *_ = bridge.architecture.projectors
    assert path == "model.multi_modal_projector"
    found = edit(bridge, given, f"raw:{path}", plain.noisy)
    assert torch.equal(found, plain.edited(bridge.original_model, given, path, plain.noisy))


# --- sound --------------------------------------------------------------------------------------------------


def test_speech_encoder(built: Any, plain: Any) -> None:
    """wav2vec2: sound by position; stream and edits as by hand."""
    bridge = built("ctc", "wav2vec2")
    model, given = bridge.original_model, plain.examples("ctc", "wav2vec2")
    assert torch.equal(bridge(given["input_values"]), model(**given).logits)
    layers = [block.path for block in bridge.architecture.blocks]
    seen = plain.read(model, given, *layers)
    _, cache = bridge.run_with_cache(names_filter="blocks.*.hook_out", **given)
    for index, path in enumerate(layers):
        assert torch.equal(cache["resid_post", index], seen[path][0])
    found = edit(bridge, given, "blocks.0.hook_out", plain.noisy)
    assert torch.equal(found, plain.edited(model, given, layers[0], plain.noisy))


def test_a_tower_that_is_not_there(built: Any) -> None:
    """Asking for a tower by another name is refused with those there are."""
    bridge = built("seq2seq", "t5")
    with pytest.raises(InputError, match=r"encoder_.*decoder_"):
        bridge.layer_types(tower="vision_")
