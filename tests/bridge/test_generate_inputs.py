"""generate: what can be continued, how prompts are padded, what comes back, and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge import InputError, TransformerBridge, UnknownPointError

TEXTS = ["The cat", "When Mary and John went to the store, John gave a", "3 plus 4 is"]
"""Three prompts of unequal length."""


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def bridge(wrapped: Callable[[str], TransformerBridge]) -> TransformerBridge:
    """A bridge around a tiny Mistral, shared; no test here leaves anything on it."""
    return wrapped("mistral")


@pytest.fixture
def model(bridge: TransformerBridge) -> Any:
    """The model of `bridge`."""
    return bridge.original_model


@pytest.fixture
def greedy(generation: Any) -> Any:
    """``greedy(model, ids)``: Hugging Face's own answer."""
    return generation.greedy


# --- what is continued ------------------------------------------------------------------------------------


def test_forms_of_ids(bridge: Any, model: Any, greedy: Any, ids: Tensor) -> None:
    """[batch, pos], [pos], lists, int32, by position or as input_ids or inputs: the same tokens."""
    wanted = greedy(model, ids)
    given = {"max_new_tokens": 5, "do_sample": False}
    for form in (ids, ids.tolist(), ids.int()):
        assert torch.equal(bridge.generate(form, **given), wanted)
    assert torch.equal(bridge.generate(input_ids=ids, **given), wanted)
    assert torch.equal(bridge.generate(inputs=ids, **given), wanted)
    assert torch.equal(bridge.generate(ids[0], **given), greedy(model, ids[:1]))
    assert torch.equal(bridge.generate(ids[0].tolist(), **given), greedy(model, ids[:1]))


@pytest.mark.parametrize("name", ["gpt2", "llama", "mamba"])
def test_embeddings(wrapped: Any, ids: Tensor, name: str) -> None:
    """[batch, pos, d_model] is continued as the ids are; what comes back are the new tokens."""
    bridge = wrapped(name)
    model = bridge.original_model
    embedded = model.get_input_embeddings()(ids).detach()
    given = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    found = bridge.generate(embedded, **given)
    assert torch.equal(found, model.generate(inputs_embeds=embedded, **given))
    assert torch.equal(found, model.generate(ids, **given)[:, 9:])
    assert torch.equal(bridge.generate(inputs_embeds=embedded, **given), found)


@pytest.mark.parametrize("name", ["t5", "bart", "marian"])
def test_encoder_decoder(tiny: Any, generation: Any, ids: Tensor, name: str) -> None:
    """What the decoder writes, from its start token on, with its logits, whoever reads along."""
    given = {"decoder_start_token_id": 7, "min_new_tokens": 5, "output_logits": True}
    wanted = generation.greedy(tiny(name, "seq2seq"), ids, return_dict_in_generate=True, **given)
    bridge = TransformerBridge(tiny(name, "seq2seq"))
    steps: dict[str, list[Any]] = {}

    def read(x: Tensor, hook: Any) -> None:
        step = hook.step
        steps.setdefault(hook.name, []).append((step.number, step.phase, step.start, step.stop))

    for form in ({"input": ids}, {"input": ids.tolist()}, {"input_ids": ids}):
        steps.clear()
        found = bridge.generate(**form, max_new_tokens=5, do_sample=False, **given)
        assert torch.equal(found.sequences, wanted.sequences)
        assert torch.equal(torch.stack(found.logits), torch.stack(wanted.logits))
        with bridge.hooks([(generation.everything, read)]):
            found = bridge.generate(**form, max_new_tokens=5, do_sample=False, **given)
        assert torch.equal(found.sequences, wanted.sequences)
        assert generation.gap(torch.stack(found.logits), torch.stack(wanted.logits)) < 1e-5
        assert steps["encoder_blocks.0.hook_out"] == [(0, "encode", 0, 9)]
        assert steps["decoder_blocks.0.hook_out"] == [
            (0, "prefill", 0, 1),
            *((k, "decode", k, k + 1) for k in range(1, 5)),
        ]
        assert steps["decoder_blocks.1.cross_attn.k.hook_out"] == [(0, "encode", 0, 9)]
        assert len(steps["decoder_blocks.1.cross_attn.q.hook_out"]) == 5


