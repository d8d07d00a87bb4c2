"""The engine: one model, one K/V pool, one step loop; sync, asyncio and streaming fronts over it.

The fronts differ only in how they wait: all of them submit requests to the loop and read the same results.
"""

from __future__ import annotations

import asyncio
import queue
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack, overload

from transformers import PreTrainedModel

from dendrite.engine.arguments import shortened
from dendrite.engine.branch import Branch
from dendrite.engine.config import EngineConfig, SamplingOptions, SamplingParams
from dendrite.engine.constraints import Constraint
from dendrite.engine.core import Core
from dendrite.engine.devices import runner_and_head
from dendrite.engine.errors import BranchError, RequestError
from dendrite.engine.generation import Generation, GenerationRequest
from dendrite.engine.head import Head
from dendrite.engine.loop import StepLoop
from dendrite.engine.messages import Message
from dendrite.engine.models import load_model
from dendrite.engine.requests import Group
from dendrite.engine.runner import Runner
from dendrite.engine.spec import ModelSpec
from dendrite.engine.stats import Stats
from dendrite.engine.swap import SwapSpace
from dendrite.engine.text import HFTokenizer, Tokenizer
from dendrite.engine.ticket import Ticket

OnEnd = Callable[[Generation], None]
"""Takes the generation of a stream once it has ended."""


