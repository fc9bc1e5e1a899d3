"""The forms of records that people have: what each becomes, which are refused, and where errors point."""

import gzip
import json
import re
import warnings

import pyarrow
import pyarrow.parquet
import pytest
from trl.data_utils import extract_prompt, maybe_convert_to_chatml, maybe_extract_prompt

from lightning_lm.data import (
    Alpaca,
    ChatML,
    Columns,
    Examples,
    Files,
    HeldOutExamples,
    PairRows,
    Plain,
    PreferencePairs,
    PromptedExamples,
    ShareGPT,
    SupervisedRows,
    encode_example,
    encode_pair,
    encode_preference,
    split_preference,
    split_sides,
    store_examples,
)
from lightning_lm.data.post_training.forms import by_content, form_of, label_of
from lightning_lm.data.post_training.prompts import PromptStream
from lightning_lm.data.post_training.unpaired import UnpairedExamples
from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.tokenizers import ByteTokenizer

BYTES = ByteTokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
EOS = BYTES.eos_id
TURNS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]
FROM_VALUE = [{"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]} for turn in TURNS]


def learned(record, train_on="assistant", template=ChatML()):
    rendered = encode_example(record, BYTES, template, train_on)
    return BYTES.decode([token for token, mask in zip(*rendered, strict=True) if mask])


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": FROM_VALUE},
        {"conversations": TURNS},
        {"messages": FROM_VALUE},
        {"messages": json.dumps(TURNS)},
        {"conversations": json.dumps(FROM_VALUE), "id": "7"},
        {"messages": TURNS, "prompt": "a", "prompt_id": "x"},  # UltraChat
        {"prompt": TURNS[:3], "completion": TURNS[3]},  # a dict as answer
        {"prompt": TURNS[:3], "completion": {"from": "gpt", "value": "d"}},
        {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]]},
        {"messages": [{**turn, "tool_calls": None, "weight": None} for turn in TURNS], "text": None},  # Parquet
    ],
    ids=lambda record: " ".join(record),
)
def test_conversations_in_every_form_are_one_conversation(record):
    wanted = encode_example({"messages": TURNS}, BYTES, ChatML(), "assistant")
    assert encode_example(record, BYTES, ChatML(), "assistant") == wanted


def test_sharegpt_is_what_trl_makes_of_it():
    ours = by_content({"conversations": [{"from": "user", "value": "x"}, {"from": "assistant", "value": "y"}]})
    theirs = maybe_convert_to_chatml(
        {"conversations": [{"from": "user", "value": "x"}, {"from": "assistant", "value": "y"}]}
    )
    assert ours == theirs


