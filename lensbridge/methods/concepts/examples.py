"""What makes concepts fire: the inputs on which each is most active, and where they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...hooks import InputError
from ..granularity import Aggregation, Granularity
from ..samples import Sample
from ..split_points import ModelWithSplitPoints

ALL = "all"
TEXTS_AT_ONCE = 64


@dataclass(frozen=True)
class ConceptExample:
    """A piece of a text on which a concept is active.

    Attributes:
        text: The piece: a token, word, sentence or text.
        activation: How active the concept is there.
        sample: In which text.
        tokens: Which of its tokens, special ones counted: first, and one behind the last.
        before, after: What stands around it in the text.
    """

    text: str
    activation: float
    sample: int
    tokens: tuple[int, int]
    before: str = ""
    after: str = ""


class TopKInputs:
    """The inputs on which concepts are most active.

    Args:
        concept_explainer: A fitted explainer.
        activation_granularity: What an input is: a token, a word, a sentence or a text.
        aggregation_strategy: How the activations of several tokens become one.
        k: How many inputs a concept gets at most; fewer where it is active on fewer.
        concept_encoding_batch_size: Rows that are encoded at once.
        use_unique: Count a string once, where it is most active.
    Raises:
        InputError: An explainer that is not fitted, or k below 1.
    """

    def __init__(
        self,
        concept_explainer: Any,
        activation_granularity: Granularity = Granularity.TOKEN,
        aggregation_strategy: Aggregation = Aggregation.MEAN,
        k: int = 5,
        concept_encoding_batch_size: int = 1024,
        use_unique: bool = True,
    ) -> None:
        if k < 1:
            raise InputError(f"k must be at least 1, got {k}")
        if concept_encoding_batch_size < 1:
            raise InputError(
                f"concept_encoding_batch_size must be at least 1, got {concept_encoding_batch_size}"
            )
        if not getattr(concept_explainer, "is_fitted", True):
            raise InputError(f"{type(concept_explainer).__name__} is not fitted: call fit first")
        self.explainer = concept_explainer
        self.granularity = activation_granularity
        self.aggregation = aggregation_strategy
        self.k = k
        self.at_once = concept_encoding_batch_size
        self.use_unique = use_unique

    def interpret(
        self,
        concepts_indices: int | Iterable[int] | str = ALL,
        inputs: Sequence[str] | None = None,
        latent_activations: Float[Tensor, "row d"] | None = None,
        concepts_activations: Float[Tensor, "row concept"] | None = None,
    ) -> dict[int, dict[str, float] | None]:
        """The strongest inputs of each concept.

        Args:
            concepts_indices: Which concepts; ``"all"`` for every one.
            inputs: Texts.
            latent_activations: Their rows of activations at this granularity, if they are there already.
            concepts_activations: Or their codes.
        Returns:
            By concept: inputs and how active it is on each, the strongest first; None where it never is.
        Raises:
            InputError: No texts, concepts that are not there, or rows that are not those of the texts.
        """
        found = self.examples(concepts_indices, inputs, latent_activations, concepts_activations)
        named: dict[int, dict[str, float] | None] = {}
        for concept, examples in found.items():
            strongest: dict[str, float] = {}
            for example in examples:  # a string that comes again was stronger before
                strongest.setdefault(example.text, example.activation)
            named[concept] = strongest or None
        return named

    def examples(
        self,
        concepts_indices: int | Iterable[int] | str = ALL,
        inputs: Sequence[str] | None = None,
        latent_activations: Float[Tensor, "row d"] | None = None,
        concepts_activations: Float[Tensor, "row concept"] | None = None,
    ) -> dict[int, list[ConceptExample]]:
        """The same, with where in which text each input stands."""
        if inputs is None or isinstance(inputs, str) or not len(inputs):
            raise InputError("give inputs=, a list of texts")
        texts = list(inputs)
        split = splitter_of(self.explainer)
        pieces, chunks = self._pieces(split, texts)
        codes = self._codes(split, texts, chunks, latent_activations, concepts_activations)
        best: _Best | None = None
        for rows, first, width in codes:
            best = best or _Best(_chosen(concepts_indices, width), self.k)
            best.add(
                rows, first, [p.text for p in pieces[first : first + len(rows)]], self.use_unique
            )
        if best is None:
            raise InputError("the texts have no tokens to look at")
        return {
            concept: [
                ConceptExample(**{**vars(pieces[row]), "activation": value})
                for value, row in entries
            ]
            for concept, entries in best.entries().items()
        }

    def _pieces(
        self, split: ModelWithSplitPoints, texts: list[str]
    ) -> tuple[list[ConceptExample], list[tuple[int, int, int]]]:
        """Every input there is, and for each chunk of texts where they and their rows begin."""
        pieces: list[ConceptExample] = []
        chunks: list[tuple[int, int, int]] = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            part = texts[start : start + TEXTS_AT_ONCE]
            first = len(pieces)
            # Sentences are what needs to know most of a text, so that also tokens get their place in it.
            samples = split.samples(part, Granularity.SENTENCE)
            groups = split.groups(samples, self.granularity)
            for number, (sample, group) in enumerate(zip(samples, groups, strict=True), start):
                pieces += [
                    _piece(sample, tokens, number, split.tokenizer) for tokens in group.rows()
                ]
            chunks.append((start, first, len(pieces) - first))
        return pieces, chunks

    def _codes(
        self,
        split: ModelWithSplitPoints,
        texts: list[str],
        chunks: list[tuple[int, int, int]],
        latent: Tensor | None,
        codes: Tensor | None,
    ) -> Any:
        """Codes in parts: rows, which row is the first, how many concepts there are."""
        total = sum(count for _, _, count in chunks)
        for name, given in (("latent_activations", latent), ("concepts_activations", codes)):
            if given is not None and len(given) != total:
                raise InputError(
                    f"{name} has {len(given)} rows, and the texts have {total} inputs of {self.granularity}"
                )
        for start, first, count in chunks:
            if codes is not None:
                rows = codes[first : first + count]
            else:
                if latent is not None:
                    x: Any = latent[first : first + count]
                else:
                    x, _ = split.get_activations(
                        texts[start : start + TEXTS_AT_ONCE], self.granularity, self.aggregation
                    )
                parts = [self.explainer.encode_activations(part) for part in x.split(self.at_once)]
                rows = torch.cat(parts).detach()
            if len(rows):
                yield rows.float().cpu(), first, rows.shape[-1]


def splitter_of(explainer: Any) -> ModelWithSplitPoints:
    """A splitter at an explainer's place that knows granularities."""
    own = explainer.splitter
    return ModelWithSplitPoints(
        own.bridge,
        tokenizer=own.tokenizer,
        split_points=explainer.split_point,
        batch_size=own.batch_size,
    )


