"""Families that have no parts here run by transformers itself, from a folder named in a configuration to an export."""

import json

import pytest
import tokenizers
import torch
import transformers

from lightning_lm.cli import main
from lightning_lm.modules import CheckpointModel
from lightning_lm.modules.checkpoint import load_model

IDS = 101
SIZES = {
    "vocab_size": 104,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "gemma": transformers.GemmaConfig(head_dim=8, **SIZES),
    "phi3": transformers.Phi3Config(**SIZES),
    "olmo2": transformers.Olmo2Config(**SIZES),
    "smollm3": transformers.SmolLM3Config(no_rope_layers=[1, 0], **SIZES),
    "granite": transformers.GraniteConfig(logits_scaling=4.0, embedding_multiplier=2.0, **SIZES),
}
FIT = [
    "--data.batch_size",
    "4",
    "--trainer.max_steps",
    "1",
    "--trainer.logger",
    "false",
    "--trainer.accelerator",
    "cpu",
]


@pytest.fixture
def published(tmp_path):
    def publish(name):
        torch.manual_seed(0)
        folder = tmp_path / name
        transformers.AutoModelForCausalLM.from_config(FAMILIES[name]).save_pretrained(folder)
        letters = {token: number for number, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>"])}
        letters |= {chr(code): code - 28 for code in range(32, 127)}
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="<unk>"))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        inner.decoder = tokenizers.decoders.Fuse()
        special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
        inner.add_special_tokens(list(special.values()))
        transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
        return folder

    return publish


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("hello world, how are you? " * 40)
    records = ({"prompt": f"say {number}", "completion": str(number)} for number in range(40))
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, records)))
    return tmp_path


def fit(module, folder, data, start, *options):
    """Train for a step from a checkpoint or folder, by the command line, and return the checkpoint."""
    model = ["--model", module, "--model.model", "CheckpointModel", "--model.model.checkpoint", str(start)]
    where = ["--trainer.default_root_dir", str(folder), "--trainer.callbacks", "LastCheckpoint"]
    main(["fit", *model, "--data", data, *options, *FIT, *where])
    (checkpoint,) = folder.rglob("last.ckpt")
    return checkpoint


@pytest.mark.parametrize("name", FAMILIES)
def test_pretraining_tuning_generation_and_export(published, data, capsys, name):
    """The logits of the exported folder, opened by transformers, are those of the checkpoint; both stages train."""
    folder = published(name)
    ids = torch.randint(4, IDS, (2, 20), generator=torch.Generator().manual_seed(0))
    text = ["--data.train", str(data / "text.txt"), "--data.context_length", "32"]
    chats = ["--data.train", str(data / "chats.jsonl"), "--data.rows.context_length", "32"]
    pretrained = fit("PretrainModule", data / "pretrain", "TextDataModule", folder, *text)
    tuned = fit("SFTModule", data / "sft", "ChatDataModule", pretrained, *chats)
    capsys.readouterr()
    main(["generate", "--checkpoint", str(tuned), "--prompt", "say 1", "--max-new-tokens", "4", "--temperature", "0"])
    assert "say 1" in capsys.readouterr().out
    main(["export", "--checkpoint", str(tuned), "--output", str(data / "exported")])
    kind = transformers.AutoModelForCausalLM
    logits = []
    with torch.no_grad():
        for path in (folder, data / "exported"):
            theirs = kind.from_pretrained(path).eval()
            expected = type(kind.from_config(FAMILIES[name]))
            if (name, path.name) == ("phi3", "exported"):  # written as the plainest family of the same function
                expected = transformers.LlamaForCausalLM
            assert type(theirs) is expected
            torch.testing.assert_close(CheckpointModel(str(path)).build().eval()(ids), theirs(ids).logits)
            logits.append(theirs(ids).logits)
        torch.testing.assert_close(load_model(tuned)[0](ids), logits[1])
    assert (logits[0] - logits[1]).abs().max() > 1e-4
