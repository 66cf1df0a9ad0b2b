"""How good a sparse autoencoder is: what it keeps of activations, and of what the model says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...bridge import TransformerBridge
from ...hooks import HookPoint, InputError

SPLICED, ZERO, MEAN = RUNS = ("spliced", "zero", "mean")
"""What stands in for the activations: the reconstruction, zeros, or their mean over the data."""
DENSE = 0.1
"""A concept that is active on a larger share of tokens is dense."""


@dataclass(frozen=True)
class SAEMetrics:
    """Measures of a coder at one place, over the tokens that count.

    Attributes:
        n_tokens: How many those are.
        mse: Squared error of a token, summed over features and averaged over tokens.
        explained_variance: ``1 - sum |x - x'|^2 / sum |x - mean|^2``, over all tokens at once.
        cosine: Mean cosine between activation and reconstruction.
        l2_ratio: Mean of the reconstruction's length over the activation's.
        relative_bias: ``sum |x'|^2 / sum <x, x'>``: below 1 where reconstructions are too short.
        l0: Mean number of active concepts.
        density: Share of tokens on which each concept is active, [concept].
        dead, dense: Share of concepts that are never active, and that are on more than a tenth of tokens.
        ce_clean: Cross-entropy of the next token in the untouched model, in nats.
        ce: The same with the activations replaced: ``"spliced"``, ``"zero"``, ``"mean"``.
        ce_recovered: ``(ce_x - ce_spliced) / (ce_x - ce_clean)`` against ``"zero"`` and ``"mean"``.
        kl: Mean divergence KL(clean || replaced) of the next token, in nats.
        kl_recovered: ``1 - kl_spliced / kl_x`` against ``"zero"`` and ``"mean"``.
    """

    n_tokens: int
    mse: float
    explained_variance: float
    cosine: float
    l2_ratio: float
    relative_bias: float
    l0: float
    density: Float[Tensor, " concept"] = field(repr=False)
    dead: float
    dense: float
    ce_clean: float
    ce: dict[str, float]
    ce_recovered: dict[str, float]
    kl: dict[str, float]
    kl_recovered: dict[str, float]

    def as_dict(self) -> dict[str, float]:
        """The numbers by name, ``"ce_recovered/zero"`` among them; without the densities."""
        made: dict[str, float] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, dict):
                made.update({f"{one.name}/{key}": float(x) for key, x in value.items()})
            elif not isinstance(value, Tensor):
                made[one.name] = float(value)
        return made


@torch.no_grad()
def measure_sae(
    bridge: TransformerBridge,
    sae: Any,
    at: str,
    data: Sequence[str] | Int[Tensor, "batch pos"],
    *,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    batch_size: int = 16,
    include_special_tokens: bool = False,
) -> SAEMetrics:
    """Measure a coder on texts: reconstruction, sparsity, and what the model says with it in its place.

    The same tokens are replaced in every run, and no others.

    Args:
        bridge: A causal language model.
        sae: A coder, as `TransformerBridge.splice` takes it.
        at: Where it belongs.
        data: Texts, or ids [batch, pos].
        attention_mask: 1 at real tokens, for ids.
        batch_size: Rows at once.
        include_special_tokens: Whether the tokenizer's special tokens count and are replaced too.
    Raises:
        InputError: No data, a model that does not predict the next token, or too few tokens to measure on.
    """
    point = bridge.registry[at]
    batches = list(_batches(bridge, data, attention_mask, batch_size, include_special_tokens))
    mean = _mean(bridge, point, batches)
    tally = _Tally(mean)
    for batch in batches:
        tally.add(bridge, sae, point, batch)
    return tally.metrics()


def stability(first: Any, second: Any) -> float:
    """How alike two dictionaries are: the mean over concepts of the best cosine in the other, either way.

    Args:
        first: Something with ``get_dictionary()`` [concept, d], or such a matrix.
        second: Likewise.
    Raises:
        InputError: Dictionaries of different width.
    """
    rows = [x if isinstance(x, Tensor) else x.get_dictionary() for x in (first, second)]
    if rows[0].shape[-1] != rows[1].shape[-1]:
        raise InputError(
            f"the dictionaries are of {rows[0].shape[-1]} and {rows[1].shape[-1]} features: they cannot be "
            "compared"
        )
    one, other = (F.normalize(x.detach().double(), dim=-1) for x in rows)
    cosines = one @ other.to(one.device).T
    return float((cosines.amax(1).mean() + cosines.amax(0).mean()) / 2)


# --- data ---------------------------------------------------------------------------------------------------


@dataclass
class _Batch:
    """Rows, which tokens are real, and which of those count."""

    ids: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    counts: Bool[Tensor, "batch pos"]

    @property
    def kwargs(self) -> dict[str, Any]:
        mask = None if bool(self.real.all()) else self.real.long()
        return {"input": self.ids, "attention_mask": mask}

    def predicted(self) -> Bool[Tensor, "batch pos"]:
        """Where a real token is predicted from a real one."""
        return self.real[:, 1:] & self.real[:, :-1]


def _batches(
    bridge: TransformerBridge,
    data: Any,
    attention_mask: Tensor | None,
    batch_size: int,
    include_special: bool,
) -> Iterator[_Batch]:
    can_generate: Any = getattr(bridge.original_model, "can_generate", bool)
    if bridge.architecture.main.prefix == "decoder_" or not can_generate():
        raise InputError(
            f"cross-entropy is that of the next token, and {type(bridge.original_model).__name__} does not "
            "predict it from what stands before"
        )
    if batch_size < 1 or not len(data):
        raise InputError(f"nothing to measure on: {len(data)} rows, batch_size={batch_size}")
    special: list[int] = []
    if not include_special and bridge.tokenizer is not None:
        special = list(bridge.tokenizer.all_special_ids)
    for start in range(0, len(data), batch_size):
        rows = data[start : start + batch_size]
        if isinstance(rows, Tensor):
            mask = None if attention_mask is None else attention_mask[start : start + batch_size]
            inputs = bridge.prepare(rows.to(bridge.device), attention_mask=mask)
        else:
            inputs = bridge.prepare(list(rows))
        ids = inputs.tokens
        if ids is None:
            raise InputError("data must be texts or token ids [batch, pos]")
        real = torch.ones_like(ids, dtype=torch.bool) if inputs.mask is None else inputs.mask.bool()
        counts = real & ~torch.isin(ids, torch.tensor(special, device=ids.device, dtype=ids.dtype))
        yield _Batch(ids, real.to(ids.device), counts.to(ids.device))


def _mean(
    bridge: TransformerBridge, point: HookPoint, batches: list[_Batch]
) -> Float[Tensor, "*d"]:
    """The mean activation of the tokens that count; layers behind it are not run."""
    total: list[Tensor] = []
    found = re.match(rf"{bridge.registry.layers}\.(\d+)\.", str(point.name))
    stop: dict[str, Any] = {} if found is None else {"stop_at_layer": int(found.group(1)) + 1}
    for batch in batches:

        def add(value: Tensor, hook: HookPoint, batch: _Batch = batch) -> None:
            total.append(value[batch.counts.to(value.device)].double().sum(0))

        with bridge.hooks([(str(point.name), add)]):
            bridge(**batch.kwargs, **stop)
    count = sum(int(batch.counts.sum()) for batch in batches)
    if count < 2:
        raise InputError(f"{count} tokens count: that is too few to measure on")
    return torch.stack(total).sum(0) / count


# --- sums ---------------------------------------------------------------------------------------------------


class _Tally:
    """Sums over batches, in float64."""

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean
        self.sums: dict[str, float] = {}
        self.active: Tensor | None = None

    def note(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(value.double().sum())

    def add(self, bridge: TransformerBridge, sae: Any, point: HookPoint, batch: _Batch) -> None:
        """Run a batch whole, spliced and ablated."""
        clean = self._log_probs(bridge, batch)
        self._cross_entropy("clean", clean, batch)
        self.note("predicted", batch.predicted())
        for run in RUNS:
            if run == SPLICED:
                found = self._spliced(bridge, sae, point, batch)
            else:
                found = self._ablated(bridge, point, batch, to_mean=run == MEAN)
            self._cross_entropy(run, found, batch)
            kl = (clean.exp() * (clean - found)).sum(-1)
            self.note(f"kl {run}", kl)

    def _log_probs(self, bridge: TransformerBridge, batch: _Batch) -> Float[Tensor, "n d_vocab"]:
        logits = bridge(**batch.kwargs)[:, :-1]
        return logits[batch.predicted()].double().log_softmax(-1)

    def _cross_entropy(self, run: str, log_probs: Tensor, batch: _Batch) -> None:
        targets = batch.ids[:, 1:][batch.predicted()]
        self.note(f"ce {run}", -log_probs.gather(-1, targets[:, None]))

    def _ablated(
        self, bridge: TransformerBridge, point: HookPoint, batch: _Batch, *, to_mean: bool
    ) -> Tensor:
        def replace(value: Tensor, hook: HookPoint) -> Tensor:
            left = self.mean.to(value) if to_mean else torch.zeros_like(value)
            return torch.where(_like(batch.counts, value), left, value)

        with bridge.hooks([(str(point.name), replace)]):
            return self._log_probs(bridge, batch)

    def _spliced(
        self, bridge: TransformerBridge, sae: Any, point: HookPoint, batch: _Batch
    ) -> Tensor:
        held: dict[str, Tensor] = {}

        def enter(value: Tensor, hook: HookPoint) -> None:
            held["x"] = value

        def acts(value: Tensor, hook: HookPoint) -> None:
            fired = (value[batch.counts.to(value.device)] != 0).double()
            self.active = fired.sum(0) if self.active is None else self.active + fired.sum(0)
            self.note("l0", fired)

        def leave(value: Tensor, hook: HookPoint) -> Tensor:
            x = held["x"]
            self._compare(x[batch.counts.to(x.device)], value[batch.counts.to(x.device)])
            return torch.where(_like(batch.counts, value), value, x)

        with bridge.splice(sae, str(point.name), include_error=False, name="measured"):
            names = {
                part: f"{point.name}.measured.{part}"
                for part in ("hook_in", "hook_acts", "hook_out")
            }
            hooks = zip(names.values(), (enter, acts, leave), strict=True)
            with bridge.hooks(list(hooks)):
                found = self._log_probs(bridge, batch)
        return found

    def _compare(self, x: Tensor, made: Tensor) -> None:
        x, made = x.double().flatten(1), made.double().flatten(1)
        lengths, lengths_made = x.norm(dim=-1), made.norm(dim=-1)
        product = (x * made).sum(-1)
        self.note("tokens", torch.ones(len(x)))
        self.note("error", (x - made) ** 2)
        self.note("spread", (x - self.mean.to(x.device).flatten()) ** 2)
        self.note("cosine", product / (lengths * lengths_made).clamp(min=1e-12))
        self.note("ratio", lengths_made / lengths.clamp(min=1e-12))
        self.note("made", made**2)
        self.note("product", product)

    def metrics(self) -> SAEMetrics:
        """What the sums say."""
        sums, tokens, predicted = self.sums, self.sums["tokens"], self.sums["predicted"]
        ce = {run: sums[f"ce {run}"] / predicted for run in RUNS}
        clean = sums["ce clean"] / predicted
        kl = {run: sums[f"kl {run}"] / predicted for run in RUNS}
        density = torch.zeros(0) if self.active is None else (self.active / tokens).cpu()
        return SAEMetrics(
            n_tokens=int(tokens),
            mse=sums["error"] / tokens,
            explained_variance=1 - sums["error"] / sums["spread"],
            cosine=sums["cosine"] / tokens,
            l2_ratio=sums["ratio"] / tokens,
            relative_bias=sums["made"] / sums["product"] if sums["product"] else float("nan"),
            l0=sums["l0"] / tokens,
            density=density.float(),
            dead=float((density == 0).double().mean()),
            dense=float((density > DENSE).double().mean()),
            ce_clean=clean,
            ce=ce,
            ce_recovered={run: (ce[run] - ce[SPLICED]) / (ce[run] - clean) for run in (ZERO, MEAN)},
            kl=kl,
            kl_recovered={run: 1 - kl[SPLICED] / kl[run] for run in (ZERO, MEAN)},
        )


def _like(mask: Bool[Tensor, "batch pos"], value: Tensor) -> Tensor:
    return mask.to(value.device).view(*mask.shape, *[1] * (value.dim() - 2))
