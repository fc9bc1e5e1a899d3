"""Pairs of answers as ids: one prompt for both, no end behind what was cut, and rows that padding cannot change."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lm.data import (
    ChatML,
    EncodedPair,
    PairRows,
    PairStream,
    Plain,
    PreferencePairs,
    ReverseDigits,
    encode_preference,
)
from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.tokenizers import BPETokenizer, ByteTokenizer, CharacterTokenizer

BYTES = ByteTokenizer()
CHAT = ByteTokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), eos_token="<|endoftext|>")
EOS = BYTES.eos_id


def record(**fields):
    return {"prompt": "2+2=", "chosen": "4", "rejected": "5", **fields}


def encoded(*records, rows=PairRows(), tokenizer=BYTES, template=Plain()):
    return PreferencePairs.from_records(records, tokenizer, template, rows)


def test_a_batch_holds_the_preferred_answers_and_then_the_others():
    pairs = encoded(record(margin=0.5), {"prompt": "a", "chosen": "long answer", "rejected": ""})
    batch = pairs.rows(np.array([0, 1]))
    expected = [
        [EOS, *b"2+2=", *b"4", EOS],
        [EOS, *b"a", *b"long answer", EOS],
        [EOS, *b"2+2=", *b"5", EOS],
        [EOS, *b"a", EOS],
    ]
    for row, ids in enumerate(expected):
        assert batch["input_ids"][row, : len(ids)].tolist() == ids
        assert batch["lengths"][row] == len(ids)
        prompt = 5 if row % 2 == 0 else 2
        assert batch["labels"][row].tolist() == [
            *[-100] * prompt,
            *ids[prompt:],
            *[-100] * (batch["labels"].shape[1] - len(ids)),
        ]
    assert batch["input_ids"].shape == (4, 14)
    assert batch["position_ids"][3].tolist() == list(range(14))
    assert batch["margin"].tolist() == [0.5, 0.0]
    assert batch["pair_ids"].tolist() == [0, 1]


def test_the_end_of_a_short_answer_is_learned_although_padding_has_the_same_id():
    batch = encoded(record(), record(chosen="a much longer answer")).rows(np.array([0, 1]))
    assert batch["input_ids"][0, -1] == EOS == batch["input_ids"][0, 6]
    assert batch["labels"][0, 6] == EOS
    assert (batch["labels"][0, 7:] == -100).all()


@pytest.mark.parametrize("prompt", ["2+2=", "Say hello ", "the end of the", "1234", ""])
@pytest.mark.parametrize("answers", [("4", "5"), (" the dog", "dog"), ("s", "re it is")])
def test_both_answers_follow_the_ids_that_a_model_is_asked_with(prompt, answers):
    """A byte-pair tokenizer would merge over the border of "the" and "re" if prompt and answer were encoded as one."""
    texts = ["there is the dog and there it is, the end of the day, 1234 and 12345"] * 20
    tokenizer = BPETokenizer.train(texts, 300, show_progress=False, num_workers=1)
    pair = encode_preference({"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}, tokenizer, Plain(), 99)
    assert list(pair.prompt_ids) == Plain().prompt_ids(prompt, tokenizer)
    for ids, answer in zip((pair.chosen_ids, pair.rejected_ids), answers, strict=True):
        assert tokenizer.decode(ids[:-1]) == answer
        assert ids[-1] == tokenizer.eos_id


def test_an_implicit_prompt_is_what_both_begin_with():
    implicit = encode_preference({"chosen": "Is it far? No, 3 km.", "rejected": "Is it far? Yes."}, BYTES, Plain(), 99)
    explicit = {"prompt": "Is it far?", "chosen": " No, 3 km.", "rejected": " Yes."}
    assert implicit == encode_preference(explicit, BYTES, Plain(), 99)


def test_an_implicit_prompt_of_a_conversation_is_whole_turns():
    asked = [{"role": "user", "content": "hi"}]
    good, bad = ({"role": "assistant", "content": text} for text in ("hello", "go away"))
    implicit = encode_preference({"chosen": [*asked, good], "rejected": [*asked, bad]}, CHAT, ChatML(), 99)
    explicit = encode_preference({"prompt": asked, "chosen": [good], "rejected": [bad]}, CHAT, ChatML(), 99)
    assert implicit == explicit
    assert list(implicit.prompt_ids) == ChatML().prompt_ids(asked, CHAT)
    assert list(implicit.chosen_ids) == [*b"hello", CHAT.special_tokens["<|im_end|>"]]


@given(st.integers(2, 30), st.text("ab", max_size=20), st.text("ab", max_size=20))
@settings(max_examples=200, deadline=None)
def test_a_cut_answer_has_no_end(max_length, chosen, rejected):
    pair = encode_preference(
        {"prompt": "ab", "chosen": f"c{chosen}", "rejected": f"d{rejected}"}, BYTES, Plain(), max_length
    )
    for ids, text in ((pair.chosen_ids, f"c{chosen}"), (pair.rejected_ids, f"d{rejected}")):
        whole = [*text.encode(), EOS]
        assert list(ids) == whole[: max(0, max_length - 3)]
        assert (EOS in ids) == (len(whole) + 3 <= max_length)
    assert pair.is_cut == (max(len(chosen), len(rejected)) + 5 > max_length)


RAGGED = (
    record(),
    record(chosen="4" * 50),
    record(prompt="2" * 50),
    record(chosen="5555555a", rejected="5555555b"),
    record(chosen="same", rejected="same"),
)


def test_long_pairs_are_left_out_and_counted():
    with_report = encoded(*RAGGED, rows=PairRows(max_length=12))
    counts = with_report.counts
    assert (counts.kept, counts.cut, counts.too_long, counts.same) == (1, 0, 3, 1)
    assert len(with_report) == 1
    assert counts.report(12) == (
        "Of 5 pairs 3 longer than 12 tokens were dropped, 1 with equal completions, or an empty one, were dropped."
    )


def test_long_pairs_are_cut_and_counted():
    pairs = encoded(*RAGGED, rows=PairRows(max_length=12, too_long="truncate"))
    counts = pairs.counts
    assert (counts.kept, counts.cut, counts.too_long, counts.same) == (2, 1, 1, 2)
    prompt, chosen, rejected = pairs[1]
    assert (len(prompt) + len(chosen), len(rejected)) == (12, 2)
    assert EOS not in chosen
    assert pairs.lengths.tolist() == [7, 12]


def test_nothing_lost_is_nothing_to_report():
    assert encoded(record()).counts.report(12) is None


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([{"prompt": "a", "completion": "b"}], "Record 0: .*'chosen'"),
        ([record(), {"text": "a"}], "Record 1: "),
        ([], "No record came"),
        ([record(chosen="4" * 99)], "1 longer than 12 tokens"),
        ([record(chosen=[{"role": "assistant", "content": "4"}])], "use one kind"),
    ],
)
def test_what_cannot_be_used_is_refused(records, words):
    with pytest.raises(DataError, match=words):
        encoded(*records, rows=PairRows(max_length=12))


@pytest.mark.parametrize("settings", [{"max_length": 1}, {"steps_sorted": 0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigurationError, match="at least"):
        PairRows(**settings)


# --- order ---


def ragged_pairs(count, seed=0):
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 40, (count, 2))
    return PreferencePairs(EncodedPair([1], [2] * a, [3] * b, 0.0, False) for a, b in sizes.tolist())


@pytest.mark.parametrize("steps_sorted", [1, 2, 5, 100])
@pytest.mark.parametrize("count", [1, 7, 64, 65])
def test_every_epoch_shows_every_pair_once(count, steps_sorted):
    stream = PairStream(ragged_pairs(count), seed=3, step_size=8, steps_sorted=steps_sorted)
    for epoch in range(3):
        places = np.arange(epoch * count, (epoch + 1) * count)
        numbers = stream.locate(places)
        assert sorted(numbers.tolist()) == list(range(count))
        one_by_one = [stream.locate(places[place : place + 1]).item() for place in reversed(range(count))]
        assert one_by_one[::-1] == numbers.tolist()
    first, second = (stream.locate(np.arange(count) + count * epoch).tolist() for epoch in (0, 1))
    assert count < 10 or first != second


def test_sorting_by_length_saves_padding():
    pairs = ragged_pairs(512)
    plain = PairStream(pairs, step_size=8)
    grouped = PairStream(pairs, step_size=8, steps_sorted=16)

    def padded(stream):
        return sum(stream.batch(np.arange(8) + first)["input_ids"].size for first in range(0, 512, 8))

    assert padded(grouped) < 0.8 * padded(plain)
    widths = [grouped.batch(np.arange(8) + first)["input_ids"].shape[1] for first in range(0, 128, 8)]
    assert widths != sorted(widths)  # the steps themselves come in random order


def test_the_fingerprint_tells_orders_and_pairs_apart():
    pairs = ragged_pairs(20)
    streams = [
        PairStream(pairs),
        PairStream(pairs, seed=1),
        PairStream(pairs, shuffle=False),
        PairStream(pairs, steps_sorted=2),
        PairStream(pairs, steps_sorted=2, step_size=4),
        PairStream(ragged_pairs(20, seed=1)),
    ]
    assert len({stream.fingerprint for stream in streams}) == len(streams)
    assert PairStream(ragged_pairs(20)).fingerprint == streams[0].fingerprint


def test_the_task_becomes_pairs():
    tokenizer = CharacterTokenizer("0123456789=")
    pairs = encoded(*ReverseDigits(num_examples=50).records(), tokenizer=tokenizer)
    for number in range(50):
        prompt, chosen, rejected = (tokenizer.decode(ids) for ids in pairs[number])
        end = "<|endoftext|>"
        digits = prompt.removeprefix(end).removesuffix("=")
        assert (chosen, rejected) == (digits[::-1] + end, digits + end)
