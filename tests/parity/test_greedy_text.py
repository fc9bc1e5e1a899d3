"""Greedy answers against ``generate`` of transformers: caches, positions and windows in one test."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen3Config

from lightning_lm.generation import Generator, Sampling
from lightning_lm.models import TransformersModel, load_huggingface

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, rope_parameters=YARN),
    "mistral": MistralConfig(**SIZES, sliding_window=6),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None
    ),
}
PROMPTS = [[5, 17, 3, 80, 41, 2, 9, 9, 60, 11, 24], [33], [7, 8, 7, 8]]
NEW = 24


@pytest.mark.parametrize("name", CONFIGS)
def test_ragged_prompts_are_continued_as_transformers_continues_each(name, tmp_path):
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)  # sharp enough that no two tokens are nearly as likely
    theirs.save_pretrained(tmp_path)
    expected = [
        theirs.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]
    assert len({tuple(answer) for answer in expected}) == len(PROMPTS)
    for model in (load_huggingface(tmp_path), TransformersModel(theirs)):
        answers = Generator(model).generate(PROMPTS, sampling=Sampling(temperature=0.0), max_new_tokens=NEW)
        assert [list(answer.token_ids) for answer in answers] == expected
