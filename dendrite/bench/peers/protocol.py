"""What a peer is asked and what it answers. Imports no library: a peer may live in another environment.

bench                          peer's process
start ───────────────────────► loads its model
      ◄─────────────────────── {"version": "…"}      or {"error": "…"} and the end
{"prompt": [...], ...} ──────► one repetition
      ◄─────────────────────── {"prefill_s": 1.2, ...}
end of input ────────────────► the end
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

from dendrite.engine.errors import DendriteError


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


class PeerError(DendriteError):
    """A peer that cannot run here; the message says what to do."""


def serve(start: Callable[[], tuple[str, Callable[[TreeTask], TreeTimes]]]) -> None:
    """Be a peer: `start` loads the model and gives (version, what runs one repetition).

    Standard output carries the protocol, so whatever a library prints there goes to the error stream.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(message: dict[str, object]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        version, run = start()
    except PeerError as error:
        reply({"error": str(error)})
        return
    reply({"version": version})
    for line in sys.stdin:
        reply(asdict(run(TreeTask(**json.loads(line)))))
