"""The suite on tiny models: every case on this engine and as requests, and what becomes of peers that fail."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dendrite.bench.cases import WORKLOADS, Case, Memory, Prompts, cue
from dendrite.bench.figures import Result
from dendrite.bench.peers.challengers import Challenger
from dendrite.bench.peers.protocol import PeerError
from dendrite.bench.peers.requests import repetition, request_answer
from dendrite.bench.searches import opened
from dendrite.bench.sizes import SIZES
from dendrite.bench.subject import Subject
from dendrite.bench.suite import SuiteSettings, run_suite
from dendrite.cli.main import app
from dendrite.engine.engine import Engine

SITE = Path(__file__).parent / "site"
TINY = [case for workload in WORKLOADS for case in SIZES["tiny"].cases(workload)]
SUBJECT = Subject(shape="tiny", device="cpu", dtype="float32", kv_memory="4MB")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with SUBJECT.engine() as engine:
        yield engine


class Recorder:
    """A request engine without a model that notes its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.prompts: list[list[int]] = []

    def generate(self, prompts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
        self.calls.append((len(prompts), num_tokens))
        self.prompts += prompts
        return [[index % 7] * num_tokens for index in range(len(prompts))]

    def score(self, prompts: Sequence[list[int]], start: int) -> None:
        self.calls.append((len(prompts), start))


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_repetition_leaves_nothing_in_the_engine(engine: Engine, case: Case) -> None:
    """Each case gives its figure, twice, and all blocks are free after it."""
    with opened(case, engine) as run:
        for _ in range(2):
            found = run()
            assert case.figure in found
            assert case.workload == "decode" or found[case.figure] > 0
    engine.check_integrity()
    assert engine.stats().blocks_used == 0


@pytest.mark.parametrize(
    "workload, calls",
    [
        ("decode", [(1, 2), (1, 4)]),
        ("fanout", [(3, 4)]),
        ("first-token", [(1, 1)]),
        ("tot", [(2, 3), (2, 1), (4, 3), (4, 1)]),
        ("mcts", [(2, 3), (2, 1)] * 3),
        ("score", [(3, 40)]),
    ],
)
def test_requests_are_those_of_the_reference_program(workload: str, calls: list[tuple[int, int]]) -> None:
    """(prompts, tokens) of every call; each prompt is a whole path, and values are asked with the cue at its end."""
    case = SIZES["tiny"].cases(workload)[0]
    recorder = Recorder()
    repetition(recorder, case, Prompts(case, 2048), 2048)()
    assert recorder.calls == calls
    if workload in {"tot", "mcts"}:
        asked = [prompt for prompt in recorder.prompts if prompt[-4:] == cue(2048)]
        assert len(asked) == sum(num for num, tokens in calls if tokens == 1)


def test_both_sides_draw_the_same_prompts(engine: Engine) -> None:
    """A peer's prefix is the very one that this engine's root has."""
    case = SIZES["tiny"].cases("fanout")[0]
    recorder = Recorder()
    repetition(recorder, case, Prompts(case, engine.spec.vocab_size), engine.spec.vocab_size)()
    with opened(case, engine) as run:
        run()
        with engine.root(token_ids=recorder.prompts[0]) as root:
            assert root.num_cached == len(recorder.prompts[0])


def test_requests_cannot_hold_memory() -> None:
    """What an engine keeps between requests is its own affair, so it is not asked."""
    answer = request_answer(Recorder(), 2048)
    with pytest.raises(PeerError, match="cannot express memory"):
        answer({"workload": "memory", "prefix": 8, "branches": 2, "tokens": 2})


def test_branches_hold_less_than_requests(engine: Engine) -> None:
    """The shared prefix is counted once for branches and once each for separate requests."""
    with opened(Memory(prefix=64, branches=4, tokens=8), engine) as run:
        found = run()
    block = engine.stats().block_bytes / 1e6
    assert found["K/V held"] == pytest.approx(block * (4 + 4))
    assert found["K/V of separate requests"] == pytest.approx(block * 4 * 5)


def test_suite_runs_beside_its_peers(tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody's figures stand in one result, with ratios; whoever cannot take part is noted, with the reason."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the peer: on two busy cores its threads would only wait
    kept: list[Result] = []
    peers = ("hf", f"vllm={SITE}", f"llama.cpp={SITE}", "sglang")
    settings = SuiteSettings(sizes=SIZES["tiny"], peers=peers, gguf="some.gguf", num_rounds=1, fork_batches=1)
    subject = Subject(model=str(tiny_folder("llama")), device="cpu", dtype="float32", kv_memory="4MB")
    result = run_suite(subject, settings, progress=lambda _: None, keep=kept.append)
    found = {(figure.workload, figure.engine): figure for figure in result.figures if "separate" not in figure.name}
    for case in TINY:
        assert (case.name, "dendrite") in found
        for peer, without in (
            ("vllm", {"memory"}),
            ("hf", {"memory", "score"}),
            ("llama.cpp", {"memory", "score", "tot", "mcts"}),
        ):
            assert ((case.name, peer) in found) == (case.workload not in without)
    assert all(figure.ratio is not None for (_, engine), figure in found.items() if engine == "vllm")
    assert any(figure.workload.startswith("fork: slowest of") for figure in result.figures)
    notes = "\n".join(result.notes)
    assert "vllm: vLLM 0.0-fake" in notes
    assert "left out: sglang: SGLang cannot be imported" in notes
    assert len(kept) == len(TINY) + 2
    assert Result.from_json(json.loads(json.dumps(kept[-1].to_json()))) == result


@pytest.mark.parametrize(
    "way, note",
    [
        ("works", r"sglang: SGLang 0\.0-fake"),
        ("refuses", r"left out: sglang ended with status 1: .*RuntimeError: no GPU was found"),
        ("dies", r"sglang failed at fanout: 3 × 4 over 40: sglang ended with status 7"),
    ],
)
def test_peer_that_fails_takes_nobody_with_it(monkeypatch: pytest.MonkeyPatch, way: str, note: str) -> None:
    """A peer that cannot start, or dies at its work, is noted with its last words, and the others go on."""
    monkeypatch.setenv("FAKE_SGLANG", way)
    settings = SuiteSettings(("fanout", "score"), SIZES["tiny"], (f"sglang={SITE}",), num_rounds=1)
    result = run_suite(SUBJECT, settings, progress=lambda _: None, keep=lambda _: None)
    ours = [figure.workload for figure in result.figures if figure.engine == "dendrite"]
    theirs = [figure.workload for figure in result.figures if figure.engine == "sglang"]
    assert ours == ["fanout: 3 × 4 over 40", "score: 3 × 3 tokens after 40"]
    assert theirs == (ours if way == "works" else [])
    assert any(re.match(note, line) for line in result.notes), result.notes


def test_cases_beyond_the_context_are_noted(tiny_folder: Callable[[str], Path]) -> None:
    """A model with a short context runs what fits, and each case that does not is named once."""
    sizes = SIZES["tiny"].with_lengths(prefixes=(40, 4000))
    subject = Subject(model=str(tiny_folder("llama")), device="cpu", dtype="float32", kv_memory="4MB")
    settings = SuiteSettings(("first-token",), sizes, num_rounds=1)
    result = run_suite(subject, settings, progress=lambda _: None, keep=lambda _: None)
    assert [figure.workload for figure in result.figures] == [
        "first-token: 1 child of 40",
        "first-token: 2 children of 40",
    ]
    assert "left out: first-token: 1 child of 4,000 is longer than the model's context of 256" in result.notes


def test_pool_that_is_too_small_is_noted() -> None:
    """A case that needs more blocks than there are has no figure, and the next one has."""
    subject = Subject(shape="tiny", device="cpu", dtype="float32", kv_memory="64KB")
    settings = SuiteSettings(("fanout", "score"), SIZES["tiny"].with_lengths(tokens=100), num_rounds=1)
    result = run_suite(subject, settings, progress=lambda _: None, keep=lambda _: None)
    assert [figure.workload for figure in result.figures] == ["score: 3 × 3 tokens after 40"]
    assert any(note.startswith("dendrite failed at fanout: 3 × 100 over 40: ") for note in result.notes)


@pytest.mark.parametrize(
    "choice, reason",
    [("triton", r"hf, llama\.cpp, vllm, sglang"), ("vllm=/nowhere", "folder of packages or an interpreter")],
)
def test_wrong_peer_is_refused(choice: str, reason: str) -> None:
    """An unknown peer, or a place that is not there, is an error before anything is loaded."""
    with pytest.raises(PeerError, match=reason):
        Challenger.of(choice)


def test_llama_cpp_needs_a_file_for_a_shape() -> None:
    """A shape has no GGUF file, and the note says how to name one."""
    settings = SuiteSettings(("score",), SIZES["tiny"], (f"llama.cpp={SITE}",), num_rounds=1)
    result = run_suite(SUBJECT, settings, progress=lambda _: None, keep=lambda _: None)
    assert any(note.startswith("left out: no GGUF file is known") for note in result.notes)


def test_all_writes_everything_and_prints_a_short_table(tmp_path: Path) -> None:
    """One command: table on stdout, figures, table and pictures in the folder; the pictures can be drawn again."""
    command = ["bench", "all", "--shape", "tiny", "--size", "tiny", "--device", "cpu", "--dtype", "float32"]
    command += ["--only", "fanout,memory,fork", "--skip", "fork", "--rounds", "1", "--kv-memory", "4MB"]
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "out")], catch_exceptions=False)
    assert result.exit_code == 0
    assert "fanout: 3 × 4 over 40" in result.stdout
    assert "mcts" not in result.stdout
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"results.json", "results.md", "results.svg", "results.png"}
    (tmp_path / "out" / "results.svg").unlink()
    again = CliRunner().invoke(app, ["bench", "plot", str(tmp_path / "out" / "results.json")], catch_exceptions=False)
    assert again.exit_code == 0
    assert (tmp_path / "out" / "results.svg").is_file()


