"""`python -m dendrite`: the command line, where its script is not on the path."""

from dendrite.cli.main import app

app(prog_name="dendrite")