def test_positions_of_cross_attention(tiny: Any, ids: Tensor) -> None:
    """The keys a decoder attends to are positions of the encoder's text, in generate as in forward."""
    bridge = TransformerBridge(tiny("t5", "seq2seq"))
    seen: list[Any] = []
    hooks = [("decoder_blocks.0.cross_attn.k.hook_out", lambda x, hook: seen.append(hook.step))]
    bridge.run_with_hooks(ids, fwd_hooks=hooks)
    assert seen[0].positions == range(9)
    with bridge.hooks(hooks):
        bridge.generate(ids, max_new_tokens=2, decoder_start_token_id=0)
    assert seen[1].positions == range(9)


def test_a_decoders_own_start(tiny: Any, generation: Any, ids: Tensor) -> None:
    """decoder_input_ids that are given are continued."""
    start = torch.tensor([[0, 14, 15], [0, 24, 25]])
    given = {"decoder_input_ids": start, "min_new_tokens": 4, "decoder_start_token_id": 0}
    wanted = generation.greedy(tiny("marian", "seq2seq"), ids, 4, **given)
    bridge = TransformerBridge(tiny("marian", "seq2seq"))
    found = bridge.generate(ids, max_new_tokens=4, do_sample=False, **given)
    assert torch.equal(found, wanted)
    assert torch.equal(found[:, :3], start)


@pytest.mark.parametrize("side", ["right", None])
@pytest.mark.parametrize("name", ["t5", "bart", "marian"])
def test_unequal_texts_for_an_encoder(
    tiny: Any, tokenizer: Any, generation: Any, name: str, side: Any
) -> None:
    """Texts of unequal length: each step's logits are those of the text alone."""
    bridge = TransformerBridge(tiny(name, "seq2seq"), tokenizer)
    given = {
        "max_new_tokens": 3,
        "do_sample": False,
        "decoder_start_token_id": 7,
        "stop_at_eos": False,
        "output_logits": True,
    }
    texts = ["abcdefgh", "xyz"]
    batch = torch.stack(bridge.generate(texts, padding_side=side, **given).logits)
    for row, text in enumerate(texts):
        alone = torch.stack(bridge.generate(text, **given).logits)
        assert generation.gap(batch[:, row : row + 1], alone) < 1e-5


def test_images(tiny: Any, inputs_of: Any) -> None:
    """pixel_values go to the model, whose tokens they change."""
    given = inputs_of("llava", "vlm")
    wanted = tiny("llava", "vlm").generate(**given, max_new_tokens=4, do_sample=False)
    bridge = TransformerBridge(tiny("llava", "vlm"), example=given)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
    found = bridge.generate(given["input_ids"], pixel_values=given["pixel_values"], **options)
    assert torch.equal(found.sequences, wanted)
    other = bridge.generate(given["input_ids"], pixel_values=-given["pixel_values"], **options)
    assert not torch.equal(found.logits[0], other.logits[0])


SPEECH = {"speech_to_text": "input_features", "moonshine": "input_values"}


@pytest.fixture(params=sorted(SPEECH))
def sound(request: pytest.FixtureRequest, tiny: Any, inputs_of: Any) -> Any:
    """A bridge around a model that listens, what it hears, the keyword for that, what it writes."""
    name = request.param
    given = inputs_of(name, "speech")
    heard = given[SPEECH[name]]
    options = {"max_new_tokens": 4, "do_sample": False, "decoder_start_token_id": 0}
    wanted = tiny(name, "speech").generate(heard, **options)
    bridge = TransformerBridge(tiny(name, "speech"), example=given)
    return bridge, heard, SPEECH[name], options, wanted


def test_speech(sound: Any) -> None:
    """Sound goes to the encoder, which no text has a position in; the decoder's answer comes back."""
    bridge, heard, _, options, wanted = sound
    steps: list[Any] = []
    hooks = [("encoder_blocks.0.hook_out", lambda x, hook: steps.append(hook.step))]
    with bridge.hooks(hooks):
        assert torch.equal(bridge.generate(heard, **options), wanted)
    assert [(step.phase, step.stop) for step in steps] == [("encode", None)]


def test_speech_by_keyword(sound: Any) -> None:
    """The same by the model's own keyword, without naming a decoder's ids."""
    bridge, heard, keyword, options, wanted = sound
    assert torch.equal(bridge.generate(**{keyword: heard}, **options), wanted)


# --- padding ----------------------------------------------------------------------------------------------


