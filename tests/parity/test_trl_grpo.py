"""GRPO and its relatives beside TRL: the same loss, gradient and metrics on the same experience.

Where TRL is wrong, or means something else:

* Identical rewards. A group of eight times 0.7 teaches nothing, but its mean is rounded: TRL trains on the difference
  divided by the deviation of the rounding error (`test_identical_rewards`).
* Accumulated micro-batches. TRL's ``bnpo`` averages the means of micro-batches, however many tokens they have; here a
  step is a mean over its tokens however it is cut (`test_micro_batches`).
* The KL penalty. Without ``use_bias_correction_kl`` TRL differentiates the estimate k3, whose gradient is that of the
  forward KL; this is compared, with ``unbiased=False``. With it, ratio times k3 is differentiated, whose gradient is
  that of `KLPenalty` token by token: ``ratio * (log pi - log pi_ref)`` times that of ``log pi``. The value that it
  reports is weighted by the ratio, here it is k3 itself: the same where the ratio is one (`test_corrected_kl`).
* Answers that are masked, because they came to no end: TRL counts them as answers in ``grpo`` and ``dr_grpo``, here
  they count as little as they teach. All answers here have a token.
* Its ``epsilon_high`` of ``cispo`` is the largest weight, where the paper and `CISPO` have the distance from 1.
"""

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

import tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from lightning_lm.functional import (  # noqa: E402
    CISPO,
    GSPO,
    ClippedSurrogate,
    ConstantLength,
    GroupAdvantage,
    KLPenalty,
    RolloutTokenMean,
    SequenceMean,
    TokenMean,
)
from lightning_lm.models import load_huggingface  # noqa: E402
from lightning_lm.modules import GRPOModule, Objective, RolloutPlan  # noqa: E402
from lightning_lm.optim import SGD, Constant  # noqa: E402
from lightning_lm.types import IGNORE_INDEX  # noqa: E402

ROWS, PROMPT, ANSWER, VOCAB, PAD = 8, 5, 6, 40, 0
CASES = {
    "grpo": ({}, Objective(reduction=SequenceMean())),
    "bnpo": ({}, Objective(reduction=TokenMean())),
    "dapo": ({"epsilon_high": 0.28}, Objective(loss=ClippedSurrogate(clip_high=0.28), reduction=RolloutTokenMean())),
    "dr_grpo": ({}, Objective(reduction=ConstantLength(max_tokens=ANSWER))),
    "cispo": ({"epsilon_high": 1.3}, Objective(loss=CISPO(clip_high=0.3), reduction=RolloutTokenMean())),
    "grpo, one ratio a sequence": (
        {"importance_sampling_level": "sequence"},
        Objective(loss=GSPO(clip_low=0.2, clip_high=0.2), reduction=SequenceMean()),
    ),
    "grpo, dual clip": ({"delta": 1.4}, Objective(loss=ClippedSurrogate(dual_clip=1.4), reduction=SequenceMean())),
    "grpo, kl": (
        {"beta": 0.3, "use_bias_correction_kl": False},
        Objective(reduction=SequenceMean(), kl=KLPenalty(coefficient=0.3, unbiased=False)),
    ),
    "bnpo, entropy": ({"entropy_coef": 0.05}, Objective(reduction=TokenMean(), entropy_coefficient=0.05)),
}
TOLERANCE = {"rel": 1e-5, "abs": 1e-6}
"""Both work in float32 and sum some hundred terms in another order."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model."""
    torch.manual_seed(0)
    size = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**size, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    config.bos_token_id, config.pad_token_id, config.eos_token_id = None, PAD, 1
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def ours(folder):
    return load_huggingface(folder)


@pytest.fixture
def make_theirs(folder, tmp_path):
    def make(loss_type, *, reward=lambda completions, **_: [0.0] * len(completions), **settings):
        words = {"<pad>": PAD, "<eos>": 1} | {f"w{number}": number for number in range(2, VOCAB)}
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w2"))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        processing = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>")
        quiet = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True}
        size = {"num_generations": ROWS, "per_device_train_batch_size": ROWS, "max_completion_length": ANSWER}
        arguments = trl.GRPOConfig(output_dir=str(tmp_path / "trl"), loss_type=loss_type, **quiet, **size, **settings)
        data = datasets.Dataset.from_list([{"prompt": "w3 w4 w5"}] * ROWS)
        trainer = trl.GRPOTrainer(
            model=LlamaForCausalLM.from_pretrained(folder),
            reward_funcs=reward,
            args=arguments,
            train_dataset=data,
            processing_class=processing,
        )
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = arguments.gradient_accumulation_steps
        return trainer

    return make


