"""A runner without a model: it keeps token ids where K/V would be and finds each row's text through the plan.

    pool slots   [ U s e _ 4 _ … ]      a token id and its position, written by `batch.slots`
    row          segments → spans → slots → token ids → text → script → logits

So a plan that misses a segment, a block that was not copied or was given away too early, or a wrong position shows
at once, as an error or as a text that no script wrote.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dendrite.engine.batch import Batch, Segment
from dendrite.engine.ids import BlockId
from dendrite.engine.spec import ModelSpec
from dendrite.engine.swap import KVMover, Spans
from dendrite.testing.scripted import Script
from dendrite.testing.tokenizer import END, FORCED, OPENING, SPECIAL, VOCAB_SIZE, ByteTokenizer

_UNLIKELY = -30.0
"""The logit of what the script does not say: all of them together are less likely than one in 10**9."""
_NOTHING = -1


class ScriptedRunner:
    """`dendrite.engine.runner.Runner` over a script. Its hidden states are the logits themselves."""

    look_ahead = 0
    prefill_chunk = 512

    def __init__(self, script: Script, *, num_blocks: int, block_size: int, context_length: int) -> None:
        self.spec = ModelSpec(
            name="scripted",
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=1,
            hidden_size=VOCAB_SIZE,
            vocab_size=VOCAB_SIZE,
            context_length=context_length,
            dtype="float32",
        )
        self.fingerprint = "scripted"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.mover: KVMover = ScriptedMover(self)
        self.default_swap_bytes = 4 * num_blocks * block_size * self.spec.bytes_per_token
        self._script = script
        num_slots = (num_blocks + 1) * block_size  # block 0 is the trash block
        self.tokens = [_NOTHING] * num_slots
        self.positions = [_NOTHING] * num_slots

    def run(self, batch: Batch, drawn: Tensor | None = None) -> Tensor:
        """Copy blocks, keep the rows' tokens, and read the output rows' paths.

        Returns:
            [num_outputs, vocab_size], the logits of the next token.
        """
        self.mover.copy_blocks(batch.copies)
        tokens = [token if token >= 0 or drawn is None else int(drawn[-1 - token]) for token in batch.token_ids]
        for token, position, slot in zip(tokens, batch.positions, batch.slots, strict=True):
            self.tokens[slot], self.positions[slot] = token, position
        rows = [next_logits(self._script, self._path(batch, row, tokens[row])) for row in batch.output_rows]
        return torch.stack(rows) if rows else torch.empty(0, VOCAB_SIZE)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [n, vocab_size] are the logits."""
        return hidden

    def close(self) -> None:
        """There is nothing to give back."""

    def _path(self, batch: Batch, row: int, token: int) -> list[int]:
        """The token ids that a row attends to, which must be its whole path, each position once."""
        slots = [slot for segment in batch.plan.segments for slot in _slots_read(segment, row)]
        by_position = {self.positions[slot]: self.tokens[slot] for slot in slots}
        num = batch.positions[row] + 1
        seen = sorted(self.positions[slot] for slot in slots)
        assert seen == list(range(num)), f"row {row} at position {num - 1} reads positions {seen}"
        assert by_position[num - 1] == token, f"row {row} does not read its own token"
        return [by_position[position] for position in range(num)]


