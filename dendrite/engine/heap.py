"""Spares Python's garbage collector what stays: the objects of the libraries that a model needs, and of the model.

A full collection walks every object that there is. With PyTorch and Transformers imported these are 380,000, which
takes 0.2 seconds in the middle of some step, and again after some hundred steps of many branches. While a model is
loaded, what was there when it came is set aside (`gc.freeze`); what programs and steps make is collected as ever.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable


class _Heap:
    """What is set aside belongs to the process, so engines share the one count of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_users = 0
        self._is_ours = False

    def hold(self, owner: object) -> Callable[[], object]:
        """Set aside what there is, unless somebody has done so already.

        Returns:
            Gives it back once nobody holds it any more, so that what a closed engine leaves is collected; called at the
            latest when `owner` is freed.
        """
        with self._lock:
            if not self._num_users and not gc.get_freeze_count():
                gc.freeze()
                self._is_ours = True
            self._num_users += 1
        return weakref.finalize(owner, self._release)

    def _release(self) -> None:
        with self._lock:
            self._num_users -= 1
            if not self._num_users and self._is_ours:
                gc.unfreeze()
                self._is_ours = False


HEAP = _Heap()