def test_a_system_text_and_calls_of_functions():
    record = {
        "conversations": [
            *FROM_VALUE[:1],
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "two"},
        ],
        "system": "s",
        "tools": "[]",
    }
    messages = by_content(record)["messages"]
    assert [turn["role"] for turn in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert by_content(record)["tools"] == "[]"


def test_alpaca_is_instruction_and_input():
    record = {"instruction": "Add.", "input": "2 2", "output": "4", "text": "Below is an instruction ..."}
    assert learned(record, template=Plain()) == "4<|endoftext|>"
    assert by_content(record)["prompt"] == "Add.\n2 2"
    assert by_content({**record, "input": ""})["prompt"] == "Add."
    renamed = {"task": "Add.", "input": "2 2", "answer": "4"}
    asked, wanted = by_content(record)["prompt"], "Add.\n2 2"
    assert encode_pair(asked, "4", BYTES, Plain()) == encode_pair(f"{wanted}\n", "4", BYTES, Plain())
    assert Plain().prompt_ids(asked, BYTES) == Plain().prompt_ids(f"{wanted}\n", BYTES)
    assert encode_pair(asked, "4", BYTES, ChatML()) == encode_pair(wanted, "4", BYTES, ChatML())
    converted = Alpaca(instruction="task", output="answer").convert(renamed)
    assert (converted["prompt"], converted["completion"]) == ("Add.\n2 2", "4")


def test_alpaca_with_another_wording():
    """The preamble as it was published, by `PromptedExamples`; what rewards read stays beside it."""
    data = [{"instruction": "Add.", "input": "", "output": "4", "source": "x"}]
    source = PromptedExamples(Examples(data), prompt="### Instruction:\n{instruction}\n\n### Response:\n")
    (record,) = source.records()
    found = by_content(record)
    assert found == by_content(found)
    assert (found["prompt"], found["completion"]) == ("### Instruction:\nAdd.\n\n### Response:\n", "4")
    assert (found["output"], found["source"]) == ("4", "x")
    assert learned(record, template=Plain()) == "4<|endoftext|>"


def test_texts_and_tokens_are_learned_whole_or_as_their_mask_says():
    assert encode_example({"text": "ab"}, BYTES, Plain(), "completion") == ([EOS, 97, 98, EOS], [True] * 4)
    written = {"text": "<|im_start|>user\na<|im_end|>"}
    assert encode_example(written, BYTES, ChatML(), "completion").ids[1] == 257  # rendered before: a token, no letters
    ids = {"input_ids": [5, 6, 7, 8]}
    assert encode_example(ids, BYTES, Plain(), "completion") == ([5, 6, 7, 8], [True] * 4)
    for mask in ({"labels": [-100, -100, 7, 8]}, {"completion_mask": [0, 0, 1, 1]}, {"assistant_masks": [0, 0, 1, 1]}):
        assert encode_example(ids | mask, BYTES, Plain(), "completion").learn_mask == [False, False, True, True]
    padded = {"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0], "labels": [5, 6, -100, -100]}
    assert encode_example(padded, BYTES, Plain(), "completion") == ([5, 6], [True, True])


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"input_ids": [1, 999]}, r"input_ids\[1\] is 999, and the tokenizer has 259"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, r"labels\[0\] is 2 .*not shifted"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels has 1 entries and input_ids 2"),
        ({"input_ids": [[1, 2]]}, "flat list of integers"),
        ({"prompt": "a", "completion": "b", "label": False}, "KTO .*recipe kto/reverse.*format Columns"),
        ({"prompt": "a", "completion": "b", "label": 1}, "KTO"),
        ({"conversations": FROM_VALUE, "kto_tag": True}, "KTO"),
        ({"messages": TURNS, "prompt": "a", "completion": "b"}, "several forms: messages and prompt . completion"),
        ({"conversations": TURNS, "instruction": "a", "output": "b"}, "several forms"),
        (
            {"question": "a", "answer": "b"},
            r"\['answer', 'question'\].*prompt \+ completion; messages; text; input_ids",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "Columns --data.train.format.prompt COLUMN"),
        ({"messages": "hello"}, "messages is a text that is not JSON"),
        ({"messages": ["hello"]}, r"messages\[0\] is a str"),
        ({"messages": 5}, "messages is a int"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\] has no 'role'"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\].content is None"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, r"conversations\[0\].from is 'alien'"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": "\ud83d"}]}, r"messages\[1\].content has half"),
        ({"prompt": "a", "completion": 4}, "completion is a int"),
        ({"prompt": "a", "completion": ["b", "c"]}, r"completion\[0\] is a str"),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": 0.5}]}, r"messages\[1\].weight is 0.5"),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": 0, "train": True}]}, "contradict"),
        ({"messages": [{**TURNS[0], "train": True}, TURNS[1]]}, r"messages\[0\] .*'user'.*train=True"),
        ({"messages": [TURNS[0], {**TURNS[1], "train_detail": [1]}]}, "train_detail"),
        ({"prompt": "a", "completion": [{**TURNS[1], "train": False}]}, "weight 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_used_says_which_field(record, words):
    with pytest.raises(DataError, match=words):
        encode_example(record, BYTES, ChatML(), "completion")


@pytest.mark.parametrize(("mark", "no", "yes"), [("weight", 0, 1), ("train", False, True), ("loss", False, True)])
def test_masks_of_messages_are_honoured(mark, no, yes):
    """OpenAI's weight, axolotl's train, ms-swift's loss: marked turns decide for themselves, whatever train_on is."""
    first = {"messages": [TURNS[0], {**TURNS[1], mark: no}, *TURNS[2:]]}
    last = {"messages": [*TURNS[:3], {**TURNS[3], mark: no}]}
    both = {"messages": [TURNS[0], {**TURNS[1], mark: yes}, TURNS[2], {**TURNS[3], mark: yes}]}
    none = {"messages": [{**turn, mark: no} for turn in TURNS]}
    assert learned(first) == "d<|im_end|>"
    assert learned(last) == "b<|im_end|>"
    assert learned(both, "completion") == "b<|im_end|>d<|im_end|>"
    assert learned(none) == learned(none, "completion") == ""
    sharegpt = [{**turn, mark: no if turn["value"] == "b" else None} for turn in FROM_VALUE]
    assert learned({"conversations": sharegpt}) == "d<|im_end|>"
    with pytest.raises(DataError, match=r"messages\[1\] is masked .*train_on assistant"):
        encode_example(first, BYTES, ChatML(), "all")


def test_columns_are_mapped_and_choose_a_form():
    record = {"question": "2+2=", "answer": "4", "level": 1, "label": False, "messages": TURNS}
    converted = Columns(prompt="question", completion="answer").convert(record)
    assert {name: converted.get(name) for name in ("prompt", "completion", "level", "label", "messages")} == {
        "prompt": "2+2=",
        "completion": "4",
        "level": 1,
        "label": None,
        "messages": None,
    }
    pairs = Columns(prompt="q", chosen="good", rejected="bad").convert({"q": "x", "good": "y", "bad": "z"})
    assert split_preference(pairs) == ("x", "y", "z")
    assert (
        learned(Columns(messages="conversations").convert({"conversations": FROM_VALUE, "label": 1}))
        == "b<|im_end|>d<|im_end|>"
    )
    with pytest.raises(DataError, match=r"no field 'question', but \['q'\]"):
        Columns(prompt="question").convert({"q": "x"})
    with pytest.raises(ConfigurationError, match="names no column"):
        Columns()
    turned = ShareGPT(conversations="dialog", role="speaker", content="line")
    assert turned.convert({"dialog": [{"speaker": "human", "line": "x"}]})["messages"] == [
        {"role": "user", "content": "x"}
    ]


# --- preferences ---

TEXT_PAIRS = [
    ("Q: Capital of Norway?\nA:\nOslo", "Q: Capital of Norway?\nA:\nBergen"),
    ("The sky is blue.", "The sky is green."),
    ("Name a city. Paris is one", "Name a city. Parma is one"),
    ("\n\nHuman: hi\n\nAssistant: Hello!", "\n\nHuman: hi\n\nAssistant: Go away"),
    ("ab", "ac"),
]


@pytest.mark.parametrize(("chosen", "rejected"), TEXT_PAIRS)
def test_the_implicit_prompt_of_texts_is_that_of_trl(chosen, rejected):
    theirs = extract_prompt({"chosen": chosen, "rejected": rejected})
    assert split_preference({"chosen": chosen, "rejected": rejected}) == tuple(theirs.values())


def test_implicit_prompts_where_trl_has_none():
    """Nothing shared; and a text that ends where the other goes on: to stop there is the answer."""
    assert split_preference({"chosen": "abc", "rejected": "xyz"}) == ("", "abc", "xyz")
    assert split_preference({"chosen": "a b", "rejected": "a b c"}) == ("a b", "", " c")
    pair = encode_preference({"chosen": "a b", "rejected": "a b c"}, BYTES, Plain(), 99)
    assert (list(pair.chosen_ids), list(pair.rejected_ids)) == ([EOS], [*b" c", EOS])


def turns_of(*said):
    return [{"role": role, "content": content} for role, content in zip(("user", "assistant") * 3, said, strict=False)]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": turns_of("q", "good"), "rejected": turns_of("q", "bad")},  # UltraFeedback
        {"chosen": turns_of("q", "x", "y", "good"), "rejected": turns_of("q", "x", "y", "bad")},
        {"prompt": turns_of("q"), "chosen": turns_of("q", "good")[1:], "rejected": turns_of("q", "bad")[1:]},
        {"chosen": turns_of("q", "good"), "rejected": turns_of("q", "good", "more", "b")},  # one begins the other
    ],
    ids=["ultrafeedback", "implicit", "explicit", "beginning"],
)
def test_conversational_preferences_are_those_of_trl(record):
    theirs = maybe_extract_prompt(json.loads(json.dumps(record)))
    assert split_preference(by_content(record)) == (theirs["prompt"], theirs["chosen"], theirs["rejected"])


