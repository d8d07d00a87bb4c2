"""The suite: the same cases on this engine and on others, in the same call.

    cpu    everybody is loaded at once and takes turns, case by case      A B C   A B C   A B C
    cuda   one after the other has the whole GPU, all cases each          A A A   B B B   C C C

What has been measured is kept as soon as it is there, so that a run that is cut short has not been for nothing.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from dendrite.bench.board import OURS, Board
from dendrite.bench.cases import TEMPERATURE, WORKLOADS, Case, check_workloads, to_message
from dendrite.bench.figures import Result
from dendrite.bench.fork import fork_figures, slowest_forks
from dendrite.bench.machine import load_note, others_load, this_machine
from dendrite.bench.peers.challengers import Challenger, challengers
from dendrite.bench.peers.gguf import gguf_file
from dendrite.bench.peers.process import Peer
from dendrite.bench.peers.protocol import PeerEnded, PeerError, PeerModel
from dendrite.bench.rounds import Progress, Run, take_turns
from dendrite.bench.searches import opened
from dendrite.bench.shapes import write_config
from dendrite.bench.sizes import SIZES, Sizes
from dendrite.bench.subject import Subject
from dendrite.bench.table import number
from dendrite.engine.errors import DendriteError, EngineClosed, EngineDead
from dendrite.engine.registry import ModelStore

MAX_LENGTH = 36_000
"""Tokens of context that peers are loaded with, if the model has as many."""


@dataclass(frozen=True, slots=True)
class SuiteSettings:
    """What is run, and beside whom."""

    workloads: tuple[str, ...] = WORKLOADS
    sizes: Sizes = SIZES["full"]
    peers: tuple[str, ...] = ()
    """`NAME` or `NAME=PLACE`, see `Challenger`."""
    gguf: str | None = None
    """The file that llama.cpp runs; None is the one the model was made of."""
    num_rounds: int = 3
    patience: float = 60.0
    """Seconds after which an engine takes part in no further round of a case."""
    fork_batches: int = 20
    """Hundreds of calls for each parent that is forked."""


@dataclass(slots=True)
class Contender:
    """An engine that is loaded."""

    name: str
    open: Callable[[Case], AbstractContextManager[Run]]
    """What runs one repetition of a case, while what its repetitions share is there."""
    takes: Callable[[Case], bool]
    is_out: bool = False
    """Whether it runs no more."""


Start = Callable[[Board], AbstractContextManager[Contender]]
"""Loads an engine and tells the board about it."""


def run_suite(
    subject: Subject, settings: SuiteSettings, *, progress: Progress, keep: Callable[[Result], None]
) -> Result:
    """Run the cases that fit the model on this engine and its peers.

    Args:
        subject: the model and the device; "auto" as its dtype is bfloat16.
        settings: what is run.
        progress: told what runs now.
        keep: given what has been found whenever there is more of it.

    Raises:
        ModelError, RequestError: as `Subject.engine` does; an unknown workload.
        PeerError: a peer that is not known. One that cannot start, or that dies, is left out with a note.
    """
    check_workloads(settings.workloads)
    peers = challengers(settings.peers)
    if subject.dtype == "auto":  # everybody's is to be the same
        subject = replace(subject, dtype="bfloat16")
    device = subject.device_type
    loads = [others_load()]
    board = Board(subject, this_machine(device))
    with tempfile.TemporaryDirectory() as folder:
        starts: list[Start] = [_ours(subject, settings, progress)]
        starts += [_theirs(peer, subject, settings, Path(folder), progress) for peer in peers]
        for group in [starts] if device == "cpu" else [[start] for start in starts]:
            _run_group(group, settings, board, progress=progress, keep=keep)
    loads.append(others_load())
    board.notes += load_note(loads)
    result = board.result()
    keep(result)
    return result


def _run_group(
    group: Sequence[Start],
    settings: SuiteSettings,
    board: Board,
    *,
    progress: Progress,
    keep: Callable[[Result], None],
) -> None:
    """Engines that are loaded at the same time, through all cases."""
    with ExitStack() as stack:
        contenders = []
        for start in group:
            try:
                contenders.append(stack.enter_context(start(board)))
            except PeerError as error:
                board.notes.append(f"left out: {error}")
        keep(board.result())
        for case in _cases(settings, board):
            _compare(case, contenders, settings, board, progress)
            keep(board.result())


def _compare(
    case: Case, contenders: Sequence[Contender], settings: SuiteSettings, board: Board, progress: Progress
) -> None:
    with ExitStack() as stack:
        runs: dict[str, Run] = {}
        for contender in contenders:
            if contender.is_out or not contender.takes(case):
                continue
            progress(f"{case.name}: {contender.name}, warming up")
            try:
                run = stack.enter_context(contender.open(case))
                run()
            except DendriteError as error:
                _note_failure(error, contender, case, board)
            else:
                runs[contender.name] = _guarded(run, contender, case, board)
        samples = take_turns(
            runs,
            num_rounds=case.num_rounds(settings.num_rounds),
            patience=settings.patience,
            progress=progress,
            workload=case.name,
        )
    for name, found in samples.items():
        board.add(case, name, found)
        for figure, values in found.items():
            progress(f"{case.name}: {name}, {figure} {number(statistics.median(values))} {case.unit}")


def _guarded(run: Run, contender: Contender, case: Case, board: Board) -> Run:
    """The same, but a failure is noted and ends this contender's part in the case, not everybody's."""
    failed = False

    def guarded() -> Mapping[str, float]:
        nonlocal failed
        if failed:
            return {}
        try:
            return run()
        except DendriteError as error:
            failed = True
            _note_failure(error, contender, case, board)
            return {}

    return guarded


def _note_failure(error: DendriteError, contender: Contender, case: Case, board: Board) -> None:
    board.notes.append(f"{contender.name} failed at {case.name}: {error}")
    contender.is_out = isinstance(error, PeerEnded | EngineDead | EngineClosed)


def _cases(settings: SuiteSettings, board: Board) -> Iterator[Case]:
    """Those that fit the model's context; the others are noted once."""
    for workload in settings.workloads:
        for case in settings.sizes.cases(workload):
            if case.length <= board.context_length:
                yield case
            else:
                board.note_once(f"left out: {case.name} is longer than the model's context of {board.context_length:,}")


