"""Where a splitter splits: every way of saying it, where the model stops, what it is built from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn

from lensbridge import (
    AbsentPointError,
    HookNotFiredError,
    InputError,
    LayerRangeError,
    LensError,
    ModelWithSplitPoints,
    SplitterForGeneration,
    TransformerBridge,
    UnknownPointError,
    demo,
)

TEXTS = ["some words", "a"]

PLACES = {
    # what is said -> (the point it is, the module of a GPT-2 by hand, how many of four blocks begin)
    0: ("blocks.0.hook_out", "transformer.h.0", 1),
    2: ("blocks.2.hook_out", "transformer.h.2", 3),
    -1: ("blocks.3.hook_out", "transformer.h.3", 4),
    -4: ("blocks.0.hook_out", "transformer.h.0", 1),
    "blocks.1.hook_out": ("blocks.1.hook_out", "transformer.h.1", 2),
    "blocks.1.hook_resid_post": ("blocks.1.hook_out", "transformer.h.1", 2),
    "blocks.1.hook_resid_pre": ("blocks.1.hook_in", "transformer.h.1<", 1),
    "blocks.2.mlp.hook_out": ("blocks.2.mlp.hook_out", "transformer.h.2.mlp", 3),
    "blocks.1.attn.hook_z": ("blocks.1.attn.hook_z", "transformer.h.1.attn.c_proj<", 2),
    "transformer.h.1": ("blocks.1.hook_out", "transformer.h.1", 2),
    "transformer.h.2.mlp.c_fc": (
        "raw:transformer.h.2.mlp.c_fc.hook_out",
        "transformer.h.2.mlp.c_fc",
        3,
    ),
    "raw:transformer.h.1.ln_2.hook_in": (
        "raw:transformer.h.1.ln_2.hook_in",
        "transformer.h.1.ln_2<",
        2,
    ),
    "transformer.wte": ("raw:transformer.wte.hook_out", "transformer.wte", 0),
    "hook_embed": ("embed.hook_out", "transformer.wte", 0),
    "ln_final.hook_out": ("ln_final.hook_out", "transformer.ln_f", 4),
    "transformer.ln_f": ("raw:transformer.ln_f.hook_out", "transformer.ln_f", 4),
}


@pytest.fixture(scope="module")
def bridge(tiny: Callable[..., nn.Module], tokenizer: Any) -> TransformerBridge:
    """A bridge around a GPT-2 of four layers; no test here changes it."""
    return TransformerBridge(tiny("gpt2", n_layer=4), tokenizer)


class Calls:
    """How often each block and the head of a GPT-2 ran, by plain hooks on the first thing a block calls."""

    def __init__(self, model: Any) -> None:
        self.watched = [*(block.ln_1 for block in model.transformer.h), model.lm_head]
        self.blocks = [0] * len(model.transformer.h)
        self.head = 0

    def _count(self, index: int) -> None:
        if index < len(self.blocks):
            self.blocks[index] += 1
        else:
            self.head += 1

    def __enter__(self) -> Calls:
        self.stack = ExitStack()
        for index, module in enumerate(self.watched):
            hook = lambda m, args, out, index=index: self._count(index)  # noqa: E731
            self.stack.callback(module.register_forward_hook(hook).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()


@pytest.mark.parametrize("said", PLACES, ids=str)
def test_every_way_to_say_where(bridge: Any, tokenizer: Any, plain: Any, said: int | str) -> None:
    """A layer, a name, an alias, a path: the rows are what a plain hook sees there, heads side by side."""
    name, path, _ = PLACES[said]
    splitter = SplitterForGeneration(bridge, said)
    assert splitter.split_point == str(bridge.registry[name].name)
    found, _ = splitter.get_activations(TEXTS, flatten_activations=False)
    for rows, text in zip(found, TEXTS, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert torch.equal(rows, plain.read(bridge.original_model, ids, path)[path][0][0])
    assert splitter.get_latent_shape()[:2] == (1, 4)


@pytest.mark.parametrize("said", PLACES, ids=str)
def test_the_model_stops_behind_it(bridge: Any, said: int | str) -> None:
    """No later block begins, nor does the head run; each earlier block runs once a batch."""
    n = PLACES[said][2]
    splitter = SplitterForGeneration(bridge, said, batch_size=2)
    for run in (
        lambda: splitter.get_activations(TEXTS),
        lambda: splitter.inputs_to_activations(TEXTS),
        splitter.get_latent_shape,
    ):
        with Calls(bridge.original_model) as calls:
            run()
        assert calls.blocks == [1] * n + [0] * (4 - n)
        assert calls.head == 0


@pytest.mark.parametrize(
    ("said", "error", "message"),
    [
        (4, LayerRangeError, "layer 4 .* 4 .0 to 3."),
        (-5, LayerRangeError, "layer -5"),
        (True, InputError, "True"),
        ("blocks.4.hook_out", UnknownPointError, "blocks.4"),
        ("blocks.1.hook_ouk", UnknownPointError, "hook_ou"),
        ("transformer.h.7", UnknownPointError, "transformer.h.7"),
        ("h.1", UnknownPointError, "h.1"),
        ("", UnknownPointError, "''"),
        ("blocks.1.attn.hook_rot_q", AbsentPointError, "rotate"),
    ],
)
def test_places_that_are_not_there(
    bridge: Any, said: Any, error: type[Exception], message: str
) -> None:
    """A place the model does not have is an error of its kind, from the constructors and the setter."""
    for make in (
        lambda: SplitterForGeneration(bridge, said),
        lambda: ModelWithSplitPoints(bridge, None, [1, said]),
    ):
        with pytest.raises(error, match=message):
            make()
    splitter = SplitterForGeneration(bridge, 1)
    with pytest.raises(error, match=message):
        splitter.split_point = said
    assert splitter.split_point == "blocks.1.hook_out"


def test_a_model_whose_layers_are_not_known(tiny: Any, tokenizer: Any) -> None:
    """XLM keeps the parts of its layers in lists: numbers are refused, paths work."""
    model = tiny("xlm", "masked")
    with pytest.raises(LayerRangeError, match="layers of XLMWithLMHeadModel are not known"):
        ModelWithSplitPoints(model, tokenizer, 0)
    split = ModelWithSplitPoints(model, tokenizer, "transformer.ffns.0")
    assert split.get_activations("abc")[0].shape == (3, 64)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("said", [None, 1.5, ["blocks.1.hook_out"]])
def test_what_is_no_place(bridge: Any, said: Any) -> None:
    """Neither a number of a layer nor a name: an error that says what a split point is."""
    with pytest.raises(InputError, match="a split point is a layer"):
        SplitterForGeneration(bridge, said)


def test_the_place_can_be_moved(bridge: Any, tokenizer: Any, plain: Any) -> None:
    """After split_point is set, values, shape and where the model stops are those of the new place."""
    splitter = SplitterForGeneration(bridge, 3)
    splitter.get_activations(TEXTS)
    splitter.split_point = "transformer.h.1.mlp.c_fc"
    path = "transformer.h.1.mlp.c_fc"
    ids = torch.tensor([tokenizer("words")["input_ids"]])
    with Calls(bridge.original_model) as calls:
        found, _ = splitter.get_activations("words")
    assert calls.blocks == [1, 1, 0, 0]
    assert torch.equal(found, plain.read(bridge.original_model, ids, path)[path][0][0])
    assert splitter.get_latent_shape() == (1, 4, 256)


def test_the_model_stops_inside_a_layer(bridge: Any) -> None:
    """Right behind the place: of its layer, too, nothing more runs. The head is a place as well."""
    runs: list[str] = []
    block: Any = bridge.original_model.get_submodule("transformer.h.1")
    handles = [
        module.register_forward_hook(lambda *given, name=name: runs.append(name))
        for name, module in block.named_children()
    ]
    SplitterForGeneration(bridge, "blocks.1.attn.hook_out").get_activations(TEXTS[:1])
    for handle in handles:
        handle.remove()
    assert runs == [
        "ln_1"
    ]  # nor does whoever listens behind the splitter hear of the attention itself
    logits, _ = SplitterForGeneration(bridge, "lm_head").get_activations("abc")
    assert torch.equal(logits, bridge("abc", prepend_bos=False)[0])


def test_a_module_that_is_not_passed(tiny: Any, tokenizer: Any) -> None:
    """The model ran to its end and there is nothing to show: an error that says where."""
    model = tiny("gpt2")
    model.transformer.add_module("idle", nn.Linear(64, 64))
    splitter = SplitterForGeneration(model, "transformer.idle", tokenizer=tokenizer)
    for run in (
        lambda: splitter.get_activations("abc"),
        splitter.get_latent_shape,
        lambda: splitter.concept_output_gradient("abc", torch.clone, torch.clone),
    ):
        with pytest.raises(HookNotFiredError, match=r"transformer\.idle"):
            run()


def test_a_module_that_is_passed_several_times(tiny: Any, tokenizer: Any, plain: Any) -> None:
    """ALBERT's layers are one module: a path is its first call, a canonical name one of them."""
    model = tiny("albert", "masked")
    path = "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn"
    split = ModelWithSplitPoints(model, tokenizer, path)
    given = torch.tensor([tokenizer("abc")["input_ids"]])
    calls: list[Any] = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda m, args, out: calls.append(out.clone())
    )
    model(given)
    handle.remove()
    assert len(calls) > 1
    assert torch.equal(split.get_activations("abc")[0], calls[0][0])
    with pytest.raises(InputError, match="more than once"):
        split.concept_output_gradient("abc", torch.clone, torch.clone)
    split.split_points = "blocks.1.hook_out"
    assert split.concept_output_gradient("abc", torch.clone, torch.clone)[0].shape == (3, 3, 64)


