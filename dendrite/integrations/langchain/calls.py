"""One call of a chat model on its way: the branches it runs on, and what becomes of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import BaseMessage

from dendrite.engine.branch import Branch
from dendrite.engine.config import SamplingOptions
from dendrite.engine.engine import Engine
from dendrite.engine.errors import ContextOverflow, EngineError
from dendrite.integrations.langchain.answers import Answers
from dendrite.integrations.langchain.call_syntax import syntax_of
from dendrite.integrations.langchain.conversation import Conversation
from dendrite.integrations.langchain.options import CallOptions


class ChatContextOverflow(ContextOverflow, ContextOverflowError):
    """The conversation is longer than the model's context. LangChain's middleware shortens it on this error."""


@dataclass(frozen=True, slots=True)
class Running:
    """A call's branches, ready to generate, and what makes messages of what they generate."""

    branches: list[Branch]
    sampling: SamplingOptions
    answers: Answers


class Calls:
    """The calls of one chat model on its engine. Whatever they make is pruned; the engine caches what it was."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.conversation = Conversation(engine.name, engine.tokenizer, syntax_of(engine.tokenizer.chat_template))

    def prompt_ids(self, messages: Sequence[BaseMessage], options: CallOptions) -> list[int]:
        """The tokens that the call starts from."""
        tools = options.tools.functions if options.tools is not None else ()
        return self.conversation.token_ids(messages, tools=tools, instruction=options.instruction)

    @contextmanager
    def open(self, messages: Sequence[BaseMessage], options: CallOptions) -> Iterator[Running]:
        """`options.n` branches behind one prompt, pruned at the end.

        Raises:
            ChatContextOverflow: the conversation is longer than the context.
            TimeoutError: the call took longer than `options.timeout` seconds.
        """
        token_ids = self.prompt_ids(messages, options)
        with _translated():
            root = self.engine.root(token_ids=token_ids, seed=options.seed)
        branches: list[Branch] = []
        try:
            with root:
                branches = root.fork(options.n)
                answers = Answers(
                    self.conversation,
                    num_prompt=root.num_tokens,
                    num_cached=root.num_cached,
                    reads_calls=options.tools is not None,
                    with_logprobs=options.with_logprobs,
                )
            with _translated(), _deadline(branches, options.timeout):
                yield Running(branches, self._sampling(options), answers)
        finally:
            for branch in branches:
                branch.prune()

    def _sampling(self, options: CallOptions) -> SamplingOptions:
        if options.tools is None:
            return options.sampling
        return {**options.sampling, "constraint": options.tools.constraint(self.conversation.syntax)}


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except ContextOverflow as error:
        raise ChatContextOverflow(*error.args) from error


@contextmanager
def _deadline(branches: Sequence[Branch], seconds: float | None) -> Iterator[None]:
    """Prune the branches, which ends their generations, when the time is up, and raise `TimeoutError`."""
    if seconds is None:
        yield
        return
    is_over = threading.Event()

    def end() -> None:
        is_over.set()
        for branch in branches:
            branch.prune()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    message = f"the call took longer than its timeout of {seconds} s: give it more, or ask for fewer tokens"
    try:
        yield
    except EngineError as error:
        if is_over.is_set():
            raise TimeoutError(message) from error
        raise
    finally:
        timer.cancel()
    if is_over.is_set():
        raise TimeoutError(message)
