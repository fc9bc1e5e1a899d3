"""Damaged folders of tokenizers of every kind: read as they were, read as another tokenizer, or refused by name."""

import copy
import io
import json
import random

import pytest

from lightning_lm.errors import CheckpointError, TokenizerError
from lightning_lm.storage import DIGESTS
from lightning_lm.tokenizers import ByteTokenizer, CharacterTokenizer, WordTokenizer, load_tokenizer
from lightning_lm.tokenizers.bpe import BPETokenizer

TEXT = "the cat sat on the mat and the dog sat on the log " * 4
WORDS = [
    "",
    "{",
    "null",
    "[]",
    "{}",
    "5",
    '"x"',
    "NaN",
    "\0\0",
    "#version: 0.2\n",
    "a b c d\n",
    '{"kind": ["a"], "format": 1}',
]
VALUES = [None, 5, -1, 2**40, 10**30, 1.5, "x", "", [], {}, [1], {"a": 1}, True, [[]], "\ud800", {"content": 3}]


def write_gpt2(folder):
    model = json.loads(BPETokenizer.train([TEXT], 280, num_workers=1).to_files()["tokenizer.json"])["model"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))


def write_sentencepiece(folder):
    sentencepiece, model = pytest.importorskip("sentencepiece"), io.BytesIO()
    words, settings = iter(TEXT.split() * 20), {"vocab_size": 24, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=words, model_writer=model, **settings)
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def write_wordpiece(folder):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordPiece({"[UNK]": 0, "the": 1, "cat": 2, "sat": 3}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[UNK]", "chat_template": "{{ messages }}"}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "[UNK]"}}))


KINDS = {
    "bpe": lambda folder: BPETokenizer.train([TEXT], 280, special_tokens=["<e>"], num_workers=1).save(folder),
    "bytes": lambda folder: ByteTokenizer().save(folder),
    "characters": lambda folder: CharacterTokenizer.train([TEXT]).save(folder),
    "words": lambda folder: WordTokenizer.train([TEXT], 20).save(folder),
    "gpt2": write_gpt2,
    "sentencepiece": write_sentencepiece,
    "wordpiece": write_wordpiece,
}


def contents(data, choose):
    """Yield damaged contents of a file: foreign, cut, with flipped bits; of JSON also with other values in places."""
    yield from (word.encode() for word in WORDS)
    for _ in range(4):
        yield data[: choose.randrange(len(data))]
        flipped = bytearray(data)
        flipped[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        yield bytes(flipped)
    try:
        value = json.loads(data)
    except ValueError:
        return
    for _ in range(16):
        changed = copy.deepcopy(value)
        place = changed
        while isinstance(place, dict | list) and place:
            key = choose.choice(list(place) if isinstance(place, dict) else range(len(place)))
            below = place[key]
            if not isinstance(below, dict | list) or not below or choose.random() < 0.3:
                if choose.random() < 0.3:
                    del place[key]
                else:
                    place[key] = choose.choice(VALUES)
                break
            place = below
        yield json.dumps(changed).encode()


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_refused_by_name_or_gives_a_tokenizer_that_works(tmp_path, kind):
    folder, choose, refused, read = tmp_path / "one", random.Random(0), 0, 0
    KINDS[kind](folder)
    (folder / DIGESTS).unlink(missing_ok=True)  # they would find every change
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for content in contents(data, choose):
            path.write_bytes(content)
            try:
                tokenizer = load_tokenizer(folder)
                ids = tokenizer.encode("the cat")
                assert tokenizer.decode(ids) is not None
                assert tokenizer.vocab_size > max(ids, default=0)
            except (TokenizerError, CheckpointError):
                refused += 1
            else:
                read += 1
        path.write_bytes(data)
    assert refused > 10
    assert load_tokenizer(folder).encode("the cat")
