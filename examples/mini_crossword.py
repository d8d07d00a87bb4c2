"""A 3 by 3 crossword by depth-first search (ToT-DFS): the model chooses words that fit, code checks the columns.

python examples/mini_crossword.py
"""

from __future__ import annotations

from dataclasses import dataclass

import dendrite as dd

CLUES = ("a flying mammal", "the time in which one lives", "what a dog does with its tail, or a funny person")
TEXT = """
ace act add age ago aid aim air ale all and ant ape apt arc are arm art ask ate awe bad bag ban bar bat bay bed
bee beg bet bid big bit bow box boy bud bug bus but buy cab can cap car cat cow cry cup cut day den dew did die
dig dim dip dog dot dry due ear eat egg ego elf end era eve eye fan far fat fed fee few fig fit fix fly fog for
fox fun gag gap gas get gin got gum gut guy had ham hat hen her hid him hip his hit hop hot how hub hug ice ill
ink inn ion its jam jar jaw jet job joy key kid kit lab lag lap law lay led leg let lid lie lip lit log lot low
mad man map mat may men met mix mud mug net new nod nor not now nut oak odd off oil old one our out owe own pan
paw pay pea pen pet pie pig pin pit pot put rag ran rat raw ray red rib rid rim rip rob rod row rub rug run sad
sat saw say sea see set she sit six sky sly son sow sun tab tag tan tap tar tax tea ten the tie tin tip toe ton
too top toy try tub two use van vet via wag war was wax way web wet who why wig win won yes yet you zip zoo
"""
WORDS = TEXT.split()


@dataclass(frozen=True)
class Grid:
    rows: tuple[str, ...] = ()


def fits(rows: tuple[str, ...]) -> bool:
    """Whether every column begins some word."""
    return all(any(word.startswith(column) for word in WORDS) for column in map("".join, zip(*rows, strict=True)))


@dd.expand(width=4, temperature=1.0)
def fill(node: dd.Node[Grid]) -> dd.Gen | list[dd.Child[Grid]]:
    rows = node.state.rows
    choices = [f" {word}" for word in WORDS if word not in rows and fits((*rows, word))]
    return dd.Gen(f"\n{CLUES[len(rows)]}:", choices=choices, max_tokens=6) if choices else []


@dd.observe
def write(node: dd.Node[Grid]) -> dd.Outcome[Grid]:
    grid = Grid((*node.state.rows, node.text.strip()))
    return dd.Outcome(grid, goal=len(grid.rows) == 3)


@dd.score
def likely(node: dd.Node[Grid]) -> float:
    """How likely the model finds the word after its clue."""
    return node.logprob or 0.0


program = dd.compile(fill, write, likely, strategy=dd.DepthFirst(depth=3), merge=lambda node: node.state)

if __name__ == "__main__":
    prompt = "Answer with words of three letters."
    with dd.Engine.load("smollm2-135m-instruct") as engine, program.run(engine, prompt, state=Grid(), seed=3) as result:
        print("\n".join(result.best.state.rows), result.stopped, result.usage, sep="\n")
