"""Reward models as folders: written and read; the oracle is the sequence classifier of transformers."""

import dataclasses
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from lightning.pytorch import Trainer

from lightning_lm.callbacks import Adapters, LoRA
from lightning_lm.cli import main
from lightning_lm.data import PairRows
from lightning_lm.datamodules import PreferenceDataModule
from lightning_lm.errors import CheckpointError, ConfigurationError
from lightning_lm.models import Attention, Layer, TransformerConfig, TransformersModel, gpt2
from lightning_lm.modules import (
    CheckpointModel,
    Critic,
    LearnedReward,
    PPOModule,
    RewardCheckpoint,
    RewardModel,
    RewardModule,
    load_reward_model,
)
from lightning_lm.modules.reward_folder import export_reward_model
from lightning_lm.optim import AdamW, Constant
from lightning_lm.tokenizers import CharacterTokenizer

CONFIG = TransformerConfig(
    vocab_size=31, d_model=16, num_layers=2, layers=Layer(mixer=Attention(num_heads=2)), context_length=64
)
SIZES = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
MAKERS = {
    "llama": CONFIG.build,
    "tied": dataclasses.replace(CONFIG, tie_embeddings=True).build,
    "gpt2": dataclasses.replace(gpt2(), vocab_size=31, d_model=48, num_layers=1, context_length=64).build,
    "gemma": lambda: TransformersModel(transformers.GemmaForCausalLM(transformers.GemmaConfig(**SIZES))),
}
IDS = torch.randint(3, 31, (3, 9), generator=torch.Generator().manual_seed(1))
LENGTHS = torch.tensor([9, 4, 1])


def export(model: RewardModel, folder: Path) -> None:
    export_reward_model(model.backbone, model.score, folder)


@pytest.mark.parametrize("kind", MAKERS)
def test_transformers_gives_the_same_scores(tmp_path, kind):
    torch.manual_seed(0)
    model = RewardModel(MAKERS[kind]()).eval()
    export(model, tmp_path / "out")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__.endswith("ForSequenceClassification")
    assert theirs.config.num_labels == 1
    read, tokenizer = load_reward_model(tmp_path / "out")
    assert tokenizer is None
    with torch.no_grad():
        expected = torch.cat([theirs(row[None, :n]).logits[0] for row, n in zip(IDS, LENGTHS, strict=True)])
        torch.testing.assert_close(model(IDS, LENGTHS), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(read(IDS, LENGTHS), expected, rtol=1e-4, atol=1e-5)


def test_other_folders_are_refused(tmp_path):
    config = transformers.LlamaConfig(**SIZES, num_labels=3)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "three")
    with pytest.raises(CheckpointError, match="with 3 labels"):
        load_reward_model(tmp_path / "three")
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "causal")
    with pytest.raises(CheckpointError, match="holds LlamaForCausalLM"):
        load_reward_model(tmp_path / "causal")
    granite = transformers.GraniteForCausalLM(transformers.GraniteConfig(**SIZES))
    with pytest.raises(ConfigurationError, match="no GraniteForSequenceClassification"):
        export(RewardModel(TransformersModel(granite)), tmp_path / "granite")


@pytest.mark.parametrize("lora", [False, True])
def test_a_trained_reward_model_is_exported_and_scores_completions(tmp_path, lora):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, max_position_embeddings=64, pad_token_id=None, eos_token_id=1)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *"abcdefghijklmnopqrstuvwxyz \n"])}
    definition = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="a"))
    definition.add_special_tokens(["<s>", "</s>", "<pad>"])
    named = {"eos_token": "</s>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=definition, **named).save_pretrained(tmp_path / "base")
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "max_epochs": -1}
    quiet |= {"enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
    callbacks = [LoRA(Adapters(rank=2))] if lora else []
    trainer = Trainer(**quiet, callbacks=callbacks, max_steps=2, limit_val_batches=0)
    pairs = [{"prompt": "abc", "chosen": "cba", "rejected": "abc"}] * 8
    module = RewardModule(CheckpointModel(checkpoint=str(tmp_path / "base")))
    trainer.fit(module, datamodule=PreferenceDataModule(pairs, 0, rows=PairRows(max_length=32), batch_size=2))
    assert module.model.score.weight.requires_grad
    trainer.save_checkpoint(tmp_path / "reward.ckpt")
    words = ["--checkpoint", str(tmp_path / "reward.ckpt"), "--output", str(tmp_path / "out")]
    assert main(["export", *words]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        ids = torch.tensor([[*tokenizer.encode(text), 1] for text in ("abccba", "abcabc")])
        expected = (
            theirs(ids).logits[:, 0]
            if theirs.config.pad_token_id is not None
            else torch.cat([theirs(row[None]).logits[0] for row in ids])
        )
    asked = {"prompts": ["abc", "abc"], "completions": ["cba", "abc"]}
    for checkpoint in ("reward.ckpt", "out"):
        found = LearnedReward(checkpoint=str(tmp_path / checkpoint))(**asked)
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-5)


QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "max_epochs": -1}
QUIET |= {"enable_model_summary": False, "enable_checkpointing": False, "limit_val_batches": 0}
PAIRS = [{"prompt": "abc", "chosen": "cba", "rejected": "abc"}] * 8
LETTERS = CharacterTokenizer("abc")


