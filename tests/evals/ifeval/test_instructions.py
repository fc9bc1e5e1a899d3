import dataclasses

import pytest
from evals.tasks.small_data import Oracle, score, write_lines

from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.evals.ifeval import INSTRUCTIONS, follows
from lightning_lm.evals.tasks import by_name, loose_variants
from lightning_lm.rewards import Reward

ENGLISH = "this is a plain sentence about the weather in the north of england today"
GERMAN = "Dies ist ein ganz gewöhnlicher Satz über das Wetter im Norden von England heute."
CASES = [
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "I say NO",
        "I say no",
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        "one TWO",
        "ONE TWO",
    ),
    ("change_case:english_capital", {}, ENGLISH.upper(), ENGLISH.upper()[:-1] + "y"),
    ("change_case:english_capital", {}, ENGLISH.upper() + " 12!", GERMAN.upper()),
    ("change_case:english_lowercase", {}, ENGLISH, ENGLISH.capitalize()),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi. "}, " say HI. Hello", "Sure: Say hi. Hello"),
    ("combination:two_responses", {}, "One\n******\nTwo", "One\n******\nOne"),
    ("combination:two_responses", {}, "******One******Two******", "One******Two******Three"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] of [place]", "[name] of (place)"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye\nP.S. more", "Bye, parsley"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye\nP.P.S. more", "Bye\nP.S. more"),
    ("detectable_format:constrained_response", {}, "My answer is maybe.", "Maybe."),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', "{'a': 1}"),
    ("detectable_format:json_format", {}, "[]", '{"a": 1} and more'),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\na\nSection 2\nb",
        "Section 1",
    ),
    ("detectable_format:number_bullet_lists", {"num_bullets": 3}, "* a\n- b\n  * c", "* a\n* b"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "**bold** text\n* a", "- a\n- b"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b c**", "*a* and ** **"),
    ("detectable_format:title", {}, "<<A title>>\ntext", "<< >>\ntext"),
    ("keywords:existence", {"keywords": ["sun", "C++"]}, "The SUN knows c++", "The sun knows C"),
    ("keywords:forbidden_words", {"forbidden_words": ["can"]}, "A candle", "You Can do it"),
    ("keywords:frequency", {"keyword": "la", "frequency": 3, "relation": "at least"}, "La la-la", "la la"),
    ("keywords:frequency", {"keyword": "la", "frequency": 1, "relation": "less than"}, "none here", "la"),
    ("keywords:letter_frequency", {"letter": "q", "let_frequency": 2, "let_relation": "less than"}, "Quiet", "Q and q"),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 2, "let_relation": "at least"}, "a! b!", "a!"),
    ("language:response_language", {"language": "de"}, GERMAN, ENGLISH),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
        'One.\n\n"Weekend, at last.',
        "One.\n\nThe weekend.",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "one"},
        "One!\n\nTwo\n\n",
        "One\n\nTwo\n\nThree",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\nOne\n***\nTwo", "One\n\nTwo"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One *** Two ***", "One *** *** Two"),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        "It is 3.5 km, Dr. Who. Really?!",
        "Mr. Smith saw e.g. a fox at 3.5 m.",
    ),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, "One.", "One. Two"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one, two-three", "one two"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "one two", "one two three"),
    ("punctuation:no_comma", {}, "a; b", "a, b"),
    ("startend:end_checker", {"end_phrase": "Any questions?"}, 'Well. "any questions?"\n', "Any questions? No."),
    ("startend:quotation", {}, '\n"All of it."', '"Part" of it'),
]


BORDERS = [
    ("keywords:forbidden_words", {"forbidden_words": ["C++", "can"]}, "I like C, candles", "I like C++ best"),
    ("keywords:forbidden_words", {"forbidden_words": ["C++"]}, "no C+", "C++"),
    ("detectable_format:title", {}, "<<a>>", "<<\t>>"),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        "the U.S.",
        "A U.S.",
    ),
    ("change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": "at least"}, "AC/DC", "Ac/DC"),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        "MAX_SIZE",
        "MAX SIZE",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "less than"},
        "1. One.\n2. Two.",
        "1. One. Or.\n2. Two.",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "less than"},
        "Well... it is.",
        "Well... It is.",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        "**Bold.** And more.",
        "**Bold** and more.",
    ),
    ("detectable_format:json_format", {}, "[" * 20 + "]" * 20, "[" * 100_000),
]


