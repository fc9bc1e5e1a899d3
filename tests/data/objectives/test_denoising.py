"""Denoising objectives: texts are rebuilt from sources and targets; numbers are those of T5 and UL2."""

import numpy as np
import pytest

from lightning_lm.data import OnePerRow, TokenStream, WholeFit, write_store
from lightning_lm.data.objectives import (
    SENTINELS,
    UL2,
    Denoisers,
    FillInTheMiddle,
    PrefixLM,
    PrefixStream,
    SourceTargetStream,
    SpanCorruption,
    Vocabulary,
)
from lightning_lm.data.objectives.denoising import span_counts
from lightning_lm.errors import ConfigurationError
from lightning_lm.tokenizers import ByteTokenizer
from lightning_lm.types import IGNORE_INDEX

FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
TOKENIZER = ByteTokenizer(("<|endoftext|>", *SENTINELS, "[R]", "[S]", "[X]", *FIM))
VOCABULARY = Vocabulary.of(TOKENIZER)
EOS = TOKENIZER.eos_id


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def _rebuilt(source: np.ndarray, target: np.ndarray) -> list[int]:
    """Put each span of the target where its sentinel stands in the source."""
    sentinels, spans = set(VOCABULARY.sentinels.tolist()), {}
    for token in target.tolist():
        if token in sentinels:
            spans[token] = current = []
        else:
            current.append(token)
    return [piece for token in source.tolist() for piece in spans.get(token, [token])]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 50, 568])
@pytest.mark.parametrize("part", [SpanCorruption(), SpanCorruption(rate=0.5, mean_span=8), SpanCorruption(rate=0.9)])
def test_the_text_is_rebuilt_from_source_and_target(part: SpanCorruption, length: int) -> None:
    for seed in range(10):
        ids = _rng(seed).integers(0, 256, length)
        source, target = part.apply(ids, VOCABULARY, _rng(seed + 100))
        assert _rebuilt(source, target) == ids.tolist()
        assert (len(source), len(target)) == part.sizes(length)[:2]
        used = target[np.isin(target, VOCABULARY.sentinels)]
        assert used.tolist() == VOCABULARY.sentinels[: len(used)].tolist()
        assert source[-1] == used[-1], "the text ends in a removed span"
        if length > 1:
            assert source[0] == ids[0], "and begins with a kept token"


def test_the_numbers_are_t5s() -> None:
    """568 tokens give 512 inputs and 114 targets, with an end-of-text token each (t5.data.preprocessors)."""
    assert span_counts(568, 0.15, 3.0) == (85, 28)
    sizes = SpanCorruption().sizes(568)
    assert (sizes.source + 1, sizes.target + 1) == (512, 114)
    assert SpanCorruption().longest_text(512) == 568


def test_every_token_is_removed_equally_often() -> None:
    removed, ids = np.zeros(40), np.arange(40)
    for seed in range(600):
        source, _ = SpanCorruption(rate=0.3).apply(ids, VOCABULARY, _rng(seed))
        removed[~np.isin(ids, source)] += 1
    assert removed[0] == 0
    assert removed[-1] == 600
    assert abs(removed[5:30] / 600 - 0.3).max() < 0.1


def test_a_prefix_is_cut_anywhere_or_in_a_given_place() -> None:
    ids = np.arange(10)
    cuts = set()
    for seed in range(200):
        source, target = PrefixLM().apply(ids, VOCABULARY, _rng(seed))
        assert np.concatenate([source, target]).tolist() == ids.tolist()
        cuts.add(len(source))
    assert cuts == set(range(1, 10))
    source, target = PrefixLM(rate=0.25).apply(np.arange(12), VOCABULARY, _rng())
    assert (source.tolist(), target.tolist()) == (list(range(9)), [9, 10, 11])
    assert PrefixLM().apply(ids[:1], VOCABULARY, _rng()).target.tolist() == [0]


def test_ul2_has_its_seven_denoisers_and_modes() -> None:
    mixture, ids, modes = UL2(), np.arange(200) % 256, []
    for seed in range(700):
        source, target = mixture.apply(ids, VOCABULARY, _rng(seed))
        modes.append(int(source[0]))
        if source[0] == VOCABULARY.id_of("[S]"):
            assert np.concatenate([source[1:], target]).tolist() == ids.tolist()
        else:
            assert _rebuilt(source[1:], target) == ids.tolist()
    share = [modes.count(VOCABULARY.id_of(mode)) / 700 for mode in ("[R]", "[S]", "[X]")]
    assert np.allclose(share, [2 / 7, 1 / 7, 4 / 7], atol=0.05)


