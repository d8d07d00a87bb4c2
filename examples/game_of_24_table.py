"""Game of 24 over 50 puzzles: what samples, a beam and MCTS solve, and the tokens it takes. Prints a table.

python examples/game_of_24_table.py 50
"""

import asyncio
import math
import random
import sys
from dataclasses import replace
from fractions import Fraction

from game_of_24 import Game, moves, play

import dendrite as dd

SHOTS = """Make 24 with four numbers and + - * /, step by step.
\nUse 2 3 4 6:\nLeft: 2 3 4 6. Next: 3 - 2 = 1\nLeft: 1 4 6. Next: 4 * 1 = 4\nLeft: 4 6. Next: 6 * 4 = 24
\nUse 1 5 7 12:\nLeft: 1 5 7 12. Next: 7 - 5 = 2\nLeft: 1 2 12. Next: 2 * 1 = 2\nLeft: 2 12. Next: 12 * 2 = 24
\nUse 3 5 10 12:\nLeft: 3 5 10 12. Next: 12 + 10 = 22\nLeft: 3 5 22. Next: 5 - 3 = 2\nLeft: 2 22. Next: 22 + 2 = 24
\nUse {}:"""
PATHS, WIDTH = 40, 12


@dd.expand(width=WIDTH, temperature=1.0, max_tokens=24)
def model(node: dd.Node[Game]) -> dd.Gen:
    return dd.Gen(f"\nLeft: {' '.join(map(str, node.state.left))}. Next:", choices=list(moves(node.state)))


@dd.expand
def uniform(node: dd.Node[Game]) -> list[dd.Child[Game]]:
    drawn = random.Random(f"{node.name} {node.state}").choices(list(moves(node.state)), k=WIDTH)
    return [dd.Child(move, node.state) for move in dict.fromkeys(drawn)]


@dd.observe
def play_on(node: dd.Node[Game]) -> dd.Outcome[Game]:
    return replace(play(node), goal=False)  # so that every sample is counted


@dd.score
def likely(node: dd.Node[Game]) -> float:  # how likely the model finds the moves so far: no token, and no look ahead
    steps = node.path[1:]
    return math.exp(sum(step.logprob or 0.0 for step in steps) / len(steps)) if len(node.state.left) > 1 else 0.0


def searching(expand: dd.Part[Game], strategy: dd.Strategy) -> dd.Program[Game]:
    seen = lambda node: node.state if node.depth else None  # noqa: E731 - the key of equal states
    return dd.compile(expand, play, likely, dd.prune(keep=WIDTH), strategy=strategy, merge=seen)


def walk(game: Game, dice: random.Random) -> bool:
    while len(game.left) > 1:
        game = dice.choice(list(moves(game).values()))
    return game.left == (Fraction(24),)


def puzzles(num: int) -> list[Game]:  # that random walks solve in 3,000 tries
    dice, found = random.Random(24), dict[Game, None]()
    while len(found) < num:
        game = Game(tuple(sorted(Fraction(dice.randint(1, 13)) for _ in range(4))))
        found |= {game: None} if any(walk(game, dice) for _ in range(3000)) else {}
    return list(found)


async def row(engine: dd.Engine, name: str, program: dd.Program[Game], games: list[Game]) -> None:
    turns, before = asyncio.Semaphore(8), engine.stats()

    async def solve(game: Game) -> list[bool]:
        async with turns:
            root = engine.root(SHOTS.format(" ".join(map(str, game.left))))
            with root, await program.arun(root, state=game, seed=1) as result:
                print(".", end="", file=sys.stderr, flush=True)  # a puzzle
                return [node.state.left == (Fraction(24),) for node in result.tree if len(node.state.left) == 1]

    ends, now = await asyncio.gather(*map(solve, games)), engine.stats()
    computed, logical = now.tokens_computed - before.tokens_computed, now.tokens_logical - before.tokens_logical
    show(name, ends, f"{computed / len(games):,.0f} | {logical / len(games):,.0f}")


def show(name: str, ends: list[list[bool]], tokens: str) -> None:
    share = sum(sum(found) / max(1, len(found)) for found in ends) / len(ends)
    print(f"| {name} | {sum(map(any, ends))} of {len(ends)} | {share:.1%} | {tokens} |", flush=True)


async def main(games: list[Game]) -> None:
    print("| moves, search | solved | of its ends | tokens computed | as requests |\n|---|---|---|---|---|", flush=True)
    show(f"uniform, best of {PATHS}", [[walk(game, random.Random(n)) for n in range(PATHS)] for game in games], "0 | 0")
    with dd.Engine.load("smollm2-135m-instruct") as engine:
        samples = dd.compile(model, play_on, strategy=dd.BestOfN(PATHS, depth=3))
        await row(engine, "model, MCTS", searching(model, dd.MCTS(40, parallel=4)), games)
        await row(engine, f"model, best of {PATHS}", samples, games)
        await row(engine, "model, beam", searching(model, dd.Beam(3)), games)
        await row(engine, "uniform, MCTS", searching(uniform, dd.MCTS(40, parallel=4)), games)
        await row(engine, "uniform, beam", searching(uniform, dd.Beam(3)), games)


if __name__ == "__main__":
    asyncio.run(main(puzzles(int(sys.argv[1]) if sys.argv[1:] else 50)))
