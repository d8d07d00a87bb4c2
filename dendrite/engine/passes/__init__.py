"""Passes over a loaded model that make its modules faster and leave what they compute as it is."""

from __future__ import annotations

from importlib.util import find_spec

from torch import nn
from transformers import PreTrainedModel

from dendrite.engine.openmp import dismiss_team
from dendrite.engine.passes.lean import make_lean
from dendrite.engine.passes.linear import FastLinear, can_pack, pack

__all__ = ["optimise"]


def optimise(model: PreTrainedModel, *, steady: bool = False) -> None:
    """Change the model in place for inference on the CPU or on a CUDA device; elsewhere it stays as it is.

    Families that are recognised, layer by layer, get a lean forward of few operators or kernels. On the CPU every other
    linear layer gets prepacked weights. The original weights are freed as their replacements are made, so that a model
    is never in memory twice; an embedding that shares its weights with the head keeps them.

    Args:
        model: loaded, in eval mode.
        steady: on the CPU, see to it that no number of rows changes the bits of a row (`passes.steady`).
    """
    if model.device.type == "cpu":
        make_lean(model, steady=steady)
        _pack_linears(model, steady=steady)
    elif model.device.type == "cuda" and find_spec("triton") is not None:
        from dendrite.engine.passes.fused import make_fused  # noqa: PLC0415 - only machines with a GPU have Triton

        make_fused(model)


def _pack_linears(model: PreTrainedModel, *, steady: bool) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and can_pack(child.weight):
                setattr(module, name, FastLinear(pack(child.weight, child.bias, steady=steady)))
    dismiss_team()  # of the thread that loads: the steps' own would be one team too many
