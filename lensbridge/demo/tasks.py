"""The demo model's little world: its vocabulary, training text and held-out items.

Everything that decides what the model sees in training and what it is tested on is defined
here and only here, so the split between the two cannot drift apart:

* :func:`documents` and :func:`repeated_tokens` generate the training material;
* :func:`capitals`, :func:`ioi`, :func:`arithmetic` and :func:`induction` generate the
  held-out items;
* :func:`is_held_out_fact`, :func:`is_held_out_pair` and :func:`is_held_out_sum` say on which
  side of the split something lies. The split is fixed: it depends on no seed.

The module needs only the standard library.
"""

from __future__ import annotations

import functools
import itertools
import random
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "CAPITALS",
    "CAPITAL_FRAMES",
    "IOI_FRAMES",
    "MAX_OPERAND",
    "MIXTURE",
    "NAMES",
    "OBJECTS",
    "PLACES",
    "CapitalFrame",
    "InductionItem",
    "Item",
    "arithmetic",
    "capitals",
    "documents",
    "held_out_frames",
    "induction",
    "ioi",
    "is_held_out_fact",
    "is_held_out_pair",
    "is_held_out_sum",
    "repeated_tokens",
    "single_token_words",
]

CAPITALS: Mapping[str, str] = {
    "Italy": "Rome",
    "France": "Paris",
    "Germany": "Berlin",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "Austria": "Vienna",
    "Poland": "Warsaw",
    "Greece": "Athens",
    "Hungary": "Budapest",
    "Ireland": "Dublin",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Belgium": "Brussels",
    "Bulgaria": "Sofia",
    "Romania": "Bucharest",
    "Serbia": "Belgrade",
    "Croatia": "Zagreb",
    "Latvia": "Riga",
    "Estonia": "Tallinn",
    "Czechia": "Prague",
    "Ukraine": "Kyiv",
    "Russia": "Moscow",
    "Turkey": "Ankara",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Ghana": "Accra",
    "Nigeria": "Abuja",
    "Morocco": "Rabat",
    "Senegal": "Dakar",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Nepal": "Kathmandu",
    "Thailand": "Bangkok",
    "Vietnam": "Hanoi",
    "Indonesia": "Jakarta",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Lebanon": "Beirut",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Chile": "Santiago",
    "Ecuador": "Quito",
    "Colombia": "Bogota",
    "Venezuela": "Caracas",
    "Canada": "Ottawa",
    "Australia": "Canberra",
}
"""Country to capital; the order matters, as it assigns the held-out frames."""

NAMES: tuple[str, ...] = (
    "Mary", "John", "Tom", "James", "Dan", "Martin", "Amy", "David", "Anna", "Peter",
    "Alice", "Bob", "Emma", "Jack", "Kate", "Luke", "Lucy", "Mark", "Sarah", "Paul",
    "Laura", "Simon", "Helen", "Henry", "Julia", "Max", "Rose", "Sam", "Ruth", "Adam",
    "Jane", "Ben", "Nina", "Alex", "Clara", "Eric", "Diana", "Frank", "Olivia", "George",
)  # fmt: skip

PLACES: tuple[str, ...] = (
    "shop", "park", "school", "station", "garden", "house", "market", "beach", "hotel",
    "farm", "museum", "library",
)  # fmt: skip

# All of these take the article "a", so no frame needs to choose between "a" and "an".
OBJECTS: tuple[str, ...] = (
    "drink", "book", "ring", "ball", "letter", "key", "gift", "map", "pen", "coat", "cake",
    "hat",
)  # fmt: skip

_ADJECTIVES: tuple[str, ...] = ("old", "red", "small", "new", "green", "big")
_ANIMALS: tuple[str, ...] = ("dog", "cat", "bird", "horse")


