"""The logit lens: what a model would say if it ended earlier, or what each of its parts says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..bridge import Inputs, TransformerBridge, module_of
from ..hooks import HookPoint, InputError
from .dla import parts_at_head
from .measured import prepared, token_ids
from .scoring import last_real
from .sites import layer_index, place_of
from .tracing import read_off

if TYPE_CHECKING:
    from .figures import Plot


@dataclass(frozen=True)
class LogitLens:
    """Predictions read off inside a model.

    Attributes:
        labels: Where each was read: hook points, in the order of the model; or its parts.
        top_tokens: The likeliest tokens, the likeliest first, [depth, batch, pos, k].
        top_log_probs: Their log-probabilities, in nats.
        words: The tokens that were read at these positions, as text (ids without a tokenizer), by row.
        mask: False at padding, [batch, pos].
        vocabulary: The likeliest tokens as text, by id.
        target: The token that was asked about at each position, [batch, pos].
        target_log_probs: Its log-probability, [depth, batch, pos].
        target_ranks: How many tokens are likelier, [depth, batch, pos]; 0 where it is the prediction.
    """

    labels: tuple[str, ...]
    top_tokens: Int[Tensor, "depth batch pos k"]
    top_log_probs: Float[Tensor, "depth batch pos k"]
    words: tuple[tuple[str, ...], ...]
    mask: Bool[Tensor, "batch pos"]
    vocabulary: dict[int, str]
    target: Int[Tensor, "batch pos"] | None = None
    target_log_probs: Float[Tensor, "depth batch pos"] | None = None
    target_ranks: Int[Tensor, "depth batch pos"] | None = None

    def top_words(self, depth: int | str, row: int = 0) -> list[list[str]]:
        """The likeliest tokens as text, by position.

        Args:
            depth: Which label, or its number.
            row: Which text.
        Raises:
            InputError: Nothing was read there.
        """
        if isinstance(depth, str):
            if depth not in self.labels:
                raise InputError(
                    f"nothing was read at {depth!r}; there are {', '.join(self.labels)}"
                )
            depth = self.labels.index(depth)
        return [
            [self.vocabulary[token] for token in tokens]
            for tokens in self.top_tokens[depth, row].tolist()
        ]

    def plot(self, row: int = 0) -> Plot:
        """A heat map; see `lensbridge.methods.figures.lens_plot`."""
        from .figures import lens_plot

        return lens_plot(self, row=row)

    def __repr__(self) -> str:
        rows, length = self.mask.shape
        last = int(self.mask[0].nonzero()[-1])
        width = max(map(len, self.labels))
        lines = [
            f"  {label:{width}}  "
            + ", ".join(
                f"{word!r} {float(p):.2f}"
                for word, p in zip(
                    self.top_words(depth)[last][:3],
                    self.top_log_probs[depth, 0, last].exp(),
                    strict=False,
                )
            )
            for depth, label in enumerate(self.labels)
        ]
        after = self.words[0][last]
        head = f"LogitLens({rows} x {length} positions; of the first row, after {after!r}:"
        return "\n".join([head, *lines]) + ")"


def logit_lens(
    bridge: TransformerBridge,
    input: Any,
    *,
    target: Any = None,
    layers: Iterable[int] | int | None = None,
    components: bool | str = False,
    positions: Any = None,
    top_k: int = 5,
    **run_kwargs: Any,
) -> LogitLens:
    """What the model's own end makes of its residual stream at every depth, or of every part of it.

    Without ``components`` a depth is the stream as a layer leaves it, and goes through the model's own final
    norm, head, scale and soft cap: the last layer's prediction is the model's.

    With ``components`` the stream at the end is taken apart, as `direct_logit_attribution` does: what the
    embeddings and each attention, MLP and bias added goes through the final norm with its scale held at
    what it was for the whole, and through the head without its bias and before a soft cap. These logits sum
    to the model's, less the head's bias. The probabilities are those of a part's logits alone: what it
    speaks for.

    Args:
        bridge: The model.
        input: As in `TransformerBridge.forward`, or a mapping of its keywords.
        target: A token to follow: an id, a string that is one token, a list of one a row, or ids [batch,
            pos].
        layers: The output of these only, negative from the end; None for all and for what enters the first.
        components: True for attentions and MLPs, ``"heads"`` for each head by itself as well.
        positions: Which, for all rows; negative counts from each row's last real token, which is -1. None:
            all.
        top_k: How many likeliest tokens to keep.
        **run_kwargs: Further keywords of the model's forward.
    Raises:
        InputError: A model without a head, or whose logits are not one row a position; or layers together
            with components; or tokens and positions that are not there.
        ArchitectureError: With ``components``, a model whose stream is no sum of parts. Says where and why.
        LayerRangeError: A layer this model does not have.
    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    if components not in (False, True, "heads"):
        raise InputError(f"components is True, False or 'heads', got {components!r}")
    if components and layers is not None:
        raise InputError("components are those of all layers: leave layers out")
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
        raise InputError(f"top_k counts tokens and is 1 or more, got {top_k!r}")
    with torch.inference_mode(False), torch.no_grad():
        inputs = prepared(bridge, input, run_kwargs)
        read = (
            _parts(bridge, inputs, components == "heads")
            if components
            else _depths(bridge, inputs, layers)
        )
        labels, tops, follows = [], [], []
        at: Tensor | None = None
        ids: Tensor | None = None
        for label, logits in read:
            if logits.dim() != 3:
                raise InputError(
                    f"the logits of {type(bridge.original_model).__name__} are {list(logits.shape)}: a lens "
                    "reads a prediction at each position, [batch, pos, d_vocab]"
                )
            if at is None:
                at = _columns(positions, inputs.mask, *logits.shape[:2]).to(logits.device)
                if target is not None:
                    ids = _targets(bridge, target, at, logits.shape).to(logits.device)
            chosen = logits.gather(1, at[..., None].expand(-1, -1, logits.shape[-1]))
            log_probs = chosen.float().log_softmax(-1)
            labels.append(label)
            tops.append(log_probs.topk(min(top_k, log_probs.shape[-1])))
            if ids is not None:
                own = log_probs.gather(-1, ids[..., None])
                follows.append((own[..., 0], (log_probs > own).sum(-1)))
    if at is None:
        raise InputError("layers is empty: name some, or leave it out for all")
    top_tokens = torch.stack([top.indices for top in tops]).cpu()
    mask = torch.ones_like(at, dtype=torch.bool) if inputs.mask is None else _real(inputs.mask, at)
    return LogitLens(
        labels=tuple(labels),
        top_tokens=top_tokens,
        top_log_probs=torch.stack([top.values for top in tops]).cpu(),
        words=_words(bridge, inputs, at),
        mask=mask.cpu(),
        vocabulary={int(i): _text(bridge, int(i)) for i in top_tokens.unique()},
        target=None if ids is None else ids.cpu(),
        target_log_probs=None if ids is None else torch.stack([own for own, _ in follows]).cpu(),
        target_ranks=None if ids is None else torch.stack([rank for _, rank in follows]).cpu(),
    )