@pytest.fixture
def experience():
    """Prompts of 1 to 5 tokens with answers of 1 to 6, and log-probabilities of older policies."""
    generator = torch.Generator().manual_seed(1)
    answers = torch.randint(1, ANSWER + 1, (ROWS,), generator=generator)
    prompts = torch.randint(1, PROMPT + 1, (ROWS,), generator=generator)
    answers[0], prompts[0] = ANSWER, PROMPT
    prompt_mask = torch.arange(PROMPT) >= PROMPT - prompts[:, None]  # on the left
    completion_mask = torch.arange(ANSWER) < answers[:, None]
    noise = 0.3 * torch.randn(2, ROWS, ANSWER, generator=generator)
    return {
        "prompt_ids": torch.randint(2, VOCAB, (ROWS, PROMPT), generator=generator).where(prompt_mask, PAD),
        "prompt_mask": prompt_mask.long(),
        "completion_ids": torch.randint(2, VOCAB, (ROWS, ANSWER), generator=generator).where(completion_mask, PAD),
        "completion_mask": completion_mask.long(),
        "advantages": torch.randn(ROWS, generator=generator),
        "noise": noise,
        "num_items_in_batch": completion_mask.sum(),
    }


def with_older_policies(trainer, experience):
    """Add log-probabilities near those of the policy, so that some ratios are clipped and some are not."""
    ids = torch.cat([experience["prompt_ids"], experience["completion_ids"]], 1)
    mask = torch.cat([experience["prompt_mask"], experience["completion_mask"]], 1)
    with torch.no_grad():
        logprobs = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, ANSWER)[0]
    old, reference = logprobs + experience["noise"]
    return experience | {"old_per_token_logps": old, "ref_per_token_logps": reference}


def as_rows(batch):
    """The same as a `types.ExperienceBatch`: answers follow their prompts, padding is on the right."""
    rows = {
        "input_ids": torch.full((ROWS, PROMPT + ANSWER), PAD),
        "labels": torch.full((ROWS, PROMPT + ANSWER), IGNORE_INDEX),
        "old_logprobs": torch.zeros(ROWS, PROMPT + ANSWER - 1),
        "reference_logprobs": torch.zeros(ROWS, PROMPT + ANSWER - 1),
        "advantages": batch["advantages"],
    }
    for row in range(ROWS):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        answer = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        start, end = len(prompt), len(prompt) + len(answer)
        rows["input_ids"][row, :end] = torch.cat([prompt, answer])
        rows["labels"][row, start:end] = answer
        for name, theirs in (("old_logprobs", "old_per_token_logps"), ("reference_logprobs", "ref_per_token_logps")):
            rows[name][row, start - 1 : end - 1] = batch[theirs][row, : len(answer)]
    return rows


def cut(batch, size):
    """Micro-batches of some rows."""
    for first in range(0, ROWS, size):
        of_rows = {
            name: value[first : first + size] for name, value in batch.items() if value.dim() and name != "noise"
        }
        yield {**{name: value for name, value in batch.items() if not value.dim()}, **of_rows}


def our_step(policy, objective, rows, tmp_path, *, micro_batch=ROWS):
    """Train one step that moves nothing, so that the gradients of the window can be looked at."""
    module = GRPOModule(
        policy,
        rewards=[lambda completions, **_: [0.0] * len(completions)],
        plan=RolloutPlan(samples_per_prompt=ROWS, max_new_tokens=ANSWER),
        objective=objective,
        optimizer=SGD(lr=0.0, momentum=0.0),
        schedule=Constant(),
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=1,
        accumulate_grad_batches=ROWS // micro_batch,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=tmp_path,
    )
    per_row = (rows["labels"] != IGNORE_INDEX).sum().item() / ROWS
    parts = [{**part, "tokens_per_row": per_row} for part in cut(rows, micro_batch)]
    trainer.fit(module, DataLoader(parts, batch_size=None))
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def norm(model):
    return torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()]).item()