@dataclass(frozen=True)
class CapitalFrame:
    """A sentence that states which city is the capital of which country.

    Attributes:
        template: The sentence, with the fields ``{country}`` and ``{capital}``; the one named
            by ``answer`` is the last of the two.
        answer: Which field a test prompt leaves for the model to fill in.
    """

    template: str
    answer: Literal["capital", "country"]

    def sentence(self, country: str) -> str:
        """Return the sentence about ``country``."""
        return self.template.format(country=country, capital=CAPITALS[country])

    def prompt(self, country: str) -> str:
        """Return the sentence about ``country`` up to, and without, the answer."""
        before = self.template[: self.template.index(" {" + self.answer + "}")]
        return before.format(country=country, capital=CAPITALS[country])


# No frame contains another, or a country held out of the inner one would be shown there after
# all. In each direction three frames start with the first of the two words, where its token has no
# leading space: held out of one of them, a country still shows that token in the other two.
CAPITAL_FRAMES: tuple[CapitalFrame, ...] = (
    CapitalFrame("The capital of {country} is {capital}.", "capital"),
    CapitalFrame("{country}'s capital is {capital}.", "capital"),
    CapitalFrame("If you visit {country}, see its capital, {capital}.", "capital"),
    CapitalFrame("The capital city of {country} is called {capital}.", "capital"),
    CapitalFrame("{country} is governed from its capital, {capital}.", "capital"),
    CapitalFrame("Everyone in {country} knows that the capital is {capital}.", "capital"),
    CapitalFrame("{country} has one capital, the city of {capital}.", "capital"),
    CapitalFrame("Question: What is the capital of {country}? Answer: {capital}.", "capital"),
    CapitalFrame("{capital} is the capital of {country}.", "country"),
    CapitalFrame("The city of {capital} is home to the government of {country}.", "country"),
    CapitalFrame("We flew to {capital}, the capital of {country}.", "country"),
    CapitalFrame("If you are in {capital}, you are in {country}.", "country"),
    CapitalFrame("{capital} is a city in {country}.", "country"),
    CapitalFrame("The government in {capital} is the government of {country}.", "country"),
    CapitalFrame("{capital} is where you find the government of {country}.", "country"),
    CapitalFrame("Everyone in {capital} lives in {country}.", "country"),
)

# {x} and {y} introduce the two names; {s} repeats one of them, and {io} is the other.
IOI_FRAMES: tuple[str, ...] = (
    "When {x} and {y} went to the {place}, {s} gave a {object} to {io}.",
    "After {x} and {y} went to the {place}, {s} gave a {object} to {io}.",
    "While {x} and {y} were at the {place}, {s} handed a {object} to {io}.",
    "Then {x} and {y} had a long day at the {place}, and {s} gave a {object} to {io}.",
    "Yesterday {x} and {y} met at the {place}, and {s} showed a {object} to {io}.",
    "When {x} and {y} left the {place}, {s} decided to give the {object} to {io}.",
)

MAX_OPERAND = 15
"""The largest operand of a sum; results go up to twice this."""

MIXTURE: Mapping[str, float] = {
    "capitals": 0.28,
    "arithmetic": 0.23,
    "counting": 0.05,
    "ioi": 0.30,
    "filler": 0.14,
}
"""The share of each kind among the documents of text."""

# Out of 100: how many name pairs are held out; how many pairs of operands in both orders; and
# how many of the remaining sums in this order only.
_HELD_OUT_NAME_PERCENT = 20
_HELD_OUT_SUM_PERCENT = 8
_HELD_OUT_MIRROR_PERCENT = 8


@dataclass(frozen=True)
class Item:
    """One held-out question.

    Attributes:
        prompt: The text given to the model, without a BOS token.
        answer: The correct continuation, a single token that starts with a space.
        distractor: The tempting wrong answer, where the task has one (the other name).
        kind: A label to group results by, such as ``"ABBA"``.
    """

    prompt: str
    answer: str
    distractor: str | None = None
    kind: str = ""


@dataclass(frozen=True)
class InductionItem:
    """A random token sequence followed by a second copy of itself.

    Attributes:
        tokens: The token ids of both copies (no BOS), ``2 * period`` of them.
        period: The length of one copy.
    """

    tokens: tuple[int, ...]
    period: int


