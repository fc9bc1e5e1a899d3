"""YAML layers: what stands below what, and on which line."""

import time

import pytest
import yaml

from lightning_lm.cli import main
from lightning_lm.cli.config.overlays import expand_configs, read_overlays
from lightning_lm.cli.config.yaml_text import read_value
from lightning_lm.errors import UsageError


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_a_file_comes_after_the_overlays_it_names(tmp_path):
    write(tmp_path, one="a: 1\n", two="base: one\nb: 2\n", three="base: [one, two.yaml]\nc: 3\n")
    paths = [overlay.path.name for overlay in read_overlays(str(tmp_path / "three.yaml"))]
    assert paths == ["one.yaml", "one.yaml", "two.yaml", "three.yaml"]


def test_a_base_may_be_a_recipe_of_the_package(tmp_path):
    write(tmp_path, mine="base: pretrain/quickstart\ntrainer: {max_steps: 3}\n")
    names = [overlay.path.stem for overlay in read_overlays(str(tmp_path / "mine.yaml"))]
    assert names[-2:] == ["quickstart", "mine"]
    assert "trainer" in names


def test_the_text_has_every_value_and_no_base(tmp_path):
    content = "base: one\nx: {list: [1, 2.5, null, true, 'text', 1e-3], deep: {empty: {}, none: ~}}\n"
    write(tmp_path, one="{}\n", two=content)
    expected = yaml.safe_load(content)
    del expected["base"]
    assert yaml.safe_load(read_overlays(str(tmp_path / "two.yaml"))[-1].to_yaml()) == expected


def test_every_key_knows_its_line(tmp_path):
    write(tmp_path, one="# a comment\na: 1\nb:\n  c: 2\n\n  d: [x,\n      y]\n")
    root = read_overlays(str(tmp_path / "one.yaml"))[0].root
    assert root.value["a"].place.line == 2
    assert root.value["b"].value["c"].place.line == 4
    assert root.value["b"].value["d"].value[1].place.line == 7


def test_merge_keys_of_yaml_work(tmp_path):
    write(tmp_path, one="a: &shared {x: 1, y: 2}\nb: {<<: *shared, y: 3}\n")
    text = read_overlays(str(tmp_path / "one.yaml"))[0].to_yaml()
    assert yaml.safe_load(text)["b"] == {"x": 1, "y": 3}


def test_the_command_line_keeps_its_order(tmp_path):
    write(tmp_path, one="a: 1\n", two="a: 2\n")
    one, two = (str(tmp_path / f"{name}.yaml") for name in ("one", "two"))
    words, overlays = expand_configs(["--x=1", "--config", one, "--y", "2", f"-c={two}", "--z", "3"])
    assert words == ["--x=1", "--config=a: 1\n", "--y", "2", "--config=a: 2\n", "--z", "3"]
    assert [overlay.path.stem for overlay in overlays] == ["one", "two"]


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n"])
def test_an_empty_file_is_an_empty_overlay(tmp_path, text):
    write(tmp_path, one=text)
    assert yaml.safe_load(read_overlays(str(tmp_path / "one.yaml"))[0].to_yaml()) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "is not YAML"),
        ("- a\n- b\n", "top level"),
        ("just words\n", "top level"),
        ("a: 1\nbase: x\n", "'x'"),
    ],
)
def test_what_cannot_be_read_says_so(tmp_path, text, message):
    write(tmp_path, one=text)
    with pytest.raises(UsageError, match=message):
        read_overlays(str(tmp_path / "one.yaml"))


BOMB = "a0: &a0 [lol]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "aliases of .* stand for [0-9,]+ settings"),
        (MERGES, "aliases of .* stand for "),
        ("a: 1\nb: &b [*b]\n", "line 2 of .* contains itself"),
        ("a: &a {b: {c: *a}}\n", "line 1 of .* contains itself"),
        ("a: &a {<<: *a}\n", "contains itself"),
        ("a: " + "[" * 50_000, "nested too deeply"),
        ("a: " + "{b: " * 3_000 + "1" + "}" * 3_000, "nested too deeply"),
        ("a: 1\nb: " + "7" * 6_000, "line 2 of .* is no value"),
        ("a: 0x" + "f" * 6_000, "line 1 of .* is no value"),
        ("a: 2026-13-45", "'2026-13-45' in line 1"),
        ("a: !!bool perhaps", "'perhaps' in line 1"),
        ("a: !!timestamp soon", "'soon' in line 1"),
        ("? [a, b]\n: 1\n", "A key in line 1"),
        ("a: " + "[" * 200 + "]" * 200, "nested too deeply"),
        ("base: 5\n", "`base:` in .*, line 1 must be"),
        ("base: {a: 1}\n", "`base:` in .*, line 1 must be"),
        ("base: [a, [b]]\n", "`base:` in .*, line 1 must be"),
    ],
)
def test_hostile_text_is_refused_at_once(tmp_path, text, message):
    write(tmp_path, one=text)
    began_s = time.process_time()
    with pytest.raises(UsageError, match=message):
        read_overlays(str(tmp_path / "one.yaml"))
    assert time.process_time() - began_s < 60


