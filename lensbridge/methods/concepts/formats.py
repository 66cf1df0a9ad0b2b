"""Autoencoders in the files of others: SAELens (cfg.json and sae_weights.safetensors) and Gemma Scope (.npz).

Read as they are computed there, and written so that they are computed there as here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...hooks import InputError
from .base import SAEExplainer
from .explainers import KINDS
from .files import place_for
from .models import ROW_NORMS
from .place import Source

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_KIND_OF = {"standard": "SAE", "topk": "TopKSAE", "jumprelu": "JumpSAE", "batchtopk": "JumpSAE"}
_WRITTEN_AS = {
    "SAE": "standard",
    "TopKSAE": "topk",
    "RATopKSAE": "topk",
    "BatchTopKSAE": "jumprelu",
    "JumpSAE": "jumprelu",
    "RAJumpSAE": "jumprelu",
}
_THEIR_NAMES = [
    "hook_resid_post",
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_mlp_out",
    "hook_attn_out",
    "hook_z",
    "hook_post",
    "hook_pre",
    "hook_embed",
    "hook_normalized",
    "hook_q",
    "hook_k",
    "hook_v",
]


def write_saelens(
    explainer: SAEExplainer, folder: str | Path, *, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write a folder that SAELens loads: ``SAE.load_from_disk(folder)``.

    BatchTopK is written as JumpReLU with one threshold, which it is once trained.

    Args:
        explainer: A fitted explainer with a linear encoder.
        folder: Where to; it is made.
        metadata: Further entries of the configuration's metadata.
    Returns:
        The folder.
    Raises:
        NotFittedError: It has not been fitted.
        InputError: A kind, or an encoder, that the format has no place for.
    """
    atoms = explainer.get_dictionary()
    model: Any = explainer.concept_model
    if explainer.kind not in _WRITTEN_AS or not model.is_linear:
        raise InputError(
            f"SAELens's format holds one linear layer and one of {', '.join(sorted(set(_KIND_OF)))}; "
            f"{type(explainer).__name__} is none of them"
            + ("" if model.is_linear else ", or has another encoder")
        )
    architecture = _WRITTEN_AS[explainer.kind]
    tensors = {
        "W_enc": model.linear.weight.T,
        "b_enc": model.linear.bias,
        "W_dec": atoms,
        "b_dec": explainer.b_dec,
    }
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": explainer.d,
        "d_sae": explainer.nb_concepts,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": model.centers,
        "normalize_activations": model.row_norm,
        "reshape_activations": "hook_z" if "head" in _axes(explainer) else "none",
    }
    if architecture == "topk":
        cfg |= {"k": model.top_k, "rescale_acts_by_decoder_norm": False}
    if explainer.kind == "BatchTopKSAE":
        tensors["threshold"] = model.threshold.expand(explainer.nb_concepts)
    elif architecture == "jumprelu":
        tensors["threshold"] = model.thresholds
    cfg["metadata"] = {
        "model_name": str(getattr(_config(explainer), "_name_or_path", "") or "unknown"),
        "hook_name": _their_name(explainer),
        "hook_head_index": None,
        **(metadata or {}),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held = {name: x.detach().cpu().float().contiguous().clone() for name, x in tensors.items()}
    save_file(held, folder / WEIGHTS)
    (folder / CFG).write_text(json.dumps(cfg, indent=2), encoding="utf-8")
    return folder


def read_saelens(
    folder: str | Path,
    splitter: Source,
    *,
    split_point: int | str | None = None,
    norm_scaling_factor: float | None = None,
    device: torch.device | str = "cpu",
) -> SAEExplainer:
    """Read a folder that SAELens wrote, in its format of today or before version 6.

    Args:
        folder: With ``cfg.json`` and ``sae_weights.safetensors``.
        splitter: A splitter, or a bridge of the model it belongs to.
        split_point: Where it belongs, if the file does not say.
        norm_scaling_factor: For ``normalize_activations="expected_average_only_in"``: what activations were
            multiplied by in its training. It is put into the weights.
        device: Where to put it.
    Returns:
        A fitted explainer: Vanilla, TopK or JumpReLU (as which SAELens keeps BatchTopK, too).
    Raises:
        FileNotFoundError: A file is not there.
        InputError: Another format or architecture; a factor that is missing; or another hook point or width
            than the model's.
    """
    folder = Path(folder)
    cfg = _read_cfg(folder / CFG)
    tensors = _read_weights(folder / WEIGHTS)
    _require(folder, tensors, ("W_enc", "b_enc", "W_dec", "b_dec"))
    architecture, k = _architecture(folder, cfg)
    norm = cfg.get("normalize_activations") or "none"
    if norm is True:
        norm = "expected_average_only_in"
    if norm == "expected_average_only_in":
        if norm_scaling_factor is None:
            raise InputError(
                f"{folder} was trained on scaled activations (normalize_activations={norm!r}), and its files "
                "do not say by how much: give norm_scaling_factor="
            )
        norm = "none"
        tensors["W_enc"] = tensors["W_enc"] * norm_scaling_factor
        tensors["W_dec"] = tensors["W_dec"] / norm_scaling_factor
        tensors["b_dec"] = tensors["b_dec"] / norm_scaling_factor
    elif norm_scaling_factor is not None:
        raise InputError(
            f"{folder} was trained on activations as they are: leave norm_scaling_factor out"
        )
    if norm not in ROW_NORMS:
        raise InputError(f"{folder} has normalize_activations={norm!r}, of {', '.join(ROW_NORMS)}")
    if cfg.get("rescale_acts_by_decoder_norm"):
        lengths = tensors["W_dec"].norm(dim=-1)
        tensors["W_enc"], tensors["b_enc"] = tensors["W_enc"] * lengths, tensors["b_enc"] * lengths
        tensors["W_dec"] = tensors["W_dec"] / lengths[:, None]
    if architecture == "batchtopk" and "topk_threshold" in tensors:
        tensors["threshold"] = tensors.pop("topk_threshold").expand(len(tensors["W_dec"]))
    return _made(
        folder,
        splitter,
        split_point,
        _said(cfg, "hook_name", "hook_point"),
        tensors,
        kind=_KIND_OF[architecture],
        k=k,
        # Files of before there was a choice centred.
        centers=bool(cfg.get("apply_b_dec_to_input", True)),
        row_norm=norm,
        device=device,
    )


def read_gemma_scope(
    path: str | Path,
    splitter: Source,
    *,
    split_point: int | str | None = None,
    device: torch.device | str = "cpu",
) -> SAEExplainer:
    """Read a ``params.npz`` of Gemma Scope: JumpReLU, whose encoder is shown activations as they are.

    Args:
        path: The file.
        splitter: A splitter, or a bridge of the model it belongs to.
        split_point: Where it belongs, which the file does not say.
        device: Where to put it.
    Raises:
        FileNotFoundError: No such file.
        InputError: Another format, or another width than the model's.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            tensors = {name: torch.from_numpy(np.array(file[name])) for name in file.files}
    except (ValueError, OSError, TypeError) as error:
        raise InputError(f"{path} is no .npz of numbers: {error}") from error
    _require(path, tensors, ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"))
    return _made(
        path, splitter, split_point, None, tensors, kind="JumpSAE", centers=False, device=device
    )


# --- parts ------------------------------------------------------------------------------------------------


def _made(
    path: Path,
    splitter: Source,
    split_point: int | str | None,
    hook: str | None,
    tensors: dict[str, Tensor],
    *,
    kind: str,
    k: int | None = None,
    centers: bool,
    row_norm: str = "none",
    device: torch.device | str,
) -> SAEExplainer:
    """An explainer of weights named as SAELens names them."""
    c, d = tensors["W_dec"].shape
    shapes = {"W_enc": (d, c), "b_enc": (c,), "b_dec": (d,)}
    if kind == "JumpSAE":
        _require(path, tensors, ("threshold",))
        shapes["threshold"] = (c,)
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise InputError(
                f"{path} holds {name} {list(tensors[name].shape)}; with W_dec {[c, d]} it would be "
                f"{list(shape)}"
            )
    place = place_for(path, splitter, split_point, hook, d)
    options: dict[str, Any] = {"top_k": k} if kind == "TopKSAE" else {}
    made = KINDS[kind](place.source, nb_concepts=c, split_point=place.key, device=device, **options)
    model: Any = made.concept_model
    held = {name: x.float() for name, x in tensors.items()}
    state = dict(model.state_dict())
    layer = "encoder.final_block.0."
    state |= {
        layer + "weight": held["W_enc"].T,
        layer + "bias": held["b_enc"],
        "dictionary._weights": held["W_dec"],
        "b_dec": held["b_dec"],
    }
    if kind == "JumpSAE":
        state["thresholds"] = held["threshold"]
    made.adopt(state, centers=centers, row_norm=row_norm)
    return made


def _architecture(folder: Path, cfg: Mapping[str, Any]) -> tuple[str, int | None]:
    """The architecture, and of top-k its k."""
    architecture = cfg.get("architecture", "standard")
    # Before version 6, TopK was a standard one with another activation function.
    function = cfg.get("activation_fn_str") or cfg.get("activation_fn") or "relu"
    if architecture == "standard" and function != "relu":
        if function != "topk":
            raise InputError(
                f"{folder} has the activation function {function!r}, neither relu nor topk"
            )
        architecture = "topk"
    if architecture not in _KIND_OF:
        raise InputError(
            f"{folder} is a {architecture!r} autoencoder; those read are {', '.join(_KIND_OF)}"
        )
    if cfg.get("hook_head_index", _said(cfg, "hook_head_index")) is not None:
        raise InputError(f"{folder} is of a single head, which is no hook point of a bridge's")
    if cfg.get("finetuning_scaling_factor"):
        raise InputError(f"{folder} has a finetuning_scaling_factor, which is not read")
    k = cfg.get("k", (cfg.get("activation_fn_kwargs") or {}).get("k"))
    if architecture == "topk" and not isinstance(k, int):
        raise InputError(f"{folder} is a topk autoencoder, and its configuration has no k")
    return architecture, k if architecture == "topk" else None


def _said(cfg: Mapping[str, Any], *names: str) -> Any:
    """What a configuration says of where it belongs: in its metadata, or before version 6 beside the rest."""
    for held in (cfg.get("metadata") or {}, cfg.get("meta") or {}, cfg):
        for name in names:
            if held.get(name) is not None:
                return held[name]
    return None


def _read_cfg(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        cfg = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {error}") from error
    if not isinstance(cfg, dict):
        raise InputError(f"{path} is no configuration: it holds a {type(cfg).__name__}")
    return cfg


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is no safetensors file: {error}") from error


def _require(path: Path, tensors: Mapping[str, Tensor], names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in tensors]
    if missing:
        raise InputError(
            f"{path} lacks {', '.join(missing)}; it holds {', '.join(sorted(tensors)) or 'nothing'}"
        )


def _point(explainer: SAEExplainer) -> Any:
    return explainer.bridge.registry[explainer.split_point]


def _axes(explainer: SAEExplainer) -> list[str]:
    return str(_point(explainer).axes).split()


def _config(explainer: SAEExplainer) -> Any:
    return getattr(explainer.bridge.original_model, "config", None)


def _their_name(explainer: SAEExplainer) -> str:
    """The point's name in SAELens, where it has one."""
    point = _point(explainer)
    for name in (point.name, *point.aliases):
        if str(name).rpartition(".")[2] in _THEIR_NAMES:
            return str(name)
    return str(point.name)
