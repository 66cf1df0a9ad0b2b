"""Fitting gates from a lens: the short way from texts to results."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from ...bridge import TransformerBridge
from ...hooks import InputError
from .chg import CHG
from .data import CHGDataset
from .fitting import Callback
from .objectives import Objective
from .results import CHGResults
from .sites import HEADS, Target
from .training import CHGTrainer

ZERO, MEAN = ABLATIONS = ("zero", "mean")


class Fitting:
    """Fits gates to the model of a lens."""

    bridge: TransformerBridge

    def fit(
        self,
        texts: Any,
        targets: Any,
        *,
        foils: Any = None,
        max_length: int | None = None,
        separator: str = "",
        prepend_bos: bool | None = None,
        **options: Any,
    ) -> CHGResults:
        """Which heads a model needs to go on from prompts as it should.

        Args:
            texts: The prompts.
            targets: What should follow each, with the space in front that it has in text.
            foils: What should not follow, for `LogitDifference`.
            max_length: See `CHGDataset.from_texts`.
            separator: See there.
            prepend_bos: See there.
            **options: See `fit_dataset`.
        Raises:
            InputError: Texts and targets that do not go together, or an option that does not exist.
        """
        dataset = CHGDataset.from_texts(
            texts,
            targets,
            self.bridge,
            foils=foils,
            max_length=max_length,
            separator=separator,
            prepend_bos=prepend_bos,
        )
        return self.fit_dataset(dataset, **options)

    def fit_dataset(
        self,
        dataset: CHGDataset,
        *,
        target: Target = HEADS,
        layers: Iterable[int] | int | None = None,
        ablation: str | dict[str, Tensor] = ZERO,
        objective: Objective | None = None,
        save_path: str | Path | None = None,
        verbose: bool = True,
        callback: Callback | None = None,
        checkpoint: str | Path | None = None,
        resume: bool = False,
        **knobs: Any,
    ) -> CHGResults:
        """Which heads a model needs for a dataset.

        Args:
            dataset: Rows.
            target: What is gated; see `CHG`.
            layers: Where; None for all layers that have it.
            ablation: What a closed gate leaves: ``"zero"``, ``"mean"`` (over this dataset), or means by
                point.
            objective: What is lowered; None for minus the log-probability of the targets.
            save_path: A file for the results.
            verbose: Show a progress bar.
            callback: See `CHGTrainer.fit`.
            checkpoint: See `CHGTrainer.fit`.
            resume: See `CHGTrainer.fit`.
            **knobs: ``num_masks``, ``num_updates``, ``num_reg_updates``, ``batch_size``, ``l1_weight``,
                ``lr`` and the others of `FitOptions`.
        Raises:
            InputError: An option that does not exist, or that does not fit.
            AbsentPointError: The model has nothing of the kind to gate.
        """
        left: CHGDataset | dict[str, Tensor] | None
        if isinstance(ablation, str):
            if ablation not in ABLATIONS:
                raise InputError(f"ablation must be one of {ABLATIONS} or means, got {ablation!r}")
            left = dataset if ablation == MEAN else None
        else:
            left = ablation
        chg = CHG(self.bridge, target=target, layers=layers, ablation=left)
        trainer = CHGTrainer(chg, dataset, objective=objective, **knobs)
        results = trainer.fit(
            verbose=verbose, callback=callback, checkpoint=checkpoint, resume=resume
        )
        if save_path is not None:
            results.save(save_path)
        return results

    def fit_pattern_task(
        self,
        pattern: str = "aba",
        *,
        num_samples: int = 1000,
        num_lines: int = 5,
        use_vocab_tokens: bool = False,
        vocab_size: int = 26,
        data_seed: int = 0,
        **options: Any,
    ) -> CHGResults:
        """Which heads a model needs to go on with a pattern of words, ABA or ABB.

        Args:
            pattern: ``"aba"`` or ``"abb"``.
            num_samples: See `CHGDataset.from_pattern_task`.
            num_lines: See there.
            use_vocab_tokens: See there.
            vocab_size: See there.
            data_seed: Of the words.
            **options: See `fit_dataset`.
        Raises:
            InputError: Another pattern, or an option that does not exist.
        """
        dataset = CHGDataset.from_pattern_task(
            pattern,
            self.bridge,
            num_samples=num_samples,
            num_lines=num_lines,
            use_vocab_tokens=use_vocab_tokens,
            vocab_size=vocab_size,
            seed=data_seed,
        )
        return self.fit_dataset(dataset, **options)

    def fit_huggingface(
        self,
        dataset_name: Any,
        input_column: str,
        target_column: str,
        *,
        split: str = "train",
        max_samples: int | None = None,
        max_length: int | None = None,
        separator: str = "",
        **options: Any,
    ) -> CHGResults:
        """Which heads a model needs for a dataset of the Hugging Face hub, or one that was loaded.

        Args:
            dataset_name: Its name, a `datasets.Dataset`, or any iterable of dictionaries.
            input_column: Where the prompts are.
            target_column: Where what should follow them is.
            split: Which part, of a name.
            max_samples: Only the first so many rows.
            max_length: See `CHGDataset.from_texts`.
            separator: See there.
            **options: See `fit_dataset`.
        Raises:
            InputError: Columns that are not there, or an option that does not exist.
        """
        dataset = CHGDataset.from_huggingface(
            dataset_name,
            input_column,
            target_column,
            self.bridge,
            split=split,
            max_samples=max_samples,
            max_length=max_length,
            separator=separator,
        )
        return self.fit_dataset(dataset, **options)
