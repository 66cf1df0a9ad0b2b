"""FactoredMatrix: a product of two matrices that is kept as its factors."""

from __future__ import annotations

from functools import cached_property
from types import EllipsisType
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from ..hooks import InputError


class FactoredMatrix:
    """A matrix ``A @ B`` of low rank, known by its factors: QK or OV of a head, or a stack of them.

    Products, norm, singular values and eigenvalues are computed from the factors; the product itself
    [ldim, rdim] is made by `AB` only. Leading dimensions of the factors broadcast. Singular values,
    eigenvalues and norms of half-precision factors are computed, and given, in float32.

    Args:
        A: Left factor, [..., ldim, mdim].
        B: Right factor, [..., mdim, rdim].
    Raises:
        InputError: The factors do not fit.
    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    """

    __array_priority__ = 1000  # a NumPy scalar on the left leaves the product to `__rmul__`

    def __init__(self, A: Tensor, B: Tensor) -> None:
        if A.dim() < 2 or B.dim() < 2 or A.shape[-1] != B.shape[-2]:
            raise InputError(
                "the factors are matrices [..., ldim, mdim] and [..., mdim, rdim], "
                f"got {list(A.shape)} and {list(B.shape)}"
            )
        try:
            leading = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
        except RuntimeError as error:
            raise InputError(
                f"the leading dimensions of {list(A.shape)} and {list(B.shape)} do not broadcast"
            ) from error
        self.A: Float[Tensor, "*leading ldim mdim"] = A.expand(*leading, *A.shape[-2:])
        self.B: Float[Tensor, "*leading mdim rdim"] = B.expand(*leading, *B.shape[-2:])

    # --- what it is --------------------------------------------------------------------------------------

    @property
    def ldim(self) -> int:
        """Rows."""
        return self.A.shape[-2]

    @property
    def mdim(self) -> int:
        """Width between the factors, which bounds the rank."""
        return self.A.shape[-1]

    @property
    def rdim(self) -> int:
        """Columns."""
        return self.B.shape[-1]

    @property
    def shape(self) -> torch.Size:
        """Shape of the product, [..., ldim, rdim]."""
        return torch.Size((*self.A.shape[:-1], self.rdim))

    @property
    def ndim(self) -> int:
        """How many dimensions the product has."""
        return len(self.shape)

    @property
    def has_leading_dims(self) -> bool:
        """Whether it is a stack of matrices."""
        return self.ndim > 2

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """The factors."""
        return self.A, self.B

    @property
    def AB(self) -> Float[Tensor, "*leading ldim rdim"]:
        """The product, multiplied out."""
        return self.A @ self.B

    @property
    def BA(self) -> Float[Tensor, "*leading mdim mdim"]:
        """The product the other way round: small, with the same eigenvalues but for zeros.

        Raises:
            InputError: The matrix is not square.
        """
        self._needs_square("BA")
        return self.B @ self.A

    @property
    def T(self) -> FactoredMatrix:
        """The transposed matrix."""
        return FactoredMatrix(self.B.mT, self.A.mT)

    def __repr__(self) -> str:
        return f"FactoredMatrix(shape={list(self.shape)}, mdim={self.mdim})"

    # --- products ----------------------------------------------------------------------------------------

    def __matmul__(self, other: Any) -> Any:
        """With a vector, a vector; with a matrix or another `FactoredMatrix`, a `FactoredMatrix`."""
        if isinstance(other, FactoredMatrix):
            self._needs_inner(self.rdim, other.ldim)
            core = self.B @ other.A
            if self.mdim > other.mdim:
                return FactoredMatrix(self.A @ core, other.B)
            return FactoredMatrix(self.A, core @ other.B)
        if not isinstance(other, Tensor):
            return NotImplemented
        self._needs_inner(self.rdim, other.shape[0] if other.dim() == 1 else other.shape[-2])
        if other.dim() == 1:
            return (self.A @ (self.B @ other).unsqueeze(-1)).squeeze(-1)
        return FactoredMatrix(self.A, self.B @ other)

    def __rmatmul__(self, other: Any) -> Any:
        """With a vector, a vector; with a matrix, a `FactoredMatrix`."""
        if not isinstance(other, Tensor):
            return NotImplemented
        self._needs_inner(other.shape[-1], self.ldim)
        if other.dim() == 1:
            return ((other @ self.A).unsqueeze(-2) @ self.B).squeeze(-2)
        return FactoredMatrix(other @ self.A, self.B)

    def __mul__(self, scalar: Any) -> FactoredMatrix:
        """By a number, or a tensor of one element."""
        if isinstance(scalar, Tensor) and scalar.numel() != 1:
            raise InputError(
                f"a FactoredMatrix is multiplied by one number, got a tensor of shape {list(scalar.shape)}; "
                "@ is the matrix product"
            )
        if isinstance(scalar, Tensor):
            scalar = scalar.reshape(())
        return FactoredMatrix(self.A * scalar, self.B)

    __rmul__ = __mul__

    # --- parts -------------------------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> FactoredMatrix:
        """A part, as of the product; still factored, so a single row or column keeps its dimension.

        ``m[0, 3]`` of a stack by layer and head is one head's matrix, ``m[..., :5]`` its first columns.
        """
        full = self._full_index(index if isinstance(index, tuple) else (index,))
        *leading, row, column = full
        A = self.A[(*leading, row, slice(None))]
        B = self.B[(*leading, slice(None), column)]
        return FactoredMatrix(A, B)

    def _full_index(self, index: tuple[Any, ...]) -> tuple[Any, ...]:
        """With an item for each dimension, numbers for rows and columns as slices."""
        if any(item is None for item in index):
            raise InputError(
                "a FactoredMatrix gets new dimensions by unsqueeze, not by indexing with None"
            )
        dots = [i for i, item in enumerate(index) if isinstance(item, EllipsisType)]
        missing = self.ndim - len(index) + len(dots)
        if len(dots) > 1 or missing < 0:
            raise InputError(f"{len(index)} indices into a matrix of {self.ndim} dimensions")
        at = dots[0] if dots else len(index)
        filled = (*index[:at], *[slice(None)] * missing, *index[at + len(dots) :])
        ends = (
            _as_slice(item, size) for item, size in zip(filled[-2:], self.shape[-2:], strict=True)
        )
        return (*filled[:-2], *ends)

    def get_corner(self, k: int = 3) -> Tensor:
        """The first ``k`` of every dimension of the product."""
        leading = (slice(k),) * (self.ndim - 2)
        return self.A[(*leading, slice(k))] @ self.B[(*leading, slice(None), slice(k))]

    def unsqueeze(self, k: int) -> FactoredMatrix:
        """With another leading dimension of length one, as dimension ``k``."""
        if not -self.ndim - 1 <= k <= self.ndim - 2 or -3 < k < 0:
            raise InputError(
                f"a FactoredMatrix of {self.ndim} dimensions gets a leading one: k from 0 to "
                f"{self.ndim - 2}, or from {-self.ndim - 1} to -3, got {k}"
            )
        return FactoredMatrix(self.A.unsqueeze(k), self.B.unsqueeze(k))

    # --- singular values, eigenvalues, norm --------------------------------------------------------------

    @cached_property
    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        # Orthogonal bases of both factors; what is left between them is small.
        left, upper = torch.linalg.qr(widened(self.A))
        right, lower = torch.linalg.qr(widened(self.B).mT)
        U, S, Vh = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
        return left @ U, S, Vh @ right.mT

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Singular value decomposition: ``AB == U @ diag(S) @ Vh``.

        Returns:
            U [..., ldim, n], S [..., n], largest first, and Vh [..., n, rdim], where n is the
            smallest of ldim, mdim and rdim. The rows of Vh are the right singular vectors.
        """
        return self._svd

    @property
    def U(self) -> Float[Tensor, "*leading ldim n"]:
        """Left singular vectors, as columns."""
        return self._svd[0]

    @property
    def S(self) -> Float[Tensor, "*leading n"]:
        """Singular values, largest first."""
        return self._svd[1]

    @property
    def Vh(self) -> Float[Tensor, "*leading n rdim"]:
        """Right singular vectors, as rows."""
        return self._svd[2]

    @property
    def eigenvalues(self) -> Complex[Tensor, "*leading n"]:
        """The eigenvalues that may differ from zero, as many as the smaller of ldim and mdim.

        Raises:
            InputError: The matrix is not square.
        """
        self._needs_square("eigenvalues")
        return torch.linalg.eigvals(widened(self.BA if self.mdim <= self.ldim else self.AB))

    def norm(self) -> Float[Tensor, "*leading"]:
        """Frobenius norm."""
        upper = torch.linalg.qr(widened(self.A))[1]
        lower = torch.linalg.qr(widened(self.B).mT)[1]
        return torch.linalg.matrix_norm(upper @ lower.mT)

    def make_even(self) -> FactoredMatrix:
        """The same matrix, each factor with the roots of the singular values."""
        U, S, Vh = self._svd
        root = S.sqrt()
        return FactoredMatrix(U * root.unsqueeze(-2), root.unsqueeze(-1) * Vh)

    def collapse_l(self) -> Float[Tensor, "*leading n rdim"]:
        """Without the left singular vectors: a smaller matrix with the same products of columns."""
        return self.S.unsqueeze(-1) * self.Vh

    def collapse_r(self) -> Float[Tensor, "*leading ldim n"]:
        """Without the right singular vectors: a smaller matrix with the same products of rows."""
        return self.U * self.S.unsqueeze(-2)

    # --- refusals ----------------------------------------------------------------------------------------

    def _needs_square(self, what: str) -> None:
        if self.ldim != self.rdim:
            raise InputError(
                f"{what} is of a square matrix; this one is [{self.ldim}, {self.rdim}]"
            )

    def _needs_inner(self, left: int, right: int) -> None:
        if left != right:
            raise InputError(f"cannot multiply a matrix of {left} columns with one of {right} rows")


def _as_slice(item: Any, size: int) -> Any:
    if isinstance(item, bool) or not isinstance(item, int):
        return item
    if not -size <= item < size:
        raise IndexError(f"index {item} is outside a dimension of size {size}")
    return slice(item % size, item % size + 1)


def widened(x: Tensor) -> Tensor:
    """In float32 where the decompositions know no half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
