"""Self-refine on code (Madaan et al., 2023): the model writes a function, a real test runner says what fails.

python examples/self_refine_code.py
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import dendrite as dd

TASK = "Write a Python function `def largest(numbers):` that returns the largest number of a list. Only code."
START = "def largest(numbers):\n    "
TESTS = """
import unittest
from solution import largest

class Tests(unittest.TestCase):
    def test_positive(self): self.assertEqual(largest([1, 5, 3]), 5)
    def test_negative(self): self.assertEqual(largest([-4, -2, -9]), -2)
    def test_one(self): self.assertEqual(largest([7]), 7)

unittest.main()
"""


@dataclass(frozen=True)
class Code:
    failed: int = 3
    log: str = ""


async def run_tests(source: str) -> Code:
    """In a process of its own, with a time limit."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "solution.py").write_text(source)
        Path(folder, "tests.py").write_text(TESTS)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "tests.py", cwd=folder, stderr=asyncio.subprocess.PIPE
        )
        try:
            _, errors = await asyncio.wait_for(process.communicate(), timeout=20)
        except TimeoutError:
            process.kill()
            return Code(log="the tests did not end")
    log = errors.decode(errors="replace")
    broken = log.count("\nFAIL:") + log.count("\nERROR:") + log.startswith(("FAIL:", "ERROR:"))
    return Code(0 if process.returncode == 0 else broken or 3, log.strip()[-200:])


@dd.expand(width=3, max_tokens=120, temperature=0.8, stop="```")
def write(node: dd.Node[Code]) -> str:
    return f"\n```python\n{START}"


@dd.observe(concurrency=2)
async def check(node: dd.Node[Code]) -> dd.Outcome[Code]:
    code = await run_tests(START + node.text)
    return dd.Outcome(code, append=f"```\nTests:\n{code.log}\nCorrected:", goal=code.failed == 0)


@dd.score
def passed(node: dd.Node[Code]) -> float:
    return -float(node.state.failed)


program = dd.compile(write, check, passed, strategy=dd.SelfRefine(rounds=3))

if __name__ == "__main__":
    with dd.Engine.load("smollm2-135m-instruct") as engine, program.run(engine, TASK, state=Code(), seed=1) as result:
        print(START + result.best.text)
        print(result.stopped, f"after {result.best.depth} drafts; {result.best.state.failed} tests fail")
