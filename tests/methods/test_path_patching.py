"""Path patching against three passes with plain PyTorch hooks, and against arithmetic on a model of
attention alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from lensbridge import LensAPI, TransformerBridge, add_row
from lensbridge.bridge import table
from lensbridge.hooks import AbsentPointError, InputError, LayerRangeError
from lensbridge.methods import path_patching
from lensbridge.methods.measured import logit_difference

# Runs are passed as pairs whose length a type checker cannot know.
path_patch: Any = path_patching.path_patch

QUIET = {"progress": False}
CLOSE = {"atol": 1e-10, "rtol": 1e-7}


def _metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 11] - 2 * logits[:, -2, 40]


@pytest.fixture(scope="module")
def lens_of(tiny: Callable[..., Any], tokenizer: Any) -> Callable[..., Any]:
    """In float64: what goes along one path of a random model is small."""
    return cache(lambda name, kind="causal": LensAPI(tiny(name, kind).double(), tokenizer))


@pytest.fixture
def pair(ids: Tensor) -> tuple[Tensor, Tensor]:
    changed = ids.clone()
    changed[:, 2], changed[:, 5] = (changed[:, 2] + 7) % 100 + 8, (changed[:, 5] + 9) % 100 + 8
    return ids, changed


# --- three passes by hand -----------------------------------------------------------------------------------

Take = Callable[[Tensor], Tensor]
"""A part of a value, as a view of it."""

GPT2 = {
    "attn": "transformer.h.{i}.attn.c_proj<",
    "mlp": "transformer.h.{i}.mlp",
    "mlp_in": "transformer.h.{i}.mlp<",
    "qkv": ("transformer.h.{i}.attn.c_attn",) * 3,
}
LLAMA = {
    "attn": "model.layers.{i}.self_attn.o_proj<",
    "mlp": "model.layers.{i}.mlp",
    "mlp_in": "model.layers.{i}.mlp<",
    "qkv": tuple(f"model.layers.{{i}}.self_attn.{x}_proj" for x in "qkv"),
}
# The stream itself is normed behind each sum, and attention and MLP read it in turn.
BERT = {
    "attn": "bert.encoder.layer.{i}.attention.output.dense<",
    "mlp": "bert.encoder.layer.{i}.output.dense",
    "mlp_in": "bert.encoder.layer.{i}.intermediate<",
    "qkv": tuple(f"bert.encoder.layer.{{i}}.attention.self.{x}" for x in ("query", "key", "value")),
}
MODELS = {("gpt2", "causal"): GPT2, ("llama", "causal"): LLAMA, ("bert", "masked"): BERT}


def _head(n: int, head: int) -> Take:
    return lambda x: x.unflatten(-1, (n, -1))[..., head, :]


def _share(name: str, n: int, index: int, head: int) -> Take:
    """A head of q, k or v in what its projection makes; GPT-2 has the three side by side."""
    if name == "gpt2":
        return lambda x: x.unflatten(-1, (3, n, -1))[..., index, head, :]
    return _head(n, head)


def _with(model: Any, plain: Any, given: Tensor, edits: list[tuple[str, Any]]) -> Tensor:
    """Logits with values replaced at some places."""
    with ExitStack() as stack, torch.no_grad():
        for place, edit in edits:
            stack.enter_context(plain.watching(model, place, edit))
        return model(given).logits


def _three_passes(
    model: Any,
    plain: Any,
    runs: tuple[Tensor, Tensor],
    names: Any,
    senders: list[tuple[str, Take]],
    receivers: list[tuple[str, Take]],
) -> Tensor:
    """The metric of each row, hook by hook. No receivers: the logits of the second pass themselves."""
    clean, base = runs
    frozen = [names[part].format(i=i) for i in (0, 1) for part in ("attn", "mlp")]
    places = list(dict.fromkeys([*frozen, *(place for place, _ in senders)]))
    wanted = plain.read(model, clean, *places)
    held = plain.read(model, base, *places)

    def still(place: str) -> Any:
        value = held[place][0].clone()
        for sender, take in senders:
            if sender == place:
                take(value)[:] = take(wanted[place][0])
        return lambda x, count: value

    read: dict[str, Tensor] = {}

    def seen(place: str) -> Any:
        def see(x: Tensor, count: int) -> None:
            read[place] = x.clone()

        return see

    logits = _with(
        model,
        plain,
        base,
        [*((place, still(place)) for place in places), *((p, seen(p)) for p, _ in receivers)],
    )
    if not receivers:
        return _metric(logits)

    def heard(place: str) -> Any:
        def put(x: Tensor, count: int) -> Tensor:
            x = x.clone()
            for receiver, take in receivers:
                if receiver == place:
                    take(x)[:] = take(read[place])
            return x

        return put

    once = dict.fromkeys(place for place, _ in receivers)
    return _metric(_with(model, plain, base, [(place, heard(place)) for place in once]))


@pytest.mark.parametrize("which", MODELS, ids=lambda which: which[0])
def test_heads_to_the_end(lens_of: Any, plain: Any, pair: Any, which: Any) -> None:
    """What each head writes straight to the end of the stream, everything behind it held."""
    lens, names = lens_of(*which), MODELS[which]
    n = lens.bridge.cfg.n_heads
    grid = path_patch(lens.bridge, *pair, _metric, **QUIET)
    assert grid.axes == ("layer", "head")
    assert grid.site == "heads to final"
    for layer in (0, 1):
        for head in range(n):
            sender = (names["attn"].format(i=layer), _head(n, head))
            found = _three_passes(lens.model, plain, pair, names, [sender], [])
            torch.testing.assert_close(grid.by_row[layer, head], found, **CLOSE)
    assert grid.effects.abs().min() > 1e-5


@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("which", MODELS, ids=lambda which: which[0])
def test_heads_to_a_head(lens_of: Any, plain: Any, pair: Any, which: Any, part: str) -> None:
    """Composition: what heads of the first layer tell one input of a head of the second."""
    lens, names, index = lens_of(*which), MODELS[which], "qkv".index(part)
    n = lens.bridge.cfg.n_heads
    own = n if part == "q" else (lens.bridge.cfg.n_key_value_heads or n)
    grid = path_patch(lens.bridge, *pair, _metric, "heads", (part, 1, own - 1), **QUIET)
    receiver = (names["qkv"][index].format(i=1), _share(which[0], own, index, own - 1))
    for head in range(n):
        sender = (names["attn"].format(i=0), _head(n, head))
        found = _three_passes(lens.model, plain, pair, names, [sender], [receiver])
        torch.testing.assert_close(grid.by_row[0, head], found, **CLOSE)
    # Heads of the second layer come too late, and were not run.
    assert not grid.effects[1].any()
    assert grid.effects[0].abs().max() > 1e-5


@pytest.mark.parametrize("which", MODELS, ids=lambda which: which[0])
def test_several_to_several(lens_of: Any, plain: Any, pair: Any, which: Any) -> None:
    """Heads and an MLP that speak together, to a head and an MLP that listen together."""
    lens, names = lens_of(*which), MODELS[which]
    n = lens.bridge.cfg.n_heads
    senders: list[Any] = [(0, 0), (0, 2), ("mlp", 0)]
    grid = path_patch(lens.bridge, *pair, _metric, senders, [("q", 1, 1), ("mlp", 1)], **QUIET)
    assert grid.axes == ()
    assert repr(grid).startswith("PatchGrid(senders to q 1.1, mlp 1, one patch, patched into")
    attn = names["attn"].format(i=0)
    found = _three_passes(
        lens.model,
        plain,
        pair,
        names,
        [(attn, _head(n, 0)), (attn, _head(n, 2)), (names["mlp"].format(i=0), lambda x: x)],
        [
            (names["qkv"][0].format(i=1), _share(which[0], n, 0, 1)),
            (names["mlp_in"].format(i=1), lambda x: x),
        ],
    )
    torch.testing.assert_close(grid.by_row, found, **CLOSE)


def test_mlps_and_their_own_layer(lens_of: Any, plain: Any, pair: Any) -> None:
    """An MLP hears the heads of its own layer; of MLPs only those before it."""
    lens = lens_of("gpt2")
    grid = path_patch(lens.bridge, *pair, _metric, "heads", ("mlp", 1), **QUIET)
    sender = (GPT2["attn"].format(i=1), _head(4, 3))
    receiver = (GPT2["mlp_in"].format(i=1), lambda x: x)
    found = _three_passes(lens.model, plain, pair, GPT2, [sender], [receiver])
    torch.testing.assert_close(grid.by_row[1, 3], found, **CLOSE)
    mlps = path_patch(lens.bridge, *pair, _metric, "mlps", ("mlp", 1), **QUIET)
    assert mlps.axes == ("layer",)
    assert mlps.effects[1] == 0
    assert mlps.effects[0] != 0


def test_positions(lens_of: Any, plain: Any, pair: Any) -> None:
    """Senders can be patched at some positions only, or at each by itself."""
    lens = lens_of("gpt2")
    grid = path_patch(lens.bridge, *pair, _metric, (0, 1), ("v", 1, 2), positions="each", **QUIET)
    assert grid.axes == ("pos",)
    receiver = (GPT2["qkv"][0].format(i=1), _share("gpt2", 4, 2, 2))
    for pos in (2, 6, 8):
        sender = (GPT2["attn"].format(i=0), lambda x, pos=pos: _head(4, 1)(x)[:, pos])
        found = _three_passes(lens.model, plain, pair, GPT2, [sender], [receiver])
        torch.testing.assert_close(grid.by_row[pos], found, **CLOSE)
    swept = path_patch(
        lens.bridge, *pair, _metric, "heads", ("v", 1, 2), positions=[6, [2, 8]], **QUIET
    )
    assert swept.axes == ("layer", "head", "pos")
    torch.testing.assert_close(swept.values[0, 1, 0], grid.values[6], **CLOSE)


def test_batches_and_directions(lens_of: Any, pair: Any) -> None:
    """How many senders run at once changes nothing; into the clean run is the other way round."""
    bridge = lens_of("gpt2").bridge
    grids = [
        path_patch(bridge, *pair, _metric, "heads", ("k", 1, 0), batch_size=size, **QUIET).values
        for size in (1, 6, 64)
    ]
    torch.testing.assert_close(grids[1], grids[0])
    torch.testing.assert_close(grids[2], grids[0])
    into = path_patch(bridge, *pair[::-1], _metric, "heads", ("k", 1, 0), into="clean", **QUIET)
    torch.testing.assert_close(into.values, grids[0])


def test_everything_to_everything(lens_of: Any, pair: Any) -> None:
    """Side by side, attention and MLP read what the layers before them wrote: told all of it, they are
    clean."""
    bridge = lens_of("gpt_neox").bridge
    heads = range(bridge.cfg.n_heads)
    senders: list[Any] = ["embed", *((0, head) for head in heads), ("mlp", 0)]
    receivers: list[Any] = [(part, 1, head) for part in "qkv" for head in heads]
    grid = path_patch(bridge, *pair, _metric, senders, [*receivers, ("mlp", 1), "final"], **QUIET)
    assert float(grid.normalised) == pytest.approx(1.0, abs=1e-9)
    less = path_patch(bridge, *pair, _metric, senders, [*receivers, "final"], **QUIET)
    assert float(less.normalised) != pytest.approx(1.0, abs=1e-3)
    alone = path_patch(bridge, *pair, _metric, "embed", "final", **QUIET)
    assert float(alone.normalised) != pytest.approx(1.0, abs=1e-3)


# --- by arithmetic ------------------------------------------------------------------------------------------

WIDTH, HEADS, SIZE, VOCAB = 24, 3, 8, 60


class _BareConfig(PretrainedConfig):
    model_type = "bare_attention"

    def __init__(self, vocab_size: int = VOCAB, **kwargs: Any) -> None:
        self.vocab_size = vocab_size
        super().__init__(**kwargs)


class _Look(nn.Module):
    """Causal attention, nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(z.transpose(1, 2).flatten(-2))


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.look = _Look()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.look(x)


