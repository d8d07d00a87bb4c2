"""The head and the sampler on a CUDA device: launched as a graph, read back while the next step runs.

    reads ─► rows of hidden states ─┐                    ┌─► tokens ─► the next step, on the device
    keys, positions, temperatures ──┴► logits ─► draws ──┴─► tokens, log-probabilities ─► pinned memory ─► host

Draws that need the host (`head.needs_settled`) go through the same code as on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dendrite.engine.cuda_runner import CudaRunner
from dendrite.engine.generation import GenerationRequest
from dendrite.engine.graphs import Graphs, bucket_for
from dendrite.engine.head import ROWS_AT_ONCE, Flight, Head, Result, needs_settled
from dendrite.engine.launching import Launcher
from dendrite.engine.masks import Masks
from dendrite.engine.requests import ScoreRequest
from dendrite.engine.sampling import SPOILT, LogitsError
from dendrite.engine.sampling_device import DrawParams, Draws, draw_tokens
from dendrite.engine.sampling_draw import signed
from dendrite.engine.sampling_row import Sampled
from dendrite.engine.step import Read


class DeviceHead(Head):
    """Reads a step without waiting for it."""

    def __init__(self, runner: CudaRunner) -> None:
        super().__init__(runner)
        self._launcher = runner.launcher
        device = runner.device
        self._hidden = torch.zeros((ROWS_AT_ONCE, runner.spec.hidden_size), dtype=runner.dtype, device=device)
        self._packed = torch.zeros(_PARAMS_BYTES * ROWS_AT_ONCE, dtype=torch.uint8, device=device)
        self._params = _unpacked(self._packed)
        self._graphs: Graphs[tuple[Tensor, Draws]] = Graphs(runner.launcher)

    def launch(self, reads: Sequence[Read], hidden: Tensor | None, masks: Masks | None) -> Flight:
        """Start reading; see `Head.launch`."""
        with torch.inference_mode(), self._launcher.launching():
            if needs_settled(reads):
                return super().launch(reads, hidden, masks)
            cuts = range(0, len(reads), ROWS_AT_ONCE)
            parts = [self._launch_part(reads[first : first + ROWS_AT_ONCE], hidden) for first in cuts]
            return _Flight(self._launcher, reads, parts)

    def launching(self) -> AbstractContextManager[object]:
        """See `Head.launching`; changing to the stream for each step takes as long as launching a kernel or two."""
        return self._launcher.launching()

    def close(self) -> None:
        """See `Head.close`; gives the graphs' memory back."""
        self._launcher.synchronize()
        self._graphs.clear()
        super().close()

    def _launch_part(self, reads: Sequence[Read], hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities of up to `ROWS_AT_ONCE` reads, on their way."""
        num = len(reads)
        bucket = bucket_for(num)
        assert bucket is not None, "a part fits the largest graph"
        self._gather(reads, hidden)
        is_filtered = self._set_controls(reads)
        logits, draws = self._graphs.replay(
            (bucket, is_filtered), partial(self._draw_bucket, bucket, is_filtered=is_filtered)
        )
        scored = [(row, read) for row, read in enumerate(reads) if isinstance(read.request, ScoreRequest)]
        tokens, logprobs = draws.tokens[:num].clone(), draws.logprobs[:num]
        if scored:
            logprobs = logprobs.clone()
            rows = self._to_device([row for row, _ in scored])
            targets = self._to_device([_target(read) for _, read in scored])
            logprobs[rows] = (logits[rows, targets].float() - draws.normalizers[rows]).clamp_(max=0)
        return tokens, logprobs

    def _draw_bucket(self, bucket: int, *, is_filtered: bool) -> tuple[Tensor, Draws]:
        logits = self._runner.logits(self._hidden[:bucket])
        return logits, draw_tokens(logits, self._params.first(bucket), filtered=is_filtered)

    def _gather(self, reads: Sequence[Read], hidden: Tensor | None) -> None:
        """Put each read's hidden row into the static buffer."""
        sources: dict[int, tuple[Tensor, list[int], list[int]]] = {}  # tensor, its rows, where they go
        for place, read in enumerate(reads):
            tensor, row = (hidden, read.source) if isinstance(read.source, int) else read.source
            assert isinstance(tensor, Tensor)
            entry = sources.setdefault(id(tensor), (tensor, [], []))
            entry[1].append(row)
            entry[2].append(place)
        for tensor, rows, places in sources.values():
            if rows == places == list(range(len(tensor))):
                self._hidden[: len(rows)].copy_(tensor)
            else:
                index = self._to_device([rows, places])
                self._hidden.index_copy_(0, index[1], tensor.index_select(0, index[0]))

    def _set_controls(self, reads: Sequence[Read]) -> bool:
        """Upload what the draws read; whether any of them drops unlikely tokens."""
        staged = self._launcher.staged(tuple(self._packed.shape), torch.uint8)
        params = _unpacked(staged)
        keys, positions, temperatures = params.keys.numpy(), params.positions.numpy(), params.temperatures.numpy()
        top_ks, top_ps, min_ps = params.top_ks.numpy(), params.top_ps.numpy(), params.min_ps.numpy()
        top_ps.fill(1)
        is_filtered = False
        for place, read in enumerate(reads):
            if not isinstance(read.request, GenerationRequest):
                continue  # draws the likeliest token, which nobody reads
            row = read.request.row
            keys[place], positions[place] = signed(row.key), row.draw_position
            temperatures[place] = row.params.temperature
            if row.filtered:
                is_filtered = True
                top_ks[place], top_ps[place], min_ps[place] = row.params.top_k, row.params.top_p, row.params.min_p
        self._packed.copy_(staged, non_blocking=True)
        return is_filtered

    def _to_device(self, numbers: list[int] | list[list[int]]) -> Tensor:
        values = np.array(numbers, dtype=np.int64)
        staged = self._launcher.staged(values.shape, torch.int64)
        staged.numpy()[...] = values
        return self._launcher.to_device(staged)


_PARAMS_BYTES = 2 * 8 + 4 * 4
"""Of a row's parameters in one packed buffer: a copy for each of them would cost more than what they hold."""


def _unpacked(packed: Tensor) -> DrawParams:
    """Views of a packed buffer."""
    num_rows = len(packed) // _PARAMS_BYTES
    longs = packed[: 16 * num_rows].view(torch.int64).view(2, num_rows)
    floats = packed[16 * num_rows : 28 * num_rows].view(torch.float32).view(3, num_rows)
    return DrawParams(
        keys=longs[0],
        positions=longs[1],
        temperatures=floats[0],
        top_ks=packed[28 * num_rows :].view(torch.int32),
        top_ps=floats[1],
        min_ps=floats[2],
    )


class _Flight:
    """Reads whose results are on their way to pinned memory."""

    is_ready = False

    def __init__(self, launcher: Launcher, reads: Sequence[Read], parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._reads = reads
        self.tokens: Tensor | None = parts[0][0] if len(parts) == 1 else torch.cat([tokens for tokens, _ in parts])
        logprobs = parts[0][1] if len(parts) == 1 else torch.cat([values for _, values in parts])
        self._tokens = launcher.to_host(self.tokens)
        self._logprobs = launcher.to_host(logprobs)
        self._wait = launcher.mark()

    def results(self) -> list[Result]:
        """Wait for the copies, then read them."""
        self._wait()
        pairs = zip(self._reads, self._tokens.tolist(), self._logprobs.tolist(), strict=True)
        return [_result(place, *each) for place, each in enumerate(pairs)]


def _result(place: int, read: Read, token: int, logprob: float) -> Result:
    if token < 0 or logprob != logprob:  # noqa: PLR0124 - NaN
        return LogitsError([place], SPOILT)
    return Sampled(token, logprob, ()) if isinstance(read.request, GenerationRequest) else logprob


def _target(read: Read) -> int:
    """The token whose log-probability a score's read asks for."""
    assert isinstance(read.request, ScoreRequest)
    return read.request.candidates[read.candidate][read.index]