@pytest.mark.parametrize(("kind", "arguments", "right", "wrong"), [*CASES, *BORDERS])
def test_each_kind_of_instruction(kind, arguments, right, wrong):
    assert follows(kind, right, {**arguments, "unused": None})
    assert not follows(kind, wrong, arguments)
    assert not follows(kind, " \n", arguments)


def test_all_kinds_have_a_case():
    assert len(INSTRUCTIONS) == 25
    assert {kind for kind, *_ in CASES} == INSTRUCTIONS.keys()


def test_loose_variants_drop_first_and_last_line_and_asterisks():
    assert loose_variants("Sure:\n*b*\nBye") == [
        "Sure:\n*b*\nBye",
        "*b*\nBye",
        "Sure:\n*b*",
        "*b*",
        "Sure:\nb\nBye",
        "b\nBye",
        "Sure:\nb",
        "b",
    ]


def test_the_published_file_strict_and_loose_by_prompt_and_instruction(tmp_path):
    empty = {"num_words": None, "relation": None}
    records = [
        {
            "key": 1000,
            "prompt": "Write JSON.",
            "instruction_id_list": ["detectable_format:json_format", "punctuation:no_comma"],
            "kwargs": [empty, {}],
        },
        {
            "key": 1001,
            "prompt": "Write.",
            "instruction_id_list": ["length_constraints:number_words"],
            "kwargs": [{"num_words": 2, "relation": "at least"}],
        },
    ]
    write_lines(tmp_path / "input_data.jsonl", records)
    task = by_name("ifeval", data=tmp_path)
    assert [item.id for item in task.items()] == ["1000", "1001"]
    metrics = score(task, Oracle(lambda prompt: "Here it is:\n{}" if "JSON" in prompt else "one two"))
    assert metrics["prompt_strict"] == 0.5
    assert metrics["instruction_strict"] == pytest.approx(2 / 3)
    assert metrics["prompt_loose"] == metrics["instruction_loose"] == 1


def test_the_vote_is_one_by_a_ranking_and_a_majority_is_refused(tmp_path):
    record = {"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    write_lines(tmp_path / "input_data.jsonl", [record])
    several = by_name("ifeval", data=tmp_path, samples=2)
    assert score(several, Oracle(lambda _: ["a, b", "a b"]))["prompt_strict_pass@2"] == 1
    best = dataclasses.replace(several, vote="best", ranking=Length())
    assert best.main_metric == "prompt_strict_best@2"
    metrics = score(best, Oracle(lambda _: ["a, b", "a b"]))
    assert (metrics["prompt_strict"], metrics["prompt_strict_best@2"]) == (0.5, 0.0)
    with pytest.raises(ConfigurationError, match="use vote=best"):
        by_name("ifeval", data=tmp_path, samples=2, vote="majority")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Length(Reward):
    def __call__(self, *, prompts, completions, **columns):
        return [float(len(text)) for text in completions]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"instruction_id_list": ["keywords:existence"], "kwargs": [{}]}, "line 1 .*do not fit 'keywords:existence'"),
        (
            {"instruction_id_list": ["keywords:exist"], "kwargs": [{}]},
            "line 1 .*no instruction is called 'keywords:exist'",
        ),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "same length"),
    ],
)
def test_records_that_do_not_fit(tmp_path, record, message):
    write_lines(tmp_path / "input_data.jsonl", [{"key": 1, "prompt": "p", **record}])
    with pytest.raises(DataError, match=message):
        by_name("ifeval", data=tmp_path).items()


def test_arguments_that_do_not_fit():
    with pytest.raises(DataError, match=r"do not fit 'keywords:existence'.*keywords"):
        follows("keywords:existence", "text", {})
    with pytest.raises(DataError, match="'at least' or 'less than'"):
        follows("length_constraints:number_words", "text", {"num_words": 1, "relation": "about"})
