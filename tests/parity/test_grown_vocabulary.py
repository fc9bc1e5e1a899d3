"""Tokens that a published model lacks: added to tokenizer and model, trained, exported, opened by transformers."""

import dataclasses

import pytest
import tokenizers
import torch
import transformers
from lightning.pytorch import Trainer

from lightning_lm.callbacks import Adapters, LoRA
from lightning_lm.cli import main
from lightning_lm.data import ChatML, SupervisedRows
from lightning_lm.datamodules import ChatDataModule
from lightning_lm.errors import ConfigurationError, TokenizerError
from lightning_lm.models import Attention, Layer, TransformerConfig, TransformersModel, export_model, grow_vocabulary
from lightning_lm.models.huggingface.folder import load_pretrained
from lightning_lm.modules import CheckpointModel, SFTModule
from lightning_lm.optim import AdamW, Constant
from lightning_lm.tokenizers import ByteTokenizer, CharacterTokenizer, load_tokenizer

CONFIG = TransformerConfig(
    vocab_size=31, d_model=16, num_layers=1, layers=Layer(mixer=Attention(num_heads=2)), context_length=64
)
IDS = torch.randint(31, (3, 8), generator=torch.Generator().manual_seed(1))
CHATS = [{"prompt": "abc", "completion": "cba"}] * 8
NEW = ("<|im_start|>", "<|im_end|>")


def of_transformers(tied):
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.GraniteConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied)
    return TransformersModel(transformers.GraniteForCausalLM(config))


MAKERS = {
    "untied": CONFIG.build,
    "tied": dataclasses.replace(CONFIG, tie_embeddings=True).build,
    "granite": lambda: of_transformers(tied=False),
    "tied granite": lambda: of_transformers(tied=True),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_old_logits_stay_and_new_rows_are_the_mean(tmp_path, kind):
    torch.manual_seed(0)
    model = MAKERS[kind]().eval()
    before = [model.head.weight.detach().clone(), embedding(model).detach().clone()]
    with torch.no_grad():
        logits = model(IDS)
        grow_vocabulary(model, 34)
        torch.testing.assert_close(model(IDS)[..., :31], logits)
    for old, grown in zip(before, [model.head.weight, embedding(model)], strict=True):
        assert torch.equal(grown[:31], old)
        expected = old.double().mean(0).expand(3, -1)
        torch.testing.assert_close(grown[31:].double(), expected, atol=1e-6, rtol=0)
    assert (model.head.weight is embedding(model)) == kind.startswith("tied")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.tensor([[31, 33]]))[0, 0, 32].backward()
    optimizer.step()
    assert not torch.equal(model.head.weight[32], model.head.weight[31])
    export_model(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    every = torch.arange(34)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(every).logits, model(every), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(load_pretrained(tmp_path).eval()(every), model(every), rtol=1e-4, atol=1e-5)
    grow_vocabulary(model, 20)
    assert len(model.head.weight) == 34


def embedding(model):
    return model.model.get_input_embeddings().weight if isinstance(model, TransformersModel) else model.embed.weight


def test_adapters_are_merged_first():
    model = CONFIG.build()
    Adapters(rank=2).attach(model)
    with pytest.raises(ConfigurationError, match="merge them first"):
        grow_vocabulary(model, 40)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharacterTokenizer("abc ")], ids=["bytes", "characters"])
def test_every_text_keeps_its_ids(tokenizer):
    longer = tokenizer.with_special_tokens([*NEW, *NEW])
    size = tokenizer.vocab_size
    assert longer.vocab_size == size + 2
    assert longer.encode("abc a") == tokenizer.encode("abc a")
    assert longer.encode("ab<|im_end|>c", allow_special=True) == [*longer.encode("ab"), size + 1, *longer.encode("c")]
    again = type(longer).from_files(longer.to_files())
    assert (again.special_tokens, again.eos_id) == (longer.special_tokens, tokenizer.eos_id)
    assert longer.with_special_tokens(NEW).vocab_size == longer.vocab_size
    with pytest.raises(TokenizerError, match="empty string"):
        tokenizer.with_special_tokens([""])


@pytest.fixture(params=["llama", "granite"])
def published(request, tmp_path):
    """A base model without tokens for chats."""
    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz \n"
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = transformers.AutoConfig.for_model(request.param, **sizes, pad_token_id=None, eos_token_id=1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *letters])}
    definition = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="a"))
    definition.add_special_tokens(["<s>", "</s>", "<pad>"])
    named = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=definition, **named).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def fitted(tmp_path, *callbacks, resume=None, steps=1, **model):
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
    trainer = Trainer(**quiet, callbacks=list(callbacks), max_steps=steps, max_epochs=-1, limit_val_batches=0)
    module = SFTModule(CheckpointModel(**model), optimizer=AdamW(lr=1e-2), schedule=Constant())
    rows = SupervisedRows(context_length=64)
    trainer.fit(
        module, datamodule=ChatDataModule(CHATS, 0, template=ChatML(), rows=rows, batch_size=2), ckpt_path=resume
    )
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    return module.model.eval()


def test_a_base_model_becomes_a_chat_model(published, tmp_path):
    with pytest.raises(ConfigurationError, match=r'--model.model.new_tokens "\[<\|im_start\|>, <\|im_end\|>\]"'):
        fitted(tmp_path, checkpoint=published)
    fitted(tmp_path, checkpoint=published, new_tokens=NEW)
    trained = str((tmp_path / "trained.ckpt").rename(tmp_path / "first.ckpt"))
    fitted(tmp_path, checkpoint=published, new_tokens=NEW, resume=trained, steps=2)
    model = fitted(tmp_path, checkpoint=trained)  # the next stage needs not name them again
    words = ["--checkpoint", str(tmp_path / "trained.ckpt"), "--output", str(tmp_path / "out")]
    assert main(["export", *words]) == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.convert_tokens_to_ids(list(NEW)) == [31, 32]
    turns = [{"role": "user", "content": "abc"}]
    ids = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ids == ChatML().prompt_ids(turns, load_tokenizer(tmp_path / "out"))
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert opened.generation_config.eos_token_id == [1, 32]
    with torch.no_grad():
        torch.testing.assert_close(opened(torch.tensor([ids])).logits, model(torch.tensor([ids])), rtol=1e-4, atol=1e-5)


def test_adapters_train_the_rows_of_new_tokens_or_are_refused(published, tmp_path):
    layers = ("embed", "head") if load_pretrained(published).__class__.__name__ == "Transformer" else None
    layers = layers or ("embed_tokens", "lm_head")
    with pytest.raises(ConfigurationError, match=f'adapters.trained "\\[{layers[0]}, {layers[1]}\\]"'):
        fitted(tmp_path, LoRA(Adapters(rank=2)), checkpoint=published, new_tokens=NEW)
    model = fitted(tmp_path, LoRA(Adapters(rank=2, trained=layers)), checkpoint=published, new_tokens=NEW)
    words = ["--checkpoint", str(tmp_path / "trained.ckpt"), "--output", str(tmp_path / "out")]
    assert main(["export", *words]) == 0
    opened, ids = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), torch.tensor([[31, 5, 32]])
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, model(ids), rtol=1e-4, atol=1e-5)
