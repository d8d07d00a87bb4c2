"""A peer without an engine, as a program: `steady` answers, `chatty` prints as well, `absent` and `mortal` fail."""

import os
import sys

from dendrite.bench.peers.protocol import Answer, PeerError, TreeTask, TreeTimes, serve, tree_answer


def start() -> tuple[str, Answer]:
    if sys.argv[1] == "absent":
        raise PeerError("it is not installed; install it")
    return "fake 1.0", tree_answer(run)


def run(task: TreeTask) -> TreeTimes:
    if sys.argv[1] == "chatty":
        print("a library that prints")
        os.write(1, b"and one that does so from C\n")
    if sys.argv[1] == "mortal":
        sys.stderr.write("something broke\n")
        sys.stderr.flush()
        os._exit(3)
    return TreeTimes(len(task.prompt) / 100, 0.0, 2.0, task.num_branches * (task.num_tokens - 1))


if __name__ == "__main__":
    serve(start)
