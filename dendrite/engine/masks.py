"""Which tokens the constraints of a step's rows allow, computed on threads of their own while the model runs.

schedule ──► begin(guides) ──► run the model ──────────► sample: wait, then `sampling_masks.forbid`
                 └── llguidance's threads fill `bits` ──┘
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from llguidance import LLExecutor
from torch import Tensor

from dendrite.engine.grammars import Guide


@dataclass(frozen=True, slots=True)
class Masks:
    """The masks of one step; `wait` before reading them."""

    bits: Tensor
    """[num_guides, ceil(vocab / 32)] int32 on the CPU: bit i of word w is 1 where token 32 w + i is allowed."""
    places: dict[int, int]
    """id() of a guide -> its row in `bits`."""
    done: Future[None]

    def wait(self) -> None:
        """Return when `bits` is filled."""
        self.done.result()

    def rows_of(self, guides: Sequence[Guide | None]) -> tuple[list[int], Tensor]:
        """The places of those that are not None, [n], and the masks of just these, [n, words]."""
        rows = [index for index, guide in enumerate(guides) if guide is not None]
        places = [self.places[id(guide)] for guide in guides if guide is not None]
        if places == list(range(len(self.bits))):
            return rows, self.bits
        return rows, self.bits[torch.tensor(places)]


class MaskWriter:
    """Fills the masks of step after step. `begin` and `Masks.wait` are for the step loop's thread."""

    def __init__(self, vocab_size: int) -> None:
        self._num_words = -(-vocab_size // 32)
        self._executor: LLExecutor | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dendrite-masks")  # no thread before its first use

    def begin(self, guides: Sequence[Guide], *, pin: bool = False) -> Masks:
        """Start computing what each guide allows next. Until `wait` returns nobody else may use the guides.

        Args:
            guides: distinct ones. A guide that cannot go on has its `error` set afterwards; its mask means nothing.
            pin: in page-locked memory, for an asynchronous copy to a GPU.
        """
        if self._executor is None:
            self._executor = LLExecutor()
        bits = torch.empty(len(guides), self._num_words, dtype=torch.int32, pin_memory=pin)
        matchers = [(guide.matcher, row) for row, guide in enumerate(guides)]
        words = bits.shape[1] * bits.element_size()
        done = self._thread.submit(
            self._executor.unsafe_compute_mask_ptr, matchers, bits.data_ptr(), words, len(matchers)
        )
        return Masks(bits, {id(guide): row for row, guide in enumerate(guides)}, done)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()
