"""Architectures that nobody has seen: odd names, odd layouts. Inferred and proved, or refused with a reason.

Each is written here as a small Hugging Face model whose names say nothing. What the bridge finds is compared with
weights sliced by hand, with attention computed by hand, and with edits made by plain PyTorch hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from lensbridge import AbsentPointError, ArchitectureError, InputError, TransformerBridge, add_row
from lensbridge.bridge import table

WIDTH, HEADS, SIZE, VOCAB = 24, 3, 8, 160
"""Stream, heads, head size. Three heads, so that a split by heads is not one by q, k, v in disguise."""

FLOAT = 5e-6


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


class OddConfig(PretrainedConfig):
    """Sizes under the names any config has, and no more."""

    model_type = "odd"

    def __init__(self, depth: int = 3, vocab_size: int = VOCAB, **kwargs: Any) -> None:
        self.depth = depth
        self.vocab_size = vocab_size
        super().__init__(**kwargs)


class Odd(PreTrainedModel):
    """Embeds, runs its trunk, normalises, scores."""

    config_class = OddConfig

    def __init__(self, config: OddConfig, trunk: nn.Module) -> None:
        super().__init__(config)
        self.lexicon = nn.Embedding(config.vocab_size, WIDTH)
        self.trunk = trunk
        self.last_sieve = nn.LayerNorm(WIDTH)
        self.verdict = nn.Linear(WIDTH, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        """Logits, [batch, pos, d_vocab]."""
        return CausalLMOutput(
            logits=self.verdict(self.last_sieve(self.trunk(self.lexicon(input_ids))))
        )


def causal(length: int) -> Tensor:
    """True where a query may look, [query, key]."""
    return torch.ones(length, length).tril().bool()


class Chain(nn.Module):
    """Runs the modules of an oddly named list."""

    def __init__(self, bolts: list[nn.Module]) -> None:
        super().__init__()
        self.bolts = nn.ModuleList(bolts)

    def forward(self, x: Tensor) -> Tensor:
        """The stream behind the last."""
        for bolt in self.bolts:
            x = bolt(x)
        return x


# --- (a) parallel, joint projection as v, q, k of one head after the other ---------------------------------


class Knot(nn.Module):
    """Attention through the fused kernel; one projection holds v, q and k head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.tangle = nn.Linear(WIDTH, 3 * HEADS * SIZE)
        self.splice = nn.Linear(HEADS * SIZE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """What it adds."""
        rows, length, _ = x.shape
        runs = self.tangle(x).view(rows, length, HEADS, 3, SIZE).permute(3, 0, 2, 1, 4)
        v, q, k = runs[0], runs[1], runs[2]
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.splice(z.transpose(1, 2).reshape(rows, length, HEADS * SIZE))


class Loom(nn.Module):
    """A plain MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.spread = nn.Linear(WIDTH, 40)
        self.gather = nn.Linear(40, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """What it adds."""
        return self.gather(F.gelu(self.spread(x)))


class Warp(nn.Module):
    """Both from one norm, in one sum."""

    def __init__(self) -> None:
        super().__init__()
        self.sieve = nn.LayerNorm(WIDTH)
        self.knot = Knot()
        self.loom = Loom()

    def forward(self, x: Tensor) -> Tensor:
        """The stream behind it."""
        clean = self.sieve(x)
        return x + self.knot(clean) + self.loom(clean)


class Weft(Odd):
    """Architecture (a)."""

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config, Chain([Warp() for _ in range(config.depth)]))


# --- (b) norms behind the sums, attention written out, grouped heads, gate last -----------------------------


class Leveller(nn.Module):
    """An RMS norm under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.pitch = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Normalised."""
        return self.pitch * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


class Gaze(nn.Module):
    """Attention by einsum and softmax; four heads share the keys and values of two."""

    def __init__(self) -> None:
        super().__init__()
        self.ask = nn.Linear(WIDTH, 4 * SIZE, bias=False)
        self.tell = nn.Linear(WIDTH, 2 * SIZE, bias=False)
        self.bear = nn.Linear(WIDTH, 2 * SIZE, bias=False)
        self.join = nn.Linear(4 * SIZE, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """What it adds."""
        rows, length, _ = x.shape
        q = self.ask(x).view(rows, length, 4, SIZE)
        k = self.tell(x).view(rows, length, 2, SIZE).repeat_interleave(2, dim=2)
        v = self.bear(x).view(rows, length, 2, SIZE).repeat_interleave(2, dim=2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / SIZE**0.5
        scores = scores.masked_fill(~causal(length).to(x.device), -1e9)
        z = torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, dim=-1), v)
        return self.join(z.reshape(rows, length, 4 * SIZE))


class Sluice(nn.Module):
    """A gated MLP: the first projection is the value, the second its gate."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 40, bias=False)
        self.second = nn.Linear(WIDTH, 40, bias=False)
        self.third = nn.Linear(40, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """What it adds."""
        return self.third(self.first(x) * F.silu(self.second(x)))


class Tier(nn.Module):
    """Each sum is normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.gaze = Gaze()
        self.even = Leveller()
        self.sluice = Sluice()
        self.odd = Leveller()

    def forward(self, x: Tensor) -> Tensor:
        """The stream behind it."""
        x = self.even(x + self.gaze(x))
        return self.odd(x + self.sluice(x))


class Ziggurat(Odd):
    """Architecture (b)."""

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config, Chain([Tier() for _ in range(config.depth)]))


# --- (c) sandwich norms of an odd formula, half steps, layers in no list -------------------------------------


class Squash(nn.Module):
    """A norm that is neither LayerNorm nor RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.heft = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Divided by one and its mean size."""
        return self.heft * x / (1 + x.abs().mean(-1, keepdim=True))


class Cell(nn.Module):
    """Half of what each part makes, normalised before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.squash_a, self.squash_b = Squash(), Squash()
        self.squash_c, self.squash_d = Squash(), Squash()
        self.knot = Knot()
        self.loom = Loom()

    def forward(self, x: Tensor) -> Tensor:
        """The stream behind it."""
        x = x + 0.5 * self.squash_b(self.knot(self.squash_a(x)))
        return x + 0.5 * self.squash_d(self.loom(self.squash_c(x)))


class Tissue(nn.Module):
    """Two layers that stand in no list."""

    def __init__(self) -> None:
        super().__init__()
        self.cell_0 = Cell()
        self.cell_1 = Cell()

    def forward(self, x: Tensor) -> Tensor:
        """The stream behind both."""
        return self.cell_1(self.cell_0(x))


class Culture(Odd):
    """Architecture (c)."""

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config, Tissue())


# --- a layer that is no sum ---------------------------------------------------------------------------------


class Valve(nn.Module):
    """Its sum is multiplied by a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.sieve = nn.LayerNorm(WIDTH)
        self.knot = Knot()
        self.lid = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """The stream, let through in part."""
        return (x + self.knot(self.sieve(x))) * torch.sigmoid(self.lid(x))


class Pipe(Odd):
    """A model of such layers."""

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config, Chain([Valve() for _ in range(config.depth)]))


# --- norms of one class that differ by a setting --------------------------------------------------------------


class Tilt(nn.Module):
    """Centres its input or does not."""

    def __init__(self, is_centred: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.eps = 1e-5
        self.is_centred = is_centred

    def forward(self, x: Tensor) -> Tensor:
        """Normalised."""
        x = x - x.mean(-1, keepdim=True) if self.is_centred else x
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


class Slope(nn.Module):
    """Two norms of one class, two formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.tilt_a, self.tilt_b = Tilt(False), Tilt(True)
        self.knot, self.loom = Knot(), Loom()

    def forward(self, x: Tensor) -> Tensor:
        """The stream behind it."""
        x = x + self.knot(self.tilt_a(x))
        return x + self.loom(self.tilt_b(x))


class Hill(Odd):
    """A model of such layers."""

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config, Chain([Slope() for _ in range(config.depth)]))


