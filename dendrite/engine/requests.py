"""What is asked of the step loop: a `Request` a branch, a `Group` a call. Without torch: the scheduler reads these."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from threading import Lock

from dendrite.engine.nodes import Tip
from dendrite.engine.tree import KVTree

Demand = list[tuple[Tip, int, bool]]


class Request:
    """Work on one branch. `tip` is where it starts; a generation moves it, a score leaves it as it is."""

    def __init__(self, tip: Tip) -> None:
        self.tip = tip
        self.priority = 0.0
        self.group: Group | None = None
        self.num_in_flight = 0  # reads that were launched and have not come back
        self.is_running = False
        self.is_done = False

    @property
    def is_waiting(self) -> bool:
        """Whether nothing can be computed for it before its reads in flight have come back."""
        raise NotImplementedError

    @property
    def tips(self) -> list[Tip]:
        """All that must stay in the pool while it runs."""
        return [self.tip]

    def demand(self) -> Demand:
        """The slots it may still take, as `demand.demand` reads them."""
        raise NotImplementedError


class GenerateRequest(Request):
    """Decode up to `num_left` tokens onto the tip."""

    def __init__(self, tip: Tip, num_left: int) -> None:
        super().__init__(tip)
        self.num_left = num_left
        self.num_pending = 1  # tokens at the tip's end that wait for K/V while decoding: the last, and forced ones

    @property
    def is_waiting(self) -> bool:
        """Its next token is being drawn, and nothing can be computed before it is known."""
        return self.num_in_flight > 0 and not self.tip.num_ahead

    def can_look_ahead(self) -> bool:
        """Whether the token after the one that is being drawn may be computed before that one is known."""
        return self.num_left > 1

    def demand(self) -> Demand:
        """The path's own tokens and those still to come."""
        # the last token needs no slot to be returned, and one that is looked ahead has joined the path
        return [(self.tip, max(0, self.num_left - 1 - self.tip.num_ahead), False)]


class ScoreRequest(Request):
    """The log-probability of each token of each candidate, read off temporary siblings in one pass.

    tip ──┬── " ye" ── "s"        a sibling holds all but its candidate's last token:
          └── " no"               the last one is only predicted, never read

    `tip` is the request's own, a fork of the branch, so that it stays where it is whatever the branch does meanwhile.
    """

    def __init__(self, tip: Tip, candidates: Sequence[Sequence[int]]) -> None:
        super().__init__(tip)
        self.candidates = [list(candidate) for candidate in candidates]
        self.siblings: list[tuple[int, Tip]] = []  # (candidate, tip); only for candidates of two tokens or more
        self.has_base = False  # whether the first token of every candidate is read, or being read
        self.logprobs = [[0.0] * len(candidate) for candidate in self.candidates]

    @property
    def tips(self) -> list[Tip]:
        """The path and the siblings."""
        return [self.tip, *(sibling for _, sibling in self.siblings)]

    def demand(self) -> Demand:
        """The path's own tokens and the siblings'."""
        path: Demand = [(self.tip, 0, False)]
        return path + [(self.tip, len(candidate) - 1, True) for candidate in self.candidates if len(candidate) > 1]

    def open_siblings(self, tree: KVTree) -> None:
        """Forks a sibling for every candidate that needs one."""
        for index, candidate in enumerate(self.candidates):
            if len(candidate) > 1:
                sibling = tree.fork(self.tip)
                tree.extend(sibling, candidate[:-1])
                self.siblings.append((index, sibling))

    def close(self, tree: KVTree) -> None:
        """Prunes them and the tip: nothing of the score stays."""
        for _, sibling in self.siblings:
            tree.prune(sibling, keep=False)
        self.siblings.clear()
        tree.prune(self.tip)

    @property
    def is_waiting(self) -> bool:
        """All it takes is computed, and being read."""
        return self.num_in_flight > 0 and self._is_computed

    @property
    def is_complete(self) -> bool:
        """Whether every token of every candidate has been read."""
        return self.num_in_flight == 0 and self._is_computed

    @property
    def _is_computed(self) -> bool:
        return self.has_base and all(tip.node.num_computed >= tip.offset for _, tip in self.siblings)


class Group:
    """The requests of one call. They run together as far as memory allows; one failure ends them all.

    Where not everything can run, calls with a higher `priority` go first, and equal ones in the order they came.
    """

    def __init__(self, requests: Sequence[Request], *, priority: float = 0.0) -> None:
        self.requests = list(requests)
        self.priority = priority
        self.num_open = len(self.requests)
        self.queued = list(self.requests)
        """Those that do not run yet, in the order they were given."""
        for request in self.requests:
            request.group = self
            request.priority = priority
        self._is_over = False
        self._error: BaseException | None = None
        self._future: Future[None] | None = None
        self._gate = Lock()  # a thread waits here, which is a shorter way than through a future's condition
        self._gate.acquire()

    @property
    def future(self) -> Future[None]:
        """For asyncio: resolves with the group."""
        if self._future is None:
            self._future = Future()
            if self._is_over:  # `resolve` sets this before it looks for a future, so that one of both settles it
                _settle(self._future, self._error)
        return self._future

    def wait(self) -> None:
        """Blocks until the call has ended; raises what ended it."""
        try:
            with self._gate:
                pass
            if self._error is not None:
                raise self._error
        finally:
            del self  # the error's traceback names this frame, and the group has the error: a cycle would hold branches

    def resolve(self, error: BaseException | None = None) -> None:
        """Wakes the caller."""
        if self._is_over:
            return
        self._error, self._is_over = error, True
        if self._future is not None:
            _settle(self._future, error)
        self._gate.release()

    def cancel(self) -> None:
        """Ends the call for whoever waits for it."""
        self.resolve(CancelledError())


def _settle(future: Future[None], error: BaseException | None) -> None:
    """Resolves a future, unless its caller has given up: asyncio cancels it from its own thread, at any moment."""
    with suppress(InvalidStateError):
        if isinstance(error, CancelledError):
            future.cancel()
        elif error is not None:
            future.set_exception(error)
        else:
            future.set_result(None)
