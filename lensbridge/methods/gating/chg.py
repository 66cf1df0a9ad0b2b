"""CHG: a model with a gate on every head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...bridge import TransformerBridge, frozen
from ...hooks import HookPoint, InputError
from .answers import Answers, Runner
from .data import CHGBatch, CHGDataset
from .sites import HEADS, GateSite, Target, sites_of

EDGE = 1e-6
"""How near to 0 and 1 a drawn gate may come: a logit is finite."""
AGGREGATES = ("sum", "mean", "none")


class CHG:
    """Gates between 0 and 1 on parts of a model, by default on what each attention head adds.

    A gate multiplies `blocks.{i}.attn.hook_z`, what a head has gathered before the output projection (after
    Nam et al., "Causal Head Gating", arXiv 2505.13737). A model that a bridge can wrap can be gated; nothing
    of it is changed, and gates act only in the runs made here or inside `gated`.

    Attributes:
        bridge: The model.
        sites: Where the gates multiply, one site a layer.
        layers: The layers of the rows of a mask: all that have heads, or those that were asked for.
    """

    def __init__(
        self,
        model: TransformerBridge | nn.Module,
        adapter: Any = None,
        *,
        target: Target = HEADS,
        layers: Iterable[int] | int | None = None,
        ablation: CHGDataset | dict[str, Tensor] | None = None,
    ) -> None:
        """Choose what to gate.

        Args:
            model: A bridge, or a model to wrap.
            adapter: Not needed: any model works. Taken for code written for inteprelens.
            target: ``"heads"`` (query heads), ``"kv_groups"`` (heads that share keys and values),
                ``"attn"`` or ``"mlp"`` (whole branches), or `GateSite` objects.
            layers: Which layers, negative ones from the end; None for all that have the target.
            ablation: What a closed gate leaves: None for zeros; a dataset for the mean over its real tokens;
                or those means themselves by point.
        Raises:
            InputError: An unknown target or layer, layers with different numbers of gates, unfit means.
            AbsentPointError: The model has nothing of the kind.
        """
        self.bridge = model if isinstance(model, TransformerBridge) else TransformerBridge(model)
        self.sites = sites_of(self.bridge, target, layers)
        self.layers = [site.layer for site in self.sites]
        self.target = target if isinstance(target, str) else "sites"
        self._runner = Runner(self.bridge, self.layers[0])
        if isinstance(ablation, CHGDataset):
            ablation = self.mean_values(ablation)
        self.means = self._checked(ablation) if ablation is not None else None

    def __repr__(self) -> str:
        model = type(self.bridge.original_model).__name__
        left = "zero" if self.means is None else "mean"
        return f"CHG({model}, {self.num_layers} layers x {self.num_heads} {self.target}, {left} ablation)"

    @property
    def num_layers(self) -> int:
        """How many layers have gates."""
        return len(self.sites)

    @property
    def num_heads(self) -> int:
        """How many gates a layer has."""
        return self.sites[0].size

    @property
    def mask_shape(self) -> tuple[int, int]:
        """(layers, heads)."""
        return self.num_layers, self.num_heads

    @property
    def device(self) -> torch.device:
        """Where gates are made: where the model takes its input."""
        return self.bridge.device or torch.device("cpu")

    # --- masks -----------------------------------------------------------------------------------

    def create_masks(
        self,
        num_masks: int | None = None,
        mask_init_range: tuple[float, float] = (0.05, 0.95),
        as_parameter: bool = True,
        as_logits: bool = True,
        seed: int = 0,
    ) -> Tensor:
        """Draw gates uniformly, in float32.

        Each mask has a generator of its own: mask k of many is mask k of more.

        Args:
            num_masks: How many; None for one without a mask axis.
            mask_init_range: Between which gates.
            as_parameter: Whether to return a parameter.
            as_logits: Logits of the gates, to be trained; otherwise the gates.
            seed: Of the draw.
        Returns:
            [mask, layer, head], or [layer, head] where ``num_masks`` is None.
        Raises:
            InputError: No masks, or a range outside [0, 1].
        """
        low, high = mask_init_range
        if not 0 <= low <= high <= 1:
            raise InputError(f"mask_init_range must lie in [0, 1], got {mask_init_range}")
        if num_masks is not None and num_masks < 1:
            raise InputError(f"num_masks must be at least 1, or None for one mask, got {num_masks}")
        drawn = []
        for index in range(num_masks or 1):
            # Seeds of masks lie far apart, so that seeds that are neighbours share none.
            generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
            drawn.append(torch.rand(self.mask_shape, generator=generator))
        gates = low + (high - low) * torch.stack(drawn)
        made = gates.clamp(EDGE, 1 - EDGE).logit() if as_logits else gates
        made = (made[0] if num_masks is None else made).to(self.device)
        return nn.Parameter(made) if as_parameter else made

    def gates(self, masks: Any) -> Float[Tensor, "mask layer head"]:
        """Masks as [mask, layer, head], where the model takes its input.

        Raises:
            InputError: Another shape, or no numbers.
        """
        given = masks if isinstance(masks, Tensor) else torch.as_tensor(masks)
        if given.dim() not in (2, 3) or tuple(given.shape[-2:]) != self.mask_shape:
            layers = (
                "" if self.layers == list(range(self.num_layers)) else f" (layers {self.layers})"
            )
            raise InputError(
                f"masks are {list(self.mask_shape)} for [layer, head]{layers}, or [mask, layer, head], got "
                f"{list(given.shape)}"
            )
        wide = given if given.dtype in (torch.float32, torch.float64) else given.float()
        return (wide if wide.dim() == 3 else wide[None]).to(self.device)

    # --- runs ------------------------------------------------------------------------------------

    @contextmanager
    def gated(self, masks: Any) -> Iterator[TransformerBridge]:
        """Gates in every run inside a ``with`` block; take a backward pass inside it too.

        Args:
            masks: Gates, [layer, head] for all rows, or [batch, layer, head], one a row.
        Yields:
            The bridge.
        Raises:
            InputError: Another shape; in a run, another number of rows.
        """
        gates = self.gates(masks)
        with self.bridge.hooks([(site.name, fn) for site, fn in self._functions(gates)]):
            yield self.bridge

    def _functions(
        self, gates: Float[Tensor, "row layer head"]
    ) -> Iterator[tuple[GateSite, Callable[[Tensor, HookPoint], Tensor]]]:
        for index, site in enumerate(self.sites):
            mean = None if self.means is None else self.means[site.name]
            yield site, partial(_close, site, gates[:, index], mean)

    def __call__(
        self,
        input_ids: Int[Tensor, "batch pos"],
        masks: Any = None,
        attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "batch *mask pos d_vocab"]:
        """Run rows under masks.

        Args:
            input_ids: Token ids.
            masks: None for the whole model, one mask [layer, head], or several [mask, layer, head],
                under each of which every row runs.
            attention_mask: 1 at real tokens.
        Returns:
            Logits, [batch, pos, d_vocab]; with several masks [batch, mask, pos, d_vocab].
        Raises:
            InputError: Masks of another shape.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        run = self._runner.kwargs(given)
        if masks is None:
            return self._runner.whole(run)
        gates = self.gates(masks)
        count = len(gates)
        with self.gated(gates.repeat(len(input_ids), 1, 1)):
            logits = self._runner.whole(self._runner.repeated(run, count))
        several = isinstance(masks, Tensor) and masks.dim() == 3
        return logits.unflatten(0, (-1, count)) if several else logits

    forward = __call__

    def answers(self, batch: CHGBatch, masks: Any = None, *, full: Tensor | None = None) -> Answers:
        """What the model says where it is asked, under each of several masks.

        Only positions that count go through the unembedding, and layers in front of the first gated one run
        once a row, whatever the number of masks.

        Args:
            batch: Rows, and where their loss is.
            masks: Gates, [layer, head] or [mask, layer, head]; None for the whole model.
            full: Logits of the whole model at the same places, [n, d_vocab], for objectives that compare.
        Returns:
            Row ``b * n_masks + m`` is row ``b`` under mask ``m``.
        """
        if masks is None:
            return self._runner.answers(batch, 1, lambda times: ExitStack(), full)
        gates = self.gates(masks)

        def gating(times: int) -> AbstractContextManager[Any]:
            return self.gated(gates.repeat(times, 1, 1))

        return self._runner.answers(batch, len(gates), gating, full)

    def get_logp(
        self,
        masks: Any,
        input_ids: Int[Tensor, "batch pos"],
        loss_masks: Tensor,
        agg: str = "sum",
        return_accuracy: bool = False,
        attention_mask: Tensor | None = None,
    ) -> Any:
        """Log-probabilities of the tokens that count.

        Args:
            masks: None, [layer, head] or [mask, layer, head].
            input_ids: Token ids.
            loss_masks: True at the tokens that are to be predicted, [batch, pos].
            agg: ``"sum"`` or ``"mean"`` over a row's tokens; ``"none"`` for [..., pos], 0 where nothing
                counts.
            return_accuracy: Whether to return the share of tokens that were likeliest as well.
            attention_mask: 1 at real tokens.
        Returns:
            In nats, [batch], or [batch, mask] with several masks; with ``return_accuracy``, a pair.
        Raises:
            InputError: Another ``agg``, or masks that do not fit.
        """
        if agg not in AGGREGATES:
            raise InputError(f"agg must be one of {AGGREGATES}, got {agg!r}")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        batch = CHGBatch(
            input_ids=input_ids, attention_mask=mask, loss_mask=loss_masks.bool(), targets=input_ids
        )
        answers = self.answers(batch, masks)
        several = isinstance(masks, Tensor) and masks.dim() == 3
        count = answers.n_rows // len(input_ids)
        shape = (len(input_ids), count) if several else (len(input_ids),)
        if agg == "none":
            values = answers.logits.new_zeros(answers.n_rows, input_ids.shape[1])
            found = values.index_put((answers.rows, answers.positions), answers.log_probs())
            found = found.view(*shape, -1)
        else:
            found = answers.per_row(answers.log_probs(), agg).view(shape)
        if not return_accuracy:
            return found
        return found, answers.per_row(answers.is_right().to(found.dtype), "mean").view(shape)

    # --- means -----------------------------------------------------------------------------------

    @torch.no_grad()
    def mean_values(self, dataset: CHGDataset, batch_size: int = 32) -> dict[str, Tensor]:
        """The mean value of each site over a dataset's real tokens, by point.

        Args:
            dataset: Rows.
            batch_size: How many to run at once.
        """
        sums: dict[str, Tensor] = {}
        count = 0
        for start in range(0, len(dataset), batch_size):
            batch = dataset.batch(range(start, min(start + batch_size, len(dataset)))).to(
                self.device
            )
            real = batch.attention_mask.bool()
            count += int(real.sum())

            def add(value: Tensor, hook: HookPoint, real: Tensor = real) -> None:
                name = str(hook.name)
                total = value[real.to(value.device)].to(torch.float64).sum(0)
                sums[name] = sums[name] + total if name in sums else total

            run = self._runner.kwargs(
                {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            )
            with self.bridge.hooks([(site.name, add) for site in self.sites]):
                self._runner.whole(run)
        names = {site.name: self.bridge.registry.canonical(site.name) for site in self.sites}
        return {name: (sums[full] / count).float() for name, full in names.items()}

    def _checked(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        missing = [site.name for site in self.sites if site.name not in means]
        if missing:
            raise InputError(
                f"ablation= gives means for {', '.join(means) or 'nothing'}; it lacks {', '.join(missing)}"
            )
        return {site.name: means[site.name] for site in self.sites}

    # --- state -----------------------------------------------------------------------------------

    @contextmanager
    def still(self) -> Iterator[None]:
        """The model in evaluation mode and its parameters out of graphs; put back afterwards."""
        model = self.bridge.original_model
        training = [module for module in model.modules() if module.training]
        try:
            for module in training:
                module.training = False
            with frozen(model):
                yield
        finally:
            for module in training:
                module.training = True


def _close(
    site: GateSite,
    gates: Float[Tensor, "sets gate"],
    mean: Tensor | None,
    value: Tensor,
    hook: HookPoint,
) -> Tensor:
    """Gates multiply in float32 and wider: in bfloat16 0.999 would be 1."""
    spread = site.spread(gates.to(value.device), value)
    if value.dtype not in (torch.float32, torch.float64):
        wide = value.float()
    else:
        wide, spread = value, spread.to(value.dtype)
    if mean is None:
        return (wide * spread).to(value.dtype)
    left = mean.to(wide.device, wide.dtype)
    return (left + (wide - left) * spread).to(value.dtype)
