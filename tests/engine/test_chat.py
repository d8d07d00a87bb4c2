"""Conversations as tokens: turns that were generated keep the tokens they were generated as."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dendrite.engine.chat import check_messages, conversation_ids
from dendrite.engine.errors import RequestError
from dendrite.engine.generation import Generation
from dendrite.engine.messages import Message
from dendrite.engine.text import HFTokenizer
from dendrite.testing import scripted_engine


def plain(turns: Sequence[Mapping[str, object]]) -> str:
    return "".join(f"<{turn['role']}>{turn['content']}<end>" for turn in turns)


def stripping(turns: Sequence[Mapping[str, object]]) -> str:
    return plain([{**turn, "content": str(turn["content"]).strip()} for turn in turns])


def forgetting(turns: Sequence[Mapping[str, object]]) -> str:
    """Leave out thoughts, as templates of reasoning models do with earlier turns."""
    return plain([{**turn, "content": str(turn["content"]).rpartition("</think>")[2]} for turn in turns])


def characters(text: str, starts: bool) -> list[int]:
    return [-1] * starts + [ord(character) for character in text]


def conversation(said: str) -> list[Message]:
    return [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": said, "token_ids": [1000, 1001]},
        {"role": "user", "content": "Go on"},
    ]


def as_text(ids: Sequence[int]) -> str:
    return "".join("^" if i < 0 else f"[{i}]" if i >= 1000 else chr(i) for i in ids)


def test_generated_turns_keep_their_tokens() -> None:
    """The tokens stand where the text was, and nothing else changes."""
    ids = conversation_ids(conversation("Hello"), plain, characters)
    assert as_text(ids) == "^<user>Hi<end><assistant>[1000][1001]<end><user>Go on<end>"


def test_a_stripped_turn_keeps_its_tokens() -> None:
    """What a template strips off was generated all the same, and its K/V is worth keeping."""
    ids = conversation_ids(conversation(" Hello\n"), stripping, characters)
    assert as_text(ids) == "^<user>Hi<end><assistant>[1000][1001]<end><user>Go on<end>"


def test_a_rewritten_turn_is_as_the_template_has_it() -> None:
    """Thoughts that the template leaves out do not come back with their tokens."""
    ids = conversation_ids(conversation("<think>hm</think>Hello"), forgetting, characters)
    assert as_text(ids) == "^<user>Hi<end><assistant>Hello<end><user>Go on<end>"


def test_without_tokens_the_text_is_encoded_whole() -> None:
    """A conversation that somebody else wrote is one piece of text."""
    ids = conversation_ids([{"role": "user", "content": "Hi"}], plain, characters)
    assert as_text(ids) == "^<user>Hi<end>"


def test_a_text_with_the_mark_in_it_goes_without_kept_tokens() -> None:
    """Nobody can make a turn's tokens stand in another place."""
    messages = conversation("well")
    messages[0]["content"] = "\ue0d11\ue0d2"
    assert conversation_ids(messages, plain, characters) == characters(plain(messages), starts=True)


def test_only_the_assistant_generates() -> None:
    """Tokens on anybody else's turn are refused, with the message that has them."""
    with pytest.raises(RequestError, match=r"messages\[0\].*token_ids"):
        check_messages([{"role": "user", "content": "Hi", "token_ids": [1]}], continue_last=False)


def test_real_template_takes_tokens_that_no_encoder_would_give(real_model_folder: Path) -> None:
    """Letters one by one in place of a word: the turn decodes to the same text and keeps its tokens."""
    tokenizer = HFTokenizer(AutoTokenizer.from_pretrained(real_model_folder), [2])
    letters = [token for letter in "Hello" for token in tokenizer.encode(letter)]
    messages: list[Message] = [
        {"role": "user", "content": "Greet me."},
        {"role": "assistant", "content": "Hello", "token_ids": letters},
        {"role": "user", "content": "Again."},
    ]
    ids = tokenizer.render(messages)
    plain_ids = tokenizer.render([{"role": m["role"], "content": m["content"]} for m in messages])
    assert len(letters) == 5
    assert len(ids) > len(plain_ids)
    assert tokenizer.decode(ids, special=True) == tokenizer.decode(plain_ids, special=True)
    start = next(i for i in range(len(ids)) if ids[i : i + 5] == letters)
    assert ids[:start] == tokenizer.render(messages[:1])


def test_a_stream_tells_what_it_generated() -> None:
    """`on_end` gets the finished generation after the last piece; a stream closed early has none."""
    ended: list[Generation] = []
    with scripted_engine(lambda text: "well said") as engine:
        pieces = list(engine.stream(engine.root("Say:"), on_end=ended.append, max_tokens=20))
        assert "".join(pieces) == "well said" == ended[0].text
        assert ended[0].finish_reason == "eos"
        stream = engine.stream(engine.root("Say:"), on_end=ended.append, max_tokens=20)
        next(stream)
        stream.close()
        assert len(ended) == 1


async def test_an_async_stream_tells_what_it_generated() -> None:
    """The same for asyncio."""
    ended: list[Generation] = []
    with scripted_engine(lambda text: "well said") as engine:
        pieces = [piece async for piece in engine.astream(engine.root("Say:"), on_end=ended.append, max_tokens=20)]
        assert "".join(pieces) == "well said" == ended[0].text


def test_a_root_knows_what_it_found_computed() -> None:
    """Only K/V that was there counts as cached: not what is merely planned, nor what differs."""
    with scripted_engine(lambda text: "yes") as engine:
        first = engine.root("A long enough question")
        assert first.num_cached == 0
        assert engine.root("A long enough question").num_cached == 0  # nobody has computed it yet
        first.generate(max_tokens=4)
        again = engine.root("A long enough question")
        assert again.num_cached == again.num_tokens
        assert engine.root("A long enough answer").num_cached == len("A long enough ") + 1  # and <|begin|>
        assert again.fork().num_cached == 0
