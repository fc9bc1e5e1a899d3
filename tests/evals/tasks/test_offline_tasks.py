import ast
import hashlib
import itertools

import pytest
from evals.tasks.small_data import Oracle, Uniform, score

from lightning_lm.data import StandardLibrary, hold_out
from lightning_lm.errors import ConfigurationError
from lightning_lm.evals.tasks import by_name


def test_docs_choice_has_four_descriptions_of_about_the_same_length_and_chance_of_a_quarter():
    task = by_name("docs_choice")
    items = task.items()
    assert len(items) > 50
    assert task.chance == pytest.approx(0.25)
    assert score(task, Uniform())["acc"] == pytest.approx(0.25)
    counts = [sum(item.gold == place for item in items) for place in range(4)]
    assert min(counts) > len(items) / 8
    longest = shortest = 0
    for item in items:
        lengths = [len(request.continuation) for request in item.requests]
        assert len({request.continuation for request in item.requests}) == 4
        longest += lengths[item.gold] == max(lengths)
        shortest += lengths[item.gold] == min(lengths)
    assert max(longest, shortest) < 0.45 * len(items)


def test_docs_tasks_ask_for_functions_that_training_on_the_library_leaves_out():
    train, validation = hold_out(StandardLibrary(), 0.05)
    held_out = "\n".join(validation.documents())
    trained = "\n".join(train.documents())
    for name in ("docs_choice", "docs_cloze"):
        items = by_name(name).items()
        assert items
        for item in items:
            prompt = item.requests[0].prompt.question
            assert prompt.startswith("def ")
            assert f"def {prompt[4:].partition('(')[0]}(" in held_out
    for item in by_name("docs_choice").items()[:40]:
        assert f'"""{item.requests[item.gold].continuation}' not in trained


def test_docs_cloze_asks_for_a_word_of_the_header():
    task = by_name("docs_cloze")
    for item in task.items():
        prompt, target = item.requests[0].prompt.question, item.gold
        assert target.lower() in prompt.partition('"""')[0].lower()
    assert task.items()[0].requests[0].continuation.startswith(" ")


def test_reverse_asks_for_numbers_that_no_recipe_trains_on():
    task = by_name("reverse")
    assert score(task, Oracle(lambda prompt: prompt[-2::-1]))["exact_match"] == 1
    assert score(task, Oracle(lambda prompt: prompt[:-1]))["exact_match"] == 0
    trained = {
        placed.record["prompt"] for placed in itertools.islice(by_name("reverse", split="train").records("train"), 200)
    }
    asked = [item.requests[0].prompt.text for item in task.items()]
    assert len(set(asked)) == len(asked) == 200
    assert trained.isdisjoint(asked)
    with pytest.raises(ConfigurationError, match="ask for fewer"):
        by_name("reverse", num_digits=2).items()


def test_arithmetic_is_right_and_the_same_everywhere():
    task = by_name("arithmetic")
    items = task.items()
    drawn = [[int(hashlib.sha256(f"{n}:{place}".encode()).hexdigest()[:8], 16) for place in (0, 1)] for n in range(30)]
    asked = {
        f"{left % 10 ** (1 + n % 3)} {'+-*'[n // 3 % 3]} {right % 10 ** (1 + n % 3)} ="
        for n, (left, right) in enumerate(drawn)
    }
    assert len(asked.intersection(item.requests[0].prompt.question for item in items)) >= 20  # a tenth is for examples
    assert len({item.subject for item in items}) == 9
    right = Oracle(
        lambda prompt: f" {eval(compile(ast.parse(prompt.rpartition(chr(10))[2][:-1], mode='eval'), '', 'eval'))}."
    )
    metrics = score(task, right)
    assert metrics["exact_match"] == 1
    for item in items:
        prompt = item.requests[0].prompt
        assert prompt.question not in [shot.question for shot in prompt.shots]
        assert all(eval(shot.question[:-1]) == int(shot.answer) for shot in prompt.shots)
