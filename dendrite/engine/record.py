"""The engine's side of a branch: `Branch` is what a user holds, `BranchRecord` what the engine knows of it."""

from __future__ import annotations

from dendrite.engine.grammars import Guide
from dendrite.engine.messages import Message
from dendrite.engine.nodes import Tip
from dendrite.engine.random import child_key, root_key


class BranchRecord:
    """The engine's side of a branch."""

    __slots__ = ("chat", "guide", "key", "logprobs", "num_cached", "num_forks", "salt", "tip")

    def __init__(self, tip: Tip, *, salt: int, key: int, chat: tuple[tuple[Message, ...], int] | None) -> None:
        self.tip = tip
        self.salt = salt  # of the root, or of the seed a fork was given
        self.key = key  # the path of child indices below whoever got the salt
        self.chat = chat  # the conversation, and the number of tokens it renders to
        self.num_forks = 0  # child indices are never used twice, so randomness never is
        self.num_cached = 0  # tokens of a root whose K/V was there when it was made
        self.logprobs: list[float] = []
        self.guide: Guide | None = None  # of a constrained text that `max_tokens` ended here; forked before each use

    def key_for(self, seed: int | None) -> int:
        """The 64-bit key of this branch's draws: its path under the root's salt, or under `seed`."""
        return child_key(root_key(seed) if seed is not None else self.salt, self.key)
