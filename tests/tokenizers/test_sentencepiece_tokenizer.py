"""SentencePiece: exact round trips, agreement with the library, models of others, bad input."""

import io
import pickle
import random
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lm import protocols
from lightning_lm.errors import TokenizerError
from lightning_lm.tokenizers import SentencePieceTokenizer, load_tokenizer, tokenizer_from_files

EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True, database=None)
CORPUS = [Path(random.__file__).read_text(encoding="utf-8"), "日本語 日本語 é é <|endoftext|>é" * 20]
KINDS = ("bpe", "unigram")
TRAINED = {
    kind: SentencePieceTokenizer.train(CORPUS, 600, model_type=kind, special_tokens=["<|endoftext|>", "<|pad|>"])
    for kind in ("bpe", "unigram")
}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


def foreign_model(**settings: object) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CORPUS[0].splitlines()), model_writer=model, vocab_size=500, minloglevel=2, **settings
    )
    return model.getvalue()


@EACH_KIND
def test_it_is_a_tokenizer(kind: str) -> None:
    tokenizer = TRAINED[kind]
    assert isinstance(tokenizer, protocols.Tokenizer)
    assert tokenizer.vocab_size == 600
    assert tokenizer.special_tokens == {"<|endoftext|>": 1, "<|pad|>": 2}
    assert tokenizer.eos_id == 1


@EACH_KIND
@EXAMPLES
@given(text=st.one_of(st.text(), st.text(st.sampled_from(" ▁a\n\t<>0xé日\u2585\u2047\x00"), max_size=20)))
def test_every_text_comes_back(kind: str, text: str) -> None:
    ids = TRAINED[kind].encode(text)
    assert TRAINED[kind].decode(ids) == text
    assert TRAINED[kind].token_byte_lengths()[ids].sum() == len(text.encode())


@EACH_KIND
def test_ids_are_those_of_the_library(kind: str) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=TRAINED[kind]._model)
    for text in (CORPUS[0], "don't  stop\n", "日本 é"):
        assert TRAINED[kind].encode(text) == processor.encode(text)
        assert TRAINED[kind].decode(processor.encode(text)) == processor.decode(processor.encode(text))


@EACH_KIND
def test_special_tokens(kind: str) -> None:
    tokenizer = TRAINED[kind]
    text = "a<|endoftext|> b<|pad|>"
    assert not {1, 2} & set(tokenizer.encode(text))
    ids = tokenizer.encode(text, allow_special=True)
    assert [i for i in ids if i in {1, 2}] == [1, 2]
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_byte_lengths()[[1, 2]].tolist() == [0, 0]


@EACH_KIND
@pytest.mark.parametrize("seed", range(5))
def test_a_stream_has_the_ids_of_the_whole(kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_lm.tokenizers.streams._CHUNK_CHARACTERS", 1)
    rng = random.Random(seed)
    text = CORPUS[0][:3000] + " ▁ ▁a  ▁"
    places = sorted(rng.sample(range(len(text)), 80))
    parts = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    assert list(TRAINED[kind].encode_iterable(parts)) == TRAINED[kind].encode(text)


def test_long_documents_are_learned_from() -> None:
    words = " ".join(("lorem", "ipsum", "dolor")[i % 3] for i in range(5000))
    tokenizer = SentencePieceTokenizer.train([words], 300, model_type="bpe")
    assert tokenizer.bytes_per_token(words) > 3


@pytest.mark.parametrize("add_dummy_prefix", [True, False])
def test_models_of_others(add_dummy_prefix: bool) -> None:
    model = foreign_model(model_type="bpe", byte_fallback=True, add_dummy_prefix=add_dummy_prefix)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = SentencePieceTokenizer(model)
    assert tokenizer.special_tokens == {"<s>": 1, "</s>": 2}
    assert tokenizer.eos_id == 2
    text = "return the value of x é"
    assert tokenizer.encode(text) == processor.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == processor.decode(processor.encode(text)) == text
    parts = ["return the", " va", "lue of", " x ", "é"]
    assert list(tokenizer.encode_iterable(parts)) == tokenizer.encode(text)


def test_a_model_without_bytes_has_unknown_text() -> None:
    tokenizer = SentencePieceTokenizer(foreign_model(model_type="unigram", add_dummy_prefix=False))
    ids = tokenizer.encode("a日b▁")
    assert tokenizer.unk_id in ids
    assert "\ufffd" in tokenizer.decode(ids)


@EACH_KIND
def test_saving_and_loading(kind: str, tmp_path: Path) -> None:
    tokenizer = TRAINED[kind]
    tokenizer.save(tmp_path / "t")
    assert sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t" / "tokenizer.model")).vocab_size() == 600
    for again in (
        load_tokenizer(tmp_path / "t"),
        load_tokenizer(tmp_path / "t" / "tokenizer.model"),
        tokenizer_from_files(tokenizer.to_files()),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert isinstance(again, SentencePieceTokenizer)
        assert again.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])
        assert again.fingerprint == tokenizer.fingerprint


@EACH_KIND
def test_texts_that_cannot_be_learned_from(kind: Literal["bpe", "unigram"]) -> None:
    with pytest.raises(TokenizerError, match="texts are empty"):
        SentencePieceTokenizer.train([], 300, model_type=kind)
    with pytest.raises(TokenizerError, match="vocab_size=100 is too small"):
        SentencePieceTokenizer.train(CORPUS, 100, model_type=kind)
    with pytest.raises(TokenizerError, match=r"^The text contains a lone surrogate, U\+DC00"):
        SentencePieceTokenizer.train(["\udc00"], 300, model_type=kind)
    with pytest.raises(TokenizerError, match="twice"):
        SentencePieceTokenizer.train(["a"], 300, model_type=kind, special_tokens=["<a>", "<a>"])
    tiny = SentencePieceTokenizer.train(["a"], 1000, model_type=kind)
    assert tiny.decode(tiny.encode("ab")) == "ab"


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.model").write_bytes(b"no model")
    with pytest.raises(TokenizerError, match="no SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model")
    with pytest.raises(TokenizerError, match="lone surrogate"):
        TRAINED["bpe"].encode("\ud800")


def test_batches_are_arrays() -> None:
    (array,) = TRAINED["bpe"].encode_batch(["hello"])
    assert array.dtype == np.uint16
    assert array.tolist() == TRAINED["bpe"].encode("hello")