ONE_LINE_BOMB = "{" + BOMB.strip().replace("\n", ", ") + "}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ONE_LINE_BOMB, "aliases of .*--model.* stand for [0-9,]+ settings"),
        (BOMB, "aliases of .*--model.* stand for "),
        ("&a [*a]", "line 1 of .*--model.* contains itself"),
        ("&a {class_path: *a}", "contains itself"),
        ("[" * 50_000, "--model.* nested too deeply"),
        ("{a: " * 3_000, "nested too deeply"),
        ("7" * 6_000, "is no value"),
        ("{a: [0x" + "f" * 6_000 + "]}", "is no value"),
        ("!!bool perhaps", "'perhaps' in line 1 of .*--model"),
        ("!!timestamp soon", "'soon' in line 1"),
        (f"{{a: '{ONE_LINE_BOMB}'}}", "aliases of "),
        ("{class_path: '" + "[" * 3_000 + "'}", "nested too deeply"),
        ("bomb.yaml", r"aliases of bomb\.yaml stand for "),
        ("names_it.yaml", r"aliases of bomb\.yaml stand for "),
        ("deep.json", "deep.json is nested too deeply"),
        ("large.yaml", "large.yaml has [0-9,]+ bytes"),
        ("{class_path: bomb.yaml}", r"aliases of bomb\.yaml"),
    ],
)
@pytest.mark.parametrize("words", ["--model={}", "--model {}", "--config=holder.yaml"])
def test_hostile_values_are_refused_at_once(tmp_path, monkeypatch, text, message, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, bomb=BOMB, names_it="a: bomb.yaml\nb: names_it.yaml", large="a: " + "x" * 2**22)
    (tmp_path / "deep.json").write_text("[" * 5_000)
    if "holder" in words:
        write(tmp_path, holder=yaml.safe_dump({"model": {"optimizer": text}}, width=10**6))
        message = message.replace("--model", "holder")
    began_s = time.process_time()
    with pytest.raises(UsageError, match=message) as error:
        expand_configs([word.format(text) if "{" in word else word for word in words.split(" ")])
    assert "\n" not in str(error.value)
    assert time.process_time() - began_s < 60


@pytest.mark.parametrize(
    "text",
    [
        "[INST] {name} & co *",
        "def f(x): {",
        "2026-13-45",
        "[1, [2, {a: 3}]]",
        "*",
        "nothing.yaml",
        "*.json",
        "1e-3",
        "@",
    ],
)
def test_ordinary_values_are_left_as_they_are(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    assert expand_configs(["--data.train", text])[0] == ["--data.train", text]
    write(tmp_path, holder=yaml.safe_dump({"data": {"train": text}}))
    assert yaml.safe_load(expand_configs(["--config=holder.yaml"])[1][0].to_yaml()) == {"data": {"train": text}}


def test_dates_are_text_in_values():
    assert read_value("{folder: 2026-13-45, other: 2026-01-02}") == {"folder": "2026-13-45", "other": "2026-01-02"}


def test_aliases_of_ordinary_settings_are_read(tmp_path):
    write(tmp_path, one="a: &a [1, 2]\nb: [*a, *a]\nc: {d: *a}\n")
    text = read_overlays(str(tmp_path / "one.yaml"))[0].to_yaml()
    assert yaml.safe_load(text) == {"a": [1, 2], "b": [[1, 2], [1, 2]], "c": {"d": [1, 2]}}


def test_circles_are_refused(tmp_path):
    write(tmp_path, one="base: two\n", two="base: one\n")
    with pytest.raises(UsageError, match=r"one\.yaml -> .*two\.yaml -> .*one\.yaml"):
        read_overlays(str(tmp_path / "one.yaml"))


def test_a_missing_file_lists_the_recipes():
    with pytest.raises(UsageError, match="pretrain/quickstart"):
        expand_configs(["--config", "nothing.yaml"])
    with pytest.raises(UsageError, match="neither a file nor a recipe"):
        expand_configs(["--config"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer:\n\tmax_steps: 5\n", r"line 2, column 1. Indent with spaces, not tabs."),
        ("trainer:\n  max_steps: 5\n   devices: 1\n", r"mapping values are not allowed here.\n.*line 3"),
        ("trainer: {max_steps: 5}\nmodel: {}\ntrainer: {}\n", r"Key 'trainer' stands twice, in lines 1 and 3 of"),
        ("trainer: {max_steps: 5, max_steps: 6}\n", r"Key 'max_steps' stands twice, in lines 1 and 1 of"),
    ],
)
def test_mistakes_of_yaml_have_a_line_and_a_remedy(tmp_path, text, message):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        read_overlays(str(tmp_path / "wrong.yaml"))
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["fit", "--config", "road/offline"], "road --config"),
        (["fit", "--config", "curation/web"], "curate --config"),
        (["fit", "--config", "evaluate/offline"], "evaluate --checkpoint PATH --tasks"),
        (["curate", "--config", "sft/reverse"], "fit --config"),
        (["curate", "--config", "road/small"], "road --config"),
        (["road", "--config", "curation/web"], "curate --config"),
        (["road", "--config", "sft/reverse"], "fit --config"),
    ],
)
def test_a_file_for_another_command_names_it(words, command, capsys):
    assert main(words) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"is for another command: lightning-lm {command} " in said
