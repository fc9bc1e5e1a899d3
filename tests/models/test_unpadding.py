"""Padded rows that are read without padding and common prefixes: outputs and gradients are those of each row alone."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lm.models import (
    GLU,
    MLP,
    Attention,
    Layer,
    LearnedPositions,
    Rope,
    TransformerConfig,
    TransformersModel,
)
from lightning_lm.models.unpadding import SHORTEST_PREFIX, _common_prefixes, outputs_at
from lightning_lm.modules.activation_checkpointing import recompute_blocks
from lightning_lm.protocols import is_language_model

VOCAB, WIDTH = 31, 24


def padded(rows: list[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and the mask of wanted positions: from the given column of each row to its end."""
    width = max(len(row) for row, _ in rows)
    ids, wanted = torch.full((len(rows), width), 9), torch.zeros(len(rows), width, dtype=torch.bool)
    for index, (row, first) in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
        wanted[index, first : len(row)] = True
    return ids, wanted


def completions(prompts, lengths, *, samples=3, seed=0):
    """Rows of completions to prompts of these lengths, shuffled."""
    generator = torch.Generator().manual_seed(seed)

    def text(length):
        return torch.randint(VOCAB, (length,), generator=generator).tolist()

    sizes, rows = itertools.cycle(lengths), []
    for prompt in map(text, prompts):
        rows += [(prompt + text(next(sizes)), max(len(prompt) - 1, 0)) for _ in range(samples)]
    return [rows[place] for place in torch.randperm(len(rows), generator=generator).tolist()]


REPEATED = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
CASES = {
    "prompts of one length": completions([7, 7, 7], [6, 3, 1]),
    "ragged prompts": completions([9, 4, 12, 7], [5, 2, 6, 4]),
    "no prompts": completions([0, 0, 0, 0], [1, 2, 11], samples=1),
    "one much longer": completions([5, 5, 5, 5], [2], samples=1) + completions([2], [22], samples=1),
    "equal completions": [(REPEATED, 4), (REPEATED, 4), (REPEATED[:8], 2)],
    "one continues another": [(REPEATED[:6], 5), (REPEATED, 5)],
    "nothing wanted of one": [(REPEATED, 10), ([*REPEATED[:7], 8], 6), (REPEATED[:5], 3)],
    "a single row": completions([5], [6], samples=1),
    "rows of one token": [([3], 0), ([4], 0), ([3], 0)],
}


def own(config=None, **attention) -> nn.Module:
    torch.manual_seed(0)
    layers = (
        Layer(mixer=Attention(num_heads=4, **attention), ffn=GLU()),
        Layer(mixer=Attention(num_heads=4, rope=attention.get("rope", Rope())), ffn=MLP()),
    )
    options = {"vocab_size": VOCAB, "d_model": 32, "num_layers": 2, "layers": layers, "context_length": WIDTH}
    return spread_out(TransformerConfig(**options | (config or {})).build())


def spread_out(model: nn.Module) -> nn.Module:
    """Make predictions far from uniform, in float64."""
    for parameter in model.double().eval().parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def of_transformers() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return TransformersModel(spread_out(LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes))))


class GivesLogits(nn.Module):
    """A user's model that shows no hidden states, and keeps documents apart."""

    def __init__(self):
        super().__init__()
        self.inner = own()

    def forward(self, input_ids, position_ids=None, document_ids=None):
        return self.inner(input_ids, position_ids=position_ids, document_ids=document_ids)


class TakesIdsOnly(nn.Module):
    """A user's model that cannot be told of documents."""

    def __init__(self):
        super().__init__()
        self.inner = own()

    def forward(self, ids):
        return self.inner(ids)


class IgnoresDocuments(nn.Module):
    """A user's model that takes document ids and does nothing with them."""

    def __init__(self):
        super().__init__()
        self.inner = own()

    def forward(self, input_ids, document_ids=None):
        return self.inner(input_ids)


MODELS = {
    "rope": own,
    "grouped heads": lambda: own(num_kv_heads=2, qk_norm="head"),
    "window and soft cap": lambda: own(window=3, softcap=5.0),
    "learned positions": lambda: own({"positions": LearnedPositions()}, rope=None),
    "of transformers": of_transformers,
    "gives logits": GivesLogits,
    "takes ids only": TakesIdsOnly,
    "ignores documents": IgnoresDocuments,
}


def fed(model: nn.Module) -> list[int]:
    """Return a list that grows by the positions of each forward pass."""
    embedding = next(part for part in model.modules() if isinstance(part, nn.Embedding))
    counts: list[int] = []
    embedding.register_forward_hook(lambda module, args, output: counts.append(args[0].numel()))
    return counts


def alone(model, ids, wanted):
    """Read each row by itself, without padding."""
    found = []
    for row, mask in zip(ids, wanted, strict=True):
        places = mask.nonzero().flatten()
        if len(places):
            row = row[None, : int(places.max()) + 1]
            found.append((model.hidden(row) if is_language_model(model) else model(row))[0, places])
    return torch.cat(found)