@pytest.mark.parametrize("length", [4, 5])
def test_a_place_that_shows_no_row_a_token(bridge: Any, length: int) -> None:
    """Patterns are [batch, head, query, key]: refused, also where there are as many tokens as heads."""
    splitter = SplitterForGeneration(bridge, "blocks.1.attn.hook_pattern")
    for run in (
        splitter.get_activations,
        splitter.inputs_to_activations,
        lambda text: splitter.concept_output_gradient(text, torch.clone, torch.clone),
    ):
        with pytest.raises(InputError, match=r"batch, head, query, key.*\[batch, pos, d\]"):
            run("abcdefg"[:length])
    with pytest.raises(InputError, match="query"):
        splitter.get_latent_shape()


def test_places_of_models_with_other_streams(tiny: Any, tokenizer: Any) -> None:
    """Positions that are no tokens, a stream in four versions: refused with their shapes."""
    for name, shape in (("prophetnet", r"\[1, 9, 64\]"), ("gemma3n_text", r"\[4, 1, 3, 64\]")):
        splitter = ModelWithSplitPoints(tiny(name), tokenizer, 0)
        with pytest.raises(InputError, match=shape):
            splitter.get_activations(["abc"])


@pytest.mark.parametrize("said", ["hook_pos_embed", "transformer.wpe"])
def test_a_place_that_all_texts_share(bridge: Any, said: str) -> None:
    """GPT-2's position embeddings are [1, pos, d]: each text has its rows; nobody can rebuild them apart."""
    splitter = SplitterForGeneration(bridge, said, batch_size=2)
    weights: Any = bridge.original_model.get_submodule("transformer.wpe").weight
    found, _ = splitter.get_activations(["abc", "ab"])
    assert torch.equal(found, weights[[0, 1, 2, 0, 1]])
    assert torch.equal(splitter.inputs_to_activations(["abc", "abd"])[1], weights[:3])
    ids = bridge.to_tokens(["abc", "abd"], prepend_bos=False)
    assert torch.equal(splitter.get_activations(ids)[0], weights[[0, 1, 2, 0, 1, 2]])
    with pytest.raises(InputError, match="batch_size=1"):
        splitter.concept_output_gradient(ids, torch.clone, torch.clone)
    found = splitter.concept_output_gradient(ids, torch.clone, torch.clone, batch_size=1)
    assert [tuple(x.shape) for x in found] == [(3, 3, 64)] * 2


