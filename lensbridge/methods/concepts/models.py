"""What lensbridge adds to overcomplete's autoencoders, and mends in them.

The classes here are mixed into overcomplete's in `engine`; nothing here imports it. Inside, an activation x
is ``u = scale * x``, and an autoencoder rebuilds u as ``codes @ dictionary + b_dec``. Outside, codes are
divided by the scale and so are in the units of the activations, with ``codes @ dictionary + offset`` the
reconstruction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from ...hooks import InputError
from .sparse import Linear, Places, combine

_SPARSE = 1 / 8
"""Up to this share of codes that matter, those alone are computed with; beyond it products are dense."""


ROW_NORMS = ("none", "constant_norm_rescale", "layer_norm")
"""What some autoencoders of SAELens do with each row first; those trained here do nothing."""


@dataclass
class Pass:
    """A batch on its way through an autoencoder in training.

    Attributes:
        x_hat: The reconstruction, in the units inside.
        penalty: What is added to the squared error for the codes not being sparse; None where nothing is.
        fired: Which concepts have a code above zero.
        l0: How many codes are not zero, in the whole batch.
    """

    x_hat: Float[Tensor, "row d"]
    penalty: Float[Tensor, ""] | None
    fired: Bool[Tensor, " concept"]
    l0: Float[Tensor, ""]


class Autoencoder(nn.Module):
    """Common to all: offset, scale, a dictionary that is not rewritten by being read."""

    encoder: Any
    dictionary: Any
    b_dec: Tensor
    scale: Tensor
    nb_concepts: int
    is_homogeneous = True
    """Whether codes of twice the input are twice the codes, once biases and thresholds are doubled, too."""
    learns_encoder = True
    dictionary_class: Any
    is_linear: bool
    has_bias: bool
    centers: bool
    row_norm = "none"

    def _build(
        self,
        d: int,
        nb_concepts: int,
        encoder_module: Any = None,
        dictionary_params: Mapping[str, Any] | None = None,
        bias: bool = True,
        **upstream: Any,
    ) -> None:
        """Build what overcomplete builds, and add to it.

        Args:
            d: Width of the activations.
            nb_concepts: How many atoms.
            encoder_module: The name of one of overcomplete's encoders, or a module.
            dictionary_params: For overcomplete's dictionary.
            bias: Whether there are an offset and a scale.
            **upstream: Further arguments of overcomplete's class.
        """
        if not self.learns_encoder and encoder_module is not None:
            raise InputError(
                f"{type(self).__name__} encodes by its dictionary alone: leave encoder_module out"
            )
        params = dict(dictionary_params or {})
        initial = params.pop("initializer", None)
        module = encoder_module if self.learns_encoder else "identity"
        super().__init__(
            d, nb_concepts, encoder_module=module, dictionary_params=params, **upstream
        )
        self.dictionary = self._new_dictionary(d, params, upstream)
        if initial is not None:
            atoms = torch.as_tensor(initial)
            if atoms.shape != (nb_concepts, d):
                raise InputError(f"initializer is [{nb_concepts}, {d}], got {list(atoms.shape)}")
            self.dictionary.start_from(atoms)
        self.dictionary.project()
        self.is_linear = self.learns_encoder and encoder_module in (None, "linear")
        self.has_bias, self.centers = bias, True
        if bias:
            self.b_dec = nn.Parameter(torch.zeros(d))
        else:
            self.register_buffer("b_dec", torch.zeros(d))
        self.register_buffer("scale", torch.ones(()))
        self._tie()

    def _new_dictionary(self, d: int, params: dict[str, Any], upstream: dict[str, Any]) -> Any:
        return self.dictionary_class(d, self.nb_concepts, **params)

    @torch.no_grad()
    def _tie(self) -> None:
        """Let the encoder begin as the dictionary: atoms are the best first guess of what detects them.

        From elsewhere, many codes never fire.
        """
        if self.is_linear:
            atoms = self.get_dictionary()
            self.linear.weight.copy_(atoms / atoms.square().sum(1, keepdim=True).clamp(min=1e-12))
            self.linear.bias.zero_()

    @property
    def device(self) -> torch.device:
        """Where the parameters are; overcomplete keeps the name of where they were first."""
        return next(self.parameters()).device

    @device.setter
    def device(self, device: Any) -> None:
        """Overcomplete's constructors set it; parameters know better."""

    @property
    def linear(self) -> nn.Linear:
        """The encoder's one layer, where it has one."""
        return self.encoder.final_block[0]

    @property
    def offset(self) -> Float[Tensor, " d"]:
        """What is added to ``codes @ dictionary``, in the units of the activations."""
        return self.b_dec / self.scale

    def train(self, mode: bool = True) -> Any:
        """As in torch: overcomplete's forgets dropout for good, and keeps an old dictionary."""
        return nn.Module.train(self, mode)

    # --- start and end of a training -----------------------------------------------------------------

    @torch.no_grad()
    def begin(self, mean: Float[Tensor, " d"], scale: Float[Tensor, ""]) -> None:
        """Take the data's mean as offset, and its scale; nothing without a bias."""
        if self.has_bias:
            self.scale.copy_(scale)
            self.b_dec.copy_(mean * scale)

    @torch.no_grad()
    def fold(self) -> None:
        """Put the scale into the weights, so that inside and outside are the same units."""
        if not self.is_homogeneous or (self.learns_encoder and not self.is_linear):
            return
        self.b_dec.div_(self.scale)
        if self.learns_encoder:
            self.linear.bias.div_(self.scale)
        self._fold_rest()
        self.scale.fill_(1)

    def _fold_rest(self) -> None:
        """What else is in the units inside."""

    def before_step(self) -> None:
        """Between a backward pass and the optimizer's step."""
        self.dictionary.flatten_gradient()

    @torch.no_grad()
    def after_step(self) -> None:
        """Between the optimizer's step and the next batch."""
        self.dictionary.project()

    # --- use ---------------------------------------------------------------------------------------------

    def get_dictionary(self) -> Float[Tensor, "concept d"]:
        """The atoms; reading them changes nothing."""
        return self.dictionary.get_dictionary()

    def normalised(self, x: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
        """Rows as the file says that an autoencoder wants them."""
        if self.row_norm == "constant_norm_rescale":
            return x * (x.shape[1] ** 0.5 / x.norm(dim=-1, keepdim=True))
        if self.row_norm == "layer_norm":
            x = x - x.mean(dim=-1, keepdim=True)
            return x / (x.std(dim=-1, keepdim=True) + 1e-5)
        return x

    def denormalised(
        self, x_hat: Float[Tensor, "row d"], x: Float[Tensor, "row d"]
    ) -> Float[Tensor, "row d"]:
        """Reconstructions of normalised rows, as large as the rows were."""
        if self.row_norm == "constant_norm_rescale":
            return x_hat / (x.shape[1] ** 0.5 / x.norm(dim=-1, keepdim=True))
        if self.row_norm == "layer_norm":
            mean = x.mean(dim=-1, keepdim=True)
            return x_hat * (x - mean).std(dim=-1, keepdim=True) + mean
        return x_hat

    def centered(self, u: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
        """What the encoder is shown."""
        return u - self.b_dec if self.has_bias and self.centers else u

    def encode(
        self, x: Float[Tensor, "row d"]
    ) -> tuple[Float[Tensor, "row concept"], Float[Tensor, "row concept"]]:
        """Pre-codes and codes, in the units of the activations."""
        pre, codes = self.inside(self.centered(self.normalised(x) * self.scale))
        return pre / self.scale, codes / self.scale

    def inside(self, centered: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-codes and codes, in the units inside."""
        pre, codes = super().encode(centered)  # type: ignore[misc]
        return pre, codes

    def decode(self, z: Float[Tensor, "row concept"]) -> Float[Tensor, "row d"]:
        """Activations of codes."""
        return z @ self.get_dictionary() + self.offset

    def dense(self, u: Float[Tensor, "row d"]) -> tuple[Tensor, Tensor, Tensor]:
        """Pre-codes, codes and reconstruction in the units inside: what a criterion of the caller's sees."""
        pre, codes = self.inside(self.centered(u))
        return pre, codes, codes @ self.get_dictionary() + self.b_dec

    # --- training ------------------------------------------------------------------------------------

    def training_pass(self, u: Float[Tensor, "row d"]) -> Pass:
        """A batch in the units inside, differentiable by all parameters."""
        if not self.is_linear:
            pre, codes, x_hat = self.dense(u)
            return self._pass(x_hat, codes, pre)
        layer = self.linear
        with torch.no_grad():
            x = self.centered(u)
            made = F.linear(x, layer.weight, layer.bias)
            mask = self._matters(made)
        center = self.b_dec if self.has_bias and self.centers else self.b_dec.detach()
        all_codes = Linear(x, made, center, layer.weight, layer.bias)
        n_most = made.numel() * _SPARSE
        places = None
        if isinstance(mask, Places):
            places = mask
        elif int(mask.count_nonzero()) <= n_most:
            places = Places.of_mask(mask)
        if places is None:
            pre = all_codes.whole()
            codes = self._activated(pre, None)
            x_hat = codes @ self.get_dictionary() + self.b_dec
            return self._pass(x_hat, codes, pre)
        pre = all_codes.at(places)
        codes = self._activated(pre, places.cols)
        x_hat = combine(codes, places, self.get_dictionary()) + self.b_dec
        return self._pass(x_hat, codes, pre, places)

    def _matters(self, made: Tensor) -> Places | Bool[Tensor, "row concept"]:
        """Which codes get a value or a gradient, from all pre-codes."""
        return made > 0

    def _activated(self, pre: Tensor, cols: Tensor | None) -> Tensor:
        """Codes of pre-codes: of all, or of those in some columns."""
        return pre.relu()

    def _pass(
        self, x_hat: Tensor, codes: Tensor, pre: Tensor, places: Places | None = None
    ) -> Pass:
        on = codes.detach() > 0
        if places is None:
            fired = on.any(0)
        else:
            fired = torch.zeros(self.nb_concepts, dtype=torch.bool, device=on.device)
            fired[places.cols[on]] = True
        cols = None if places is None else places.cols
        return Pass(
            x_hat.float(),
            self._penalty(codes, pre, cols, len(x_hat)),
            fired,
            on.count_nonzero().float(),
        )

    def _penalty(self, codes: Tensor, pre: Tensor, cols: Tensor | None, n: int) -> Tensor | None:
        """What is added to the squared error for codes not being sparse."""
        return None

    def of_dead(
        self, u: Tensor, x_hat: Tensor, dead: Tensor, k: int
    ) -> Float[Tensor, "row d"] | None:
        """What concepts that fire no more make of what the others leave over; None where none is kept alive.

        Args:
            u: The batch.
            x_hat: Its reconstruction.
            dead: Their numbers.
            k: How many of them take part in each row.
        """
        if not self.is_linear:
            return None
        layer = self.linear
        pre = F.linear(self.centered(u), layer.weight[dead], layer.bias[dead])
        best = pre.topk(min(k, len(dead)), dim=1)
        atoms = self.get_dictionary()[dead]
        places = Places.of_each_row(best.indices)
        return combine(best.values.relu().flatten(), places, atoms)
