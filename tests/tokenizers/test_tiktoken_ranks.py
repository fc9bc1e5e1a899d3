"""Llama 3's tokenizer.model against tiktoken, which the file is made for."""

import base64
import random
from pathlib import Path

import pytest
import tiktoken

from lightning_lm.errors import TokenizerError
from lightning_lm.tokenizers import BPETokenizer, load_tokenizer, tiktoken_ranks
from lightning_lm.tokenizers.patterns import GPT4

TEXT = Path(random.__file__).read_text(encoding="utf-8") + "\n\n\t DON'T 12345 naïve 😀\r\n  x"


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    trained = BPETokenizer.train([TEXT], 600, special_tokens=[], show_progress=False)
    tokens = {bytes([byte]): byte for byte in range(256)}
    tokens |= {token: rank for rank, token in enumerate(trained._table) if rank >= 256}
    # A token that no merges lead to: tiktoken takes the whole word for it, and so must we.
    tokens[b" unreachable"] = len(tokens)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in tokens.items())
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    monkeypatch.setattr(tiktoken_ranks, "_LLAMA_3", len(tokens))
    return tokens


@pytest.mark.parametrize("name", ["", "tokenizer.model"])
def test_ids_are_those_of_tiktoken(ranks, tmp_path, name):
    tokenizer = load_tokenizer(tmp_path / name)
    peer = tiktoken.Encoding("peer", pat_str=GPT4.expression, mergeable_ranks=ranks, special_tokens={})
    words = TEXT.split(" ")
    shuffled = random.Random(0).sample(words, len(words))
    for text in (TEXT, " ".join(shuffled), "an unreachable end", "", " "):
        assert tokenizer.encode(text) == peer.encode(text, disallowed_special=())
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_those_of_llama_3(ranks, tmp_path):
    tokenizer = load_tokenizer(tmp_path)
    first = len(ranks)
    assert tokenizer.vocab_size == first + 256
    # The ids of Llama 3.1's model card, counted from its 128,000 ranks.
    known = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|start_header_id|>": 6, "<|eot_id|>": 9}
    known |= {"<|python_tag|>": 10, "<|reserved_special_token_2|>": 5, "<|reserved_special_token_247|>": 255}
    assert {name: tokenizer.special_tokens[name] - first for name in known} == known
    assert (tokenizer.prefix_ids, tokenizer.eos_id) == ([first], first + 1)
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode("a b") == tokenizer.encode("a b")


def test_other_ranks_and_damage_are_refused(ranks, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.model"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:300], "!!! 300\n"]))
    with pytest.raises(TokenizerError, match="damaged in line 301"):
        load_tokenizer(path)
    path.write_text("".join(lines[1:]))
    with pytest.raises(TokenizerError, match="ranks are missing"):
        load_tokenizer(path)
    path.write_text("".join(lines))
    monkeypatch.setattr(tiktoken_ranks, "_LLAMA_3", 128_000)
    with pytest.raises(TokenizerError, match=r"list of \d+ tiktoken ranks.*tokenizer.json"):
        load_tokenizer(path)
