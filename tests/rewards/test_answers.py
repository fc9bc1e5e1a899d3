"""Answers of many spellings, right and wrong ones, text that tries to be code, and comparisons without an end."""

import itertools
import time

import pytest
from answer_pairs import PAIRS

from lightning_lm.errors import ConfigurationError, DataError
from lightning_lm.rewards import (
    AfterHashes,
    AnswerPhrase,
    Boxed,
    ExactAnswer,
    LastNumber,
    MathAnswer,
    OptionLetter,
    Scoring,
    same_answer,
    score,
)
from lightning_lm.rewards.comparison import compare_answers, verify_with_library
from lightning_lm.rewards.expressions import parse_expression, same_value

HANGS = r"\boxed{\tan(\tan(\tan(\tan(\tan(99)))))}"


@pytest.mark.parametrize("kind", PAIRS)
def test_hard_answers_have_the_verdict_of_a_mathematician(kind):
    ours = {}
    for given, right, _ in PAIRS[kind]:
        for pair in ((given, right), (right, given)):
            verdict = compare_answers(*pair)
            ours[pair] = verify_with_library(*pair) if verdict is None else verdict
    expected = {pair: verdict for given, right, verdict in PAIRS[kind] for pair in ((given, right), (right, given))}
    assert {pair: ours[pair] for pair in expected if ours[pair] != expected[pair]} == {}


def test_the_other_process_says_the_same():
    pairs = list(itertools.chain.from_iterable(PAIRS.values()))[::11]
    assert [same_answer(given, right) for given, right, _ in pairs] == [verdict for _, _, verdict in pairs]


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch /x')",
        "9^9^9^9",
        "(9^999)^999",
        "10000!",
        "x" * 300,
        "1 +",
        "(1",
        "lambda: 0",
        "a.b",
        "\\write18{ls}",
    ],
)
def test_what_is_not_an_expression_is_refused_and_never_run(text):
    with pytest.raises(DataError):
        parse_expression(text)
    assert same_value(text, "1") is False
    assert same_answer(text, "1") is False


def test_one_comparison_without_an_end_costs_its_own_sample_alone():
    completions = [HANGS, *[rf"\boxed{{{n}x + x}}" for n in range(7)]]
    begin = time.monotonic()
    table = score(
        [MathAnswer(time_s=1.0)],
        [1.0],
        prompts=[""] * 8,
        completions=completions,
        columns={"answer": [r"\tan(1)", *[f"{n + 1}x" for n in range(7)]]},
        scoring=Scoring(timeout_s=0.5),  # of a batch of foreign code: not for a reward that limits itself
    )
    assert table.totals.tolist() == [0.0] + [1.0] * 7
    assert time.monotonic() - begin < 60  # a busy machine takes seconds to start the processes
    with pytest.raises(ConfigurationError, match="time_s=0"):
        MathAnswer(time_s=0)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("from 3 to -1,234.5 dollars.", "-1,234.5"),
        ("the profit is $70,000.", "70,000"),
        ("it is -$5", "-5"),
        ("it is $-5", "-5"),
        ("3/4", "3/4"),
        ("so $\\frac{3}{4}$.", "\\frac{3}{4}"),
        ("10^3", "10^3"),
        ("10^{3} m", "10^{3}"),
        ("about 2.5 \\times 10^3", "2.5 \\times 10^3"),
        ("50%", "50%"),
        ("1 3/4 cups", "1 3/4"),
        ("10-3", "3"),
        ("at 10:30.", "10:30"),
        ("12 m^2", "12"),
        ("5cm", "5"),
        ("x=-3", "-3"),
        ("**5**", "5"),
        ("x_1 = 7 and H2O", "7"),
        ("5x", None),
        ("x^2", None),
        ("on 12/25/2020", None),
        ("none", None),
    ],
)
def test_the_last_number_is_read_whole(text, number):
    assert LastNumber()(text) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The correct answer is B.", "B"),
        ("Answer: C", "C"),
        ("the answer is (d)", "D"),
        ("so the best option is **C**", "C"),
        ("Because ...\n\nB) 12", "B"),
        ("Answer:\nB", "B"),
        ("The answer is \\boxed{E}.", "E"),
        ("I think not (A), but (D)", "D"),
        ("The answer is A lot of things", None),
        ("A man goes", None),
        ("Bananas", None),
    ],
)
def test_option_letters(text, letter):
    assert OptionLetter()(text) == letter


def test_extractors_find_the_final_answer():
    assert AfterHashes()("So 3 + 4 = 7.\n#### 7\n") == "7"
    assert AfterHashes()("no answer") is None
    assert Boxed()(r"First \boxed{1}, then \boxed{\frac{a}{\sqrt{b}}}.") == r"\frac{a}{\sqrt{b}}"
    assert Boxed()(r"\boxed{1} and \boxed{unfinished") == "1"
    assert Boxed()(r"\boxed{\{1, 2\}}") == r"\{1, 2\}"
    assert Boxed()("nothing") is None
    assert AnswerPhrase()(r"The answer is $\frac{3}{4}$, so we stop.") == r"\frac{3}{4}"
    assert AnswerPhrase()("The answer is 3") is None


@pytest.mark.parametrize("piece", ["\\boxed{", "1", "1,111", "a", "1/", "answer is $$", "answer: \\(", "(", "A\n", " "])
@pytest.mark.parametrize(
    "find", [Boxed(), LastNumber(), OptionLetter(), AnswerPhrase()], ids=lambda find: repr(find)[:6]
)
def test_hostile_text_takes_no_longer(find, piece):
    begin = time.process_time()
    find(piece * 20_000)
    assert time.process_time() - begin < 60


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("... #### 1,000", "work\n#### 1000", 1.0),
        (r"thus \boxed{\frac12}", "0.5", 1.0),
        ("it is 7 apples", 8, 0.0),
        ("I do not know", "3", 0.0),
        ("it is 5", None, None),
        ("#### 18 dollars", "18", 1.0),
        ("#### The total is $18.", "18", 1.0),
        ("#### 18x", "18", 0.0),
        (r"\boxed{5 \text{ cm}}", "5", 1.0),
        (r"\boxed{90^\circ}", "90", 1.0),
        ("the profit is $70,000.", "70000", 1.0),
        ("the profit is $70,000.", "0", 0.0),
        ("3/4", "4", 0.0),
        ("10^3", "3", 0.0),
        ("50%", "0.5", 1.0),
        (r"so $\frac{3}{4}$", "4", 0.0),
        ("The correct answer is B.", "B", 1.0),
        ("The correct answer is B.", "(C)", 0.0),
        (r"\boxed{\text{(B) } 5}", "B", 1.0),
        (r"The answer is $x + 1$.", "1 + x", 1.0),
    ],
)
def test_math_answer(completion, answer, reward):
    assert MathAnswer()(prompts=[""], completions=[completion], answer=[answer]) == [reward]


def test_math_answer_without_a_column_has_nothing_to_say():
    assert MathAnswer()(prompts=[""], completions=["x"]) == [None]


def test_exact_answer_ignores_only_outer_blanks():
    rewards = ExactAnswer()(prompts=[""] * 3, completions=[" 51413\n", "5 1413", ""], answer=["51413", "51413", ""])
    assert rewards == [1.0, 0.0, 1.0]
