"""Game of 24 as a Tree of Thoughts (Yao et al., 2023): the model chooses among the legal moves, code plays them.

python examples/game_of_24.py 4 9 10 13
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from fractions import Fraction
from itertools import permutations

import dendrite as dd

Numbers = tuple[Fraction, ...]


@dataclass(frozen=True)
class Game:
    left: Numbers


def moves(game: Game) -> dict[str, Game]:
    """What may be written next, and what is left then."""
    found: dict[str, Game] = {}
    for first, second, *rest in permutations(game.left):
        results = {"+": first + second, "-": first - second, "*": first * second}
        if second:
            results["/"] = first / second
        for sign, result in results.items():
            if sign in "+*" and first < second:
                continue  # the same as the other way round
            found[f" {first} {sign} {second} = {result}"] = Game(tuple(sorted((*rest, result))))
    return found


@dd.expand(width=5, temperature=1.0, max_tokens=24)
def move(node: dd.Node[Game]) -> dd.Gen:
    left = " ".join(map(str, node.state.left))
    return dd.Gen(f"\nLeft: {left}. Next:", choices=list(moves(node.state)))


@dd.observe
def play(node: dd.Node[Game]) -> dd.Outcome[Game]:
    game = moves(node.state)[node.text]
    return dd.Outcome(game, terminal=len(game.left) == 1, goal=game.left == (Fraction(24),))


@dd.score
def likely(node: dd.Node[Game]) -> dd.Choice:
    left = " ".join(map(str, node.state.left))
    return dd.Choice({"yes": 1.0, "no": 0.0}, f"\nCan {left} reach 24?")


def program(strategy: dd.Strategy) -> dd.Program[Game]:
    return dd.compile(
        move, play, likely, dd.prune(keep=5), strategy=strategy, merge=lambda node: node.state if node.depth else None
    )


def solve(engine: dd.Engine, numbers: tuple[int, ...], strategy: dd.Strategy, seed: int = 0) -> dd.Result[Game]:
    start = Game(tuple(sorted(map(Fraction, numbers))))
    prompt = f"Use {' '.join(map(str, numbers))} and + - * / to make 24, step by step."
    return program(strategy).run(engine, prompt, state=start, seed=seed)


if __name__ == "__main__":
    given = tuple(map(int, sys.argv[1:])) or (4, 9, 10, 13)
    with dd.Engine.load("smollm2-135m-instruct") as loaded, solve(loaded, given, dd.MCTS(40, parallel=8)) as result:
        print(result.best.transcript)
        print(result.stopped, result.usage)