def test_preferences_of_llama_factory_and_single_messages():
    wanted = (turns_of("q"), turns_of("q", "good")[1:], turns_of("q", "bad")[1:])
    gpt = [{"from": "gpt", "value": said} for said in ("good", "bad")]
    ranking = {"conversations": [{"from": "human", "value": "q"}], "chosen": gpt[0], "rejected": gpt[1]}
    assert split_preference(by_content(ranking)) == wanted
    single = {"prompt": "q", "chosen": wanted[1][0], "rejected": wanted[2][0]}
    assert split_preference(by_content(single)) == ("q", *wanted[1:])
    alpaca = {"instruction": "q", "input": "x", "chosen": "good", "rejected": "bad"}
    assert split_preference(by_content(alpaca)) == ("q\nx", "good", "bad")
    binarized = {
        "prompt": "q",
        "messages": turns_of("q", "good"),
        "chosen": turns_of("q", "good"),
        "rejected": turns_of("q", "bad"),
    }
    assert split_preference(by_content(binarized)) == wanted


def test_answers_that_part_at_a_question_begin_with_the_answer_before_it():
    chosen, rejected = turns_of("q", "a", "u", "x"), turns_of("q", "a", "v", "y")
    assert split_preference({"chosen": chosen, "rejected": rejected}) == (chosen[:1], chosen[1:], rejected[1:])


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"chosen": turns_of("q", "a"), "rejected": turns_of("p", "a")}, "share 0 turn"),
        ({"chosen": turns_of("q"), "rejected": turns_of("q", "a")}, "chosen has no 'assistant' message"),
        ({"chosen": [], "rejected": turns_of("q", "a")}, "chosen has no 'assistant' message"),
        ({"prompt": "a", "completion": "b", "label": True}, "KTOModule --data UnpairedDataModule"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "much"}, "margin is 'much'"),
    ],
)
def test_preferences_that_cannot_be_used(record, words):
    with pytest.raises(DataError, match=words):
        encode_preference(record, BYTES, ChatML(), 99)


