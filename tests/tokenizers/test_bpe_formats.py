"""Files of GPT-2 and Hugging Face: what other libraries read from ours, and we from theirs."""

import json
import random
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lightning_lm.errors import TokenizerError
from lightning_lm.tokenizers import BPETokenizer, SplitPattern, gpt2_files

END = "<|endoftext|>"
CORPUS = [Path(random.__file__).read_text(encoding="utf-8"), "日本語 日本語 é é 12345 don't\r\n\r\n   x" * 30]
TEXTS = [*CORPUS, "", " ", "naïve café 1234567 I'LL\n\n\n  go", "😀 日本 \x00\u00a0\u3000!", f"a{END}b", "<<|endof"]


@pytest.fixture(scope="module", params=["gpt2", "gpt4", r"[a-z]+|[0-9]"])
def trained(request: pytest.FixtureRequest) -> BPETokenizer:
    return BPETokenizer.train(CORPUS, 600, pattern=request.param, special_tokens=[END, "<|pad|>"], show_progress=False)


def test_tokenizers_reads_our_tokenizer_json(trained: BPETokenizer) -> None:
    theirs = tokenizers.Tokenizer.from_str(trained.to_files()["tokenizer.json"])
    assert theirs.get_vocab_size() == trained.vocab_size
    for text in TEXTS:
        ids = trained.encode(text, allow_special=True)
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == text


def test_transformers_opens_our_folder(trained: BPETokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path / "tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert theirs.eos_token_id == trained.eos_id
    assert theirs(TEXTS[0])["input_ids"] == trained.encode(TEXTS[0])


def test_our_tokenizer_json_comes_back(trained: BPETokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    again = BPETokenizer.from_tokenizer_json(tmp_path / "tokenizer.json", eos_token=END)
    assert again.merges == trained.merges
    assert again.special_tokens == trained.special_tokens
    for text in TEXTS:
        assert again.encode(text) == trained.encode(text)


def test_gpt2_files_come_back(tmp_path: Path) -> None:
    trained = BPETokenizer.train(CORPUS, 600, pattern="gpt2", show_progress=False)
    trained.save_gpt2_files(tmp_path)
    again = BPETokenizer.from_gpt2_files(tmp_path / "vocab.json", tmp_path / "merges.txt")
    theirs = tokenizers.ByteLevelBPETokenizer.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    assert again.merges == trained.merges
    for text in TEXTS[:-2]:
        assert again.encode(text) == trained.encode(text) == theirs.encode(text).ids


def their_tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
    """A vocabulary as Hugging Face trains it: special tokens first, bytes in the order of their letters."""
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator(CORPUS, trainer)
    return theirs


def test_their_tokenizer_json_gives_their_ids(tmp_path: Path) -> None:
    theirs = their_tokenizer(700)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = BPETokenizer.from_tokenizer_json(tmp_path / "tokenizer.json", eos_token=END)
    assert ours.special_tokens == {"<pad>": 0, END: 1}
    assert ours.vocab_size == 700
    for text in TEXTS:
        assert ours.encode(text, allow_special=True) == theirs.encode(text).ids


def test_ids_in_another_order_than_the_merges(tmp_path: Path) -> None:
    theirs = their_tokenizer(700)
    content = json.loads(theirs.to_str())
    numbers = list(range(700))
    random.Random(0).shuffle(numbers)
    content["model"]["vocab"] = {token: numbers[number] for token, number in content["model"]["vocab"].items()}
    for token in content["added_tokens"]:
        token["id"] = numbers[token["id"]]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    ours, shuffled = BPETokenizer.from_tokenizer_json(path), tokenizers.Tokenizer.from_file(str(path))
    for text in TEXTS:
        ids = ours.encode(text, allow_special=True)
        assert ids == shuffled.encode(text).ids
        assert ours.decode(ids) == text
    assert ours.encode_batch(TEXTS)[0].tolist() == ours.encode(TEXTS[0])
    assert BPETokenizer.from_files(ours.to_files()).encode(TEXTS[0]) == ours.encode(TEXTS[0])


def test_letters_are_those_of_gpt2() -> None:
    spelled = [gpt2_files.to_letters(bytes([byte])) for byte in range(256)]
    assert sorted(spelled) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert gpt2_files.to_letters(b" a\n") == "ĠaĊ"
    assert all(gpt2_files.from_letters(letter) == bytes([byte]) for byte, letter in enumerate(spelled))
    assert gpt2_files.from_letters("▁a") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "NFC"}}, r"changes the text first \(NFC\)"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "splits text by"),
        ({"pre_tokenizer": None}, "splits text by"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "its model is WordPiece"),
        ({"model": {"type": "BPE", "vocab": {"▁a": 0}, "merges": []}}, "does not spell bytes"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}, "255 tokens have no id"),
        ({"model": {"type": "BPE", "vocab": {}}}, "damaged"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": ["a b c"]}}, "not two tokens"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": [], "unk_token": "?"}}, "sets unk_token"),
    ],
)
def test_what_is_no_byte_level_bpe_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    content = json.loads(BPETokenizer([(b"a", b"b")], pattern="gpt2").to_files()["tokenizer.json"]) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(TokenizerError, match=message):
        BPETokenizer.from_tokenizer_json(tmp_path / "tokenizer.json")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken").write_text("{", encoding="utf-8")
    (tmp_path / "merges.txt").write_text("a b\n", encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is damaged"):
        BPETokenizer.from_tokenizer_json(tmp_path / "broken")
    with pytest.raises(TokenizerError, match=r"vocab\.json is no JSON"):
        BPETokenizer.from_gpt2_files(tmp_path / "broken", tmp_path / "merges.txt")


def test_a_pattern_survives_with_its_cuts() -> None:
    pattern = SplitPattern(r"\S+|\s+", cuts=r"(?<=\S)(?=\s)")
    again = BPETokenizer.from_files(BPETokenizer([], pattern=pattern).to_files())
    assert again.pattern == pattern
