"""Dendrite for LangGraph.

from dendrite.integrations.langgraph import search_node
"""

from dendrite.integrations.langgraph.generate_node import generate_node
from dendrite.integrations.langgraph.handles import handle_of, open_handle
from dendrite.integrations.langgraph.saver import TimeTravelSaver
from dendrite.integrations.langgraph.search_graph import SearchState, search_graph
from dendrite.integrations.langgraph.search_node import Found, search_node
from dendrite.integrations.langgraph.sources import EngineSource
from dendrite.integrations.langgraph.tree_nodes import fork_node, pick_node, prune_node, score_node

__all__ = [
    "EngineSource",
    "Found",
    "SearchState",
    "TimeTravelSaver",
    "fork_node",
    "generate_node",
    "handle_of",
    "open_handle",
    "pick_node",
    "prune_node",
    "score_node",
    "search_graph",
    "search_node",
]
