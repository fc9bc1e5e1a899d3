"""Rows that ranks share, against the textbook formula in float64 and against training on one process."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule
from optimizer_runs import make_trainer, weights_of
from torch import distributed
from torch.utils.data import DataLoader

from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.context_parallel import context_parallel_attention, gather_sequence, shard_sequence
from lightning_lm.models import GLU, Attention, Layer, MoE, SinkAttention, TransformerConfig
from lightning_lm.modules import PretrainModule, SFTModule
from lightning_lm.optim import AdamW, Constant
from lightning_lm.strategies import ContextParallelStrategy

ROWS, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 24, 4, 2, 8


def textbook(query, key, value, *, document_ids, window, softcap, scale):
    """Softmax of all scores, with a loop over nothing and a mask for everything."""
    key, value = (x.repeat_interleave(query.size(1) // x.size(1), dim=1) for x in (key, value))
    scores = query @ key.mT * (scale or query.size(-1) ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    places = torch.arange(query.size(2))
    distance = places[:, None] - places
    seen = (distance >= 0) & (distance < (window or LENGTH + 1))
    if document_ids is not None:
        seen = seen & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ value


def inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(ROWS, heads, LENGTH, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    query, key, value, upstream = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return 4 * query, key, value, upstream  # large enough that single keys decide


DOCUMENTS = torch.tensor([[0] * 5 + [1] + [2] * 18, [0] * 24])


def shards(x, group):
    return shard_sequence(x.transpose(1, 2), group).transpose(1, 2)


def attend(dtype, options):
    group = distributed.group.WORLD
    *tensors, upstream = inputs(dtype)
    local = [shards(x, group).clone().requires_grad_() for x in tensors]
    mixed = context_parallel_attention(*local, group=group, **options)
    mixed.backward(shards(upstream, group))
    return [
        gather_sequence(x.transpose(1, 2), group).transpose(1, 2) for x in (mixed.detach(), *(x.grad for x in local))
    ]


OPTIONS = {
    "causal": {},
    "documents": {"document_ids": DOCUMENTS},
    "window": {"window": 5},
    "window of one": {"window": 1},
    "documents, window, softcap": {"document_ids": DOCUMENTS, "window": 7, "softcap": 3.0, "scale": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("size", "dtype", "tolerance"), [(2, torch.float64, 1e-12), (3, torch.float32, 2e-5)])
def test_forward_and_gradients_are_those_of_one_process(ranks, size, dtype, tolerance, options):
    *tensors, upstream = (x.double() for x in inputs(dtype))
    tensors = [x.requires_grad_() for x in tensors]
    complete = {"document_ids": None, "window": None, "softcap": None, "scale": None} | options
    mixed = textbook(*tensors, **complete)
    mixed.backward(upstream)
    expected = [mixed.detach(), *(x.grad for x in tensors)]
    for found in ranks(size).run(attend, dtype, options):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=tolerance)


def shard_and_gather(length):
    whole = torch.arange(ROWS * length).view(ROWS, length)
    mine = shard_sequence(whole, distributed.group.WORLD)
    return mine, torch.equal(gather_sequence(mine, distributed.group.WORLD), whole)


def test_every_rank_has_an_early_and_a_late_chunk(ranks):
    answers = ranks(2).run(shard_and_gather, 8)
    assert answers[0][0].tolist() == [[0, 1, 6, 7], [8, 9, 14, 15]]
    assert answers[1][0].tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]
    assert all(whole for _, whole in answers)


def refused():
    with pytest.raises(ValueError, match="Rows of 6 tokens cannot be cut into 4 equal chunks for 2 ranks"):
        shard_sequence(torch.zeros(1, 6), distributed.group.WORLD)


def test_rows_that_cannot_be_shared_evenly(ranks):
    ranks(2).run(refused)


# --- through a Trainer ---


def config(**options):
    pattern = (Layer(mixer=Attention(num_heads=4, num_kv_heads=2)), Layer(mixer=Attention(num_heads=4, window=6)))
    return TransformerConfig(vocab_size=31, d_model=24, num_layers=2, layers=pattern, context_length=32, **options)


def rows(packed, *, micro_batches=6, size=4):
    """Rows of 22 inputs, which is no multiple of 4, with few targets in the first half; the same on every process."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(micro_batches):
        ids = torch.randint(31, (size, 23), generator=generator)
        labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < torch.linspace(1, 0, 23), -100)
        documents = (torch.rand(ids.shape, generator=generator) < 0.2).cumsum(1)
        yield {"input_ids": ids, "labels": labels} | ({"document_ids": documents} if packed else {})


def train(context_parallel_size, kind, packed, options):
    torch.manual_seed(0)
    module = kind(config(), optimizer=AdamW(lr=1e-3, eps=1e-5), schedule=Constant(), **options)
    strategy = ContextParallelStrategy(context_parallel_size) if context_parallel_size else "auto"
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05, "log_every_n_steps": 3}
    trainer = make_trainer(strategy, max_epochs=1, num_sanity_val_steps=0, **settings)
    ranks = trainer.world_size // max(1, context_parallel_size)
    mine = slice(trainer.global_rank // max(1, context_parallel_size), None, ranks)
    batches = [{name: value[mine] for name, value in batch.items()} for batch in rows(packed)]
    trainer.fit(module, *(DataLoader(batches, batch_size=None) for _ in range(2)))
    assert "attend" not in vars(module.model.layers[0].mixer)
    return weights_of(module), module.last_metrics, dict(trainer.callback_metrics)


@pytest.mark.parametrize(
    ("size", "context_parallel_size", "kind", "packed", "options"),
    [
        (2, 2, PretrainModule, False, {}),
        (2, 2, PretrainModule, True, {"activation_checkpointing": "blocks"}),
        (2, 2, SFTModule, True, {}),
        (4, 2, PretrainModule, True, {}),
    ],
)
def test_training_is_that_of_one_process(ranks, size, context_parallel_size, kind, packed, options):
    wanted, metrics, logged = ranks(1).run(train, 0, kind, packed, options)[0]
    for found, found_metrics, found_logged in ranks(size).run(train, context_parallel_size, kind, packed, options):
        assert found_metrics == pytest.approx(metrics, rel=1e-5)
        assert float(found_logged["val/loss"]) == pytest.approx(float(logged["val/loss"]), rel=1e-5)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


class Foreign(LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        raise AssertionError

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_refused(module, size, message):
    trainer = make_trainer(ContextParallelStrategy(size), max_steps=1)
    with pytest.raises(ConfigurationError, match=message):
        trainer.fit(module, DataLoader([torch.ones(1)]))


def test_what_cannot_be_cut_is_refused(ranks):
    def small(layer):
        return TransformerConfig(vocab_size=31, d_model=16, num_layers=1, layers=layer)

    dropping = small(Layer(mixer=Attention(dropout=0.1)))
    for module, size, message in (
        (PretrainModule(config()), 3, "context_parallel_size=3 does not divide the 2 ranks"),
        (PretrainModule(dropping), 2, "cannot drop attention weights"),
        (PretrainModule(small(Layer(ffn=MoE(experts=GLU(hidden_size=16), num_experts=4)))), 2, "loads of experts"),
        (PretrainModule(small(Layer(mixer=SinkAttention(num_heads=2)))), 2, r"layers of Attention only.*SinkSelfAtt"),
        (Foreign(torch.nn.Linear(2, 2)), 2, "layers of Attention only"),
        (Foreign(config().build()), 2, "Foreign has no such 'loss'"),
    ):
        ranks(2).run(fit_refused, module, size, message)
