"""Configs travel through plain data and YAML, and say early what cannot work."""

import json
import textwrap

import pytest
from jsonargparse import ArgumentParser

from lightning_lm.errors import ConfigurationError
from lightning_lm.models import (
    GLU,
    MLP,
    Attention,
    DepthScaled,
    Layer,
    LayerNorm,
    LearnedPositions,
    ModelConfig,
    Rope,
    TransformerConfig,
    YaRNScaling,
)

RICH = TransformerConfig(
    d_model=32,
    num_layers=3,
    layers=(
        Layer(mixer=Attention(num_heads=4, num_kv_heads=2, window=8, rope=Rope(scaling=YaRNScaling(factor=2.0)))),
        Layer(mixer=Attention(num_heads=2, rope=None, qk_norm="full"), ffn=MLP(activation="relu2")),
    ),
    norm=LayerNorm(bias=False),
    residual="sandwich",
    positions=LearnedPositions(),
    init=DepthScaled(std=0.01),
)


def test_round_trip_through_json():
    assert TransformerConfig.from_dict(json.loads(json.dumps(RICH.to_dict()))) == RICH


def test_a_tuple_of_layers_is_cycled_over_the_depth():
    first, second = RICH.layers
    assert RICH.depth_pattern == (first, second, first)
    mixers = [block.mixer.part for block in RICH.build(10).layers]
    assert mixers == [first.mixer, second.mixer, first.mixer]


def test_fewer_than_twenty_fields():
    assert len(TransformerConfig.__dataclass_fields__) < 20


@pytest.fixture
def parser():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=ModelConfig)
    return parser


YAML = """\
class_path: lightning_lm.models.TransformerConfig
init_args:
  d_model: 32
  num_layers: 3
  norm: {class_path: lightning_lm.models.LayerNorm, init_args: {bias: false, eps: 1.0e-5}}
  residual: sandwich
  positions: {class_path: lightning_lm.models.LearnedPositions}
  init: {class_path: lightning_lm.models.DepthScaled, init_args: {std: 0.01}}
  layers:
    - mixer:
        class_path: lightning_lm.models.Attention
        init_args:
          num_heads: 4
          num_kv_heads: 2
          window: 8
          rope: {scaling: {class_path: lightning_lm.models.YaRNScaling, init_args: {factor: 2.0}}}
    - mixer: {class_path: lightning_lm.models.Attention, init_args: {num_heads: 2, rope: null, qk_norm: full}}
      ffn: {class_path: lightning_lm.models.MLP, init_args: {activation: relu2}}
"""


def test_yaml_gives_the_same_config_and_dumps_it_again(parser):
    parsed = parser.parse_string("model:\n" + textwrap.indent(YAML, "  "))
    assert parser.instantiate(parsed).model == RICH
    again = parser.parse_string(parser.dump(parsed, skip_unset=False))
    assert parser.instantiate(again).model == RICH


def test_defaults_parse_and_dump(parser):
    name = "lightning_lm.models.TransformerConfig"
    parsed = parser.parse_args([f"--model={name}", "--model.d_model=16", "--model.num_layers=1"])
    again = parser.parse_string(parser.dump(parsed, skip_unset=False))
    assert parser.instantiate(again).model == TransformerConfig(d_model=16, num_layers=1)


def test_vocabulary_of_the_tokenizer_fills_a_gap_and_fits_into_a_larger_one():
    config = TransformerConfig(d_model=16, num_layers=1)
    model = config.build(100)
    assert model.head.weight.shape == (100, 16)
    assert model.config.vocab_size == 100
    assert TransformerConfig(vocab_size=128, d_model=16, num_layers=1).build(100).head.out_features == 128


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TransformerConfig(d_model=16, num_layers=1).build(), "vocab_size is not known"),
        (lambda: TransformerConfig(vocab_size=64, d_model=16, num_layers=1).build(65), "at least 65"),
        (lambda: TransformerConfig(d_model=0, num_layers=1), "d_model=0"),
        (lambda: TransformerConfig(d_model=16, num_layers=0), "num_layers=0"),
        (lambda: TransformerConfig(d_model=16, num_layers=1, layers=()), "layers is empty"),
        (lambda: Attention(num_heads=4, num_kv_heads=3), "does not divide num_heads=4"),
        (lambda: Attention(window=0), "window=0"),
        (lambda: TransformerConfig(d_model=20, num_layers=1).build(9), "num_heads=8 does not divide d_model=20"),
        (
            lambda: TransformerConfig(d_model=24, num_layers=1).build(9),
            r"Rope\(fraction=1.0\) rotates 3 of head_dim=3",
        ),
        (lambda: Rope(fraction=0.1).rotary_dim(8), "rotates 0"),
    ],
)
def test_what_cannot_work_is_said_early(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_hidden_sizes_that_are_left_out():
    assert GLU().build(384).gate.out_features == 1024
    assert GLU().build(24).gate.out_features == 64
    assert MLP().build(24).up.out_features == 96
