"""Explainers in files: their own, SAELens's and Gemma Scope's; equal bits, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lensbridge import InputError, SplitterForGeneration
from lensbridge.methods.concepts.base import SAEExplainer
from lensbridge.methods.concepts.explainers import (
    KINDS,
    BatchTopKSAEConcepts,
    JumpReLUSAEConcepts,
    NotFittedError,
    TopKSAEConcepts,
    VanillaSAEConcepts,
)
from lensbridge.methods.concepts.formats import read_gemma_scope, read_saelens, write_saelens

C = 24


@pytest.fixture(scope="module")
def splitter(tiny: Callable[..., nn.Module], tokenizer: Any) -> SplitterForGeneration:
    """A tiny GPT-2 behind its second layer."""
    return SplitterForGeneration(tiny("gpt2"), 1, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def bridge(splitter: SplitterForGeneration) -> Any:
    """The same model's bridge."""
    return splitter.bridge


@pytest.fixture(scope="module")
def d(splitter: SplitterForGeneration) -> int:
    """The width of its activations."""
    return splitter.get_latent_shape()[-1]


@pytest.fixture(scope="module")
def rows(d: int) -> Tensor:
    """Rows away from zero."""
    return 2 + torch.randn(200, d, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def fitted(splitter: Any, rows: Tensor) -> Callable[[str], SAEExplainer]:
    """``fitted("TopKSAE")``: a fitted explainer of that kind; no test changes it."""
    made: dict[str, SAEExplainer] = {}

    def get(kind: str) -> SAEExplainer:
        if kind not in made:
            options = {"points": rows[:50]} if kind.startswith("RA") else {}
            made[kind] = KINDS[kind](splitter, nb_concepts=C, **options)
            made[kind].fit(rows, nb_epochs=2, batch_size=64)
        return made[kind]

    return get


# --- our own ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_file_gives_the_same_bits(
    fitted: Any, bridge: Any, splitter: Any, rows: Tensor, tmp_path: Path, kind: str
) -> None:
    """Of every kind, through the base class and its own, to a bridge and a splitter."""
    explainer = fitted(kind)
    path = tmp_path / "deep" / "sae.safetensors"
    explainer.save(path)
    for cls, source in ((SAEExplainer, bridge), (KINDS[kind], splitter)):
        loaded = cls.load(path, source)
        assert type(loaded) is KINDS[kind]
        assert loaded.is_fitted
        assert loaded.split_point == explainer.split_point
        codes = explainer.encode_activations(rows)
        assert torch.equal(loaded.encode_activations(rows), codes)
        assert torch.equal(loaded.decode_concepts(codes), explainer.decode_concepts(codes))
        assert torch.equal(loaded.get_dictionary(), explainer.get_dictionary())
    with pytest.raises(InputError, match="overwrite"):
        loaded.fit(rows)