@pytest.mark.filterwarnings("ignore:.*rows are padded")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", MODELS)
def test_outputs_and_gradients_are_those_of_each_row_alone(kind, case):
    model, (ids, wanted) = MODELS[kind](), padded(CASES[case])
    found, right = outputs_at(model, {"input_ids": ids}, wanted), alone(model, ids, wanted)
    weights = torch.randn(right.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert found.shape == right.shape
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-10)
    parameters = [parameter for name, parameter in model.named_parameters() if "lm_head" not in name]
    gradients = (
        torch.autograd.grad((weights * output).sum(), parameters, allow_unused=True) for output in (found, right)
    )
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def distinct(rows) -> int:
    """Count the tokens of the rows' prefix tree, of which each row needs all but what nobody wants."""
    return len({tuple(row[:end]) for row, first in rows if first < len(row) for end in range(1, len(row) + 1)})


@pytest.mark.parametrize("attention", [{}, {"window": 5}])
def test_a_pair_costs_its_distinct_tokens(attention):
    rows = completions([30, 8, 17, 60, 25], [9, 40, 14, 22], samples=2)
    (ids, wanted), model = padded(rows), own({"context_length": 128}, **attention)
    counts = fed(model)
    outputs_at(model, {"input_ids": ids, "position_ids": torch.arange(ids.shape[1]).expand_as(ids)}, wanted)
    assert len(counts) == 1
    assert counts[0] <= 1.01 * distinct(rows) < 0.5 * ids.numel()


@pytest.mark.parametrize("kind", ["of transformers", "gives logits"])
def test_other_models_get_packed_rows_no_longer_than_the_longest(kind):
    rows = completions([3] * 6, [17, 2, 5, 4, 8, 3], samples=1)
    (ids, wanted), model = padded(rows), MODELS[kind]()
    outputs_at(model, {"input_ids": ids}, wanted)  # with the trial
    counts = fed(model)
    outputs_at(model, {"input_ids": ids}, wanted)
    assert counts == [3 * ids.shape[1]]  # the lengths are 20, 5, 8, 7, 11 and 6


def test_a_model_that_mixes_documents_is_named_once():
    ids, wanted = padded(CASES["ragged prompts"])

    class Plain(TakesIdsOnly):
        pass

    with pytest.warns(UserWarning, match="Plain does not take document_ids.*rows are padded"):
        outputs_at(Plain(), {"input_ids": ids}, wanted)
    with warnings.catch_warnings(action="error"):
        outputs_at(Plain(), {"input_ids": ids}, wanted)  # a reference is a copy of the policy


def shares(model, case="prompts of one length") -> bool:
    ids, wanted = padded(CASES[case])
    counts = fed(model)
    outputs_at(model, {"input_ids": ids}, wanted)
    return counts[-1] < int(sum(mask.nonzero().max() + 1 for mask in wanted if mask.any()))


@pytest.mark.filterwarnings("ignore:.*rows are padded")
def test_prefixes_are_shared_only_by_layers_that_compute_them_exactly():
    assert shares(own())
    assert shares(own().train())
    assert not shares(own({"dropout": 0.1}).train())  # each row drops other activations
    assert not shares(own(dropout=0.1).train())
    assert shares(own(dropout=0.1))
    recomputing = own().train()
    recompute_blocks(recomputing, "full")
    assert shares(recomputing)
    swapped = own()
    swapped.layers[1].mixer.forward = swapped.layers[1].mixer.forward
    assert not shares(swapped)
    other = own()
    other.layers[0].__class__ = type("Other", (type(other.layers[0]),), {"forward": lambda self, x, *rest: x})
    assert not shares(other)


@pytest.mark.filterwarnings("ignore:.*rows are padded")
def test_rows_of_their_own_form_are_read_as_they_are():
    ids, wanted = padded(CASES["ragged prompts"])
    compiled = own()
    compiled.layers[0]._compiled_call_impl = compiled.layers[0]._call_impl  # as Module.compile sets it
    counts = fed(compiled)
    outputs_at(compiled, {"input_ids": ids}, wanted)
    assert counts == [ids.numel()]
    for name, values in (("document_ids", torch.zeros_like(ids)), ("position_ids", torch.ones_like(ids))):
        model = own()
        counts = fed(model)
        outputs_at(model, {"input_ids": ids, name: values}, wanted)
        assert counts == [ids.numel()]


def common(one, other) -> int:
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b or a < 0), len(one))


def most_saved(rows) -> int:
    """Try all ways to cut sorted rows into groups whose first row is read whole."""
    best = 0
    for cuts in itertools.product([False, True], repeat=len(rows) - 1):
        first, saved = 0, 0
        for row, begins in enumerate(cuts, 1):
            first = row if begins else first
            shared = 0 if begins else common(rows[first], rows[row])
            saved += shared if shared >= SHORTEST_PREFIX else 0
        best = max(best, saved)
    return best


def test_groups_of_rows_save_the_most_tokens():
    generator = np.random.default_rng(0)
    for _ in range(20):
        text = generator.integers(0, 2, (6, 9))
        text = np.where(np.arange(9) < generator.integers(0, 10, (6, 1)), text, -1)
        leaders, shared = _common_prefixes(text)
        for row, (leader, prefix) in enumerate(zip(leaders, shared, strict=True)):
            assert (text[row, :prefix] == text[leader, :prefix]).all()
            assert leader == row or shared[leader] == 0
        assert shared.sum() == most_saved(sorted(text.tolist()))
