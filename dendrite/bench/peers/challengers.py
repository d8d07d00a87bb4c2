"""The peers of the suite: how each is started, and which cases it can be asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from dendrite.bench.cases import Case
from dendrite.bench.peers.process import Peer, started
from dendrite.bench.peers.protocol import PeerError, PeerModel

MOST_COPIED = {"cpu": 20_000, "cuda": 200_000}
"""Prompt tokens that a peer without prefix sharing is asked to compute in one repetition: a minute or so."""
GENERATING = frozenset({"decode", "fanout", "first-token", "tot", "mcts"})
SCORING = GENERATING | {"score"}


@dataclass(frozen=True, slots=True)
class Kind:
    """A peer that there is."""

    about: str
    module: str
    workloads: frozenset[str]
    shares_prefixes: bool


KINDS = {
    "hf": Kind(
        "Transformers' `generate` on a batch, every prompt computed anew",
        "dendrite.bench.peers.transformers_requests",
        GENERATING,
        shares_prefixes=False,
    ),
    "llama.cpp": Kind(
        "llama-cpp-python, what prompts share kept on one sequence and copied as forks",
        "dendrite.bench.peers.llama_cpp_peer",
        frozenset({"decode", "fanout", "first-token"}),  # in deeper trees users would keep more than one sequence
        shares_prefixes=True,
    ),
    "vllm": Kind(
        "vLLM, prefix caching on and warm",
        "dendrite.bench.peers.vllm_peer",
        SCORING,
        shares_prefixes=True,
    ),
    "sglang": Kind(
        "SGLang, radix cache warm, FlashInfer attention",
        "dendrite.bench.peers.sglang_peer",
        SCORING,
        shares_prefixes=True,
    ),
}


@dataclass(frozen=True, slots=True)
class Challenger:
    """A peer as the user named it: `vllm`, or `vllm=PLACE` where it is installed elsewhere."""

    name: str
    kind: Kind
    place: str | None
    """A folder of packages, or the interpreter of another environment."""

    @classmethod
    def of(cls, choice: str) -> Challenger:
        """From `NAME` or `NAME=PLACE`.

        Raises:
            PeerError: an unknown name, or a place that is not there.
        """
        name, _, place = choice.partition("=")
        if name not in KINDS:
            raise PeerError(f"there is no peer {name!r}: give {', '.join(KINDS)}")
        if place and not Path(place).exists():
            raise PeerError(f"{name}: there is no {place}: give a folder of packages or an interpreter")
        return cls(name, KINDS[name], place or None)

    def start(self, model: PeerModel, gguf: Callable[[], str]) -> AbstractContextManager[Peer]:
        """Its process, see `started`.

        Args:
            model: what it loads.
            gguf: gives the file that llama.cpp loads instead.

        Raises:
            PeerError: there is no such file.
        """
        python, site = sys.executable, None
        if self.place is not None and Path(self.place).is_dir():
            site = str(Path(self.place).absolute())
        elif self.place is not None:
            python = self.place
        arguments = [json.dumps(asdict(model))]
        if self.name == "llama.cpp":
            arguments = [gguf(), str(model.vocab_size)]
        return started(self.name, self.kind.module, arguments, python=python, site=site)

    def takes(self, case: Case, device: str) -> bool:
        """Whether it can run the case in sensible time."""
        if case.workload not in self.kind.workloads:
            return False
        return self.kind.shares_prefixes or case.requested <= MOST_COPIED[device]


def challengers(choices: Sequence[str]) -> list[Challenger]:
    """The peers of these names, each once.

    Raises:
        PeerError: as `Challenger.of`.
    """
    return [Challenger.of(choice) for choice in dict.fromkeys(choices) if choice != "none"]
