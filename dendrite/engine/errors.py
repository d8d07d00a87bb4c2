"""Every error that Dendrite raises on purpose.

    DendriteError
    ├── ProgramError   (ValueError)    a search program that cannot be built
    └── EngineError                    something that failed while running
        ├── OutOfBlocks                the K/V pool is too small for this; the one that is worth a retry
        ├── BranchError      (ValueError)    a branch used wrongly: pruned, foreign, busy, `at` out of range
        ├── RequestError     (ValueError)    an argument that cannot be run: empty prompt, negative temperature
        ├── ConstraintError  (ValueError)    a grammar that cannot be compiled or met
        ├── ModelError       (RuntimeError)  a model that cannot be found, loaded or run exactly
        ├── ContextOverflow  (RuntimeError)  more tokens than the model's context holds
        ├── SnapshotError    (RuntimeError)  a snapshot that cannot be written or read
        │   ├── SnapshotDamaged              cut off, altered, or no snapshot at all
        │   ├── SnapshotTooNew               written by a later version
        │   └── SnapshotMismatch             written for another model
        ├── CallbackError    (RuntimeError)  a user's function in a search raised or returned nonsense
        ├── EngineClosed     (RuntimeError)  the engine was closed
        │   └── EngineForked                 the process was forked: the engine stayed with the parent
        ├── IntegrityError   (RuntimeError)  K/V or its bookkeeping is not what it should be (`integrity=`)
        ├── StepFailed       (RuntimeError)  a step failed and the calls in it with it; the engine goes on
        └── EngineDead       (RuntimeError)  the step loop died of an error of its own

`ValueError` and `RuntimeError` are what common retry policies (LangGraph's among them) leave alone.
"""

from __future__ import annotations


class DendriteError(Exception):
    """The root of everything this package raises on purpose."""


class ProgramError(DendriteError, ValueError):
    """A search program that cannot be built; raised by `dd.compile` and the decorators."""


class EngineError(DendriteError):
    """Something that failed while an engine or a search was running."""


class OutOfBlocks(EngineError):
    """Not even an otherwise empty K/V pool would do: idle branches leave it by themselves. Nothing was changed.

    Attributes:
        needed: blocks that a branch of the call needs at once, its path included.
        free: blocks that could be had now.
        prunable: blocks that other branches hold and `prune()` would give back.
    """

    def __init__(self, needed: int, free: int, prunable: int) -> None:
        super().__init__(
            f"{needed} blocks of K/V are needed at once, {free} are free and {prunable} are held by other branches: "
            "ask for fewer tokens, score fewer choices at a time, or load the engine with a larger kv_memory"
        )
        self.needed = needed
        self.free = free
        self.prunable = prunable


class BranchError(EngineError, ValueError):
    """A branch used in a way its state forbids. Nothing was changed."""


class RequestError(EngineError, ValueError):
    """An argument that cannot be run, such as an empty prompt. Nothing was changed."""


class ConstraintError(EngineError, ValueError):
    """A grammar that cannot be compiled, or that left a branch without a legal token."""


class ModelError(EngineError, RuntimeError):
    """A model that cannot be found, loaded, or run exactly by this engine."""


class ContextOverflow(EngineError, RuntimeError):
    """More tokens than the model's context holds. Nothing was changed."""


class SnapshotError(EngineError, RuntimeError):
    """A snapshot that cannot be written or read. Nothing was changed, neither in the engine nor on disk."""


class SnapshotDamaged(SnapshotError):
    """A file that is no snapshot, is cut off, or was altered."""


class SnapshotTooNew(SnapshotError):
    """A snapshot written by a later version of this package."""


class SnapshotMismatch(SnapshotError):
    """A snapshot of another model."""


class CallbackError(EngineError, RuntimeError):
    """A user's function in a search raised, or returned something it may not."""


class EngineClosed(EngineError, RuntimeError):
    """The engine was closed before or while the call ran."""


class EngineForked(EngineClosed):
    """The process was forked, and the engine with its thread stayed with the parent: start processes by "spawn"."""


class StepFailed(EngineError, RuntimeError):
    """A step of the engine failed, and with it every call that was running; their branches are as they were.

    The engine goes on, so the next call may well work. The cause is chained.
    """


class IntegrityError(EngineError, RuntimeError):
    """A block of K/V is not what its branch believes; see `integrity=` of `Engine.load`.

    Attributes:
        branch: which branch reads the block, in words.
        node: the run of tokens that holds it; None if none does.
        block: its number.
        is_fatal: bookkeeping is wrong, so the engine is dead. Otherwise one block's K/V was damaged: the call failed,
            its branches are as they were, the K/V was dropped and will be computed again, and the engine goes on.
    """

    def __init__(self, why: str, *, branch: str, node: int | None, block: int, is_fatal: bool) -> None:
        where = f"block {block} of node {node}, which {branch} reads," if node is not None else f"block {block}"
        advice = "load a new engine" if is_fatal else "try again, and check the machine's memory if it happens again"
        super().__init__(f"{where} {why}: {advice}")
        self.branch = branch
        self.node = node
        self.block = block
        self.is_fatal = is_fatal


class EngineDead(EngineError, RuntimeError):
    """The engine's step loop died of an error of its own; the cause is chained. Load a new engine."""
