"""Batches that lack labels or keys. The oracle of a loss is cross-entropy by torch on the targets written by hand."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_lm.data.batches import completed
from lightning_lm.errors import ConfigurationError
from lightning_lm.evals import evaluate_perplexity
from lightning_lm.models import TransformerConfig
from lightning_lm.modules import DPOModule, GRPOModule, KTOModule, PretrainModule, RewardModule, RolloutPlan, SFTModule
from lightning_lm.tokenizers import ByteTokenizer
from lightning_lm.types import IGNORE_INDEX

IDS = torch.randint(1, 50, (3, 9), generator=torch.Generator().manual_seed(0))
X = IGNORE_INDEX


def tiny():
    torch.manual_seed(0)
    return TransformerConfig(vocab_size=300, d_model=16, num_layers=1).build()


def expected(model, targets, **inputs):
    logits = model(IDS[:, :-1], **{name: value[:, :-1] for name, value in inputs.items()})
    return nn.functional.cross_entropy(logits.flatten(0, 1).double(), targets[:, 1:].flatten())


@pytest.mark.parametrize("kind", [PretrainModule, SFTModule])
def test_without_labels_every_token_is_a_target(kind, make_trainer):
    module = kind(tiny())
    wanted = expected(module.model, IDS)
    sums = module.training_loss({"input_ids": IDS})
    torch.testing.assert_close(sums.nll_sum / sums.num_tokens, wanted.detach(), rtol=0, atol=1e-5)
    evaluated = module.evaluate_batch({"input_ids": IDS})
    assert int(evaluated["num_tokens"]) == 3 * 8
    assert torch.equal(evaluated["target_ids"], IDS[:, 1:])
    torch.testing.assert_close(evaluated["nll_sum"] / 24, wanted.detach(), rtol=0, atol=1e-5)
    loader = DataLoader([{"input_ids": IDS}], batch_size=None)
    make_trainer(max_steps=1).fit(module, loader, loader)
    score = evaluate_perplexity(tiny(), [{"input_ids": IDS}])
    assert score.num_tokens == 24
    assert abs(score.nll_sum / 24 - float(wanted)) < 1e-5


@pytest.mark.parametrize("mask", ["attention_mask", "completion_mask", "assistant_masks"])
def test_tokens_that_a_mask_excludes_are_no_targets(mask):
    excluded = torch.ones_like(IDS)
    excluded[0, 5:] = 0
    labels = completed({"input_ids": IDS, mask: excluded})["labels"]
    assert torch.equal(labels, torch.where(excluded == 0, X, IDS))


def test_targets_do_not_cross_documents():
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]] * 3)
    labels = completed({"input_ids": IDS, "document_ids": documents})["labels"]
    wanted = IDS.clone()
    wanted[:, [3, 7]] = X
    assert torch.equal(labels, wanted)


def test_left_padding_changes_nothing():
    """Against the rows without it; the model would otherwise see the padding, and count positions from it."""
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.int64), IDS], dim=1)
    mask = (torch.arange(13) >= 4).long().expand(3, -1)
    for labels in ({}, {"labels": padded.masked_fill(mask == 0, X)}):
        module = PretrainModule(tiny())
        sums = module.training_loss({"input_ids": padded, "attention_mask": mask, **labels})
        wanted = module.training_loss({"input_ids": IDS})
        assert int(sums.num_tokens) == int(wanted.num_tokens) == 24
        torch.testing.assert_close(sums.nll_sum, wanted.nll_sum, rtol=0, atol=1e-4)


def test_a_whole_batch_is_taken_as_it_is():
    batch = {"input_ids": IDS, "labels": IDS}
    assert completed(batch) is batch


def reward_of(*, completions, **columns):
    return [0.0 for _ in completions]


PAIRS = {"input_ids": IDS, "labels": IDS, "lengths": torch.full((3,), 9)}


@pytest.mark.parametrize(
    ("make", "batch", "said"),
    [
        (lambda: PretrainModule(tiny()), {"ids": IDS}, "has ids, and PretrainModule needs input_ids, .*TextDataModule"),
        (lambda: SFTModule(tiny()), [IDS], "is a list, and SFTModule needs a mapping .*TokenBatch.*input_ids"),
        (lambda: SFTModule(tiny()), IDS, "is a Tensor, and SFTModule needs a mapping"),
        (
            lambda: DPOModule(tiny()),
            {"input_ids": IDS[:2]},
            "DPOModule needs labels, .*PairBatch.*PreferenceDataModule",
        ),
        (lambda: RewardModule(tiny()), {"input_ids": IDS[:2], "labels": IDS[:2]}, "RewardModule needs lengths"),
        (lambda: KTOModule(tiny()), {"input_ids": IDS, "labels": IDS}, "KTO needs mismatched rows"),
        (lambda: KTOModule(tiny()), {"input_ids": IDS}, "KTO needs mismatched rows"),
        (
            lambda: GRPOModule(tiny(), rewards=[reward_of], plan=RolloutPlan(samples_per_prompt=2)),
            {"prompt": ["1+1="]},
            "has prompt, and GRPOModule needs .*PromptBatch.*PromptDataModule",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_what_is_missing_is_named_with_what_came(make, batch, said, stage, make_trainer):
    module, loader = make(), DataLoader([batch], batch_size=None)
    module.tokenizer = ByteTokenizer()
    trainer = make_trainer(max_steps=1, limit_val_batches=1)
    with pytest.raises(ConfigurationError, match=said):
        trainer.fit(module, loader) if stage == "fit" else trainer.validate(module, loader)


@pytest.mark.parametrize("error", [KeyError("mine"), TypeError("mine"), AttributeError("mine")])
def test_errors_of_other_causes_stay_as_they_are(error, make_trainer):
    class Mine(PretrainModule):
        def training_loss(self, batch):
            raise error

    with pytest.raises(type(error), match="mine") as caught:
        make_trainer(max_steps=1).fit(Mine(tiny()), DataLoader([{"input_ids": IDS}], batch_size=None))
    assert caught.value is error