def test_each_text_goes_on_as_it_does_alone(demo_bridge: Any) -> None:
    """Three texts of unequal length, padded in front: each with the answer it has alone, pieces and all."""
    given = {"max_new_tokens": 12, "do_sample": False}
    alone = [demo_bridge.generate(text, **given) for text in TEXTS]
    assert demo_bridge.generate(TEXTS, **given) == alone
    assert demo_bridge.generate(TEXTS, padding_side="left", **given) == alone
    assert demo_bridge.generate(TEXTS, num_beams=2, **given) == [
        demo_bridge.generate(text, num_beams=2, **given) for text in TEXTS
    ]
    assert len(set(alone)) == 3
    lengths = {len(demo_bridge.generate(x, return_type="tokens", **given)[0]) for x in TEXTS}
    assert len(lengths) > 1


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "jamba"])
def test_masks(wrapped: Any, tiny: Any, generation: Any, name: str) -> None:
    """Ids with a mask: Hugging Face's tokens, and each row those of its real tokens alone."""
    ids, mask = generation.prompts()
    options = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
    found = wrapped(name).generate(ids, attention_mask=mask, **options)
    assert torch.equal(found, tiny(name).generate(ids, attention_mask=mask, **options))
    assert torch.equal(found, wrapped(name).generate(ids, attention_mask=mask.tolist(), **options))
    assert torch.equal(found, wrapped(name).generate(input_ids=ids, attention_mask=mask, **options))
    if name == "jamba":
        return  # its state spaces read the padding too
    for row, real in enumerate(mask.bool()):
        alone = wrapped(name).generate(ids[row][real], **options)
        assert torch.equal(found[row, 8:], alone[0, -5:])


def test_a_listed_mask_by_keyword(bridge: Any, generation: Any) -> None:
    """A mask may be a list beside input_ids= as it may beside ids by position."""
    ids, mask = generation.prompts()
    given = {"max_new_tokens": 3, "do_sample": False}
    found = bridge.generate(input_ids=ids, attention_mask=mask.tolist(), **given)
    assert torch.equal(found, bridge.generate(ids, attention_mask=mask, **given))


