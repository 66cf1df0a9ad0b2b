"""The modules of a model by what they are, for code written against inteprelens's adapters."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..bridge import TransformerBridge
from ..hooks import AbsentPointError, ArchitectureError
from .sites import layer_index


class ModelAdapter:
    """Where the parts of a model are; any architecture has one.

    Args:
        model: A bridge, or a model to wrap.
    """

    def __init__(self, model: TransformerBridge | nn.Module) -> None:
        self.bridge = model if isinstance(model, TransformerBridge) else TransformerBridge(model)

    @property
    def num_layers(self) -> int:
        """How many layers the main tower has."""
        return len(self.bridge.architecture.blocks)

    @property
    def num_heads(self) -> int | None:
        """Query heads of a layer; None where layers have no attention."""
        return self.bridge.cfg.n_heads

    @property
    def head_dim(self) -> int | None:
        """Width of a head; None where layers have no attention."""
        return self.bridge.cfg.d_head

    @property
    def hidden_size(self) -> int | None:
        """Width of the residual stream."""
        return self.bridge.cfg.d_model

    def get_layers(self) -> list[nn.Module]:
        """The layers, in order."""
        return [self._module(block.path) for block in self.bridge.architecture.blocks]

    def get_layer(self, layer: int) -> nn.Module:
        """One layer; negative counts from the end."""
        return self.get_layers()[layer_index(layer, self.bridge)]

    def get_attention_module(self, layer: int) -> nn.Module:
        """The attention of a layer."""
        return self._module(self._attention(layer).path)

    def get_o_proj(self, layer: int) -> nn.Module:
        """The output projection of a layer's attention."""
        path = self._attention(layer).o
        if path is None:
            raise AbsentPointError(f"the attention of layer {layer} has no output projection")
        return self._module(path)

    get_attention_output_proj = get_o_proj

    def get_pre_attention_norm(self, layer: int) -> nn.Module:
        """The norm that a layer's attention reads from."""
        return self._norm(layer, "attn")

    def get_pre_mlp_norm(self, layer: int) -> nn.Module:
        """The norm that a layer's MLP reads from."""
        return self._norm(layer, "mlp")

    def get_mlp(self, layer: int) -> nn.Module:
        """The MLP (or experts) of a layer."""
        part = self._block(layer).mlp
        if part is None:
            raise AbsentPointError(f"layer {layer} has no MLP: {self._block(layer).kind}")
        if part.path is None:
            raise AbsentPointError(
                f"the MLP of layer {layer} is no module of its own in this model"
            )
        return self._module(part.path)

    def get_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self._named(self.bridge.architecture.main.embed, "token embedding")

    def get_final_norm(self) -> nn.Module:
        """The norm behind the last layer."""
        norm = self.bridge.architecture.main.ln_final
        return self._named(None if norm is None else norm.path, "final norm")

    def get_lm_head(self) -> nn.Module:
        """The head."""
        return self._named(self.bridge.architecture.unembed, "head")

    def _block(self, layer: int) -> Any:
        return self.bridge.architecture.blocks[layer_index(layer, self.bridge)]

    def _attention(self, layer: int) -> Any:
        part = self._block(layer).attn
        if part is None:
            raise AbsentPointError(f"layer {layer} has no attention: {self._block(layer).kind}")
        return part

    def _norm(self, layer: int, branch: str) -> nn.Module:
        found = self._block(layer).branch(branch)
        if found is None or found.ln is None or found.place != "before":
            why = self._block(layer).kind if found is None else "no norm stands before it"
            raise AbsentPointError(f"layer {layer} has no norm before {branch}: {why}")
        return self._module(found.ln.path)

    def _named(self, path: str | None, what: str) -> nn.Module:
        if path is None:
            raise ArchitectureError(f"{type(self.bridge.original_model).__name__} has no {what}")
        return self._module(path)

    def _module(self, path: str) -> nn.Module:
        return self.bridge.unwrapped_model.get_submodule(path)


def get_adapter(model: TransformerBridge | nn.Module) -> ModelAdapter:
    """The adapter of a model: ``get_layers()``, ``get_attention_module(layer)``, ``get_mlp(layer)``, ...

    Args:
        model: A bridge, or any transformers model.
    """
    return ModelAdapter(model)
