"""A search written down: every ask and tell, a line each, so that it can be gone on from after whatever ended it.

    {"journal": 2, "model": …, "functions": …, "state": …, "seed": …, "prompt": …}     what it belongs to
    {"asked": {"kind": "Expand", "node": 0}}
    {"told": {"kind": "Expanded", "node": 0, "children": [1, 2]}, "steps": [{"id": 1, "text": …}, …], "spent": …}

A line counts once it is on the disk. The last one may be torn by a crash; it is dropped. Every line ends with a seal
(`dendrite.dsl.seals`), so that a journal that was altered is refused. Whoever writes holds a lock on the file.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, NamedTuple

from dendrite.dsl.codec import Codec
from dendrite.dsl.functions import Function, plain
from dendrite.dsl.meter import Spent
from dendrite.dsl.node import Step
from dendrite.dsl.operations import Loop, Merge, Observe, Score
from dendrite.dsl.seals import sealed, unsealed
from dendrite.dsl.strategies.base import Ask, Expanded, Told
from dendrite.engine.errors import ProgramError, SnapshotDamaged, SnapshotError
from dendrite.engine.files import claim

Line = dict[str, Any]
VERSION = 2


class Journal:
    """The file of one search, open for writing.

    Args:
        file: which is empty or ends with a whole line; nobody else writes to it.
        codec: writes states.
        seal: of that line.
    """

    def __init__(self, file: IO[bytes], codec: Codec, *, seal: str = "") -> None:
        self.codec = codec
        self._seal = seal
        self._file = file

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line and wait until it is on the disk."""
        written, self._seal = sealed(line, self._seal)
        self._file.write(written)
        self._file.flush()
        os.fsync(self._file.fileno())

    def asked(self, ask: Ask) -> None:
        """Note what is under way from now on."""
        self.write({"asked": asked_line(ask)})

    def told(self, told: Told, steps: Sequence[Step], *, num_proposals: int, spent: Spent) -> None:
        """Note what came of the ask that is due."""
        self.write(told_line(self.codec, told, steps, num_proposals=num_proposals, spent=spent))

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def asked_line(ask: Ask) -> Line:
    """An ask as plain values."""
    return {"kind": type(ask).__name__, **asdict(ask)}


def told_line(codec: Codec, told: Told, steps: Sequence[Step], *, num_proposals: int, spent: Spent) -> Line:
    """A result as plain values, with the nodes that were made for it."""
    plain_told = asdict(told)
    if isinstance(told, Expanded):
        plain_told["children"] = [child.id for child in told.children]
    rows = [_row(codec, step) for step in steps]
    return {
        "told": {"kind": type(told).__name__, **plain_told},
        "steps": rows,
        "num_proposals": num_proposals,
        "spent": dict(spent),
    }


def _row(codec: Codec, step: Step) -> Line:
    assert step.parent is not None, "the root is in the header"
    return {
        "id": step.id,
        "parent": step.parent.id,
        "index": step.index,
        "cue": step.cue,
        "text": step.text,
        "appended": step.appended,
        "is_made": step.is_made,
        "prior": step.prior,
        "logprob": step.logprob,
        "value": step.value,
        "status": "open" if step.status == "pruned" else step.status,  # what was told is told again, and prunes again
        "num_asks": step.num_asks,
        "reflections": list(step.reflections),
        "state": codec.dump(step.state),
        "tape": step.tape,
        "logprobs": list(step.branch.record.logprobs) if step.branch is not None else [],
    }


class Read(NamedTuple):
    """A journal as it was read."""

    header: Line
    lines: list[Line]
    seal: str
    """Of the last line."""
    file: IO[bytes]
    """Locked, and at its end."""


