"""Traces with fake tensors against the activations that a real step keeps, and against published formulas."""

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from published_runs import work_of
from torch.utils.data import DataLoader

from lightning_lm.callbacks import MemoryReport
from lightning_lm.models import GLU, MLP, Attention, Layer, LayerNorm, TransformerConfig
from lightning_lm.modules import PretrainModule
from lightning_lm.modules.activation_checkpointing import blocks_of
from lightning_lm.scaling.model_trace import trace_model

ROWS, LENGTH, VOCAB, WIDTH = 4, 128, 512, 64
GPT = Layer(mixer=Attention(num_heads=4, rope=None, bias="all"), ffn=MLP(bias=True))
CONFIGS = {
    "llama": TransformerConfig(
        vocab_size=VOCAB, d_model=WIDTH, num_layers=3, layers=Layer(mixer=Attention(num_heads=4, num_kv_heads=2))
    ),
    "olmo": TransformerConfig(
        vocab_size=VOCAB,
        d_model=WIDTH,
        num_layers=3,
        layers=(Layer(mixer=Attention(num_heads=4, qk_norm="full")), Layer(ffn=GLU(hidden_size=80))),
        residual="reordered",
    ),
    "gpt": TransformerConfig(
        vocab_size=VOCAB, d_model=WIDTH, num_layers=3, layers=GPT, norm=LayerNorm(), tie_embeddings=True
    ),
}
DTYPES = {"32-true": None, "bf16-mixed": torch.bfloat16, "bf16-true": None}


def traced(config, *, precision="32-true", planned=False, on_gpu=True):
    with torch.device("meta"):
        model = config.build()
    model = model.to(torch.bfloat16) if precision == "bf16-true" else model
    blocks = list(blocks_of(model))
    regions = [part for block in blocks for part in (block.mixer, block.ffn)] if planned else []
    return trace_model(
        model,
        lambda model, ids: model.hidden(ids),
        context_length=LENGTH,
        blocks=blocks,
        regions=regions,
        autocast=DTYPES[precision],
        on_gpu=on_gpu,
    )


class Rows(LightningDataModule):
    context_length, batch_size = LENGTH, ROWS

    def train_dataloader(self):
        ids = torch.randint(VOCAB, (ROWS, LENGTH + 1))
        return DataLoader([{"input_ids": ids, "labels": ids}], batch_size=None)


def counted(config, precision, folder):
    """Return the bytes that autograd keeps in a real step on this machine."""
    report = MemoryReport(refuse=False)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="cpu", max_steps=1, callbacks=[report], precision=precision, default_root_dir=folder, **quiet
    )
    trainer.fit(PretrainModule(config), datamodule=Rows())
    return report.measured.activations


@pytest.mark.parametrize(("name", "precision"), [("llama", "32-true"), ("olmo", "bf16-mixed")])
def test_activations_are_those_of_a_real_step(name, precision, tmp_path):
    config = CONFIGS[name]
    kept_by_loss = ROWS * LENGTH * WIDTH * (2 if "16" in precision else 4) + 4 * VOCAB * WIDTH
    trace = traced(config, precision=precision, on_gpu=False)
    found = trace.activation_bytes("none", rows=ROWS) + kept_by_loss
    assert found == pytest.approx(counted(config, precision, tmp_path), rel=0.05)


def test_a_layer_of_gpt_keeps_what_the_paper_counts():
    """Korthikanti et al. 2022, section 4.1: 34 bytes per token and feature, two of them masks of dropout.

    Of the others the norms keep 4, which sequence parallelism shards (table 2). The inputs of attention and MLP are 4,
    which stay whole here, where the paper gathers them once more; tensor parallelism divides the remaining 24.
    """
    config = TransformerConfig(vocab_size=VOCAB, d_model=512, num_layers=2, layers=GPT, norm=LayerNorm())
    trace = traced(config, precision="bf16-true", planned=True)
    ((layer, number),) = trace.layers
    assert number == 2
    per_feature = [size / (LENGTH * 512) for size in layer.saved]
    assert per_feature == pytest.approx([4, 4, 24], rel=0.01)
    assert layer.inputs.stream / (LENGTH * 512) == 2
    whole, rest = sum(layer.saved), trace.rest.saved.stream
    assert trace.activation_bytes("none") == pytest.approx(2 * whole + rest)
    assert trace.activation_bytes("blocks") == pytest.approx(2 * layer.inputs.stream + whole + rest)
    assert layer.saved.local(4, sequence_parallel=False) == pytest.approx((4 + 4 + 6) / 32 * whole, rel=0.01)
    assert layer.saved.local(4, sequence_parallel=True) == pytest.approx((1 + 4 + 6) / 32 * whole, rel=0.01)


def test_layers_that_differ_are_counted_apart_and_the_rest_not_run():
    three, six = (
        traced(
            TransformerConfig(
                vocab_size=VOCAB,
                d_model=WIDTH,
                num_layers=number,
                layers=(Layer(), Layer(), Layer(ffn=GLU(hidden_size=32))),
            )
        )
        for number in (3, 6)
    )
    assert [number for _, number in six.layers] == [4, 2]
    assert six.matmul_flops == 2 * three.matmul_flops
    inner = three.activation_bytes() - three.rest.saved.stream
    assert six.activation_bytes() - six.rest.saved.stream == pytest.approx(2 * inner, rel=0.02)


def test_flops_are_two_for_each_weight_and_a_huge_model_takes_no_memory():
    trace = work_of("Llama 3 405B", rows=1, micro_batches=1).trace
    weights = 126 * (2 * 16_384**2 + 2 * 16_384 * 1024 + 3 * 16_384 * 53_248)
    assert trace.matmul_flops == 2 * weights * 8192
    assert trace.activation_bytes() > 5e11
