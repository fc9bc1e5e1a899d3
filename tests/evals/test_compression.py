import lzma
import math
import random
import zlib

import numpy as np
import pytest

from lightning_lm.errors import DataError
from lightning_lm.evals import gzip_bits_per_byte, token_counts, unigram_bits_per_byte, xz_bits_per_byte

TEXT = b"".join(b"the %d-th line of a text, with %d words\n" % (i, i * i % 97) for i in range(2000))
GZIP_HEADER_AND_TRAILER = 10 + 8  # RFC 1952: fixed header, CRC32 and length


def test_gzip_is_deflate_at_level_9_in_the_container_of_rfc_1952():
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = deflate.compress(TEXT) + deflate.flush()
    expected = 8 * (len(body) + GZIP_HEADER_AND_TRAILER) / len(TEXT)
    assert gzip_bits_per_byte(TEXT) == expected


def test_xz_is_the_preset_9_of_the_xz_tools():
    compressor = lzma.LZMACompressor(format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, preset=9)
    size = len(compressor.compress(TEXT) + compressor.flush())
    assert xz_bits_per_byte(TEXT) == 8 * size / len(TEXT)
    assert xz_bits_per_byte(TEXT) < gzip_bits_per_byte(TEXT)


@pytest.mark.parametrize("measure", [gzip_bits_per_byte, xz_bits_per_byte])
def test_noise_costs_just_over_eight_bits_and_a_constant_almost_nothing(measure):
    noise = random.Random(0).randbytes(100_000)
    assert 8.0 < measure(noise) < 8.01
    assert measure(b"a" * 1_000_000) < 0.01
    with pytest.raises(DataError, match="at least one byte"):
        measure(b"")


def test_the_size_does_not_depend_on_the_clock():
    assert gzip_bits_per_byte(TEXT) == gzip_bits_per_byte(TEXT)


def test_unigram_of_uniform_counts_is_the_log_of_the_vocabulary():
    train = np.full(256, 7)
    validation = np.arange(256)
    assert unigram_bits_per_byte(train, validation, int(validation.sum())) == pytest.approx(8.0, abs=1e-12)


def test_unigram_by_hand():
    # p = (3+1)/(4+3), (1+1)/(4+3), (0+1)/(4+3); the third is unseen in training.
    train, validation = np.array([3, 1, 0]), np.array([2, 0, 1])
    expected = (2 * math.log2(7 / 4) + math.log2(7 / 1)) / 5
    assert unigram_bits_per_byte(train, validation, 5) == pytest.approx(expected, rel=1e-12)


def test_unigram_of_the_training_text_is_near_its_entropy():
    ids = np.random.default_rng(0).choice(4, size=200_000, p=[0.5, 0.25, 0.125, 0.125])
    counts = token_counts(ids, 4)
    assert unigram_bits_per_byte(counts, counts, ids.size) == pytest.approx(1.75, abs=0.01)


def test_an_untrained_unigram_is_uniform():
    assert unigram_bits_per_byte(np.zeros(16, dtype=np.int64), np.ones(16, dtype=np.int64), 16) == pytest.approx(4.0)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64])
def test_counts_are_those_of_a_loop_over_chunks(dtype, monkeypatch):
    monkeypatch.setattr("lightning_lm.evals.compression._CHUNK", 7)
    ids = np.random.default_rng(1).integers(0, 11, size=100).astype(dtype)
    expected = [sum(1 for x in ids.tolist() if x == token) for token in range(11)]
    assert token_counts(ids, 11).tolist() == expected
    assert token_counts(iter(ids.tolist()), 11).tolist() == expected
    assert token_counts(ids[:0], 11).tolist() == [0] * 11


def test_bad_counts_are_refused():
    with pytest.raises(DataError, match="another tokenizer"):
        token_counts(np.array([3]), 3)
    with pytest.raises(DataError, match="another tokenizer"):
        token_counts([-1], 3)
    with pytest.raises(DataError, match="two vocabularies"):
        unigram_bits_per_byte(np.ones(3), np.ones(4), 1)
    with pytest.raises(DataError, match="no validation text"):
        unigram_bits_per_byte(np.ones(3), np.zeros(3), 0)