def read(path: Path) -> Read:
    """The header and the lines of a journal, to be gone on from; a torn last line is cut off the file.

    Raises:
        SnapshotDamaged: a line was altered, or one is missing.
        SnapshotError: there is no such file, it is no journal, or another search writes to it.
    """
    try:
        file = path.open("r+b")
    except OSError as error:
        raise SnapshotError(f"the journal {path} cannot be read: {error}") from error
    try:
        return _read(path, file)
    except BaseException:
        file.close()
        raise


def _read(path: Path, file: IO[bytes]) -> Read:
    if not claim(file):
        raise SnapshotError(
            f"the journal {path} is in use: a search in this process or another writes to it: wait for it, or end it"
        )
    content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    first, *others = whole.split(b"\n")[:-1] or [b""]
    _check_version(path, first)
    lines: list[Line] = []
    seal = ""
    for number, written in enumerate([first, *others], start=1):
        try:
            line, seal = unsealed(written, seal)
        except ValueError as error:
            raise SnapshotDamaged(
                f"line {number} of {path} is not what was written, or one before it is missing: start the search anew, "
                "or go on from a copy of the file"
            ) from error
        lines.append(line)
    file.truncate(len(whole))
    file.seek(len(whole))
    return Read(lines[0], lines[1:], seal, file)


def _check_version(path: Path, first: bytes) -> None:
    try:
        version = json.loads(first)["journal"]
    except (ValueError, KeyError, TypeError) as error:
        raise SnapshotError(
            f"{path} is no journal of a search: give the path that run(journal=...) was given"
        ) from error
    if version != VERSION:
        raise SnapshotError(f"{path} is a journal of version {version}, this package reads {VERSION}")


def create(path: Path, header: Mapping[str, Any], codec: Codec) -> Journal:
    """A new journal.

    Raises:
        ProgramError: there is something at the path already, or nothing can be written there.
    """
    try:
        file = path.open("ab")
    except OSError as error:
        raise ProgramError(
            f"journal={str(path)!r} cannot be written ({error}): give a file in a folder that is there"
        ) from error
    if not claim(file) or file.tell():
        file.close()
        raise ProgramError(f"journal={str(path)!r} exists: go on from it with program.resume, or give another path")
    journal = Journal(file, codec)
    journal.write(header)
    return journal


def functions_of(loop: Loop) -> dict[str, str]:
    """A digest of the source of every function of a program, by name."""
    found: list[Function | None] = [loop.select.function, loop.vote]
    for source in loop.sources:
        found += [source.function, source.when]
    for operation in loop.body:
        if isinstance(operation, Observe | Score):
            found.append(operation.function)
        elif isinstance(operation, Merge):
            found.append(operation.key)
    return {function.name: _digest(function) for function in found if function is not None}


def _digest(function: Function) -> str:
    try:
        text = inspect.getsource(plain(function.call))
    except (OSError, TypeError):  # typed at a prompt, or built in
        text = function.name
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_same(header: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on with anything but what the journal belongs to.

    Raises:
        SnapshotError: names what differs.
    """
    for name, called in (("model", "the model"), ("strategy", "the strategy"), ("sources", "the @expand options")):
        if header[name] != wanted[name]:
            raise SnapshotError(
                f"{path} was written with {called} {header[name]}, not {wanted[name]}: resume with that"
            )
    changed = sorted(
        name
        for name in {*header["functions"], *wanted["functions"]}
        if header["functions"].get(name) != wanted["functions"].get(name)
    )
    if changed:
        raise SnapshotError(f"{path} was written by another program: {', '.join(changed)} changed since")
    if header["state"] != wanted["state"]:
        raise SnapshotError(
            f"{path} holds states of {header['state']['name']}, whose fields are not those of "
            f"{wanted['state']['name']} now"
        )
    if header["origin"] != wanted["origin"]:
        raise SnapshotError(f"{path} was started on {_called(header['origin'])}, not on {_called(wanted['origin'])}")


def _called(origin: str | None) -> str:
    return "an engine" if origin is None else f"a branch with the tokens {origin}"
