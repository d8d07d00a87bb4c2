"""What a chat model's settings and a call's keywords come to: one checked `CallOptions`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import cast, get_type_hints

from dendrite.engine.config import SamplingOptions, SamplingParams
from dendrite.engine.errors import RequestError
from dendrite.integrations.langchain.bound_tools import BoundTools
from dendrite.integrations.langchain.response_format import structured_response

_REMOTE = frozenset({"api_key", "base_url", "organization", "max_retries", "default_headers", "http_client"})
"""What models behind a server take: here is no server, so code that is moved over may go on giving them."""

_SAMPLING = frozenset(get_type_hints(SamplingOptions)) - {"seed"}
_OF_CALL = frozenset(
    {"n", "seed", "timeout", "logprobs", "tools", "tool_choice", "parallel_tool_calls", "response_format"}
)
SETTINGS = (
    *sorted(_SAMPLING - {"constraint", "fast_forward", "min_tokens", "stop_token_ids", "ignore_eos"}),
    "logprobs",
    "n",
    "seed",
    "timeout",
)
"""Fields of a chat model that decide its calls."""
_FOR_LANGCHAIN = frozenset({"stream", "model", "strict", *_REMOTE})


@dataclass(frozen=True, slots=True)
class CallOptions:
    """What one call asks for, checked."""

    n: int
    seed: int | None
    timeout: float | None
    sampling: SamplingOptions
    with_logprobs: bool
    tools: BoundTools | None
    instruction: str
    """Told to the model in the system turn."""


def remote_only(values: Mapping[str, object]) -> dict[str, object]:
    """The settings without those that only a model behind a server has."""
    return {name: value for name, value in values.items() if name not in _REMOTE}


def call_options(
    settings: Mapping[str, object], stop: Sequence[str] | None, given: Mapping[str, object]
) -> CallOptions:
    """A chat model's settings with what a call gives in their place.

    Raises:
        RequestError: an unknown keyword, or a value out of range.
        ConstraintError: a schema that cannot be compiled.
    """
    for name in given:
        if name not in _SAMPLING | _OF_CALL | _FOR_LANGCHAIN:
            close = get_close_matches(name, _SAMPLING | _OF_CALL, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"calls take {', '.join(sorted(_SAMPLING | _OF_CALL))}"
            raise RequestError(f"{name!r} is no option of a call: {hint}")
    asked = {**settings, **{name: value for name, value in given.items() if value is not None}}
    if stop is not None:
        asked["stop"] = stop
    n = asked["n"]
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise RequestError(f"n={n!r} cannot be used: give a whole number, 1 or more")
    timeout = asked.get("timeout")
    if timeout is not None and (not isinstance(timeout, int | float) or timeout <= 0):
        raise RequestError(f"timeout={timeout!r} cannot be used: give seconds, above 0, or None")
    with_logprobs = bool(asked.get("logprobs"))
    sampling = {name: value for name, value in asked.items() if name in _SAMPLING}
    if not with_logprobs:
        sampling["top_logprobs"] = 0
    else:
        sampling["fast_forward"] = False  # a forced token that is drawn has a log-probability like any other
    sampling["stop"] = sampling.get("stop") or ()
    response = structured_response(asked.get("response_format"))
    if response.constraint is not None:
        sampling["constraint"] = response.constraint
    checked = cast("SamplingOptions", sampling)
    SamplingParams.of(**checked)
    return CallOptions(
        n=n,
        seed=cast("int | None", asked.get("seed")),
        timeout=timeout,
        sampling=checked,
        with_logprobs=with_logprobs,
        tools=BoundTools.of(asked.get("tools"), asked.get("tool_choice"), asked.get("parallel_tool_calls")),
        instruction=response.instruction,
    )
