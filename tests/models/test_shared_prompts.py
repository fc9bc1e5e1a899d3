"""Prompts that are read once for all their answers: scores and gradients are those of reading every row whole."""

import pytest
import torch

from lightning_lm.models import GLU, MLP, Attention, Layer, TransformerConfig
from lightning_lm.models.prefix_sharing import completion_hidden_states
from lightning_lm.modules.token_losses import token_scores
from lightning_lm.types import IGNORE_INDEX

VOCAB, WIDTH = 31, 24


def rows_of(prompts, answers, *, samples=6, dull=()):
    """Groups of answers, shuffled and padded on the right; nothing is learned from some."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([length for length in prompts for _ in range(samples)])
    rows = len(lengths)
    ends = lengths + torch.tensor([answers[row % len(answers)] for row in range(rows)])
    numbers = torch.arange(rows) // samples
    texts = torch.randint(VOCAB, (len(prompts), WIDTH), generator=generator)
    ids = torch.randint(VOCAB, (rows, int(ends.max())), generator=generator)
    columns = torch.arange(ids.shape[1])
    ids = torch.where(columns < lengths[:, None], texts[numbers, : ids.shape[1]], ids)
    ids = ids.masked_fill(columns >= ends[:, None], 0)
    labels = ids.masked_fill((columns < lengths[:, None]) | (columns >= ends[:, None]), IGNORE_INDEX)
    labels[list(dull)] = IGNORE_INDEX
    order = torch.randperm(rows, generator=generator)
    whole = {"input_ids": ids, "labels": labels, "prompt_numbers": numbers + 5, "prompt_lengths": lengths}
    return {name: values[order] for name, values in whole.items()}


def model_of(**attention):
    torch.manual_seed(0)
    layers = (
        Layer(mixer=Attention(num_heads=4, **attention), ffn=GLU()),
        Layer(mixer=Attention(num_heads=4), ffn=MLP()),
    )
    config = TransformerConfig(vocab_size=VOCAB, d_model=32, num_layers=2, layers=layers, context_length=WIDTH)
    model = config.build().double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # far from uniform predictions
    return model


def features_of(model, batch):
    return completion_hidden_states(model, batch, batch["labels"][:, 1:] != IGNORE_INDEX)


CASES = {
    "prompts of one length": ([7, 7, 7], [6, 3, 1]),
    "ragged prompts": ([9, 4, 1, 7], [5, 2, 6, 4]),
    "answers of one token": ([8, 5], [1]),
    "an empty answer": ([8, 8], [0, 3]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "attention", [{}, {"num_kv_heads": 2, "qk_norm": "head"}, {"window": 3, "softcap": 5.0}, {"rope": None}]
)
def test_scores_and_gradients_are_those_of_whole_rows(case, attention):
    prompts, answers = CASES[case]
    batch, model, found = rows_of(prompts, answers, dull=(1, 8)), model_of(**attention), {}
    assert features_of(model, batch) is not None
    weights = torch.randn(batch["labels"][:, 1:].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name, rows in (("shared", batch), ("whole", {key: batch[key] for key in ("input_ids", "labels")})):
        scores = token_scores(model, rows, temperature=0.7, entropy_gradient=True)
        gradients = torch.autograd.grad(
            (weights * (scores.logprobs + 0.1 * scores.entropies)).sum(), model.parameters()
        )
        found[name] = [*scores, *gradients]
    assert found["whole"][0].abs().sum() > 1
    for shared, whole in zip(found["shared"], found["whole"], strict=True):
        assert (shared - whole).norm() <= 1e-6 * whole.norm()


def test_a_prompt_is_read_once():
    batch, model, seen = rows_of([9, 9, 9], [4], samples=8), model_of(), []
    model.embed.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
    with torch.no_grad():
        token_scores(model, batch)
    assert seen == [(3, 9), (24, 3)]


def test_rows_are_read_whole_where_sharing_is_not_the_same_or_saves_little():
    batch, model = rows_of([7, 7], [4]), model_of()
    assert features_of(model, batch) is not None
    alone = {**batch, "prompt_numbers": torch.arange(12)}
    assert features_of(model, alone) is None
    assert features_of(model, {name: batch[name] for name in ("input_ids", "labels")}) is None
    assert features_of(model, {**batch, "labels": torch.full_like(batch["labels"], IGNORE_INDEX)}) is None
    assert features_of(torch.nn.Sequential(model), batch) is None
    assert features_of(model.train(), batch) is None  # it may drop, or recompute, activations
    assert features_of(torch.nn.Linear(2, 2), batch) is None


def test_layers_that_were_exchanged_read_rows_whole():
    model = model_of()
    mixer = model.layers[1].mixer
    mixer.__class__ = type("Exchanged", (type(mixer),), {})
    assert features_of(model, rows_of([7, 7], [4])) is None
