"""What ``lensbridge demo`` does: small experiments, each a function from a bridge to numbers.

They use the bridge's public face alone, so each is also an example to copy from.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..bridge import ActivationCache, TransformerBridge
from ..hooks import HookPoint, InputError
from . import path, tasks

MAX_TOKENS = 64
"""Longest prompt shown: more columns than this cannot be read on a page."""

CLEAN, CORRUPTED = "The capital of France is", "The capital of Italy is"
IOI = tasks.Item("When Mary and John went to the shop, John gave a drink to", " Mary", " John")


def strongest(scores: Tensor) -> tuple[int, int]:
    """Row and column of the value furthest from zero, [rows, columns]."""
    row, column = divmod(int(scores.abs().argmax()), scores.shape[1])
    return row, column


@dataclass(frozen=True)
class Reading:
    """One text inside the model.

    Attributes:
        title: What to call the text.
        text: The text itself.
        tokens: Its tokens as text, BOS first.
        pattern: Attention of every head, [layer, head, query, key].
        lens: Next-token probabilities read off the residual stream at every depth, from the
            embeddings to behind the last layer, [depth, pos, d_vocab].
    """

    title: str
    text: str
    tokens: list[str]
    pattern: Tensor
    lens: Tensor


@dataclass(frozen=True)
class Induction:
    """How much each head looks at what followed the same token before.

    Attributes:
        tokens: Random tokens, each row repeated once behind BOS, [batch, 1 + 2 * period].
        period: The length of one copy.
        score: Mean attention to the token after the earlier occurrence, [layer, head].
    """

    tokens: Tensor
    period: int
    score: Tensor

    @property
    def best(self) -> tuple[int, int]:
        """Layer and head of the highest score."""
        return strongest(self.score)


@dataclass(frozen=True)
class Ablation:
    """What each head is worth to an answer.

    Attributes:
        item: The question, its answer and the other candidate.
        baseline: Logit of the answer minus logit of the other, nothing changed.
        ablated: The same with one head's z set to zero, [layer, head].
    """

    item: tasks.Item
    baseline: float
    ablated: Tensor

    @property
    def change(self) -> Tensor:
        """Ablated minus baseline, [layer, head]."""
        return self.ablated - self.baseline

    @property
    def best(self) -> tuple[int, int]:
        """Layer and head whose loss changes most."""
        return strongest(self.change)


@dataclass(frozen=True)
class Patching:
    """Where the stream of a corrupted prompt lacks what the clean prompt's has.

    Attributes:
        tokens: The corrupted prompt's tokens, BOS first.
        clean_tokens: The clean prompt's.
        answer: The clean prompt's answer.
        clean: Probability of the answer after the clean prompt.
        corrupted: Probability of the answer after the corrupted prompt.
        patched: The same with the stream entering one layer, at one position, taken from the
            clean run, [layer, pos].
    """

    tokens: list[str]
    clean_tokens: list[str]
    answer: str
    clean: float
    corrupted: float
    patched: Tensor

    @property
    def best(self) -> tuple[int, int]:
        """Layer and position that recover the answer most."""
        return strongest(self.patched - self.corrupted)


def boot() -> TransformerBridge:
    """The embedded model behind a bridge."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it would flash by inside the demo's own
    try:
        return TransformerBridge.boot_transformers(str(path()))
    finally:
        if shown:
            logging.enable_progress_bar()


def check_prompt(bridge: TransformerBridge, prompt: str) -> None:
    """Refuse a prompt that cannot be shown.

    Raises:
        InputError: It is empty or longer than `MAX_TOKENS`.
    """
    if not prompt.strip():
        raise InputError("the prompt is empty")
    count = bridge.to_tokens(prompt, truncate=False).shape[1]
    if count > MAX_TOKENS:
        raise InputError(f"the prompt is {count} tokens long (BOS included), at most {MAX_TOKENS}")


def str_tokens(bridge: TransformerBridge, ids: Tensor) -> list[str]:
    """The tokens of one row of ids as text."""
    return [bridge.to_single_str_token(token) for token in ids.tolist()]


def generate(bridge: TransformerBridge, prompt: str, max_new_tokens: int = 24) -> str:
    """Greedy continuation, up to the end of the document; without the prompt."""
    width = bridge.to_tokens(prompt).shape[1]
    out = bridge.hf_generate(prompt, max_new_tokens=max_new_tokens, do_sample=False)
    added = out[0, width:]
    ends = (added == bridge.tokenizer.eos_token_id).nonzero()
    return str(bridge.to_string(added[: ends[0, 0]] if len(ends) else added))


@torch.no_grad()
def run(
    bridge: TransformerBridge, tokens: Tensor, names: str | None = None
) -> tuple[Tensor, ActivationCache]:
    """Logits and activations of one run.

    Args:
        bridge: The model.
        tokens: Ids, [batch, pos].
        names: A glob for the points to cache; None for all.
    """
    logits, cache = bridge.run_with_cache(tokens, names_filter=names)
    return logits, cache


@torch.no_grad()
def distance(bridge: TransformerBridge, tokens: Tensor, logits: Tensor) -> float:
    """Largest difference from the logits of the untouched Hugging Face model."""
    bare: Tensor = bridge.original_model(tokens).logits
    return float((logits - bare).abs().max())


