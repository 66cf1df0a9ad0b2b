"""Train the demo model that ships in ``lensbridge/demo/model``.

Everything is generated here: the text, the tokenizer and the weights. Nothing is downloaded.
The text and the train/held-out split come from :mod:`lensbridge.demo.tasks`.

Usage:
    python demos/train_demo_model.py --out lensbridge/demo/model

The same ``--seed`` and ``--threads`` on the same machine give the same checkpoint; other
machines give the same text and tokenizer, and weights that differ by rounding and what grows
out of it over the run. Needs torch 2.9 or later, for its Muon optimizer.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from lensbridge.demo import tasks

BOS, PAD = "<|endoftext|>", "<|pad|>"
N_POSITIONS = 256
ROW_LENGTHS = (32, 64, 128, 256)
ROW_SHARES = (0.25, 0.25, 0.3, 0.2)
SHORT_ROWS_UNTIL = 0.25  # the share of the training with rows of the first length only
MAX_REPEAT = 128  # the longest document of repeated tokens, roughly
IGNORED = -100  # the label that cross_entropy leaves out
# GPT-2's 0.02 suits its width of 768. Here it would be swamped by the first steps of Adam: all
# names, and all countries, would become one embedding, and it takes long to pull them apart.
INITIAL_SPREAD = 0.08
INDUCTION_PERIODS = (10, 20, 50)


@dataclass(frozen=True)
class Settings:
    """The settings of one training run."""

    seed: int = 0
    steps: int = 2000
    tokens: int = 4096
    learning_rate: float = 2e-3
    matrix_learning_rate: float = 0.02
    weight_decay: float = 0.1
    warmup: int = 100
    n_layer: int = 4
    n_embd: int = 128
    n_head: int = 4
    threads: int = 2


# ---------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, GPT-2 style, on generated text.

    Args:
        seed: Seed of the text.

    Returns:
        The tokenizer. It adds no BOS by itself, as GPT-2's does not.

    Raises:
        RuntimeError: If a word that must be a single token is not.
    """
    text = list(itertools.islice(tasks.documents(seed), 20_000))
    # In the text most words follow a space. The bare words make "Paris" a token as well as
    # " Paris", so that a word at the start of a prompt is one position too.
    text += [word.strip() for word in tasks.single_token_words()] * 50
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,  # a bound: training runs out of pairs to merge before it
        min_frequency=2,
        special_tokens=[BOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    words = tasks.single_token_words()
    split = [w for w in words + [w.strip() for w in words] if len(tokenizer.encode(w).ids) != 1]
    if split:
        raise RuntimeError(f"These words are not single tokens: {split}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        unk_token=BOS,
        pad_token=PAD,
        model_max_length=N_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


# ---------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------


def text_documents(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[list[int]]:
    """Yield tokenized documents of text for ever."""
    text = tasks.documents(seed)
    while True:
        # In batches, as calling the tokenizer once per document is slow.
        yield from tokenizer(list(itertools.islice(text, 512)))["input_ids"]


def repeat_documents(
    tokenizer: PreTrainedTokenizerFast, seed: int, max_length: int
) -> Iterator[tuple[list[int], int]]:
    """Yield documents of repeated random tokens for ever (see :func:`tasks.repeated_tokens`)."""
    special = set(tokenizer.all_special_ids)
    everything = [i for i in range(len(tokenizer)) if i not in special]
    words = [tokenizer.convert_tokens_to_ids("Ġ" + w.strip()) for w in tasks.single_token_words()]
    names = {
        tokenizer.convert_tokens_to_ids(prefix + name): name
        for name in tasks.NAMES
        for prefix in ("", "Ġ")
    }
    return tasks.repeated_tokens(seed, [everything, words], names, max_length)


class Batches:
    """Packs documents into rows of tokens and labels.

    Every document follows a BOS token. Three things vary so that the model does not depend on
    them: half of the rows lack the leading BOS, half of them start at a random position
    instead of 0, and rows come in several lengths.

    The first batches have short rows only: attention starts out nearly uniform, so the fewer
    tokens it is spread over, the sooner the one that matters stands out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, settings: Settings) -> None:
        self._rng = random.Random(f"batches-{settings.seed}")
        self._tokens = settings.tokens
        self._bos = tokenizer.bos_token_id
        self._text = text_documents(tokenizer, settings.seed)
        self._repeats = {
            length: repeat_documents(tokenizer, settings.seed, min(length, MAX_REPEAT) - 4)
            for length in ROW_LENGTHS
        }

    def _document(self, length: int, repeat_share: float) -> tuple[list[int], int]:
        """Return a document and how many of its first tokens are pure noise."""
        if self._rng.random() < repeat_share:
            document, noise = next(self._repeats[length])
            # The first token of the second copy cannot be predicted either.
            return document, noise + 1
        return next(self._text), 0

    def _row(self, length: int) -> tuple[list[int], list[int]]:
        """Return one row of tokens and the same row as labels."""
        tokens: list[int] = []
        labels: list[int] = []
        keep_bos = self._rng.random() < 0.5
        while len(tokens) < length:
            document, noise = self._document(length, 0.03 if tokens else 0.4)
            if tokens or keep_bos:
                tokens.append(self._bos)
                labels.append(self._bos)
            tokens += document
            labels += [IGNORED] * noise + document[noise:]
        return tokens[:length], labels[:length]

    def next(self, progress: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return one batch.

        Args:
            progress: The share of the training that is done.

        Returns:
            Tokens, labels and position ids, each of shape ``[row, position]``.
        """
        is_early = progress < SHORT_ROWS_UNTIL
        length = ROW_LENGTHS[0] if is_early else self._rng.choices(ROW_LENGTHS, ROW_SHARES)[0]
        rows = [self._row(length) for _ in range(self._tokens // length)]
        starts = [self._rng.choice((0, self._rng.randint(0, N_POSITIONS - length))) for _ in rows]
        positions = torch.tensor(starts)[:, None] + torch.arange(length)
        return torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows]), positions


# ---------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------


def sinusoids(n_positions: int, width: int) -> Tensor:
    """Return sinusoidal position embeddings, of shape ``[position, width]``."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(1000.0) / width))
    angles = torch.arange(n_positions)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def new_model(tokenizer: PreTrainedTokenizerFast, settings: Settings) -> GPT2LMHeadModel:
    """Return a GPT-2 with random weights."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=N_POSITIONS,
        n_embd=settings.n_embd,
        n_layer=settings.n_layer,
        n_head=settings.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        initializer_range=INITIAL_SPREAD,
        attn_pdrop=0.0,
        # The same function as GPT-2's "gelu_new", but one fused kernel: half the time a step.
        activation_function="gelu_pytorch_tanh",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        positions = sinusoids(N_POSITIONS, settings.n_embd)
        model.transformer.wpe.weight.copy_(positions * INITIAL_SPREAD / positions.std())
    return model


def new_optimizers(
    model: GPT2LMHeadModel, settings: Settings
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks, and AdamW for all the rest."""
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    chosen = set(map(id, matrices))
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return (
        torch.optim.Muon(
            matrices, lr=settings.matrix_learning_rate, weight_decay=settings.weight_decay
        ),
        torch.optim.AdamW(
            rest, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        ),
    )


def learning_rate_factor(step: int, settings: Settings) -> float:
    """Return the learning rate of a step, as a share of the peak: warm-up, then a cosine."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def train(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, settings: Settings, every: int
) -> None:
    """Train ``model`` in place.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        settings: The settings of the run.
        every: Print the held-out accuracies every so many steps; 0 for never.
    """
    batches = Batches(tokenizer, settings)
    optimizers = new_optimizers(model, settings)
    schedule = functools.partial(learning_rate_factor, settings=settings)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, schedule) for o in optimizers]
    average = 0.0
    progress = tqdm(range(settings.steps), desc="training", mininterval=5.0)
    for step in progress:
        model.train()
        tokens, labels, positions = batches.next(step / settings.steps)
        logits = model(tokens, position_ids=positions).logits
        loss = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
        progress.set_postfix(loss=f"{average:.3f}", refresh=False)
        if every and (step + 1) % every == 0:
            accuracies = " ".join(f"{k} {v:.3f}" for k, v in quick_look(model, tokenizer).items())
            progress.write(f"step {step + 1}: loss {average:.3f} {accuracies}")
    model.eval()


# ---------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------


@torch.no_grad()
def last_logits(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    bos: bool,
) -> Tensor:
    """Return the logits after each prompt, of shape ``[prompt, vocabulary]``.

    Prompts are padded on the right: under causal attention the padding cannot be seen.
    """
    rows = [([tokenizer.bos_token_id] if bos else []) + tokenizer(p)["input_ids"] for p in prompts]
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    last = torch.tensor([len(row) - 1 for row in rows])
    return model(ids).logits[torch.arange(len(rows)), last]


def answer_ids(tokenizer: PreTrainedTokenizerFast, words: Sequence[str | None]) -> Tensor:
    """Return the token ids of single-token words."""
    return torch.tensor([tokenizer(word)["input_ids"][0] for word in words])


def accuracy(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    items: Sequence[tasks.Item],
    bos: bool,
) -> float:
    """Return how often the most likely next token, out of all, is the answer."""
    logits = last_logits(model, tokenizer, [item.prompt for item in items], bos)
    answers = answer_ids(tokenizer, [item.answer for item in items])
    return (logits.argmax(-1) == answers).float().mean().item()


def induction_tokens(tokenizer: PreTrainedTokenizerFast, period: int) -> Tensor:
    """Return held-out repeated sequences, each after a BOS token."""
    special = set(tokenizer.all_special_ids)
    pool = [i for i in range(len(tokenizer)) if i not in special]
    items = tasks.induction(pool, n=64, period=period, seed=0)
    return torch.tensor([[tokenizer.bos_token_id, *item.tokens] for item in items])


@torch.no_grad()
def induction_accuracy(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, period: int
) -> float:
    """Return the accuracy on the second copy, from its second token on."""
    tokens = induction_tokens(tokenizer, period)
    guesses = model(tokens).logits[:, period + 1 : -1].argmax(-1)
    return (guesses == tokens[:, period + 2 :]).float().mean().item()


@torch.no_grad()
def induction_scores(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, period: int
) -> Tensor:
    """Return each head's induction score, of shape ``[layer, head]``.

    It is the mean attention from a token of the second copy to the token after its first
    occurrence. The model must use eager attention.
    """
    tokens = induction_tokens(tokenizer, period)
    attentions = model(tokens, output_attentions=True).attentions
    queries = torch.arange(period + 1, 2 * period + 1)
    return torch.stack([a[:, :, queries, queries - period + 1].mean((0, 2)) for a in attentions])


def zero_head(head: int, head_size: int) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
    """Return a pre-hook for ``attn.c_proj`` that zeroes the output of one head."""

    def hook(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        outputs = args[0].clone()
        outputs[..., head * head_size : (head + 1) * head_size] = 0.0
        return (outputs,)

    return hook


def ioi_logit_difference(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, items: Sequence[tasks.Item]
) -> float:
    """Return the mean logit of the right name minus that of the repeated name."""
    logits = last_logits(model, tokenizer, [item.prompt for item in items], bos=False)
    rows = torch.arange(len(items))
    right = logits[rows, answer_ids(tokenizer, [item.answer for item in items])]
    wrong = logits[rows, answer_ids(tokenizer, [item.distractor for item in items])]
    return (right - wrong).mean().item()


def ioi_ablations(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, items: Sequence[tasks.Item]
) -> list[dict[str, Any]]:
    """Return how zeroing each head changes the IOI logit difference, largest change first."""
    clean = ioi_logit_difference(model, tokenizer, items)
    head_size = model.config.n_embd // model.config.n_head
    rows = []
    for layer, head in itertools.product(range(model.config.n_layer), range(model.config.n_head)):
        c_proj = model.transformer.h[layer].attn.c_proj
        handle = c_proj.register_forward_pre_hook(zero_head(head, head_size))
        try:
            change = ioi_logit_difference(model, tokenizer, items) - clean
        finally:
            handle.remove()
        rows.append({"layer": layer, "head": head, "change": change})
    return sorted(rows, key=lambda row: -abs(row["change"]))


def quick_look(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Return the held-out accuracies, to print during training."""
    model.eval()
    capitals = tasks.capitals()
    sets = {
        "capitals": [item for item in capitals if item.kind == "capital"],
        "countries": [item for item in capitals if item.kind == "country"],
        "ioi": tasks.ioi(100),
        "sums": tasks.arithmetic(),
        "seen sums": tasks.arithmetic(held_out=False),
    }
    result = {name: accuracy(model, tokenizer, items, False) for name, items in sets.items()}
    return result | {f"ind{p}": induction_accuracy(model, tokenizer, p) for p in (10, 50)}


def evaluate(directory: Path) -> dict[str, Any]:
    """Measure a saved checkpoint on the held-out items.

    Args:
        directory: The checkpoint, loaded as a user would load it.

    Returns:
        The numbers that go to ``eval.json``.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    measure = functools.partial(accuracy, model, tokenizer)
    sets = {
        "capitals": tasks.capitals(),
        "ioi": tasks.ioi(),
        "arithmetic": tasks.arithmetic(),
        "arithmetic_mirrored": [i for i in tasks.arithmetic() if i.kind == "mirrored"],
        "arithmetic_new": [i for i in tasks.arithmetic() if i.kind == "new"],
        "arithmetic_seen": tasks.arithmetic(held_out=False),
    }
    ioi = sets["ioi"]
    scores = induction_scores(model, tokenizer, 20)
    heads = [
        {"layer": layer, "head": head, "score": scores[layer, head].item()}
        for layer, head in itertools.product(*map(range, scores.shape))
    ]
    france = last_logits(model, tokenizer, ["The capital of France is"], bos=False).softmax(-1)
    paris = answer_ids(tokenizer, [" Paris"]).item()
    return {
        "accuracy": {
            **{task: measure(items, bos=False) for task, items in sets.items()},
            **{
                f"induction_{p}": induction_accuracy(model, tokenizer, p) for p in INDUCTION_PERIODS
            },
        },
        "accuracy_with_bos": {task: measure(items, bos=True) for task, items in sets.items()},
        "items": {task: len(items) for task, items in sets.items()},
        "paris_probability": france[0, int(paris)].item(),
        "ioi_logit_difference": ioi_logit_difference(model, tokenizer, ioi),
        "ioi_head_ablations": ioi_ablations(model, tokenizer, ioi)[:5],
        "induction_heads": sorted(heads, key=lambda row: -row["score"])[:5],
    }


# ---------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
language: en
---

# lensbridge demo model

A GPT-2 with {n_layer} layers, {n_head} heads, width {n_embd}, {n_parameters:,} parameters
(float32) and a vocabulary of {vocab_size:,} tokens, trained from random weights in
{minutes:.0f} minutes on {threads} CPU threads. It is there to run interpretability examples on
without a download. It knows nothing but the little generated world below: it is not a language
model for any other use.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from lensbridge import demo

model = AutoModelForCausalLM.from_pretrained(demo.path())
tokenizer = AutoTokenizer.from_pretrained(demo.path())
```

## What it was trained on

Text generated by `lensbridge/demo/tasks.py`, no other data:

| kind | example | held out |
| --- | --- | --- |
| capitals | `The capital of France is Paris.` | {n_countries} countries, each from 2 of the \
{n_frames} sentence frames |
| sums | `3 + 4 = 7.` | {n_sums} of the {n_all_sums} sums of 0 to {max_operand}: {n_new} in both \
orders, {n_mirrored} in one order only |
| indirect objects | `When Mary and John went to the shop, John gave a drink to Mary.` | \
{n_pairs} of the {n_all_pairs} pairs of the {n_names} names, in all {n_ioi_frames} frames |
| repeats | random tokens, repeated after 4 to about {max_period} tokens | all tests are new draws |
| filler | `The red dog went to the market.`, and runs of numbers | nothing |

In one of ten indirect-object sentences of the training text a third person gives, and either
name follows. No loss was taken on random tokens that nothing predicts.

The tokenizer is a byte-level BPE, so it encodes any text, but only words of this world are
single tokens. `<|endoftext|>` is BOS and EOS, and precedes every document in training;
prompts work with and without it (the tokenizer does not add it). `<|pad|>` never occurs in
training. The context is {n_positions} tokens.

## Held-out results

The answer must be the most likely of all tokens. Prompts have no BOS unless noted; the
repeated sequences start with one.

| task | items | accuracy | with BOS |
| --- | ---: | ---: | ---: |
| capitals | {n_capital_items} | {capitals:.1%} | {capitals_bos:.1%} |
| indirect objects | {n_ioi_items} | {ioi:.1%} | {ioi_bos:.1%} |
| sums | {n_sums} | {arithmetic:.1%} | {arithmetic_bos:.1%} |
| ... with only `b + a` in training | {n_mirrored} | {arithmetic_mirrored:.1%} | \
{arithmetic_mirrored_bos:.1%} |
| ... with neither order in training | {n_new} | {arithmetic_new:.1%} | {arithmetic_new_bos:.1%} |
| induction, period 10 | 64 | | {induction_10:.1%} |
| induction, period 20 | 64 | | {induction_20:.1%} |
| induction, period 50 | 64 | | {induction_50:.1%} |

Induction is the accuracy on the second copy of a random sequence, from its second token on.
Of the {n_seen} sums that are in the training text, {arithmetic_seen:.1%} are right: the model
knows sums by heart, in either order, and has not learned to add. After
`The capital of France is`, ` Paris` has probability {paris:.3f}.

Induction heads, by the mean attention from a token of the second copy to the token after its
first occurrence (period 20; layer and head count from 0):

| head | score |
| --- | ---: |
{induction_rows}

The mean IOI logit difference (right name minus repeated name) is {difference:.2f}. Heads whose
output, set to zero, changes it most:

| head | change |
| --- | ---: |
{ioi_rows}

## Rebuilding it

```
python demos/train_demo_model.py --out lensbridge/demo/model --seed {seed} --steps {steps}
```

The numbers above are in `eval.json`, unrounded.
"""


def model_card(results: dict[str, Any], model: GPT2LMHeadModel) -> str:
    """Return the model card, filled in with the results."""
    config, training = model.config, results["training"]
    name_pairs = list(itertools.combinations(tasks.NAMES, 2))

    def table(rows: list[dict[str, Any]], value: str, spec: str) -> str:
        return "\n".join(f"| {r['layer']}.{r['head']} | {r[value]:{spec}} |" for r in rows)

    return CARD.format(
        **results["accuracy"],
        **{f"{task}_bos": value for task, value in results["accuracy_with_bos"].items()},
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        n_parameters=model.num_parameters(),
        n_positions=config.n_positions,
        vocab_size=config.vocab_size,
        minutes=training["minutes"],
        threads=training["threads"],
        seed=training["seed"],
        steps=training["steps"],
        n_countries=len(tasks.CAPITALS),
        n_frames=len(tasks.CAPITAL_FRAMES),
        n_names=len(tasks.NAMES),
        n_ioi_frames=len(tasks.IOI_FRAMES),
        n_pairs=sum(tasks.is_held_out_pair(*pair) for pair in name_pairs),
        n_all_pairs=len(name_pairs),
        n_sums=results["items"]["arithmetic"],
        n_all_sums=(tasks.MAX_OPERAND + 1) ** 2,
        max_operand=tasks.MAX_OPERAND,
        max_period=(MAX_REPEAT - 4) // 2,
        n_capital_items=results["items"]["capitals"],
        n_ioi_items=results["items"]["ioi"],
        n_new=results["items"]["arithmetic_new"],
        n_mirrored=results["items"]["arithmetic_mirrored"],
        n_seen=results["items"]["arithmetic_seen"],
        paris=results["paris_probability"],
        difference=results["ioi_logit_difference"],
        induction_rows=table(results["induction_heads"], "score", ".2f"),
        ioi_rows=table(results["ioi_head_ablations"], "change", "+.2f"),
    )


def set_tokenizer_class(directory: Path) -> None:
    """Name the tokenizer's class so that every transformers release can load it.

    Release 5 writes a class name that release 4 does not know; both know this one.
    """
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the checkpoint."""
    model.config.activation_function = "gelu_new"
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)  # written for its owner only
    tokenizer.save_pretrained(directory)
    set_tokenizer_class(directory)


def parse_arguments() -> argparse.Namespace:
    """Return the command-line arguments."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where to write the checkpoint")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--tokens", type=int, default=defaults.tokens, help="tokens per batch")
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--heads", type=int, default=defaults.n_head, help="heads per layer")
    parser.add_argument("--threads", type=int, default=defaults.threads, help="torch CPU threads")
    parser.add_argument("--look-every", type=int, default=250, help="print held-out accuracies")
    return parser.parse_args()


def main() -> None:
    """Train, save, reload, evaluate, and write the numbers and the model card."""
    arguments = parse_arguments()
    settings = Settings(
        seed=arguments.seed,
        steps=arguments.steps,
        tokens=arguments.tokens,
        learning_rate=arguments.learning_rate,
        n_head=arguments.heads,
        threads=arguments.threads,
    )
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    tokenizer = train_tokenizer(settings.seed)
    model = new_model(tokenizer, settings)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens")

    start = time.perf_counter()
    train(model, tokenizer, settings, arguments.look_every)
    minutes = (time.perf_counter() - start) / 60

    arguments.out.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, arguments.out)
    results = evaluate(arguments.out)
    results["training"] = {"minutes": round(minutes, 1), **asdict(settings)}
    (arguments.out / "eval.json").write_text(json.dumps(results, indent=2) + "\n")
    (arguments.out / "README.md").write_text(model_card(results, model))
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
