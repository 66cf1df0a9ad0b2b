"""Results on disk: a safetensors file with JSON in its header, and the old files of others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ...bridge import read_tensors, write_tensors
from ...hooks import InputError
from .fitting import NEGATIVE, NONE, POSITIVE
from .validation import Evaluation

if TYPE_CHECKING:
    from .results import CHGResults

KIND = "lensbridge gating results"
GROUPS = ("masks", "history", "losses")
FACTS = ("layers", "updates", "options", "model", "target")


def write_results(results: Any, path: Path) -> Path:
    """Write one file; its name gets ``.safetensors`` unless it has it."""
    if path.suffix != ".safetensors":
        path = path.with_name(path.name + ".safetensors")
    tensors = {
        f"{group}/{name}": x for group in GROUPS for name, x in getattr(results, group).items()
    }
    facts = {"kind": KIND, **{name: getattr(results, name) for name in FACTS}}
    ran = results.evaluation
    if ran is not None:
        facts["evaluation"] = {"rows": ran.rows, "full": ran.full, "empty": ran.empty}
        for name in ("circuits", "removed"):
            value = getattr(ran, name)
            if value is not None:
                tensors[f"evaluation/{name}"] = value
    facts["order"] = list(tensors)
    write_tensors(path, tensors, facts)
    return path


def read_results(cls: Any, path: Path) -> CHGResults:
    """Read what `write_results` wrote, or a ``.pt`` file of others.

    Raises:
        FileNotFoundError: No such file.
        InputError: A file of another format.
    """
    if path.suffix in (".pt", ".pth"):
        return _old(cls, path)
    tensors, facts = read_tensors(path, KIND)
    groups: dict[str, dict[str, Tensor]] = {group: {} for group in (*GROUPS, "evaluation")}
    # A file has its tensors by the alphabet, and results by the order of fitting.
    for key, value in sorted(tensors.items(), key=lambda item: facts["order"].index(item[0])):
        group, _, name = key.partition("/")
        groups[group][name] = value
    ran = facts.get("evaluation")
    options = facts["options"]
    if "mask_init_range" in options:  # JSON has no tuples
        options["mask_init_range"] = tuple(options["mask_init_range"])
    return cls(
        **{group: groups[group] for group in GROUPS},
        **{name: facts[name] for name in FACTS},
        evaluation=None
        if ran is None
        else Evaluation(**ran, **cast(dict[str, Any], groups["evaluation"])),
    )


def _old(cls: Any, path: Path) -> CHGResults:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"{path} cannot be read without running code from it ({type(error).__name__}); files of gates "
            "hold tensors only"
        ) from error
    stages = data.get("masks", data) if isinstance(data, dict) else {}
    history = {
        stage: (x if x.dim() == 4 else x[:, None]).float()
        for stage, x in stages.items()
        if stage in (NONE, POSITIVE, NEGATIVE) and isinstance(x, Tensor) and x.dim() in (3, 4)
    }
    if not history:
        raise InputError(
            f"{path} holds no gates: expected tensors [update, (mask,) layer, head] under {NONE!r}, "
            f"{POSITIVE!r} or {NEGATIVE!r}"
        )
    layers = next(iter(history.values())).shape[2]
    return cls(
        masks={stage: x[-1].clone() for stage, x in history.items()},
        layers=list(range(layers)),
        history=history,
        updates={stage: list(range(len(x))) for stage, x in history.items()},
    )
