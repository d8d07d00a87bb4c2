"""Takes the place of llama-cpp-python: no model, but cells and sequences, which it will not let be used wrongly."""

from types import SimpleNamespace

__version__ = "0.0-fake"
CELLS: dict[int, list[int]] = {}
"""Sequence -> its tokens by position."""
STATE = SimpleNamespace(capacity=0, sequences=0, wanted=set())


def llama_backend_init() -> None:
    pass


def llama_model_default_params() -> object:
    return SimpleNamespace()


def llama_model_load_from_file(path: bytes, parameters: object) -> str:
    return path.decode()


def llama_context_default_params() -> SimpleNamespace:
    return SimpleNamespace()


def llama_init_from_model(model: str, parameters: SimpleNamespace) -> str:
    assert parameters.kv_unified
    CELLS.clear()
    STATE.capacity, STATE.sequences = parameters.n_ctx, parameters.n_seq_max
    return "context"


def llama_free(context: str) -> None:
    CELLS.clear()


def llama_get_memory(context: str) -> str:
    return "memory"


def llama_memory_clear(memory: str, data: bool) -> None:
    CELLS.clear()


def llama_memory_seq_rm(memory: str, sequence: int, first: int, last: int) -> bool:
    assert last == -1
    CELLS[sequence] = CELLS.get(sequence, [])[: max(first, 0)]
    return True


def llama_memory_seq_cp(memory: str, source: int, target: int, first: int, last: int) -> None:
    assert (first, last) == (-1, -1)
    assert target < STATE.sequences
    CELLS[target] = list(CELLS.get(source, []))


def llama_batch_init(num_tokens: int, embd: int, num_sequences: int) -> SimpleNamespace:
    rows = [0] * num_tokens
    ids = [[0] for _ in rows]
    return SimpleNamespace(n_tokens=0, token=[*rows], pos=[*rows], n_seq_id=[*rows], seq_id=ids, logits=[*rows])


def llama_decode(context: str, batch: SimpleNamespace) -> int:
    for row in range(batch.n_tokens):
        cells = CELLS.setdefault(batch.seq_id[row][0], [])
        assert batch.pos[row] == len(cells), "a position was left out or written twice"
        cells.append(batch.token[row])
    assert all(sequence < STATE.sequences for sequence in CELLS)
    STATE.wanted = {row for row in range(batch.n_tokens) if batch.logits[row]}
    return 0


def llama_sampler_chain_default_params() -> object:
    return SimpleNamespace()


def llama_sampler_chain_init(parameters: object) -> list[object]:
    return []


def llama_sampler_chain_add(chain: list[object], sampler: object) -> None:
    chain.append(sampler)


def llama_sampler_init_temp(temperature: float) -> float:
    return temperature


def llama_sampler_init_dist(seed: int) -> int:
    return seed


def llama_sampler_sample(chain: list[object], context: str, row: int) -> int:
    assert row in STATE.wanted, "no logits were asked for here"
    return 5


def llama_sampler_free(chain: list[object]) -> None:
    chain.clear()
