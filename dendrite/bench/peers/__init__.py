"""Other engines, each in a process of its own that speaks one line of JSON a message."""
