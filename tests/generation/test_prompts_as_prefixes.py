"""Prefix language models read a prompt as they were trained to: in both directions, then write causally."""

import dataclasses

import pytest
import torch
from lightning.pytorch import Trainer
from served_models import tiny_tokenizer

from lightning_lm.data import FillInTheMiddle
from lightning_lm.datamodules import PrefixTextDataModule
from lightning_lm.errors import ConfigurationError
from lightning_lm.evals import LocalModel
from lightning_lm.evals.requests import Likelihood, Prompt
from lightning_lm.generation import Generator, Sampling
from lightning_lm.generation.slots import supports_slots
from lightning_lm.models import (
    Attention,
    Layer,
    TransformerConfig,
    export_model,
    prompt_is_prefix,
    set_prompt_is_prefix,
)
from lightning_lm.modules import PretrainModule, load_model
from lightning_lm.tokenizers import ByteTokenizer

PROMPTS = [[5, 9, 2, 7, 1], [3, 8], [4, 4, 6]]
QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
GREEDY = Sampling(temperature=0)
CONFIG = TransformerConfig(
    vocab_size=260, d_model=16, num_layers=2, context_length=32, layers=Layer(mixer=Attention(num_heads=2))
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = CONFIG.build().double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    set_prompt_is_prefix(model, True)
    return model


def _naive(model, prompt: list[int], count: int) -> list[int]:
    """Run the whole text anew for each token, with the prompt as its prefix."""
    ids = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([ids]), prefix_lengths=torch.tensor([len(prompt)]))
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


class Uncached(torch.nn.Module):
    """A user's model without a cache."""

    def __init__(self, model):
        super().__init__()
        self.inner = model
        set_prompt_is_prefix(self, True)

    def forward(self, input_ids, prefix_lengths=None):
        return self.inner(input_ids, prefix_lengths=prefix_lengths)


@torch.no_grad()
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("samples", [1, 2])
def test_prompts_are_read_in_both_directions(model, cached, samples):
    expected = [_naive(model, prompt, 6) for prompt in PROMPTS for _ in range(samples)]
    generator = Generator(model if cached else Uncached(model))
    found = generator.generate(PROMPTS, sampling=GREEDY, max_new_tokens=6, num_samples=samples)
    assert [list(completion.token_ids) for completion in found] == expected
    set_prompt_is_prefix(model, False)
    causal = Generator(model).generate(PROMPTS, sampling=GREEDY, max_new_tokens=6)
    assert [list(completion.token_ids) for completion in causal] != expected[::samples]


@torch.no_grad()
def test_the_context_of_a_likelihood_is_the_prefix(model):
    tokenizer = ByteTokenizer(("<|endoftext|>",), eos_token="<|endoftext|>")
    requests = [Likelihood(Prompt("Which one?"), text) for text in (" this", " that one", " a")]
    found = LocalModel(model, tokenizer).log_likelihoods(requests)
    for request, score in zip(requests, found, strict=True):
        context, target = tokenizer.encode("Which one?"), tokenizer.encode(request.continuation)
        ids = torch.tensor([[tokenizer.eos_id, *context, *target]])
        start = ids.shape[1] - len(target)
        logprobs = model(ids, prefix_lengths=torch.tensor([start])).log_softmax(-1)[0, start - 1 : -1]
        assert score.logprob == pytest.approx(float(logprobs.gather(1, ids[0, start:, None]).sum()), abs=1e-9)


def test_beginnings_are_not_shared_and_exports_are_refused(model, tmp_path):
    assert not supports_slots(model)
    with pytest.raises(ConfigurationError, match=r"both directions.*set_prompt_is_prefix\(model, False\)"):
        export_model(model, tmp_path / "folder", tiny_tokenizer())


def _datamodule(path, **settings):
    path.write_text("to be or not to be\n" * 40)
    tokenizer = ByteTokenizer(
        ("<|endoftext|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), eos_token="<|endoftext|>"
    )
    return PrefixTextDataModule(path, 0.0, tokenizer=tokenizer, context_length=16, batch_size=2, **settings)


def test_training_on_prefixes_decides_and_checkpoints_know(tmp_path):
    module = PretrainModule(dataclasses.replace(CONFIG, vocab_size=None))
    fitted = Trainer(max_steps=1, **QUIET)
    fitted.fit(module, _datamodule(tmp_path / "text.txt"))
    assert prompt_is_prefix(module.model)
    fitted.save_checkpoint(tmp_path / "last.ckpt")
    assert prompt_is_prefix(load_model(tmp_path / "last.ckpt")[0])
    with pytest.warns(UserWarning, match="is trained causally now, and will generate so"):
        Trainer(max_steps=1, **QUIET).fit(module, _datamodule(tmp_path / "text.txt", objective=FillInTheMiddle()))
    assert not prompt_is_prefix(module.model)
