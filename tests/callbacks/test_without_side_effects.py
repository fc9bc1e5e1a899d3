"""What happens aside leaves no trace."""

import pytest
import torch
from torch import nn

from lightning_lm.callbacks.hooks import without_side_effects


def test_modes_random_state_and_gradients_are_given_back():
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Linear(3, 3), nn.Dropout()))
    module[1].eval()
    before = [part.training for part in module.modules()]
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    with without_side_effects(module, torch.device("cpu")):
        assert not any(part.training for part in module.modules())
        torch.rand(7)
        assert not module(torch.ones(1, 3)).requires_grad
    assert torch.equal(torch.rand(4), expected)
    assert [part.training for part in module.modules()] == before
    assert torch.is_grad_enabled()


def test_also_after_an_exception():
    module = nn.Dropout()
    with pytest.raises(RuntimeError, match="stop"), without_side_effects(module, torch.device("cpu")):
        raise RuntimeError("stop")
    assert module.training