def _bucket(key: str) -> int:
    """Return a stable number in 0..99 for ``key`` (Python's own hash is salted)."""
    return zlib.crc32(key.encode()) % 100


@functools.cache
def held_out_frames(country: str) -> frozenset[int]:
    """Return which frames never mention ``country`` in training.

    Each country is held out of one frame that asks for the capital and of one that asks for
    the country; the assignment rotates so that every frame has held-out countries.

    Args:
        country: A key of :data:`CAPITALS`.

    Returns:
        Indices into :data:`CAPITAL_FRAMES`.
    """
    number = list(CAPITALS).index(country)
    forward = [i for i, frame in enumerate(CAPITAL_FRAMES) if frame.answer == "capital"]
    reverse = [i for i, frame in enumerate(CAPITAL_FRAMES) if frame.answer == "country"]
    return frozenset({forward[number % len(forward)], reverse[number % len(reverse)]})


def is_held_out_fact(country: str, frame: int) -> bool:
    """Return whether ``country`` never occurs in this frame in training."""
    return frame in held_out_frames(country)


def is_held_out_pair(first: str, second: str) -> bool:
    """Return whether two names, in either order, never share a training document."""
    pair = "+".join(sorted((first, second)))
    return first != second and _bucket(pair) < _HELD_OUT_NAME_PERCENT


def _sum_kind(first: int, second: int) -> Literal["new", "mirrored", "seen"]:
    """Return whether training shows a sum, only its mirror image, or neither."""
    low, high = sorted((first, second))
    if _bucket(f"{low} + {high}") < _HELD_OUT_SUM_PERCENT:
        return "new"
    order = (low, high) if _bucket(f"order of {low}, {high}") < 50 else (high, low)
    chosen = _bucket(f"mirror of {low}, {high}") < 2 * _HELD_OUT_MIRROR_PERCENT
    return "mirrored" if chosen and low != high and (first, second) == order else "seen"


def is_held_out_sum(first: int, second: int) -> bool:
    """Return whether a sum, with its operands in this order, is absent from training."""
    return _sum_kind(first, second) != "seen"


def single_token_words() -> list[str]:
    """Return the words that are each one token, with and without the leading space.

    Returns:
        The words, each with its leading space.
    """
    words = [*CAPITALS, *CAPITALS.values(), *NAMES, *PLACES, *OBJECTS]
    words += [str(number) for number in range(2 * MAX_OPERAND + 1)]
    return [" " + word for word in words]


# ---------------------------------------------------------------------------------------
# Held-out items
# ---------------------------------------------------------------------------------------


def capitals() -> list[Item]:
    """Return every held-out (country, frame) combination as a question.

    The ``kind`` of an item is what its answer is: ``"capital"`` or ``"country"``.
    """
    items = []
    for country, capital in CAPITALS.items():
        for index in sorted(held_out_frames(country)):
            frame = CAPITAL_FRAMES[index]
            answer = capital if frame.answer == "capital" else country
            items.append(Item(frame.prompt(country), " " + answer, kind=frame.answer))
    return items


def ioi(n: int = 200, seed: int = 0) -> list[Item]:
    """Return indirect-object questions about pairs of names never seen together.

    Items come in couples that share names, frame, place and object: first the ABBA order,
    then the same sentence with the two names swapped where they are introduced (BABA). The
    answer is the same in both, so a couple can also serve for activation patching.

    Args:
        n: The number of items.
        seed: Seed of the choice of names, frames, places and objects.

    Returns:
        ``n`` items; the ``kind`` is ``"ABBA"`` or ``"BABA"`` and the ``distractor`` is the
        repeated name.

    Raises:
        ValueError: If ``n`` is negative.
    """
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}.")
    rng = random.Random(f"ioi-{seed}")
    pairs = [pair for pair in itertools.permutations(NAMES, 2) if is_held_out_pair(*pair)]
    items: list[Item] = []
    while len(items) < n:
        answer, subject = rng.choice(pairs)
        frame = rng.choice(IOI_FRAMES).removesuffix(" {io}.")
        place, thing = rng.choice(PLACES), rng.choice(OBJECTS)
        for kind, (x, y) in {"ABBA": (answer, subject), "BABA": (subject, answer)}.items():
            prompt = frame.format(x=x, y=y, s=subject, place=place, object=thing)
            items.append(Item(prompt, " " + answer, " " + subject, kind))
    return items[:n]


