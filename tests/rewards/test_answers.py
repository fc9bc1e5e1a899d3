"""Answers of many spellings, right and wrong ones, and text that tries to be code."""

import pytest

from lightning_lm.errors import DataError
from lightning_lm.rewards import AfterHashes, Boxed, ExactAnswer, LastNumber, MathAnswer, same_answer
from lightning_lm.rewards.expressions import parse_expression, same_value


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("1,234.50", "1234.5"),
        ("$1,000", "1000"),
        ("50%", "0.5"),
        (r"50\%", r"\frac{1}{2}"),
        ("-.5", "-1/2"),
        (r"\frac{3}{4}", "0.75"),
        (r"\dfrac34", "0.75"),
        (r"\frac{\sqrt{8}}{2}", "2^{1/2}"),
        (r"\sqrt[3]{27}", "3"),
        ("x^2 + 2x + 1", "(x+1)^2"),
        (r"\sin(x)\sin(x) + \cos(x)\cos(x)", "1"),
        (r"2\pi r", r"r\cdot 2\pi"),
        ("(1, 2)", r"\left(1, \frac{4}{2}\right)"),
        ("1, 2", "1,2"),
        ("x = 5", "5"),
        (r"5 \text{ cm}", "5 cm"),
        ("4!", "24"),
        ("2**10", "1024"),
        (r"\exp(0)", "1"),
    ],
)
def test_same_value_however_written(given: str, right: str) -> None:
    assert same_answer(given, right)
    assert same_answer(right, given)


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("1", "2"),
        ("", ""),
        ("", "0"),
        ("1,2", "2,1"),
        ("(1,2)", "[1,2]"),
        ("x", "y"),
        ("0.333", "1/3"),
        ("12", "1,2"),
        ("1/0", "1"),
        ("[1,2", "[1,3"),
    ],
)
def test_different_answers_differ(given: str, right: str) -> None:
    assert not same_answer(given, right)


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
def test_what_is_not_an_expression_is_refused_and_never_run(text: str) -> None:
    with pytest.raises(DataError):
        parse_expression(text)
    assert same_value(text, "1") is False


def test_extractors_find_the_final_answer() -> None:
    assert AfterHashes()("So 3 + 4 = 7.\n#### 7\n") == "7"
    assert AfterHashes()("no answer") is None
    assert Boxed()(r"First \boxed{1}, then \boxed{\frac{a}{\sqrt{b}}}.") == r"\frac{a}{\sqrt{b}}"
    assert Boxed()(r"\boxed{1} and \boxed{unfinished") == "1"
    assert Boxed()("nothing") is None
    assert LastNumber()("from 3 to -1,234.5 dollars.") == "-1,234.5"
    assert LastNumber()("none") is None


def test_math_answer_over_a_batch() -> None:
    reward = MathAnswer()
    completions = ["... #### 1,000", r"thus \boxed{\frac12}", "it is 7 apples", "I do not know", "it is 5"]
    answers = ["work\n#### 1000", "0.5", 8, "3", None]
    assert reward(prompts=[""] * 5, completions=completions, answer=answers) == [1.0, 1.0, 0.0, 0.0, None]
    assert reward(prompts=[""], completions=["x"]) == [None]


def test_exact_answer_ignores_only_outer_blanks() -> None:
    rewards = ExactAnswer()(prompts=[""] * 3, completions=[" 51413\n", "5 1413", ""], answer=["51413", "51413", ""])
    assert rewards == [1.0, 0.0, 1.0]
