"""extract_representations: rows against plain hooks, samples alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge import (
    HookNotFiredError,
    InputError,
    LayerRangeError,
    Ragged,
    TransformerBridge,
    UnknownPointError,
    extract_representations,
    stream_representations,
)
from lensbridge.methods.store.extraction import Extraction

POINTS = ["blocks.0.hook_out", "model.layers.1.mlp"]
PATHS = ["model.layers.0", "model.layers.1.mlp"]


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Equal up to the rounding of another batch."""
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.fixture
def truth(llama_bridge: Any, texts: list[str], ids_of: Any, alone: Any) -> list[list[Tensor]]:
    """By point, each text's states."""
    return [alone(llama_bridge.original_model, path, ids_of(texts)) for path in PATHS]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_every_token_of_every_text(
    llama_bridge: Any, texts: list[str], truth: list[list[Tensor]], batch_size: int
) -> None:
    """Rows stand in the order of the texts and of their tokens, however texts were batched and padded."""
    acts = extract_representations(llama_bridge, texts, POINTS, batch_size)
    assert list(acts) == POINTS
    for held, own in zip(acts.values(), truth, strict=True):
        assert isinstance(held, Ragged)
        assert held.lengths.tolist() == [len(rows) for rows in own]
        assert close(held.values, torch.cat(own))
        assert all(close(a, b) for a, b in zip(held, own, strict=True))
        assert close(held[-1], own[-1])


def test_equal_lengths_make_a_tensor_equal_to_the_bare_models(
    llama_bridge: Any, ids: Tensor
) -> None:
    """Where nothing is padded the values are the bare model's, bit for bit."""
    out: dict[str, Tensor] = {}
    model = llama_bridge.original_model
    hook = model.model.layers[2].register_forward_hook(
        lambda module, args, value: out.update(states=value.clone())
    )
    with torch.no_grad():
        model(ids)
    hook.remove()
    acts = extract_representations(llama_bridge, ids, 2)
    assert torch.equal(acts["blocks.2.hook_out"], out["states"])


@pytest.mark.parametrize(
    ("positions", "pick"),
    [
        ("last", lambda rows: rows[-1]),
        ("mean", lambda rows: rows.mean(0)),
        (0, lambda rows: rows[0]),
        (-2, lambda rows: rows[-2]),
        ([1, -1], lambda rows: rows[[1, len(rows) - 1]]),
    ],
)
def test_positions(
    llama_bridge: Any, texts: list[str], truth: list[list[Tensor]], positions: Any, pick: Any
) -> None:
    """A sample's positions are counted without padding, from its own end where negative."""
    acts = extract_representations(llama_bridge, texts, POINTS, 6, positions=positions)
    for held, own in zip(acts.values(), truth, strict=True):
        assert isinstance(held, Tensor)
        assert close(held, torch.stack([pick(rows) for rows in own]))


