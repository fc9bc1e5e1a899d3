"""Presets against the parameter counts of the releases.

The counts are those that the Hugging Face Hub shows for the released weights (elements of their safetensors files, tied
heads once). They agree with the rounded sizes of the papers and model cards that the presets name.
"""

from dataclasses import replace

import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_lm.errors import ConfigurationError
from lightning_lm.models import ModelConfig, TransformerConfig, presets

PUBLISHED = {
    ("gpt2", "124M"): 124_439_808,
    ("gpt2", "355M"): 354_823_168,
    ("gpt2", "774M"): 774_030_080,
    ("gpt2", "1.5B"): 1_557_611_200,
    ("llama2", "7B"): 6_738_415_616,
    ("llama2", "13B"): 13_015_864_320,
    ("llama2", "70B"): 68_976_648_192,
    ("llama3", "1B"): 1_235_814_400,
    ("llama3", "3B"): 3_212_749_824,
    ("llama3", "8B"): 8_030_261_248,
    ("llama3", "70B"): 70_553_706_496,
    ("mistral", "7B"): 7_241_732_096,
    ("qwen2", "0.5B"): 494_032_768,
    ("qwen2", "1.5B"): 1_543_714_304,
    ("qwen2", "7B"): 7_615_616_512,
    ("qwen2", "72B"): 72_706_203_648,
    ("qwen3", "0.6B"): 596_049_920,
    ("qwen3", "1.7B"): 1_720_574_976,
    ("qwen3", "4B"): 4_022_468_096,
    ("qwen3", "8B"): 8_190_735_360,
    ("qwen3", "14B"): 14_768_307_200,
    ("qwen3", "32B"): 32_762_123_264,
}
PADDED_VOCABULARY = {("qwen2", "7B"): 152_064, ("qwen2", "72B"): 152_064}


def count(config):
    with torch.device("meta"):
        model = config.build()
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("family", "size"), PUBLISHED)
def test_parameters_are_as_many_as_published(family, size):
    config = getattr(presets, family)(size)
    config = replace(config, vocab_size=PADDED_VOCABULARY.get((family, size), config.vocab_size))
    assert count(config) == PUBLISHED[family, size]


def test_every_size_is_in_the_table():
    tables = {name.lower()[1:]: table for name, table in vars(presets).items() if isinstance(table, dict)}
    tables = {family: tables[family] for family in presets.__all__}
    sizes = {(family, size) for family, table in tables.items() for size in table}
    assert sizes == PUBLISHED.keys() | {("tinystories", "17M")}


def test_tinystories_has_17_million_parameters_besides_the_embedding():
    # CS336, assignment 1: d_model 512, d_ff 1344, 4 layers, 16 heads, vocabulary 10,000: "roughly 17M non-embedding".
    config = presets.tinystories()
    assert count(config) - 10_000 * 512 == 4 * (4 * 512**2 + 3 * 512 * 1344) + 9 * 512 + 10_000 * 512
    assert 17.0e6 < count(config) - 10_000 * 512 < 18.0e6


@pytest.mark.parametrize("family", presets.__all__)
def test_an_unknown_size_lists_the_known_ones(family):
    with pytest.raises(ConfigurationError, match=rf"no {family}\('9B'\); the sizes are .*\d[MB]"):
        getattr(presets, family)("9B")


@pytest.mark.parametrize("family", presets.__all__)
def test_presets_are_plain_parts_and_take_the_vocabulary_of_a_tokenizer(family):
    config = getattr(presets, family)(vocab_size=None)
    assert TransformerConfig.from_dict(config.to_dict()) == config
    with torch.device("meta"):
        assert config.build(vocab_size=300).head.weight.shape == (300, config.d_model)


def test_presets_can_be_named_in_yaml():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=ModelConfig)
    arguments = parser.parse_args(["--model", "lightning_lm.models.presets.gpt2", "--model.size", "355M"])
    assert parser.instantiate(arguments).model == presets.gpt2("355M")
