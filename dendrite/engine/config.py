"""Frozen, validated settings: what a user may ask of a generation and of an engine.

Both models are built with `of(...)`, which turns every refusal into one `RequestError` that names the field, the value
and what is allowed.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self, TypedDict, Unpack

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, ValidationError, field_validator, model_validator

from dendrite.engine.constraints import Constraint
from dendrite.engine.errors import RequestError

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
Integrity = Literal["off", "canary", "checksum"]


class SamplingOptions(TypedDict, total=False):
    """The keywords of every generating call; each is optional."""

    max_tokens: int
    """Most tokens to generate, 1 or more; 256."""
    min_tokens: int
    """Fewest tokens before the model may end the text; 0."""
    temperature: float
    """0 takes the most likely token; 1 samples the model's own distribution; 0.0."""
    top_k: int
    """Sample from the k most likely tokens only; 0 is off."""
    top_p: float
    """Sample from the smallest set of likely tokens that holds this much probability; 1.0 is off."""
    min_p: float
    """Drop tokens less likely than this fraction of the most likely one; 0.0 is off."""
    repetition_penalty: float
    """Divides the logits of tokens already in the prompt or output (Keskar et al., 2019); 1.0 is off."""
    presence_penalty: float
    """Subtracted from the logits of tokens already generated, -2 to 2; 0.0 is off."""
    frequency_penalty: float
    """Subtracted once for each time a token was generated, -2 to 2; 0.0 is off."""
    logit_bias: Mapping[int, float]
    """Added to the logits of these token ids; `-inf` forbids a token."""
    stop: str | Sequence[str]
    """Strings that end the generation; they are not part of its text."""
    stop_token_ids: Sequence[int]
    """Token ids that end the generation, beside the model's own end-of-text tokens."""
    ignore_eos: bool
    """Go on past the model's end-of-text tokens."""
    top_logprobs: int
    """How many of the most likely tokens to report with their log-probabilities, at each step; 0."""
    seed: int | None
    """Draw from this seed instead of the branch's own randomness."""
    constraint: Constraint | Literal["continue"] | None
    """What the whole text must match; "continue" goes on where `max_tokens` ended the branch's last constrained one."""
    fast_forward: bool
    """Append tokens that the constraint forces without running the model for each (True); False draws them one by one,
    which gives the same tokens, and their log-probabilities with them."""


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    kind: ClassVar[str]

    @classmethod
    def _checked(cls, options: Mapping[str, object]) -> Self:
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            raise RequestError(cls._refusal(options, error)) from None

    @classmethod
    def _refusal(cls, options: Mapping[str, object], error: ValidationError) -> str:
        first = error.errors(include_url=False)[0]
        own_words = first.get("ctx", {}).get("error")
        if not first["loc"]:
            return str(own_words)
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            close = difflib.get_close_matches(name, cls.model_fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the options are {', '.join(cls.model_fields)}"
            return f"{name!r} is not {cls.kind}: {hint}"
        allowed = own_words or cls.model_fields[name].description
        return f"{name}={options[name]!r} cannot be used: {allowed}"


class SamplingParams(_Settings):
    """Validated `SamplingOptions`; equal options make equal params."""

    kind: ClassVar[str] = "a sampling option"

    max_tokens: int = Field(256, ge=1, description="give a whole number, 1 or more")
    min_tokens: int = Field(0, ge=0, description="give a whole number, 0 or more")
    temperature: float = Field(0.0, ge=0, description="give a finite number, 0 (greedy) or more")
    top_k: int = Field(0, ge=0, description="give a whole number, 1 or more, or 0 to keep all tokens")
    top_p: float = Field(1.0, gt=0, le=1, description="give a number above 0 and up to 1 (1 keeps all tokens)")
    min_p: float = Field(0.0, ge=0, le=1, description="give a number from 0 (keeps all tokens) to 1")
    repetition_penalty: float = Field(1.0, gt=0, description="give a finite number above 0 (1 is off)")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="give a number from -2 to 2 (0 is off)")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="give a number from -2 to 2 (0 is off)")
    logit_bias: Mapping[Annotated[int, Field(ge=0)], Annotated[float, Field(allow_inf_nan=True)]] = Field(
        default_factory=dict, description="give a mapping of token ids (0 or more) to finite numbers or -inf"
    )
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="give a string or a sequence of strings, none of them empty"
    )
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="give a sequence of token ids, 0 or more each"
    )
    ignore_eos: bool = Field(False, description="give True or False")
    top_logprobs: int = Field(0, ge=0, description="give a whole number, 0 or more")
    seed: int | None = Field(None, description="give a whole number, or None for the branch's own randomness")
    constraint: InstanceOf[Constraint] | Literal["continue"] | None = Field(
        None, description='give a dd.Constraint(schema=, regex=, grammar= or choices=), "continue", or None'
    )
    fast_forward: bool = Field(True, description="give True or False")

    @classmethod
    def of(cls, **options: Unpack[SamplingOptions]) -> Self:
        """Check `options` and freeze them.

        Raises:
            RequestError: an unknown option or a value out of range; names both and what is allowed.
        """
        # Only what a key tells apart: that of a sequence knows nothing of the types of what it holds.
        if _SCALARS.issuperset(map(type, options.values())):
            return cls._checked_scalars(**options)
        return cls._checked(options)

    @classmethod
    @lru_cache(maxsize=256, typed=True)
    def _checked_scalars(cls, **options: Unpack[SamplingOptions]) -> Self:
        """Most calls have options that one of the last had; checking them again takes longer than a fork."""
        return cls._checked(options)

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_or_several(cls, value: object) -> object:
        if isinstance(value, str):
            return (value,)
        return tuple(value) if isinstance(value, Sequence) else value

    @field_validator("stop_token_ids", mode="before")
    @classmethod
    def _token_ids_as_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value

    @field_validator("logit_bias")
    @classmethod
    def _no_infinite_favour(cls, value: Mapping[int, float]) -> Mapping[int, float]:
        if any(math.isnan(bias) or bias == math.inf for bias in value.values()):
            raise ValueError(str(cls.model_fields["logit_bias"].description))
        return value

    @model_validator(mode="after")
    def _min_within_max(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} cannot be used: it is more than max_tokens={self.max_tokens}"
            )
        return self


