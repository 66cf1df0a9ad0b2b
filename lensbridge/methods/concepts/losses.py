"""What a fit lowers, where the caller chooses: criteria as in interpreto and overcomplete."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ...hooks import InputError

Criterion = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of inputs, reconstructions, pre-codes, codes and the dictionary: a number to lower."""


class MSELoss:
    """The mean of the squared errors over rows and dimensions."""

    def __call__(
        self,
        x: Float[Tensor, "row d"],
        x_hat: Float[Tensor, "row d"],
        pre_codes: Float[Tensor, "row concept"],
        codes: Float[Tensor, "row concept"],
        dictionary: Float[Tensor, "concept d"],
    ) -> Float[Tensor, ""]:
        """Look at inputs and reconstructions only."""
        return (x - x_hat).square().mean()


class DeadNeuronsReanimation(MSELoss):
    """The squared error, and a pull on the pre-codes of concepts that no row of the batch has.

    After interpreto: mean squared error - penalty * mean over rows and concepts of (pre-code, where dead).
    """

    def __init__(self, penalty: float = 1e-3) -> None:
        self.penalty = penalty

    def __call__(
        self,
        x: Float[Tensor, "row d"],
        x_hat: Float[Tensor, "row d"],
        pre_codes: Float[Tensor, "row concept"],
        codes: Float[Tensor, "row concept"],
        dictionary: Float[Tensor, "concept d"],
    ) -> Float[Tensor, ""]:
        """Look at everything but the dictionary."""
        dead = ~(codes.detach() > 0).any(0)
        error = super().__call__(x, x_hat, pre_codes, codes, dictionary)
        return error - self.penalty * (pre_codes * dead).mean()


class SAELossClasses(Enum):
    """The criteria by name; a member is as good as its class."""

    MSE = MSELoss
    DeadNeuronsReanimation = DeadNeuronsReanimation

    def __call__(self, **kwargs: Any) -> Any:
        """The criterion."""
        return self.value(**kwargs)


def criterion_of(given: Any) -> Criterion | None:
    """The function that a ``criterion=`` stands for; None for the autoencoder's own loss.

    Raises:
        InputError: No class that can be made without arguments, and no function.
    """
    if given is None:
        return None
    if isinstance(given, (type, SAELossClasses)):
        try:
            given = given()
        except TypeError as error:
            raise InputError(
                f"criterion={given.__name__ if isinstance(given, type) else given} cannot be made without "
                f"arguments ({error}): give an instance"
            ) from error
    if not callable(given):
        raise InputError(
            "criterion is a class, a function of (x, x_hat, pre_codes, codes, dictionary) or one of "
            f"SAELossClasses; got {given!r}"
        )
    return given.__call__ if isinstance(given, nn.Module) else given