def test_a_mask_over_columns_of_padded_ids(llama_bridge: Any, ids_of: Any, alone: Any) -> None:
    """The mask's columns are those of the ids as they were given, padding in front included."""
    rows = ids_of(["abc", "a", "abcdef"])
    ids, real = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for index, (row, start) in enumerate(zip(rows, (5, 0, 1), strict=True)):
        ids[index, start : start + len(row)] = torch.tensor(row)
        real[index, start : start + len(row)] = 1
    wanted = torch.rand(3, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    acts = extract_representations(
        llama_bridge,
        {"input_ids": ids, "attention_mask": real},
        "blocks.0.hook_out",
        positions=wanted,
    )["blocks.0.hook_out"]
    own = alone(llama_bridge.original_model, PATHS[0], rows)
    for held, states, start, mask in zip(acts, own, (5, 0, 1), wanted, strict=True):
        assert close(held, states[mask[start : start + len(states)]])


def test_a_mask_for_each_sample(llama_bridge: Any, ids_of: Any, alone: Any) -> None:
    """Masks of unequal lengths, one of them empty."""
    rows = ids_of(["abc", "a"])
    masks = [[True, False, False, True], torch.tensor([False, False])]
    acts = extract_representations(llama_bridge, ["abc", "a"], 0, positions=masks)
    (own, _) = alone(llama_bridge.original_model, PATHS[0], rows)
    held = acts["blocks.0.hook_out"]
    assert held.lengths.tolist() == [2, 0]
    assert close(held[0], own[[0, 3]])


def test_head_dimensions_stay(llama_bridge: Any, ids: Tensor) -> None:
    """A point of heads gives [n, pos, head, d_head]."""
    held = extract_representations(llama_bridge, ids, "blocks.1.attn.hook_z")
    with torch.no_grad():
        _, cache = llama_bridge.run_with_cache(ids, names_filter="blocks.1.attn.hook_z")
    assert torch.equal(held["blocks.1.attn.hook_z"], cache["z", 1])


def test_dtype_and_device(llama_bridge: Any, ids: Tensor) -> None:
    """Floating rows are cast, those of the model kept by default."""
    plain = extract_representations(llama_bridge, ids, 0, device=None)["blocks.0.hook_out"]
    cast = extract_representations(llama_bridge, ids, 0, dtype=torch.bfloat16)["blocks.0.hook_out"]
    assert plain.dtype == torch.float32
    assert torch.equal(cast, plain.bfloat16())


def test_names(llama_bridge: Any, ids: Tensor) -> None:
    """Aliases, indices and paths are kept under the names they were given, an index under its point's."""
    acts = extract_representations(llama_bridge, ids, ["blocks.0.hook_resid_post", -1, PATHS[1]])
    assert list(acts) == ["blocks.0.hook_resid_post", "blocks.3.hook_out", PATHS[1]]


def test_no_more_samples_than_asked_for_are_read(llama_bridge: Any) -> None:
    """Of a stream that would fail behind them."""

    def stream() -> Iterator[str]:
        yield from ["ab", "c", "d"]
        raise AssertionError("one sample too many")

    acts = extract_representations(llama_bridge, stream(), 0, 2, max_samples=3, positions="last")
    assert len(acts["blocks.0.hook_out"]) == 3


def test_max_length_cuts_samples(
    llama_bridge: Any, texts: list[str], ids_of: Any, alone: Any
) -> None:
    """The first tokens are read."""
    acts = extract_representations(llama_bridge, texts, 0, max_length=4, positions="last")
    own = alone(llama_bridge.original_model, PATHS[0], [row[:4] for row in ids_of(texts)])
    assert close(acts["blocks.0.hook_out"], torch.stack([rows[-1] for rows in own]))


def test_the_model_runs_no_further_than_needed(llama_bridge: Any, ids: Tensor) -> None:
    """Neither the layers behind the last place nor the head."""
    model, passed = llama_bridge.original_model, []
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: passed.append(name))
        for name, module in (
            ("2", model.model.layers[2]),
            ("3", model.model.layers[3]),
            ("head", model.lm_head),
        )
    ]
    extract_representations(llama_bridge, ids, [0, 2])
    for handle in handles:
        handle.remove()
    assert passed == ["2"]


def test_a_model_in_training_runs_in_eval_mode_and_stays_as_it_was(tiny: Any, ids: Tensor) -> None:
    """With dropout, two extractions are equal; each module keeps its own mode, also when a run fails."""
    model = tiny("gpt2", resid_pdrop=0.5)
    bridge = TransformerBridge(model)
    expected = extract_representations(bridge, ids, 1)["blocks.1.hook_out"]
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(extract_representations(bridge, ids, 1)["blocks.1.hook_out"], expected)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(InputError):
        extract_representations(bridge, ids, "blocks.0.attn.hook_pattern")
    assert [module.training for module in model.modules()] == modes


def test_copies_of_what_a_model_overwrites(tiny: Any, ids: Tensor) -> None:
    """Falcon adds attention to its MLP's output in place, after it was shown."""
    model = tiny("falcon", parallel_attn=True, new_decoder_architecture=False)
    shown, overwritten = [], []

    def hook(module: Any, args: Any, out: Tensor) -> None:
        shown.append(out.clone())
        overwritten.append(out)

    handle = model.transformer.h[0].mlp.register_forward_hook(hook)
    with torch.no_grad():
        model(ids)
    handle.remove()
    assert not torch.equal(shown[0], overwritten[0])
    acts = extract_representations(TransformerBridge(model), ids, ["transformer.h.0.mlp", 1])
    assert torch.equal(acts["transformer.h.0.mlp"], shown[0])


@pytest.mark.parametrize("name", ["bert", "fnet"])
def test_encoders_with_and_without_a_mask(tiny: Any, name: str) -> None:
    """A sample in a batch has the rows it has alone; FNet, which cannot be told of padding, gets none."""
    bridge = TransformerBridge(tiny(name, "masked"))
    samples = [list(range(8, 8 + n)) for n in (3, 7, 5, 7)]
    together = extract_representations(bridge, samples, 0, 4)["blocks.0.hook_out"]
    for held, row in zip(together, samples, strict=True):
        own = extract_representations(bridge, [row], 0)["blocks.0.hook_out"]
        assert close(held, own[0])


