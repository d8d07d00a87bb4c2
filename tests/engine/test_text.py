"""Tokens to text and back, over tokenizers of the two common families, built here from a few sentences."""

import threading
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dendrite.engine.errors import ModelError, RequestError
from dendrite.engine.messages import Message
from dendrite.engine.text import HFTokenizer
from dendrite.engine.text_stream import TextStream

CORPUS = ["The quick brown fox jumps over the lazy dog, and the dog sleeps.", "User: what is it?\nAssistant: END"] * 20
SPECIAL = ["<unk>", "<s>", "</s>", "<|turn|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|turn|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def added(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)


def byte_level() -> Tokenizer:
    """As GPT-2's, with a space before a text's first word."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[added(t) for t in SPECIAL], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def byte_fallback(*, by_normalizer: bool) -> Tokenizer:
    """As Llama 2's or Mistral's: spaces are ▁, and what is not in the vocabulary becomes byte tokens."""
    words = ["▁the", "▁dog", "▁fox", "▁is", "▁▁", "END", "User", "Assistant"]
    merges = [(word[:length], word[length]) for word in words for length in range(1, len(word))]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", *map(chr, range(33, 127)), *(first + second for first, second in merges)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if by_normalizer:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    backend.add_special_tokens([added(token) for token in SPECIAL])
    return backend


def wrapped(backend: Tokenizer, *, template: str | None = TEMPLATE) -> PreTrainedTokenizerBase:
    bos = backend.token_to_id("<s>")
    single = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)])
    backend.post_processor = single
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


BACKENDS = {
    "byte-level": byte_level(),
    "byte-fallback": byte_fallback(by_normalizer=True),
    "metaspace": byte_fallback(by_normalizer=False),
}
TOKENIZERS = {name: HFTokenizer(wrapped(backend), [2]) for name, backend in BACKENDS.items()}
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=list(TOKENIZERS))
TEXTS = st.text(st.sampled_from("ab the dogfox END\n日本é🙂¿"), max_size=40)


def full_text(tokenizer: HFTokenizer, context: Sequence[int], generated: Sequence[int]) -> str:
    """What decoding everything at once says was generated; the context must end with a whole character."""
    before = tokenizer.decode(context)
    everything = tokenizer.decode([*context, *generated])
    assert everything.startswith(before)
    return everything[len(before) :]


# --- the tokenizer -----------------------------------------------------------------------------------------------


@each_tokenizer
@given(text=TEXTS)
def test_text_that_goes_on_comes_back_unchanged(tokenizer: HFTokenizer, text: str) -> None:
    """Encoded after other text, a text is decoded to itself: no space is put before it, none is lost."""
    context = tokenizer.encode("the dog", bos=True)
    assert full_text(tokenizer, context, tokenizer.encode(text)) == text


@each_tokenizer
def test_a_text_that_starts_gets_what_the_tokenizer_adds(tokenizer: HFTokenizer) -> None:
    """BOS and the first space for roots, neither of them for what is appended."""
    started, appended = tokenizer.encode("the dog", bos=True), tokenizer.encode("the dog")
    assert started[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in appended
    assert started[1:] == tokenizer.encode(" the dog")
    assert appended != started[1:]


@each_tokenizer
@pytest.mark.parametrize("bos", [True, False])
def test_special_tokens_in_a_text_are_plain_text_unless_asked_for(tokenizer: HFTokenizer, bos: bool) -> None:
    """Nobody ends a turn by writing the token's name into a question."""
    text = "the dog</s><|turn|>END"
    plain, special = tokenizer.encode(text, bos=bos), tokenizer.encode(text, bos=bos, special=True)
    ends = {2, 3}
    assert not ends & set(plain)
    assert ends <= set(special)
    assert tokenizer.decode(plain).strip() == text
    assert tokenizer.decode(special, special=True).replace(" ", "").endswith("</s><|turn|>END")
    assert "</s>" not in tokenizer.decode(special)


@each_tokenizer
def test_threads_may_encode_in_different_ways_at_once(tokenizer: HFTokenizer) -> None:
    """One thread's reading of special tokens never leaks into another's."""
    text = "the dog</s> END " * 50
    wanted = {special: tokenizer.encode(text, special=special) for special in (False, True)}
    wrong: list[bool] = []

    def encode(*, special: bool) -> None:
        wrong.extend(special for _ in range(50) if tokenizer.encode(text, special=special) != wanted[special])

    threads = [threading.Thread(target=encode, kwargs={"special": special}) for special in (False, True) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_models_tokenizer_is_left_alone_and_its_limits_are_not_taken_over() -> None:
    """A tokenizer file with truncation and padding in it neither cuts prompts nor fills them up."""
    tokenizer = wrapped(byte_level())
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    ours = HFTokenizer(tokenizer, [2])
    assert len(ours.encode("the dog and the fox and the dog and the fox")) > 8
    assert ours.encode("a") == TOKENIZERS["byte-level"].encode("a")
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 5
    assert not tokenizer.backend_tokenizer.encode_special_tokens


def test_facts_about_the_vocabulary() -> None:
    """Sizes with added tokens, the ends, and the byte tokens where there are any."""
    fallback, plain = TOKENIZERS["byte-fallback"], TOKENIZERS["byte-level"]
    assert fallback.vocab_size == BACKENDS["byte-fallback"].get_vocab_size()
    assert (fallback.eos_token_ids, fallback.bos_token_id) == (frozenset({2}), 1)
    assert (len(fallback.byte_token_ids), len(plain.byte_token_ids)) == (256, 0)


def test_a_tokenizer_without_a_rust_backend_is_refused() -> None:
    """With what to do about it."""
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        HFTokenizer(PreTrainedTokenizerBase(), [2])


# --- chat --------------------------------------------------------------------------------------------------------

CHAT: list[Message] = [{"role": "user", "content": "what is it?"}]


@each_tokenizer
def test_a_conversation_is_rendered_up_to_the_assistants_turn(tokenizer: HFTokenizer) -> None:
    """With the template's special tokens read as such, and BOS once."""
    token_ids = tokenizer.render(CHAT)
    turns = tokenizer.decode(token_ids, special=True).replace(" ", "").split("<|turn|>")
    assert turns == ["<s>", "user\nwhatisit?</s>\n", "assistant\n"]
    assert token_ids.count(1) == 1
    assert token_ids[0] == 1


@pytest.mark.parametrize("name", list(BACKENDS))
def test_rendering_gives_transformers_token_ids(name: str) -> None:
    """Token for token."""
    theirs = wrapped(BACKENDS[name])
    expected = theirs.apply_chat_template(
        [{"role": "user", "content": "what is it?"}], add_generation_prompt=True, return_dict=False
    )
    assert TOKENIZERS[name].render(CHAT) == expected


@each_tokenizer
def test_a_last_message_can_be_left_open(tokenizer: HFTokenizer) -> None:
    """The assistant's own words are continued, without an end of turn."""
    open_chat: list[Message] = [*CHAT, {"role": "assistant", "content": "the fox"}]
    assert tokenizer.decode(tokenizer.render(open_chat, continue_last=True), special=True).endswith("\nthe fox")
    with pytest.raises(RequestError, match="assistant"):
        tokenizer.render(CHAT, continue_last=True)


@pytest.mark.parametrize(
    "messages, words",
    [
        ([], "one or more"),
        ("hello", "one or more"),
        (["hello"], r"messages\[0\]='hello'"),
        ([{"role": "user"}], r"messages\[0\]=.* needs a role and a content"),
        ([*CHAT, {"role": "robot", "content": "x"}], r"messages\[1\] has role 'robot'"),
        ([{"role": "user", "content": None}], r"content None"),
        ([{"role": "tool", "content": "x"}], "no tools here"),
    ],
)
def test_a_bad_conversation_is_refused(messages: list[Message], words: str) -> None:
    """By the message's place in it, or with the template's own reason."""
    with pytest.raises(RequestError, match=words):
        TOKENIZERS["byte-level"].render(messages)


def test_half_a_surrogate_pair_is_refused() -> None:
    """Such a string is no text; the error shows where it is, in a prompt as in a conversation."""
    tokenizer = TOKENIZERS["byte-level"]
    with pytest.raises(RequestError, match=r"text has half a character, '\\ud800', at 2: decode its bytes"):
        tokenizer.encode("ab\ud800cd")
    with pytest.raises(RequestError, match=r"messages\[0\]: content has half a character"):
        tokenizer.render([{"role": "user", "content": "\udfff"}])
    with pytest.raises(RequestError, match="text 7 cannot be used: give text"):
        tokenizer.encode(7)  # type: ignore[arg-type]  # on purpose


def test_a_model_without_a_template_says_what_to_do() -> None:
    """Messages need one; text does not."""
    bare = HFTokenizer(wrapped(byte_level(), template=None), [2])
    with pytest.raises(ModelError, match="as text"):
        bare.render(CHAT)


# --- the stream --------------------------------------------------------------------------------------------------


class Streamed:
    """A stream run to its end, with what a viewer saw on the way."""

    def __init__(
        self, tokenizer: HFTokenizer, context: Sequence[int], generated: Sequence[int], stop: tuple[str, ...] = ()
    ) -> None:
        self.stream = TextStream(tokenizer, context, stop)
        self.pieces: list[str] = []
        self.num_pushed = 0
        self.stopped = False
        for token in generated:
            if self.num_pushed % 2:
                self.stream.get_ready()
            self.stopped = self.stream.push(token)
            self.num_pushed += 1
            self.pieces.append(self.stream.take())
            if self.stopped:
                break
        self.stream.finish()
        self.pieces.append(self.stream.take())


def random_tokens(tokenizer: HFTokenizer) -> st.SearchStrategy[list[int]]:
    every = st.integers(0, tokenizer.vocab_size - 1)
    bytes_of_text = TEXTS.map(tokenizer.encode)
    some_bytes = st.lists(st.sampled_from(sorted(tokenizer.byte_token_ids) or [5]), max_size=6)
    runs = st.lists(st.one_of(st.lists(every, max_size=6), bytes_of_text, some_bytes), max_size=6)
    return runs.map(lambda lists: [token for run in lists for token in run][:60])


@each_tokenizer
@given(data=st.data())
def test_token_by_token_gives_what_decoding_at_once_gives(tokenizer: HFTokenizer, data: st.DataObject) -> None:
    """For any tokens at all: halves of characters, bytes that are no text, special tokens; viewers see just that."""
    context = data.draw(st.sampled_from([[], [1], tokenizer.encode("the dog", bos=True), tokenizer.encode("日")]))
    generated = data.draw(random_tokens(tokenizer))
    try:
        expected = full_text(tokenizer, context, generated)
    except AssertionError:
        return  # bytes that spoil the context's own last character
    done = Streamed(tokenizer, context, generated)
    assert done.stream.text == expected
    assert "".join(done.pieces) == expected
    assert done.stream.keep() == (len(generated), "")


@each_tokenizer
@given(data=st.data())
def test_a_stop_string_is_found_where_a_search_of_the_whole_text_finds_it(
    tokenizer: HFTokenizer, data: st.DataObject
) -> None:
    """At the first token that completes one, cut before the earliest; what is kept and appended makes up the text."""
    context = tokenizer.encode("the dog", bos=True)
    generated = tokenizer.encode(data.draw(TEXTS))
    stop = tuple(data.draw(st.lists(st.text("ab the dogEND\n日é", min_size=1, max_size=4), min_size=1, max_size=3)))
    texts = [full_text(tokenizer, context, generated[: n + 1]) for n in range(len(generated))]
    first = next((n for n, text in enumerate(texts) if any(s in text for s in stop)), None)
    done = Streamed(tokenizer, context, generated, stop)
    assert done.stopped == (first is not None)
    if first is not None:
        assert done.num_pushed == first + 1
        assert done.stream.text == texts[first][: min(texts[first].find(s) for s in stop if s in texts[first])]
    assert "".join(done.pieces) == done.stream.text
    num_kept, rest = done.stream.keep()
    assert full_text(tokenizer, context, generated[:num_kept]) + rest == done.stream.text
    if first is not None and num_kept < first:
        assert len(full_text(tokenizer, context, generated[: num_kept + 1])) > len(done.stream.text)


@each_tokenizer
def test_half_a_character_is_never_shown(tokenizer: HFTokenizer) -> None:
    """It comes whole, or, where the model ends in the middle of it, as the mark of a broken one at the very end."""
    context, smile = tokenizer.encode("the dog", bos=True), tokenizer.encode("🙂")
    assert len(smile) > 1
    done = Streamed(tokenizer, context, [*smile, *tokenizer.encode(" the")])
    assert "\ufffd" not in "".join(done.pieces)
    assert done.stream.text == "🙂 the"
    broken = Streamed(tokenizer, context, smile[:-1])
    assert set(broken.pieces[:-1]) == {""}
    assert set(broken.pieces[-1]) == {"\ufffd"}


@each_tokenizer
def test_what_may_become_a_stop_string_is_held_back(tokenizer: HFTokenizer) -> None:
    """And shown as soon as it cannot become one any more."""
    stream = TextStream(tokenizer, tokenizer.encode("the dog", bos=True), ("END!",))
    seen = ""
    for token in tokenizer.encode(" the EN fox EN"):
        assert not stream.push(token)
        seen += stream.take()
        assert not any(seen.endswith(part) for part in ("E", "EN", "END"))
    assert (seen, stream.text) == (" the EN fox ", " the EN fox EN")
    stream.finish()
    assert stream.take() == "EN"


@each_tokenizer
def test_a_stop_inside_a_token_keeps_the_characters_before_it(tokenizer: HFTokenizer) -> None:
    """The token goes, its first characters come back as text; with two stops the earlier place wins."""
    generated = tokenizer.encode(" the dog")
    done = Streamed(tokenizer, tokenizer.encode("the fox", bos=True), generated, ("g", "og"))
    assert done.stream.text == " the d"
    num_kept, rest = done.stream.keep()
    assert num_kept < len(generated)
    assert tokenizer.decode([*tokenizer.encode("the fox"), *generated[:num_kept]]) + rest == "the fox the d"


def test_a_long_run_of_bytes_is_shown_while_it_goes_on() -> None:
    """A script that is all byte tokens streams in pieces, at a bounded cost, rather than all at its end."""
    tokenizer = TOKENIZERS["byte-fallback"]
    text = "བོད་ཡིག" * 40
    generated = tokenizer.encode(text)
    assert len(generated) > 500
    done = Streamed(tokenizer, tokenizer.encode("the dog", bos=True), generated)
    assert sum(map(bool, done.pieces)) > 5
    assert "".join(done.pieces) == text


def test_endless_special_tokens_cost_nothing_that_grows() -> None:
    """A model that goes on past its end leaves no backlog of tokens to decode again."""
    tokenizer = TOKENIZERS["byte-level"]
    done = Streamed(tokenizer, [1], [2] * 500 + tokenizer.encode(" the dog"))
    assert done.stream.text == " the dog"
    assert len(done.stream._prefix) + len(done.stream._pending) < 100
