"""What a peer is asked and what it answers. Imports no library: a peer may live in another environment.

bench                          peer's process
start ───────────────────────► loads its model
      ◄─────────────────────── {"version": "…"}      or {"error": "…"} and the end
{"prompt": [...], ...} ──────► one repetition
      ◄─────────────────────── {"prefill_s": 1.2, ...}      or {"error": "…"}, and it waits for the next
end of input ────────────────► the end
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from dendrite.engine.errors import DendriteError

Message = Mapping[str, object]
Answer = Callable[[Message], Message]
"""From one question to its answer."""


@dataclass(frozen=True, slots=True)
class TreeTask:
    """Branches over one prompt, each decoding on its own."""

    prompt: list[int]
    """Token ids."""
    num_branches: int
    num_tokens: int
    """Each branch's."""
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class TreeTimes:
    """One repetition of a `TreeTask`, in seconds of wall time."""

    prefill_s: float
    """Until the first token can be drawn."""
    fork_s: float
    """From one path to all branches: copies, where an engine has to make them."""
    decode_s: float
    """For `num_decoded` tokens of all branches together."""
    num_decoded: int


@dataclass(frozen=True, slots=True)
class PeerModel:
    """The model that a peer of the suite loads."""

    folder: str
    """With a `config.json`, and weights unless `is_random`."""
    is_random: bool
    """Whether the weights are to be made up."""
    dtype: str
    device: str
    """"cpu" or "cuda"."""
    max_length: int
    """Tokens of the longest path it will be asked for, some room included."""
    vocab_size: int


class PeerError(DendriteError):
    """A peer that cannot run here; the message says what to do."""


class PeerEnded(PeerError):
    """A peer whose process ended: it answers no more."""


def serve(start: Callable[[], tuple[str, Answer]]) -> None:
    """Be a peer: `start` loads the model and gives (version, what answers one question).

    Standard output carries the protocol, so whatever a library prints there goes to the error stream.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(message: Message) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        version, answer = start()
    except PeerError as error:
        reply({"error": str(error)})
        return
    reply({"version": version})
    for line in sys.stdin:
        try:
            reply(answer(json.loads(line)))
        except PeerError as error:
            reply({"error": str(error)})


def tree_answer(run: Callable[[TreeTask], TreeTimes]) -> Answer:
    """The answer of a peer that is asked for `TreeTask`s."""

    def answer(message: Message) -> Message:
        return asdict(run(TreeTask(**message)))  # type: ignore[arg-type]  # as `Peer.run` wrote it

    return answer
