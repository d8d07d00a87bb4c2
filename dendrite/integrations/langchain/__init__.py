"""Dendrite for LangChain.

from dendrite.integrations.langchain import ChatDendrite
"""

from dendrite.integrations.langchain.calls import ChatContextOverflow
from dendrite.integrations.langchain.chat_model import ChatDendrite

__all__ = ["ChatContextOverflow", "ChatDendrite"]