def test_a_place_without_positions(new_classifier: Any, letters: Any) -> None:
    """What has no row a token, such as a pooled text, is refused with its shape."""
    splitter = ModelWithSplitPoints(new_classifier(), letters("[CLS] $A [SEP]"), "bert.pooler")
    with pytest.raises(InputError, match=r"bert.pooler.*\[1, 32\]"):
        splitter.get_activations(["abc"])


# --- what it is built from ----------------------------------------------------------------------------------


def test_from_a_folder() -> None:
    """A checkpoint brings its tokenizer; keywords and a class go to its loading."""
    from transformers import GPT2LMHeadModel

    class Special(GPT2LMHeadModel):
        """Not the class that would be taken unasked."""

    splitter = SplitterForGeneration(
        str(demo.path()), 2, automodel=Special, dtype=torch.bfloat16, device_map="cpu"
    )
    assert type(splitter.model) is Special
    assert splitter.model.dtype == torch.bfloat16
    assert splitter.tokenizer("The dog")["input_ids"]
    with torch.no_grad():
        states = splitter.model.transformer(
            torch.tensor([splitter.tokenizer("The dog")["input_ids"]]), output_hidden_states=True
        ).hidden_states
    splitter.split_point = 1
    assert torch.equal(splitter.get_activations("The dog")[0], states[2][0].float())