class ScriptedMover:
    """`dendrite.engine.swap.KVMover` over the token ids that a scripted runner keeps where K/V would be."""

    def __init__(self, runner: ScriptedRunner) -> None:
        self._runner = runner

    def save(self, spans: Spans) -> object:
        """Token ids as keys and positions as values, [1, 2, 1, num_tokens, 1]."""
        slots = [slot for first, last in spans for slot in range(first, last)]
        kept = [[memory[slot] for slot in slots] for memory in (self._runner.tokens, self._runner.positions)]
        return torch.tensor(kept).view(1, 2, 1, len(slots), 1)

    def load(self, saved: object, slots: Sequence[int]) -> None:
        """Puts them into these slots."""
        assert isinstance(saved, Tensor)
        tokens, positions = saved[0, :, 0, : len(slots), 0].tolist()
        for slot, token, position in zip(slots, tokens, positions, strict=True):
            self._runner.tokens[slot], self._runner.positions[slot] = token, position

    def copy_blocks(self, copies: Sequence[tuple[BlockId, BlockId]]) -> None:
        """Copies whole blocks."""
        size = self._runner.block_size
        for source, destination in copies:
            for slots in (self._runner.tokens, self._runner.positions):
                slots[destination * size : (destination + 1) * size] = slots[source * size : (source + 1) * size]

    def digests(self, block_ids: Sequence[BlockId]) -> list[int]:
        """A hash of each block's tokens and positions."""
        size = self._runner.block_size
        slots = [slice(block * size, (block + 1) * size) for block in block_ids]
        return [hash((tuple(self._runner.tokens[part]), tuple(self._runner.positions[part]))) for part in slots]

    def checksum(self, saved: object) -> int:
        """A hash of its numbers."""
        assert isinstance(saved, Tensor)
        return hash(tuple(saved.flatten().tolist()))

    def write(self, saved: object, path: Path) -> None:
        """As JSON."""
        assert isinstance(saved, Tensor)
        path.write_text(json.dumps(saved.tolist()))

    def read(self, path: Path) -> object:
        """From JSON."""
        return torch.tensor(json.loads(path.read_text()))

    def settle(self) -> None:
        """Nothing runs behind."""


def _slots_read(segment: Segment, row: int) -> Iterator[int]:
    """The slots of one segment that a row reads, in key order."""
    if not segment.row_start <= row < segment.row_end:
        return
    own = row - segment.row_start
    num = segment.num_keys
    if own < segment.causal_rows:
        num = segment.num_keys - segment.causal_rows + own + 1
    slots = [slot for first, last in segment.spans for slot in range(first, last)]
    assert len(slots) == segment.num_keys, f"a segment of {segment.num_keys} keys spans {len(slots)} slots"
    yield from slots[:num]


def next_logits(script: Script, path: Sequence[int]) -> Tensor:
    """Logits [vocab_size] of the token after `path`."""
    logits = torch.full((VOCAB_SIZE,), _UNLIKELY)
    masses = _next_masses(script, path)
    total = sum(masses.values())
    for token, mass in masses.items():
        logits[token] = math.log(mass / total)
    return logits


def _next_masses(script: Script, path: Sequence[int]) -> dict[int, float]:
    masses: dict[int, float] = {}
    num_said, replies = _reply_in_progress(script, path)
    for reply, weight in replies.items():
        token = reply[num_said] if num_said < len(reply) else END
        masses[token] = masses.get(token, 0.0) + weight
    return masses


def _reply_in_progress(script: Script, path: Sequence[int]) -> tuple[int, dict[tuple[int, ...], float]]:
    """How many tokens of its reply the model has said, and the replies that go on from there.

    The last text of the path is the reply so far, or a label that is being scored, if the script says something that
    begins with it to all that stands before it. Else it belongs to the prompt.
    """
    for start in _openings(path):
        if start > 1:  # a text right after <|begin|> is a prompt
            said = _plain(path[start:])
            replies = _replies(script, path[:start])
            going_on = {reply: weight for reply, weight in replies.items() if _plain(reply[: len(said)]) == said}
            if going_on:
                return len(said), going_on
    return 0, _replies(script, path)


def _replies(script: Script, path: Sequence[int]) -> dict[tuple[int, ...], float]:
    tokenizer = ByteTokenizer()
    given = script(tokenizer.decode(path, special=True))
    texts = [given] if isinstance(given, str) else given
    weights = texts if isinstance(texts, Mapping) else dict.fromkeys(texts, 1.0)
    return {tuple(tokenizer.encode(text)): weight for text, weight in weights.items() if weight > 0}


def _openings(path: Sequence[int]) -> Iterator[int]:
    """Where the text at the end of the path may begin: at a run that a grammar forced, or where a text surely began."""
    for index in range(len(path) - 1, -1, -1):
        if path[index] >= SPECIAL:
            return
        if path[index] >= OPENING:
            yield index
            if path[index] < FORCED:
                return


def _plain(token_ids: Sequence[int]) -> list[int]:
    return [token_id % 256 for token_id in token_ids]