@pytest.mark.parametrize("name", CASES)
def test_loss_gradient_and_metrics(make_theirs, ours, experience, tmp_path, name):
    settings, objective = CASES[name]
    trainer = make_theirs(name.partition(",")[0], **settings)
    batch = with_older_policies(trainer, experience)
    wanted = trainer.compute_loss(trainer.model, batch)
    wanted.backward()
    found = our_step(ours, objective, as_rows(batch), tmp_path)
    theirs = trainer.model
    assert found["train/loss"] == pytest.approx(wanted.item(), **TOLERANCE)
    assert norm(ours) == pytest.approx(norm(theirs), **TOLERANCE)
    for mine, other in ((ours.head, theirs.lm_head), (ours.embed, theirs.model.embed_tokens)):
        torch.testing.assert_close(mine.weight.grad, other.weight.grad, rtol=1e-4, atol=1e-6)
    metrics = {key: values[-1] for key, values in trainer._metrics["train"].items()}
    shared = {key for key in metrics if f"train/{key}" in found}
    assert "entropy" in shared
    assert found["train/clip_ratio/region_mean"] > 0.05
    assert "kl" in shared or "kl" not in name
    for key in shared:
        if "sequence" in name and key.startswith("clip_ratio"):
            continue  # TRL counts answers, here tokens are counted whatever their ratio is
        assert found[f"train/{key}"] == pytest.approx(metrics[key], **TOLERANCE), key


@pytest.mark.parametrize("fresh", [False, True])
def test_corrected_kl(make_theirs, ours, experience, tmp_path, fresh):
    """A clip so wide that no token's gradient is lost, and a penalty that outweighs the rest."""
    wide = {"epsilon": 10.0, "epsilon_high": 10.0}
    trainer = make_theirs("grpo", beta=2.0, use_bias_correction_kl=True, **wide)
    batch = with_older_policies(trainer, experience)
    if fresh:
        batch["old_per_token_logps"] = batch["old_per_token_logps"] - experience["noise"][0]
    wanted = trainer.compute_loss(trainer.model, batch)
    wanted.backward()
    loss = ClippedSurrogate(clip_low=10.0, clip_high=10.0)
    objective = Objective(loss=loss, reduction=SequenceMean(), kl=KLPenalty(coefficient=2.0))
    found = our_step(ours, objective, as_rows(batch), tmp_path)
    for mine, other in (
        (ours.head, trainer.model.lm_head),
        (ours.embed, trainer.model.model.embed_tokens),
        (ours.layers[0].mixer.q, trainer.model.model.layers[0].self_attn.q_proj),
    ):
        torch.testing.assert_close(mine.weight.grad, other.weight.grad, rtol=1e-4, atol=1e-6)
    assert norm(ours) == pytest.approx(norm(trainer.model), **TOLERANCE)
    assert (found["train/loss"] == pytest.approx(wanted.item(), **TOLERANCE)) == fresh


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(make_theirs, scale):
    trainer = make_theirs("dapo", scale_rewards=scale, reward=lambda completions, **_: REWARDS)
    batch = trainer._generate_and_score_completions([{"prompt": "w3 w4 w5"}] * ROWS)
    ours = GroupAdvantage(scale=scale)(torch.tensor([REWARDS]))
    torch.testing.assert_close(ours.flatten(), batch["advantages"], rtol=1e-5, atol=1e-6)


REWARDS = [0.0, 1.0, 0.25, 0.5, -1.0, 2.0, 0.1, 0.7]


def test_identical_rewards(make_theirs):
    trainer = make_theirs("dapo", reward=lambda completions, **_: [0.7] * len(completions))
    theirs = trainer._generate_and_score_completions([{"prompt": "w3 w4 w5"}] * ROWS)["advantages"]
    assert theirs.abs().min() > 1e-4  # all of one sign: the rounding error of the mean
    assert not GroupAdvantage()(torch.full((1, ROWS), 0.7)).any()


def test_micro_batches(make_theirs, ours, experience, tmp_path):
    whole, pieces = make_theirs("bnpo"), make_theirs("bnpo", gradient_accumulation_steps=4)
    batch = with_older_policies(whole, experience)
    whole.compute_loss(whole.model, batch).backward()
    for part in cut(batch, 2):
        pieces.compute_loss(pieces.model, part).backward()
    our_step(ours, Objective(reduction=TokenMean()), as_rows(batch), tmp_path, micro_batch=2)
    wanted = whole.model.lm_head.weight.grad
    torch.testing.assert_close(ours.head.weight.grad, wanted, rtol=1e-4, atol=1e-6)
    assert (pieces.model.lm_head.weight.grad - wanted).norm() > 0.1 * wanted.norm()
