"""End ids, BOS, template and other settings go from a published folder through every kind of training to the export.

The oracle is transformers: its generation config, its chat templates, and the place where its ``generate`` stops.
"""

import os

import peft
import pytest
import tokenizers
import torch
import transformers
from lightning.pytorch import Trainer

from lightning_lm.callbacks import Adapters, LoRA, PretrainedAdapters
from lightning_lm.cli import main
from lightning_lm.data import ChatML, PairRows, SupervisedRows
from lightning_lm.datamodules import ChatDataModule, PreferenceDataModule, PromptDataModule, TextDataModule
from lightning_lm.errors import ConfigurationError
from lightning_lm.generation import Generator, Sampling
from lightning_lm.models import add_end_ids, export_model
from lightning_lm.modules import (
    CheckpointModel,
    DPOModule,
    GRPOModule,
    PPOModule,
    PretrainModule,
    RolloutPlan,
    SFTModule,
    load_model,
)
from lightning_lm.tokenizers import ByteTokenizer, load_tokenizer

NAMES = ["<s>", "</s>", "<eot>", "<pad>", "<|im_start|>", "<|im_end|>"]
LETTERS = "abcdefghijklmnopqrstuvwxyz \n"
SETTINGS = {"eos_token_id": [1, 2], "bos_token_id": 0, "pad_token_id": 3, "temperature": 0.7, "do_sample": True}
TURNS = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "cba"}, {"role": "user", "content": "a"}]


@pytest.fixture
def published(tmp_path):
    """A base model as an author publishes it: end ids, sampling defaults, the longest text; no chat template."""

    def publish(family="llama"):
        folder = tmp_path / "published"
        torch.manual_seed(0)
        sizes = {"vocab_size": 34, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
        config = transformers.AutoConfig.for_model(family, **sizes, pad_token_id=None)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.generation_config = transformers.GenerationConfig(**SETTINGS)
        model.save_pretrained(folder)
        vocab = {token: i for i, token in enumerate([*NAMES, *LETTERS])}
        definition = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="a"))
        definition.add_special_tokens(NAMES)
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=definition, eos_token="</s>", bos_token="<s>", pad_token="<pad>", model_max_length=99
        )
        tokenizer.save_pretrained(folder)
        return folder

    return publish


CHATS = [{"prompt": "abc", "completion": "cba"}] * 8
PAIRS = [{"prompt": "abc", "chosen": "cba", "rejected": "abc"}] * 8
TEMPLATE = ChatML()


def reward(*, completions, **columns):
    return [float(len(text)) for text in completions]


ROLLOUT = {"rewards": [reward], "plan": RolloutPlan(samples_per_prompt=2, max_new_tokens=3)}
IDS = torch.randint(34, (3, 8), generator=torch.Generator().manual_seed(1))
KEPT = {"sft": {}, "dpo": {}, "grpo": ROLLOUT}
WAYS = {
    "sft": lambda model: (
        SFTModule(model),
        ChatDataModule(CHATS, 0, template=TEMPLATE, rows=SupervisedRows(context_length=64), batch_size=2),
    ),
    "dpo": lambda model: (
        DPOModule(model),
        PreferenceDataModule(PAIRS, template=TEMPLATE, rows=PairRows(max_length=64), batch_size=2),
    ),
    "grpo": lambda model: (
        GRPOModule(model, **ROLLOUT),
        PromptDataModule(CHATS, 0, template=TEMPLATE, batch_size=2),
    ),
    "ppo": lambda model: (PPOModule(model, **ROLLOUT), PromptDataModule(CHATS, 0, template=TEMPLATE, batch_size=2)),
}


