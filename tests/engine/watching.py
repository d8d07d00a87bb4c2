"""An engine whose head keeps the bytes of all logits it computes, by the path they follow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor, uint8

from dendrite.engine.config import EngineConfig
from dendrite.engine.devices import runner_and_head
from dendrite.engine.engine import Engine
from dendrite.engine.head import Head, Result, _distinct_rows
from dendrite.engine.masks import Masks
from dendrite.engine.models import LoadedModel
from dendrite.engine.requests import ScoreRequest
from dendrite.engine.runner import Runner
from dendrite.engine.step import Read
from dendrite.engine.text import HFTokenizer

Path = tuple[int, ...]


class WatchingHead(Head):
    """Notes which bytes each path's logits had, whenever they were computed."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner)
        self.seen: dict[Path, set[bytes]] = defaultdict(set)
        self.num_logits = 0
        self._logits: list[Tensor] = []
        compute = runner.logits

        def kept(hidden: Tensor) -> Tensor:
            logits = compute(hidden)
            self._logits = list(logits)
            return logits

        runner.logits = kept  # type: ignore[method-assign]  # watched

    def _read_part(self, reads: Sequence[Read], hidden: Tensor | None, masks: Masks | None) -> list[Result]:
        paths = [_path(read) for read in reads]  # before anything is appended
        results = super()._read_part(reads, hidden, masks)
        _, places = _distinct_rows(reads, hidden)
        for path, place in zip(paths, places, strict=True):
            self.seen[path].add(self._logits[place].contiguous().view(uint8).numpy().tobytes())
        self.num_logits += len(reads)
        return results


def _path(read: Read) -> Path:
    pieces: list[int] = []
    node, offset = read.request.tip.node, read.request.tip.offset
    while True:
        pieces[:0] = node.token_ids[:offset]
        if node.parent is None:
            break
        offset, node = node.offset, node.parent
    if isinstance(read.request, ScoreRequest):
        pieces += read.request.candidates[read.candidate][: read.index]
    return tuple(pieces)


def watched(loaded: LoadedModel, config: EngineConfig) -> tuple[Engine, WatchingHead]:
    """An engine on the model, and its head."""
    runner, _ = runner_and_head(loaded.model, loaded.spec, config)
    head = WatchingHead(runner)
    return Engine(runner, HFTokenizer(loaded.tokenizer, loaded.eos_token_ids), config, head), head