def _piece(sample: Sample, tokens: list[int], number: int, tokenizer: Any) -> ConceptExample:
    first, last = tokens[0], tokens[-1]
    if sample.text is None or sample.spans is None:
        words = tokenizer.decode([sample.ids[i] for i in tokens])
        return ConceptExample(words, 0.0, number, (first, last + 1))
    begin, end = sample.spans[first][0], sample.spans[last][1]
    return ConceptExample(
        sample.text[begin:end],
        0.0,
        number,
        (first, last + 1),
        sample.text[:begin],
        sample.text[end:],
    )


def _chosen(indices: int | Iterable[int] | str, width: int) -> list[int]:
    if isinstance(indices, str):
        if indices != ALL:
            raise InputError(f"concepts are numbers, or {ALL!r}; got {indices!r}")
        return list(range(width))
    given = [indices] if isinstance(indices, int) else list(indices)
    wrong = [i for i in given if isinstance(i, bool) or not 0 <= i < width]
    if wrong:
        raise InputError(f"there is no concept {wrong[0]!r}: there are 0 to {width - 1}")
    return given


class _Best:
    """The k strongest rows of each concept so far, each string once or as often as it comes."""

    def __init__(self, concepts: list[int], k: int) -> None:
        self.concepts = concepts
        self.k = k
        self.values = torch.zeros(len(concepts), 0)
        self.rows = torch.zeros(len(concepts), 0, dtype=torch.long)
        self.strings = torch.zeros(len(concepts), 0, dtype=torch.long)
        self.numbers: dict[str, int] = {}

    def add(
        self, codes: Float[Tensor, "row concept"], first: int, texts: list[str], unique: bool
    ) -> None:
        """Take rows in."""
        codes = codes[:, self.concepts]
        numbers = [self.numbers.setdefault(text, len(self.numbers)) for text in texts]
        strings = torch.tensor(numbers) if unique else torch.arange(first, first + len(codes))
        values, rows, kinds = _strongest(codes, strings)
        count = len(self.concepts)
        values = torch.cat([self.values, values.T], 1)
        rows = torch.cat([self.rows, (rows + first).T], 1)
        kinds = torch.cat([self.strings, kinds.expand(count, -1)], 1)
        # A string is at most once among those held and once among the new: 2k hold k different ones.
        order = values.argsort(dim=1, descending=True, stable=True)[:, : 2 * self.k]
        values, rows, kinds = (x.gather(1, order) for x in (values, rows, kinds))
        again = (kinds[:, :, None] == kinds[:, None, :]).tril(-1).any(-1)
        values = values.masked_fill(again, 0)
        order = values.argsort(dim=1, descending=True, stable=True)[:, : self.k]
        self.values, self.rows, self.strings = (x.gather(1, order) for x in (values, rows, kinds))

    def entries(self) -> dict[int, list[tuple[float, int]]]:
        """By concept: activations and rows, the strongest first; those that are active only."""
        return {
            concept: [
                (value, row)
                for value, row in zip(values.tolist(), rows.tolist(), strict=True)
                if value > 0
            ]
            for concept, values, rows in zip(self.concepts, self.values, self.rows, strict=True)
        }


def _strongest(
    codes: Float[Tensor, "row concept"], strings: Int[Tensor, " row"]
) -> tuple[Float[Tensor, "kind concept"], Int[Tensor, "kind concept"], Int[Tensor, " kind"]]:
    """For each string the strongest of its rows, by concept: how active, and which row."""
    kinds, inverse = strings.unique(return_inverse=True)
    width = codes.shape[1]
    index = inverse[:, None].expand(-1, width)
    lowest = torch.full((len(kinds), width), -torch.inf)
    values = lowest.scatter_reduce(0, index, codes, "amax")
    numbers = torch.arange(len(codes))[:, None].expand(-1, width)
    at = torch.where(codes == values[inverse], numbers, len(codes))
    rows = torch.full((len(kinds), width), len(codes)).scatter_reduce(0, index, at, "amin")
    return values, rows, kinds


Label = Callable[[list[ConceptExample]], str]
"""Given a concept's examples, a name for it."""


def label_concepts(
    interpreter: TopKInputs,
    label: Label,
    inputs: Sequence[str],
    concepts_indices: int | Iterable[int] | str = ALL,
) -> dict[int, str | None]:
    """Name concepts by any function of their examples: a person's, a rule's, a language model's.

    Args:
        interpreter: Finds the examples.
        label: Given the examples of a concept, its name.
        inputs: Texts.
        concepts_indices: Which concepts.
    Returns:
        By concept: its name; None where it is never active.
    """
    found = interpreter.examples(concepts_indices, inputs)
    return {concept: label(examples) if examples else None for concept, examples in found.items()}