def test_single_workload_prints_markdown() -> None:
    """`dendrite bench score --markdown` is a table for the documentation."""
    command = ["bench", "score", "--shape", "tiny", "--size", "tiny", "--device", "cpu", "--dtype", "float32"]
    result = CliRunner().invoke(
        app, [*command, "--rounds", "1", "--kv-memory", "4MB", "--markdown"], catch_exceptions=False
    )
    assert result.stdout.startswith("| case | figure | dendrite |")


@pytest.mark.parametrize(
    "options",
    [["--size", "huge"], ["--prefix", "x"], ["--batch", "0"], ["--model", "m", "--shape", "tiny"]],
    ids=lambda options: options[0],
)
def test_wrong_options_are_usage_errors(options: list[str]) -> None:
    """They are found before anything is loaded."""
    assert CliRunner().invoke(app, ["bench", "fanout", "--device", "cpu", *options]).exit_code == 2


def test_unknown_workload_is_refused() -> None:
    """`--only` with a typing error says what there is."""
    result = CliRunner().invoke(app, ["bench", "all", "--shape", "tiny", "--only", "fanuot"])
    assert result.exit_code == 1
    assert "decode, fanout" in result.stderr


def test_plot_refuses_what_is_no_result(tmp_path: Path) -> None:
    """A file of something else is a usage error."""
    (tmp_path / "other.json").write_text("{}")
    assert CliRunner().invoke(app, ["bench", "plot", str(tmp_path / "other.json")]).exit_code == 2
