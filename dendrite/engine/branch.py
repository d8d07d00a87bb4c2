"""The user's handle on a path of the tree. Forking it costs a few microseconds at any length and depth."""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack, overload

from dendrite.engine.config import SamplingOptions
from dendrite.engine.errors import BranchError
from dendrite.engine.generation import Generation
from dendrite.engine.messages import Message
from dendrite.engine.random import child_key, root_key
from dendrite.engine.states import Status, explain
from dendrite.engine.tree import Tip

if TYPE_CHECKING:
    from dendrite.engine.engine import Engine


class Branch:
    """A live path from a root to where it ends; made by `Engine.root` and `fork`, never directly.

    A branch keeps its K/V until it is pruned or collected; as a context manager it is pruned at the end. The user's
    tree (`parent`, `children`, `depth`) is what was forked from what; storage follows rules of its own.

        root = engine.root("Once")
        a, b = root.fork(2)          # nothing is copied
        a.append(" upon a time")     # b does not see it
        print(a.generate(max_tokens=16).text)
    """

    __slots__ = (
        "__weakref__",
        "_chat",
        "_children",
        "_engine",
        "_key",
        "_logprobs",
        "_num_forks",
        "_parent",
        "_salt",
        "_tip",
        "depth",
        "value",
    )

    def __init__(self, engine: Engine, tip: Tip, parent: Branch | None, *, salt: int, key: int) -> None:
        self._engine = engine
        self._tip = tip
        self._parent = parent
        self._children: weakref.WeakValueDictionary[int, Branch] = weakref.WeakValueDictionary()
        self._num_forks = 0  # child indices are never used twice, so randomness never is
        self._salt = salt  # of the root, or of the seed a fork was given
        self._key = key  # the path of child indices below whoever got the salt
        self._logprobs: list[float] = []
        self._chat: tuple[tuple[Message, ...], int] | None = parent._chat if parent is not None else None
        self.depth: int = parent.depth + 1 if parent is not None else 0
        self.value: float | None = None

    # --- the tree ----------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def parent(self) -> Branch | None:
        """The branch this one was forked from; None for a root."""
        return self._parent

    @property
    def children(self) -> list[Branch]:
        """The forks of this branch that are live, oldest first."""
        return [child for child in self._children.values() if child._tip.status != "pruned"]

    @property
    def status(self) -> Status:
        """`idle`, `queued` or `running` (a generation owns it), or `pruned`."""
        return self._tip.status

    @overload
    def fork(self) -> Branch: ...
    @overload
    def fork(self, n: int, *, at: int | None = None, seed: int | None = None) -> list[Branch]: ...
    def fork(self, n: int | None = None, *, at: int | None = None, seed: int | None = None) -> Branch | list[Branch]:
        """Branches that go on from here; no K/V is copied and no block is taken.

        Args:
            n: how many; without it one branch is returned rather than a list.
            at: go on after the first `at` tokens of the path instead of all of it, 1 to `num_tokens`.
            seed: key the forks' randomness by (seed, 0), (seed, 1) … rather than by this branch's own, so that a
                repeated call draws the same.

        Raises:
            BranchError: `n` is below 1, `at` is out of range, or the branch was pruned.
            EngineClosed: the engine was closed.
        """
        if n is None:
            return self._engine._fork(self, 1, at, seed)[0]
        return self._engine._fork(self, n, at, seed)

    def append(
        self,
        content: str | Sequence[int] | None = None,
        *,
        messages: Sequence[Message] | None = None,
        special: bool = False,
    ) -> Self:
        """Adds text, token ids or chat messages to the path; K/V is computed with the next generation or score.

        Text is encoded as it is: no BOS, no prefix space, and `<|…|>` in it is plain text unless `special=True`.
        Messages continue a branch that was rooted with `messages=`: what was generated since becomes the assistant's
        turn, and the longest common prefix of tokens stays.

        Raises:
            BranchError: pruned, generating just now, or not a chat (for `messages=`).
            RequestError: neither or both were given, or something that cannot be encoded.
            ContextOverflow: the path would be longer than the model's context.
            OutOfBlocks: the pool is too small for the new tokens. In each case nothing was changed.
        """
        self._engine._append(self, content, messages, special=special)
        return self

    def prune(self) -> None:
        """Gives the branch up: the blocks only it used are free when this returns. Forks stay; calling again is fine."""
        self._engine._prune(self)

    # --- running -----------------------------------------------------------------------------------------------

    def generate(self, **options: Unpack[SamplingOptions]) -> Generation:
        """Generates onto this branch; see `Engine.generate`."""
        return self._engine.generate([self], **options)[0]

    async def agenerate(self, **options: Unpack[SamplingOptions]) -> Generation:
        """`generate` for asyncio; cancelling the task leaves the branch as it was."""
        return (await self._engine.agenerate([self], **options))[0]

    def stream(self, **options: Unpack[SamplingOptions]) -> Iterator[str]:
        """Generates and yields the text piece by piece, never half a character or a part of a stop string.

        Closing the iterator early ends the generation; the branch keeps what was generated until then.
        """
        return self._engine._stream(self, options)

    def astream(self, **options: Unpack[SamplingOptions]) -> AsyncIterator[str]:
        """`stream` for asyncio."""
        return self._engine._astream(self, options)

    def score(self, choices: Sequence[str]) -> list[float]:
        """Log-probability (nats) of each choice as the continuation of this path: all in one pass, nothing kept.

        Raises:
            RequestError: no choices, or an empty one.
            BranchError, ContextOverflow, OutOfBlocks, EngineClosed: as for `generate`.
        """
        return [sum(logprobs) for logprobs in self._engine._score(self, choices)]

    async def ascore(self, choices: Sequence[str]) -> list[float]:
        """`score` for asyncio."""
        return [sum(logprobs) for logprobs in await self._engine._ascore(self, choices)]

    async def ascore_tokens(self, choices: Sequence[str]) -> list[list[float]]:
        """The log-probability of each token of each choice, given this path and the choice's tokens before it."""
        return await self._engine._ascore(self, choices)

    # --- reading -----------------------------------------------------------------------------------------------

    @property
    def text(self) -> str:
        """The whole path as text, from the root's prompt on; a leading BOS is left out, other special tokens show."""
        return self._engine._text_of(self)

    @property
    def token_ids(self) -> list[int]:
        """The whole path as token ids."""
        return self._engine._token_ids_of(self)

    @property
    def num_tokens(self) -> int:
        """Length of the path."""
        return self._live_tip().length

    @property
    def logprobs(self) -> list[float]:
        """Log-probabilities of the tokens that were sampled on this very branch, oldest first."""
        return list(self._logprobs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.prune()

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None and self._tip.status != "pruned":
            engine._forget(self._tip)

    def __repr__(self) -> str:
        if self._tip.status == "pruned":
            return f"<Branch depth={self.depth} pruned>"
        return f"<Branch depth={self.depth} tokens={self._tip.length} {self._tip.status}>"

    # --- what the engine needs ---------------------------------------------------------------------------------

    def record_logprobs(self, logprobs: Sequence[float]) -> None:
        """Called by the engine when a generation on this branch ends."""
        self._logprobs.extend(logprobs)

    def _live_tip(self) -> Tip:
        if self._tip.status == "pruned":
            raise BranchError(explain("pruned"))
        return self._tip

    def _key_for(self, seed: int | None) -> int:
        """The 64-bit key of this branch's draws: its path under the root's salt, or under `seed`."""
        return child_key(root_key(seed) if seed is not None else self._salt, self._key)

    def _made_from(self, tip: Tip, seed: int | None, index: int) -> Branch:
        """A child handle on `tip`; the caller holds the lock."""
        if seed is None:
            child = Branch(self._engine, tip, self, salt=self._salt, key=child_key(self._key, self._num_forks))
        else:
            child = Branch(self._engine, tip, self, salt=root_key(seed), key=child_key(0, index))
        self._children[self._num_forks] = child
        self._num_forks += 1
        return child