# --- engines -------------------------------------------------------------------------------------------------------


def _ours(subject: Subject, settings: SuiteSettings, progress: Progress) -> Start:
    @contextmanager
    def start(board: Board) -> Iterator[Contender]:
        progress(f"loading {subject.name}")
        began = time.monotonic()
        with subject.engine() as engine:
            board.notes.append(
                f"{OURS}: {engine.spec.dtype}, temperature {TEMPERATURE}, loaded in {time.monotonic() - began:.0f} s"
            )
            if "fork" in settings.workloads:
                board.extras += slowest_forks(fork_figures(engine, settings.fork_batches, progress))
            yield Contender(OURS, lambda case: opened(case, engine), lambda _: True)

    return start


def _theirs(peer: Challenger, subject: Subject, settings: SuiteSettings, folder: Path, progress: Progress) -> Start:
    @contextmanager
    def start(board: Board) -> Iterator[Contender]:
        progress(f"starting {peer.name}")
        model = _peer_model(subject, folder, board)
        with peer.start(model, lambda: settings.gguf or str(gguf_file(subject.name))) as process:
            board.notes.append(
                f"{peer.name}: {process.version}; {peer.kind.about}; started in {process.start_seconds:.0f} s"
            )
            yield Contender(
                peer.name,
                lambda case: nullcontext(lambda: _ask(process, case)),
                lambda case: peer.takes(case, subject.device_type),
            )

    return start


def _ask(peer: Peer, case: Case) -> dict[str, float]:
    return {name: float(str(value)) for name, value in peer.ask(to_message(case)).items()}


def _peer_model(subject: Subject, folder: Path, board: Board) -> PeerModel:
    if subject.shape is not None:
        write_config(subject.shape, folder)
    else:
        folder = ModelStore().locate(subject.model or "").path
    return PeerModel(
        folder=str(folder),
        is_random=subject.shape is not None,
        dtype=board.dtype,
        device=subject.device_type,
        max_length=min(MAX_LENGTH, board.context_length),
        vocab_size=board.vocab_size,
    )
