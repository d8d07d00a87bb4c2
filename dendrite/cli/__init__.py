"""The `dendrite` command. Each module here imports torch only when its command runs, so that `--help` is quick."""