def test_a_typed_padding_token_is_no_padding(demo_bridge: Any, generation: Any) -> None:
    """Text that spells the pad token is read as it stands."""
    pad = demo_bridge.tokenizer.pad_token
    text = f"{pad}The cat"
    given = {"max_new_tokens": 3, "do_sample": False, "output_logits": True}
    ids = demo_bridge.to_tokens(text)
    assert demo_bridge.tokenizer.pad_token_id in ids[0].tolist()
    wanted = demo_bridge.original_model(ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
    found = demo_bridge.generate(text, **given).logits[0]
    assert generation.gap(found, wanted) < 1e-6
    bare = demo_bridge.original_model.generate(ids, return_dict_in_generate=True, **given)
    assert generation.gap(found, bare.logits[0]) > 1e-3  # without a mask, transformers makes one


def test_padding_behind_is_refused(demo_bridge: Any, bridge: Any, generation: Any) -> None:
    """New tokens would follow padding: refused for texts of unequal length and for masks."""
    with pytest.raises(InputError, match=r"padded behind.*padding_side='left'"):
        demo_bridge.generate(TEXTS, padding_side="right")
    ids, mask = generation.prompts()
    for given in ({"input": ids}, {"input_ids": ids}):
        with pytest.raises(InputError, match="padded behind"):
            bridge.generate(**given, attention_mask=mask.flip(1))


def test_padding_side_without_padding(demo_bridge: Any) -> None:
    """Where nothing is padded, the side is all the same."""
    for texts in ("The cat", ["The cat", "The cat"]):
        given = {"max_new_tokens": 4, "do_sample": False}
        found = demo_bridge.generate(texts, padding_side="right", **given)
        assert found == demo_bridge.generate(texts, **given)


# --- room -------------------------------------------------------------------------------------------------


def test_room(wrapped: Any, generation: Any) -> None:
    """With 64 learned positions, what just fits runs; one token more is refused, and both numbers said."""
    bridge = wrapped("gpt2")
    prompt = torch.randint(8, 100, (1, 60), generator=torch.Generator().manual_seed(2))
    given = {"do_sample": False, "min_new_tokens": 4}
    found = bridge.generate(prompt, max_new_tokens=5, stop_at_eos=False, do_sample=False)
    wanted = generation.greedy(bridge.original_model, prompt, eos_token_id=159)
    assert torch.equal(found, wanted)
    assert found.shape == (1, 65)
    with pytest.raises(InputError, match=r"60 and max_new_tokens=6 .* 64 positions, enough for 5 "):
        bridge.generate(prompt, max_new_tokens=6)
    # A cache has the last token too, which takes a position.
    _, cache = bridge.generate(prompt, max_new_tokens=4, return_cache=True, **given)
    assert cache["blocks.0.hook_out"].shape[1] == 64
    with pytest.raises(InputError, match="enough for 4 new tokens that are all cached"):
        bridge.generate(prompt, max_new_tokens=5, return_cache=True)


def test_prompts_longer_than_the_context(wrapped: Any, demo_bridge: Any) -> None:
    """Refused before anything runs; text is not cut in silence."""
    with pytest.raises(InputError, match="65 tokens are more than the 64"):
        wrapped("gpt2").generate(torch.ones(1, 65, dtype=torch.long))
    text = "The cat " * 200
    n = len(demo_bridge.tokenizer(text)["input_ids"]) + 1
    with pytest.raises(InputError, match=f"{n} tokens are more than the 256"):
        demo_bridge.generate(text)


def test_rotary_positions_go_on(wrapped: Any, generation: Any) -> None:
    """Where positions are computed there is no last one."""
    bridge = wrapped("llama")
    assert bridge.cfg.n_ctx == 64
    prompt = torch.randint(8, 100, (1, 66), generator=torch.Generator().manual_seed(2))
    found = bridge.generate(prompt, max_new_tokens=2, do_sample=False)
    assert torch.equal(found, generation.greedy(bridge.original_model, prompt, 2))


# --- what comes back --------------------------------------------------------------------------------------


def test_return_types(demo_bridge: Any) -> None:
    """A string for a string, a list for a list, ids for ids; "str" and "tokens" whatever the input."""
    ids = demo_bridge.to_tokens("The cat")
    given = {"max_new_tokens": 6, "do_sample": False}
    tokens = demo_bridge.original_model.generate(ids, **given)
    text = demo_bridge.tokenizer.decode(tokens[0, 1:].tolist())  # without BOS
    assert text.startswith("The cat ")
    forms: list[tuple[Any, Any]] = [
        ("The cat", text),
        (["The cat"], [text]),
        (("The cat", "The cat"), [text, text]),
        (ids, tokens),
    ]
    for form, wanted in forms:
        found = demo_bridge.generate(form, **given)
        assert torch.equal(found, wanted) if form is ids else found == wanted
        as_tokens = demo_bridge.generate(form, return_type="tokens", **given)
        assert torch.equal(as_tokens, tokens.expand(len(as_tokens), -1))
    assert demo_bridge.generate(ids, return_type="str", **given) == text
    assert demo_bridge.generate(ids.expand(2, -1), return_type="str", **given) == [text, text]
    assert demo_bridge.generate(["The cat"], return_type="str", **given) == [text]
    several = demo_bridge.generate("The cat", num_return_sequences=2, num_beams=2, **given)
    assert len(several) == 2
    assert all(x.startswith("The cat") for x in several)
    with pytest.raises(InputError, match="'input', 'str' or 'tokens', got 'text'"):
        demo_bridge.generate("The cat", return_type="text")


def test_prepend_bos(demo_bridge: Any) -> None:
    """Text has one BOS in front unless told otherwise."""
    bos = demo_bridge.tokenizer.bos_token_id
    given = {"max_new_tokens": 2, "return_type": "tokens", "do_sample": False}
    plain = demo_bridge.tokenizer("The cat")["input_ids"]
    assert demo_bridge.generate("The cat", **given)[0, :-2].tolist() == [bos, *plain]
    bare = demo_bridge.generate("The cat", prepend_bos=False, **given)
    wanted = demo_bridge.original_model.generate(
        torch.tensor([plain]), max_new_tokens=2, do_sample=False
    )
    assert torch.equal(bare, wanted)


def test_extras(demo_bridge: Any, bridge: Any, ids: Tensor) -> None:
    """The prompt's ids and the cache come behind the answer, the cache first."""
    given = {"max_new_tokens": 3, "do_sample": False}
    answer, prompt = demo_bridge.generate("The cat", return_input_tokens=True, **given)
    assert torch.equal(prompt, demo_bridge.to_tokens("The cat"))
    assert answer == demo_bridge.generate("The cat", **given)
    tokens, cache, prompt = bridge.generate(
        ids, return_input_tokens=True, return_cache=True, names_filter="**.hook_out", **given
    )
    assert torch.equal(prompt, ids)
    assert torch.equal(cache.tokens, tokens)
    out = demo_bridge.generate("The cat", output_logits=True, **given)
    assert torch.equal(
        out.sequences, demo_bridge.generate("The cat", return_type="tokens", **given)
    )
    assert torch.equal(out.logits[0].argmax(-1), out.sequences[:, -3])


def test_hugging_faces_output(bridge: Any, model: Any, ids: Tensor) -> None:
    """return_dict_in_generate and what goes with it means what it means there."""
    options = {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True}
    wanted = model.generate(ids, max_new_tokens=3, do_sample=False, **options)
    found = bridge.generate(ids, max_new_tokens=3, do_sample=False, **options)
    assert type(found) is type(wanted)
    assert torch.equal(torch.stack(found.scores), torch.stack(wanted.scores))
    for step, other in zip(found.hidden_states, wanted.hidden_states, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(step, other, strict=True))


def test_hf_generate(bridge: Any, model: Any, greedy: Any, generation: Any, ids: Tensor) -> None:
    """Hugging Face's defaults: nothing is drawn, 20 new tokens unless the model says."""
    embedded = model.get_input_embeddings()(ids).detach()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using the model-agnostic default")
        found = bridge.hf_generate(ids)
        assert torch.equal(found, model.generate(ids))
    assert found.shape == (2, 29)
    found = bridge.hf_generate(embedded, max_new_tokens=4)
    assert torch.equal(found, model.generate(inputs_embeds=embedded, max_new_tokens=4))
    prompt, mask = generation.prompts()
    found = bridge.hf_generate(prompt, attention_mask=mask.tolist(), max_new_tokens=4, num_beams=2)
    assert torch.equal(
        found, model.generate(prompt, attention_mask=mask, max_new_tokens=4, num_beams=2)
    )
    steps: list[Any] = []
    with bridge.hooks([("blocks.1.hook_out", lambda x, hook: steps.append(hook.step.positions))]):
        found = bridge.hf_generate(ids, max_new_tokens=3)
    assert torch.equal(found, greedy(model, ids, 3))
    assert steps == [range(9), range(9, 10), range(10, 11)]


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [("bert", "masked"), ("vit", "vision"), ("t5", "textenc")]
)
@pytest.mark.parametrize("how", ["generate", "hf_generate", "generate_stream"])
def test_models_without_a_head(
    tiny: Any, inputs_of: Any, ids: Tensor, name: str, kind: str, how: str
) -> None:
    """The class, and what to load instead."""
    model = tiny(name, kind)
    bridge = TransformerBridge(model, example=inputs_of(name, kind) or None)
    words = rf"{type(model).__name__} cannot generate: .*AutoModelForCausalLM"
    with pytest.raises(InputError, match=words):
        getattr(bridge, how)(ids)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"input": "hello"}, "text needs a tokenizer"),
        ({"return_type": "str"}, "text needs a tokenizer"),
        ({"stop_strings": "."}, "stop_strings needs a tokenizer"),
        ({"input": []}, "empty list"),
        ({"input": torch.ones(2, 3)}, "d_model"),
        ({"input": ["a", 3]}, "all text or all token ids"),
    ],
)
def test_inputs_that_cannot_be_used(bridge: Any, ids: Tensor, given: Any, words: str) -> None:
    """Without a tokenizer there is no text; empty and misshapen inputs are named as in forward."""
    with pytest.raises(InputError, match=words):
        bridge.generate(**{"input": ids, "max_new_tokens": 2, **given})


def test_ids_beyond_the_vocabulary(bridge: Any, ids: Tensor) -> None:
    """The id, and the size of the vocabulary."""
    with pytest.raises(InputError, match="token id 160 is outside the vocabulary of 160"):
        bridge.generate(ids.clone().fill_(160), max_new_tokens=2)


def test_points_that_are_not(bridge: Any, ids: Tensor) -> None:
    """An unknown name is refused before anything runs."""
    ran: list[str] = []
    with bridge.hooks([("blocks.0.hook_in", lambda x, hook: ran.append(hook.name))]):
        with pytest.raises(UnknownPointError, match="nearest"):
            bridge.generate(ids, return_cache=True, names_filter="blocks.0.hook_outt")
        assert not ran


def test_unknown_keywords(bridge: Any, ids: Tensor) -> None:
    """A keyword that neither generate nor the model knows is named, and the one that was meant."""
    with pytest.raises(InputError, match=r"'max_new_token'.*did you mean max_new_tokens"):
        bridge.generate(ids, max_new_token=2)
