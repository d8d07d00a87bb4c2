# What editors and type checkers read of the front door; `__init__.py` loads the same names on first use.

from dendrite.dsl.choice import Choice as Choice
from dendrite.dsl.events import Event as Event
from dendrite.dsl.marks import (
    Mark as Mark,
)
from dendrite.dsl.marks import (
    expand as expand,
)
from dendrite.dsl.marks import (
    observe as observe,
)
from dendrite.dsl.marks import (
    prune as prune,
)
from dendrite.dsl.marks import (
    reward as reward,
)
from dendrite.dsl.marks import (
    score as score,
)
from dendrite.dsl.meter import Usage as Usage
from dendrite.dsl.node import Node as Node
from dendrite.dsl.program import (
    Part as Part,
)
from dendrite.dsl.program import (
    Program as Program,
)
from dendrite.dsl.program import (
    compile as compile,  # noqa: A004 - the name users know
)
from dendrite.dsl.records import (
    Budget as Budget,
)
from dendrite.dsl.records import (
    Child as Child,
)
from dendrite.dsl.records import (
    Gen as Gen,
)
from dendrite.dsl.records import (
    Outcome as Outcome,
)
from dendrite.dsl.records import (
    Reject as Reject,
)
from dendrite.dsl.result import (
    Result as Result,
)
from dendrite.dsl.result import (
    Tree as Tree,
)
from dendrite.dsl.search import Search as Search
from dendrite.dsl.strategies.adaptive_branching import AdaptiveBranching as AdaptiveBranching
from dendrite.dsl.strategies.base import Candidate as Candidate
from dendrite.dsl.strategies.base import Expand as Expand
from dendrite.dsl.strategies.base import Expanded as Expanded
from dendrite.dsl.strategies.base import Select as Select
from dendrite.dsl.strategies.base import Selected as Selected
from dendrite.dsl.strategies.base import Strategy as Strategy
from dendrite.dsl.strategies.beam import Beam as Beam
from dendrite.dsl.strategies.best_first import BestFirst as BestFirst
from dendrite.dsl.strategies.best_of_n import BestOfN as BestOfN
from dendrite.dsl.strategies.depth_first import DepthFirst as DepthFirst
from dendrite.dsl.strategies.lats import LATS as LATS
from dendrite.dsl.strategies.mcts import MCTS as MCTS
from dendrite.dsl.strategies.self_refine import SelfRefine as SelfRefine
from dendrite.dsl.types import Prompt as Prompt
from dendrite.engine.branch import Branch as Branch
from dendrite.engine.constraints import Constraint as Constraint
from dendrite.engine.engine import Engine as Engine
from dendrite.engine.errors import (
    BranchError as BranchError,
)
from dendrite.engine.errors import (
    CallbackError as CallbackError,
)
from dendrite.engine.errors import (
    ConstraintError as ConstraintError,
)
from dendrite.engine.errors import (
    ContextOverflow as ContextOverflow,
)
from dendrite.engine.errors import (
    DendriteError as DendriteError,
)
from dendrite.engine.errors import (
    EngineClosed as EngineClosed,
)
from dendrite.engine.errors import (
    EngineDead as EngineDead,
)
from dendrite.engine.errors import (
    EngineError as EngineError,
)
from dendrite.engine.errors import (
    ModelError as ModelError,
)
from dendrite.engine.errors import (
    OutOfBlocks as OutOfBlocks,
)
from dendrite.engine.errors import (
    ProgramError as ProgramError,
)
from dendrite.engine.errors import (
    RequestError as RequestError,
)
from dendrite.engine.errors import (
    SnapshotError as SnapshotError,
)
from dendrite.engine.generation import Generation as Generation
from dendrite.engine.messages import Message as Message
from dendrite.engine.stats import Stats as Stats

__version__: str
