"""Examples to imitate: what is learned of them, what becomes of long ones, and rows in which all stand whole."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lm.data import (
    BestFit,
    ChatML,
    Concatenate,
    ExampleCounts,
    Examples,
    HeldOutExamples,
    OnePerRow,
    Plain,
    ReverseDigits,
    SupervisedRows,
    SupervisedStore,
    TokenStream,
    WholeFit,
    encode_example,
    store_examples,
)
from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.tokenizers import ByteTokenizer

EOS, START, END = 256, 257, 258
TURNS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]


@pytest.fixture
def tokenizer():
    return ByteTokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))


def said(rendered, tokenizer):
    return tokenizer.decode([token for token, mask in zip(*rendered, strict=True) if mask])


@pytest.mark.parametrize(
    ("train_on", "of_messages", "of_pair", "of_turns"),
    [
        ("completion", "d<|im_end|>", "b<|endoftext|>", "d<|im_end|>"),
        ("assistant", "b<|im_end|>d<|im_end|>", "b<|endoftext|>", "b<|im_end|>d<|im_end|>"),
    ],
)
def test_what_is_learned(tokenizer, train_on, of_messages, of_pair, of_turns):
    messages = encode_example({"messages": TURNS}, tokenizer, ChatML(), train_on)
    assert said(messages, tokenizer) == of_messages
    pair = encode_example({"prompt": "a", "completion": "b"}, tokenizer, Plain(), train_on)
    assert said(pair, tokenizer) == of_pair
    turns = {"prompt": TURNS[:3], "completion": TURNS[3:]}
    assert said(encode_example(turns, tokenizer, ChatML(), train_on), tokenizer) == of_turns
    assert encode_example(turns, tokenizer, ChatML(), train_on) == messages
    assert all(rendered.learn_mask[-1] for rendered in (messages, pair))


def test_all_is_learned_when_asked(tokenizer):
    pair = encode_example({"prompt": "a", "completion": "b"}, tokenizer, Plain(), "all")
    assert pair == ([EOS, 97, 98, EOS], [True] * 4)
    messages = encode_example({"messages": TURNS}, tokenizer, ChatML(), "all")
    assert all(messages.learn_mask)
    assert messages.ids == ChatML().render(TURNS, tokenizer).ids


def test_an_answer_of_text_to_a_conversation(tokenizer):
    as_text = {"prompt": TURNS[:3], "completion": "d"}
    as_turns = {"prompt": TURNS[:3], "completion": TURNS[3:]}
    for train_on in ("completion", "assistant"):
        assert encode_example(as_text, tokenizer, ChatML(), train_on) == encode_example(
            as_turns, tokenizer, ChatML(), train_on
        )


def stored(tmp_path, records, tokenizer, rows, template=Plain()):
    return store_examples(Examples(source=records), tokenizer, template, rows, tmp_path)


def labels_of(store, rows):
    stream = TokenStream(store, row_length=rows.context_length + 1, packing=rows.packing, shuffle=False)
    batch = stream.batch(np.arange(stream.rows_per_epoch))
    return stream, batch


def test_long_examples_are_cut_without_an_end_or_left_out_and_counted(tokenizer, tmp_path):
    records = [
        {"prompt": "a", "completion": "b"},  # 4 tokens with begin and end
        {"prompt": "abc", "completion": "defgh"},  # 10: cut
        {"prompt": "abcdefghijkl", "completion": "m"},  # the prompt alone is too long
    ]
    cut = SupervisedRows(context_length=7)
    store = stored(tmp_path, records, tokenizer, cut)
    assert store.counts == ExampleCounts(kept=2, cut=1, too_long=1, num_learned=2 + 4)
    assert store[1].tolist() == [EOS, *b"abcdefg"]
    assert EOS not in store[1][1:].tolist()
    assert store.counts.report(8) == (
        "Of 3 examples 1 were cut to 8 tokens, 1 were dropped because they do not fit into 8 tokens."
    )
    dropped = stored(tmp_path, records, tokenizer, SupervisedRows(context_length=7, too_long="drop"))
    assert dropped.counts == ExampleCounts(kept=1, too_long=2, num_learned=2)


def test_a_conversation_without_an_answer_is_left_out_and_counted(tokenizer, tmp_path):
    records = [{"messages": TURNS}, {"messages": TURNS[:1]}, {"messages": []}]
    store = stored(tmp_path, records, tokenizer, SupervisedRows(context_length=200), ChatML())
    assert (store.counts.kept, store.counts.empty) == (1, 2)
    assert "2 were dropped because they have no completion" in store.counts.report(201)
    with pytest.raises(DataError, match="no example to train on"):
        stored(tmp_path, records[1:], tokenizer, SupervisedRows(), ChatML())


texts = st.text(alphabet="ab", max_size=12)


@given(pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=12), context=st.integers(4, 40))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("packing", [WholeFit(), OnePerRow()], ids=lambda packing: type(packing).__name__)
def test_rows_hold_every_example_whole_and_learn_exactly_its_answer(packing, pairs, context, tmp_path_factory):
    tokenizer = ByteTokenizer()
    rows = SupervisedRows(context_length=context, packing=packing)
    records = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
    wanted = []
    for prompt, answer in pairs:
        ids = [EOS, *prompt.encode(), *answer.encode(), EOS][: context + 1]
        labels = ([-100] * (1 + len(prompt)) + [*answer.encode(), EOS])[: context + 1]
        if any(label != -100 for label in labels):
            wanted.append((ids, labels))
    cache = tmp_path_factory.mktemp("examples")
    if not wanted:
        with pytest.raises(DataError, match="no example to train on"):
            stored(cache, records, tokenizer, rows)
        return
    _, batch = labels_of(stored(cache, records, tokenizer, rows), rows)
    found = []
    for row in zip(*(batch[name] for name in ("input_ids", "labels", "position_ids", "document_ids")), strict=True):
        ids, labels, positions, documents = (np.asarray(column) for column in row)
        assert (np.diff(documents) >= 0).all()
        for document in np.unique(documents):
            inside = documents == document
            if (labels[inside] == -100).all():
                assert document == documents[-1]  # the padding
                continue
            assert positions[inside].tolist() == list(range(inside.sum()))
            found.append((ids[inside].tolist(), labels[inside].tolist()))
    assert sorted(found) == sorted(wanted)


def test_whole_fit_fills_rows():
    lengths = np.random.default_rng(0).integers(20, 200, 5000)
    plan = WholeFit().plan(lengths, 513)
    assert plan.offsets.max() == 0
    assert sorted(plan.documents.tolist()) == list(range(5000))
    assert plan.lengths[np.argsort(plan.documents)].tolist() == lengths.tolist()
    cells = np.add.reduceat(plan.lengths + 1, plan.row_starts[:-1])
    assert cells.max() <= 513
    assert cells.mean() / 513 > 0.99


@pytest.mark.parametrize("long", ["truncate", "drop"])
def test_whole_fit_never_cuts_in_two(long):
    plan = WholeFit(long=long).plan(np.array([3, 50, 0, 9]), 10)
    found = dict(zip(plan.documents.tolist(), plan.lengths.tolist(), strict=True))
    assert found == ({0: 3, 1: 9, 3: 9} if long == "truncate" else {0: 3, 3: 9})
    assert plan.offsets.tolist() == [0] * len(found)


@pytest.mark.parametrize("packing", [BestFit(), Concatenate()])
def test_a_packing_that_divides_is_refused(packing):
    with pytest.raises(ConfigurationError, match="splits"):
        SupervisedRows(packing=packing)
    with pytest.raises(ConfigurationError, match="BestFit"):
        WholeFit(long="split")


def test_the_same_again_is_read_from_the_cache_and_something_else_is_not(tokenizer, tmp_path):
    calls = []

    def records():
        calls.append(1)
        yield {"prompt": "a", "completion": "b"}

    rows = SupervisedRows(context_length=8)
    first = store_examples(Examples(source=records), tokenizer, Plain(), rows, tmp_path)
    read = len(calls)
    again = store_examples(Examples(source=records), tokenizer, Plain(), rows, tmp_path)
    assert len(calls) == read + 1  # for the fingerprint
    assert again.path == first.path
    others = [
        stored(tmp_path, [{"prompt": "a", "completion": "c"}], tokenizer, rows),
        store_examples(Examples(source=records), tokenizer, Plain(), SupervisedRows(context_length=9), tmp_path),
        store_examples(Examples(source=records), tokenizer, ChatML(), SupervisedRows(context_length=90), tmp_path),
        stored(
            tmp_path, [{"prompt": "a", "completion": "b"}], tokenizer, SupervisedRows(context_length=8, train_on="all")
        ),
    ]
    assert len({store.fingerprint for store in (first, *others)}) == 5
    assert not list(tmp_path.glob("*.partial"))


def test_a_damaged_store_says_so(tokenizer, tmp_path):
    store = stored(tmp_path, [{"prompt": "a", "completion": "b"}], tokenizer, SupervisedRows(context_length=8))
    learned = (store.path / "learned.bin").read_bytes()
    for content in (b"", bytes([1 - learned[0]]) + learned[1:]):
        (store.path / "learned.bin").write_bytes(content)
        with pytest.raises(DataError, match="damaged"):
            SupervisedStore(store.path)
        with pytest.warns(UserWarning, match="encoded again"):
            stored(tmp_path, [{"prompt": "a", "completion": "b"}], tokenizer, SupervisedRows(context_length=8))
        assert (store.path / "learned.bin").read_bytes() == learned


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"question": "a"}, r"Record 1: .*\['question'\]"),
        ({"prompt": "a"}, "Record 1"),
        ({"messages": TURNS}, r"Record 1: Plain\(\)"),
        ({"prompt": "\ud800", "completion": "b"}, "Record 1: .*surrogate"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(tokenizer, tmp_path, record, match):
    with pytest.raises(DataError, match=match):
        stored(tmp_path, [{"prompt": "a", "completion": "b"}, record], tokenizer, SupervisedRows())


def test_processes_give_the_same_store_and_name_the_same_record(tokenizer, tmp_path):
    records = [{"prompt": "q" * (number % 9), "completion": str(number)} for number in range(2500)]
    rows = SupervisedRows(context_length=9)
    stores = [
        store_examples(Examples(source=records), tokenizer, Plain(), rows, tmp_path / str(workers), num_workers=workers)
        for workers in (1, 2)
    ]
    assert stores[0].fingerprint == stores[1].fingerprint
    assert (stores[0].learned == stores[1].learned).all()
    assert stores[0].counts == stores[1].counts
    assert stores[0].counts.kept > 2000
    assert stores[0].counts.cut > 0
    records[2000] = {"question": "no answer"}
    for workers in (1, 2):
        with pytest.raises(DataError, match="Record 2000"):
            store_examples(Examples(source=records), tokenizer, Plain(), rows, tmp_path, num_workers=workers)


def test_a_source_that_can_be_read_once_is_refused(tokenizer, tmp_path):
    with pytest.raises(DataError, match="only once"):
        stored(tmp_path, iter([{"prompt": "a", "completion": "b"}]), tokenizer, SupervisedRows())


def test_files_that_change_are_read_again(tokenizer, tmp_path):
    file = tmp_path / "chats.jsonl"
    prints = set()
    for answer in ("b", "cc"):
        file.write_text(json.dumps({"prompt": "a", "completion": answer}))
        source = Examples(source=str(file))
        prints.add(source.fingerprint)
        store = store_examples(source, tokenizer, Plain(), SupervisedRows(), tmp_path / "cache")
        assert said((store[0].tolist(), store.learned.tolist()), tokenizer) == f"{answer}<|endoftext|>"
    assert len(prints) == 2


def test_records_are_held_out_by_what_they_say():
    source = ReverseDigits(num_examples=400, num_digits=3)
    train = HeldOutExamples(source=source, side="train", fraction=0.25)
    validation = HeldOutExamples(source=source, side="validation", fraction=0.25)
    sides = [{json.dumps(record) for record in side.records()} for side in (train, validation)]
    assert not sides[0] & sides[1]
    assert len(list(train.records())) + len(list(validation.records())) == 400
    assert 60 < len(list(validation.records())) < 140
    assert train.fingerprint != validation.fingerprint
    with pytest.raises(DataError, match="two different records"):
        list(HeldOutExamples(source=Examples(source=[]), side="validation", fraction=0.5).records())
    with pytest.raises(ConfigurationError):
        HeldOutExamples(source=source, side="train", fraction=1.0)
