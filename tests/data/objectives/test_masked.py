"""Masked language modelling: exact numbers of targets, their replacement, words, spans, and masks per epoch."""

import json

import numpy as np
import pytest

from lightning_lm.data import TokenStream, write_store
from lightning_lm.data.objectives import MaskedLM, MaskedSpans, MaskedStream, SingleTokens, Vocabulary, WholeWords
from lightning_lm.data.objectives.masked import MaskedRow, _contiguous, number_of_targets, words_of
from lightning_lm.errors import ConfigurationError
from lightning_lm.tokenizers import ByteTokenizer, PretrainedTokenizer, WordTokenizer
from lightning_lm.types import IGNORE_INDEX

TOKENIZER = ByteTokenizer(("<|endoftext|>", "<|mask|>"))
VOCABULARY = Vocabulary.of(TOKENIZER)
TEXT = "the quick brown fox jumps over the lazy dog and runs away from all of it again "


def _row(text: str = TEXT) -> MaskedRow:
    ids = np.array(TOKENIZER.encode(text))
    return MaskedRow(ids, np.ones(len(ids), dtype=np.bool_), np.zeros(len(ids), dtype=np.int64))


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


@pytest.mark.parametrize(
    ("n", "rate", "count"), [(0, 0.15, 0), (1, 0.15, 1), (3, 0.15, 1), (100, 0.15, 15), (101, 0.5, 51)]
)
def test_the_number_of_targets_is_berts(n: int, rate: float, count: int) -> None:
    assert number_of_targets(n, rate) == count


@pytest.mark.parametrize("units", [SingleTokens(), MaskedSpans()])
def test_exactly_that_many_tokens_are_targets(units: SingleTokens | MaskedSpans) -> None:
    for seed in range(50):
        row = _row(TEXT[: 3 + seed])
        _, labels = MaskedLM(units=units).apply(row, VOCABULARY, _rng(seed))
        targets = labels != IGNORE_INDEX
        assert targets.sum() == number_of_targets(len(row.ids), 0.15)
        assert (labels[targets] == row.ids[targets]).all()


def test_whole_words_are_hidden_whole() -> None:
    row = _row(TEXT * 4)
    words = words_of(row, VOCABULARY)
    for seed in range(20):
        chosen = WholeWords().choose(row, number_of_targets(len(row.ids), 0.15), VOCABULARY, _rng(seed))
        assert 40 <= chosen.sum() <= 48
        for word in np.unique(words[chosen]):
            assert chosen[words == word].all()


def test_a_word_longer_than_the_number_of_targets_is_hidden_in_part() -> None:
    row = _row("incomprehensible")
    chosen = WholeWords().choose(row, number_of_targets(len(row.ids), 0.15), VOCABULARY, _rng())
    assert chosen.sum() == 2


def test_spans_begin_with_words_and_are_long() -> None:
    row, starts = _row(TEXT * 10), VOCABULARY.starts_word
    chosen = MaskedSpans().choose(row, 120, VOCABULARY, _rng())
    begins = np.flatnonzero(chosen & ~np.roll(chosen, 1))
    assert all(starts[row.ids[place]] or place == 0 for place in begins)
    assert len(begins) < 60


def test_a_span_stays_in_its_document_and_passes_over_what_may_not_be_hidden() -> None:
    row = _row("aaaa bbbb")
    row.documents[5:] = 1
    row.candidates[2] = False
    for seed in range(50):
        chosen = MaskedSpans(p=0.01).choose(row, 2, VOCABULARY, _rng(seed))
        assert chosen.sum() == 2
        assert not chosen[2]
    assert _contiguous(np.arange(3, 8), row.documents).tolist() == [3, 4]


def test_eight_of_ten_targets_become_the_mask_and_one_another_ordinary_token() -> None:
    rng, counts = _rng(3), np.zeros(3)
    for _ in range(100):
        row = _row(TEXT * 3)
        inputs, labels = MaskedLM(rate=0.5).apply(row, VOCABULARY, rng)
        at = labels != IGNORE_INDEX
        masked = inputs[at] == VOCABULARY.mask_id
        kept = inputs[at] == row.ids[at]
        counts += masked.sum(), kept.sum(), (~masked & ~kept).sum()
        assert np.isin(inputs[at][~masked], VOCABULARY.ordinary).all()
        assert (inputs[~at] == row.ids[~at]).all()
    assert np.allclose(counts / counts.sum(), [0.8, 0.1, 0.1], atol=0.01)


