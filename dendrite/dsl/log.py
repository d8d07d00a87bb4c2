"""What a search remembers of itself, so that it can be saved, journaled, and gone on from."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dendrite.dsl import journal
from dendrite.dsl.asking import criticise
from dendrite.dsl.codec import Codec
from dendrite.dsl.functions import answer
from dendrite.dsl.journal import Journal, Line
from dendrite.dsl.meter import Spent
from dendrite.dsl.node import Node, Step
from dendrite.dsl.operations import Loop, Merge
from dendrite.dsl.run import Run
from dendrite.dsl.strategies import base
from dendrite.dsl.types import StepId
from dendrite.engine.errors import SnapshotError


class Log:
    """The asks and tells of one search: `lines` from before, told again first; new ones as they come.

    Args:
        header: makes the first line of what is saved.
        codec: reads the states of `lines`.
        file: where every line goes at once; None remembers them for `save`.
        lines: of the process before.
    """

    def __init__(
        self,
        header: Callable[[], Mapping[str, Any]],
        codec: Codec | None = None,
        *,
        file: Journal | None = None,
        lines: Sequence[Line] = (),
    ) -> None:
        self._header = header
        self._codec = codec
        self._file = file
        self.lines = [line for line in lines if "told" in line]
        self._num_asked = sum("asked" in line for line in lines)
        self._new: list[tuple[base.Told, list[Step], int, Spent]] = []
        self._num_nodes = 0
        self.is_live = False
        """Whether all lines were told again."""

    def asked(self, ask: base.Ask) -> None:
        """Note what is under way from now on, unless the file has it."""
        if self._num_asked > len(self.lines):
            self._num_asked -= 1
        elif self._file is not None:
            self._file.asked(ask)

    def told(self, told: base.Told, made: list[Step], *, num_proposals: int, spent: Spent) -> None:
        """Note a result."""
        if self._file is not None:
            self._file.told(told, made, num_proposals=num_proposals, spent=spent)
        else:
            self._new.append((told, made, num_proposals, spent))

    async def again(self, run: Run, asks: deque[base.Ask], line: Line, loop: Loop) -> tuple[base.Told, list[Step]]:
        """What came of the next ask before, with its nodes on new branches.

        Raises:
            SnapshotError: the strategy asks for something else.
        """
        ask = asks.popleft() if asks else None
        told = line["told"]
        if ask is None or told["kind"] != _KINDS[type(ask)] or told.get("node") != getattr(ask, "node", None):
            raise SnapshotError("the journal does not fit: the strategy asks for something else than it did")
        made = [run.rebuild_child(row, self._load(row["state"])) for row in line["steps"]]
        self._num_nodes += len(made)
        await _rekey(run, loop, made)
        if isinstance(ask, base.Expand):
            run.steps[ask.node].num_proposals = line["num_proposals"]
        if line is self.lines[-1]:
            run.meter.restore(line["spent"], num_nodes=self._num_nodes)
        return _told(run, ask, told), made

    def _load(self, plain: object) -> object:
        assert self._codec is not None, "a log with lines has a codec"
        return self._codec.load(plain)

    def save(self, path: Path, codec: Codec) -> None:
        """Write header and lines as a journal."""
        new = [
            journal.told_line(codec, told, made, num_proposals=num_proposals, spent=spent)
            for told, made, num_proposals, spent in self._new
        ]
        saved = journal.create(path, self._header(), codec)
        for line in [*self.lines, *new]:
            saved.write(line)
        saved.close()

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()


_KINDS: dict[type[base.Ask], str] = {
    base.Expand: "Expanded",
    base.Select: "Selected",
    base.Reflect: "Reflected",
    base.Vote: "Voted",
}


def _told(run: Run, ask: base.Ask, plain: Mapping[str, Any]) -> base.Told:
    if isinstance(ask, base.Expand):
        return base.Expanded(ask.node, tuple(candidate(run.steps[child]) for child in plain["children"]))
    if isinstance(ask, base.Select):
        return base.Selected(tuple(StepId(node) for node in plain["nodes"]))
    if isinstance(ask, base.Vote):
        return base.Voted(ask.nodes, tuple(plain["ballots"]))
    if ask.is_kept:
        criticise(run.steps[ask.node], ask, plain["text"])
    else:
        run.reflections.append(plain["text"].strip())
    return base.Reflected(ask.node, plain["text"])


async def _rekey(run: Run, loop: Loop, made: Sequence[Step]) -> None:
    """Remember the keys of nodes that were not merged."""
    merges = [operation for operation in loop.body if isinstance(operation, Merge)]
    for operation, step in itertools.product(merges, made):
        if run.is_live(step):
            key = await answer(operation.key, Node(step), [Node(step)])
            run.by_key.setdefault(key, step)


def candidate(step: Step) -> base.Candidate:
    """What a strategy is told of a node."""
    return base.Candidate(
        id=step.id,
        parent=None if step.parent is None else step.parent.id,
        depth=step.depth,
        value=step.value,
        prior=step.prior,
        logprob=step.logprob,
        is_terminal=step.status in ("terminal", "goal"),
        is_goal=step.status == "goal",
    )
