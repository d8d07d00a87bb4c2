"""Which runner and head a model gets, by the device it is on. What only a GPU needs is imported only for one."""

from __future__ import annotations

import warnings
from functools import partial
from importlib.util import find_spec

from transformers import PreTrainedModel

from dendrite.engine.attention.base import AttentionBackend
from dendrite.engine.attention.cpu import TreeAttention
from dendrite.engine.attention.ordered import OrderedAttention
from dendrite.engine.attention.reference import ReferenceAttention
from dendrite.engine.config import EngineConfig
from dendrite.engine.errors import RequestError
from dendrite.engine.graphs import MAX_ROWS
from dendrite.engine.head import Head
from dendrite.engine.passes.families import is_recognised
from dendrite.engine.progress import ConsoleReport
from dendrite.engine.registry import cache_folder
from dendrite.engine.runner import Runner, TorchRunner
from dendrite.engine.spec import ModelSpec


def runner_and_head(model: PreTrainedModel, spec: ModelSpec, config: EngineConfig) -> tuple[Runner, Head]:
    """The parts that run the model where it is.

    On a CUDA device that the kernels do not fit, the model runs on plain modules and the reference attention, with a
    warning that says why: right, but far from fast.

    Raises:
        RequestError: `kv_memory` or `block_size` is too small for a single block, or more than is free; or
            `deterministic` where it is not made for the device or the model's family.
        ModelError: the device's memory is too small, or this machine cannot keep what `deterministic` promises.
    """
    if config.deterministic:
        _check_deterministic(model, spec)
    if model.device.type == "cuda":
        reason = _why_no_kernels(spec)
        if reason is None:
            from dendrite.engine.attention.choosing import device_attention  # noqa: PLC0415 - needs Triton
            from dendrite.engine.cuda_runner import CudaRunner  # noqa: PLC0415 - needs Triton
            from dendrite.engine.device_head import DeviceHead  # noqa: PLC0415 - needs Triton

            device_runner = CudaRunner(
                model,
                spec,
                kv_memory=config.kv_memory,
                block_size=config.block_size,
                attention=partial(
                    device_attention,
                    captured_rows=MAX_ROWS,
                    folder=cache_folder() / "attention",
                    say=ConsoleReport().say,
                ),
            )
            return device_runner, DeviceHead(device_runner)
        warnings.warn(f"{spec.name} runs on {model.device} without Dendrite's kernels: {reason}", stacklevel=3)
    attention: type[AttentionBackend] = TreeAttention if model.device.type == "cpu" else ReferenceAttention
    runner = TorchRunner(
        model,
        spec,
        kv_memory=config.kv_memory,
        block_size=config.block_size,
        attention=OrderedAttention if config.deterministic else attention,
        steady=config.deterministic,
    )
    return runner, Head(runner)


def _check_deterministic(model: PreTrainedModel, spec: ModelSpec) -> None:
    if model.device.type != "cpu":
        raise RequestError(
            f"deterministic=True runs on the CPU only, and {spec.name} is on {model.device}: use device='cpu', or "
            "leave it off (docs/determinism-and-randomness.md says what holds without it)"
        )
    if not is_recognised(model.get_decoder()):
        raise RequestError(
            f"deterministic=True is made for Llama, Mistral, Qwen2 and Qwen3 and models that share their code, and "
            f"{spec.name} is none of them ({model.config.model_type}): leave it off"
        )


def _why_no_kernels(spec: ModelSpec) -> str | None:
    """Why the tree kernel cannot run this model here; None if it can."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    from dendrite.engine.attention.triton_tree import why_unsupported  # noqa: PLC0415 - needs Triton

    return why_unsupported(spec)
