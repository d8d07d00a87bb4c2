"""Random search traffic for as long as one likes: memory stays flat, and nothing is left at the end.

    python -m tests.engine.soak --rounds 400        about an hour's traffic of a search on the real model, in minutes

The suite runs a short one (`test_soak.py`); docs/testing.md says what the long one found.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from dendrite.engine.branch import Branch
from dendrite.engine.engine import Engine
from dendrite.testing import scripted_engine

DEPTH = 5
WIDTH = 8
MOST_TOKENS = 180
FORKS = 500


@dataclass(frozen=True)
class Footprint:
    """What the process holds between two rounds."""

    rss_bytes: int
    objects: int


def footprint() -> Footprint:
    """Resident memory, and the objects that the garbage collector knows, after it has run."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Footprint(pages * 4096, len(gc.get_objects()))


def reply(text: str) -> dict[str, float]:
    return {f" {len(text) % 7}abc": 3.0, f" {len(text) % 5}de": 2.0, " f": 1.0}


def search(engine: Engine, rng: random.Random) -> None:
    """A beam of random shape with values, scores, earlier positions, a snapshot now and then; then all of it goes."""
    size = engine.spec.vocab_size
    prompt = [rng.randrange(4, min(size, 250)) for _ in range(rng.randint(4, 40))]
    frontier = [engine.root(token_ids=prompt, seed=rng.randrange(100))]
    made = list(frontier)
    for _ in range(rng.randint(1, DEPTH)):
        kids = [kid for parent in frontier for kid in grown(parent, rng)]
        engine.generate(kids, max_tokens=rng.randint(1, 8), temperature=1.0)
        for kid in kids:
            kid.value = rng.choice([None, kid.score([[7, 8], [9]])[0]])
        for kid in rng.sample(kids, len(kids) // 2):
            kid.prune()
        made += kids
        frontier = [kid for kid in kids if kid.status == "idle" and kid.num_tokens < MOST_TOKENS][:WIDTH] or frontier
    if rng.random() < 0.1:
        with tempfile.TemporaryDirectory() as place:
            frontier[0].save(Path(place) / "one")
            engine.restore(Path(place) / "one").prune()
    for branch in rng.sample(made, len(made)):  # some are pruned, the others collected
        if rng.random() < 0.5:
            branch.prune()


def churn(engine: Engine, rng: random.Random) -> None:
    """Forks that are appended to and given up before anything is computed for them."""
    live = [engine.root(token_ids=[4, 5, 6, 7, 8, 9])]
    for _ in range(FORKS):
        branch = rng.choice(live)
        (fork,) = branch.fork(1, at=rng.choice([None, rng.randint(1, branch.num_tokens)]))
        if rng.random() < 0.5:
            fork.append([rng.randrange(4, 250)])
        live.append(fork)
        if len(live) > 3 * WIDTH:
            live.pop(rng.randrange(len(live))).prune()


def grown(parent: Branch, rng: random.Random) -> list[Branch]:
    kids = parent.fork(rng.randint(1, WIDTH), at=rng.choice([None, None, rng.randint(1, parent.num_tokens)]))
    for kid in kids:
        kid.append([rng.randrange(4, 250) for _ in range(rng.randint(1, 6))])
    return kids


async def cancelled_calls(engine: Engine, rng: random.Random) -> None:
    """Tasks that end at any moment of a call."""
    with engine.root(token_ids=[5, 6, 7, 8]) as root:

        async def work() -> None:
            with root.fork() as branch:
                await branch.agenerate(max_tokens=20, ignore_eos=True)

        tasks = [asyncio.create_task(work()) for _ in range(6)]
        for task in tasks:
            await asyncio.sleep(rng.random() * 0.002)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def rounds(engine: Engine, seed: int, *, searches: int) -> Iterator[Footprint]:
    """Rounds of traffic without end, and what the process holds after each; the engine is empty then."""
    rng = random.Random(seed)
    while True:
        for _ in range(searches):
            search(engine, rng)
            churn(engine, rng)
        asyncio.run(cancelled_calls(engine, rng))
        gc.collect()
        engine.check_integrity()
        engine.clear_cache()
        stats = engine.stats()
        assert (stats.branches, stats.blocks_used, stats.blocks_free) == (0, 0, stats.blocks_total)
        assert stats.swap_memory_used == stats.swap_disk_used == 0
        yield footprint()


@contextmanager
def scripted() -> Iterator[Engine]:
    """A pool for about a third of a search, so that K/V goes to memory and disk and is computed again."""
    with scripted_engine(reply, num_blocks=150, swap_memory=1200, swap_disk=1600, integrity="canary") as engine:
        yield engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--searches", type=int, default=20, help="in a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="a folder of a small model, in place of the scripted engine")
    options = parser.parse_args()
    loaded = Engine.load(options.model, kv_memory="1MiB", swap_memory="1MiB") if options.model else None
    with loaded or scripted() as engine:
        held_after = rounds(engine, options.seed, searches=options.searches)
        for number, held in enumerate(islice(held_after, options.rounds)):
            if number % max(1, options.rounds // 20) == 0 or number == options.rounds - 1:
                print(
                    f"round {number}: {engine.stats().forks} forks, {held.rss_bytes >> 10} KiB, {held.objects} objects"
                )


if __name__ == "__main__":
    main()
