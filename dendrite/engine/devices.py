"""Which runner and head a model gets, by the device it is on. What only a GPU needs is imported only for one."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

from transformers import PreTrainedModel

from dendrite.engine.attention.cpu import TreeAttention
from dendrite.engine.attention.reference import ReferenceAttention
from dendrite.engine.config import EngineConfig
from dendrite.engine.head import Head
from dendrite.engine.runner import Runner, TorchRunner
from dendrite.engine.spec import ModelSpec


def runner_and_head(model: PreTrainedModel, spec: ModelSpec, config: EngineConfig) -> tuple[Runner, Head]:
    """The parts that run the model where it is.

    On a CUDA device that the kernels do not fit, the model runs on plain modules and the reference attention, with a
    warning that says why: right, but far from fast.

    Raises:
        RequestError: `kv_memory` or `block_size` is too small for a single block, or more than is free.
        ModelError: the device's memory is too small.
    """
    if model.device.type == "cuda":
        reason = _why_no_kernels(spec)
        if reason is None:
            from dendrite.engine.cuda_runner import CudaRunner  # noqa: PLC0415
            from dendrite.engine.device_head import DeviceHead  # noqa: PLC0415

            device_runner = CudaRunner(model, spec, kv_memory=config.kv_memory, block_size=config.block_size)
            return device_runner, DeviceHead(device_runner)
        warnings.warn(f"{spec.name} runs on {model.device} without Dendrite's kernels: {reason}", stacklevel=3)
    attention = TreeAttention if model.device.type == "cpu" else ReferenceAttention
    runner = TorchRunner(model, spec, kv_memory=config.kv_memory, block_size=config.block_size, attention=attention)
    return runner, Head(runner)


def _why_no_kernels(spec: ModelSpec) -> str | None:
    """Why the tree kernel cannot run this model here; None if it can."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    from dendrite.engine.attention.triton_tree import why_unsupported  # noqa: PLC0415

    return why_unsupported(spec)
