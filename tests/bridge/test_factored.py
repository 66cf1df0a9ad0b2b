"""FactoredMatrix is the product of its factors, and never makes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lensbridge import FactoredMatrix, InputError


def random(*shape: int) -> Tensor:
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape))
    )


@pytest.fixture(params=[(), (3,), (2, 3)], ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[FactoredMatrix, Tensor]:
    """A matrix of 7 rows and 5 columns of rank 4, factored and multiplied out."""
    A, B = random(*request.param, 7, 4), random(*request.param, 4, 5)
    return FactoredMatrix(A, B), A @ B


@pytest.fixture(params=[(), (2, 3)], ids=str)
def square(request: pytest.FixtureRequest) -> tuple[FactoredMatrix, Tensor]:
    """The same with 6 rows and columns."""
    A, B = random(*request.param, 6, 4), random(*request.param, 4, 6)
    return FactoredMatrix(A, B), A @ B


def near(left: Any, right: Tensor) -> bool:
    left = left.AB if isinstance(left, FactoredMatrix) else left
    return left.shape == right.shape and torch.allclose(left, right, rtol=1e-9, atol=1e-9)


def test_what_it_is(pair: tuple[FactoredMatrix, Tensor]) -> None:
    m, full = pair
    assert near(m.AB, full)
    assert (m.ldim, m.mdim, m.rdim) == (7, 4, 5)
    assert m.shape == full.shape
    assert m.ndim == full.dim()
    assert m.has_leading_dims is (full.dim() > 2)
    assert m.pair[0] is m.A
    assert m.pair[1] is m.B
    assert near(m.T, full.mT)
    assert repr(m) == f"FactoredMatrix(shape={list(full.shape)}, mdim=4)"


def test_factors_broadcast() -> None:
    A, B = random(3, 1, 7, 4), random(2, 4, 5)
    m = FactoredMatrix(A, B)
    assert m.A.shape == (3, 2, 7, 4)
    assert (
        m.A.untyped_storage().data_ptr() == A.untyped_storage().data_ptr()
    )  # expanded, not copied
    assert near(m, A @ B)


def test_products(pair: tuple[FactoredMatrix, Tensor]) -> None:
    m, full = pair
    right, left = random(5, 9), random(9, 7)
    assert isinstance(m @ right, FactoredMatrix)
    assert near(m @ right, full @ right)
    assert isinstance(left @ m, FactoredMatrix)
    assert near(left @ m, left @ full)
    assert near(m @ right[:, 0], full @ right[:, 0])
    assert near(left[0] @ m, left[0] @ full)
    assert near(3 * m, 3 * full)
    assert near(m * torch.tensor([0.5]), full / 2)


@pytest.mark.parametrize("width", [2, 4, 6])
def test_products_of_two(pair: tuple[FactoredMatrix, Tensor], width: int) -> None:
    m, full = pair
    other = FactoredMatrix(random(5, width), random(width, 8))
    made = m @ other
    assert near(made, full @ other.AB)
    assert made.mdim == min(4, width)


def test_svd(pair: tuple[FactoredMatrix, Tensor]) -> None:
    m, full = pair
    U, S, Vh = m.svd()
    assert U.shape[-1] == S.shape[-1] == Vh.shape[-2] == 4
    assert near(U * S.unsqueeze(-2) @ Vh, full)
    assert near(S, torch.linalg.svdvals(full)[..., :4])
    assert near(U.mT @ U, torch.eye(4).double().expand(*full.shape[:-2], 4, 4))
    assert near(Vh @ Vh.mT, torch.eye(4).double().expand(*full.shape[:-2], 4, 4))
    assert (m.U is U, m.S is S, m.Vh is Vh) == (True, True, True)
    assert near(m.norm(), torch.linalg.matrix_norm(full))


def test_svd_where_the_middle_is_widest() -> None:
    A, B = random(3, 9), random(9, 5)
    m = FactoredMatrix(A, B)
    assert m.S.shape == (3,)
    assert near(m.U * m.S @ m.Vh, A @ B)
    assert near(m.norm(), torch.linalg.matrix_norm(A @ B))


def test_even_and_collapsed(pair: tuple[FactoredMatrix, Tensor]) -> None:
    m, full = pair
    even = m.make_even()
    assert near(even, full)
    assert near(even.A.mT @ even.A, even.B @ even.B.mT)  # both the singular values
    assert near(m.collapse_l().mT @ m.collapse_l(), full.mT @ full)
    assert near(m.collapse_r() @ m.collapse_r().mT, full @ full.mT)


def test_eigenvalues(square: tuple[FactoredMatrix, Tensor]) -> None:
    m, full = square
    ours = m.eigenvalues.abs().sort(-1).values
    theirs = torch.linalg.eigvals(full).abs().sort(-1).values
    assert ours.shape[-1] == 4
    assert near(ours, theirs[..., 2:])
    assert near(m.eigenvalues.sum(-1).real, full.diagonal(dim1=-2, dim2=-1).sum(-1))
    assert near(m.BA, m.B @ m.A)
    wide = FactoredMatrix(m.A @ random(4, 9), random(9, 6).expand(*m.B.shape[:-2], 9, 6))
    assert wide.eigenvalues.shape[-1] == 6
    assert near(wide.eigenvalues.sum(-1).real, wide.AB.diagonal(dim1=-2, dim2=-1).sum(-1))


INDICES = [
    (1,),
    (1, 2),
    (slice(1), [0, 2]),
    (..., slice(3)),
    (0, ..., slice(1, 3), slice(None)),
    (torch.tensor([True, False]),),
    (slice(None), slice(None), slice(2, 5), slice(None, None, 2)),
    (slice(None), 1, slice(3)),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_slices(index: Any) -> None:
    """As of the product."""
    m = FactoredMatrix(random(2, 3, 7, 4), random(2, 3, 4, 5))
    assert isinstance(m[index], FactoredMatrix)
    assert near(m[index], m.AB[index])


def test_single_rows_and_columns_stay_matrices() -> None:
    m = FactoredMatrix(random(2, 7, 4), random(2, 4, 5))
    assert near(m[1, -1], m.AB[1, -1:])
    assert near(m[..., 2], m.AB[..., 2:3])
    assert near(m[0, 3, 4], m.AB[0, 3:4, 4:5])
    assert near(m.get_corner(2), m.AB[:2, :2, :2])
    assert near(m.unsqueeze(0), m.AB.unsqueeze(0))
    assert near(m.unsqueeze(1), m.AB.unsqueeze(1))
    assert near(m.unsqueeze(-3), m.AB.unsqueeze(-3))


REFUSED: list[tuple[Callable[[FactoredMatrix], Any], str]] = [
    (
        lambda m: FactoredMatrix(m.A, m.A),
        r"factors are matrices .* got \[2, 7, 4\] and \[2, 7, 4\]",
    ),
    (lambda m: FactoredMatrix(m.A[0, 0], m.B), "factors are matrices"),
    (
        lambda m: FactoredMatrix(m.A, m.B.expand(3, 2, 4, 5)[:, :1].expand(3, 3, 4, 5)),
        "do not broadcast",
    ),
    (lambda m: m @ torch.ones(7).double(), "matrix of 5 columns with one of 7 rows"),
    (lambda m: torch.ones(2, 5).double() @ m, "matrix of 5 columns with one of 7 rows"),
    (lambda m: m @ m, "matrix of 5 columns with one of 7 rows"),
    (lambda m: m * torch.ones(2), r"one number, got a tensor of shape \[2\]"),
    (lambda m: m.eigenvalues, r"eigenvalues is of a square matrix; this one is \[7, 5\]"),
    (lambda m: m.BA, "square"),
    (lambda m: m[0, 0, 0, 0], "4 indices into a matrix of 3 dimensions"),
    (lambda m: m[..., ...], "2 indices"),
    (lambda m: m[None], "unsqueeze"),
    (lambda m: m.unsqueeze(2), "k from 0 to 1, or from -4 to -3, got 2"),
    (lambda m: m.unsqueeze(-1), "got -1"),
]


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_refusals(call: Callable[[FactoredMatrix], Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        call(FactoredMatrix(random(2, 7, 4), random(2, 4, 5)))


def test_refusals_of_python() -> None:
    m = FactoredMatrix(random(7, 4), random(4, 5))
    with pytest.raises(TypeError):
        m @ "x"
    with pytest.raises(IndexError, match="index 7 is outside a dimension of size 7"):
        m[7]


def test_half_precision_is_decomposed_in_float32() -> None:
    A, B = random(7, 4).bfloat16(), random(4, 5).bfloat16()
    m = FactoredMatrix(A, B)
    assert m.S.dtype == torch.float32
    assert torch.allclose(m.S, torch.linalg.svdvals(A.float() @ B.float())[:4], rtol=1e-4)
    assert torch.allclose(m.norm(), torch.linalg.matrix_norm(A.float() @ B.float()), rtol=1e-4)
    assert m.AB.dtype == torch.bfloat16


def test_gradients_pass() -> None:
    A, B = random(7, 4).requires_grad_(), random(4, 5).requires_grad_()
    FactoredMatrix(A, B).norm().backward()
    held = A.grad.clone()
    A.grad = None
    torch.linalg.matrix_norm(A @ B).backward()
    assert near(held, A.grad)


class Largest(TorchDispatchMode):
    """The size of the largest tensor any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel())
        return out


USES: dict[str, Callable[[FactoredMatrix], Any]] = {
    "svd": lambda m: m.svd(),
    "norm": lambda m: m.norm(),
    "eigenvalues": lambda m: m.eigenvalues,
    "two": lambda m: (m @ m.T @ m).norm(),
    "right": lambda m: m @ torch.ones(300, 7),
    "left": lambda m: torch.ones(7, 300) @ m,
    "vector": lambda m: m @ torch.ones(300),
    "slices": lambda m: m[:100, ::2].norm(),
    "even": lambda m: m.make_even(),
    "corner": lambda m: m.get_corner(),
    "transposed": lambda m: 2 * m.T,
}


@pytest.mark.parametrize("use", USES)
def test_the_product_is_never_made(use: str) -> None:
    """Nothing is larger than a factor: 300 x 8, of a product of 300 x 300."""
    m = FactoredMatrix(torch.randn(300, 8), torch.randn(8, 300))
    with Largest() as largest:
        USES[use](m)
    assert 0 < largest.size <= 300 * 8
    with Largest() as largest:
        m.AB  # noqa: B018
    assert largest.size == 300 * 300
