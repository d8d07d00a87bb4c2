"""`ChatDendrite` on a scripted engine: what it computes, what its messages carry, how it refuses."""

import asyncio
import copy
import gc
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.outputs import LLMResult
from pydantic import ValidationError

from dendrite.engine.engine import Engine
from dendrite.engine.errors import EngineClosed, RequestError
from dendrite.integrations.engines import ENGINES, EngineSettings
from dendrite.integrations.langchain import ChatDendrite
from dendrite.testing import scripted_engine


def script(text: str) -> list[str] | str:
    if text.endswith("fruit?<|end|><|assistant|>"):
        return ["an apple", "a pear", "a fig", "a plum"]
    return "well said"


@pytest.fixture
def engine() -> Iterator[Engine]:
    with scripted_engine(script) as engine:
        yield engine
        engine.check_integrity()


@pytest.fixture
def chat(engine: Engine) -> Iterator[ChatDendrite]:
    with ChatDendrite(engine=engine, temperature=1.0) as chat:
        yield chat
    assert engine.stats().branches == 0


def joined(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return whole


def usage(message: BaseMessage) -> tuple[int, int, int]:
    assert isinstance(message, AIMessage)
    assert message.usage_metadata is not None
    counts = message.usage_metadata
    return counts["input_tokens"], counts["input_token_details"]["cache_read"], counts["output_tokens"]


# --- one call ----------------------------------------------------------------------------------------------------


def test_n_answers_cost_one_prefill(engine: Engine, chat: ChatDendrite) -> None:
    """`generate(n=8)` computes the prompt once; the answers say that all but the first found it in the cache."""
    result = chat.generate([[HumanMessage("Which fruit?")]], n=8, seed=5)
    answers = [generation.message for generation in result.generations[0]]  # type: ignore[union-attr]  # of a chat model
    assert len({answer.text for answer in answers}) > 1
    num_prompt = usage(answers[0])[0]
    assert [usage(answer)[1] for answer in answers] == [0, *[num_prompt] * 7]
    sampled = sum(usage(answer)[2] for answer in answers)
    assert engine.stats().tokens_computed <= num_prompt + sampled
    again = chat.generate([[HumanMessage("Which fruit?")]], n=8, seed=5)
    assert [g.text for g in again.generations[0]] == [g.text for g in result.generations[0]]


def test_without_a_seed_calls_differ_and_with_one_they_do_not(chat: ChatDendrite) -> None:
    """A seed is a call's or the model's; the first of n answers is the answer of n=1."""
    free = {chat.invoke("Which fruit?").text for _ in range(12)}
    assert len(free) > 1
    assert len({chat.invoke("Which fruit?", seed=3).text for _ in range(3)}) == 1
    two = chat.generate([[HumanMessage("Which fruit?")]], n=2, seed=3)
    assert two.generations[0][0].text == chat.invoke("Which fruit?", seed=3).text


@contextmanager
def gathering(num_calls: int) -> Iterator[tuple[Engine, ChatDendrite]]:
    """An engine whose next step lasts until so many calls have come: how fast they do is no part of what they cost."""
    awaited = 0

    def patient(text: str) -> list[str] | str:
        nonlocal awaited
        deadline = time.monotonic() + 60
        while shared.stats().depth_histogram.get(1, 0) < awaited and time.monotonic() < deadline:
            time.sleep(0.001)
        awaited = 0
        return script(text)

    with scripted_engine(patient) as shared, ChatDendrite(engine=shared, temperature=1.0) as chat:
        chat.invoke("Say 0.")  # a model's first call finds its engine, on a thread of its own
        awaited = num_calls
        yield shared, chat


@pytest.mark.parametrize(
    "ask",
    [
        lambda chat, inputs: chat.batch(inputs),
        lambda chat, inputs: asyncio.run(chat.abatch(inputs)),
        lambda chat, inputs: chat.generate([[HumanMessage(each)] for each in inputs]).generations,
    ],
    ids=["batch", "abatch", "generate"],
)
def test_a_batch_is_one_batch_of_the_engine(ask: Callable[[ChatDendrite, list[str]], list[object]]) -> None:
    """Eight inputs take about as many steps as one: while one decodes, the prompts of the others come in chunks."""
    with gathering(8) as (engine, chat):
        before = engine.stats().steps
        assert len(ask(chat, [f"Say {i}." for i in range(8)])) == 8
        assert engine.stats().steps - before < 2 * len("well said") + 8


async def test_answers_come_as_they_are_done_from_one_batch(chat: ChatDendrite) -> None:
    """In the steps of the longest, and in no thread of its own."""
    inputs = ["Which one?", "Say this.", "Which fruit?"]
    seen: list[int] = []
    with gathering(3) as (engine, talker):
        before, threads = engine.stats().steps, threading.active_count()
        for index, message in talker.batch_as_completed(inputs):
            seen.append(index)
            assert message.text
            assert threading.active_count() <= threads + 1  # its own event loop, since this test has one running
        assert engine.stats().steps - before < 2 * len("well said") + 8
    assert sorted(seen) == [0, 1, 2]
    ended = [index async for index, _ in chat.abatch_as_completed(inputs, {"max_concurrency": 1})]
    assert ended == [0, 1, 2]
    assert not list(chat.batch_as_completed([]))


def test_a_short_answer_waits_for_no_long_one() -> None:
    """It is there thousands of steps before the others end."""

    def talk(text: str) -> str:
        return "yes" if "short" in text else "on and on " * 1200

    with scripted_engine(talk) as slow, ChatDendrite(engine=slow, max_tokens=12_000) as chat:
        inputs = ["Talk.", "Be short.", "Talk more."]
        assert next(index for index, _ in chat.batch_as_completed(inputs)) == 1
        assert slow.stats().branches == 0


def test_a_batch_as_completed_ends_early_and_fails_alone(engine: Engine, chat: ChatDendrite) -> None:
    """Leaving the loop ends the others; an exception is raised, or given back with its index."""
    for _ in chat.batch_as_completed(["Say.", "Say this.", "Which fruit?"]):
        break
    gc.collect()
    assert engine.stats().branches == 0
    image = HumanMessage([{"type": "image", "url": "file:cat.png"}])
    ended = dict(chat.batch_as_completed(["Say.", [image]], return_exceptions=True))
    assert isinstance(ended[1], RequestError)
    assert isinstance(ended[0], AIMessage)
    with pytest.raises(RequestError, match="image"):
        list(chat.batch_as_completed(["Say.", [image]]))


def test_a_batch_gives_exceptions_back_if_asked(chat: ChatDendrite) -> None:
    """One bad input fails alone."""
    image = HumanMessage([{"type": "image", "url": "file:cat.png"}])
    good, bad = chat.batch(["Say.", [image]], return_exceptions=True)
    assert good.text == "well said"
    assert isinstance(bad, RequestError)


def test_a_stream_comes_token_by_token_with_usage_at_its_end(chat: ChatDendrite) -> None:
    """Every chunk but the last is text; the last has usage, metadata and the tokens."""
    chunks = list(chat.stream("Say."))
    assert len(chunks) > 5
    assert all(chunk.usage_metadata is None for chunk in chunks[:-1])
    whole = joined(chunks)
    same = chat.invoke("Say.")
    assert whole.text == same.text == "well said"
    assert whole.response_metadata == {k: v for k, v in same.response_metadata.items() if k != "token_usage"}
    assert whole.additional_kwargs == same.additional_kwargs
    assert chunks[-1].chunk_position == "last"


async def test_an_async_stream_is_the_same(chat: ChatDendrite) -> None:
    """And leaving it early leaves nothing behind."""
    chunks = [chunk async for chunk in chat.astream("Say.")]
    assert "".join(chunk.text for chunk in chunks) == "well said"
    stream = chat.astream("Say more.")
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]  # a generator