class _Encoder(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.layer = nn.Linear(d, C)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pre = self.layer(x.tanh())
        return pre, pre.relu()


def test_encoders_of_the_callers(splitter: Any, d: int, rows: Tensor, tmp_path: Path) -> None:
    """A named one is in the file; of a module only its weights are."""
    path = tmp_path / "sae.safetensors"
    for module in ("mlp_ln_1", _Encoder(d)):
        explainer = TopKSAEConcepts(splitter, nb_concepts=C, encoder_module=module)
        explainer.fit(rows, nb_epochs=1, batch_size=64)
        explainer.save(path)
        given = None if isinstance(module, str) else _Encoder(d)
        loaded = TopKSAEConcepts.load(path, splitter, encoder_module=given)
        assert torch.equal(loaded.encode_activations(rows), explainer.encode_activations(rows))
        with pytest.raises(InputError, match="SAELens"):
            write_saelens(explainer, tmp_path / "theirs")
    with pytest.raises(InputError, match="encoder_module"):
        TopKSAEConcepts.load(path, splitter)


def test_files_that_do_not_fit(
    fitted: Any, bridge: Any, tiny: Any, tokenizer: Any, d: int, tmp_path: Path
) -> None:
    """Another kind, hook point, width, or no such file."""
    path = tmp_path / "sae.safetensors"
    fitted("TopKSAE").save(path)
    with pytest.raises(InputError, match="not BatchTopKSAEConcepts"):
        BatchTopKSAEConcepts.load(path, bridge)
    for source, point in (
        (SplitterForGeneration(bridge, 0), None),
        (bridge, 0),
    ):
        with pytest.raises(InputError, match=r"blocks\.1\.hook_out.*blocks\.0\.hook_out"):
            SAEExplainer.load(path, source, split_point=point)
    wide = SplitterForGeneration(tiny("gpt2", n_embd=2 * d), 1, tokenizer=tokenizer)
    with pytest.raises(InputError, match=rf"{d} wide.*{2 * d} wide"):
        SAEExplainer.load(path, wide)
    with pytest.raises(FileNotFoundError):
        SAEExplainer.load(tmp_path / "none", bridge)
    other = tmp_path / "other"
    save_file({"x": torch.zeros(1)}, other)
    with pytest.raises(InputError, match="something else"):
        SAEExplainer.load(other, bridge)


def test_functions_are_in_no_file(splitter: Any, rows: Tensor, tmp_path: Path) -> None:
    """And nothing is written of what cannot be."""
    params = {"normalization": lambda x: x}
    explainer = TopKSAEConcepts(splitter, nb_concepts=C, dictionary_params=params)
    explainer.fit(rows, nb_epochs=1)
    with pytest.raises(InputError, match="no functions"):
        explainer.save(tmp_path / "sae")
    assert not list(tmp_path.iterdir())


# --- SAELens ------------------------------------------------------------------------------------------------


def _theirs(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and reconstructions as SAELens's documentation has them, from its files, by plain matrices."""
    cfg = json.loads((folder / "cfg.json").read_text())
    w = load_file(folder / "sae_weights.safetensors")
    lengths = 1.0
    norm = cfg["normalize_activations"]
    if norm == "constant_norm_rescale":
        size = x.norm(dim=-1, keepdim=True) / cfg["d_in"] ** 0.5
        y = x / size
    elif norm == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        size = (x - mean).std(-1, keepdim=True)
        y = (x - mean) / (size + 1e-5)
    else:
        y, size = x, 1.0
    if cfg["apply_b_dec_to_input"]:
        y = y - w["b_dec"]
    pre = y @ w["W_enc"] + w["b_enc"]
    if cfg.get("rescale_acts_by_decoder_norm"):
        lengths = w["W_dec"].norm(dim=1)
        pre = pre * lengths
    if cfg["architecture"] == "topk":
        best = pre.topk(cfg["k"], dim=-1)
        codes = torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
    elif cfg["architecture"] == "jumprelu":
        codes = pre.relu() * (pre > w["threshold"])
    else:
        codes = pre.relu()
    out = ((codes / lengths) @ w["W_dec"] + w["b_dec"]) * size
    return codes, out + mean if norm == "layer_norm" else out


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "kind", ["SAE", "TopKSAE", "BatchTopKSAE", "JumpSAE", "RATopKSAE", "RAJumpSAE"]
)
def test_there_and_back(
    fitted: Any, splitter: Any, bridge: Any, rows: Tensor, tmp_path: Path, kind: str, bias: bool
) -> None:
    """Equal bits after the round trip, and SAELens's own formula gives the same."""
    explainer = fitted(kind)
    if not bias:
        options = {"points": rows[:50]} if kind.startswith("RA") else {}
        explainer = KINDS[kind](splitter, nb_concepts=C, bias=False, **options)
        explainer.fit(rows, nb_epochs=1, batch_size=64)
    folder = write_saelens(explainer, tmp_path / "sae", metadata={"prepend_bos": True})
    cfg = json.loads((folder / "cfg.json").read_text())
    assert cfg["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    assert cfg["metadata"]["prepend_bos"] is True
    assert cfg["normalize_activations"] == cfg["reshape_activations"] == "none"
    codes = explainer.encode_activations(rows)
    x_hat = explainer.decode_concepts(codes)
    loaded = read_saelens(folder, bridge)
    assert loaded.split_point == explainer.split_point
    assert torch.equal(loaded.encode_activations(rows), codes)
    assert torch.equal(loaded.decode_concepts(codes), x_hat)
    theirs = _theirs(folder, rows)
    torch.testing.assert_close(theirs[0], codes, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs[1], x_hat, rtol=1e-4, atol=1e-4)
    again = write_saelens(loaded, tmp_path / "again")
    assert torch.equal(read_saelens(again, bridge).encode_activations(rows), codes)
    loaded.save(tmp_path / "own")
    assert torch.equal(SAEExplainer.load(tmp_path / "own", bridge).encode_activations(rows), codes)


def _write(folder: Path, d: int, cfg: dict[str, Any], **more: Tensor) -> Path:
    """A folder as SAELens writes one, of random weights."""
    draw = torch.Generator().manual_seed(1)
    w = {
        "W_enc": torch.randn(d, C, generator=draw),
        "b_enc": torch.randn(C, generator=draw),
        "W_dec": torch.randn(C, d, generator=draw),
        "b_dec": torch.randn(d, generator=draw),
        **more,
    }
    folder.mkdir(exist_ok=True)
    save_file(
        {name: x for name, x in w.items() if x is not None}, folder / "sae_weights.safetensors"
    )
    (folder / "cfg.json").write_text(json.dumps({"d_in": d, "d_sae": C, **cfg}))
    return folder


HERE = {"hook_name": "blocks.1.hook_resid_post"}


@pytest.mark.parametrize("centers", [True, False])
@pytest.mark.parametrize("norm", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_their_files_are_computed_as_there(
    bridge: Any, d: int, rows: Tensor, tmp_path: Path, architecture: str, norm: str, centers: bool
) -> None:
    """Atoms of any length, every normalisation, b_dec taken off or not; also after our own save."""
    cfg = {
        "architecture": architecture,
        "apply_b_dec_to_input": centers,
        "normalize_activations": norm,
        "metadata": HERE,
        "k": 3,
    }
    threshold = {"threshold": torch.linspace(0, 2, C)} if architecture == "jumprelu" else {}
    folder = _write(tmp_path / "sae", d, cfg, **threshold)
    codes, x_hat = _theirs(folder, rows)
    first = read_saelens(folder, bridge)
    first.save(tmp_path / "own")
    for loaded in (first, SAEExplainer.load(tmp_path / "own", bridge)):
        torch.testing.assert_close(loaded.encode_activations(rows), codes, rtol=1e-4, atol=1e-4)
        given = () if norm == "none" else (rows,)
        made = loaded.decode_concepts(codes, *given)
        torch.testing.assert_close(made, x_hat, rtol=1e-4, atol=1e-3)
    if norm != "none":
        with pytest.raises(InputError, match="give the activations"):
            first.decode_concepts(codes)


def test_files_of_before_version_six(bridge: Any, d: int, rows: Tensor, tmp_path: Path) -> None:
    """A flat configuration: TopK is an activation function, and hook_point may be the name."""
    old = {"hook_point": "blocks.1.hook_resid_post", "normalize_activations": False}
    folder = _write(tmp_path / "a", d, {**old, "activation_fn_str": "relu"})
    assert type(read_saelens(folder, bridge)) is VanillaSAEConcepts
    old |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    folder = _write(tmp_path / "b", d, old)
    loaded = read_saelens(folder, bridge)
    assert type(loaded) is TopKSAEConcepts
    assert int((loaded.encode_activations(rows) > 0).sum(1).max()) <= 3


def test_scaled_activations(bridge: Any, d: int, rows: Tensor, tmp_path: Path) -> None:
    """Weights of scaled activations give those of plain ones only with the factor."""
    cfg = {
        "architecture": "standard",
        "normalize_activations": "expected_average_only_in",
        "metadata": HERE,
    }
    folder = _write(tmp_path / "sae", d, cfg)
    with pytest.raises(InputError, match="norm_scaling_factor"):
        read_saelens(folder, bridge)
    loaded = read_saelens(folder, bridge, norm_scaling_factor=3.0)
    (folder / "cfg.json").write_text(
        json.dumps(
            {
                **json.loads((folder / "cfg.json").read_text()),
                "normalize_activations": "none",
                "apply_b_dec_to_input": True,
            }
        )
    )
    codes, x_hat = _theirs(folder, rows * 3)
    torch.testing.assert_close(loaded.encode_activations(rows), codes, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loaded.decode_concepts(codes), x_hat / 3, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="leave norm_scaling_factor out"):
        read_saelens(folder, bridge, norm_scaling_factor=3.0)


def test_codes_scaled_by_lengths_of_atoms(
    bridge: Any, d: int, rows: Tensor, tmp_path: Path
) -> None:
    """What SAELens multiplies before the choice and divides after it, is in the weights."""
    cfg = {"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": True, "metadata": HERE}
    folder = _write(
        tmp_path / "sae", d, {**cfg, "normalize_activations": "none", "apply_b_dec_to_input": False}
    )
    codes, x_hat = _theirs(folder, rows)
    loaded = read_saelens(folder, bridge)
    torch.testing.assert_close(loaded.encode_activations(rows), codes, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loaded.decode_concepts(codes), x_hat, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_batch_top_k(bridge: Any, d: int, rows: Tensor, tmp_path: Path) -> None:
    """Its one threshold is not lost."""
    cfg = {"architecture": "batchtopk", "k": 4, "metadata": HERE}
    folder = _write(tmp_path / "sae", d, cfg, topk_threshold=torch.tensor(1.5))
    loaded = read_saelens(folder, bridge)
    assert type(loaded) is JumpReLUSAEConcepts
    codes = loaded.encode_activations(rows)
    assert float(codes[codes > 0].min()) > 1.5
    with pytest.raises(InputError, match="lacks threshold"):
        read_saelens(_write(tmp_path / "b", d, cfg), bridge)


@pytest.mark.parametrize(
    ("cfg", "said"),
    [
        ({"architecture": "gated"}, "gated"),
        ({"architecture": "topk"}, "no k"),
        ({"architecture": "standard", "activation_fn_str": "tanh-relu"}, "tanh-relu"),
        ({"normalize_activations": "other"}, "other"),
        ({"hook_head_index": 3}, "single head"),
        ({"finetuning_scaling_factor": True}, "finetuning"),
        ({"architecture": "jumprelu"}, "lacks threshold"),
        ({"metadata": {"hook_name": "blocks.0.hook_resid_post"}}, r"blocks\.0.*blocks\.1"),
    ],
)
def test_files_that_are_not_read(
    splitter: Any, d: int, tmp_path: Path, cfg: dict[str, Any], said: str
) -> None:
    """Refused with what they are, in place of another function in silence."""
    folder = _write(tmp_path / "sae", d, {"metadata": HERE, **cfg})
    with pytest.raises(InputError, match=said):
        read_saelens(folder, splitter)


def test_broken_folders(fitted: Any, bridge: Any, d: int, tmp_path: Path, splitter: Any) -> None:
    """Missing, garbled, of another width; and kinds that the format does not know."""
    with pytest.raises(FileNotFoundError):
        read_saelens(tmp_path, bridge)
    with pytest.raises(InputError, match=rf"{d + 1} wide.*{d} wide"):
        read_saelens(_write(tmp_path / "wide", d + 1, {"metadata": HERE}), bridge)
    folder = _write(tmp_path / "a", d, {"metadata": HERE}, b_enc=torch.zeros(C + 1))
    with pytest.raises(InputError, match="b_enc"):
        read_saelens(folder, bridge)
    (folder / "sae_weights.safetensors").write_text("no")
    with pytest.raises(InputError, match="safetensors"):
        read_saelens(folder, bridge)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(InputError, match="JSON"):
        read_saelens(folder, bridge)
    for kind in ("MpSAE", "QSAE"):
        with pytest.raises(InputError, match="SAELens"):
            write_saelens(fitted(kind), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(NotFittedError):
        write_saelens(TopKSAEConcepts(splitter, nb_concepts=4), tmp_path / "none")


# --- Gemma Scope --------------------------------------------------------------------------------------------


def test_gemma_scope(bridge: Any, d: int, rows: Tensor, tmp_path: Path) -> None:
    """A strict threshold, and nothing taken off what the encoder is shown."""
    draw = np.random.default_rng(0)
    w = {
        "W_enc": draw.normal(size=(d, C)).astype("float32"),
        "W_dec": draw.normal(size=(C, d)).astype("float32"),
        "b_enc": np.zeros(C, "float32"),
        "b_dec": draw.normal(size=d).astype("float32"),
        "threshold": np.full(C, 2.0, "float32"),
    }
    w["W_enc"][:, 0] = 0
    w["b_enc"][0] = 2.0  # exactly at its threshold
    path = tmp_path / "params.npz"
    np.savez(path, **w)
    loaded = read_gemma_scope(path, bridge, split_point=1)
    pre = rows @ torch.from_numpy(w["W_enc"]) + torch.from_numpy(w["b_enc"])
    codes = torch.where(pre > 2, pre, 0)
    assert not codes[:, 0].any()
    torch.testing.assert_close(loaded.encode_activations(rows), codes, rtol=1e-4, atol=1e-4)
    x_hat = codes @ torch.from_numpy(w["W_dec"]) + torch.from_numpy(w["b_dec"])
    torch.testing.assert_close(loaded.decode_concepts(codes), x_hat, rtol=1e-4, atol=1e-4)
    theirs = write_saelens(loaded, tmp_path / "theirs")
    again = read_saelens(theirs, bridge)
    assert torch.equal(again.encode_activations(rows), loaded.encode_activations(rows))
    with pytest.raises(InputError, match="split_point"):
        read_gemma_scope(path, bridge)
    np.savez(path, **{name: x for name, x in w.items() if name != "threshold"})
    with pytest.raises(InputError, match="lacks threshold"):
        read_gemma_scope(path, bridge, split_point=1)


def test_no_pickles(bridge: Any, tmp_path: Path) -> None:
    """An .npz may hold objects, which run code when they are read."""
    path = tmp_path / "params.npz"
    np.savez(path, W_enc=np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match=r"no \.npz of numbers"):
        read_gemma_scope(path, bridge, split_point=1)
    with pytest.raises(FileNotFoundError):
        read_gemma_scope(tmp_path / "none", bridge, split_point=1)