def test_from_a_model_or_a_bridge(bridge: Any, tokenizer: Any) -> None:
    """A model is wrapped, a bridge taken as it is; both give the same."""
    of_bridge = SplitterForGeneration(bridge, 1)
    of_model = SplitterForGeneration(
        bridge.original_model, 1, tokenizer=tokenizer, device_map="cpu"
    )
    assert of_bridge.bridge is bridge
    assert of_model.model is of_bridge.model is bridge.original_model
    assert of_model.device == torch.device("cpu")
    assert torch.equal(of_model.get_activations(TEXTS)[0], of_bridge.get_activations(TEXTS)[0])


def test_from_a_compiled_model(tiny: Any, tokenizer: Any) -> None:
    """Paths are those of the model itself; rows are the same, and it is said once that hooks run eagerly."""
    model, path = tiny("gpt2"), "transformer.h.1.mlp"
    expected, _ = SplitterForGeneration(model, path, tokenizer=tokenizer).get_activations(TEXTS)
    compiled: Any = torch.compile(model, backend="eager")
    with pytest.warns(UserWarning, match="compiled"):
        found, _ = SplitterForGeneration(compiled, path, tokenizer=tokenizer).get_activations(TEXTS)
    assert torch.equal(found, expected)


def test_from_a_model_on_disk(tmp_path: Any, plain: Any) -> None:
    """A checkpoint whose layers are partly on disk: each run, cut short inside one, leaves it there."""
    on_disk = {f"transformer.h.{i}": "disk" if i in (1, 2) else "cpu" for i in range(4)}
    parts = dict.fromkeys(("wte", "wpe", "drop", "ln_f"), "cpu")
    where = {**{f"transformer.{name}": on for name, on in parts.items()}, **on_disk}
    splitter = SplitterForGeneration(
        str(demo.path()),
        "transformer.h.2.attn",
        device_map={**where, "lm_head": "cpu"},
        offload_folder=str(tmp_path),
    )
    expected, _ = SplitterForGeneration(demo.path(), "transformer.h.2.attn").get_activations(
        "A dog"
    )
    for _ in range(2):
        assert plain.gap(splitter.get_activations("A dog")[0], expected) < 1e-6
        devices = {
            p.device.type for p in splitter.model.get_submodule("transformer.h.2").parameters()
        }
        assert devices == {"meta"}


