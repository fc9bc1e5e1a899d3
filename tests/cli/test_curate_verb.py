"""``lightning-lm curate``: recipes, options of steps, tables, lists, and mistakes."""

import json
import subprocess
import sys

import pytest
import yaml

from lightning_lm.cli import main

STEPS = """
steps:
  - Extract
  - class_path: GopherQuality
    init_args: {min_words: 5, min_stop_words: 0, max_word_length: null}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "steps.yaml").write_text(STEPS.replace(", min_stop_words: 0, max_word_length: null", ""))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "long.html").write_text("<p>" + "This is the text of a page with many words. " * 3)
    (tmp_path / "in" / "short.html").write_text("<p>Too \x1b[31mshort")
    (tmp_path / "in" / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return tmp_path


def curate(*words: str) -> int:
    return main(
        ["curate", "--config", "steps.yaml", "--input", "in", "--output", "clean", "--num-workers", "1", *words]
    )


def test_it_prints_the_table_step_by_step_and_where_the_report_is(place, capsys):
    assert curate() == 0
    printed = capsys.readouterr().out
    assert "GopherQuality" in printed
    assert "num_words 1" in printed
    assert "a PNG image (such as in/image.png)" in printed
    assert "1 of 2 documents" in printed
    assert (place / "clean" / "report.html").is_file()
    (line,) = (place / "clean" / "part-00000.jsonl").read_text().splitlines()
    assert json.loads(line)["url"] == "long.html"


def test_the_recipe_and_its_workers_run_without_torch(place):
    (place / "in" / "pages.jsonl").write_text('{"text": "<p>The first of the pages."}\n' * 3)
    words = ["curate", "--config", "curation/web", "--input", "in", "--output", "clean", "--num-workers", "2"]
    code = f"import sys; sys.modules['torch'] = None; from lightning_lm.cli import main; main({words})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == ""
    assert "5 documents" in done.stdout


def test_removed_and_unreadable_documents_are_listed(place, capsys):
    assert curate("--show", "removed") == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split("\t") == ["step", "rule", "value", "limit", "url or id", "text"]
    assert row.split("\t")[:5] == ["GopherQuality", "num_words", "2", "5", "short.html"]
    assert "\x1b" not in row
    assert curate("--show", "removed", "--rule", "mean_word_length") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert curate("--show", "unreadable") == 0
    assert "in/image.png" in capsys.readouterr().out
    assert curate("--show", "removed", "--step", "Gopher") == 2
    assert "The steps are: Extract, GopherQuality" in capsys.readouterr().err


def test_limits_of_steps_and_steps_are_set_on_the_command_line(place, capsys):
    (place / "own_steps.py").write_text("def drop(document):\n    return document\n")
    words = ["--steps.GopherQuality.min_words", "7", "--steps+=own_steps.drop", "--reading.field", "body"]
    assert curate(*words, "--print-config") == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["steps"][1]["init_args"] == {"min_words": 7}
    assert found["steps"][2] == "own_steps.drop"
    assert found["reading"] == {"field": "body"}
    assert curate(*words) == 0
    assert "drop" in capsys.readouterr().out


def test_the_text_of_a_stage_is_that_of_the_steps_until_it(place, capsys):
    assert curate("--until", "Extract") == 0
    assert "2 of 2 documents" in capsys.readouterr().out
    assert curate("--until", "Extrac", "--overwrite") == 2
    assert "--until Extrac: the steps are Extract, GopherQuality" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps.GopherQuality.min_word", "7"], "no argument 'min_word'. Did you mean 'min_words'"),
        (["--steps.GopherQuality.min_words", "many"], "min_words"),
        (["--steps.Gopher.min_words", "7"], "steps has no Gopher"),
        (["--steps+=Extrct"], "there is no step 'Extrct'. Did you mean Extract"),
        (["--steps+=nowhere.step"], "No module named 'nowhere'"),
        (["--step.x", "1"], "no setting 'step'. Did you mean 'steps'"),
        (["--reading.fields", "x"], "Reading has no argument 'fields'. Did you mean 'field'"),
    ],
)
def test_mistakes_are_named_with_the_remedy(words, message, place, capsys):
    assert curate(*words) == 2
    assert message in capsys.readouterr().err
    assert not (place / "clean").exists()


def test_missing_input_and_output_are_named(place, capsys):
    assert main(["curate", "--config", "steps.yaml"]) == 2
    assert "--input PATH is missing" in capsys.readouterr().err
    assert main(["curate", "--config", "steps.yaml", "--input", "nowhere", "--output", "clean"]) == 1
    assert "no file or folder 'nowhere'" in capsys.readouterr().err


def test_nothing_left_is_a_failure(place, capsys):
    assert curate("--steps.GopherQuality.min_words", "1000") == 1
    assert "No document is left" in capsys.readouterr().out