def _depths(
    bridge: TransformerBridge, inputs: Inputs, layers: Iterable[int] | int | None
) -> Iterator[tuple[str, Tensor]]:
    """Logits read off the stream, layer by layer; one set of them exists at a time."""
    if layers is None:
        outputs = list(range(len(bridge.architecture.blocks)))
        places = [place_of("block_input", 0, bridge)]
    else:
        outputs = [
            layer_index(x, bridge) for x in ([layers] if isinstance(layers, int) else layers)
        ]
        places = []
    places += [place_of("block_output", layer, bridge) for layer in outputs]
    held: dict[str, Tensor] = {}

    def keep(stream: Tensor, hook: HookPoint) -> None:
        held[str(hook.name)] = stream.clone()

    with bridge.registry.hooks() as scope:
        scope.observe([place.point for place in places], keep, must_fire=True)
        bridge(**inputs.kwargs)  # without a head there are no logits, which it says
    for place in places:
        name = str(place.point.name)
        yield name, read_off(bridge, held.pop(name), inputs)


def _parts(
    bridge: TransformerBridge, inputs: Inputs, per_head: bool
) -> Iterator[tuple[str, Tensor]]:
    """The logits that each part adds; one set of them exists at a time."""
    labels, parts = parts_at_head(bridge, inputs, per_head=per_head)
    head = module_of(bridge.registry["unembed.hook_in"])
    scale = bridge.architecture.logit_scale or 1.0
    like = next(iter(bridge.original_model.parameters()))
    dtype = like.dtype if like.is_floating_point() else parts[0].dtype
    with bridge.registry.silenced():
        for label, part in zip(labels, parts, strict=True):
            narrow = part.to(dtype)
            yield label, (head(narrow) - head(torch.zeros_like(narrow[:1, :1]))) * scale


def _columns(
    positions: Any, mask: Tensor | None, rows: int, length: int
) -> Int[Tensor, "batch pos"]:
    """Which position of each row is in which column."""
    if positions is None:
        return torch.arange(length).expand(rows, length)
    items = [positions] if isinstance(positions, int) else list(positions)
    if not items or any(not isinstance(x, int) or isinstance(x, bool) for x in items):
        raise InputError(f"positions are whole numbers, got {positions!r}")
    own = None if mask is None else mask[:, -length:]
    ends = last_real(own, rows, length).cpu() + 1
    made = torch.stack([torch.full_like(ends, x) if x >= 0 else ends + x for x in items], -1)
    if bool(((made < 0) | (made >= length)).any()):
        raise InputError(f"positions {items}: rows have {ends.tolist()} of {length}, from 0")
    return made


def _real(mask: Tensor, at: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    # A mask may cover a past as well, which has no logits.
    length = int(at.max()) + 1
    own = mask if mask.shape[1] <= length else mask[:, -length:]
    return own.to(at.device).gather(1, at) != 0


def _targets(
    bridge: TransformerBridge, target: Any, at: Tensor, shape: torch.Size
) -> Int[Tensor, "batch pos"]:
    """The target at each chosen position."""
    rows, length, d_vocab = shape
    if isinstance(target, Tensor) and target.dim() == 2:
        if target.shape != (rows, length):
            raise InputError(
                f"targets by position are [{rows}, {length}], got {list(target.shape)}"
            )
        return target.to(at.device).gather(1, at).long()
    given = [target] if isinstance(target, str) else target
    if isinstance(given, (list, tuple)):
        given = [bridge.to_single_token(x) if isinstance(x, str) else x for x in given]
        given = given[0] if isinstance(target, str) else given
    return token_ids(given, rows, d_vocab, what="target")[:, None].expand(at.shape)


def _words(bridge: TransformerBridge, inputs: Inputs, at: Tensor) -> tuple[tuple[str, ...], ...]:
    tokens = inputs.tokens
    if tokens is None or tokens.shape[1] <= int(at.max()):
        return tuple(tuple(str(i) for i in row) for row in at.tolist())
    chosen = tokens.to(at.device).gather(1, at)
    return tuple(tuple(_text(bridge, token) for token in row) for row in chosen.tolist())


def _text(bridge: TransformerBridge, token: int) -> str:
    return str(token) if bridge.tokenizer is None else bridge.to_single_str_token(token)