@torch.no_grad()
def lens(bridge: TransformerBridge, cache: ActivationCache) -> Tensor:
    """Read the next token off the residual stream at every depth.

    The model's own final norm and unembedding do the reading: the stream of every depth enters
    the model behind its last layer, as one batch.

    Args:
        bridge: The model.
        cache: Of a run of one row.
    Returns:
        Probabilities, [n_layers + 1, pos, d_vocab]; the last row is what the model says.
    """
    depth = bridge.cfg.n_layers
    streams = [cache["resid_pre", 0], *(cache["resid_post", layer] for layer in range(depth))]
    logits: Tensor = bridge(torch.cat(streams), start_at_layer=depth)
    return logits.softmax(-1)


def read(
    bridge: TransformerBridge, title: str, tokens: Tensor, cache: ActivationCache | None = None
) -> Reading:
    """What one row of tokens looks like inside the model.

    Args:
        bridge: The model.
        title: What to call the text.
        tokens: Ids, [1, pos].
        cache: Of a run on them, if there was one.
    """
    if cache is None:
        _, cache = run(bridge, tokens)
    pattern = torch.cat([cache["pattern", layer] for layer in range(bridge.cfg.n_layers)])
    text = str(bridge.to_string(tokens[0, 1:]))
    return Reading(title, text, str_tokens(bridge, tokens[0]), pattern, lens(bridge, cache))


@torch.no_grad()
def induction(bridge: TransformerBridge, n: int = 16, period: int = 10) -> Induction:
    """Score every head on random words that repeat once.

    An induction head, at a token seen before, attends to what came after it then. In the second
    copy that is always ``period - 1`` positions back.
    """
    words = [bridge.to_single_token(word) for word in tasks.single_token_words()]
    rows = [item.tokens for item in tasks.induction(words, n=n, period=period)]
    tokens = torch.tensor([[bridge.tokenizer.bos_token_id, *row] for row in rows])
    _, cache = run(bridge, tokens, "blocks.*.attn.hook_pattern")
    pattern = torch.stack([cache["pattern", layer] for layer in range(bridge.cfg.n_layers)])
    # Entries (query, query - period + 1); the first two are still in the first copy.
    stripe = pattern.diagonal(1 - period, dim1=-2, dim2=-1)[..., 2:]
    return Induction(tokens, period, stripe.mean((1, 3)))


def zero_head(z: Tensor, hook: HookPoint, *, head: int) -> Tensor:
    """A hook that silences one head: z is [batch, pos, head, d_head]."""
    z = z.clone()
    z[:, :, head] = 0
    return z


@torch.no_grad()
def ablate(bridge: TransformerBridge, item: tasks.Item = IOI) -> Ablation:
    """Silence each head in turn and see what becomes of the answer's lead."""
    layers, heads = bridge.cfg.n_layers, bridge.cfg.n_heads or 0
    if item.distractor is None:
        raise InputError(
            f"an ablation needs a wrong answer to compare with; {item.prompt!r} has none"
        )
    answer, other = bridge.to_single_token(item.answer), bridge.to_single_token(item.distractor)
    tokens = bridge.to_tokens(item.prompt)

    def lead(logits: Tensor) -> float:
        return float(logits[0, -1, answer] - logits[0, -1, other])

    ablated = torch.zeros(layers, heads)
    for layer, head in itertools.product(range(layers), range(heads)):
        silence = (f"blocks.{layer}.attn.hook_z", partial(zero_head, head=head))
        ablated[layer, head] = lead(bridge.run_with_hooks(tokens, fwd_hooks=[silence]))
    return Ablation(item, lead(bridge(tokens)), ablated)


def put_stream(stream: Tensor, hook: HookPoint, *, clean: Tensor, pos: int) -> Tensor:
    """A hook that takes one position of the stream, [batch, pos, d_model], from another run."""
    stream = stream.clone()
    stream[:, pos] = clean[:, pos]
    return stream


@torch.no_grad()
def patch(
    bridge: TransformerBridge,
    clean: str = CLEAN,
    corrupted: str = CORRUPTED,
    answer: str = " Paris",
) -> Patching:
    """Carry one position of one layer's input from the clean run into the corrupted run.

    Args:
        bridge: The model.
        clean: A prompt.
        corrupted: Another one of equally many tokens.
        answer: The clean prompt's answer, one token.
    """
    wanted = bridge.to_single_token(answer)
    clean_ids, ids = bridge.to_tokens(clean), bridge.to_tokens(corrupted)
    streams = [f"blocks.{layer}.hook_resid_pre" for layer in range(bridge.cfg.n_layers)]

    def probability(logits: Tensor) -> float:
        return float(logits[0, -1].softmax(-1)[wanted])

    logits, cache = run(bridge, clean_ids, "blocks.*.hook_resid_pre")
    patched = torch.zeros(len(streams), ids.shape[1])
    for layer, pos in itertools.product(range(len(streams)), range(ids.shape[1])):
        name = streams[layer]
        hook = (name, partial(put_stream, clean=cache[name], pos=pos))
        patched[layer, pos] = probability(bridge.run_with_hooks(ids, fwd_hooks=[hook]))
    return Patching(
        tokens=str_tokens(bridge, ids[0]),
        clean_tokens=str_tokens(bridge, clean_ids[0]),
        answer=answer,
        clean=probability(logits),
        corrupted=probability(bridge(ids)),
        patched=patched,
    )