def rewarding(start, folder, steps=2):
    """Train a reward model for some steps and save it."""
    trainer = Trainer(**QUIET, default_root_dir=folder, max_steps=steps)
    module = RewardModule(start, optimizer=AdamW(lr=1e-2), schedule=Constant())
    rows = PairRows(max_length=32)
    trainer.fit(module, datamodule=PreferenceDataModule(PAIRS, tokenizer=LETTERS, rows=rows, batch_size=2))
    trainer.save_checkpoint(folder / "reward.ckpt")
    return module


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_a_reward_model_is_trained_further_and_a_critic_starts_from_it(tmp_path, kind):
    """Oracle: the scores of transformers. A folder, then the checkpoint of the run from it, then its export again."""
    torch.manual_seed(0)
    export(RewardModel(MAKERS[kind]()), tmp_path / "out")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    start = RewardCheckpoint(str(tmp_path / "out"))
    with torch.no_grad():
        expected = torch.cat([theirs(row[None, :n]).logits[0] for row, n in zip(IDS, LENGTHS, strict=True)])
        torch.testing.assert_close(start.build().eval()(IDS, LENGTHS), expected, rtol=1e-4, atol=1e-5)
    first = rewarding(start, tmp_path)
    first.model.eval()
    again = RewardCheckpoint(str(tmp_path / "reward.ckpt"))
    with torch.no_grad():
        scores = first.model(IDS, LENGTHS)
        assert (scores - expected).abs().max() > 1e-3
        torch.testing.assert_close(again.build().eval()(IDS, LENGTHS), scores)
        export(first.model, tmp_path / "next")
        torch.testing.assert_close(
            RewardCheckpoint(str(tmp_path / "next")).build().eval()(IDS, LENGTHS), scores, rtol=1e-4, atol=1e-5
        )
    module = PPOModule(MAKERS[kind](), rewards=[len], critic=Critic(model=again))
    module.configure_model()
    critic = module.critic.body.state_dict()
    for name, value in first.model.backbone.state_dict().items():
        assert torch.equal(critic[name], value), name
    assert not module.critic.body.head.weight.requires_grad or kind != "llama"
    assert module.critic.value.weight.abs().max() == 0


def test_a_reward_model_is_no_language_model(tmp_path):
    """transformers would give it a new output layer, drawn at random."""
    for name in ("llama", "gemma"):
        export(RewardModel(MAKERS[name]()), tmp_path / name)
        with pytest.raises(CheckpointError, match=r"SequenceClassification, not a language model.*RewardCheckpoint"):
            CheckpointModel(str(tmp_path / name)).build()
    rewarding(CONFIG, tmp_path)
    with pytest.raises(CheckpointError, match=r"not a language model.*RewardCheckpoint"):
        CheckpointModel(str(tmp_path / "reward.ckpt")).build()
    with pytest.raises(ConfigurationError, match=r"has 99 ids and the model in .* has 31"):
        RewardCheckpoint(str(tmp_path / "reward.ckpt")).build(99)
    headless = transformers.GemmaModel(transformers.GemmaConfig(**SIZES, tie_word_embeddings=False))
    headless.save_pretrained(tmp_path / "headless")
    with pytest.raises(CheckpointError, match=r"no weights for lm_head\.weight"):
        CheckpointModel(str(tmp_path / "headless")).build()