# --- places, and bad records that are left out ---

SIDES = ("train", "validation")
GOOD = {"prompt": "a", "completion": "b"}


def stored(source, path, template=Plain()):
    return store_examples(source, BYTES, template, SupervisedRows(context_length=50), path)


def write_lines(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_errors_name_file_line_and_field(tmp_path):
    file = write_lines(
        tmp_path / "chats.jsonl", GOOD, "", {"messages": [TURNS[0], {"role": "assistant", "content": "\ud83d"}]}
    )
    with pytest.raises(DataError, match=r"chats.jsonl, line 3: messages\[1\].content has half of a character"):
        stored(Examples(source=str(file)), tmp_path, ChatML())
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([GOOD, GOOD, {"prompt": "a", "completion": None}]),
        tmp_path / "x.parquet",
        row_group_size=2,
    )
    with pytest.raises(DataError, match=r"x.parquet, row group 1, row 0: It has the fields"):
        stored(Examples(source=str(tmp_path / "x.parquet")), tmp_path)
    preferences = write_lines(
        tmp_path / "p.jsonl",
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": 4, "rejected": "b"},
    )
    with pytest.raises(DataError, match=r"p.jsonl, line 2: chosen is a int"):
        PreferencePairs.from_records(Examples(source=preferences), BYTES, Plain(), PairRows())


def turns_of_example(record, form=None):
    record = by_content(record) if form is None else form.convert(record)
    return [(turn["role"], turn["content"]) for turn in record.get("messages", record.get("prompt"))]


def test_roles_are_read_in_any_case_and_unknown_ones_are_no_silent_loss(tmp_path):
    asked, said = {"role": "USER", "content": "q"}, {"role": "Assistant", "content": "a"}
    assert turns_of_example({"messages": [asked, said]}) == [("user", "q"), ("assistant", "a")]
    assert turns_of_example({"conversations": [{"from": "Human", "value": "q"}, {"from": "AI", "value": "a"}]}) == [
        ("user", "q"),
        ("assistant", "a"),
    ]
    with pytest.raises(DataError, match=r"'Responder' is no known role; write 'assistant'"):
        stored(Examples([{"messages": [asked, {"role": "Responder", "content": "a"}]}]), tmp_path, ChatML())


