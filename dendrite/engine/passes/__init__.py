"""Passes over a loaded model that make its modules faster and leave what they compute as it is."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from dendrite.engine.passes.lean import make_lean
from dendrite.engine.passes.linear import can_pack, pack

__all__ = ["optimise"]


def optimise(model: PreTrainedModel) -> None:
    """Change the model in place for inference on the CPU; on other devices it stays as it is.

    Families that are recognised, layer by layer, get a lean forward of few operators. Every other linear layer gets
    prepacked weights. The original weights are freed as their replacements are made, so that a model is never in memory
    twice; an embedding that shares its weights with the head keeps them.
    """
    if model.device.type != "cpu":
        return
    make_lean(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and can_pack(child.weight):
                setattr(module, name, pack(child.weight, child.bias))