def test_pairs_of_texts(tiny: Any) -> None:
    """Token types reach the model."""
    model = tiny("bert", "masked")
    bridge = TransformerBridge(model)
    ids, types = torch.arange(8, 16)[None], torch.tensor([[0] * 4 + [1] * 4])
    given = {"input_ids": ids, "token_type_ids": types}
    held = extract_representations(bridge, given, 0)["blocks.0.hook_out"]
    with torch.no_grad():
        states = model(ids, token_type_ids=types, output_hidden_states=True).hidden_states
    assert torch.equal(held, states[1])
    assert not torch.equal(held, extract_representations(bridge, ids, 0)["blocks.0.hook_out"])


def test_stream_leaves_the_model_alone_between_batches(
    llama_bridge: Any, texts: list[str], is_silent: Any, same_rows: Any
) -> None:
    """Rows come batch by batch, and make what is kept in memory."""
    acts = extract_representations(llama_bridge, texts, POINTS, 6)
    made: dict[int, Tensor] = {}
    for number, batch in enumerate(stream_representations(llama_bridge, texts, POINTS, 6)):
        assert is_silent(llama_bridge)
        assert batch.number == number
        assert len(batch.tokens) == batch.lengths.sum() == batch.counts.sum()
        each = batch.rows[POINTS[1]].split(batch.counts.tolist())
        made.update(zip(batch.samples.tolist(), each, strict=True))
    assert torch.equal(torch.cat([made[i] for i in range(40)]), acts[POINTS[1]].values)


def test_stream_reads_a_window_ahead_and_no_more(llama_bridge: Any) -> None:
    """Of a dataset without end, 64 batches are read for the first."""
    read: list[int] = []

    def forever() -> Iterator[list[int]]:
        while True:
            read.append(len(read))
            yield [8, 9, 10]

    stream = stream_representations(llama_bridge, forever(), 0, 2)
    next(stream)
    assert len(read) == 128


@pytest.mark.parametrize(
    ("layers", "options", "error", "said"),
    [
        ("blocks.0.hook_outt", {}, UnknownPointError, "blocks.0.hook_out"),
        (4, {}, LayerRangeError, "0 to 3"),
        ([], {}, InputError, "at least one place"),
        ([0, "blocks.0.hook_resid_post"], {}, InputError, "same place"),
        (True, {}, InputError, "True"),
        ("blocks.0.attn.hook_pattern", {}, InputError, "no row for each token"),
        (0, {"batch_size": 0}, InputError, "batch_size"),
        (0, {"max_samples": 0}, InputError, "max_samples"),
        (0, {"max_length": -1}, InputError, "max_length"),
        (0, {"positions": "first"}, InputError, "'first'"),
        (0, {"positions": []}, InputError, "positions"),
        (0, {"positions": [0.5]}, InputError, "positions"),
        (0, {"positions": 9}, InputError, "position 9 is not one of the 9 of sample 0"),
        (0, {"positions": torch.ones(1, 9, dtype=torch.bool)}, InputError, "1 rows"),
        (0, {"positions": torch.ones(2, 8, dtype=torch.bool)}, InputError, "9 columns"),
    ],
)
def test_refusals(
    llama_bridge: Any, ids: Tensor, layers: Any, options: Any, error: Any, said: str
) -> None:
    """Each says what was wrong."""
    with pytest.raises(error) as raised:
        extract_representations(llama_bridge, ids, layers, **options)
    assert said in str(raised.value)


def test_what_is_no_bridge_and_no_dtype(tiny: Any, llama_bridge: Any) -> None:
    """What to write instead is said."""
    with pytest.raises(InputError, match=r"TransformerBridge\(model, tokenizer\)"):
        Extraction(tiny("llama"), 0)
    with pytest.raises(InputError, match=r"torch\.dtype, got 'bfloat16'"):
        Extraction(llama_bridge, 0, dtype="bfloat16")


def test_a_place_that_is_not_passed(tiny: Any, ids: Tensor) -> None:
    """Of a decoder that is not run for embeddings of an encoder's side, nothing would be kept in silence."""
    model = tiny("llama")
    model.model.spare = torch.nn.Linear(2, 2)
    with pytest.raises(HookNotFiredError, match="spare"):
        extract_representations(TransformerBridge(model), ids, ["model.spare", 0])