def test_a_system_text_beside_a_prompt_is_not_lost():
    wanted = [("system", "s"), ("user", "q")]
    assert turns_of_example({"system": "s", "prompt": "q", "completion": "a"}) == wanted
    assert turns_of_example({"system": "s", "prompt": [{"role": "user", "content": "q"}]}) == wanted
    orca = {"system": "s", "question": "q", "chosen": "a", "rejected": "b"}
    columns = Columns(prompt="question", chosen="chosen", rejected="rejected")
    assert turns_of_example(orca, columns) == wanted
    with pytest.raises(DataError, match=r"'question' would be left out.*format\.prompt question"):
        encode_preference(orca, BYTES, ChatML(), 50)
    encode_preference({"source": "web", "chosen": "a", "rejected": "b"}, BYTES, Plain(), 50)
    encode_preference({**orca, "system": None, "prompt": ""}, BYTES, Plain(), 50)


@pytest.mark.parametrize(
    ("record", "advice"),
    [
        (
            {"dialogue": [{"role": "user", "content": "q"}]},
            "--data.train.format Columns --data.train.format.messages dialogue",
        ),
        (
            {"chat": [{"from": "user", "value": "q"}]},
            "--data.train.format ShareGPT --data.train.format.conversations chat",
        ),
        ({"data": [{"prompt": "a", "completion": "b"}]}, "jq -c '.data[]' FILE > records.jsonl"),
    ],
)
def test_lists_of_objects_say_what_they_are(tmp_path, record, advice):
    with pytest.raises(DataError, match=re.escape(advice)):
        stored(Examples([record]), tmp_path, ChatML())


def test_a_json_file_that_is_one_object_says_how_to_write_its_records(tmp_path):
    for content, advice in (
        ({"data": [{"text": "a"}]}, "jq -c '.data[]' FILE > records.jsonl"),
        ({"text": ["a", "b"]}, "jq -c '.text[] | {text: .}' FILE > records.jsonl"),
    ):
        (tmp_path / "all.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=re.escape(advice)):
            list(Files(str(tmp_path / "all.json")).documents())


def skips(source):
    return f"To skip and count such records: --data.train Examples --data.train.source {source} "


@pytest.mark.parametrize(
    "record",
    [
        "{",
        "[1]",
        {"question": "q"},
        {"prompt": 3, "completion": "b"},
        {"messages": [{"role": "user", "content": 4}]},
        {"messages": ["x"]},
        {"input_ids": ["a"]},
        {"prompt": "\ud83d", "completion": "b"},
    ],
)
@pytest.mark.parametrize("kind", ["sft", "preference", "prompts", "kto"])
def test_every_error_of_a_record_ends_with_what_can_be_typed(tmp_path, kind, record):
    file = write_lines(tmp_path / "all.jsonl", record)
    source = Examples(str(file))
    read = {
        "sft": lambda: stored(source, tmp_path, ChatML()),
        "preference": lambda: PreferencePairs.from_records(source, BYTES, ChatML(), PairRows()),
        "prompts": lambda: PromptStream(source, BYTES, ChatML()),
        "kto": lambda: UnpairedExamples(source, BYTES, ChatML(), PairRows()),
    }
    with pytest.raises(DataError) as raised:
        read[kind]()
    said = str(raised.value)
    assert said.startswith(f"{file}, line 1")
    assert said.endswith(f"{skips(file)}--data.train.on_bad_record skip")


def test_places_count_in_the_source_not_behind_the_split(tmp_path):
    lines = [{"prompt": str(number), "completion": "b"} for number in range(60)]
    lines[41] = {"question": "?"}
    file = write_lines(tmp_path / "all.jsonl", *lines)
    sides = [HeldOutExamples(source=Examples(source=str(file)), side=side, fraction=0.3) for side in SIDES]
    found = []
    for side in sides:
        try:
            stored(side, tmp_path)
        except DataError as error:
            found.append(str(error))
    assert len(found) == 1
    assert "all.jsonl, line 42: " in found[0]


def test_bad_records_are_left_out_and_counted_when_asked(tmp_path):
    file = write_lines(tmp_path / "chats.jsonl", GOOD, "{broken", {"question": "?"}, {**GOOD, "label": False}, GOOD)
    source = Examples(source=str(file), on_bad_record="skip")
    with pytest.warns(UserWarning, match=r"Dropped 3 bad record.*\n.*line 2.*\n.*line 3.*\n.*line 4"):
        store = stored(source, tmp_path)
    assert (store.counts.kept, store.counts.bad) == (2, 3)
    assert "Of 5 examples 3 were dropped because they cannot be used" in store.counts.report(51)
    with pytest.raises(DataError, match="line 2 is not JSON"):
        stored(Examples(source=str(file)), tmp_path)
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    with pytest.warns(UserWarning, match="Dropped 1 bad record"):
        pairs = PreferencePairs.from_records(
            Examples(source=[pair, {**pair, "chosen": None}], on_bad_record="skip"), BYTES, Plain(), PairRows()
        )
    assert (len(pairs), pairs.counts.bad) == (1, 1)


def test_the_form_and_what_is_left_out_decide_the_fingerprint(tmp_path):
    file = str(write_lines(tmp_path / "a.jsonl", GOOD))
    sources = [
        Examples(source=file),
        Examples(source=file, on_bad_record="skip"),
        Examples(source=file, format=Columns(text="prompt")),
    ]
    assert len({source.fingerprint for source in sources}) == 3
    assert stored(sources[2], tmp_path)[0].tolist() == [EOS, 97, EOS]


@pytest.mark.parametrize("count", [2, 3, 8, 20, 50])
@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.99])
def test_a_small_source_is_split_with_a_record_on_each_side(count, fraction):
    records = [{"prompt": str(number), "completion": "b"} for number in range(count)]
    train, validation = (list(side.records()) for side in split_sides(records, fraction))
    assert train
    assert validation
    assert sorted(map(str, train + validation)) == sorted(map(str, records))
    assert [train, validation] == [list(side.records()) for side in split_sides(records, fraction)]


