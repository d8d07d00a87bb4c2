"""Adapters to agent frameworks, one file each; none is imported unless its own path is."""
