"""Every recipe parses, says the same after a round trip through --print_config, and trains two steps."""

import json
from pathlib import Path

import gym_library  # noqa: F401 - finds Reasoning Gym, or a stand-in
import pytest
import torch
import yaml

from lightning_lm.cli import main
from lightning_lm.cli.recipes import find_recipe, recipe_names
from lightning_lm.models import TransformerConfig, save_huggingface
from lightning_lm.tokenizers import BPETokenizer, PretrainedTokenizer

WORDS = ("the", "model", "reads", "a", "line", "and", "says", "what", "follows", "it")
TRAINED = [name for name in recipe_names() if "\nsteps:" not in find_recipe(name).read_text()]
"""Recipes of ``fit``; those with steps are pipelines of ``curate``."""
CURATED = sorted(set(recipe_names()).difference(TRAINED))
PARTS_OF_TEXT = ("pretrain/quickstart_encoder", "pretrain/quickstart_seq2seq")
"""Recipes that predict some of the tokens, so that no bits per byte of a text follow."""
SMALL = Path(__file__).parent / "small"
"""Overlays that make recipes small enough to run here, for a folder or a recipe; they find what `materials` makes."""
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, conversations, problems in the form of GSM8K, and a model of Hugging Face."""
    folder = tmp_path_factory.mktemp("materials")
    (folder / "corpus").mkdir()
    texts = [" ".join(WORDS[(number * step) % len(WORDS)] for step in range(1, 40)) for number in range(40)]
    for number, text in enumerate(texts):
        (folder / "corpus" / f"{number}.txt").write_text(text)
    said = [[{"role": "user", "content": text[:20]}, {"role": "assistant", "content": text[:9]}] for text in texts]
    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"messages": turns}) for turns in said))
    problems = [
        {"question": f"{name} has {a} apples and buys {b}. How many?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"}
        for name in ("Ann", "Bo")
        for a, b in ((1, 2), (20, 1000), (7, 5), (3, 9))
    ]
    for name, part in (("train", problems[:6]), ("test", problems[6:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    trained = BPETokenizer.train(texts, 300, special_tokens=special, show_progress=False)
    config = json.dumps({"eos_token": "<|im_end|>", "chat_template": TEMPLATE})
    tokenizer = PretrainedTokenizer(trained.to_files()["tokenizer.json"], config=config)
    model = TransformerConfig(vocab_size=tokenizer.vocab_size, d_model=32, num_layers=1, context_length=128).build()
    save_huggingface(model, folder / "hf-model", tokenizer)
    return folder


@pytest.fixture
def workplace(materials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder that sees the materials."""
    for entry in materials.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["fit", *words, "--print_config"])
    assert ended.value.code in (0, None)
    return capsys.readouterr().out


@pytest.mark.parametrize("recipe", TRAINED)
def test_a_recipe_survives_print_config(recipe, tmp_path, capsys):
    first = printed(["--config", recipe], capsys)
    (tmp_path / "printed.yaml").write_text(first)
    again = printed(["--config", str(tmp_path / "printed.yaml")], capsys)
    assert again == first


@pytest.mark.parametrize("recipe", TRAINED)
def test_a_null_over_a_default_survives_print_config(recipe, tmp_path, capsys):
    words = ["--config", recipe, "--trainer.gradient_clip_val", "null", "--data.validation", "0"]
    first = printed(words, capsys)
    (tmp_path / "printed.yaml").write_text(first)
    assert yaml.safe_load(first)["trainer"]["gradient_clip_val"] is None
    assert printed(["--config", str(tmp_path / "printed.yaml")], capsys) == first


def small_overlay(recipe: str) -> Path:
    """Return the overlay of a recipe, or of its folder."""
    found = [SMALL / f"{name}.yaml" for name in (recipe, recipe.split("/")[0]) if (SMALL / f"{name}.yaml").is_file()]
    assert found, f"{recipe} needs {SMALL / recipe}.yaml, which makes it small enough to run here"
    return found[0]


@pytest.mark.parametrize("recipe", TRAINED)
def test_a_recipe_trains_two_steps(recipe, workplace, capsys):
    assert main(["fit", "--config", recipe, "--config", str(small_overlay(recipe))]) == 0
    (checkpoint,) = workplace.glob("runs/*/version_0/checkpoints/last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2
    assert (checkpoint.parents[1] / "config.yaml").is_file()
    counts_bytes = recipe.split("/")[0] == "pretrain" and recipe not in PARTS_OF_TEXT
    assert not counts_bytes or "bits" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", CURATED)
def test_a_recipe_curates_a_page(recipe, tmp_path, capsys):
    (tmp_path / "page.html").write_text(f"<html><main><p>{' '.join(WORDS * 12)}.</p></main></html>")
    words = ["--config", recipe, "--input", str(tmp_path / "page.html"), "--output", str(tmp_path / "clean")]
    assert main(["curate", *words, "--num-workers", "1"]) in (0, 1)
    assert "1 documents" in capsys.readouterr().out.replace("of 1", "1")
    assert main(["curate", "--config", recipe, "--print-config"]) == 0
    (tmp_path / "again.yaml").write_text(printed_once := capsys.readouterr().out)
    assert main(["curate", "--config", str(tmp_path / "again.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed_once
