"""What users may ask: defaults, what is taken, and refusals that name field, value and what is allowed."""

from typing import Any

import pytest
from pydantic import ValidationError

from dendrite.engine.config import EngineConfig, SamplingOptions, SamplingParams
from dendrite.engine.errors import RequestError


def test_defaults_are_greedy_and_change_nothing() -> None:
    """Every option may be left out, and every option has its place in the params."""
    params = SamplingParams.of()
    assert (params.max_tokens, params.temperature, params.top_p, params.repetition_penalty) == (256, 0.0, 1.0, 1.0)
    assert set(SamplingOptions.__annotations__) == set(SamplingParams.model_fields)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"temperature": -0.5}, ["temperature=-0.5", "0 (greedy) or more"]),
        ({"temperature": float("nan")}, ["temperature=nan"]),
        ({"temperature": float("inf")}, ["temperature=inf"]),
        ({"temperature": "warm"}, ["temperature='warm'"]),
        ({"max_tokens": 0}, ["max_tokens=0", "1 or more"]),
        ({"max_tokens": True}, ["max_tokens=True"]),
        ({"max_tokens": 2.5}, ["max_tokens=2.5"]),
        ({"min_tokens": -1}, ["min_tokens=-1"]),
        ({"min_tokens": 9, "max_tokens": 8}, ["min_tokens=9", "max_tokens=8"]),
        ({"top_k": -1}, ["top_k=-1"]),
        ({"top_p": 0.0}, ["top_p=0.0", "above 0"]),
        ({"top_p": 1.01}, ["top_p=1.01"]),
        ({"min_p": 1.5}, ["min_p=1.5"]),
        ({"repetition_penalty": 0.0}, ["repetition_penalty=0.0"]),
        ({"presence_penalty": 2.5}, ["presence_penalty=2.5", "-2 to 2"]),
        ({"frequency_penalty": -2.5}, ["frequency_penalty=-2.5"]),
        ({"logit_bias": {3: float("inf")}}, ["logit_bias={3: inf}", "-inf"]),
        ({"logit_bias": {3: float("nan")}}, ["logit_bias={3: nan}"]),
        ({"logit_bias": {-3: 1.0}}, ["logit_bias={-3: 1.0}"]),
        ({"stop": ["ok", ""]}, ["stop=['ok', '']", "none of them empty"]),
        ({"stop": 3}, ["stop=3"]),
        ({"stop_token_ids": [-1]}, ["stop_token_ids=[-1]"]),
        ({"stop_token_ids": "12"}, ["stop_token_ids='12'"]),
        ({"ignore_eos": "yes"}, ["ignore_eos='yes'"]),
        ({"top_logprobs": -1}, ["top_logprobs=-1"]),
        ({"seed": 0.5}, ["seed=0.5"]),
    ],
)
def test_a_refusal_names_the_field_the_value_and_what_is_allowed(options: SamplingOptions, words: list[str]) -> None:
    """Whatever cannot be run is told in the user's own terms."""
    with pytest.raises(RequestError) as refusal:
        SamplingParams.of(**options)
    assert all(word in str(refusal.value) for word in words)


def test_an_unknown_option_is_refused_with_the_closest_name() -> None:
    """A slip of the pen does not silently sample at the defaults."""
    with pytest.raises(RequestError, match="did you mean 'max_tokens'"):
        SamplingParams.of(max_token=5)  # type: ignore[call-arg]  # on purpose


def test_stop_is_always_a_tuple() -> None:
    """One string and a sequence of one are the same request."""
    assert SamplingParams.of(stop="\n") == SamplingParams.of(stop=["\n"])
    assert SamplingParams.of(stop="\n").stop == ("\n",)


def test_a_whole_number_is_a_fine_temperature() -> None:
    """`temperature=1` is what many people write."""
    assert SamplingParams.of(temperature=1).temperature == 1.0


def test_options_that_are_equal_and_not_of_one_type_are_told_apart() -> None:
    """What was checked for 1 says nothing of True."""
    assert SamplingParams.of(max_tokens=1, stop_token_ids=(1,)).max_tokens == 1
    with pytest.raises(RequestError, match="max_tokens=True"):
        SamplingParams.of(max_tokens=True, stop_token_ids=(1,))
    assert SamplingParams.of(max_tokens=1) is SamplingParams.of(max_tokens=1)
    with pytest.raises(RequestError, match="max_tokens=True"):
        SamplingParams.of(max_tokens=True)


def test_a_token_may_be_forbidden() -> None:
    """Minus infinity is the one infinity with a meaning."""
    assert SamplingParams.of(logit_bias={5: float("-inf")}).logit_bias == {5: float("-inf")}


def test_params_are_frozen_copies() -> None:
    """Neither the params nor what they were made of change a running request."""
    bias = {1: 2.0}
    params = SamplingParams.of(logit_bias=bias)
    bias[1] = 9.0
    with pytest.raises(ValidationError):
        params.temperature = 1.0  # type: ignore[misc]  # on purpose
    assert (params.logit_bias, params.temperature) == ({1: 2.0}, 0.0)


@pytest.mark.parametrize(
    "given, num_bytes",
    [(None, None), (4096, 4096), ("2GiB", 2 * 2**30), ("2 gib", 2 * 2**30), ("1.5MB", 1_500_000), ("512", 512)],
)
def test_memory_is_bytes_or_a_string_with_a_unit(given: int | str | None, num_bytes: int | None) -> None:
    """Binary and decimal units, in either case."""
    assert EngineConfig.of(kv_memory=given).kv_memory == num_bytes


@pytest.mark.parametrize(
    "setting, words",
    [
        ({"kv_memory": "lots"}, ["kv_memory='lots'", "2GiB"]),
        ({"kv_memory": 0}, ["kv_memory=0"]),
        ({"kv_memory": "0GB"}, ["kv_memory='0GB'"]),
        ({"block_size": 0}, ["block_size=0", "1 to 256"]),
        ({"block_size": 257}, ["block_size=257"]),
        ({"dtype": "int4"}, ["dtype='int4'", "bfloat16"]),
        ({"device": "tpu"}, ["device='tpu'", "cuda:1"]),
        ({"seed": "x"}, ["seed='x'"]),
        ({"deterministic": 1}, ["deterministic=1", "True or False"]),
        ({"integrity": "yes"}, ["integrity='yes'", "canary"]),
        ({"prefill_chunk": 0}, ["prefill_chunk=0"]),
    ],
)
def test_an_engine_setting_is_refused_in_the_same_way(setting: dict[str, Any], words: list[str]) -> None:
    """A setting out of range is named, with what is allowed."""
    with pytest.raises(RequestError) as refusal:
        EngineConfig.of(**setting)
    assert all(word in str(refusal.value) for word in words)
