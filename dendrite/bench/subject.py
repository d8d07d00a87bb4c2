"""What is measured: a real model or a shape, on a device, in a dtype."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import AutoConfig, PreTrainedConfig

from dendrite.bench.shapes import WordlessTokenizer, config_of, random_model
from dendrite.engine.config import EngineConfig
from dendrite.engine.engine import Engine
from dendrite.engine.errors import ModelError
from dendrite.engine.models import checked_spec
from dendrite.engine.registry import ModelStore


@dataclass(frozen=True, slots=True)
class Subject:
    """A real `model` (as `Engine.load` takes it) or a `shape` with random weights: one of the two."""

    model: str | None = None
    shape: str | None = None
    device: str = "auto"
    """"auto", "cpu" or "cuda"."""
    dtype: str = "auto"
    """"auto", "float32" or "bfloat16"; for a shape, "auto" is "bfloat16"."""
    kv_memory: str | None = None
    """As `Engine.load` takes it."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.shape is None):
            raise ModelError("give a model or a shape: one of the two")

    @property
    def name(self) -> str:
        """For people."""
        return self.model or f"{self.shape} shape, random weights"

    def config(self) -> PreTrainedConfig:
        """Its configuration.

        Raises:
            ModelError: no such model or shape.
        """
        if self.shape is not None:
            return config_of(self.shape)
        path = ModelStore().locate(self.model or "").path
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True)
        return config

    @property
    def device_type(self) -> str:
        """What the device comes to: "cpu" or "cuda".

        Raises:
            ModelError: there is no GPU.
        """
        has_gpu = torch.cuda.is_available()
        if self.device == "cuda" and not has_gpu:
            raise ModelError("device 'cuda' was asked for, but PyTorch sees no CUDA device: use device='cpu'")
        return "cuda" if self.device == "cuda" or (self.device == "auto" and has_gpu) else "cpu"

    @contextmanager
    def engine(self) -> Iterator[Engine]:
        """An engine over it. At the end all that it held on the device is given back.

        Raises:
            ModelError, RequestError: as `Engine.load` does; no such shape.
        """
        engine = self._load() if self.shape is None else _of_shape(self.shape, self)
        try:
            with engine:
                yield engine
        finally:
            del engine
            _give_back()

    def _load(self) -> Engine:
        assert self.model is not None
        return Engine.load(self.model, dtype=self.dtype, device=self.device_type, kv_memory=self.kv_memory)


def _of_shape(shape: str, subject: Subject) -> Engine:
    dtype = "bfloat16" if subject.dtype == "auto" else subject.dtype
    config = EngineConfig.of(dtype=dtype, device=subject.device_type, kv_memory=subject.kv_memory)
    model = random_model(config_of(shape), dtype=dtype, device=torch.device(subject.device_type))
    spec = checked_spec(subject.name, model, dtype)
    eos = model.config.eos_token_id
    return Engine.of(model, spec, WordlessTokenizer(spec.vocab_size, frozenset([eos])), config)


def _give_back() -> None:
    """Return cached device memory, so that a peer that starts next finds it free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