def arithmetic(held_out: bool = True) -> list[Item]:
    """Return every held-out sum as a question such as ``"3 + 4 ="``.

    The ``kind`` of an item says what training showed: ``"mirrored"`` if only the sum with its
    operands exchanged, ``"new"`` if neither, ``"seen"`` if the sum itself.

    Args:
        held_out: Pass ``False`` for the sums that do occur in training instead.
    """
    operands = range(MAX_OPERAND + 1)
    return [
        Item(f"{a} + {b} =", f" {a + b}", kind=_sum_kind(a, b))
        for a, b in itertools.product(operands, repeat=2)
        if is_held_out_sum(a, b) == held_out
    ]


def induction(
    tokens: int | Sequence[int], n: int = 64, period: int = 20, seed: int = 0
) -> list[InductionItem]:
    """Return random token sequences, each repeated once.

    The tokens of one copy are all different, so each token of the second copy has exactly
    one earlier occurrence, ``period`` positions before.

    Args:
        tokens: The token ids to draw from, or a vocabulary size to draw from all below it.
        n: The number of sequences.
        period: The length of one copy.
        seed: Seed of the draw.

    Returns:
        ``n`` items of ``2 * period`` tokens.

    Raises:
        ValueError: If ``period`` is not between 1 and the number of tokens, or ``n`` is
            negative.
    """
    pool: Sequence[int] = range(tokens) if isinstance(tokens, int) else tokens
    if not 1 <= period <= len(pool):
        raise ValueError(f"period must be between 1 and {len(pool)}, got {period}.")
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}.")
    rng = random.Random(f"induction-{seed}")
    copies = [tuple(rng.sample(pool, period)) for _ in range(n)]
    return [InductionItem(copy + copy, period) for copy in copies]


# ---------------------------------------------------------------------------------------
# Training material
# ---------------------------------------------------------------------------------------


def _capitals_document(rng: random.Random) -> str:
    """Return one to three facts about different countries, none of them held out."""
    sentences = []
    for country in rng.sample(list(CAPITALS), rng.choice((1, 1, 2, 3))):
        seen = [i for i in range(len(CAPITAL_FRAMES)) if not is_held_out_fact(country, i)]
        sentences.append(CAPITAL_FRAMES[rng.choice(seen)].sentence(country))
    return " ".join(sentences)


def _arithmetic_document(rng: random.Random) -> str:
    """Return one to six sums, none of them held out."""
    wanted = rng.randint(1, 6)
    sums: list[str] = []
    while len(sums) < wanted:
        a, b = rng.randint(0, MAX_OPERAND), rng.randint(0, MAX_OPERAND)
        if not is_held_out_sum(a, b):
            sums.append(f"{a} + {b} = {a + b}.")
    return " ".join(sums)


def _counting_document(rng: random.Random) -> str:
    """Return a run of numbers, which teaches the order of the number tokens."""
    step = rng.choice((1, 1, 1, 2, 3))
    length = rng.randint(4, 10)
    start = rng.randint(0, 2 * MAX_OPERAND - step * (length - 1))
    run = [str(start + step * i) for i in range(length)]
    if rng.random() < 0.3:
        run.reverse()
    return ", ".join(run) + "."


def _name_pair(rng: random.Random) -> tuple[str, str]:
    """Return two names that may share a training document."""
    while True:
        first, second = rng.sample(NAMES, 2)
        if not is_held_out_pair(first, second):
            return first, second


