"""Dendrite: an in-process LLM engine for agents that search.

    import dendrite as dd

    engine = dd.Engine.load("smollm2-135m-instruct")
    a, b = engine.root("The plan:").fork(2)

The front door holds what is needed daily; everything else is imported from its own module. Names are loaded on first
use, so that `import dendrite` costs next to nothing.
"""

from __future__ import annotations

import importlib

from dendrite.engine import openmp as _openmp  # noqa: F401 - has to come before anybody imports torch

# `__init__.pyi` holds the same names for editors and type checkers; a test keeps the two alike.
_ROOMS = {
    "dendrite.dsl.choice": ("Choice",),
    "dendrite.dsl.events": ("Event",),
    "dendrite.dsl.marks": ("Mark", "expand", "observe", "prune", "reward", "score"),
    "dendrite.dsl.meter": ("Usage",),
    "dendrite.dsl.node": ("Node",),
    "dendrite.dsl.program": ("Part", "Program", "compile"),
    "dendrite.dsl.records": ("Budget", "Child", "Gen", "Outcome", "Reject"),
    "dendrite.dsl.result": ("Result", "Tree"),
    "dendrite.dsl.search": ("Search",),
    "dendrite.dsl.strategies.adaptive_branching": ("AdaptiveBranching",),
    "dendrite.dsl.strategies.base": ("Candidate", "Expand", "Expanded", "Select", "Selected", "Strategy"),
    "dendrite.dsl.strategies.beam": ("Beam",),
    "dendrite.dsl.strategies.best_first": ("BestFirst",),
    "dendrite.dsl.strategies.best_of_n": ("BestOfN",),
    "dendrite.dsl.strategies.depth_first": ("DepthFirst",),
    "dendrite.dsl.strategies.lats": ("LATS",),
    "dendrite.dsl.strategies.mcts": ("MCTS",),
    "dendrite.dsl.strategies.self_refine": ("SelfRefine",),
    "dendrite.dsl.types": ("Prompt",),
    "dendrite.engine.branch": ("Branch",),
    "dendrite.engine.constraints": ("Constraint",),
    "dendrite.engine.engine": ("Engine",),
    "dendrite.engine.errors": (
        "BranchError",
        "CallbackError",
        "ConstraintError",
        "ContextOverflow",
        "DendriteError",
        "EngineClosed",
        "EngineDead",
        "EngineError",
        "ModelError",
        "OutOfBlocks",
        "ProgramError",
        "RequestError",
        "SnapshotError",
    ),
    "dendrite.engine.generation": ("Generation",),
    "dendrite.engine.messages": ("Message",),
    "dendrite.engine.stats": ("Stats",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__version__ = "0.1.0"
__all__ = [*_ROOM_OF, "__version__"]  # noqa: PLE0604 - written out, it would be the third copy of these names


def __getattr__(name: str) -> object:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'dendrite' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_ROOM_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
