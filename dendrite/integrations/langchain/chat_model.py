"""`ChatDendrite`: an engine of this process as a LangChain chat model."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from types import TracebackType
from typing import Any, Self, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LangSmithParams, LanguageModelInput
from langchain_core.language_models.model_profile import ModelProfile
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from dendrite.engine.engine import Engine
from dendrite.engine.errors import RequestError
from dendrite.engine.generation import Generation
from dendrite.integrations.engines import ENGINES, EngineSettings, Lease
from dendrite.integrations.langchain import structured
from dendrite.integrations.langchain.batches import BatchedChatModel
from dendrite.integrations.langchain.bound_tools import BoundTools
from dendrite.integrations.langchain.calls import Calls
from dendrite.integrations.langchain.opened import OpenedEngines
from dendrite.integrations.langchain.options import SETTINGS, CallOptions, call_options, remote_only
from dendrite.integrations.langchain.response_format import structured_response
from dendrite.integrations.langchain.structured import Schema


class ChatDendrite(BatchedChatModel):
    """A chat model that runs in this process, for everything that takes one.

        chat = ChatDendrite(model="smollm2-135m-instruct", temperature=0.8)
        chat.invoke("Name a fruit.").content
        chat.generate([[HumanMessage("Name a fruit.")]], n=8)      # one prefill, eight forks

    Models of equal name and settings share one engine, loaded with the first call. Tokens that the model generated
    stay with its messages, and a conversation that goes on computes only what is new: `usage_metadata` has it as
    `cache_read`.

    Options of `SamplingOptions` and those below may be given to every call too: `chat.invoke(messages, seed=3)`.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", populate_by_name=True)

    model: str = "smollm2-135m-instruct"
    """Registry name, hub id, folder, or a name that was given to `register_engine`."""
    engine: Engine | None = Field(default=None, exclude=True)
    """An engine of yours to run on; it stays yours to close. `model` is then its name."""
    dtype: str = "auto"
    device: str = "auto"
    kv_memory: int | str | None = None

    n: int = Field(default=1, ge=1)
    """Answers a call; all of them in `generate`, the first in `invoke`."""
    temperature: float = 0.7
    max_tokens: int = 512
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = Field(default_factory=dict)
    stop: list[str] | None = Field(default=None, alias="stop_sequences")
    seed: int | None = None
    """Equal seeds and prompts give equal answers; without one each call differs."""
    logprobs: bool = False
    """Whether `response_metadata["logprobs"]` tells each token's log-probability."""
    top_logprobs: int = 0
    """How many of the likeliest tokens to tell with each; needs `logprobs=True`."""
    timeout: float | None = None
    """Seconds until a call is ended with a `TimeoutError`."""
    streaming: bool = False
    """Whether `invoke` streams to callbacks as well."""

    _opened: OpenedEngines = PrivateAttr(default_factory=OpenedEngines)

    @model_validator(mode="before")
    @classmethod
    def _without_remote_settings(cls, values: object) -> object:
        return remote_only(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        if self.engine is not None:
            self.model = self.engine.name
        self._options_of(None, {})
        return self

    # --- the engine --------------------------------------------------------------------------------------------

    def open(self) -> Engine:
        """The engine this model runs on, loaded now if it is not yet.

        Raises:
            ModelError: there is no such model, or it cannot be loaded.
        """
        return self._calls_on(None).engine

    def close(self) -> None:
        """Let the engine go; it is closed if it was loaded by name and nobody else has it.

        The next call opens it again.
        """
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __copy__(self) -> Self:
        copied = super().__copy__()
        copied._opened = copy.copy(self._opened)  # noqa: SLF001 - of the same class
        return copied

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        # Both run on an engine that was given: there is no copying one.
        return super().__deepcopy__({**(memo or {}), id(self.engine): self.engine})

    def _calls_on(self, model: object) -> Calls:
        """This model's calls, or those on another engine that a call named."""
        if model is not None and not isinstance(model, str):
            raise RequestError(f"model={model!r} cannot be used: give a name")
        name = model or self.model
        with self._opened.lock:
            found = self._opened.get(name)
            if found is None:
                found = self._opened.add(name, self._take_lease(name))
                if name == self.model:
                    self._complete_profile(found.engine)
            return found

    def _take_lease(self, model: str) -> Lease:
        if self.engine is not None and model == self.engine.name:
            return Lease(self.engine, None)
        return ENGINES.lease(EngineSettings(model, self.dtype, self.device, self.kv_memory))

    def _complete_profile(self, engine: Engine) -> None:
        if self.profile is not None and "max_input_tokens" not in self.profile:
            self.profile = {**self.profile, "max_input_tokens": engine.spec.context_length}

    async def _acalls_on(self, model: object) -> Calls:
        """`_calls_on` beside the event loop, where an engine may have to be loaded."""
        found = self._opened.get(model or self.model) if model is None or isinstance(model, str) else None
        return await asyncio.to_thread(self._calls_on, model) if found is None else found

    # --- calls -------------------------------------------------------------------------------------------------

    def _options_of(self, stop: Sequence[str] | None, given: Mapping[str, object]) -> CallOptions:
        return call_options({name: getattr(self, name) for name in SETTINGS}, stop, given)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        options = self._options_of(stop, kwargs)
        calls = self._calls_on(kwargs.get("model"))
        with calls.open(messages, options) as running:
            generations = calls.engine.generate(running.branches, **running.sampling)
            return running.answers.result(generations)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        options = self._options_of(stop, kwargs)
        calls = await self._acalls_on(kwargs.get("model"))
        with calls.open(messages, options) as running:
            generations = await calls.engine.agenerate(running.branches, **running.sampling)
            return running.answers.result(generations)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        options = _single(self._options_of(stop, kwargs))
        calls = self._calls_on(kwargs.get("model"))
        ended: list[Generation] = []
        with calls.open(messages, options) as running:
            answer = running.answers.streamed()
            (branch,) = running.branches
            pieces = calls.engine.stream(branch, on_end=ended.append, **running.sampling)
            with closing(pieces):
                for piece in pieces:
                    yield from answer.feed(piece)
            yield from answer.finish(ended[0])

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        options = _single(self._options_of(stop, kwargs))
        calls = await self._acalls_on(kwargs.get("model"))
        ended: list[Generation] = []
        with calls.open(messages, options) as running:
            answer = running.answers.streamed()
            (branch,) = running.branches
            async with aclosing(calls.engine.astream(branch, on_end=ended.append, **running.sampling)) as pieces:
                async for piece in pieces:
                    for chunk in answer.feed(piece):
                        yield chunk
            for chunk in answer.finish(ended[0]):
                yield chunk

    def _streaming_disabled(self, **kwargs: object) -> bool:
        """Several answers do not stream by themselves, so that `invoke` and `generate` work wherever they are called.

        An explicit `stream()` passes `stream=True` and is told by `_stream` what to do instead.
        """
        n = kwargs.get("n") or self.n
        return super()._streaming_disabled(**kwargs) or (n != 1 and not kwargs.get("stream"))

    # --- tools and schemas -------------------------------------------------------------------------------------

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """The model with tools it may call, or must.

        Calls cannot be malformed: a grammar made of the tools' schemas lets the model write nothing else.

        Args:
            tools: functions, LangChain tools, pydantic models or OpenAI's dicts.
            tool_choice: "auto" lets the model choose between text and calls, "any" makes it call one of the tools, a
                tool's name makes it call that one, "none" forbids calls.
            parallel_tool_calls: whether an answer may hold several calls; without it a free answer may, and a forced
                one is a single call.
            kwargs: further keywords of the call.

        Raises:
            RequestError: a choice that is none.
            ConstraintError: a tool's schema that cannot be enforced.
        """
        functions = [convert_to_openai_tool(tool) for tool in tools]
        BoundTools.of(functions, tool_choice, parallel_tool_calls)
        chosen = {"tool_choice": tool_choice, "parallel_tool_calls": parallel_tool_calls}
        given = {name: value for name, value in chosen.items() if value is not None}
        kwargs.pop("strict", None)  # they always are
        return self.bind(tools=functions, **given, **kwargs)

    def with_structured_output(
        self,
        schema: Schema | None = None,
        *,
        method: structured.Method = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """The model with answers of one form.

        Args:
            schema: a pydantic model, a TypedDict or a JSON schema; `json_mode` does without.
            method: "json_schema" constrains the answer's text to the schema, "function_calling" has the model call a
                function with its properties as arguments, "json_mode" constrains it to any JSON object, whose form you
                describe in the prompt.
            include_raw: give a dict of `raw`, `parsed` and `parsing_error`, instead of raising.
            strict: taken for the sake of other models: the first two methods always are.
            kwargs: further keywords of the call.

        Raises:
            RequestError: an unknown method, or no schema where one is needed.
            ConstraintError: a schema that cannot be enforced.
        """
        method = structured.checked_method(method)
        traced = structured.tracing_format(schema, method)
        if method == "function_calling":
            name = structured.function_name(schema)
            tools = [cast("dict[str, Any]", schema)]  # it has a name, so there is one
            model = self.bind_tools(tools, tool_choice=name, **{**traced, **kwargs})
        else:
            form = structured.response_format(schema, method)
            structured_response(form)
            model = self.bind(response_format=form, **traced, **kwargs)
        return structured.parsed(model, structured.parser(schema, method), include_raw=include_raw)

    # --- what LangChain asks about a model ---------------------------------------------------------------------

    @property
    def _llm_type(self) -> str:
        return "dendrite-chat"

    @property
    def _identifying_params(self) -> dict[str, object]:
        """All that decides what a call answers, so that caches keep different calls apart."""
        names = {"model", "dtype", "device", *SETTINGS} - {"timeout"}
        params: dict[str, object] = {name: getattr(self, name) for name in sorted(names)}
        if self.engine is not None:
            params |= {"dtype": self.engine.spec.dtype, "engine_seed": self.engine.config.seed}
        return params

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return super()._get_ls_params(stop=stop or self.stop, **kwargs)

    def _resolve_model_profile(self) -> ModelProfile:
        profile = ModelProfile(
            text_inputs=True,
            text_outputs=True,
            image_inputs=False,
            audio_inputs=False,
            video_inputs=False,
            pdf_inputs=False,
            tool_calling=True,
            tool_choice=True,
            structured_output=True,
            temperature=True,
        )
        if self.engine is not None:
            profile["max_input_tokens"] = self.engine.spec.context_length
        return profile

    def get_token_ids(self, text: str) -> list[int]:
        """The model's own tokens of a text."""
        return self.open().tokenizer.encode(text)

    def get_num_tokens_from_messages(
        self,
        messages: list[BaseMessage],
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool] | None = None,
    ) -> int:
        """The tokens of the prompt that these messages, and tools, become."""
        functions = [convert_to_openai_tool(tool) for tool in tools or ()]
        options = self._options_of(None, {"tools": functions})
        return len(self._calls_on(None).prompt_ids(messages, options))


def _single(options: CallOptions) -> CallOptions:
    if options.n != 1:
        raise RequestError(
            f"a stream gives one answer and n={options.n} are asked for: use generate(..., n={options.n})"
        )
    return options