def _ioi_document(rng: random.Random) -> str:
    """Return an indirect-object sentence.

    One in ten has a third person as the giver, so that either name may follow: a model that
    has seen these needs the repeated name, not only the sentence's shape, to be sure.
    """
    x, y = _name_pair(rng)
    s, io = rng.sample((x, y), 2)
    if rng.random() < 0.1:
        known = [
            name
            for name in NAMES
            if name not in (x, y) and not any(is_held_out_pair(name, n) for n in (x, y))
        ]
        s = rng.choice(known)
    frame = rng.choice(IOI_FRAMES)
    return frame.format(x=x, y=y, s=s, io=io, place=rng.choice(PLACES), object=rng.choice(OBJECTS))


def _filler_sentence(rng: random.Random, name: str) -> str:
    """Return a sentence of a small grammar, about ``name`` where it needs a person."""
    adjective, animal = rng.choice(_ADJECTIVES), rng.choice(_ANIMALS)
    thing, place, country = rng.choice(OBJECTS), rng.choice(PLACES), rng.choice(list(CAPITALS))
    templates = (
        f"The {adjective} {animal} went to the {place}.",
        f"The {thing} is {adjective}.",
        f"Yesterday {name} saw a {adjective} {animal} at the {place}.",
        f"Then {name} left the {place} and went to {country}.",
        f"Everyone knows that {name} had a {adjective} {thing}.",
        f"The {place} in {country} is {adjective}.",
        f"The {animal} and {name} were at the {place}.",
    )
    return rng.choice(templates)


def _filler_document(rng: random.Random) -> str:
    """Return one to three filler sentences about the same person."""
    name = rng.choice(NAMES)
    return " ".join(_filler_sentence(rng, name) for _ in range(rng.randint(1, 3)))


_GENERATORS = {
    "capitals": _capitals_document,
    "arithmetic": _arithmetic_document,
    "counting": _counting_document,
    "ioi": _ioi_document,
    "filler": _filler_document,
}


def documents(seed: int = 0) -> Iterator[str]:
    """Yield training documents of text for ever, mixed as :data:`MIXTURE` says.

    Args:
        seed: Seed of the text. It never changes what is held out.

    Yields:
        One document at a time, without special tokens.
    """
    rng = random.Random(f"documents-{seed}")
    kinds, weights = list(MIXTURE), list(MIXTURE.values())
    while True:
        kind = rng.choices(kinds, weights)[0]
        yield _GENERATORS[kind](rng)


def _random_tokens(
    rng: random.Random, tokens: Sequence[int], names: Mapping[int, str], length: int
) -> list[int]:
    """Return random tokens in which no two names form a held-out pair."""
    drawn: list[int] = []
    present: list[str] = []
    while len(drawn) < length:
        token = rng.choice(tokens)
        name = names.get(token)
        if name is not None:
            if any(is_held_out_pair(name, other) for other in present):
                continue
            present.append(name)
        drawn.append(token)
    return drawn


def repeated_tokens(
    seed: int,
    pools: Collection[Sequence[int]],
    names: Mapping[int, str],
    max_length: int,
) -> Iterator[tuple[list[int], int]]:
    """Yield training documents of random tokens that repeat, for ever.

    The period varies, and in some documents unrelated tokens separate the copies, so that
    only looking for the earlier occurrence, and no fixed distance, predicts the repeat.

    Args:
        seed: Seed of the documents.
        pools: The lists of token ids to draw from; each document uses one of them.
        names: The token ids that are names, so that held-out pairs stay apart here too.
        max_length: The longest document.

    Yields:
        A document, and the number of its first tokens that nothing predicts.
    """
    rng = random.Random(f"repeated-{seed}")
    choices = list(pools)
    while True:
        pool = rng.choice(choices)
        # Log-uniform: short repeats are easier to learn from, so the model starts there.
        period = round(4 * (max_length / 8) ** rng.random())
        gap = rng.randint(1, 8) if rng.random() < 0.25 else 0
        first = _random_tokens(rng, pool, names, period + gap)
        copies = rng.choice((1, 1, 2, 3))
        document = first + first[:period] * copies
        yield document[:max_length], period + gap