def test_random_ids_are_never_special_or_unknown() -> None:
    words = WordTokenizer(["a", " b", "c"], ("<|endoftext|>", "<|mask|>"))
    assert sorted(words.decode([number]) for number in Vocabulary.of(words).ordinary) == [" b", "a", "c"]


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_rate_that_hides_nothing_or_everything_is_refused(rate: float) -> None:
    with pytest.raises(ConfigurationError, match=r"rate=.*Use a fraction between 0 and 1"):
        MaskedLM(rate=rate)


def test_fractions_above_one_together_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="add up to more than 1"):
        MaskedLM(hidden=0.8, random=0.3)


def test_a_tokenizer_without_a_mask_token_is_refused_with_the_way_to_add_one() -> None:
    with pytest.raises(ConfigurationError, match=r"no mask token.*with_special_tokens\(\['<\|mask\|>'\]\)"):
        Vocabulary.of(ByteTokenizer()).mask_id  # noqa: B018


def _pretrained(model: dict[str, object], decoder: dict[str, object]) -> PretrainedTokenizer:
    added = [
        {
            "id": 0,
            "content": "[MASK]",
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
    ]
    definition = {"version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": None}
    definition |= {"post_processor": None, "truncation": None, "padding": None, "model": model, "decoder": decoder}
    return PretrainedTokenizer(json.dumps(definition), config='{"mask_token": "[MASK]"}')


def test_words_of_published_vocabularies() -> None:
    pieces = {"[MASK]": 0, "[UNK]": 1, "play": 2, "##ing": 3}
    model: dict[str, object] = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    model |= {"max_input_chars_per_word": 100, "vocab": pieces}
    found = Vocabulary.of(_pretrained(model, {"type": "WordPiece", "prefix": "##", "cleanup": True}))
    assert found.starts_word.tolist() == [True, True, True, False]
    assert found.mask_id == 0
    assert found.ordinary.tolist() == [2, 3]

    letters = {"[MASK]": 0, "\u0120the": 1, "re": 2, "\u2581so": 3}
    bpe: dict[str, object] = {"type": "BPE", "vocab": letters, "merges": [], "unk_token": None, "dropout": None}
    bpe |= {"continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False}
    byte_level: dict[str, object] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    assert Vocabulary.of(_pretrained(bpe, byte_level)).starts_word.tolist() == [True, True, False, True]


def test_masks_follow_from_seed_row_and_epoch(tmp_path) -> None:
    texts = [[*TOKENIZER.encode(TEXT)[: 20 + 3 * n], TOKENIZER.eos_id] for n in range(12)]
    store = write_store(np.concatenate(texts), None, tmp_path / "store", tokenizer=TOKENIZER)
    stream = TokenStream(store, row_length=64)
    masked = MaskedStream(stream, MaskedLM(rate=0.3), VOCABULARY, seed=1)
    epoch = masked.rows_per_epoch
    whole = masked.batch(np.arange(3 * epoch))
    later = MaskedStream(TokenStream(store, row_length=64), MaskedLM(rate=0.3), VOCABULARY, seed=1)
    again = later.batch(np.array([2 * epoch + 1]))
    assert all((again[name][0] == whole[name][2 * epoch + 1]).all() for name in whole)
    plain = stream.batch(np.arange(3 * epoch))
    targets = whole["labels"] != IGNORE_INDEX
    assert (plain["input_ids"][targets] == whole["labels"][targets]).all()
    assert not targets[plain["labels"] == IGNORE_INDEX].any(), "begin tokens and padding are never hidden"
    assert not np.isin(whole["labels"][targets], [TOKENIZER.eos_id]).any()
    ordinary = ((plain["labels"] != IGNORE_INDEX) & (plain["input_ids"] < 256)).sum(axis=1)
    assert targets.sum(axis=1).tolist() == [number_of_targets(int(n), 0.3) for n in ordinary]
    other = MaskedStream(stream, MaskedLM(rate=0.3), VOCABULARY, seed=2)
    assert (other.batch(np.arange(epoch))["labels"] != whole["labels"][:epoch]).any()
    assert other.fingerprint != masked.fingerprint
