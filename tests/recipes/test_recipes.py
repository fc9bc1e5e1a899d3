"""Every recipe parses, says the same after a round trip through --print_config, and trains two steps."""

from pathlib import Path

import pytest
import torch
import yaml

from lightning_lm.cli import main
from lightning_lm.cli.recipes import recipe_names

WORDS = ("the", "model", "reads", "a", "line", "and", "says", "what", "follows", "it")
SMALL = """
base: {recipe}
trainer: {{max_steps: 2, val_check_interval: 1, log_every_n_steps: 1, accelerator: cpu, precision: 32-true}}
model: {{model: {{d_model: 32, num_layers: 1, context_length: 32}}}}
data:
  train: {corpus}
  tokenizer: {{vocab_size: 280}}
  context_length: 32
  batch_size: 4
"""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        text = " ".join(WORDS[(number * step) % len(WORDS)] for step in range(1, 40))
        (folder / f"{number}.txt").write_text(text)
    return folder


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["fit", *words, "--print_config"])
    assert ended.value.code in (0, None)
    return capsys.readouterr().out


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_survives_print_config(recipe, tmp_path, capsys):
    first = printed(["--config", recipe], capsys)
    (tmp_path / "printed.yaml").write_text(first)
    again = printed(["--config", str(tmp_path / "printed.yaml")], capsys)
    assert again == first
    assert yaml.safe_load(first)["model"]["init_args"]["model"]["init_args"]["vocab_size"] is None


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_null_over_a_default_survives_print_config(recipe, tmp_path, capsys):
    words = ["--config", recipe, "--trainer.gradient_clip_val", "null", "--data.validation", "0"]
    first = printed(words, capsys)
    (tmp_path / "printed.yaml").write_text(first)
    assert yaml.safe_load(first)["trainer"]["gradient_clip_val"] is None
    assert printed(["--config", str(tmp_path / "printed.yaml")], capsys) == first


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_trains_two_steps(recipe, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(SMALL.format(recipe=recipe, corpus=corpus))
    assert main(["fit", "--config", "small.yaml"]) == 0
    (checkpoint,) = tmp_path.glob("runs/*/version_0/checkpoints/last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2
    assert (checkpoint.parents[1] / "config.yaml").is_file()
    assert "bits" in capsys.readouterr().out
