"""Which peers there are: how each is started, in which form it runs, and what is aimed at beside it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from dendrite.bench.peers.gguf import gguf_file
from dendrite.bench.peers.process import Peer, started
from dendrite.bench.peers.protocol import PeerError
from dendrite.engine.registry import ModelStore

PEERS = ("hf", "llama.cpp")
MOST_COPIED = 20_000
"""Prompt tokens, copies counted, that a peer without prefix sharing is still asked for: minutes on two cores."""

Goals = dict[tuple[int, int, str], float]
"""(branches, tokens of the prompt, figure) -> the least ratio aimed at."""


@dataclass(frozen=True, slots=True)
class Rival:
    """A peer in one of its forms."""

    name: str
    about: str
    module: str
    arguments: tuple[str, ...]
    python: str = sys.executable
    most_tokens: int | None = None
    """Tokens after which its decoding is known well enough; None is all of them."""
    most_prompt_tokens: int | None = None
    """It sits out a workload in which it would compute more tokens of prompts than this; None is no limit."""
    goals: Goals = field(default_factory=dict)

    def start(self) -> AbstractContextManager[Peer]:
        """Its process, see `started`."""
        return started(self.name, self.module, self.arguments, python=self.python)


def rivals_for(
    model: str, peers: Sequence[str], *, dtype: str, gguf: str | None = None, python: str | None = None
) -> list[Rival]:
    """The rivals of these names.

    Raises:
        PeerError: an unknown name, or no GGUF file for llama.cpp.
        ModelError: no such model.
    """
    unknown = [peer for peer in peers if peer not in PEERS]
    if unknown:
        raise PeerError(f"there is no peer {unknown[0]!r}: give {' or '.join(PEERS)}")
    rivals: list[Rival] = []
    if "hf" in peers:
        rivals += _transformers(model, dtype)
    if "llama.cpp" in peers:
        rivals.append(_llama_cpp(model, gguf, python))
    return rivals


def _transformers(model: str, dtype: str) -> list[Rival]:
    folder = str(ModelStore().locate(model).path)
    module = "dendrite.bench.peers.transformers_peer"
    return [
        Rival(
            "hf generate",
            "`generate` on a batch of copies of the prompt, which it computes once for each; "
            f"left out where that would be more than {MOST_COPIED:,} tokens",
            module,
            (folder, dtype, "generate"),
            most_prompt_tokens=MOST_COPIED,
            goals={(32, 512, "whole"): 8.0},
        ),
        Rival(
            "hf static",
            "the prompt computed once, copied into a StaticCache of all rows, SDPA, a loop of its own",
            module,
            (folder, dtype, "static"),
            most_tokens=16,
            goals={(32, 512, "decode"): 2.0, (32, 2048, "decode"): 2.5},
        ),
    ]


def _llama_cpp(model: str, gguf: str | None, python: str | None) -> Rival:
    return Rival(
        "llama.cpp",
        "llama-cpp-python, sequence copies as forks, its own samplers",
        "dendrite.bench.peers.llama_cpp_peer",
        (gguf or str(gguf_file(model)),),
        python=python or sys.executable,
        goals={(32, 512, "decode"): 2.0, (32, 512, "prefill"): 3.0},
    )
