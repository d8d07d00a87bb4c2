"""The engine: one model, one K/V pool, one step loop; sync, asyncio and streaming fronts over it.

The fronts differ only in how they wait: all of them submit requests to the loop and read the same results.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from types import TracebackType
from typing import Self, Unpack, overload

from dendrite.engine.branch import Branch
from dendrite.engine.config import EngineConfig, SamplingOptions, SamplingParams
from dendrite.engine.errors import BranchError, ContextOverflow, OutOfBlocks, RequestError
from dendrite.engine.blocks import BlockPool
from dendrite.engine.generation import Generation, GenerationRequest
from dendrite.engine.loop import StepLoop
from dendrite.engine.messages import Message
from dendrite.engine.models import load_model
from dendrite.engine.random import child_key, root_key
from dendrite.engine.requests import Group, ScoreRequest
from dendrite.engine.runner import Runner, TorchRunner
from dendrite.engine.scheduler import Scheduler
from dendrite.engine.states import explain, next_status
from dendrite.engine.stats import Stats, take_stats
from dendrite.engine.text import HFTokenizer, Tokenizer
from dendrite.engine.tree import KVTree, Tip


class Engine:
    """A loaded model with its tree of branches. Thread-safe; two engines in one process know nothing of each other.

        with dd.Engine.load("smollm2-135m-instruct") as engine:
            root = engine.root("The plan:\\n")
            outs = engine.generate(root.fork(8), max_tokens=32, temperature=0.8)

    `Engine.load` is the door; the constructor takes the parts, for a runner of one's own (see `dendrite.testing`).
    """

    def __init__(self, runner: Runner, tokenizer: Tokenizer, config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig.of()
        self.tokenizer = tokenizer
        self.spec = runner.spec
        self._runner = runner
        pool = BlockPool(runner.num_blocks + 1, runner.block_size)
        tree = KVTree(pool)
        self._tree = tree
        self._loop = StepLoop(runner, tree, Scheduler(tree, prefill_chunk=self.config.prefill_chunk))
        self._lock = self._loop.lock
        self._branches: weakref.WeakSet[Branch] = weakref.WeakSet()
        self._root_numbers = itertools.count()
        self._close = weakref.finalize(self, _close, self._loop, runner)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        kv_memory: int | str | None = None,
        block_size: int = 16,
        seed: int = 0,
        deterministic: bool = False,
        integrity: str = "off",
    ) -> Engine:
        """Loads a model and starts its step loop.

        Args:
            name: a short name (`dendrite models` lists them), a hub id, or a folder that Transformers can read.
            dtype: of weights and K/V; "auto" is bfloat16 where the processor computes in it, else float32.
            kv_memory: bytes of K/V, or a string such as "2GiB": a hard limit; None is a quarter of the free memory.
            block_size: tokens in a block.
            seed: roots without a seed of their own draw from this one, in the order they are made.

        Raises:
            RequestError: a setting out of range.
            ModelError: no such model, damaged files, or a family that this engine would not run exactly.
        """
        config = EngineConfig.of(
            dtype=dtype,
            device=device,
            kv_memory=kv_memory,
            block_size=block_size,
            seed=seed,
            deterministic=deterministic,
            integrity=integrity,
        )
        loaded = load_model(name, dtype=config.dtype, device=config.device)
        runner = TorchRunner(loaded.model, loaded.spec, kv_memory=config.kv_memory, block_size=config.block_size)
        return cls(runner, HFTokenizer(loaded.tokenizer, loaded.eos_token_ids), config)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.spec.name

    # --- roots -------------------------------------------------------------------------------------------------

    @overload
    def root(self, text: str, *, seed: int | None = None) -> Branch: ...
    @overload
    def root(self, *, messages: Sequence[Message], seed: int | None = None) -> Branch: ...
    @overload
    def root(self, *, token_ids: Sequence[int], seed: int | None = None) -> Branch: ...
    def root(
        self,
        text: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
        seed: int | None = None,
    ) -> Branch:
        """A new tree. Its K/V is computed with the first generation or score; a live equal prefix is shared.

        Args:
            text: raw text, with the BOS the tokenizer adds to texts.
            messages: a conversation, through the model's chat template; what is generated is the assistant's turn.
            token_ids: exactly these tokens.
            seed: roots with equal prompts and seeds give equal answers; without it each root differs.

        Raises:
            RequestError: an empty prompt, a token id out of range, or not just one of the three.
            ContextOverflow: the prompt is longer than the model's context.
            OutOfBlocks: the pool is too small for it now.
            ModelError: the model has no chat template.
            EngineClosed, EngineDead: the engine runs no more.
        """
        if (text is not None) + (messages is not None) + (token_ids is not None) != 1:
            raise RequestError("give one of: text, messages=, token_ids=")
        if messages is not None:
            tokens = self.tokenizer.render(messages)
        elif text is not None:
            tokens = self.tokenizer.encode(text, bos=True) if text else []
        else:
            tokens = self._checked_ids(token_ids or ())
        if not tokens:
            raise RequestError("the prompt is empty: give at least one token")
        self._check_length(len(tokens))
        with self._lock:
            self._loop.check_open()
            tip = self._new_tip(tokens)
            salt = root_key(seed) if seed is not None else self._next_salt()
            branch = Branch(self, tip, None, salt=salt, key=0)
            self._branches.add(branch)
        if messages is not None:
            branch._chat = (tuple(messages), len(tokens))
        return branch

    def _new_tip(self, tokens: list[int]) -> Tip:
        self._loop.release_collected()
        tip, num_shared = self._tree.new_root(tokens)
        try:
            self._check_blocks(tip)
        except OutOfBlocks:
            self._tree.prune(tip)
            raise
        self._loop.counters.num_shared += num_shared
        return tip

    def _next_salt(self) -> int:
        return child_key(root_key(self.config.seed), next(self._root_numbers))

    # --- generating --------------------------------------------------------------------------------------------

    def generate(self, branches: Sequence[Branch], **options: Unpack[SamplingOptions]) -> list[Generation]:
        """Generates onto every branch, all in one batch with whatever else is in flight.

        `max_tokens` is cut to what the model's context has left. If the call fails, or Ctrl-C ends it, every branch is
        as it was.

        Raises:
            RequestError: an option out of range, or no branches.
            BranchError: a branch that is pruned, busy, listed twice, or of another engine.
            ContextOverflow: a branch has no room for a single token.
            OutOfBlocks: the pool is too small for what the call may need at worst.
            EngineClosed, EngineDead: the engine runs no more.
        """
        requests, group = self._submit(branches, options)
        self._wait(group)
        return [_result(request) for request in requests]

    async def agenerate(self, branches: Sequence[Branch], **options: Unpack[SamplingOptions]) -> list[Generation]:
        """`generate` for asyncio. Cancelling the task cancels the generation at once; every branch rolls back."""
        requests, group = self._submit(branches, options)
        await self._await(group)
        return [_result(request) for request in requests]

    def _submit(
        self,
        branches: Sequence[Branch],
        options: SamplingOptions,
        sink: Callable[[str | None], None] | None = None,
    ) -> tuple[list[GenerationRequest], Group]:
        params = SamplingParams.of(**options)
        if not branches:
            raise RequestError("no branches were given")
        with self._lock:
            self._loop.check_open()
            self._check_branches(branches)
            requests = [self._request(branch, params, sink) for branch in branches]
            return requests, self._loop.submit(requests)

    def _request(
        self, branch: Branch, params: SamplingParams, sink: Callable[[str | None], None] | None
    ) -> GenerationRequest:
        room = self.spec.context_length - branch._tip.length
        if room < 1:
            raise ContextOverflow(
                f"the branch has {branch._tip.length} tokens and the model's context holds {self.spec.context_length}: "
                "nothing can be generated; fork an earlier position with fork(at=...)"
            )
        return GenerationRequest(
            branch,
            branch._tip,
            params,
            tree=self._tree,
            tokenizer=self.tokenizer,
            key=branch._key_for(params.seed),
            num_tokens=min(params.max_tokens, room),
            sink=sink,
        )

    def _check_branches(self, branches: Sequence[Branch]) -> None:
        if len(set(map(id, branches))) < len(branches):
            raise BranchError("a branch is listed twice: fork it and list the forks")
        for branch in branches:
            if branch._engine is not self:
                raise BranchError("this branch belongs to another engine: use that one")
            next_status(branch._tip.status, "submit")

    def _stream(self, branch: Branch, options: SamplingOptions) -> Iterator[str]:
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        _, group = self._submit([branch], options, pieces.put)
        return self._pieces(pieces, group)

    def _pieces(self, pieces: queue.SimpleQueue[str | None], group: Group) -> Iterator[str]:
        try:
            while (piece := pieces.get()) is not None:
                yield piece
            group.future.result()
        finally:
            self._loop.cancel(group, keep=True)

    async def _astream(self, branch: Branch, options: SamplingOptions) -> AsyncIterator[str]:
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        _, group = self._submit([branch], options, lambda piece: _call_in(loop, lambda: pieces.put_nowait(piece)))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            await asyncio.wrap_future(group.future)
        finally:
            self._loop.cancel(group, keep=True)

    # --- scoring -----------------------------------------------------------------------------------------------

    def _score(self, branch: Branch, choices: Sequence[str]) -> list[list[float]]:
        request, group = self._submit_score(branch, choices)
        self._wait(group)
        return request.logprobs

    async def _ascore(self, branch: Branch, choices: Sequence[str]) -> list[list[float]]:
        request, group = self._submit_score(branch, choices)
        await self._await(group)
        return request.logprobs

    def _submit_score(self, branch: Branch, choices: Sequence[str]) -> tuple[ScoreRequest, Group]:
        if isinstance(choices, str) or not choices:
            raise RequestError("give a list of choices, at least one")
        candidates = [self.tokenizer.encode(choice) for choice in choices]
        if not all(candidates):
            raise RequestError(f"choice {candidates.index([])} is empty: there is nothing to score")
        with self._lock:
            tip = branch._live_tip()
            self._check_length(tip.length + max(map(len, candidates)))
            request = ScoreRequest(tip, candidates)
            return request, self._loop.submit([request])

    # --- waiting -----------------------------------------------------------------------------------------------

    def _wait(self, group: Group) -> None:
        try:
            group.future.result()
        except BaseException:
            self._loop.cancel(group)
            raise

    async def _await(self, group: Group) -> None:
        try:
            await asyncio.wrap_future(group.future)
        except BaseException:
            self._loop.cancel(group)
            raise

    # --- what branches ask for ---------------------------------------------------------------------------------

    def _fork(self, branch: Branch, num: int, at: int | None, seed: int | None) -> list[Branch]:
        if num < 1:
            raise BranchError(f"fork({num}): give 1 or more")
        with self._lock:
            self._loop.check_open()
            tip = branch._live_tip()
            if at is not None and not 1 <= at <= tip.length:
                raise BranchError(f"fork(at={at}): the branch has {tip.length} tokens; give 1 to {tip.length}")
            forks = [branch._made_from(self._tree.fork(tip, at=at), seed, index) for index in range(num)]
            self._branches.update(forks)
            self._loop.counters.num_forks += num
            return forks

    def _append(
        self,
        branch: Branch,
        content: str | Sequence[int] | None,
        messages: Sequence[Message] | None,
        *,
        special: bool,
    ) -> None:
        if (content is None) == (messages is None):
            raise RequestError("give one of: content, messages=")
        if messages is not None:
            self._append_messages(branch, messages)
            return
        if isinstance(content, str):
            tokens = self.tokenizer.encode(content, special=special)
        else:
            tokens = self._checked_ids(content or ())
        with self._lock:
            self._extend(branch, tokens, keep=None)

    def _append_messages(self, branch: Branch, messages: Sequence[Message]) -> None:
        with self._lock:
            tip = self._idle_tip(branch)
            if branch._chat is None:
                raise BranchError("this branch is no conversation: root it with messages=, or append text")
            before, start = branch._chat
            path = self._tree.token_ids(tip)
            turns = list(before)
            if len(path) > start:
                turns.append({"role": "assistant", "content": self.tokenizer.decode(path[start:])})
            turns += messages
            tokens = self.tokenizer.render(turns)
            pairs = zip(path, tokens, strict=False)
            same = next((index for index, (old, new) in enumerate(pairs) if old != new), min(len(path), len(tokens)))
            self._extend(branch, tokens[same:], keep=max(same, 1))
            branch._chat = (tuple(turns), len(tokens))

    def _extend(self, branch: Branch, tokens: list[int], *, keep: int | None) -> None:
        """Appends tokens, after cutting the path to its first `keep`; the lock is held."""
        tip = self._idle_tip(branch)
        length = tip.length if keep is None else keep
        self._check_length(length + len(tokens))
        self._loop.release_collected()
        self._check_blocks(tip, len(tokens))
        if length < tip.length:
            self._tree.truncate(tip, length)
        if tokens:
            self._tree.extend(tip, tokens)

    def _prune(self, branch: Branch) -> None:
        with self._lock:
            tip = branch._tip
            if tip.status in ("queued", "running"):
                self._loop.cancel_branch(tip)
            if tip.status != "pruned":
                tip.status = next_status(tip.status, "prune")
                self._tree.prune(tip)

    def _forget(self, tip: Tip) -> None:
        self._loop.forget(tip)

    def _text_of(self, branch: Branch) -> str:
        tokens = self._token_ids_of(branch)
        if tokens and tokens[0] == self.tokenizer.bos_token_id and branch._chat is None:
            tokens = tokens[1:]
        return self.tokenizer.decode(tokens, special=True)

    def _token_ids_of(self, branch: Branch) -> list[int]:
        with self._lock:
            return self._tree.token_ids(branch._live_tip())

    # --- checks ------------------------------------------------------------------------------------------------

    def _idle_tip(self, branch: Branch) -> Tip:
        self._loop.check_open()
        tip = branch._live_tip()
        if tip.status != "idle":
            raise BranchError(explain(tip.status))
        return tip

    def _checked_ids(self, token_ids: Sequence[int]) -> list[int]:
        tokens = list(token_ids)
        wrong = next((token for token in tokens if not 0 <= token < self.spec.vocab_size), None)
        if wrong is not None:
            raise RequestError(f"token id {wrong} is out of range: the vocabulary has {self.spec.vocab_size} tokens")
        return tokens

    def _check_length(self, length: int) -> None:
        if length > self.spec.context_length:
            raise ContextOverflow(
                f"{length} tokens are more than the {self.spec.context_length} that the model's context holds: "
                "shorten the prompt"
            )

    def _check_blocks(self, tip: Tip, num_more: int = 0) -> None:
        pool = self._tree.pool
        needed = self._tree.demand([(tip, num_more, False)])
        if needed > pool.num_free:
            raise OutOfBlocks(needed, pool.num_free, self._tree.prunable([tip]))

    # --- the engine itself -------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """Blocks, tokens, shape of the tree and running totals, as they are now."""
        with self._lock:
            self._loop.release_collected()
            depths = [branch.depth for branch in self._branches if branch._tip.status != "pruned"]
            block_bytes = self.spec.bytes_per_token * self.config.block_size
            return take_stats(self._tree, self._loop.counters, depths, block_bytes)

    def check_integrity(self) -> None:
        """Asserts every invariant of tree and pool: reference counts, reachable tokens, free + used = total."""
        with self._lock:
            self._loop.release_collected()
            self._tree.check_integrity()

    def close(self) -> None:
        """Ends the step loop and frees model and K/V. Open calls get `EngineClosed`; calling again is fine."""
        self._close()

    async def aclose(self) -> None:
        """`close` without blocking the event loop."""
        await asyncio.to_thread(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        pool = self._tree.pool
        return f"<Engine {self.name} blocks={pool.num_used}/{pool.num_total}>"


def _close(loop: StepLoop, runner: Runner) -> None:
    loop.stop()
    runner.close()


def _result(request: GenerationRequest) -> Generation:
    assert request.generation is not None, "the call returned before its generation ended"
    return request.generation


def _call_in(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    """Runs the callback in that event loop; nothing if the loop was closed meanwhile."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(callback)
