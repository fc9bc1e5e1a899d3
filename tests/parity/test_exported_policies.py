"""From a folder of transformers to a trained policy and back, by the command line, for each family."""

import contextlib
import logging
import warnings

import pytest
import tokenizers
import torch
import transformers
from lightning.pytorch import Trainer

from lightning_lm.callbacks import Adapters, LoRA, merge_adapters
from lightning_lm.cli import main
from lightning_lm.data import ReverseDigits, SupervisedRows
from lightning_lm.datamodules import ChatDataModule, PromptDataModule
from lightning_lm.models import Attention, Layer, TransformerConfig, TransformersModel, as_language_model, export_model
from lightning_lm.modules import CheckpointModel, GRPOModule, RolloutPlan, SFTModule
from lightning_lm.optim import AdamW, Constant
from lightning_lm.tokenizers import CharacterTokenizer

TOLERANCE = 1e-5  # float32, two layers, logits of order 1: the order of sums differs, nothing else
TEXT = "".join(map(chr, range(32, 127)))
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SMALL_GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
CONFIGS = {
    "gpt2": transformers.GPT2Config(**SMALL_GPT2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "llama": transformers.LlamaConfig(**SIZES),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=7),
    "qwen2": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16),
}
FAST = {"optimizer": AdamW(lr=1e-2, weight_decay=0.0), "schedule": Constant()}


@pytest.fixture
def published(tmp_path):
    """Return a function that makes a folder as an author publishes it: weights, tokenizer, the end of text."""

    def publish(name):
        folder = tmp_path / "published"
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name])
        definition = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(TEXT)} | {"<e>": 95}, []))
        definition.add_special_tokens(["<e>"])
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=definition, eos_token="<e>")
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return publish


def trainer_for(tmp_path, **settings):
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
    return Trainer(**quiet, max_steps=2, max_epochs=-1, limit_val_batches=0, **settings)


def fine_tuned(folder, tmp_path, **settings):
    module = SFTModule(CheckpointModel(checkpoint=str(folder)), **FAST)
    data = ChatDataModule(ReverseDigits(num_examples=64), rows=SupervisedRows(context_length=64), batch_size=4)
    trainer_for(tmp_path, **settings).fit(module, datamodule=data)
    return module


def reinforced(folder, tmp_path):
    module = GRPOModule(
        CheckpointModel(checkpoint=str(folder)),
        rewards=[lambda *, completions, **columns: [sum(map(ord, text)) % 7 for text in completions]],
        plan=RolloutPlan(samples_per_prompt=4, max_new_tokens=4),
        **FAST,
    )
    trainer_for(tmp_path).fit(module, datamodule=PromptDataModule(ReverseDigits(num_examples=64), batch_size=2))
    return module


@contextlib.contextmanager
def without_warnings(caplog):
    """Fail where a user would be warned of anything."""
    caplog.clear()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING, logger="transformers"):
            warnings.simplefilter("error")
            yield
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


def opened(folder, caplog):
    with without_warnings(caplog):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return opened_model(folder, caplog), tokenizer


def opened_model(folder, caplog):
    with without_warnings(caplog):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model.eval()


IDS = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("train", [fine_tuned, reinforced])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_trained_policy_opens_in_transformers(published, tmp_path, caplog, capsys, name, train):
    folder, exported = published(name), tmp_path / "exported"
    module = train(folder, tmp_path)
    before = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    module.trainer.save_checkpoint(tmp_path / "trained.ckpt")
    words = ["--checkpoint", str(tmp_path / "trained.ckpt"), "--output", str(exported), "--family", name]
    assert main(["export", *words]) == 0
    assert f"exported holds a {name} model of" in capsys.readouterr().out
    model, tokenizer = opened(exported, caplog)
    with torch.no_grad():
        expected = module.model.eval()(IDS)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=TOLERANCE)
        assert not torch.allclose(before(IDS).logits, expected, atol=1e-2)  # it has learned something
    assert tokenizer("12=21")["input_ids"] == transformers.AutoTokenizer.from_pretrained(folder)("12=21")["input_ids"]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 95


def test_adapters_are_merged(published, tmp_path, caplog):
    module = fine_tuned(published("llama"), tmp_path, callbacks=[LoRA(Adapters(rank=2))])
    module.trainer.save_checkpoint(tmp_path / "trained.ckpt")
    words = ["--checkpoint", str(tmp_path / "trained.ckpt"), "--output", str(tmp_path / "a")]
    assert main(["export", *words]) == 0
    export_model(module.model, tmp_path / "b")
    assert hasattr(module.model, "peft_config")  # it is as it was
    with torch.no_grad():
        expected = merge_adapters(module.model).eval()(IDS)
        for folder in ("a", "b"):
            found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)(IDS).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_model_of_transformers_is_exported_as_its_own_kind(tmp_path, caplog, wrapped):
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(CONFIGS["mistral"]).eval()
    export_model(TransformersModel(theirs) if wrapped else theirs, tmp_path, dtype=torch.bfloat16)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert found.dtype == torch.bfloat16
    assert theirs.dtype == torch.float32
    assert found.config.model_type == "mistral"
    assert torch.equal(found.lm_head.weight, theirs.lm_head.weight.bfloat16())


