"""A road as YAML: what it means, and what is refused with its place."""

from pathlib import Path

import pytest

from lightning_lm.cli.evaluate import tasks_of
from lightning_lm.cli.road.plan import read_road
from lightning_lm.cli.road.progress import clock, time_left_s
from lightning_lm.errors import UsageError

OUTPUT = Path("out")


def written(tmp_path, text):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    return str(path)


def test_the_road_of_the_package_starts_each_training_from_the_one_before():
    road = read_road("road/offline")
    assert [stage.name for stage in road.stages] == ["curate", "tokenizer", "pretrain", "sft", "dpo", "grpo"]
    assert [stage.start for stage in road.stages] == [None, None, None, "pretrain", "sft", "dpo"]
    words = road.stage("dpo").command(OUTPUT)
    assert words[:3] == ["fit", "--config", "dpo/reverse"]
    assert words[words.index("--model.model.checkpoint") + 1] == "out/runs/sft"
    assert words[words.index("--trainer.logger.save_dir") + 1] == "out/runs"
    assert road.stage("dpo").command(OUTPUT, resume=True) == [*words, "--ckpt_path", "last"]
    assert "out/tokenizer" in road.stage("tokenizer").command(OUTPUT)


def test_a_road_may_shorten_another_and_leave_stages_out(tmp_path):
    text = "base: road/offline\nstages:\n  pretrain: {settings: {trainer.max_steps: 7}}\n  dpo: null\nscores: null\n"
    road = read_road(written(tmp_path, text))
    assert [stage.name for stage in road.stages] == ["curate", "tokenizer", "pretrain", "sft", "grpo"]
    assert road.stage("grpo").start == "sft"
    assert road.stage("pretrain").settings["trainer.max_steps"] == 7
    assert road.stage("pretrain").settings["data.tokenizer"] == "LoadTokenizer"
    assert road.scores == ()


def test_a_config_beside_the_road_is_found_from_everywhere(tmp_path):
    (tmp_path / "own.yaml").write_text("trainer: {max_steps: 1}\n")
    road = read_road(written(tmp_path, "stages: {one: {config: own.yaml}, two: {config: own.yaml, from: null}}"))
    assert road.stage("one").config == str(tmp_path / "own.yaml")
    assert road.stage("two").start is None


def test_a_digest_follows_the_command_and_the_file(tmp_path):
    (tmp_path / "own.yaml").write_text("trainer: {max_steps: 1}\n")
    path = written(tmp_path, "stages: {one: {config: own.yaml}}")
    first = read_road(path).stage("one").digest()
    assert read_road(path).stage("one").digest() == first
    assert read_road(path).changed(["one.trainer.max_steps=2"]).stage("one").digest() != first
    (tmp_path / "own.yaml").write_text("trainer: {max_steps: 2}\n")
    assert read_road(path).stage("one").digest() != first


@pytest.mark.parametrize("option", ["--config {}", "--config={}"])
def test_a_digest_follows_the_file_that_another_verb_reads(tmp_path, option):
    config = tmp_path / "steps.yaml"
    config.write_text("steps: [MaskPII]\n")
    path = written(tmp_path, f"stages: {{one: {{command: curate {option.format(config)} --output out}}}}")
    first = read_road(path).stage("one").digest()
    config.write_text("steps: [NearDuplicates]\n")
    assert read_road(path).stage("one").digest() != first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "stages: {a: {confg: x}}",
            r"Unknown key 'confg' in the stage 'a'. Did you mean 'config'\?\n  Written in .*my",
        ),
        ("stagse: {}", r"Unknown key 'stagse' in a road. Did you mean 'stages'\?"),
        ("title: x", "has no stages.*base: road/offline"),
        ("stages: [a]", "stages: in .*line 1 must hold a name"),
        ("stages: {a: {}}", "'a' in .*line 1 needs either config:.*or command:"),
        ("stages: {a: {config: x, command: y}}", "needs either config:"),
        ("stages: {a: 3}", "stages.a in .* must hold keys such as config:, got 3"),
        ("stages: {../a: {config: x}}", "name '../a' .* also that of files"),
        ("stages: {a: {config: 3}}", "config: in .* must be a text, got 3"),
        ("stages: {a: {command: 'x \"y'}}", "cannot be split into words: No closing quotation"),
        ("stages: {a: {command: lightning-lm road}}", "must be a verb and its options"),
        ("stages: {a: {command: x, settings: {b: 1}}}", "has settings:, which belong to config:"),
        ("stages: {a: {config: x, settings: [1]}}", "settings: of 'a' in .* must hold options of fit"),
        ("stages: {a: {config: x, expected_s: -1}}", "expected_s of the stage 'a' in .* must be seconds, got -1"),
        ("stages: {pre: {config: x}, b: {config: x, from: per}}", "'b' starts from 'per'.* Did you mean 'pre'"),
        ("stages: {a: {command: x}, b: {config: x, from: a}}", "'b' starts from 'a', which is no stage of training"),
        ("stages: {a: {config: x}}\nscores: {s: {config: x}}", "'s' in .*line 2 needs config:, a recipe, and metrics:"),
        (
            "stages: {a: {config: x}}\nscores: {s: {command: evaluate --tasks x}}",
            "'s' in .*line 2 needs config:, a recipe",
        ),
        (
            "stages: {a: {config: x}}\nscores: {s: {command: validate, metrics: [a]}}",
            "command: of the score 's' in .*line 2 must be evaluate --tasks A,B",
        ),
        (
            "stages: {a: {config: x}}\nscores: {s: {command: evaluate, metrics: [a], settings: {b: 1}}}",
            "command: of the score 's' in .*line 2 must be evaluate --tasks A,B and its options, without settings:",
        ),
        ("stages: {a: {config: x}}\nprompts: [[1]]", "prompts: in .* must be a list of texts"),
        ("stages: {a: {config: x}}\nprompts: 3", "prompts: in .* must be a list of texts"),
        ("stages: {a: {config: x}}\ntemperature: hot", "temperature: in .* must be 0 or more, got 'hot'"),
    ],
)
def test_mistakes_in_a_road_are_refused_with_their_place(tmp_path, text, message):
    with pytest.raises(UsageError, match=f"(?s){message}"):
        read_road(written(tmp_path, text))


