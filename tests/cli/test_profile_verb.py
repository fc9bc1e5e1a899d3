"""`lightning-lm profile`: the table and the trace of a recipe, and nothing else left behind."""

import logging

from lightning_lm.cli import main

TINY = """
base: base/trainer
trainer:
  max_steps: 1000
  accelerator: cpu
  callbacks+: [KernelSwap, {class_path: Profile, init_args: {warmup: 1, steps: 2, folder: times}}]
model:
  model:
    class_path: TransformerConfig
    init_args: {d_model: 16, num_layers: 1, layers: {mixer: {num_heads: 2}}}
data: {train: corpus, tokenizer: Bytes, context_length: 16, batch_size: 2}
"""


def test_a_recipe_is_measured_and_leaves_only_its_trace(tmp_path, monkeypatch, caplog):
    (tmp_path / "corpus").mkdir()
    for number in range(20):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"document {number}: " + "abc def " * number)
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # Lightning's handler holds the stderr of an earlier test
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        assert main(["profile", "--config", "tiny.yaml"]) == 0
    texts = "\n".join(caplog.messages)
    assert "Kernels exchanged; they run in torch" in texts
    assert "Profile of 2 batches after 1, on cpu" in texts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "times", "tiny.yaml"]
