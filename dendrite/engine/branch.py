"""The user's handle on a path of the tree. Forking it costs a few microseconds at any length and depth."""

from __future__ import annotations

import weakref
from collections.abc import AsyncGenerator, Generator, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack, overload

from dendrite.engine.arguments import checked_number
from dendrite.engine.config import SamplingOptions
from dendrite.engine.errors import RequestError
from dendrite.engine.generation import Generation
from dendrite.engine.messages import Message
from dendrite.engine.record import BranchRecord
from dendrite.engine.states import Status

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

    __slots__ = ("__weakref__", "_children", "engine", "parent", "record")

    def __init__(self, engine: Engine, record: BranchRecord, parent: Branch | None) -> None:
        self.engine: Engine = engine
        self.record = record
        """The engine's side of this branch; not for users."""
        self.parent: Branch | None = parent
        """The branch this one was forked from; None for a root."""
        self._children: weakref.WeakValueDictionary[int, Branch] | None = None  # most branches are never forked

    # --- the tree ----------------------------------------------------------------------------------------------

    @property
    def children(self) -> list[Branch]:
        """The forks of this branch that are live, oldest first."""
        return [child for child in (self._children or {}).values() if child.status != "pruned"]

    @property
    def depth(self) -> int:
        """Forks between the root and this branch."""
        return self.record.tip.depth or 0

    @property
    def value(self) -> float | None:
        """Whatever the user thinks of it; searches keep their scores here.

        Where memory is short, idle branches of low value leave the pool before those of high value or of none.

        Raises:
            RequestError: it is set to something that is no number.
        """
        return self.record.tip.value

    @value.setter
    def value(self, value: float | None) -> None:
        self.record.tip.value = None if value is None else checked_number(value, "value")

    @property
    def status(self) -> Status:
        """`idle`, `queued` or `running` (a generation owns it), or `pruned`."""
        return self.record.tip.status

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
        records = self.engine.core.fork(self.record, 1 if n is None else n, at, seed)
        forks = [Branch(self.engine, record, self) for record in records]
        self.adopt(forks)
        return forks[0] if n is None else forks

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
        if messages is not None and content is None:
            self.engine.core.append_messages(self.record, messages)
        elif content is not None and messages is None:
            self.engine.core.append(self.record, content, special=special)
        else:
            raise RequestError("give one of: content, messages=")
        return self

    def prune(self) -> None:
        """Gives the branch up: blocks only it used are free when this returns. Forks stay; calling again is fine."""
        self.engine.core.prune(self.record)

    def save(self, path: str | PathLike[str], *, kv: bool = True, tree: bool = False) -> None:
        """Writes the branch to a file that `Engine.restore` reads, in this process or another, with the same model.

        Tokens, `value`, log-probabilities and randomness are kept, so the restored branch generates what this one
        would. The file is whole at any moment: a crash leaves the one that was there before.

        Args:
            path: a file; its folder exists.
            kv: keep keys and values too; without them the file is small and the path is computed again.
            tree: all branches below this one that the program still holds as well; see `Engine.restore_tree`.

        Raises:
            BranchError: pruned, or a generation runs on one of them.
            SnapshotError: the file cannot be written.
        """
        entries: list[tuple[BranchRecord, float | None, int | None]] = [(self.record, self.value, None)]
        below: list[tuple[Branch, int]] = [(child, 0) for child in self.children] if tree else []
        while below:
            branch, parent = below.pop(0)
            below += [(child, len(entries)) for child in branch.children]
            entries.append((branch.record, branch.value, parent))
        self.engine.core.save(entries, Path(path), kv=kv)

    # --- running -----------------------------------------------------------------------------------------------

    def generate(self, **options: Unpack[SamplingOptions]) -> Generation:
        """Generates onto this branch; see `Engine.generate`."""
        return self.engine.generate([self], **options)[0]

    async def agenerate(self, **options: Unpack[SamplingOptions]) -> Generation:
        """`generate` for asyncio; cancelling the task leaves the branch as it was."""
        return (await self.engine.agenerate([self], **options))[0]

    def stream(self, **options: Unpack[SamplingOptions]) -> Generator[str]:
        """Generates and yields the text piece by piece, never half a character or a part of a stop string.

        Closing the iterator early ends the generation; the branch keeps what was generated until then.
        """
        return self.engine.stream(self, **options)

    def astream(self, **options: Unpack[SamplingOptions]) -> AsyncGenerator[str]:
        """`stream` for asyncio."""
        return self.engine.astream(self, **options)

    def score(self, choices: Sequence[str | Sequence[int]]) -> list[float]:
        """Log-probability (nats) of each choice, text or token ids, as the continuation of this path.

        All of them in one pass, and nothing is kept.

        Raises:
            RequestError: no choices, an empty one, or a token id out of range.
            BranchError, ContextOverflow, OutOfBlocks, EngineClosed: as for `generate`.
        """
        return [sum(logprobs) for logprobs in self.engine.score_tokens(self, choices)]

    async def ascore(self, choices: Sequence[str | Sequence[int]]) -> list[float]:
        """`score` for asyncio."""
        return [sum(logprobs) for logprobs in await self.ascore_tokens(choices)]

    async def ascore_tokens(self, choices: Sequence[str | Sequence[int]]) -> list[list[float]]:
        """The log-probability of each token of each choice, given this path and the choice's tokens before it."""
        return await self.engine.ascore_tokens(self, choices)

    # --- reading -----------------------------------------------------------------------------------------------

    @property
    def text(self) -> str:
        """The whole path as text, from the root's prompt on; a leading BOS is left out, other special tokens show."""
        return self.engine.core.text(self.record)

    @property
    def token_ids(self) -> list[int]:
        """The whole path as token ids."""
        return self.engine.core.token_ids(self.record)

    @property
    def num_tokens(self) -> int:
        """Length of the path."""
        return self.engine.core.num_tokens(self.record)

    @property
    def num_cached(self) -> int:
        """Tokens of a root's prompt whose K/V another live branch had computed when it was made; 0 for a fork."""
        return self.record.num_cached

    @property
    def logprobs(self) -> list[float]:
        """Log-probabilities of the tokens that were sampled on this very branch, oldest first."""
        return list(self.record.logprobs)

    def adopt(self, children: Sequence[Branch]) -> None:
        """Takes branches in as its children; not for users."""
        with self.engine.core.loop.lock:
            if self._children is None:
                self._children = weakref.WeakValueDictionary()
            for child in children:
                self._children[id(child)] = child

    def __enter__(self) -> Self:
        return self

    def __exit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.prune()

    def __del__(self) -> None:
        record = getattr(self, "record", None)
        if record is not None and record.tip.status != "pruned":
            self.engine.core.loop.forget(record.tip)

    def __repr__(self) -> str:
        tip = self.record.tip
        if tip.status == "pruned":
            return f"<Branch depth={self.depth} pruned>"
        return f"<Branch depth={self.depth} tokens={tip.length} {tip.status}>"
