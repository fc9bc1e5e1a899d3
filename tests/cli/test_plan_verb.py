"""``lightning-lm plan``, as a user types it."""

import json

import pytest

from lightning_lm.cli import main

LARGE = [
    *("--config", "pretrain/quickstart", "--model.model.vocab_size", "128256", "--model.model.d_model", "16384"),
    *("--model.model.num_layers", "16", "--model.model.layers.mixer.num_heads", "128"),
    *("--model.model.layers.mixer.num_kv_heads", "8", "--model.model.layers.ffn.hidden_size", "53248"),
    *("--model.optimizer", "AdamW", "--sequence-length", "8192", "--batch", "64"),
    *("--model.activation_checkpointing", "blocks", "--gpus", "64"),
]


def planned(capsys, *words):
    assert main(["plan", *words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    return record, {strategy["name"]: strategy for strategy in record["strategies"]}


def test_a_large_model_is_crossed_out_where_it_does_not_fit(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", *LARGE]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    text = "\n".join(lines)
    assert lines[0] == "PretrainModule of 55.2B parameters, in bf16-mixed"
    for name in ("ddp", "zero1", "zero2"):
        assert f"x {name}" in text
    assert "optimizer states alone" in text or "parameters alone" in text
    assert "Recommended: fsdp2 x tp4" in text
    assert "--trainer.devices 8 --trainer.num_nodes 8" in lines[-1]


def test_states_are_sixteen_bytes_a_parameter_over_the_ranks(capsys):
    record, found = planned(capsys, *LARGE)
    parameters = 2 * 128_256 * 16_384 + 16 * (2 * 16_384**2 + 2 * 16_384 * 1024 + 3 * 16_384 * 53_248)
    memory = found["fsdp2"]["memory_bytes"]
    states = memory["parameters"] + memory["gradients"] + memory["optimizer_states"]
    assert states == pytest.approx(16 * parameters / 64, rel=0.001)
    assert found["ddp"]["memory_bytes"]["optimizer_states"] == pytest.approx(8 * parameters, rel=0.001)
    assert record["command"].startswith(found[record["recommended"]]["options"])


def test_a_preference_module_has_two_models_and_two_rows_a_pair(capsys, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    settings = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 32_000,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    words = ("--config", "dpo/reverse", "--model.model.checkpoint", str(folder), "--gpus", "2", "--batch", "8")
    _, found = planned(capsys, *words)
    memory = found["ddp"]["memory_bytes"]
    assert memory["parameters"] == 2 * memory["gradients"]
    assert found["ddp"]["micro_batch"] == 4
    _, adapted = planned(capsys, *words, "--trainer.callbacks+=LoRA")
    assert 0 < adapted["ddp"]["memory_bytes"]["gradients"] < 0.1 * memory["gradients"]
    settings |= {"model_type": "cohere", "architectures": ["CohereForCausalLM"], "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(settings))  # a family that only transformers has
    _, others = planned(capsys, *words)
    assert others["ddp"]["memory_bytes"]["parameters"] == 2 * others["ddp"]["memory_bytes"]["gradients"]
    assert "plan" in others["tp2"]["reason"]


def test_one_gpu_of_ones_own_and_a_measured_speed(capsys):
    own = ["--gpu", "Mine", "--memory-gib", "10", "--tflops", "100", "--memory-bandwidth", "1000", "--gpus", "1"]
    record, found = planned(capsys, "--config", "pretrain/quickstart", *own, "--link-bandwidth", "50", "--mfu", "0.4")
    assert record["gpu"]["name"] == "Mine"
    assert record["gpu"]["memory_bytes"] == 10 * 2**30
    assert found["one GPU"]["communication"] == []
    assert found["one GPU"]["time"]["mfu"] == pytest.approx(0.4, rel=0.1)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--config", "pretrain/quickstart", "--gpu", "h1000"], "No GPU is called 'h1000'"),
        (["--config", "pretrain/quickstart", "--gpus", "12", "--nodes", "5"], "that fit together"),
        (["--config", "grpo/reverse", "--model.model", "TransformerConfig"], "d_model"),
        (["--config", "ppo/reverse"], "not PPOModule"),
    ],
)
def test_mistakes_are_named(words, expected, capsys):
    assert main(["plan", *words]) in (1, 2)
    assert expected in capsys.readouterr().err


def test_help_names_the_options(capsys):
    assert main(["plan", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--sequence-length" in text
    assert max(map(len, text.splitlines())) <= 80