def fitted(module, data, tmp_path, *callbacks):
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "barebones": False}
    quiet |= {"enable_model_summary": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
    trainer = Trainer(**quiet, callbacks=list(callbacks), max_steps=1, max_epochs=-1, limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    return module


def exported(tmp_path):
    words = ["--checkpoint", str(tmp_path / "trained.ckpt"), "--output", str(tmp_path / "out")]
    assert main(["export", *words]) == 0
    return tmp_path / "out"


def check(folder):
    found = transformers.GenerationConfig.from_pretrained(folder)
    assert found.eos_token_id == [1, 2, 5]  # the author's, and the end of a turn that was trained
    assert (found.bos_token_id, found.pad_token_id, found.temperature, found.do_sample) == (0, 3, 0.7, True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.model_max_length, tokenizer.bos_token, tokenizer.pad_token) == (99, "<s>", "<pad>")
    ids = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=False)
    assert ids == TEMPLATE.prompt_ids(TURNS, load_tokenizer(folder))


@pytest.mark.parametrize("way", WAYS)
def test_every_checkpoint_is_exported_with_the_template_and_the_ends_that_were_trained(published, tmp_path, way):
    module, data = WAYS[way](CheckpointModel(checkpoint=str(published())))
    fitted(module, data, tmp_path)
    check(exported(tmp_path))


def test_a_model_of_transformers_and_the_weights_that_a_server_is_sent(published, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(published("olmo"))
    module, data = WAYS["grpo"](model)
    data.tokenizer = load_tokenizer(tmp_path / "published")
    fitted(module, data, tmp_path)
    check(exported(tmp_path))
    export_model(module.model, tmp_path / "pushed", module.trained_tokenizer())
    check(tmp_path / "pushed")


def test_the_ends_of_one_stage_are_kept_by_the_next(published, tmp_path):
    module, data = WAYS["sft"](CheckpointModel(checkpoint=str(published())))
    fitted(module, data, tmp_path)
    (tmp_path / "trained.ckpt").rename(tmp_path / "first.ckpt")
    data = TextDataModule(["abc cba"] * 9, 0, context_length=16, batch_size=2)
    fitted(PretrainModule(CheckpointModel(checkpoint=str(tmp_path / "first.ckpt"))), data, tmp_path)
    check(exported(tmp_path))


@pytest.mark.parametrize("family", ["llama", "olmo"])
def test_adapters_of_one_stage_go_on_into_the_next(published, tmp_path, family):
    """Merged: each stage begins with exactly the model that the one before has left."""
    source, left = published(family), None
    for stage in ("sft", "dpo", "grpo"):
        module, data = WAYS[stage](CheckpointModel(checkpoint=str(source)))
        if left is not None:
            start = module.model_config.build().eval()
            with torch.no_grad():
                torch.testing.assert_close(start(IDS), left(IDS), rtol=1e-5, atol=1e-5)
        targets = ("q", "head") if family == "llama" else ("q_proj", "lm_head")
        fitted(module, data, tmp_path, LoRA(Adapters(rank=2, targets=targets)))
        left = module.model.eval()
        assert any(value.any() for name, value in left.named_parameters() if "head.lora_B" in name)
        source = (tmp_path / "trained.ckpt").rename(tmp_path / f"{stage}.ckpt")
        with torch.no_grad():
            again = type(module).load_from_checkpoint(source, weights_only=True, **KEPT[stage]).model.eval()
            torch.testing.assert_close(again(IDS), left(IDS))
    source.rename(tmp_path / "trained.ckpt")
    check(exported(tmp_path))
    adapters = str(tmp_path / "adapters")
    words = ["--checkpoint", str(tmp_path / "trained.ckpt"), "--adapters"]
    assert main(["export", *words, "drop", "--output", str(tmp_path / "base")]) == 0
    assert main(["export", *words, "only", "--output", adapters, "--base", str(tmp_path / "base")]) == 0
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(adapters).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, left(IDS), rtol=1e-4, atol=1e-5)
    module, data = WAYS["dpo"](CheckpointModel(checkpoint=str(tmp_path / "base")))
    fitted(module, data, tmp_path, LoRA(PretrainedAdapters(folder=adapters)))
    assert main(["export", "--checkpoint", adapters, "--output", str(tmp_path / "merged")]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)
    check(tmp_path / "merged")


def test_rows_longer_than_a_checkpoint_name_what_can_be_set(published, tmp_path):
    module, data = WAYS["sft"](CheckpointModel(checkpoint=str(published())))
    fitted(module, data, tmp_path)
    for source, words in (
        ("trained.ckpt", "Set --data.rows"),
        ("published", "Set --model.model.context_length 129, or --"),
    ):
        rows = SupervisedRows(context_length=129)
        data = ChatDataModule(CHATS, 0, template=TEMPLATE, rows=rows, batch_size=2)
        with pytest.raises(ConfigurationError, match=words):
            fitted(SFTModule(CheckpointModel(checkpoint=str(tmp_path / source))), data, tmp_path)


def test_generation_stops_where_that_of_transformers_stops(published, tmp_path):
    module, data = WAYS["sft"](CheckpointModel(checkpoint=str(published())))
    fitted(module, data, tmp_path)
    model, tokenizer = load_model(tmp_path / "trained.ckpt")
    greedy = {"sampling": Sampling(temperature=0), "max_new_tokens": 30}
    (first,) = Generator(model, tokenizer).generate([[0, 6, 7]], **greedy)
    add_end_ids(model, [first.token_ids[3]])  # an untrained model says it sooner or later
    folder = tmp_path / "out"
    export_model(model, folder, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompts = [[0, 6 + i, 7 + i] for i in range(20)]
    ours = Generator(model, tokenizer).generate(prompts, **greedy)
    for prompt, completion in zip(prompts, ours, strict=True):
        ids = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=30)[0, len(prompt) :].tolist()
        assert list(completion.token_ids) == ids
    assert any(completion.finish_reason == "stop" for completion in ours)


def test_the_defaults_of_a_configuration_end_nothing(tmp_path):
    """transformers gives 2 to every new Llama as its end, whatever id 2 stands for in the tokenizer."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    data = TextDataModule(["abc cba"] * 9, 0, context_length=16, batch_size=2, tokenizer=ByteTokenizer())
    with pytest.raises(ConfigurationError, match="has 64 ids, but the tokenizer has 257"):
        fitted(PretrainModule(transformers.LlamaForCausalLM(config)), data, tmp_path)
    config.vocab_size = 257
    fitted(PretrainModule(transformers.LlamaForCausalLM(config)), data, tmp_path)
    found = transformers.GenerationConfig.from_pretrained(exported(tmp_path))
    assert (found.eos_token_id, found.bos_token_id) == (256, None)


@pytest.mark.parametrize("family", ["llama", "olmo"])
def test_every_file_has_the_mode_of_a_new_file(published, tmp_path, family):
    published(family)
    module, _ = WAYS["sft"](CheckpointModel(checkpoint=str(tmp_path / "published")))
    module.configure_model()
    before = os.umask(0o022)
    try:
        export_model(module.model, tmp_path / "out", load_tokenizer(tmp_path / "published"))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o644}
