"""DPO and its family beside TRL: the same loss, gradient and metrics on the same batch.

Where TRL differs:

* At the start every pair is tied. TRL counts ties as lost, so its ``rewards/accuracies`` begins at 0; here they count
  one half (`test_a_tie_counts_one_half`).
* Its ``sft`` term is a mean over the tokens of a micro-batch: how a batch is cut changes the gradient. `ChosenNLL` is a
  mean over the tokens of each answer, so it is not compared.
* It has no label smoothing for ``sigmoid``; that of `Sigmoid` is tested in tests/functional/test_preference.py.
"""

import copy
import json
import math

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

import tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from lightning_lm.data import TokenizerTemplate, encode_preference  # noqa: E402
from lightning_lm.functional import (  # noqa: E402
    IPO,
    NCA,
    APODown,
    APOZero,
    Hinge,
    Robust,
    Sigmoid,
    WeightedLosses,
)
from lightning_lm.models import load_huggingface  # noqa: E402
from lightning_lm.modules import DPOModule  # noqa: E402
from lightning_lm.optim import SGD, Constant  # noqa: E402
from lightning_lm.tokenizers import BPETokenizer, PretrainedTokenizer  # noqa: E402

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SAID = [
    ("How are you?", "Well, thank you.", "Who?"),
    ("12 + 34", "46", "46 or 47, who can say"),
    ("Name a colour. ", "Blue is one, red another.", "No."),
]
RECORDS = [
    {
        "prompt": [{"role": "user", "content": asked}],
        "chosen": [{"role": "assistant", "content": good}],
        "rejected": [{"role": "assistant", "content": bad}],
    }
    for asked, good, bad in SAID
]
LOSSES = {
    "sigmoid": Sigmoid(beta=0.3),
    "sigmoid_norm": Sigmoid(beta=0.3, length_normalize=True),
    "ipo": IPO(beta=0.3),
    "hinge": Hinge(beta=0.3),
    "robust": Robust(beta=0.3, flip_rate=0.2),
    "nca_pair": NCA(beta=0.3),
    "apo_zero": APOZero(beta=0.3),
    "apo_down": APODown(beta=0.3),
}
TOLERANCE = {"rel": 1e-4, "abs": 1e-5}
"""Both work in float32, and log-ratios are small differences of log-probabilities near -100 nats."""


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text for said in SAID for text in said] * 5
    definition = BPETokenizer.train(texts, 300, special_tokens=SPECIAL, show_progress=False).to_files()[
        "tokenizer.json"
    ]
    return PretrainedTokenizer(definition, config=json.dumps({"eos_token": "<|im_end|>", "chat_template": TEMPLATE}))


@pytest.fixture(scope="module")
def models(tokenizer):
    """A policy, and a reference that it has moved away from."""
    torch.manual_seed(0)
    size = {"vocab_size": tokenizer.vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**size, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    config.bos_token_id = config.pad_token_id = config.eos_token_id = None
    policy = LlamaForCausalLM(config)
    reference = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return policy, reference


@pytest.fixture
def ours(models, tmp_path):
    """The same two models."""
    for name, model in zip(("policy", "reference"), models, strict=True):
        model.save_pretrained(tmp_path / name)
    return load_huggingface(tmp_path / "policy"), load_huggingface(tmp_path / "reference")


@pytest.fixture
def make_theirs(models, tokenizer, tmp_path):
    def make(reference, **settings):
        inner = tokenizers.Tokenizer.from_str(tokenizer.to_files()["tokenizer.json"])
        processing = PreTrainedTokenizerFast(
            tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
        )
        quiet = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True}
        arguments = trl.DPOConfig(output_dir=str(tmp_path / "trl"), beta=0.3, **quiet, **settings)
        data = datasets.Dataset.from_list(RECORDS)
        policy = copy.deepcopy(models[0])
        return trl.DPOTrainer(
            model=policy, ref_model=reference, args=arguments, train_dataset=data, processing_class=processing
        )

    return make


def their_step(trainer):
    """Return their loss, gradients and metrics, and the batch as a `types.PairBatch`."""
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(len(RECORDS))])
    policy = trainer.model.train()
    loss = trainer.compute_loss(policy, dict(batch))
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    gradients = {"head": policy.lm_head.weight.grad, "embed": policy.model.embed_tokens.weight.grad}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    rows = {"input_ids": batch["input_ids"], "labels": labels, "margin": torch.zeros(len(RECORDS))}
    return loss.item(), norm(policy), gradients, metrics, rows


def our_step(policy, reference, loss, rows, tmp_path):
    """Train one step that moves nothing, so that the gradients of the window can be looked at."""
    module = DPOModule(policy, loss=loss, optimizer=SGD(lr=0.0, momentum=0.0), schedule=Constant())
    module.configure_model()
    module.reference.model.load_state_dict(reference.state_dict())
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader([rows], batch_size=None))
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def norm(model):
    return torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()]).item()


def test_the_same_tokens(make_theirs, models, tokenizer):
    for record, theirs in zip(RECORDS, make_theirs(models[1]).train_dataset, strict=True):
        pair = encode_preference(record, tokenizer, TokenizerTemplate(), 100)
        end = tokenizer.encode("\n")  # a template writes it behind the last turn; TRL learns it, nobody waits for it
        assert theirs["prompt_ids"] == list(pair.prompt_ids)
        assert theirs["chosen_ids"] == [*pair.chosen_ids, *end]
        assert theirs["rejected_ids"] == [*pair.rejected_ids, *end]


@pytest.mark.parametrize("name", [*LOSSES, "sigmoid and ipo"])
def test_loss_gradient_and_metrics(make_theirs, models, ours, tmp_path, name):
    if name in LOSSES:
        loss, settings = LOSSES[name], {"loss_type": [name]}
    else:
        loss = WeightedLosses(losses=(LOSSES["sigmoid"], LOSSES["ipo"]), weights=(0.8, 0.3))
        settings = {"loss_type": ["sigmoid", "ipo"], "loss_weights": [0.8, 0.3]}
    smoothing = {"label_smoothing": 0.2} if name == "robust" else {}
    wanted, wanted_norm, gradients, metrics, rows = their_step(make_theirs(models[1], **settings, **smoothing))
    policy, reference = ours
    found = our_step(policy, reference, loss, rows, tmp_path)
    assert found["train/loss"] == pytest.approx(wanted, **TOLERANCE)
    assert norm(policy) == pytest.approx(wanted_norm, **TOLERANCE)
    for mine, other in ((policy.head, gradients["head"]), (policy.embed, gradients["embed"])):
        torch.testing.assert_close(mine.weight.grad, other, rtol=1e-4, atol=1e-6)
    shared = {metric for metric in metrics if f"train/{metric}" in found}
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "entropy"} <= shared
    assert {"logps/chosen", "logps/rejected"} <= shared
    for metric in shared - {"num_tokens"}:
        assert found[f"train/{metric}"] == pytest.approx(metrics[metric], **TOLERANCE), metric


def test_a_tie_counts_one_half(make_theirs, models, ours, tmp_path):
    loss, _, _, metrics, rows = their_step(make_theirs(copy.deepcopy(models[0])))
    found = our_step(ours[0], copy.deepcopy(ours[0]), Sigmoid(beta=0.3), rows, tmp_path)
    assert found["train/loss"] == pytest.approx(loss) == pytest.approx(math.log(2))
    assert metrics["rewards/accuracies"] == 0.0
    assert found["train/rewards/accuracies"] == 0.5