@pytest.mark.parametrize("suffix_first", [0.0, 1.0])
def test_the_middle_of_a_text_moves_to_its_end(suffix_first: float) -> None:
    ids, middles = np.arange(20), []
    before, after, middle = (VOCABULARY.id_of(name) for name in FIM)
    for seed in range(50):
        source, target = FillInTheMiddle(rate=1, suffix_first=suffix_first).apply(ids, VOCABULARY, _rng(seed))
        assert not len(source)
        text = target.tolist()
        first, second, third = text.index(before), text.index(after), text.index(middle)
        if suffix_first:
            assert (first, second) == (0, 1)
            rest = text[third + 1 :]  # prefix and middle, one after the other
            assert rest + text[2:third] == ids.tolist()
        else:
            assert text[1:second] + text[third + 1 :] + text[second + 1 : third] == ids.tolist()
        middles.append(len(text) - third)
    assert len(set(middles)) > 5
    assert FillInTheMiddle(rate=0).apply(ids, VOCABULARY, _rng()).target.tolist() == ids.tolist()


def test_missing_tokens_are_named_with_the_way_to_add_them() -> None:
    bare = Vocabulary.of(ByteTokenizer())
    with pytest.raises(ConfigurationError, match=r"Up to 28 spans.*has 0 of the tokens <extra_id_0>"):
        SpanCorruption().check(bare, 568)
    with pytest.raises(ConfigurationError, match=r"no special token '\[R\]'.*with_special_tokens"):
        UL2().check(Vocabulary.of(ByteTokenizer(("<|endoftext|>", *SENTINELS))), 100)
    with pytest.raises(ConfigurationError, match=r"no special token '<\|fim_prefix\|>'"):
        FillInTheMiddle().check(bare, 100)


@pytest.mark.parametrize("settings", [{"rate": 0.0}, {"rate": 1.0}, {"mean_span": 0.5}])
def test_impossible_spans_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError):
        SpanCorruption(**settings)


def test_mixtures_need_one_weight_for_each() -> None:
    with pytest.raises(ConfigurationError, match="one weight for each"):
        Denoisers((PrefixLM(),), weights=(1.0, 2.0))
    assert Denoisers((PrefixLM(), SpanCorruption()), weights=(0.0, 1.0)).sizes(100).source == 99


def _stream(tmp_path, row_length: int = 64) -> tuple[TokenStream, set[tuple[int, ...]]]:
    texts = [_rng(n).integers(0, 256, 8 + 5 * n).tolist() for n in range(10)]
    store = write_store(np.concatenate([[*text, EOS] for text in texts]), None, tmp_path / "store", tokenizer=TOKENIZER)
    return TokenStream(store, row_length=row_length, packing=WholeFit()), {tuple(text) for text in texts}


def test_target_i_of_a_row_belongs_to_source_i(tmp_path) -> None:
    stream, texts = _stream(tmp_path)
    pairs = SourceTargetStream(stream, SpanCorruption(), VOCABULARY, begin_id=EOS, seed=1)
    batch = pairs.batch(np.arange(pairs.rows_per_epoch))
    found = set()
    for row in range(pairs.rows_per_epoch):
        documents, sources = batch["document_ids"][row], batch["source_document_ids"][row]
        assert (np.diff(documents) >= 0).all()
        for number in range(documents.max() + 1):
            target, source = batch["input_ids"][row][documents == number], batch["source_ids"][row][sources == number]
            labels = batch["labels"][row][documents == number]
            if (labels == IGNORE_INDEX).all():
                continue
            assert target[0] == EOS
            assert labels[0] == IGNORE_INDEX
            assert labels[1:].tolist() == target[1:].tolist()
            assert source[-1] == target[-1] == EOS
            found.add(tuple(_rebuilt(source[:-1], target[1:-1])))
    assert found == texts
    again = pairs.batch(np.array([2]))
    width = again["input_ids"].shape[1]
    assert (again["input_ids"][0] == batch["input_ids"][2][:width]).all()


def test_a_prefix_row_has_source_and_target_in_one_document(tmp_path) -> None:
    stream, texts = _stream(tmp_path)
    rows = PrefixStream(stream, PrefixLM(), VOCABULARY, begin_id=EOS)
    batch = rows.batch(np.arange(rows.rows_per_epoch))
    found = set()
    for row in range(rows.rows_per_epoch):
        documents = batch["document_ids"][row]
        for number in range(documents.max() + 1):
            ids, labels, prefix = (
                batch[name][row][documents == number] for name in ("input_ids", "labels", "prefix_lengths")
            )
            if not prefix.any():
                continue
            assert (labels[: prefix[0]] == IGNORE_INDEX).all()
            assert (labels[prefix[0] :] == ids[prefix[0] :]).all()
            found.add(tuple(ids[1:-1].tolist()))
    assert found == texts


def test_long_texts_are_cut_so_that_sources_fit(tmp_path) -> None:
    length = SpanCorruption().longest_text(32)
    store = write_store(np.arange(200) % 256, [200], tmp_path / "store", tokenizer=TOKENIZER)
    stream = TokenStream(store, row_length=length + 1, packing=OnePerRow())
    batch = SourceTargetStream(stream, SpanCorruption(), VOCABULARY, begin_id=EOS).batch(
        np.arange(stream.rows_per_epoch)
    )
    assert batch["source_ids"].shape[1] == 32
    assert batch["input_ids"].shape[1] <= 32