def test_stages_are_selected_by_name():
    road = read_road("road/offline")
    assert road.selected(None, None, []) == {"curate", "tokenizer", "pretrain", "sft", "dpo", "grpo"}
    assert road.selected("sft", "dpo", []) == {"sft", "dpo"}
    assert road.selected(None, "pretrain", []) == {"curate", "tokenizer", "pretrain"}
    assert road.selected(None, None, ["grpo"]) == {"grpo"}
    with pytest.raises(UsageError, match=r"No stage is called 'grop'. Did you mean 'grpo'\? The stages are: curate,"):
        road.selected("grop", None, [])
    with pytest.raises(UsageError, match="--from dpo comes after --until sft"):
        road.selected("dpo", "sft", [])
    with pytest.raises(UsageError, match="--only names the stages itself"):
        road.selected("sft", None, ["dpo"])


def test_options_change_settings_of_stages():
    road = read_road("road/offline").changed(["pretrain.trainer.max_steps=3", "dpo.model.loss.beta=0.3"])
    words = road.stage("pretrain").command(OUTPUT)
    assert words[words.index("--trainer.max_steps") + 1] == "3"
    assert words.count("--trainer.max_steps") == 1
    assert road.stage("dpo").command(OUTPUT)[-2:] == ["--model.loss.beta", "0.3"]
    with pytest.raises(UsageError, match="Did you mean 'pretrain'"):
        road.changed(["pretrian.trainer.max_steps=3"])
    with pytest.raises(UsageError, match=r"takes STAGE\.KEY=VALUE"):
        road.changed(["pretrain=3"])
    with pytest.raises(UsageError, match="'tokenizer' is no training"):
        road.changed(["tokenizer.vocab_size=3"])


def test_the_time_left_follows_the_speed_of_this_machine():
    """Two stages took 90 s instead of 30: this one needs 3 x 20 - 15, and the next 3 x 100."""
    assert time_left_s(15.0, 20.0, [(60.0, 20.0), (30.0, 10.0)], [100.0]) == pytest.approx(45 + 300)
    assert time_left_s(100.0, 20.0, [], [7.0]) == pytest.approx(5 * 7)  # the first has taken five times as long already
    assert time_left_s(100.0, 20.0, [(1.0, 20.0)], [7.0]) == pytest.approx(101 / 40 * 7)
    assert time_left_s(100.0, 0.0, [(80.0, 20.0)], [7.0]) == pytest.approx(4 * 7)  # has finished, is measured now
    assert (clock(59.9), clock(3723)) == ("0:59", "1:02:03")


def test_a_road_that_does_not_exist_names_those_that_do():
    with pytest.raises(
        UsageError, match=r"'raod/offline' is .* Did you mean 'road/offline'\? The roads are: road/offline,"
    ):
        read_road("raod/offline")


@pytest.mark.parametrize("name", ["road/offline", "road/small"])
def test_roads_report_the_main_metrics_of_the_tasks_that_they_ask(name):
    (score,) = (score for score in read_road(name).scores if score.config is None)
    tasks = tasks_of(score.words[score.words.index("--tasks") + 1], None, {})
    assert score.metrics == tuple(f"{task.name}/{task.main_metric}" for task in tasks)
