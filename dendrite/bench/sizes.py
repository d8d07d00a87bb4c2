"""How large the suite's cases are.

Those called `full` are what other engines were measured with before; `small` suits a small model on a CPU; `tiny` shows
that the command works.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dendrite.bench.cases import Case, Decode, Fanout, FirstToken, Memory, MonteCarlo, Score, Thoughts


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large every case is."""

    batches: tuple[int, ...]
    decode: tuple[int, int, int]
    """Tokens of a prompt, and of the two lengths."""
    prefixes: tuple[int, ...]
    branches: tuple[int, ...]
    tokens: int
    children: tuple[int, ...]
    thoughts: Thoughts
    monte_carlo: MonteCarlo
    scored_prefix: int
    choices: int
    choice_tokens: int

    def with_lengths(
        self,
        *,
        prefixes: tuple[int, ...] = (),
        branches: tuple[int, ...] = (),
        batches: tuple[int, ...] = (),
        tokens: int | None = None,
    ) -> Sizes:
        """The same with what is given replaced; a prefix that is given is also what scores continue."""
        return replace(
            self,
            prefixes=prefixes or self.prefixes,
            branches=branches or self.branches,
            batches=batches or self.batches,
            tokens=tokens or self.tokens,
            scored_prefix=prefixes[0] if prefixes else self.scored_prefix,
        )

    def cases(self, workload: str) -> list[Case]:
        """The cases of one workload."""
        prompt, short, long = self.decode
        spread = [(prefix, branches, self.tokens) for prefix in self.prefixes for branches in self.branches]
        cases: dict[str, list[Case]] = {
            "fork": [],
            "decode": [Decode(batch, prompt, short, long) for batch in self.batches],
            "fanout": [Fanout(*sizes) for sizes in spread],
            "first-token": [FirstToken(prefix, num) for prefix in self.prefixes for num in self.children],
            "tot": [self.thoughts],
            "mcts": [self.monte_carlo],
            "score": [Score(self.scored_prefix, self.choices, self.choice_tokens)],
            "memory": [Memory(*sizes) for sizes in spread],
        }
        return cases[workload]


SIZES = {
    "full": Sizes(
        batches=(1, 8, 64),
        decode=(256, 32, 160),
        prefixes=(1024, 8192, 32768),
        branches=(8, 64),
        tokens=128,
        children=(1, 8),
        thoughts=Thoughts(prompt=1024, depth=4, keep=5, branch=5, tokens=48),
        monte_carlo=MonteCarlo(prompt=2048, iterations=32, branch=3, tokens=32),
        scored_prefix=1024,
        choices=8,
        choice_tokens=8,
    ),
    "small": Sizes(
        batches=(1, 8, 32),
        decode=(64, 4, 20),
        prefixes=(512, 2048),
        branches=(8, 32),
        tokens=16,
        children=(1, 8),
        thoughts=Thoughts(prompt=128, depth=3, keep=5, branch=5, tokens=12),
        monte_carlo=MonteCarlo(prompt=256, iterations=8, branch=3, tokens=8),
        scored_prefix=512,
        choices=8,
        choice_tokens=8,
    ),
    "tiny": Sizes(
        batches=(1, 2),
        decode=(8, 2, 4),
        prefixes=(40,),
        branches=(3,),
        tokens=4,
        children=(1, 2),
        thoughts=Thoughts(prompt=20, depth=2, keep=2, branch=2, tokens=3),
        monte_carlo=MonteCarlo(prompt=20, iterations=3, branch=2, tokens=3),
        scored_prefix=40,
        choices=3,
        choice_tokens=3,
    ),
}
