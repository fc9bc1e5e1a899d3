"""Recomputed activations: the same gradients from less memory, under the same names."""

import copy
import dataclasses

import pytest
import torch

from lightning_lm.modules import PretrainModule
from lightning_lm.modules.activation_checkpointing import blocks_of, recompute_blocks


def kept_bytes(model, ids) -> int:
    """Distinct bytes that autograd keeps between the passes."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        torch.manual_seed(1)
        loss = model(ids).square().mean()
    loss.backward()
    return sum(kept.values())


def built(config):
    torch.manual_seed(0)
    return dataclasses.replace(config, dropout=0.2, num_layers=4).build()


@pytest.mark.parametrize("what", ["blocks", "ops"])
def test_the_same_gradients_from_less_memory(config, what):
    ids = torch.randint(31, (8, 8), generator=torch.Generator().manual_seed(0))
    plain, lean = built(config), built(config)
    recompute_blocks(lean, what)
    assert list(plain.state_dict()) == list(lean.state_dict())
    assert kept_bytes(lean, ids) < (0.5 if what == "blocks" else 0.9) * kept_bytes(plain, ids)
    for mine, other in zip(lean.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


def test_a_copy_recomputes_with_its_own_weights(config):
    ids = torch.arange(8)[None]
    model = built(config)
    recompute_blocks(model, "blocks")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for param in twin.layers.parameters():
            param.zero_()
    twin(ids).sum().backward()
    assert all(param.grad is None for param in model.parameters())
    assert twin.layers[0].mixer.q.weight.grad is not None


def test_generation_is_left_alone(config):
    plain, lean = built(config).eval(), built(config).eval()
    recompute_blocks(lean, "blocks")
    ids = torch.arange(6)[None]
    cache = lean.make_cache(1, 8)
    assert torch.equal(lean(ids, cache=cache), plain(ids, cache=plain.make_cache(1, 8)))
    assert cache.length == 6


def test_only_the_outermost_lists_hold_layers():
    inner = torch.nn.ModuleList([torch.nn.Linear(1, 1)])
    block = torch.nn.ModuleDict({"experts": inner})
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ModuleList([block]))
    assert list(blocks_of(model)) == [block]


@pytest.mark.parametrize("what", ["none", "blocks", "ops"])
def test_in_training(config, row_data, make_trainer, what):
    torch.manual_seed(0)
    module = PretrainModule(dataclasses.replace(config, dropout=0.2), activation_checkpointing=what)
    make_trainer(max_steps=2, limit_val_batches=0).fit(module, datamodule=row_data())
    torch.manual_seed(0)
    plain = PretrainModule(dataclasses.replace(config, dropout=0.2))
    make_trainer(max_steps=2, limit_val_batches=0).fit(plain, datamodule=row_data())
    for mine, other in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, other)