class Engine:
    r"""A loaded model with its tree of branches. Thread-safe; two engines in one process know nothing of each other.

        with dd.Engine.load("smollm2-135m-instruct") as engine:
            root = engine.root("The plan:\n")
            outs = engine.generate(root.fork(8), max_tokens=32, temperature=0.8)

    `Engine.load` is the door; the constructor takes the parts, for a runner of one's own (see `dendrite.testing`).
    """

    def __init__(
        self, runner: Runner, tokenizer: Tokenizer, config: EngineConfig | None = None, head: Head | None = None
    ) -> None:
        self.config = config or EngineConfig.of()
        self.tokenizer = tokenizer
        self.spec = runner.spec
        self.core = Core(runner, head or Head(runner), tokenizer, self.config)
        """What branches call; not for users."""
        self._close = weakref.finalize(self, _close, self.core.loop, self.core.swap, runner)

    @classmethod
    def load(
        cls,
        name: str,
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
    ) -> Engine:
        """Loads a model and starts its step loop.

        Args:
            name: a short name (`dendrite models` lists them), a hub id, or a folder that Transformers can read.
            dtype: of weights and K/V: "float32", "bfloat16" or "float16"; "auto" is the dtype the weights were saved in
                where the device computes in it natively, else float32.
            device: "cpu", "cuda", "cuda:1" and so on; "auto" is the first CUDA device, or the CPU where there is none.
            kv_memory: bytes of K/V, or a string such as "2GiB": a hard limit; None is a quarter of the free memory, of
                a CUDA device most of it.
            swap_memory: host memory for the K/V of idle branches when the pool is full, in bytes or a string; None is
                four pools, or a quarter of the free memory if that is less.
            swap_disk: disk for what does not fit there either; what is lost in the end is computed again when needed.
            swap_folder: where; None is the system's folder for temporary files.
            block_size: tokens in a block.
            seed: roots without a seed of their own draw from this one, in the order they are made.
            deterministic: a branch's logits are the same bits whatever else runs and however it was forked, chunked or
                preempted. On the CPU, for Llama, Mistral, Qwen2 and Qwen3; steps take longer.
            integrity: "canary" checks with each step that every block it uses is its branch's own; "checksum" also
                looks at a sample of the K/V that is read. What is wrong raises `IntegrityError`. "off" costs nothing.
            prefix_cache: a folder of prefixes that processes share, made if it is missing: new roots begin on what is
                there, and `cache_prefix` puts it there.
            prefix_cache_size: bytes of files in it; the least recently used prefixes go first.

        Raises:
            RequestError: a setting out of range, or `deterministic` on a device or for a family it is not made for.
            SnapshotError: the folder of prefixes cannot be made.
            ModelError: no such model, damaged files, or a family that this engine would not run exactly; or a machine
                that cannot keep what `deterministic` promises, which is tested on one layer and the head.
        """
        config = EngineConfig.of(
            dtype=dtype,
            device=device,
            kv_memory=kv_memory,
            swap_memory=swap_memory,
            swap_disk=swap_disk,
            swap_folder=swap_folder,
            block_size=block_size,
            seed=seed,
            deterministic=deterministic,
            integrity=integrity,
            prefix_cache=prefix_cache,
            prefix_cache_size=prefix_cache_size,
        )
        if not isinstance(name, str | PathLike):
            raise RequestError(f"load({shortened(name)}): give a short name, a hub id or a folder")
        loaded = load_model(name, dtype=config.dtype, device=config.device)
        return cls.of(loaded.model, loaded.spec, HFTokenizer(loaded.tokenizer, loaded.eos_token_ids), config)

    @classmethod
    def of(cls, model: PreTrainedModel, spec: ModelSpec, tokenizer: Tokenizer, config: EngineConfig) -> Engine:
        """Starts an engine on a model that is in memory already, wherever its weights came from.

        Args:
            model: in eval mode, its attention set to ours (`attention.interface`); its modules are replaced in place,
                so that it is good for nothing else afterwards.
            spec: its dimensions, from `models.checked_spec`.
            tokenizer: of texts; a program that works with token ids alone may give one that knows no words.
            config: the pool's size and so on; the model stays on the device and in the dtype that it has.

        Raises:
            RequestError: `kv_memory` or `block_size` is too small for a single block.
        """
        runner, head = runner_and_head(model, spec, config)
        return cls(runner, tokenizer, config, head)

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
        return Branch(self, self.core.root(text, messages, token_ids, seed), None)

    @overload
    def cache_prefix(self, text: str) -> int: ...
    @overload
    def cache_prefix(self, *, messages: Sequence[Message]) -> int: ...
    @overload
    def cache_prefix(self, *, token_ids: Sequence[int]) -> int: ...
    def cache_prefix(
        self,
        text: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        token_ids: Sequence[int] | None = None,
    ) -> int:
        """Puts a prompt that many begin with, such as a system prompt, into the `prefix_cache` folder.

        It is computed by the first process that asks. Every root that begins with it, in this process or a later one,
        computes only what comes after it.

        Args:
            text: as for `root`.
            messages: as for `root`; of other conversations that begin with them, all tokens up to where they differ.
            token_ids: as for `root`.

        Returns:
            The tokens that had to be computed: 0 if the engine or the folder has all of it.

        Raises:
            RequestError: the engine was loaded without `prefix_cache`; also as for `root`.
            SnapshotError: the file cannot be written.
        """
        if self.config.prefix_cache is None:
            raise RequestError("there is no folder for prefixes: load the engine with prefix_cache=")
        record = self.core.root(text, messages, token_ids, None)
        with Branch(self, record, None) as root:
            num_new = root.num_tokens - root.num_cached
            if num_new:
                with root.fork() as probe:
                    probe.generate(max_tokens=1)
            self.core.keep_prefix(record)
            return num_new

    def generate(self, branches: Sequence[Branch], **options: Unpack[SamplingOptions]) -> list[Generation]:
        """Generates onto every branch, all in one batch with whatever else is in flight.

        `max_tokens` is cut to what the model's context has left. If the call fails, or Ctrl-C ends it, every branch is
        as it was.

        Raises:
            RequestError: an option out of range, or no branches.
            BranchError: a branch that is pruned, busy, listed twice, or of another engine.
            ConstraintError: a constraint that llguidance refuses, or nothing to continue. Nothing was changed. One that
                turns out to be a dead end while it runs ends that branch alone, with the `finish_reason` "constraint".
            ContextOverflow: a branch has no room for a single token.
            OutOfBlocks: the pool is too small for what the call may need at worst.
            EngineClosed, EngineDead: the engine runs no more.
        """
        return self.submit(branches, **options).wait()

    async def agenerate(self, branches: Sequence[Branch], **options: Unpack[SamplingOptions]) -> list[Generation]:
        """`generate` for asyncio. Cancelling the task cancels the generation at once; every branch rolls back."""
        await self._prepare(options)
        return await self.submit(branches, **options).result()

    def submit(
        self, branches: Sequence[Branch], *, priority: float = 0.0, **options: Unpack[SamplingOptions]
    ) -> Ticket[list[Generation]]:
        """`generate` that returns at once; `wait` or `await result()` of the ticket has the generations.

        Args:
            branches: all of them run, or none.
            priority: calls with a higher one go first where not all can run.
            options: as for `generate`.
        """
        params = SamplingParams.of(**options)
        branches = list(self._checked(branches))
        requests, group = self.core.submit_generations(branches, params, priority=priority)
        return Ticket(self.core.loop, group, lambda: list(map(GenerationRequest.result, requests, branches)))

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is submitted inside starts in the same step. Hold it for submitting alone: the engine waits for it."""
        with self.core.loop.lock:
            yield

    def stream(
        self, branch: Branch, *, on_end: OnEnd | None = None, **options: Unpack[SamplingOptions]
    ) -> Generator[str]:
        """Generates onto the branch and yields its text piece by piece; see `Branch.stream`.

        `on_end` is called with the finished `Generation` after the last piece, unless the stream is closed before.
        """
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        params = SamplingParams.of(**options)
        (request,), group = self.core.submit_generations(self._checked([_one_branch(branch)]), params, pieces.put)
        return self._pieces(pieces, group, lambda: request.result(branch), on_end)

    def _pieces(
        self,
        pieces: queue.SimpleQueue[str | None],
        group: Group,
        read: Callable[[], Generation],
        on_end: OnEnd | None,
    ) -> Generator[str]:
        try:
            while (piece := pieces.get()) is not None:
                yield piece
            group.wait()
        finally:
            self.core.loop.cancel(group, keep=True)
            del group  # as in `Ticket.wait`
        if on_end is not None:
            on_end(read())

    async def astream(
        self, branch: Branch, *, on_end: OnEnd | None = None, **options: Unpack[SamplingOptions]
    ) -> AsyncGenerator[str]:
        """`stream` for asyncio."""
        await self._prepare(options)
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def hand_over(piece: str | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        params = SamplingParams.of(**options)
        (request,), group = self.core.submit_generations(self._checked([_one_branch(branch)]), params, hand_over)
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            await asyncio.wrap_future(group.future)
        finally:
            self.core.loop.cancel(group, keep=True)
            del group  # as in `Ticket.wait`
        if on_end is not None:
            on_end(request.result(branch))

    async def prepare(self, constraint: Constraint) -> None:
        """Compile a constraint ahead, beside the event loop: a common one takes a millisecond, a huge one seconds.

        Raises:
            ConstraintError: llguidance refuses it, or it allows no text at all.
        """
        if constraint not in self.core.grammars:
            await asyncio.to_thread(self.core.grammars.guide, constraint)

    async def _prepare(self, options: SamplingOptions) -> None:
        constraint = options.get("constraint")
        if isinstance(constraint, Constraint):
            await self.prepare(constraint)

    def _checked(self, branches: Sequence[Branch]) -> Sequence[Branch]:
        _check_branches(branches)
        if len(set(map(id, branches))) < len(branches):
            raise BranchError("a branch is listed twice: fork it and list the forks")
        if any(branch.engine is not self for branch in branches):
            raise BranchError("a branch belongs to another engine: use that one")
        return branches

    # --- scoring -----------------------------------------------------------------------------------------------

    def score_tokens(self, branch: Branch, choices: Sequence[str | Sequence[int]]) -> list[list[float]]:
        """The log-probability of each token of each choice after the branch; see `Branch.score`."""
        return self.submit_score(branch, choices).wait()

    async def ascore_tokens(self, branch: Branch, choices: Sequence[str | Sequence[int]]) -> list[list[float]]:
        """`score_tokens` for asyncio."""
        return await self.submit_score(branch, choices).result()

    def submit_score(
        self, branch: Branch, choices: Sequence[str | Sequence[int]], *, priority: float = 0.0
    ) -> Ticket[list[list[float]]]:
        """`score_tokens` that returns at once; see `submit`."""
        request, group = self.core.submit_score(branch.record, choices, priority=priority)
        return Ticket(self.core.loop, group, lambda: request.logprobs)

    # --- snapshots ---------------------------------------------------------------------------------------------

    def restore(self, path: str | PathLike[str]) -> Branch:
        """The branch that `Branch.save` wrote. It takes no block before it is used.

        A constrained text that `max_tokens` had ended cannot be continued under its grammar after that.

        Raises:
            SnapshotDamaged, SnapshotTooNew, SnapshotMismatch: a file that is cut off or altered, was written by a
                later version, or for another model.
            SnapshotError: a file that cannot be read.
        """
        first, *others = self.restore_tree(path)
        for branch in others:
            branch.prune()
        return first

    def restore_tree(self, path: str | PathLike[str]) -> list[Branch]:
        """All branches that `Branch.save(..., tree=True)` wrote, parents before children; see `restore`."""
        records, snapshot = self.core.restore(Path(path))
        branches: list[Branch] = []
        for record, saved in zip(records, snapshot.branches, strict=True):
            parent = branches[saved.parent] if saved.parent is not None else None
            branch = Branch(self, record, parent)
            branch.value = saved.value
            if parent is not None:
                parent.adopt([branch])
            branches.append(branch)
        return branches

    # --- the engine itself -------------------------------------------------------------------------------------

    @property
    def has_ended(self) -> bool:
        """Whether the engine was closed or died; in a forked child, which is refused, the parent's goes on."""
        return self.core.loop.has_ended

    @property
    def blocks_used(self) -> int:
        """K/V blocks in use now; `stats` says more and takes longer."""
        return self.core.blocks_used

    def stats(self) -> Stats:
        """Blocks, tokens, shape of the tree and running totals, as they are now."""
        return self.core.stats()

    def clear_cache(self) -> None:
        """Forgets the prefixes that no branch holds; they cost nobody a block, so this is for measuring cold starts."""
        self.core.clear_cache()

    def check_integrity(self) -> None:
        """Asserts every invariant of tree and pool: reference counts, reach of tokens, free + cached + used = total.

        Raises:
            IntegrityError: with `integrity` on, a block that is not its branch's own, or whose K/V has changed.
        """
        self.core.check_integrity()

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

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError(
            "an Engine lives in one process and is never copied or pickled: pass its name, or a handle of its branches"
        )

    def __repr__(self) -> str:
        return f"<Engine {self.name} blocks={self.core.describe_blocks()}>"


def _close(loop: StepLoop, swap: SwapSpace, runner: Runner) -> None:
    if loop.is_forked:  # thread, files and device are the parent's
        return
    loop.stop()
    swap.close()
    runner.close()


def _one_branch(branch: object) -> Branch:
    if not isinstance(branch, Branch):
        raise RequestError(f"stream({shortened(branch)}): give one branch, as root() or fork() makes it")
    return branch


def _check_branches(branches: object) -> None:
    if isinstance(branches, Branch):
        raise RequestError("generate() takes a list of branches: put this one in one, or call its own generate()")
    if not isinstance(branches, Sequence) or not all(isinstance(branch, Branch) for branch in branches):
        raise RequestError(f"generate({shortened(branches)}): give a list of branches, as root() and fork() make them")
    if not branches:
        raise RequestError("no branches were given")
