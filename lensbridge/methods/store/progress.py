"""Progress bars."""

from __future__ import annotations

from collections.abc import Iterator

from .extraction import ActivationBatch


def shown(
    batches: Iterator[ActivationBatch], total: int | None, progress: bool
) -> Iterator[ActivationBatch]:
    """Batches, and a bar that counts their samples.

    Args:
        batches: The batches.
        total: How many samples there will be; None where nobody knows.
        progress: Whether to show the bar.
    """
    if not progress:
        yield from batches
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="Extracting", unit="sample") as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))
