"""The step loop: one thread that turns requests into steps. The only place where the tree meets the runner.

    caller's thread                         the loop's thread
    submit(group) ── lock ──► queue ──────► lock: schedule    what the next step computes, blocks taken
    group.wait()                                  run         forward pass, without the lock
                                                  sample      hidden rows → tokens and log-probabilities
                                            lock: commit      tokens onto branches, ended requests out
                    ◄── group.resolve ──────

Everything that reads or changes the tree holds `lock`; the forward pass and the sampling do not, so forks go on
meanwhile. A request that ends while its step is in flight is `is_done`, and its row is discarded at commit.

On a device, where `run` and `sample` only launch work, the loop looks ahead, so that the device never waits for Python:

    launch 1 │ launch 2 │ commit 1 │ launch 3 │ commit 2 │ …
    device:  1──────────2──────────────────────3────────────

Step 2 computes the token that step 1 draws while nobody knows it yet (`KVTree.look_ahead`). If it ends the generation,
what step 2 did for it is discarded: nothing else ever reads that slot, and the device runs launches in order, so
whoever gets the block next writes it later. A known end is not run ahead, and neither is a draw that needs the host.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from dendrite.engine.batch import Batch
from dendrite.engine.errors import (
    DendriteError,
    EngineClosed,
    EngineDead,
    EngineError,
    EngineForked,
    IntegrityError,
    StepFailed,
)
from dendrite.engine.forking import FORKED, refuse_after_fork
from dendrite.engine.generation import FinishReason, GenerationRequest
from dendrite.engine.gil import exact_timers, stepping
from dendrite.engine.head import Flight, Head, Result, needs_settled
from dendrite.engine.ids import BlockId, NodeId
from dendrite.engine.integrity import Guard
from dendrite.engine.masks import Masks
from dendrite.engine.nodes import KVNode, Tip
from dendrite.engine.openmp import dismiss_team
from dendrite.engine.requests import Group, Request, ScoreRequest
from dendrite.engine.runner import MAX_DRAWN, Runner
from dendrite.engine.sampling import NoTokenLeft
from dendrite.engine.sampling_row import Sampled
from dendrite.engine.scheduler import Scheduler
from dendrite.engine.stats import Counters
from dendrite.engine.step import Read, Step
from dendrite.engine.tree import KVTree

_LOST_DEVICE: tuple[type[Exception], ...] = tuple(filter(None, [getattr(torch, "AcceleratorError", None)]))
"""After these nothing more can be done on the device."""


class StepLoop:
    """Runs whatever was submitted until it is stopped. `lock` guards `tree`, `scheduler` and `counters`."""

    def __init__(
        self, runner: Runner, head: Head, tree: KVTree, scheduler: Scheduler, guard: Guard | None = None
    ) -> None:
        self.lock = threading.RLock()
        self.tree = tree
        self.scheduler = scheduler
        self.counters = Counters()
        self.is_forked = False
        """Whether this is a copy in a forked child: the original's device, files and thread are not its own."""
        self._runner = runner
        self._head = head
        self._guard = guard
        self._fault: IntegrityError | None = None
        self._flights: deque[tuple[Step, Flight]] = deque()  # launched and not committed, oldest first
        self._in_step: Step | None = None
        self._settled: list[Group] = []  # calls that have ended, whose callers are woken at the end of the step
        self._counted_until = 0.0  # of the step's time, on the performance counter
        self._wake = threading.Condition(self.lock)
        self._collected: deque[Tip] = deque()  # tips of branches that Python collected; any thread may append
        self._end: EngineClosed | EngineDead | None = None
        refuse_after_fork(self)
        self._thread = threading.Thread(target=self._main, name="dendrite-step-loop", daemon=True)
        self._thread.start()

    # --- for callers -------------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[Request], *, priority: float = 0.0) -> Group:
        """Queues one call's requests; the group resolves when all have ended.

        Raises:
            OutOfBlocks, EngineClosed, EngineDead: nothing was changed.
        """
        group = Group(requests, priority=priority)
        dismiss_team()  # the caller may have computed something of its own before it waits here
        with self._wake:
            self.check_open()
            self.release_collected()
            self.scheduler.submit(group)
            for request in list(group.requests):
                if isinstance(request, GenerationRequest):
                    self._tell(request, request.begin())
            self._wake_callers()
            self._wake.notify()
        return group

    def cancel(self, group: Group, *, keep: bool = False) -> None:
        """Ends a call before its time; its branches roll back, or keep what they have."""
        with self.lock:
            self._end_group(group, None, keep=keep)

    def cancel_branch(self, tip: Tip) -> None:
        """Ends the generation that owns the tip, with what it has so far as its result; the lock is held."""
        for group in self.scheduler.open_groups():
            for request in list(group.requests):
                if isinstance(request, GenerationRequest) and request.tip is tip and not request.is_done:
                    request.finish("cancelled")
                    self._settle(request)
        self._wake_callers()

    def forget(self, tip: Tip) -> None:
        """A branch was collected; may run inside the garbage collector, so it only takes a note."""
        self._collected.append(tip)

    def release_collected(self) -> None:
        """Gives back what collected branches held; the lock is held."""
        while self._collected:
            tip = self._collected.popleft()
            if tip.status != "pruned":
                tip.status = "pruned"
                self.release(tip)

    def release(self, tip: Tip) -> None:
        """Gives back what a tip holds, unless the tree is a forked copy or cannot be trusted; the lock is held."""
        if self._fault is None and not self.is_forked:
            self.tree.prune(tip)

    def condemn(self, error: IntegrityError) -> None:
        """Ends the engine, because what the tree says cannot be trusted any more; the lock is held."""
        self._fault = self._fault or error
        self._end = self._end or _dead_of(self._fault)
        self._wake.notify()

    def check_blocks(self) -> None:
        """Looks at every block, where the engine has a guard; the lock is held.

        Raises:
            IntegrityError: the first that is wrong.
        """
        if self._guard is None or self._fault is not None:
            return
        try:
            damaged = self._guard.check_all()
        except IntegrityError as error:
            self.condemn(error)
            raise
        for each in damaged:
            self._drop_damaged(each)
        if damaged:
            raise damaged[0]

    def stay_behind(self) -> None:
        """This is a forked child's copy, without a thread: whatever is asked of it is refused."""
        self.is_forked = True
        self._end = self._end or EngineForked(FORKED)

    @property
    def has_ended(self) -> bool:
        """Whether it was closed or died; one that stayed with the parent of a forked process goes on there."""
        return self._end is not None and not self.is_forked

    def check_open(self) -> None:
        """Raises why the loop ended, if it did."""
        if self._end is not None:
            raise type(self._end)(*self._end.args) from self._end.__cause__

    def stop(self) -> None:
        """Ends the thread; whatever is open fails with `EngineClosed`. Idempotent."""
        with self._wake:
            if self._end is None:
                self._end = EngineClosed("the engine was closed: load another one with Engine.load")
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # --- the loop's thread -------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            exact_timers()
            with self._head.launching():
                self._work()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the waiters must hear of it
            with self.lock:
                if isinstance(error, IntegrityError):
                    self._fault = error
                self._end = _dead_of(error)
        self._head.close()
        with self.lock:
            for group in self.scheduler.open_groups():
                self._abandon(group)

    def _work(self) -> None:
        while self._wait_for_work():
            with stepping(), torch.inference_mode():
                while self._end is None and self.scheduler.has_work:
                    self._beat()
                self._flights.clear()  # nobody waits for what is left

    def _wait_for_work(self) -> bool:
        with self._wake:
            while self._end is None and not self.scheduler.has_work:
                self._wake.wait()
            return self._end is None

    def _beat(self) -> None:
        """One step. If it fails for a reason of its own (memory, a kernel, a callback), the engine goes on after it."""
        try:
            self._step()
        except (AssertionError, IntegrityError):
            raise  # what the tree says can't be trusted any more
        except Exception as error:
            if self._in_step is None or isinstance(error, _LOST_DEVICE):
                raise
            self._recover(self._in_step, error)
        finally:
            self._in_step = None  # it holds branches
            with self.lock:
                self._wake_callers()

    def _recover(self, step: Step, error: Exception) -> None:
        """Ends every call that was running, its branches rolled back, after a step that may have stopped anywhere.

        The tree counts on the step's copies, so they are made again. A source that was given up in this step may be
        another's by now, and written to: what was to be copied from there is computed again.
        """
        failure = StepFailed(f"a step failed, and the calls that ran in it: {type(error).__name__}: {error}")
        failure.__cause__ = error
        with self.lock:
            self._flights.clear()
            lost = self._copy_again(step.batch) if step.batch is not None else []
            for group in self.scheduler.open_groups():
                if any(request.is_running for request in group.requests):
                    self._end_group(group, failure)
            for block in lost:
                self.tree.discard(block)

    def _copy_again(self, batch: Batch) -> list[BlockId]:
        """Makes the copies whose sources are as they were; the destinations of the others."""
        size = self.tree.pool.block_size
        written = {slot // size for slot in batch.slots} | {destination for _, destination in batch.copies}
        safe = [(source, destination) for source, destination in batch.copies if source not in written]
        self._runner.mover.copy_blocks(safe)
        return [destination for source, destination in batch.copies if source in written]

    def _step(self) -> None:
        """One heartbeat: schedule → run → sample → commit."""
        self._counted_until = time.perf_counter()
        self._in_step = None
        with self.lock:
            self.release_collected()
            step = self.scheduler.schedule()
            self._fail(step)
            if self._guard is not None:
                self._guard.check(step)
        self._in_step = step
        if self._guard is not None:
            self._end_damaged(self._guard)
        masks = self._head.prepare(step.reads)
        hidden = self._run(step)
        num_ahead = self._launch_reads(step, hidden, masks)
        with self.lock:
            self.counters.count_step(step, blocks=self.tree.pool.num_used)
        _get_ready(step.reads)
        self._land(keep=num_ahead)
        with self.lock:
            self._look_ahead()
            self._count_time()

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.counters.busy_seconds += now - self._counted_until
        self._counted_until = now

    def _run(self, step: Step) -> Tensor | None:
        if step.batch is None:
            return None
        drawn = self._flights[-1][1].tokens if self._flights else None
        hidden = self._runner.run(step.batch, drawn)
        with self.lock:
            self.scheduler.commit(step, hidden)
        if self._guard is not None:
            self._guard.keep_sums(step)
        return hidden

    def _end_damaged(self, guard: Guard) -> None:
        """Ends the calls whose K/V has changed. The step runs without them: rows of ended requests are discarded."""
        for error in guard.damaged():
            with self.lock:
                self._drop_damaged(error)

    def _drop_damaged(self, error: IntegrityError) -> None:
        assert self._guard is not None
        nodes = self._guard.readers(error)
        for group in self.scheduler.open_groups():
            if any(request.is_running and nodes.intersection(_path_ids(request)) for request in group.requests):
                self._end_group(group, error)
        self._guard.discard(error)

    def _launch_reads(self, step: Step, hidden: Tensor | None, masks: Masks | None) -> int:
        """Starts the step's reads; returns how many steps may stay in flight."""
        if not step.reads:
            return 0
        if needs_settled(step.reads):
            self._land(keep=0)
            with self.lock:
                self._wake_callers()  # now, since these draws wait for the device
        flight = self._head.launch(step.reads, hidden, masks)
        for read in step.reads:
            read.request.num_in_flight += 1
        self._flights.append((step, flight))
        return 0 if flight.is_ready else self._runner.look_ahead

    def _land(self, *, keep: int) -> None:
        """Commits the oldest steps in flight until no more than `keep` are left."""
        while len(self._flights) > keep:
            step, flight = self._flights.popleft()
            results = flight.results()
            with self.lock:
                self._count_time()  # as with all that is counted: before anyone who could ask has the results
                self._commit(step, results)

    def _look_ahead(self) -> None:
        """Lets the branches whose tokens are in flight go on with them, where they can; the others wait."""
        reads = self._flights[-1][0].reads if self._flights else []
        for draw, read in enumerate(reads[:MAX_DRAWN]):
            request = read.request
            if not isinstance(request, GenerationRequest) or request.is_done or request.tip.num_ahead:
                continue
            if request.can_look_ahead():
                request.look_ahead(draw)

    def _fail(self, step: Step) -> None:
        while step.failed:  # none stays with the step: its traceback would lead to itself
            request, error = step.failed.pop(0)
            if request.group is not None:  # not ended yet by a failure of the same call
                self._end_group(request.group, error)

    def _commit(self, step: Step, results: Sequence[Result]) -> None:
        """Tokens onto branches, values into scores; what has ended leaves."""
        scores: dict[int, ScoreRequest] = {}
        for read, result in zip(step.reads, results, strict=True):
            request = read.request
            request.num_in_flight -= 1
            if request.is_done:
                continue
            if isinstance(result, NoTokenLeft) and isinstance(request, GenerationRequest) and request.row.guide:
                self._tell(request, request.give_up(result.reason))
            elif isinstance(result, DendriteError):
                assert request.group is not None
                self._end_group(request.group, result)
            elif isinstance(request, GenerationRequest) and isinstance(result, Sampled):
                self._accept(request, result)
            elif isinstance(request, ScoreRequest) and isinstance(result, float):
                request.logprobs[read.candidate][read.index] = result
                scores[id(request)] = request
        for score in scores.values():
            if score.is_complete and not score.is_done:
                self.counters.count_score(score)
                self._settle(score)

    def _accept(self, request: GenerationRequest, sampled: Sampled) -> None:
        self.counters.num_sampled += 1
        self._tell(request, request.accept(sampled))

    def _tell(self, request: GenerationRequest, reason: FinishReason | None) -> None:
        """Shows whoever watches what is new; with a reason, the generation has ended."""
        if reason is not None:
            request.finish(reason)
        request.show_new_text()
        if reason is not None:
            self.counters.num_logical += request.tip.length
            self.counters.num_forced += request.num_forced
            self._settle(request)

    # --- endings -----------------------------------------------------------------------------------------------

    def _abandon(self, group: Group) -> None:
        """The loop has ended: the call's waiters hear why, even if the tree is not what it should be."""
        error = self._fault or self._end
        try:
            self._end_group(group, error)
        except Exception:  # noqa: BLE001 - a broken tree is why the loop ended; the waiters come first
            for request in group.requests:
                if isinstance(request, GenerationRequest):
                    request.close()
            group.resolve(error)

    def _settle(self, request: Request) -> None:
        """One request has ended as it should; `_wake_callers` follows, in case it was the last of its group."""
        group = request.group
        assert group is not None
        self.scheduler.remove(request)
        if isinstance(request, GenerationRequest):
            request.close()
        if not group.num_open:
            self._settled.append(group)

    def _wake_callers(self) -> None:
        """Comes last: who wakes up waits for the interpreter's lock, which this thread keeps until it waits itself."""
        while self._settled:
            self._settled.pop(0).resolve()

    def _end_group(self, group: Group, error: EngineError | None, *, keep: bool = False) -> None:
        """Ends what is left of a call: with an error, or cancelled. Unless kept, every branch of it rolls back."""
        if not group.num_open:
            return
        for request in list(group.requests):
            if keep and not request.is_done and isinstance(request, GenerationRequest):
                request.finish("cancelled")
            self.scheduler.remove(request)
            if isinstance(request, GenerationRequest):
                if not keep and request.tip.status == "idle":
                    request.roll_back()
                request.close()
        if error is not None or keep:
            group.resolve(error)
        else:
            group.cancel()


def _dead_of(error: BaseException) -> EngineDead:
    end = EngineDead(f"the step loop died of {type(error).__name__}: {error}")
    end.__cause__ = error
    return end


def _get_ready(reads: Sequence[Read]) -> None:
    """While the device computes what is read."""
    for read in reads:
        if isinstance(read.request, GenerationRequest):
            read.request.get_ready()


def _path_ids(request: Request) -> set[NodeId]:
    """The nodes on the paths of all that the request reads."""
    found: set[NodeId] = set()
    for tip in request.tips:
        node: KVNode | None = tip.node
        while node is not None and node.node_id not in found:
            found.add(node.node_id)
            node = node.parent
    return found
