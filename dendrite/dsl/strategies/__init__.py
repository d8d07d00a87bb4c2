"""Search strategies: which node to expand next, and which to keep. Pure functions over plain state."""
