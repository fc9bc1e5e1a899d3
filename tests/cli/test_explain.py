"""jsonargparse's report becomes one block that starts with the mistake."""

from pathlib import Path

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from lightning_lm.cli.config.check import command_line_settings
from lightning_lm.cli.config.explain import explain
from lightning_lm.cli.config.overlays import Place, Setting


class Small:
    def __init__(self, size: int = 1, mode: bool | float | None = None) -> None: ...


class Large:
    def __init__(self, small: Small | None = None, needed: int = 1) -> None: ...


class Strict:
    def __init__(self, needed: int) -> None: ...


def report(words):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--large", type=Large | None)
    parser.add_argument("--strict", type=Strict | None)
    parser.add_argument("--number", type=int)
    with pytest.raises(ArgumentError) as caught:
        parser.parse_args(words)
    return explain(str(caught.value), [command_line_settings(words)])


def test_the_innermost_complaint_comes_first_with_its_key_and_place():
    text = report(["--large=Large", "--large.small=Small", "--large.small.size=abc"])
    assert text.splitlines() == ["large.small.size: needs int, got abc", "  Written in the command line."]


def test_alternatives_of_the_innermost_key_are_listed():
    assert report(["--large=Large", "--large.small=Small", "--large.small.mode=abc"]).startswith(
        "large.small.mode: needs bool or float"
    )


def test_a_plain_option():
    assert report(["--number=x"]).startswith("number: needs int, got x")


def test_a_missing_argument():
    assert report(["--strict=Strict"]).startswith("strict: missing: needed")


def test_an_unknown_option_of_an_open_class():
    message = "Parser key \"a\":\n  Problem with given class_path 'x.A':\n    Option 'b' is not accepted"
    layers = [Setting({"a": Setting({"b": Setting(1, Place(Path("f.yaml"), 7))}, Place(Path("f.yaml"), 5))})]
    assert explain(message, layers).splitlines() == ["a.b: there is no such key", "  Written in f.yaml, line 7."]


def test_the_last_layer_that_wrote_the_key_is_blamed():
    layers = [Setting({"a": Setting(1, Place(Path(f"{name}.yaml"), 1))}) for name in ("first", "second")]
    text = explain("Parser key \"a\":\n  Expected a <class 'int'>. Got value: x", [*layers, Setting({})])
    assert "second.yaml, line 1" in text


def test_what_is_not_understood_is_kept():
    assert explain("unrecognized arguments: extra", []) == "unrecognized arguments: extra"
