"""save_activations and load_activations, and readers of others."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lensbridge import InputError, Ragged, load_activations, save_activations


@pytest.fixture
def acts() -> dict[str, Tensor]:
    """Of several dtypes; under names that other writers stumble over; one a view that wants its gradient."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6).requires_grad_()
    return {
        "file": base[:, ::2],
        "blocks.0.hook_out": torch.randn(3, 5, 2),
        "ids": torch.arange(7),
        "raw:model.layers.0.hook_out": torch.randn(2).half(),
        "empty": torch.zeros(0, 4),
    }


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_what_was_saved_is_what_is_loaded(
    tmp_path: Path, acts: dict[str, Tensor], suffix: str
) -> None:
    """Under exactly the name that was given, dots and all."""
    path = save_activations(acts, tmp_path / f"acts_v1.5{suffix}")
    assert [file.name for file in tmp_path.iterdir()] == [f"acts_v1.5{suffix}"]
    loaded = load_activations(path)
    assert sorted(loaded) == sorted(acts)
    for name, held in acts.items():
        assert loaded[name].dtype == held.dtype
        assert torch.equal(loaded[name], held.detach())


def test_others_read_the_files(tmp_path: Path, acts: dict[str, Tensor]) -> None:
    """NumPy and safetensors themselves."""
    with np.load(save_activations(acts, tmp_path / "a.npz"), allow_pickle=False) as held:
        assert {name: held[name].shape for name in held} == {
            n: tuple(x.shape) for n, x in acts.items()
        }
        assert np.array_equal(held["file"], acts["file"].detach().numpy())
    theirs = load_file(save_activations(acts, tmp_path / "a.safetensors"))
    assert all(torch.equal(theirs[name], held.detach()) for name, held in acts.items())


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_ragged(tmp_path: Path, suffix: str) -> None:
    """Values and offsets."""
    held = Ragged(torch.randn(5, 2), torch.tensor([0, 2, 2, 5]))
    loaded = load_activations(save_activations({"x": held}, tmp_path / f"a{suffix}"))
    assert list(loaded) == ["x"]
    assert [rows.tolist() for rows in loaded["x"]] == [rows.tolist() for rows in held]


def test_bfloat16(tmp_path: Path) -> None:
    """safetensors keeps it; an .npz asks for a cast, and leaves no file."""
    held = {"x": torch.randn(4, 2).bfloat16()}
    assert torch.equal(
        load_activations(save_activations(held, tmp_path / "a.safetensors"))["x"], held["x"]
    )
    with pytest.raises(InputError, match=r"cast it \(\.float\(\)\)"):
        save_activations(held, tmp_path / "a.npz")
    assert not (tmp_path / "a.npz").exists()


@pytest.mark.parametrize(
    ("given", "name", "said"),
    [
        ({"x": torch.ones(2)}, "a.pt", "pickles"),
        ({"x": torch.ones(2)}, "a", r"\.npz or \.safetensors"),
        ({}, "a.npz", "at least one"),
        ({"x": [1.0]}, "a.npz", "list"),
        ({"x": torch.ones(2, dtype=torch.complex128)}, "a.safetensors", "complex128"),
        ({"x": torch.tensor(1.0)}, "a.safetensors", "dimension"),
    ],
)
def test_what_is_not_saved(tmp_path: Path, given: Any, name: str, said: str) -> None:
    """Says why, and writes nothing."""
    with pytest.raises(InputError, match=said):
        save_activations(given, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_loaded(tmp_path: Path, acts: dict[str, Tensor]) -> None:
    """Pickles, in files of any name, and files cut short."""
    bomb = pickle.dumps({"x": 1})
    for name in ("a.npz", "a.safetensors"):
        (tmp_path / name).write_bytes(bomb)
        with pytest.raises(InputError, match="holds no activations"):
            load_activations(tmp_path / name)
        whole = save_activations(acts, tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InputError, match="holds no activations"):
            load_activations(tmp_path / name)
    np.savez(tmp_path / "b.npz", x=np.array([{}], dtype=object))
    with pytest.raises(InputError, match="pickle"):
        load_activations(tmp_path / "b.npz")
    with pytest.raises(InputError, match="pickles"):
        load_activations(tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError):
        load_activations(tmp_path / "c.npz")
