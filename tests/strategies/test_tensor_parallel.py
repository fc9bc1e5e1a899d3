"""Split and sharded runs against one process, over the same windows."""

import functools

import pytest
import torch
from lightning.pytorch.plugins import Precision
from split_runs import model_config, run

from lightning_lm.errors import ConfigurationError
from lightning_lm.models import (
    MLP,
    SSD,
    Attention,
    FixedDecay,
    GatedDecay,
    GatedDeltaNet,
    Hyena,
    Layer,
    LayerNorm,
    LearnedPositions,
    LinearAttention,
    Parallel,
    RMSNorm,
)
from lightning_lm.modules import PretrainModule
from lightning_lm.optim import SGD, Muon
from lightning_lm.strategies import TensorParallelStrategy
from lightning_lm.strategies.tensor_parallel.shard import check_model

TOLERANCE = 1e-9
"""In float64; ranks round sums in another order, and Adam divides small gradients by small gradients."""
TOLERANCE_FLOAT32 = 2e-6
"""Of losses near 4.5."""


def split_run(settings, **options):
    return run(TensorParallelStrategy(**settings), **options)


@functools.cache
def _alone(key):
    return run(**dict(key))


def alone(**options):
    return _alone(tuple(sorted(options.items(), key=lambda item: item[0])))


def assert_equal_runs(found, expected):
    assert len(found[0]) == len(expected[0]) > 0
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-7, atol=0)  # this is logged in float32
    assert found[2].keys() == expected[2].keys()
    for name, weight in expected[2].items():
        torch.testing.assert_close(found[2][name], weight, rtol=0, atol=10 * TOLERANCE)


TP2, FSDP2 = {"tensor_parallel_size": 2}, {"tensor_parallel_size": 1}
SP2 = {**TP2, "sequence_parallel": True}
PLAIN = model_config()
RECURRENT = [
    Layer(mixer=GatedDeltaNet(num_heads=2, num_v_heads=4, head_dim=4), ffn=None),
    Layer(mixer=SSD(head_dim=8, state=4, groups=2), ffn=None),
    Layer(mixer=LinearAttention(num_heads=4), ffn=None),
    Layer(mixer=LinearAttention(num_heads=4, decay=GatedDecay(rank=3)), ffn=None),
    Layer(mixer=Parallel((LinearAttention(num_heads=2, decay=FixedDecay()), Attention(num_heads=2))), ffn=None),
    Layer(mixer=Hyena(16, filter_size=8, bands=2), ffn=None),
]
CASES = {
    "tp2": (2, TP2, {}),
    "tp2, heads whole": (2, {**TP2, "loss_parallel": False}, {}),
    "tp2 sp": (2, SP2, {}),
    "tp2 sp, heads whole": (2, {**SP2, "loss_parallel": False}, {}),
    "tp2 tied": (2, TP2, {"config": model_config(tie_embeddings=True)}),
    "tp2 sp tied": (2, SP2, {"config": model_config(tie_embeddings=True)}),
    "tp2 97": (2, SP2, {"config": model_config(97)}),
    "tp2 clip": (2, SP2, {"gradient_clip_val": 0.3, "optimizer": SGD(lr=0.5)}),
    "tp2 accumulate": (2, SP2, {"accumulate_grad_batches": 4, "gradient_clip_val": 0.3}),
    "tp2 muon": (2, SP2, {"optimizer": Muon(lr=0.01)}),
    "fsdp2": (2, FSDP2, {}),
    "fsdp2 clip accumulate": (2, FSDP2, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}),
    "fsdp2 tied 97": (2, FSDP2, {"config": model_config(97, tie_embeddings=True)}),
    "fsdp2 muon": (2, FSDP2, {"optimizer": Muon(lr=0.01)}),
    "2 x 2": (4, TP2, {}),
    "2 x 2 sp tied clip accumulate": (
        4,
        SP2,
        {"config": model_config(tie_embeddings=True), "accumulate_grad_batches": 2, "gradient_clip_val": 0.3},
    ),
    "2 x 2 sp 97": (4, SP2, {"config": model_config(97)}),
    "2 x 2 muon": (4, SP2, {"optimizer": Muon(lr=0.01)}),
    "qk norm of heads": (2, SP2, {"config": model_config(attention={"qk_norm": "head"})}),
    "qk norm of all": (2, TP2, {"config": model_config(attention={"qk_norm": "full"})}),
    "gpt": (
        2,
        SP2,
        {
            "config": model_config(
                norm=LayerNorm(),
                positions=LearnedPositions(),
                tie_embeddings=True,
                layers=Layer(mixer=Attention(num_heads=4, rope=None, bias="all"), ffn=MLP(hidden_size=33, bias=True)),
            )
        },
    ),
    "sandwich": (2, SP2, {"config": model_config(residual="sandwich", logit_softcap=5.0, norm=RMSNorm(offset=1.0))}),
    "parallel": (2, SP2, {"config": model_config(residual="parallel")}),
    "recurrent mixers": (2, SP2, {"config": model_config(num_layers=6, layers=tuple(RECURRENT))}),
    "post": (2, SP2, {"config": model_config(residual="post", final_norm=False)}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_split_run_equals_one_process(ranks, case):
    size, settings, options = CASES[case]
    found = ranks(size).run(split_run, settings, **options)
    for other in found[1:]:
        assert other[0] == found[0][0]
    assert_equal_runs(found[0], alone(**options))


@pytest.mark.parametrize("case", ["tp2 97", "2 x 2 sp tied clip accumulate"])
def test_losses_in_float32(ranks, case):
    size, settings, options = CASES[case]
    found = ranks(size).run(split_run, settings, double=False, **options)[0]
    expected = alone(double=False, **options)
    assert max(abs(a - b) for a, b in zip(found[0], expected[0], strict=True)) < TOLERANCE_FLOAT32


def test_a_model_without_values_is_refused_with_the_reason():
    with torch.device("meta"):
        module = PretrainModule(model_config().build())
    said = "meta device, and ranks would draw its initial weights by themselves. Build it for real in configure_model"
    with pytest.raises(ConfigurationError, match=said):
        check_model(module, Precision())
    check_model(PretrainModule(model_config().build()), Precision())
