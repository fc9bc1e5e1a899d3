"""Questions about Python's functions: true by Python's own account, and held out as they say."""

import inspect
import sys

import pytest

from lightning_lm.data import DocumentedFunctions
from lightning_lm.errors import ConfigurationError, DataError


def asked(**settings):
    return list(DocumentedFunctions(**settings).records())


def test_cards_say_what_inspect_says():
    checked = 0
    for record in asked(questions={"card": 200}):
        name, arguments, summary = record["completion"].split("\n* ")
        module, _, function = name.rpartition(".")
        found = getattr(sys.modules.get(module), function, None)
        if not inspect.isfunction(found) or found.__module__ != module or hasattr(found, "__wrapped__"):
            continue
        parameters = inspect.signature(found).parameters.values()
        named = [one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
        assert arguments == f"arguments ({len(named)}): {', '.join(named) or 'none'}"
        assert summary == " ".join(inspect.getdoc(found).partition("\n\n")[0].split())
        assert summary.split()[0] in record["prompt"]
        checked += 1
    assert checked > 40


def test_modules_have_the_functions_and_only_the_wording_is_held_out():
    trained, held_out = asked(questions={"module": 40}), asked(questions={"module": 40}, held_out=True)
    assert (len(trained), len(held_out)) == (120, 40)
    assert {record["answer"] for record in trained} == {record["answer"] for record in held_out}
    assert not {record["prompt"] for record in trained} & {record["prompt"] for record in held_out}
    for record in held_out:
        _, name, _, module, _ = record["answer"].split("`")
        assert module not in sys.modules or hasattr(sys.modules[module], name)


@pytest.mark.parametrize("question", ["card", "brief"])
def test_functions_that_are_held_out_are_of_other_modules(question):
    sides = [asked(questions={question: 40}, held_out=held_out) for held_out in (False, True)]
    assert not {record["prompt"] for record in sides[0]} & {record["prompt"] for record in sides[1]}
    assert [len(side) for side in sides] == [40, 40]


def test_the_short_answer_is_preferred_to_one_that_begins_with_it():
    for record in asked(questions={"brief": 40}):
        assert record["completion"] == record["chosen"] == record["answer"]
        assert record["rejected"].startswith(record["chosen"] + "\n\n")
        assert len(record["rejected"]) > len(record["chosen"]) + 80


def test_the_seed_orders_and_does_not_choose():
    first, again, other = (asked(questions={"card": 30, "module": 5}, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert sorted(map(str, first)) == sorted(map(str, other))


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(ConfigurationError, match=r"with a number of at least 1, got card: 0, poem: 3\."):
        DocumentedFunctions(questions={"card": 0, "poem": 3})
    with pytest.raises(ConfigurationError, match="got none"):
        DocumentedFunctions(questions={})
    with pytest.raises(DataError, match=r"documents \d+ functions .* held out, not 9999; ask for fewer"):
        asked(questions={"card": 9999}, held_out=True)