# --- helpers ------------------------------------------------------------------------------------------------


def grown(kind: Callable[[OddConfig], Odd]) -> Odd:
    """A model with weights large enough that every part matters."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = kind(OddConfig()).eval()
        for parameter in model.parameters():
            by = 0.3 if parameter.dim() < 2 else 0.2
            parameter.data += by * torch.randn_like(parameter)
    return model


@pytest.fixture
def rowed() -> Iterator[Callable[..., None]]:
    """`add_row`, undone afterwards."""
    before = dict(table.ROWS)
    yield add_row
    table.ROWS.clear()
    table.ROWS.update(before)


def pattern_of(q: Tensor, k: Tensor) -> Tensor:
    """Causal softmax attention of [batch, pos, head, d_head], [batch, head, query, key]."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return torch.softmax(scores.masked_fill(~causal(q.shape[1]), -torch.inf), dim=-1)


def edit(bridge: TransformerBridge, ids: Tensor, name: str, fn: Callable[[Tensor], Tensor]) -> Any:
    return bridge.run_with_hooks(ids, fwd_hooks=[(name, lambda x, hook: fn(x))])


def one_head(n: int, d: int, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn`` on [batch, pos, head, d_head], as an edit of [batch, pos, head * d_head]."""
    return lambda x: fn(x.unflatten(-1, (n, d))).flatten(-2)


def joint(fn: Callable[[Tensor], Tensor], which: int) -> Callable[[Tensor], Tensor]:
    """``fn`` on one of v, q and k of all heads, as an edit of what `Knot.tangle` makes."""

    def on_all(x: Tensor) -> Tensor:
        runs = x.unflatten(-1, (HEADS, 3, SIZE)).clone()
        runs[..., which, :] = fn(runs[..., which, :])
        return runs.flatten(-3)

    return on_all


# --- all three ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Weft, Ziggurat])
def test_made_up_models_are_proved(kind: Any, ids: Tensor) -> None:
    """Every identity holds, embeddings and head are found, and the bare model's bits are kept."""
    model = grown(kind)
    bridge = TransformerBridge(model)
    proof = bridge.verify()
    assert proof.holds, str(proof)
    assert bridge.architecture.unproved == ""
    assert [block.unproved for block in bridge.architecture.blocks] == [""] * 3
    assert bridge.layer_types() == ["attn + mlp"] * 3
    assert bridge.architecture.main.embed == "lexicon"
    assert bridge.architecture.unembed == "verdict"
    assert bridge.architecture.main.ln_final.path == "last_sieve"
    assert torch.equal(bridge(ids), model(ids).logits)
    assert (bridge.cfg.d_model, bridge.cfg.d_vocab, bridge.cfg.d_head) == (WIDTH, VOCAB, SIZE)


def test_parallel_block(ids: Tensor) -> None:
    """(a): one norm for both, one sum, and so no value between them."""
    bridge = TransformerBridge(grown(Weft))
    block = bridge.architecture.blocks[1]
    assert block.is_parallel
    assert bridge.cfg.parallel_attn_mlp
    assert {branch.ln.path for branch in block.branches} == {"trunk.bolts.1.sieve"}
    assert "blocks.1.hook_resid_mid" not in bridge.registry
    assert "parallel" in bridge.why("blocks.1.hook_resid_mid")
    _, cache = bridge.run_with_cache(ids)
    total = cache["resid_pre", 1] + cache["attn_out", 1] + cache["mlp_out", 1]
    torch.testing.assert_close(total, cache["resid_post", 1])


def test_joint_projection_in_an_order_of_its_own(plain: Any, ids: Tensor) -> None:
    """(a): v, q and k of each head are taken from where they lie, not from where they usually do."""
    model = grown(Weft)
    _, cache = TransformerBridge(model).run_with_cache(ids)
    for layer in range(3):
        tangle = model.get_submodule(f"trunk.bolts.{layer}.knot.tangle")
        clean = plain.read(model, ids, f"trunk.bolts.{layer}.sieve")[f"trunk.bolts.{layer}.sieve"]
        weight = tangle.weight.view(HEADS, 3, SIZE, WIDTH)
        bias = tangle.bias.view(HEADS, 3, SIZE)
        made = {
            part: torch.einsum("bpm,hdm->bphd", clean[0], weight[:, which]) + bias[:, which]
            for which, part in enumerate("vqk")
        }
        for part, value in made.items():
            assert plain.gap(cache[part, layer], value) < FLOAT, part
        pattern = pattern_of(made["q"], made["k"])
        assert plain.gap(cache["pattern", layer], pattern) < FLOAT
        z = torch.einsum("bhqk,bkhd->bqhd", pattern, made["v"])
        assert plain.gap(cache["z", layer], z) < FLOAT


def test_edits_of_a_joint_projection(plain: Any, ids: Tensor) -> None:
    """(a): an edit of q, k or v reaches that one; an edit of z what the last layer reads."""
    model = grown(Weft)
    bridge = TransformerBridge(model)
    at = "trunk.bolts.1.knot"
    for which, part in enumerate("vqk"):
        found = edit(bridge, ids, f"blocks.1.attn.hook_{part}", plain.noisy)
        expected = plain.edited(model, ids, f"{at}.tangle", joint(plain.noisy, which))
        assert torch.equal(found, expected), part
        assert plain.gap(found, model(ids).logits) > 1e-3
    found = edit(bridge, ids, "blocks.1.attn.hook_z", plain.noisy)
    fn = one_head(HEADS, SIZE, plain.noisy)
    assert torch.equal(found, plain.edited(model, ids, f"{at}.splice<", fn))
    found = edit(bridge, ids, "blocks.1.mlp.hook_post", plain.noisy)
    expected = plain.edited(model, ids, "trunk.bolts.1.loom.gather<", plain.noisy)
    assert torch.equal(found, expected)


def test_norms_behind_the_sums(plain: Any, ids: Tensor) -> None:
    """(b): the norms belong behind the sums; what they read is the stream between."""
    model = grown(Ziggurat)
    bridge = TransformerBridge(model)
    block = bridge.architecture.blocks[1]
    assert [branch.place for branch in block.branches] == ["after", "after"]
    assert [branch.ln.path for branch in block.branches] == [
        "trunk.bolts.1.even",
        "trunk.bolts.1.odd",
    ]
    assert not block.is_parallel
    seen = plain.read(model, ids, "trunk.bolts.1.even<", "trunk.bolts.1.odd<")
    _, cache = bridge.run_with_cache(ids)
    assert torch.equal(cache["resid_mid", 1], seen["trunk.bolts.1.even<"][0])
    assert torch.equal(cache["blocks.1.ln2.hook_in"], seen["trunk.bolts.1.odd<"][0])
    found = edit(bridge, ids, "blocks.1.hook_resid_mid", plain.noisy)
    assert torch.equal(found, plain.edited(model, ids, "trunk.bolts.1.even<", plain.noisy))


def test_attention_written_out(plain: Any, ids: Tensor) -> None:
    """(b): heads are grouped; q, k, v and pattern are what the weights give by hand."""
    model = grown(Ziggurat)
    bridge = TransformerBridge(model)
    assert (bridge.cfg.n_heads, bridge.cfg.n_key_value_heads) == (4, 2)
    _, cache = bridge.run_with_cache(ids)
    for layer in range(3):
        gaze = model.get_submodule(f"trunk.bolts.{layer}.gaze")
        x = cache["resid_pre", layer]
        q, k, v = (
            F.linear(x, part.weight).unflatten(-1, (-1, SIZE))
            for part in (gaze.ask, gaze.tell, gaze.bear)
        )
        for part, value in (("q", q), ("k", k), ("v", v)):
            assert plain.gap(cache[part, layer], value) < FLOAT, part
        pattern = pattern_of(q, k.repeat_interleave(2, dim=2))
        assert plain.gap(cache["pattern", layer], pattern) < FLOAT
        z = torch.einsum("bhqk,bkhd->bqhd", pattern, v.repeat_interleave(2, dim=2))
        assert plain.gap(cache["z", layer], z) < FLOAT


def test_edits_of_attention_written_out(plain: Any, ids: Tensor) -> None:
    """(b): edits of q, k, v and z, and of the pattern, are those made by hand."""
    model = grown(Ziggurat)
    bridge = TransformerBridge(model)
    at = "trunk.bolts.0.gaze"
    for part, path, n in (("q", "ask", 4), ("k", "tell", 2), ("v", "bear", 2), ("z", "join<", 4)):
        found = edit(bridge, ids, f"blocks.0.attn.hook_{part}", plain.noisy)
        expected = plain.edited(model, ids, f"{at}.{path}", one_head(n, SIZE, plain.noisy))
        assert torch.equal(found, expected), part
    # A head that looks nowhere makes nothing.
    dark = edit(bridge, ids, "blocks.0.attn.hook_pattern", lambda x: x.index_fill(1, HEAD_1, 0.0))
    by_hand = one_head(4, SIZE, lambda x: x.index_fill(-2, HEAD_1, 0.0))
    assert plain.gap(dark, plain.edited(model, ids, f"{at}.join<", by_hand)) < FLOAT


HEAD_1 = torch.tensor([1])


def test_gate_that_comes_second(plain: Any, ids: Tensor) -> None:
    """(b): which projection is the gate is told by what is activated, not by their order."""
    model = grown(Ziggurat)
    bridge = TransformerBridge(model)
    at = "trunk.bolts.0.sluice"
    assert bridge.cfg.gated_mlp
    assert bridge.architecture.blocks[0].mlp.gate.path == f"{at}.second"
    assert bridge.architecture.blocks[0].mlp.inp.path == f"{at}.first"
    seen = plain.read(model, ids, f"{at}.first", f"{at}.second", f"{at}.third<")
    _, cache = bridge.run_with_cache(ids)
    assert torch.equal(cache["blocks.0.mlp.hook_pre_linear"], seen[f"{at}.first"][0])
    assert torch.equal(cache["blocks.0.mlp.hook_pre"], seen[f"{at}.second"][0])
    assert torch.equal(cache["blocks.0.mlp.hook_post"], seen[f"{at}.third<"][0])


# --- refused, and then told ---------------------------------------------------------------------------------


def test_layers_in_no_list_are_refused() -> None:
    """(c): the message says what was looked for, what there is, and the row to write."""
    with pytest.raises(ArchitectureError) as told:
        TransformerBridge(grown(Culture))
    for word in ("Culture", "nn.ModuleList", "trunk", "blocks", "row"):
        assert word in str(told.value), word


def test_a_row_makes_it_work(plain: Any, ids: Tensor, rowed: Callable[..., None]) -> None:
    """(c): with one line the rest is found: sandwich norms, half steps, joint projection."""
    rowed("Culture", blocks="trunk.cell_*")
    model = grown(Culture)
    bridge = TransformerBridge(model)
    proof = bridge.verify()
    assert proof.holds, str(proof)
    assert torch.equal(bridge(ids), model(ids).logits)
    for layer, block in enumerate(bridge.architecture.blocks):
        at = f"trunk.cell_{layer}"
        assert block.path == at
        assert [(b.skip, b.scale) for b in block.branches] == [(1.0, 0.5)] * 2
        assert [b.ln.path for b in block.branches] == [f"{at}.squash_a", f"{at}.squash_c"]
        assert [b.ln_post.path for b in block.branches] == [f"{at}.squash_b", f"{at}.squash_d"]
    _, cache = bridge.run_with_cache(ids)
    half = cache["resid_pre", 1] + 0.5 * cache["attn_out", 1]
    torch.testing.assert_close(half, cache["resid_mid", 1])
    squash = model.get_submodule("trunk.cell_1.squash_b")
    assert torch.equal(squash(cache["blocks.1.attn.hook_out"]), cache["attn_out", 1])


def test_a_norm_of_an_odd_formula_has_no_inside(ids: Tensor, rowed: Callable[..., None]) -> None:
    """(c): a norm that is of neither known formula shows what goes in and out, and says why not more."""
    rowed("Culture", blocks="trunk.cell_*")
    model = grown(Culture)
    bridge = TransformerBridge(model)
    assert "blocks.0.ln1.hook_scale" not in bridge.registry
    assert "Squash" in bridge.why("blocks.0.ln1.hook_scale")
    with pytest.raises(AbsentPointError, match="Squash"):
        bridge.run_with_cache(ids, names_filter="blocks.0.ln1.hook_normalized")
    _, cache = bridge.run_with_cache(ids)
    squash = model.get_submodule("trunk.cell_0.squash_a")
    assert torch.equal(squash(cache["resid_pre", 0]), cache["blocks.0.ln1.hook_out"])


def test_edits_where_a_row_was_written(plain: Any, ids: Tensor, rowed: Callable[..., None]) -> None:
    """(c): edits of q, z, the stream between, and what is added are those made by hand."""
    rowed("Culture", blocks="trunk.cell_*")
    model = grown(Culture)
    bridge = TransformerBridge(model)
    at = "trunk.cell_0"
    found = edit(bridge, ids, "blocks.0.attn.hook_q", plain.noisy)
    assert torch.equal(found, plain.edited(model, ids, f"{at}.knot.tangle", joint(plain.noisy, 1)))
    found = edit(bridge, ids, "blocks.0.attn.hook_z", plain.noisy)
    fn = one_head(HEADS, SIZE, plain.noisy)
    assert torch.equal(found, plain.edited(model, ids, f"{at}.knot.splice<", fn))
    found = edit(bridge, ids, "blocks.0.hook_attn_out", plain.noisy)
    assert torch.equal(found, plain.edited(model, ids, f"{at}.squash_b", plain.noisy))
    # The stream between the sums has no module of its own: the rest of the layer by hand.
    middle = plain.noisy(plain.read(model, ids, f"{at}.squash_c<")[f"{at}.squash_c<"][0])
    cell = model.get_submodule(at)
    behind = middle + 0.5 * cell.squash_d(cell.loom(cell.squash_c(middle)))
    found = edit(bridge, ids, "blocks.0.hook_resid_mid", plain.noisy)
    assert torch.equal(found, plain.edited(model, ids, at, lambda x: behind))


def test_a_row_counts_from_when_it_is_written(rowed: Callable[..., None]) -> None:
    """A row for a model that was inferred before is followed, and forgotten with the row."""
    model = grown(Weft)
    assert TransformerBridge(model).architecture.main.ln_final.path == "last_sieve"
    rowed("Weft", ln_final="trunk.bolts.2.sieve")
    assert TransformerBridge(model).architecture.main.ln_final.path == "trunk.bolts.2.sieve"
    table.ROWS.pop("Weft")
    assert TransformerBridge(model).architecture.main.ln_final.path == "last_sieve"


def test_rows_that_lead_nowhere(rowed: Callable[..., None]) -> None:
    """A role that does not exist, and a path where nothing is, are refused."""
    with pytest.raises(InputError, match="blocks, embed, pos_embed, ln_final, unembed"):
        rowed("Culture", layers="trunk.cell_*")
    rowed("Culture", blocks="trunk.organ_*")
    with pytest.raises(ArchitectureError, match=r"trunk\.organ_\*"):
        TransformerBridge(grown(Culture))


def test_a_norm_is_told_by_what_it_does(ids: Tensor) -> None:
    """Norms of one class may differ by a setting; each shows its own scale and normalised value."""
    model = grown(Hill)
    _, cache = TransformerBridge(model).run_with_cache(ids)
    for number, tilt in ((1, "tilt_a"), (2, "tilt_b")):
        module: Any = model.get_submodule(f"trunk.bolts.0.{tilt}")
        x = cache[f"blocks.0.ln{number}.hook_in"]
        by = cache[f"blocks.0.ln{number}.hook_out"] / module.weight
        torch.testing.assert_close(cache[f"blocks.0.ln{number}.hook_normalized"], by)
        centred = x - x.mean(-1, keepdim=True) if module.is_centred else x
        scale = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(cache[f"blocks.0.ln{number}.hook_scale"], scale)


# --- a layer that is no sum ---------------------------------------------------------------------------------


def test_a_gated_sum_is_not_passed_off_as_one(plain: Any, ids: Tensor) -> None:
    """What cannot be proved of the stream is absent and says so; the ends of the layer are there."""
    model = grown(Pipe)
    bridge = TransformerBridge(model)
    for name in ("hook_resid_mid", "hook_attn_out", "hook_mlp_out"):
        assert f"blocks.1.{name}" not in bridge.registry
        assert bridge.why(f"blocks.1.{name}"), name
    assert "no sum" in bridge.why("blocks.1.hook_resid_mid")
    with pytest.raises(AbsentPointError, match="no sum"):
        bridge.run_with_cache(ids, names_filter="blocks.1.hook_resid_mid")
    proof = bridge.verify()
    assert proof.holds, str(proof)
    assert not [check for check in proof.checks if "attn_out" in check.identity]
    _, cache = bridge.run_with_cache(ids, names_filter="blocks.1.hook_*")
    seen = plain.read(model, ids, "trunk.bolts.1<", "trunk.bolts.1")
    assert torch.equal(cache["resid_pre", 1], seen["trunk.bolts.1<"][0])
    assert torch.equal(cache["resid_post", 1], seen["trunk.bolts.1"][0])


def test_attention_in_a_gated_sum(plain: Any, ids: Tensor) -> None:
    """Attention points and raw points work where the sum is unproved."""
    model = grown(Pipe)
    bridge = TransformerBridge(model)
    _, cache = bridge.run_with_cache(ids)
    at = "trunk.bolts.1.knot"
    made = plain.read(model, ids, f"{at}.tangle", f"{at}.splice<")
    runs = made[f"{at}.tangle"][0].unflatten(-1, (HEADS, 3, SIZE))
    assert plain.gap(cache["pattern", 1], pattern_of(runs[..., 1, :], runs[..., 2, :])) < FLOAT
    assert plain.gap(cache["z", 1].flatten(-2), made[f"{at}.splice<"][0]) < FLOAT
    found = edit(bridge, ids, "blocks.1.attn.hook_q", plain.noisy)
    assert torch.equal(found, plain.edited(model, ids, f"{at}.tangle", joint(plain.noisy, 1)))
    lid = "trunk.bolts.1.lid"
    found = edit(bridge, ids, f"raw:{lid}", plain.noisy)
    assert torch.equal(found, plain.edited(model, ids, lid, plain.noisy))