_SCALARS = frozenset((int, float, bool, str, type(None)))

_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)


class EngineConfig(_Settings):
    """How an engine is set up; frozen for its life."""

    kind: ClassVar[str] = "an engine setting"

    dtype: DtypeName = Field("auto", description='give "auto", "float32", "bfloat16" or "float16"')
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description='give "auto", "cpu", "cuda" or "cuda:1"'
    )
    kv_memory: int | None = Field(None, ge=1, description='give bytes as a whole number, a string like "2GiB", or None')
    swap_memory: int | None = Field(
        None, ge=0, description='give bytes as a whole number, a string like "2GiB", or None'
    )
    """Host memory for the K/V of idle branches that have left the pool; None is four pools, if there is that much."""
    swap_disk: int = Field(0, ge=0, description='give bytes as a whole number or a string like "2GiB"; 0 is off')
    """Disk for what does not fit there."""
    swap_folder: Path | None = Field(None, description="give a folder that exists, or None for the system's own")
    block_size: int = Field(16, ge=1, le=256, description="give a whole number of tokens from 1 to 256")
    seed: int = Field(0, description="give a whole number")
    deterministic: bool = Field(False, description="give True or False")
    """Whether a branch's logits must not depend on company; see `engine/invariance.py`."""
    prefix_cache: Path | None = Field(None, description="give a folder, which is made if it is missing, or None")
    """Where prefixes are kept for later processes."""
    prefix_cache_size: int = Field(4 << 30, ge=1, description='give bytes as a whole number or a string like "2GiB"')
    """Bytes of files there; the least recently used go first."""
    integrity: Integrity = Field("off", description='give "off", "canary" or "checksum"')
    """What is checked of the K/V that steps read; see `engine/integrity.py`."""
    prefill_chunk: int | None = Field(None, ge=1, description="give a whole number of tokens, 1 or more, or None")
    """Most prompt tokens computed in one step, so that a long prompt does not stall branches that decode; None is what
    suits the device."""

    @classmethod
    def of(
        cls,
        *,
        dtype: str = "auto",
        device: str = "auto",
        kv_memory: int | str | None = None,
        swap_memory: int | str | None = None,
        swap_disk: int | str = 0,
        swap_folder: Path | None = None,
        block_size: int = 16,
        seed: int = 0,
        deterministic: bool = False,
        integrity: str = "off",
        prefix_cache: Path | str | None = None,
        prefix_cache_size: int | str = "4GiB",
        prefill_chunk: int | None = None,
    ) -> Self:
        """Check the settings and freeze them; memory is in bytes or a string such as `"2GiB"` or `"500MB"`.

        Raises:
            RequestError: a value out of range, or one that this version does not offer yet.
        """
        return cls._checked(
            {
                "dtype": dtype,
                "device": device,
                "kv_memory": kv_memory,
                "swap_memory": swap_memory,
                "swap_disk": swap_disk,
                "swap_folder": swap_folder,
                "block_size": block_size,
                "seed": seed,
                "deterministic": deterministic,
                "integrity": integrity,
                "prefix_cache": Path(prefix_cache).expanduser() if isinstance(prefix_cache, str) else prefix_cache,
                "prefix_cache_size": prefix_cache_size,
                "prefill_chunk": prefill_chunk,
            }
        )

    @field_validator("swap_folder")
    @classmethod
    def _folder_exists(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_dir():
            raise ValueError(str(cls.model_fields["swap_folder"].description))
        return value

    @field_validator("kv_memory", "swap_memory", "swap_disk", "prefix_cache_size", mode="before")
    @classmethod
    def _bytes_of(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        match = _MEMORY.fullmatch(value.strip())
        if match is None:
            return value
        number, unit = match[1], (match[2] or "").upper()
        base = 1024 if unit.endswith("I") else 1000
        return int(float(number) * base ** " KMGT".index(unit[:1] or " "))