def test_arrays_of_json_and_packed_files_are_read(tmp_path):
    (tmp_path / "array.json").write_text(json.dumps([GOOD, GOOD], indent=1))
    (tmp_path / "packed.json.gz").write_bytes(gzip.compress(json.dumps([GOOD, GOOD]).encode()))
    for name in ("array.json", "packed.json.gz"):
        assert list(Examples(source=str(tmp_path / name)).records()) == [GOOD, GOOD]
    several = [str(tmp_path / name) for name in ("array.json", "packed.json.gz")]
    assert list(Examples(source=several).records()) == list(Examples(source=tmp_path).records()) == [GOOD] * 4
    assert Examples(source=several).fingerprint == Examples(source=several).fingerprint


def test_a_name_of_the_hub_is_told_from_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="hf download --repo-type dataset trl-lib/Capybara --local-dir Capybara"):
        list(Examples(source="trl-lib/Capybara").records())


def test_special_tokens_written_under_plain_are_counted(tmp_path):
    records = [GOOD, {"prompt": "a", "completion": "b<|im_end|>"}]
    store = stored(Examples(source=records), tmp_path)
    assert store.counts.written_special == 1
    assert "1 records have a special token" in store.counts.report(51)
    assert "--data.template.read_special true" in store.counts.report(51)
    assert stored(Examples(source=records), tmp_path, Plain(read_special=True)).counts.report(51) is None
    pair = {"prompt": "a", "chosen": "b<|im_end|>", "rejected": "c"}
    assert PreferencePairs.from_records([pair], BYTES, Plain(), PairRows()).counts.written_special == 1


def test_labels_of_kto():
    for value in (True, 1, 1.0, "true", "True"):
        assert label_of({"label": value}) is True
    assert label_of({"kto_tag": False}) is False
    assert label_of({"label": None, "kto_tag": 0}) is False
    for value in (None, "spam", 2, [1]):
        assert label_of({"label": value}) is None
    assert form_of({"prompt": "a", "completion": "b", "label": 0}) == "unpaired"
    assert form_of({"prompt": "a", "completion": "b", "label": "maths"}) == "prompt_completion"


def test_conversion_is_done_once():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for record in ({"conversations": FROM_VALUE}, {"instruction": "a", "output": "b"}, GOOD, {"messages": TURNS}):
            assert by_content(by_content(record)) == by_content(record)