class _Bare(PreTrainedModel):
    """Embeds, looks twice, scores: no MLP, no norm."""

    config_class = _BareConfig

    def __init__(self, config: _BareConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([_Layer(), _Layer()])
        self.score = nn.Linear(WIDTH, VOCAB, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        x = self.words(input_ids)
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=self.score(x))


@pytest.fixture(scope="module")
def bare() -> Iterator[TransformerBridge]:
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        model = _Bare(_BareConfig()).eval()
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter) * 0.4
    before = dict(table.ROWS)
    add_row("_Bare", blocks="layers")  # without norms they are not taken for layers
    yield TransformerBridge(model)
    table.ROWS.clear()
    table.ROWS.update(before)


def test_attention_alone_by_arithmetic(bare: TransformerBridge) -> None:
    """Without norms and MLPs paths are products of matrices: z W_O W_U, and through a value z W_O W_V W_O
    W_U."""
    model: Any = bare.original_model
    clean = torch.randint(VOCAB, (1, 6), generator=torch.Generator().manual_seed(1))
    base = clean.clone()
    base[0, 1] = (base[0, 1] + 5) % VOCAB
    sender, reader, token = 1, 2, 7

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, token]

    with torch.no_grad():
        stream = {name: model.words(ids) for name, ids in (("clean", clean), ("base", base))}
        first, second = (layer.look for layer in model.layers)
        patterns, zs = {}, {}
        for name, x in stream.items():
            q, k, v = (p(x)[0].unflatten(-1, (HEADS, SIZE)) for p in (first.q, first.k, first.v))
            scores = torch.einsum("qhd,khd->hqk", q, k) / SIZE**0.5
            scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
            zs[name] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        rows = slice(sender * SIZE, (sender + 1) * SIZE)
        change = (zs["clean"] - zs["base"])[:, sender] @ first.o.weight[:, rows].T  # [pos, d_model]
        direct = (change @ model.score.weight[token])[-1]

        x = stream["base"][0] + torch.einsum(
            "qhd,mhd->qm", zs["base"], first.o.weight.unflatten(-1, (HEADS, SIZE))
        )
        q, k = (p(x).unflatten(-1, (HEADS, SIZE)) for p in (second.q, second.k))
        scores = torch.einsum("qhd,khd->hqk", q, k) / SIZE**0.5
        scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
        patterns = scores.softmax(-1)[reader]
        rows = slice(reader * SIZE, (reader + 1) * SIZE)
        value = change @ second.v.weight[rows].T
        through = patterns @ value @ second.o.weight[:, rows].T @ model.score.weight[token]
        plain = model(base).logits[0, -1, token]
    found = path_patch(bare, clean, base, metric, "heads", "final", **QUIET)
    assert float(found.values[0, sender] - plain) == pytest.approx(float(direct), abs=1e-4)
    found = path_patch(bare, clean, base, metric, (0, sender), ("v", 1, reader), **QUIET)
    assert float(found.values - plain) == pytest.approx(float(through[-1]), abs=1e-4)
    assert abs(float(direct)) > 0.01
    assert abs(float(through[-1])) > 0.01
    both = path_patch(bare, clean, base, metric, (0, sender), [("v", 1, reader), "final"], **QUIET)
    expected = float(direct + through[-1])
    assert float(both.values - plain) == pytest.approx(expected, abs=1e-4)


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("senders", "receivers", "kind", "message"),
    [
        ("head", "final", InputError, "senders are 'heads' or 'mlps' one by one"),
        ([], "final", InputError, "senders is empty"),
        ([("attn", 1)], "final", InputError, r"got \('attn', 1\)"),
        ((0, 4), "final", InputError, "heads: there is no 4; there are 4"),
        ((5, 0), "final", LayerRangeError, "layer 5 is not one of this model's 2"),
        ("heads", [], InputError, "receivers is empty"),
        ("heads", "logits", InputError, "receivers are 'final'"),
        ("heads", ("q", 1, 9), InputError, "has heads 0 to 3, got 9"),
        ((1, 0), ("q", 1, 1), InputError, "no sender comes before a receiver"),
        (("mlp", 1), ("mlp", 0), InputError, "no sender comes before a receiver"),
        ("heads", ("k", 0, 1), InputError, "no sender comes before a receiver"),
    ],
)
def test_refusals(
    lens_of: Any, left_alone: Any, pair: Any, senders: Any, receivers: Any, kind: Any, message: str
) -> None:
    """What was given, what was expected; nobody listens afterwards."""
    with left_alone(lens_of("gpt2")) as lens, pytest.raises(kind, match=message):
        path_patch(lens.bridge, *pair, _metric, senders, receivers, **QUIET)


def test_models_without_heads(lens_of: Any, pair: Any) -> None:
    """A mixer has no heads to speak; its layers can still be held for what else there is."""
    with pytest.raises(AbsentPointError):
        path_patch(lens_of("mamba").bridge, *pair, _metric, **QUIET)
    with pytest.raises(InputError, match="clean is 2 x 9 tokens and corrupted 2 x 8"):
        path_patch(lens_of("gpt2").bridge, pair[0], pair[1][:, :8], logit_difference(1, 2))
