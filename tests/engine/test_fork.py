"""`os.fork` with a live engine: the child is refused and told what to do, the parent does not notice."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FORKED = """
import os, sys
import dendrite as dd
from dendrite.testing import scripted_engine
from dendrite.engine.errors import EngineForked

def reply(text):
    return "x" * 40

def refused(call):
    try:
        call()
    except EngineForked as error:
        assert "spawn" in str(error) and isinstance(error, dd.EngineClosed)
        return
    raise SystemExit("not refused")

def use_all(engine, root, idle):
    refused(lambda: engine.root("more"))
    refused(lambda: root.generate(max_tokens=2))
    refused(lambda: root.fork())
    refused(lambda: root.append("more"))
    refused(lambda: root.score(["a"]))
    refused(lambda: root.save("/nowhere"))
    assert idle[0].text.endswith("yx")   # what is there can be read
    idle.pop(0).prune()
    idle.pop()
    engine.stats()
    assert not engine.has_ended   # so that its name gives no second one here
    engine.close()

def run_child(engine, root, idle):
    child = os.fork()
    if not child:
        use_all(engine, root, idle)
        del engine, root, idle
        sys.exit(0)                      # finalizers and all
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

engine = scripted_engine(reply, num_blocks=40, swap_memory=0, swap_disk=1 << 20)
root = engine.root("a plan")
idle = [root.fork().append("y" * 20) for _ in range(12)]
for branch in idle:
    assert branch.generate(max_tokens=1).text == "x"   # most of them are on disk now
folder = engine.core.swap._folder.path
files = sorted(folder.iterdir())
assert len(files) > 3
run_child(engine, root, list(idle))
assert sorted(folder.iterdir()) == files
running = engine.submit([root.fork() for _ in range(3)], max_tokens=30)
run_child(engine, root, list(idle))
assert [len(out.text) for out in running.wait()] == [30] * 3
assert {branch.fork().append("z").generate(max_tokens=3).text for branch in idle} == {"xxx"}
assert engine.stats().tokens_swap_lost == 0
engine.check_integrity()
engine.close()
assert not folder.exists()
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_is_refused_and_harms_nothing() -> None:
    """Every call says to spawn instead; reading, pruning and closing there leave the parent's files and tree alone."""
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["done"]
