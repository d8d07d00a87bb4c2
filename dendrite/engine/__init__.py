"""The engine: tree, scheduler, runner, sampling. Import its rooms by name; the front door is `dendrite`."""