def test_a_bridge_that_is_given_stays_as_it_is(
    bridge: Any, tokenizer: Any, new_tokenizer: Any
) -> None:
    """Another tokenizer for the splitter is none for the bridge, which others use."""
    side = bridge.cfg.default_padding_side
    other = new_tokenizer(padding_side="left", bos_token="<eos>")
    splitter = SplitterForGeneration(bridge, 0, tokenizer=other)
    assert splitter.tokenizer is other
    assert splitter.bridge is bridge
    assert bridge.tokenizer is tokenizer
    assert bridge.cfg.default_padding_side == side
    # To the other one this is five letters, to the bridge's a special token.
    assert splitter.get_activations("<bos>a")[0].shape == (6, 64)
    assert SplitterForGeneration(bridge, 0).get_activations("<bos>a")[0].shape == (1, 64)


def test_a_configuration_for_loading() -> None:
    """config= loads a checkpoint with it, and is not changed; a path is taken for the configuration there."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(demo.path(), attn_pdrop=0.25)
    before = config.to_dict()
    splitter = SplitterForGeneration(demo.path(), 1, config=config)
    assert splitter.model.config.attn_pdrop == 0.25
    assert config.to_dict() == before
    plain = SplitterForGeneration(demo.path(), 1, config=str(demo.path()))
    assert plain.model.config.attn_pdrop != 0.25
    assert torch.equal(splitter.get_activations("a")[0], plain.get_activations("a")[0])


def test_only_causal_language_models(
    tiny: Callable[..., nn.Module], tokenizer: Any, new_classifier: Any, letters: Any
) -> None:
    """Anything else is a TypeError that names the class and the one to use."""
    models = [
        tiny("bert", "masked"),
        tiny("bert", "textenc"),
        tiny("t5", "seq2seq"),
        new_classifier(),
    ]
    for model in models:
        with pytest.raises(
            TypeError, match=f"{type(model).__name__} is none; use ModelWithSplitPoints"
        ):
            SplitterForGeneration(model, 0, tokenizer=tokenizer)


def test_options_that_exclude_each_other(bridge: Any, tokenizer: Any) -> None:
    """No tokenizer, no batch, options for loading what is loaded: each is an error that says so."""
    model = bridge.original_model
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "tokenizer"),
        ({"batch_size": 0}, "batch_size is at least 1, got 0"),
        ({"batch_size": -2}, "got -2"),
        ({"device_map": "auto"}, "device_map='auto'"),
        ({"torch_dtype": torch.bfloat16}, "torch_dtype.*loaded already"),
        ({"automodel": type(model)}, "automodel.*loaded already"),
        ({"config": model.config}, "config.*loaded already"),
    ]
    for options, message in wrong:
        given = {"tokenizer": tokenizer, **options} if options else {}
        with pytest.raises(InputError, match=message):
            SplitterForGeneration(model, 1, **given)
    for plan in ("balanced", {"": "cpu"}):
        with pytest.raises(InputError, match="being loaded"):
            SplitterForGeneration(model, 1, tokenizer=tokenizer, device_map=plan)
    with pytest.raises(InputError, match="at least one split point"):
        ModelWithSplitPoints(model, tokenizer)
    with pytest.raises(InputError, match="given twice: 1, 1"):
        ModelWithSplitPoints(model, tokenizer, [1, 1])
    with pytest.raises(InputError, match="tokenizer= is a tokenizer, got str"):
        SplitterForGeneration(model, 1, tokenizer="gpt2")


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_model(tokenizer: Any) -> None:
    """An object that is neither a name, a model nor a bridge is a TypeError."""
    with pytest.raises(TypeError, match="got int"):
        SplitterForGeneration(3, 1, tokenizer=tokenizer)
    with pytest.raises((OSError, LensError)):
        SplitterForGeneration("/no/such/folder", 1, tokenizer=tokenizer)
