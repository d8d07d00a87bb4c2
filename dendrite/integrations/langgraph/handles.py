"""A branch as a string, which is what a graph's state can carry: all that it takes to go on from there, anywhere.

    handle_of(branch) ──► "dendrite:1:smollm2-135m-instruct:8f…:eJw…"        model, randomness, tokens, digest
    open_handle(engine, handle) ──► a new branch after the same tokens

A handle is a snapshot: it never changes, several futures may go on from it, and it holds no K/V by itself. The engine
keeps what nobody holds as a cache, and a `TimeTravelSaver` holds what its checkpoints name, so opening one computes
nothing as long as either has it; after that, or in another process, its tokens are computed again.

Where a `TimeTravelSaver` keeps checkpoints the tokens are in a table of their own, and a `Reference` stands for the
handle.
"""

from __future__ import annotations

import binascii
import hashlib
import re
import zlib
from array import array
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from dataclasses import dataclass

from dendrite.engine.branch import Branch
from dendrite.engine.engine import Engine
from dendrite.engine.errors import BranchError

HANDLE_PREFIX = "dendrite:1:"
_REFERENCE_PREFIX = "dendrite:ref:1:"
_CHECK_BYTES = 6
_DIGEST_BYTES = 16
_MOST_BYTES = 4 * 2**22  # 4 million tokens
_REFERENCE = re.compile(rf"{_REFERENCE_PREFIX}.+:[0-9a-f]+:[0-9a-f]{{{2 * _DIGEST_BYTES}}}")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a handle says."""

    model: str
    token_ids: tuple[int, ...]
    draw: int
    """The seed of what is generated from here."""

    @property
    def digest(self) -> str:
        """What names the tokens."""
        return _digest(array("I", self.token_ids).tobytes(), _DIGEST_BYTES)

    def handle(self) -> str:
        """As a string, about four bytes a token."""
        packed = zlib.compress(array("I", self.token_ids).tobytes(), 9)
        return Reference(self.model, self.digest, self.draw).handle(packed)

    @classmethod
    def read(cls, handle: str) -> Snapshot:
        """The way back.

        Raises:
            BranchError: this is no handle, or it was damaged.
        """
        body, _, check = str(handle).rpartition(":")
        if is_reference(handle):
            raise BranchError(
                "the handle is stale: it is of a checkpoint that a TimeTravelSaver wrote, and its tokens are not here, "
                "or were altered. Read the checkpoint through that saver; if its thread was deleted, start a new branch"
            )
        if not body.startswith(HANDLE_PREFIX) or check != _digest(body.encode(), _CHECK_BYTES):
            raise BranchError(f"{str(handle)[:40]!r} is no handle of a branch, or was changed: take one of handle_of()")
        try:
            model, draw, packed = body.removeprefix(HANDLE_PREFIX).rsplit(":", 2)
            return cls(model, _unpacked(urlsafe_b64decode(packed)), int(draw, 16))
        except (binascii.Error, zlib.error, ValueError) as error:
            raise BranchError("the handle is damaged: take a new one of handle_of()") from error

    def fork(self, *path: object) -> Snapshot:
        """The same place with randomness of its own, decided by `path`."""
        return Snapshot(self.model, self.token_ids, seed_from(self.draw, *path))


@dataclass(frozen=True, slots=True)
class Reference:
    """A handle without its tokens, which are elsewhere."""

    model: str
    digest: str
    """Of the tokens; see `Snapshot.digest`."""
    draw: int

    def __str__(self) -> str:
        return f"{_REFERENCE_PREFIX}{self.model}:{self.draw:x}:{self.digest}"

    @classmethod
    def read(cls, text: str) -> Reference:
        """The way back, of what `is_reference`."""
        model, draw, digest = text.removeprefix(_REFERENCE_PREFIX).rsplit(":", 2)
        return cls(model, digest, int(draw, 16))

    def handle(self, packed: bytes) -> str:
        """The whole handle, with its tokens as `packed_tokens` took them out of one."""
        body = f"{HANDLE_PREFIX}{self.model}:{self.draw:x}:{urlsafe_b64encode(packed).decode()}"
        return f"{body}:{_digest(body.encode(), _CHECK_BYTES)}"


def packed_tokens(handle: str) -> bytes:
    """The tokens of a handle that `Snapshot.read` takes, compressed as they are in it."""
    return urlsafe_b64decode(handle.rsplit(":", 2)[1])


def packed_digest(packed: bytes) -> str | None:
    """What names tokens that `packed_tokens` took out of a handle; None if they are damaged."""
    try:
        return _digest(array("I", _unpacked(packed)).tobytes(), _DIGEST_BYTES)
    except (zlib.error, ValueError):
        return None


def is_reference(text: object) -> bool:
    """Whether a string stands for a handle whose tokens are in a saver's table."""
    return isinstance(text, str) and _REFERENCE.fullmatch(text) is not None


def handle_of(branch: Branch) -> str:
    """A branch as it stands, for a graph's state.

    Raises:
        BranchError: the branch was pruned.
    """
    return Snapshot(branch.engine.name, tuple(branch.token_ids), branch.record.key_for(None) % 2**56).handle()


def open_handle(engine: Engine, handle: str, *, seed: int | None = None) -> Branch:
    """A new branch at the place that a handle names; prune it when you are done.

    Args:
        engine: runs the model that the handle is of.
        handle: of `handle_of`, or of a node's result.
        seed: of what is generated from here; None for the handle's own, which gives the same each time.

    Raises:
        BranchError: no handle, a damaged one, or one of another model. Nothing was made.
        OutOfBlocks, EngineClosed: as for `Engine.root`.
    """
    snapshot = Snapshot.read(handle)
    if snapshot.model != engine.name:
        raise BranchError(
            f"the handle is of model {snapshot.model!r} and this engine runs {engine.name!r}: open it on an engine "
            "with that model, or start a new branch"
        )
    return engine.root(token_ids=snapshot.token_ids, seed=snapshot.draw if seed is None else seed)


def seed_from(*path: object) -> int:
    """A seed that depends on nothing but `path`."""
    words = "/".join(map(str, path))
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=7).digest(), "big")


def _unpacked(packed: bytes) -> tuple[int, ...]:
    """The tokens; a forged handle gets no more memory than a long context takes."""
    reader = zlib.decompressobj()
    data = reader.decompress(packed, _MOST_BYTES)
    if not reader.eof:
        raise ValueError("cut off, or longer than any context")
    return tuple(array("I", data))


def _digest(data: bytes, num_bytes: int) -> str:
    return hashlib.blake2b(data, digest_size=num_bytes).hexdigest()


def open_all(engine: Engine, handles: Sequence[str], *, path: Sequence[object] = ()) -> list[Branch]:
    """A branch for each handle, or none of them; with a `path`, each draws by its handle, its place and that path."""
    branches: list[Branch] = []
    try:
        for index, handle in enumerate(handles):
            seed = seed_from(Snapshot.read(handle).draw, index, *path) if path else None
            branches.append(open_handle(engine, handle, seed=seed))
    except BaseException:
        for branch in branches:
            branch.prune()
        raise
    return branches
