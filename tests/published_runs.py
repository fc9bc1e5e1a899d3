"""Models of published runs, traced on the meta device."""

import dataclasses
import functools

import torch

from lightning_lm.models import GLU, Attention, Layer, TransformerConfig
from lightning_lm.models.summary import attention_shapes, flops_per_token
from lightning_lm.modules.activation_checkpointing import blocks_of
from lightning_lm.scaling.gpus import find_gpu
from lightning_lm.scaling.model_trace import trace_model
from lightning_lm.scaling.training_memory import StateBytes, Workload

H100_96 = dataclasses.replace(
    find_gpu("h100"), memory_bytes=95 * 2**30, memory_bytes_per_s=2.4e12, half_flops_per_s=(989.4e12 + 835.5e12) / 2
)
"""The H100 of torchtitan's measurements: 96 GB at 2.4 TB/s, limited to 500 W, its peak "between SXM and NVL"."""


def _config(num_layers, d_model, num_heads, num_kv_heads, hidden_size, vocab_size, *, olmo=False):
    mixer = Attention(num_heads=num_heads, num_kv_heads=num_kv_heads, qk_norm="full" if olmo else None)
    return TransformerConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        num_layers=num_layers,
        layers=Layer(mixer=mixer, ffn=GLU(hidden_size=hidden_size)),
        residual="reordered" if olmo else "pre",
    )


CONFIGS = {
    "Llama 3 8B": _config(32, 4096, 32, 8, 14_336, 128_256),
    "Llama 3 70B": _config(80, 8192, 64, 8, 28_672, 128_256),
    "Llama 3 405B": _config(126, 16_384, 128, 8, 53_248, 128_256),
    "OLMo 2 7B": _config(32, 4096, 32, 32, 11_008, 100_352, olmo=True),
    "OLMo 2 32B": _config(64, 5120, 40, 8, 27_648, 100_352, olmo=True),
}


@functools.cache
def _model(name, length):
    with torch.device("meta"):
        model = CONFIGS[name].build().to(torch.bfloat16)
    blocks = list(blocks_of(model))
    regions = [part for block in blocks for part in (block.mixer, block.ffn)]
    trace = trace_model(
        model, lambda model, ids: model.hidden(ids), context_length=length, blocks=blocks, regions=regions
    )
    return model, trace


def work_of(name, *, rows, micro_batches, length=8192, master_bytes=4, **options):
    """Return the work of a run with bfloat16 activations and AdamW."""
    model, trace = _model(name, length)
    config, parameters = CONFIGS[name], sum(parameter.numel() for parameter in model.parameters())
    block = master_bytes * sum(parameter.numel() for parameter in model.layers[0].parameters())
    mixer = config.layers.mixer
    head_dim = config.d_model // mixer.num_heads
    return Workload(
        trace=trace,
        whole=StateBytes(master_bytes * parameters, master_bytes * parameters, 8 * parameters),
        block_bytes=block,
        root_bytes=master_bytes * parameters - config.num_layers * block,
        num_layers=config.num_layers,
        d_model=config.d_model,
        vocab_size=config.vocab_size,
        rows=rows,
        micro_batches=micro_batches,
        element_bytes=2,
        model_flops=flops_per_token(model, length) * length,
        attention_flops=sum(4 * shape.width * shape.keys(length) for shape in attention_shapes(model)) * length,
        kv_bytes=2 * mixer.num_kv_heads * head_dim * 2 * length,
        **options,
    )
