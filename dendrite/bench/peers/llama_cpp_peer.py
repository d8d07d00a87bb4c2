"""llama.cpp as a peer, through the low-level interface of llama-cpp-python: sequence copies are its forks.

python -m dendrite.bench.peers.llama_cpp_peer FILE.gguf          branches over a prompt, see `TreeTask`
python -m dendrite.bench.peers.llama_cpp_peer FILE.gguf VOCAB    the suite's cases
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Sequence
from types import ModuleType

from dendrite.bench.cases import TEMPERATURE
from dendrite.bench.peers.protocol import Answer, PeerError, TreeTask, TreeTimes, serve, tree_answer
from dendrite.bench.peers.requests import Tokens, request_answer

Entry = tuple[int, int, int, bool]
"""Token, position, sequence, whether its logits are wanted."""
BATCH = 512
"""Tokens given to one call of `llama_decode`, its own default."""
INSTALL = "llama-cpp-python is not installed; `pip install llama-cpp-python` compiles it, which takes some minutes"


class LlamaCpp:
    """A model, and a context as large as the last task needed."""

    def __init__(self, library: ModuleType, path: str) -> None:
        self._lib = library
        library.llama_backend_init()
        self._model = library.llama_model_load_from_file(path.encode(), library.llama_model_default_params())
        if not self._model:
            raise PeerError(f"llama.cpp cannot load {path}")
        self._shape = (0, 0)
        """Cells and sequences of the context."""
        self._context: object = None
        self._warm: Tokens = []
        """What sequence 0 holds from the last `generate`."""
        self._batch = library.llama_batch_init(BATCH, 0, 1)

    def generate(self, prompts: Sequence[Tokens], num_tokens: int) -> list[Tokens]:
        """See `RequestEngine`: what all prompts share stays on sequence 0 from call to call, copies of it go on."""
        lib = self._lib
        shared = min(_shared(first, second) for first in prompts[:1] for second in prompts)
        shared = min(shared, min(map(len, prompts)) - 1)  # each needs a row of its own to draw from
        own = sum(len(prompt) - shared + num_tokens for prompt in prompts)
        self._make_room_for(shared + own, len(prompts) + 1)
        memory = lib.llama_get_memory(self._context)
        known = min(_shared(self._warm, prompts[0]), shared)
        lib.llama_memory_seq_rm(memory, 0, known, -1)
        self._decode_all([(token, known + i, 0, False) for i, token in enumerate(prompts[0][known:shared])])
        self._warm = prompts[0][:shared]
        samplers = [self._sampler(TEMPERATURE, branch) for branch in range(len(prompts))]
        rows: list[Entry] = []
        for branch, prompt in enumerate(prompts):
            lib.llama_memory_seq_rm(memory, branch + 1, -1, -1)
            lib.llama_memory_seq_cp(memory, 0, branch + 1, -1, -1)
            last = len(prompt) - 1
            rows += [(prompt[at], at, branch + 1, at == last) for at in range(shared, len(prompt))]
        outs = [[token] for token in self._draw_after(rows, samplers)]
        for number in range(num_tokens - 1):
            ends = [(out[-1], len(prompts[i]) + number, i + 1, True) for i, out in enumerate(outs)]
            for out, token in zip(outs, self._draw_after(ends, samplers), strict=True):
                out.append(token)
        for sampler in samplers:
            lib.llama_sampler_free(sampler)
        return outs

    def score(self, prompts: Sequence[Tokens], start: int) -> None:  # noqa: ARG002 - there is no way to do it
        """Refuse: there is no call for it."""
        raise PeerError("llama.cpp has no call for log-probabilities of prompts")

    def _draw_after(self, entries: Sequence[Entry], samplers: Sequence[object]) -> Tokens:
        """Compute the entries and draw a token after each that wants logits, in order."""
        drawn: Tokens = []
        for first in range(0, len(entries), BATCH):
            part = entries[first : first + BATCH]
            self._decode(part)
            for row, entry in enumerate(part):
                if entry[3]:
                    drawn.append(self._lib.llama_sampler_sample(samplers[len(drawn)], self._context, row))
        return drawn

    def _decode_all(self, entries: Sequence[Entry]) -> None:
        for first in range(0, len(entries), BATCH):
            self._decode(entries[first : first + BATCH])

    def run(self, task: TreeTask) -> TreeTimes:
        """One repetition: prompt on sequence 0, copies to the others, then one batch of all branches a token."""
        lib = self._lib
        self._make_room(task)
        memory = lib.llama_get_memory(self._context)
        lib.llama_memory_clear(memory, True)
        samplers = [self._sampler(task.temperature, task.seed + branch) for branch in range(task.num_branches)]
        began = time.perf_counter()
        last = self._prefill(task.prompt)
        prefilled = time.perf_counter()
        for branch in range(1, task.num_branches):
            lib.llama_memory_seq_cp(memory, 0, branch, -1, -1)
        forked = time.perf_counter()
        tokens = [lib.llama_sampler_sample(sampler, self._context, last) for sampler in samplers]
        for position in range(len(task.prompt), len(task.prompt) + task.num_tokens - 1):
            self._decode([(token, position, branch, True) for branch, token in enumerate(tokens)])
            tokens = [lib.llama_sampler_sample(sampler, self._context, row) for row, sampler in enumerate(samplers)]
        done = time.perf_counter()
        for sampler in samplers:
            lib.llama_sampler_free(sampler)
        num_decoded = task.num_branches * (task.num_tokens - 1)
        return TreeTimes(prefilled - began, forked - prefilled, done - forked, num_decoded)

    def _prefill(self, prompt: Sequence[int]) -> int:
        """Compute the prompt; the row, in its last batch, whose logits predict the first token."""
        row = 0
        for first in range(0, len(prompt), BATCH):
            part = prompt[first : first + BATCH]
            row = len(part) - 1
            is_end = first + len(part) == len(prompt)
            self._decode([(token, first + i, 0, is_end and i == row) for i, token in enumerate(part)])
        return row

    def _decode(self, entries: Sequence[Entry]) -> None:
        """One call."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for row, (token, position, sequence, wants_logits) in enumerate(entries):
            batch.token[row] = token
            batch.pos[row] = position
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = sequence
            batch.logits[row] = wants_logits
        if status := self._lib.llama_decode(self._context, batch):
            raise PeerError(f"llama_decode gave {status}")

    def _sampler(self, temperature: float, seed: int) -> object:
        lib = self._lib
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_temp(temperature))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(seed))
        return chain

    def _make_room(self, task: TreeTask) -> None:
        num_cells = len(task.prompt) + task.num_branches * task.num_tokens
        if self._shape != (num_cells, task.num_branches):
            self._new_context(num_cells, task.num_branches)

    def _make_room_for(self, num_cells: int, num_sequences: int) -> None:
        """The same, but a context that is larger than needed stays, with what is on it."""
        if num_cells > self._shape[0] or num_sequences > self._shape[1]:
            self._new_context(num_cells, num_sequences)
            self._warm = []

    def _new_context(self, num_cells: int, num_sequences: int) -> None:
        lib = self._lib
        if self._context is not None:
            lib.llama_free(self._context)
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = -(-num_cells // 256) * 256
        parameters.n_batch = BATCH
        parameters.n_ubatch = BATCH
        parameters.n_seq_max = num_sequences
        parameters.n_threads = parameters.n_threads_batch = os.cpu_count() or 1
        parameters.kv_unified = True  # sequences share cells, so that a copy copies nothing
        self._context = lib.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise PeerError(f"llama.cpp cannot make a context of {num_cells} cells")
        self._shape = (num_cells, num_sequences)


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))


def main(path: str, vocab_size: str = "") -> None:
    """Load, then answer tasks until the input ends."""

    def start() -> tuple[str, Answer]:
        try:
            library = importlib.import_module("llama_cpp")
        except ImportError as error:
            raise PeerError(INSTALL) from error
        peer = LlamaCpp(library, path)
        version = f"llama-cpp-python {library.__version__}"
        if vocab_size:
            return version, request_answer(peer, int(vocab_size))
        peer.run(TreeTask([1] * 8, 2, 4, 1.0, 0))
        return version, tree_answer(peer.run)

    serve(start)


if __name__ == "__main__":
    main(*sys.argv[1:])
