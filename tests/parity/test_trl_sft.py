"""Supervised fine-tuning beside TRL: the same ids and labels, loss, gradient and metrics on the same batch.

Where TRL differs: it averages metrics over micro-batches whatever their tokens (`_metrics` sums means and divides by
their number), so only single batches are compared here; means over tokens are tested in tests/modules/test_sft.py.
"""

import json

import pytest
import torch

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

import tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from lightning_lm.data import TokenizerTemplate, encode_example  # noqa: E402
from lightning_lm.models import load_huggingface  # noqa: E402
from lightning_lm.modules import DFT, NLL  # noqa: E402
from lightning_lm.tokenizers import BPETokenizer, PretrainedTokenizer  # noqa: E402

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SAID = [("How are you?", "Well, thank you."), ("12 + 34", "46"), ("Name a colour. ", "Blue is one, red another.")]
RECORDS = [
    {"prompt": [{"role": "user", "content": asked}], "completion": [{"role": "assistant", "content": answer}]}
    for asked, answer in SAID
]
TOLERANCE = {"rel": 1e-5}
"""Both work in float32 and sum some hundred terms in another order."""


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text for pair in SAID for text in pair] * 5
    definition = BPETokenizer.train(texts, 300, special_tokens=SPECIAL, show_progress=False).to_files()[
        "tokenizer.json"
    ]
    return PretrainedTokenizer(definition, config=json.dumps({"eos_token": "<|im_end|>", "chat_template": TEMPLATE}))


@pytest.fixture(scope="module")
def theirs(tokenizer):
    torch.manual_seed(0)
    size = {"vocab_size": tokenizer.vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**size, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    config.bos_token_id = config.pad_token_id = config.eos_token_id = None
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return load_huggingface(folder)


@pytest.fixture
def make_trainer(theirs, tokenizer, tmp_path):
    def make(loss_type):
        inner = tokenizers.Tokenizer.from_str(tokenizer.to_files()["tokenizer.json"])
        processing = PreTrainedTokenizerFast(
            tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
        )
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path), loss_type=loss_type, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True
        )
        data = datasets.Dataset.from_list(RECORDS)
        return trl.SFTTrainer(model=theirs, args=arguments, train_dataset=data, processing_class=processing)

    return make


@pytest.mark.parametrize(("loss_type", "loss"), [("nll", NLL()), ("dft", DFT())])
def test_labels_loss_gradient_and_metrics(make_trainer, ours, theirs, tokenizer, loss_type, loss):
    trainer = make_trainer(loss_type)
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(len(RECORDS))])
    labels, mask = batch["labels"], batch["attention_mask"].bool()
    for number, record in enumerate(RECORDS):
        ids, learned = encode_example(record, tokenizer, TokenizerTemplate(), "completion")
        found = batch["input_ids"][number][mask[number]].tolist()
        # A template writes a line break behind the last turn. TRL learns it too; nobody waits for it in generation.
        assert found == [*ids, *tokenizer.encode("\n")]
        assert labels[number][: len(ids)].tolist() == [
            token if is_learned else -100 for token, is_learned in zip(ids, learned, strict=True)
        ]

    theirs.zero_grad()
    ours.zero_grad()
    count = (labels[:, 1:] != -100).sum()
    wanted = trainer.compute_loss(theirs.train(), dict(batch), num_items_in_batch=count)
    wanted.backward()
    measured = loss(ours, {"input_ids": batch["input_ids"], "labels": labels})
    found = measured.loss.loss_sum / measured.loss.num_tokens
    found.backward()

    assert measured.loss.num_tokens == count
    assert found.item() == pytest.approx(wanted.item(), **TOLERANCE)
    assert norm(ours) == pytest.approx(norm(theirs), **TOLERANCE)
    for mine, other in ((ours.head, theirs.lm_head), (ours.embed, theirs.model.embed_tokens)):
        torch.testing.assert_close(mine.weight.grad, other.weight.grad, rtol=1e-4, atol=1e-6)
    metrics = trainer._metrics["train"]
    assert (measured.entropy_sum / count).item() == pytest.approx(metrics["entropy"][-1], **TOLERANCE)
    assert (measured.num_correct / count).item() == pytest.approx(metrics["mean_token_accuracy"][-1])


def norm(model):
    return torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()]).item()