@pytest.mark.parametrize("name", ["llama", "gpt2", "granite"])
def test_a_policy_that_was_given_as_an_object_is_exported_by_the_command(tmp_path, caplog, capsys, name):
    torch.manual_seed(0)
    granite = transformers.GraniteConfig(**SIZES, logits_scaling=4.0, bos_token_id=None, eos_token_id=95)
    theirs = transformers.AutoModelForCausalLM.from_config({**CONFIGS, "granite": granite}[name])
    theirs.generation_config.eos_token_id = [95, 96]
    module = GRPOModule(
        theirs,
        rewards=[lambda *, completions, **columns: [sum(map(ord, text)) % 7 for text in completions]],
        plan=RolloutPlan(samples_per_prompt=4, max_new_tokens=4),
        **FAST,
    )
    digits = CharacterTokenizer("0123456789=")
    data = PromptDataModule(ReverseDigits(num_examples=64), tokenizer=digits, batch_size=2)
    trainer_for(tmp_path).fit(module, datamodule=data)
    module.trainer.save_checkpoint(tmp_path / "trained.ckpt")
    words = ["--checkpoint", str(tmp_path / "trained.ckpt"), "--output", str(tmp_path / "out")]
    assert main(["export", *words]) == 0
    assert f"out holds a {name} model of" in capsys.readouterr().out
    found = opened_model(tmp_path / "out", caplog)
    with torch.no_grad():
        torch.testing.assert_close(found(IDS).logits, theirs.eval()(IDS).logits, rtol=0, atol=TOLERANCE)
    assert found.generation_config.eos_token_id == [95, 96, digits.eos_id]
    assert type(found) is type(theirs)


def test_a_wrapper_of_peft_is_exported_with_its_adapters_merged(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    bare = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"])
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(bare, settings).eval()
    export_model(as_language_model(adapted), tmp_path)
    with torch.no_grad():
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits
        torch.testing.assert_close(found, adapted(IDS).logits, rtol=0, atol=TOLERANCE)


def test_an_object_that_no_config_builds_says_what_to_do(tmp_path, capsys):
    peft = pytest.importorskip("peft")
    bare = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"])
    module = SFTModule(
        peft.get_peft_model(bare, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])), **FAST
    )
    digits = CharacterTokenizer("0123456789=")
    rows = SupervisedRows(context_length=32)
    data = ChatDataModule(ReverseDigits(num_examples=64), tokenizer=digits, rows=rows, batch_size=4)
    trainer_for(tmp_path).fit(module, datamodule=data)
    module.trainer.save_checkpoint(tmp_path / "trained.ckpt")
    assert main(["export", "--checkpoint", str(tmp_path / "trained.ckpt"), "--output", str(tmp_path / "out")]) == 1
    assert "load_from_checkpoint(path, model=model)" in capsys.readouterr().err


def test_what_cannot_be_exported_says_why(tmp_path, capsys):
    def fails(*words):
        assert main(["export", "--output", str(tmp_path / "out"), *words]) == 1
        return capsys.readouterr().err

    assert "There is no checkpoint at" in fails("--checkpoint", str(tmp_path / "none.ckpt"))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "last.ckpt").write_bytes(b"not a checkpoint")
    assert "Did you mean" in fails("--checkpoint", str(tmp_path / "runs"))
    assert "is no checkpoint: it begins with b'not '" in fails("--checkpoint", str(tmp_path / "runs" / "last.ckpt"))


def test_a_tokenizer_of_our_own_kind_is_said_to_be_one(tmp_path, capsys):

    layers = Layer(mixer=Attention(num_heads=2))
    module = SFTModule(TransformerConfig(d_model=16, num_layers=1, layers=layers, context_length=32), **FAST)
    digits = CharacterTokenizer("0123456789=")
    data = ChatDataModule(
        ReverseDigits(num_examples=64), tokenizer=digits, rows=SupervisedRows(context_length=32), batch_size=4
    )
    trainer_for(tmp_path).fit(module, datamodule=data)
    module.trainer.save_checkpoint(tmp_path / "trained.ckpt")
    assert main(["export", "--checkpoint", str(tmp_path / "trained.ckpt"), "--output", str(tmp_path / "out")]) == 0
    assert "CharacterTokenizer has no form that transformers knows" in capsys.readouterr().out
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.eos_token_id == digits.eos_id
