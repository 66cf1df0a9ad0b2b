"""Datasets made of text: the part of a dataset that faces a tokenizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..spans import Reader
from .patterns import pattern_rows
from .sources import Column, read_dataset, read_tsv
from .text_rows import (
    Row,
    fitted,
    last_token_rows,
    masked_rows,
    prompt_rows,
    whole_rows,
)

_Self = TypeVar("_Self", bound="FromText")


class FromText:
    """Ways to make a dataset of text."""

    @classmethod
    def _of(
        cls: type[_Self], rows: list[Row], reader: Reader, *, causal: bool = True, **labels: Any
    ) -> _Self:
        """A dataset of rows as a reader made them."""
        raise NotImplementedError

    @classmethod
    def from_texts(
        cls: type[_Self],
        texts: Any,
        targets: Any,
        tokenizer: Any,
        *,
        foils: Any = None,
        max_length: int | None = None,
        truncate_prompt: bool = False,
        prepend_bos: bool | None = None,
        separator: str = "",
        join: str = "text",
    ) -> _Self:
        """Prompts and what should follow them.

        Prompt and target are tokenized together, as the model met them in training: for most tokenizers a
        target begins with its space (``"The capital of France is"``, ``" Paris"``). Nothing is stripped or
        added. The tokens that are to be predicted are those with a character of the target; one that has
        characters of both is refused.

        Args:
            texts: The prompts.
            targets: What follows each.
            tokenizer: A tokenizer, or a bridge that has one; neither is changed.
            foils: What should not follow, for the logit difference; as many tokens as the target.
            max_length: How many tokens a row may have; of a bridge, its context unless given.
            truncate_prompt: Cut prompts that are too long at the front (behind BOS); else they are refused.
            prepend_bos: Whether rows get a BOS token; None for what a bridge's runs on text get.
            separator: Text to put between prompt and target; ``" "`` if the targets come without their space.
                Tokens that are nothing but separator are not predicted.
            join: ``"text"``, or ``"tokens"`` to tokenize prompt and target apart.
        Raises:
            InputError: Lists that do not go together, an empty target, a row that is too long, or one whose
                target begins inside a token; the message says which row.
        """
        reader = Reader(tokenizer)
        rows = prompt_rows(
            reader,
            texts,
            targets,
            foils,
            prepend_bos=prepend_bos,
            separator=separator,
            join=join,
            max_length=max_length,
            truncate_prompt=truncate_prompt,
        )
        return cls._of(rows, reader)

    @classmethod
    def from_concatenated_texts(
        cls: type[_Self],
        texts: Any,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        truncate_prompt: bool = False,
        prepend_bos: bool | None = None,
    ) -> _Self:
        """Texts whose last token is to be predicted.

        Args:
            texts: Prompts with their target.
            tokenizer: As in `from_texts`.
            max_length: As in `from_texts`.
            truncate_prompt: As in `from_texts`.
            prepend_bos: As in `from_texts`.
        Raises:
            InputError: A text without tokens, or one that is too long.
        """
        reader = Reader(tokenizer)
        kept = len(reader.around(prepend_bos)[0])
        rows = last_token_rows(reader, texts, prepend_bos)
        rows = fitted(rows, reader, max_length, truncate_prompt=truncate_prompt, kept=kept)
        return cls._of(rows, reader)

    @classmethod
    def from_masked(
        cls: type[_Self],
        texts: Any,
        targets: Any,
        tokenizer: Any,
        *,
        foils: Any = None,
        max_length: int | None = None,
        prepend_bos: bool | None = None,
    ) -> _Self:
        """Texts with mask tokens, for encoders with a masked-LM head.

        Args:
            texts: Each with at least one mask token (``tokenizer.mask_token``) in it.
            targets: What belongs there: text, an id, or a list of these; one token for each mask. Text is
                tokenized by itself, so for byte-level tokenizers a word begins with its space (``" Paris"``).
            tokenizer: As in `from_texts`.
            foils: What does not belong there, likewise.
            max_length: How many tokens a row may have.
            prepend_bos: As in `from_texts`.
        Raises:
            InputError: A text without a mask, or a target with another number of tokens.
        """
        reader = Reader(tokenizer)
        rows = masked_rows(reader, texts, targets, foils, prepend_bos, max_length)
        return cls._of(rows, reader, causal=False)

    @classmethod
    def from_labels(
        cls: type[_Self],
        texts: Any,
        labels: Any,
        tokenizer: Any,
        *,
        foils: Any = None,
        max_length: int | None = None,
        truncate: bool = False,
        prepend_bos: bool | None = None,
    ) -> _Self:
        """Texts and their classes.

        Args:
            texts: The texts.
            labels: The class of each.
            tokenizer: As in `from_texts`.
            foils: A wrong class for each.
            max_length: How many tokens a row may have.
            truncate: Cut texts that are too long at the end; else they are refused.
            prepend_bos: As in `from_texts`.
        Raises:
            InputError: Lists that do not go together, or a text that is too long or has no tokens.
        """
        reader = Reader(tokenizer)
        rows = whole_rows(reader, texts, prepend_bos, max_length, truncate)
        return cls._of(rows, reader, causal=False, labels=labels, foils=foils)

    @classmethod
    def from_pattern_task(
        cls: type[_Self],
        pattern: str,
        tokenizer: Any,
        num_samples: int = 1000,
        num_lines: int = 5,
        use_vocab_tokens: bool = False,
        vocab_size: int = 26,
        seed: int = 0,
    ) -> _Self:
        """The ABA / ABB task: lines of three words, the third being the first (ABA) or the second (ABB).

        The last word of the last line is to be predicted; the other word of its line is the foil. No word
        occurs in two lines, and every word is one token. The same arguments give the same rows everywhere.

        Args:
            pattern: ``"aba"`` or ``"abb"``.
            tokenizer: A fast tokenizer, or a bridge that has one.
            num_samples: How many rows.
            num_lines: How many lines a row has.
            use_vocab_tokens: Words of the vocabulary instead of letters.
            vocab_size: From how many different words to draw.
            seed: Of the draw; the global generators are left alone.
        Raises:
            InputError: Another pattern, or too few words that are one token.
        """
        reader = Reader(tokenizer)
        rows = pattern_rows(
            reader, pattern, num_samples, num_lines, use_vocab_tokens, vocab_size, seed
        )
        return cls._of(fitted(rows, reader, None), reader)

    # --- from files ------------------------------------------------------------------------------

    @classmethod
    def from_tsv(
        cls: type[_Self],
        path: str | os.PathLike[str],
        tokenizer: Any,
        input_column: int | str = 0,
        target_column: int | str = 1,
        *,
        header: bool = True,
        max_samples: int | None = None,
        last_token_only: bool = False,
        **options: Any,
    ) -> _Self:
        """A file of tab-separated prompts and targets; quoted fields may contain tabs and line breaks.

        Args:
            path: Where it is; UTF-8.
            tokenizer: As in `from_texts`.
            input_column: The prompts' column, by number or by the name in the first line.
            target_column: The targets' column.
            header: Whether the first line holds names.
            max_samples: How many rows to take; all unless given.
            last_token_only: Only the last token of prompt and target together is to be predicted.
            **options: As in `from_texts` (or `from_concatenated_texts`).
        Raises:
            InputError: A column that is not there, or a line without it.
        """
        columns = (input_column, target_column)
        texts, targets = read_tsv(Path(path), columns, header, max_samples)
        if last_token_only:
            joined = [text + target for text, target in zip(texts, targets, strict=True)]
            return cls.from_concatenated_texts(joined, tokenizer, **options)
        return cls.from_texts(texts, targets, tokenizer, **options)

    @classmethod
    def from_huggingface(
        cls: type[_Self],
        dataset: Any,
        input_column: Column,
        target_column: Column,
        tokenizer: Any,
        split: str = "train",
        max_samples: int | None = None,
        *,
        load_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> _Self:
        """A dataset of the Hugging Face hub, or anything that yields mappings.

        Args:
            dataset: A name or folder for ``datasets.load_dataset``; or a loaded dataset, streaming or not, a
                mapping of splits, or any iterable of mappings.
            input_column: The prompts' column, or a function that makes a prompt of a row.
            target_column: The same for targets.
            tokenizer: As in `from_texts`.
            split: Which split, where there are several.
            max_samples: How many rows to take, the first ones; all unless given. A stream is read no further.
            load_options: Passed to ``load_dataset``: ``{"name": "main", "streaming": True}``.
            **options: As in `from_texts`.
        Raises:
            InputError: A split or a column that is not there, or a value that is no text.
        """
        columns = (input_column, target_column)
        texts, targets = read_dataset(dataset, columns, split, max_samples, load_options)
        return cls.from_texts(texts, targets, tokenizer, **options)