def test_several_answers_do_not_stream(chat: ChatDendrite) -> None:
    """An explicit stream of n is refused with what to do; `invoke` under a streaming callback is not streamed."""
    with pytest.raises(RequestError, match=r"n=3.*generate"):
        list(chat.stream("Which fruit?", n=3))
    several = chat.model_copy(update={"n": 3, "streaming": True})
    assert several.invoke("Which fruit?").text
    several.close()


def test_stops_and_lengths_are_told(chat: ChatDendrite) -> None:
    """Stop strings of the call replace those of the model; a cut answer says so."""
    assert chat.invoke("Say.", stop=[" "]).text == "well"
    stopped = ChatDendrite(engine=chat.engine, stop=["said"])
    assert stopped.invoke("Say.").text == "well "
    assert stopped.invoke("Say.", stop=["ll"]).text == "we"
    cut = chat.invoke("Say.", max_tokens=4)
    assert cut.response_metadata["finish_reason"] == "length"
    assert usage(cut)[2] == 4
    stopped.close()


def test_logprobs_are_told_in_openai_form(chat: ChatDendrite) -> None:
    """One entry a token, with the likeliest others if asked."""
    answer = chat.invoke("Which fruit?", logprobs=True, top_logprobs=2, seed=1)
    content = answer.response_metadata["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == answer.text
    assert all(entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 2 for entry in content)
    assert "logprobs" not in chat.invoke("Which fruit?").response_metadata
    always = chat.model_copy(update={"logprobs": True, "top_logprobs": 2})
    assert always.invoke("Which fruit?", seed=1).response_metadata["logprobs"]["content"] == content


# --- conversations -----------------------------------------------------------------------------------------------


def test_a_conversation_computes_only_what_is_new(engine: Engine, chat: ChatDendrite) -> None:
    """The next turn reads prompt and answer of the last from the cache, and usage says how much."""
    messages: list[BaseMessage] = [SystemMessage("Be brief. " * 20), HumanMessage("Say.")]
    answer = chat.invoke(messages)
    before = engine.stats().tokens_computed
    follow_up = [*messages, answer, HumanMessage("And again.")]
    second = chat.invoke(follow_up)
    num_prompt, num_cached, num_generated = usage(second)
    assert num_cached >= sum(usage(answer)[::2]) - 1
    assert engine.stats().tokens_computed - before <= num_prompt - num_cached + num_generated + 1


def test_generated_tokens_are_spliced_in_again(engine: Engine, chat: ChatDendrite) -> None:
    """The turn's own tokens stand in the next prompt, unless somebody edited the message."""
    answer = chat.invoke("Say.")
    token_ids = answer.additional_kwargs["dendrite"]["token_ids"]
    odd = [token + 256 for token in token_ids if token < 256]  # the same bytes, as no encoder would cut them
    answer.additional_kwargs["dendrite"]["token_ids"] = odd_ids = [token_ids[0], *odd]
    follow_up = [HumanMessage("Say."), answer, HumanMessage("Go on.")]
    calls = chat._calls_on(None)
    rendered = calls.prompt_ids(follow_up, chat._options_of(None, {}))
    assert str(odd_ids)[1:-1] in str(rendered)
    answer.content = "something else"
    rendered = calls.prompt_ids(follow_up, chat._options_of(None, {}))
    assert str(odd_ids)[1:-1] not in str(rendered)


@pytest.mark.parametrize("token_ids", [None, "abc", [10**9], [-1], [97.5], {"0": 97}])
def test_kept_tokens_that_were_tampered_with_are_left_out(chat: ChatDendrite, token_ids: object) -> None:
    """A message whose tokens are no tokens of this model is encoded by its text."""
    kept = {"dendrite": {"model": "scripted", "token_ids": token_ids}}
    messages = [HumanMessage("Say."), AIMessage("well said", additional_kwargs=kept), HumanMessage("Go on.")]
    plain = [HumanMessage("Say."), AIMessage("well said"), HumanMessage("Go on.")]
    calls, options = chat._calls_on(None), chat._options_of(None, {})
    assert calls.prompt_ids(messages, options) == calls.prompt_ids(plain, options)


def test_what_is_no_text_is_refused(chat: ChatDendrite) -> None:
    """An image is named in the error, with the message it is in."""
    image = HumanMessage([{"type": "text", "text": "What is this?"}, {"type": "image", "url": "file:cat.png"}])
    with pytest.raises(RequestError, match=r"messages\[1\].*'image'.*text only"):
        chat.invoke([SystemMessage("Look."), image])
    with pytest.raises(RequestError, match="'developer': give one of assistant, system, tool, user"):
        chat.invoke([ChatMessage(content="Look.", role="developer")])


def test_an_overlong_conversation_is_langchains_error(engine: Engine) -> None:
    """The error is LangChain's and Dendrite's, so that either is caught; nothing is left behind."""
    with scripted_engine(script, context_length=40) as small, ChatDendrite(engine=small) as chat:
        with pytest.raises(ContextOverflowError, match="40"):
            chat.invoke("x" * 60)
        assert small.stats().blocks_used == 0


def test_a_call_that_takes_too_long_ends() -> None:
    """The timeout, of the call or of the model, ends the generation and leaves nothing behind."""
    with scripted_engine(lambda text: "on and on " * 400) as slow, ChatDendrite(engine=slow, max_tokens=4000) as chat:
        with pytest.raises(TimeoutError, match="timeout"):
            chat.invoke("Say.", timeout=0.05)
        with pytest.raises(TimeoutError, match="timeout"):
            ChatDendrite(engine=slow, max_tokens=4000, timeout=0.05).invoke("Say.")
        assert slow.stats().branches == 0


async def test_a_cancelled_call_leaves_nothing(engine: Engine) -> None:
    """Cancelling the task prunes what it made."""
    with scripted_engine(lambda text: "on and on " * 400) as slow, ChatDendrite(engine=slow, max_tokens=4000) as chat:
        task = asyncio.create_task(chat.ainvoke("Say."))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert slow.stats().branches == 0


# --- identity, settings, engines ---------------------------------------------------------------------------------


def test_bad_settings_are_named() -> None:
    """Unknown and impossible settings fail when the model is made; those of servers are taken and dropped."""
    for bad in ({"top_pk": 1}, {"temperature": -1}, {"n": 0}, {"top_p": 2}):
        with pytest.raises(ValidationError, match=next(iter(bad))):
            ChatDendrite(**bad)
    ChatDendrite(api_key="none", base_url="nowhere", max_retries=2)  # type: ignore[call-arg]  # on purpose


def test_bad_keywords_are_named(chat: ChatDendrite) -> None:
    """A misspelled keyword of a call is refused with the right one."""
    with pytest.raises(RequestError, match=r"did you mean 'top_[kp]'"):
        chat.invoke("Say.", top_pk=1)


def test_caches_keep_different_calls_apart(chat: ChatDendrite) -> None:
    """Equal calls hit LangChain's cache; another sampling option misses it."""
    cached = chat.model_copy(update={"cache": InMemoryCache()})
    first = cached.invoke("Which fruit?", seed=1)
    assert cached.invoke("Which fruit?", seed=1).id == first.id
    assert cached.invoke("Which fruit?", seed=1, top_k=3).id != first.id
    assert cached.model_copy(update={"min_p": 0.1}).invoke("Which fruit?", seed=1).id != first.id
    assert cached.model_copy(update={"logprobs": True}).invoke("Which fruit?", seed=1).id != first.id
    assert cached.model_copy(update={"timeout": 60.0}).invoke("Which fruit?", seed=1).id == first.id
    cached.close()


def test_callbacks_see_the_call(chat: ChatDendrite) -> None:
    """Handlers get the parameters, every token of a stream once, and the usage."""
    seen: list[str] = []
    ends: list[LLMResult] = []

    class Watch(BaseCallbackHandler):
        def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
            seen.append(kwargs["metadata"]["ls_provider"] + " " + str(kwargs["invocation_params"]["temperature"]))

        def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
            seen.append(token)

        def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
            ends.append(response)

    list(chat.stream("Say.", config={"callbacks": [Watch()]}))
    assert seen[0] == "dendrite 1.0"
    assert "".join(seen[1:]) == "well said"
    chat.invoke("Say.", config={"callbacks": [Watch()]})
    assert ends[1].llm_output is not None
    assert ends[1].llm_output["token_usage"]["completion_tokens"] == len("well said")


def test_tokens_are_counted_by_the_model(chat: ChatDendrite) -> None:
    """Texts and whole prompts are counted with the engine's tokenizer, and the profile knows the context."""
    assert chat.get_num_tokens("four") == 4
    messages: list[BaseMessage] = [HumanMessage("Say.")]
    assert chat.get_num_tokens_from_messages(messages) == usage(chat.invoke(messages))[0]
    assert chat.profile is not None
    assert chat.profile["max_input_tokens"] == 16_384


def test_engines_of_one_name_are_shared(engine: Engine) -> None:
    """A registered engine serves every model of its name and stays its owner's to close."""
    ENGINES.register("scripted", engine)
    try:
        one, two = ChatDendrite(model="scripted"), ChatDendrite(model="scripted")
        assert one.open() is two.open() is engine
        assert one.invoke("Say.", model="scripted").text == "well said"
        with pytest.raises(RequestError, match="another engine"), scripted_engine(script) as other:
            ENGINES.register("scripted", other)
        one.close()
        assert two.invoke("Say.").text == "well said"
        two.close()
        assert one.invoke("Say.").text == "well said"  # opens again
        one.close()
    finally:
        ENGINES.unregister("scripted")
    assert engine.stats().branches == 0


def test_a_loaded_engine_closes_with_its_last_lease(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first lease loads, the others share, the last one closes."""
    made: list[Engine] = []

    def load(name: str, **settings: object) -> Engine:
        made.append(scripted_engine(script))
        return made[-1]

    monkeypatch.setattr(Engine, "load", load)
    one, two = ENGINES.lease(EngineSettings("leased-model")), ENGINES.lease(EngineSettings("leased-model"))
    assert one.engine is two.engine
    one.close()
    one.close()
    assert made[0].root("x").generate(max_tokens=1).text
    del two
    with pytest.raises(Exception, match="closed"):
        made[0].root("x")
    with ENGINES.lease(EngineSettings("leased-model")) as again:
        assert again.engine is not made[0]
    assert len(made) == 2


def test_a_dead_engine_is_not_handed_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who holds it learns that it has ended; whoever opens one after that gets a new one."""
    monkeypatch.setattr(Engine, "load", lambda name, **settings: scripted_engine(script))
    with ChatDendrite(model="mortal-model") as chat, ChatDendrite(model="mortal-model") as other:
        chat.open().close()
        with pytest.raises(EngineClosed):
            chat.invoke("Say.")
        assert other.invoke("Say.").text == "well said"
        chat.close()
        assert chat.invoke("Say.").text == "well said"
        assert chat.open() is other.open()


def test_copies_have_leases_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing a copy, deep or not, or what came out of a pickle, leaves the original's engine running."""
    made: list[Engine] = []

    def load(name: str, **settings: object) -> Engine:
        made.append(scripted_engine(script))
        return made[-1]

    monkeypatch.setattr(Engine, "load", load)
    with ChatDendrite(model="copied-model") as chat:
        chat.open()
        for copied in (
            chat.model_copy(update={"temperature": 0.0}),
            copy.copy(chat),
            copy.deepcopy(chat),
            pickle.loads(pickle.dumps(chat)),  # noqa: S301 - made here
        ):
            assert copied.invoke("Say.").text == "well said"
            copied.close()
            assert chat.invoke("Say.").text == "well said"
        (loaded,) = made
    assert loaded.has_ended


def test_copies_share_an_engine_that_was_given(engine: Engine, chat: ChatDendrite) -> None:
    """A deep copy runs on the same one; a pickle cannot, and says what to do instead."""
    copied = copy.deepcopy(chat)
    assert copied.engine is engine
    assert copied.invoke("Say.").text == "well said"
    with pytest.raises(TypeError, match="pass its name"):
        pickle.dumps(chat)


def test_tool_results_are_told_to_models_without_tools(chat: ChatDendrite) -> None:
    """Calls and answers of a conversation are written out where the template knows none."""
    call = {"name": "add", "args": {"a": 1}, "id": "1", "type": "tool_call"}
    messages = [HumanMessage("Add."), AIMessage("", tool_calls=[call]), ToolMessage("2", tool_call_id="1", name="add")]
    ids = chat._calls_on(None).prompt_ids(messages, chat._options_of(None, {}))
    text = chat.open().tokenizer.decode(ids, special=True)
    assert '<|assistant|><tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|end|>' in text
    assert "<|user|><tool_response>\n2\n</tool_response><|end|>" in text
