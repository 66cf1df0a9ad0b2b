"""What structure and a watched run do not tell: words for towers and for the insides of mixers, and the rows.

A *row* says where something is in a class of models for which it cannot be found out. Nearly every model does
without: a name here is a fact, not a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..hooks import InputError

VISION = ("vision", "visual", "image", "video", "vit", "pixel", "vq")
AUDIO = ("audio", "speech", "sound", "wave")
"""Parts of a path that lead to another tower than the text model's."""

GENERIC = (
    "layer",
    "layers",
    "block",
    "blocks",
    "h",
    "encoder",
    "decoder",
    "model",
    "transformer",
    "backbone",
)
"""Words of a path that tell no tower from another."""

NOT_LAYERS = ("merger", "upsample", "vqmodel")
"""Lists that are no stack of layers, though they look like one."""

POSITIONS = ("pos", "wpe")
"""Parts of a path that say an embedding is one of positions, not of segments or languages."""

PROJECTORS = (
    "multi_modal_projector",
    "multimodal_projector",
    "projector",
    "connector",
    "mm_projector",
    "embed_vision",
    "embed_audio",
    "modality_projection",
    "language_projection",
    "visual_projection",
    "text_projection",
    "aligner",
    "merger",
    "audio_projection",
)

MIXER_PARTS: dict[str, tuple[str, ...]] = {
    "in": ("in_proj", "in_proj_qkvz", "in_proj_qkv", "linear_x", "qkv_proj", "input_linear"),
    "z": ("in_proj_z", "linear_y", "z_proj"),
    "gate": ("gate", "g_proj", "output_gate", "ogate_preact"),
    "ba": ("in_proj_ba",),
    "b": ("in_proj_b", "b_proj"),
    "a": ("in_proj_a", "a_proj"),
    "conv": ("conv1d", "conv_1d", "conv", "short_conv"),
    "q": ("q_proj", "query", "q", "receptance"),
    "k": ("k_proj", "key", "k"),
    "v": ("v_proj", "value", "v"),
    "x": ("x_proj",),
    "dt": ("dt_proj",),
    "norm": ("norm", "inner_norm", "o_norm", "g_norm", "layer_norm"),
    "out": ("out_proj", "o_proj", "output", "linear_out", "dense"),
}
"""The layers inside a state-space, recurrent or linear-attention module."""

MIXERS = (
    "mixer",
    "mamba",
    "ssm",
    "linear_attn",
    "temporal",
    "conv",
    "token_mixer",
    "recurrent",
    "attention",
)
"""Parts of a name that say positions are mixed, where the run does not show it (loops over positions)."""

ROLES = ("blocks", "embed", "pos_embed", "ln_final", "unembed")
ROWS: dict[str, dict[str, str]] = {
    # Attention, norms and MLPs stand in four lists of their own; there is no module that is a layer.
    "XLMPreTrainedModel": {"blocks": ""},
    "FlaubertPreTrainedModel": {"blocks": ""},
}
"""Class name of a model -> role -> path of the module. ``blocks`` is the list of layers, or a glob over paths
where they are in none (``"trunk.cell_*"``); empty where no module is a layer."""


def add_row(class_name: str, **roles: str) -> None:
    """Say where parts of a class of models are, for what a watched run cannot tell.

    Args:
        class_name: Name of the model's class, or of one it derives from.
        **roles: Path by role: ``blocks``, ``embed``, ``pos_embed``, ``ln_final``, ``unembed``.
    Raises:
        InputError: An unknown role.

    Example::

        add_row("CellModelForCausalLM", blocks="trunk.cell_*")
    """
    unknown = [role for role in roles if role not in ROLES]
    if unknown:
        raise InputError(f"unknown role {unknown[0]!r}; the roles are {', '.join(ROLES)}")
    ROWS[class_name] = dict(roles)


def row_of(model: Any) -> Mapping[str, str]:
    """The row of a model's class, or of a class it derives from."""
    for kind in type(model).__mro__:
        if kind.__name__ in ROWS:
            return ROWS[kind.__name__]
    return {}
