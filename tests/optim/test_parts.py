"""Which parameters an optimizer part takes."""

import copy
import dataclasses
import inspect
import pickle

import pytest
import torch
from torch import nn

from lightning_lm.errors import ConfigurationError
from lightning_lm.models import PretrainedCheckpoint, parameter_roles
from lightning_lm.optim import SGD, AdamW, Muon, MuonOptimizer
from lightning_lm.parts import Part


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)


def names(optimizer: torch.optim.Optimizer) -> dict[str, list[str]]:
    return {group["name"]: group["param_names"] for group in optimizer.param_groups}


def build(part, model: nn.Module | None = None):
    model = model or Model()
    return part.build(model, parameter_roles(model))


def test_adamw_decays_all_but_vectors():
    optimizer = build(AdamW(weight_decay=0.2))
    assert names(optimizer) == {
        "adamw": ["embed.weight", "mix.weight", "head.weight"],
        "adamw_no_decay": ["mix.bias", "norm.weight", "norm.bias"],
    }
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert all(group["fused"] for group in optimizer.param_groups)


def test_roles_without_decay_can_be_chosen():
    optimizer = build(AdamW(no_decay=("vector", "embedding", "head")))
    assert names(optimizer)["adamw"] == ["mix.weight"]


def test_muon_takes_the_matrices():
    optimizer = build(Muon(lr=0.03, adamw=AdamW(lr=0.001)))
    assert isinstance(optimizer.children[0], MuonOptimizer)
    assert names(optimizer) == {
        "muon": ["mix.weight"],
        "adamw": ["embed.weight", "head.weight"],
        "adamw_no_decay": ["mix.bias", "norm.weight", "norm.bias"],
    }
    assert [group["lr"] for group in optimizer.param_groups] == [0.03, 0.001, 0.001]


def test_a_tied_head_is_trained_once_and_not_by_muon():
    model = Model()
    model.head.weight = model.embed.weight
    optimizer = build(Muon(), model)
    assert names(optimizer)["adamw"] == ["embed.weight"]


def test_sgd():
    assert set(names(build(SGD(weight_decay=0.1)))) == {"sgd", "sgd_no_decay"}


def test_frozen_parameters_are_left_out():
    model = Model()
    model.embed.requires_grad_(False)
    model.mix.requires_grad_(False)
    assert names(build(Muon(), model)) == {"adamw": ["head.weight"], "adamw_no_decay": ["norm.weight", "norm.bias"]}


def test_nothing_to_train_is_refused():
    with pytest.raises(ConfigurationError, match="unfreeze"):
        build(AdamW(), Model().requires_grad_(False))


@pytest.mark.parametrize("part", [AdamW(lr=1.0), SGD(), Muon(adamw=AdamW(lr=2.0))], ids=repr)
def test_survives_a_checkpoint(part):
    assert Part.from_dict(part.to_dict()) == part


@pytest.mark.parametrize("part", [AdamW, SGD, Muon])
def test_parameters_without_a_name_are_answered_with_what_to_write(part):
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigurationError, match=r" takes its settings by name \(lr=.*describes an optimizer"):
        part(model.parameters())
    copies = pickle.loads(pickle.dumps(part(lr=0.5))), copy.deepcopy(part(lr=0.5)), dataclasses.replace(part(), lr=0.5)
    assert all(one == part(lr=0.5) for one in copies)
    assert next(iter(inspect.signature(part).parameters)) == "lr"


def test_a_setting_beyond_the_one_that_is_needed_is_named():
    assert PretrainedCheckpoint("folder") == PretrainedCheckpoint(checkpoint="folder")
    assert Part.from_dict(PretrainedCheckpoint("folder").to_dict()) == PretrainedCheckpoint("folder")
    with pytest.raises(ConfigurationError, match=r"takes its settings by name \(.*got int without one"):
        PretrainedCheckpoint("folder", 128)
