"""Prompts: every one once an epoch, dealt out whole to ranks, found again on resuming."""

import numpy as np
import pytest
from lightning.pytorch import LightningModule, Trainer

from lightning_lm.data import ChatML, Plain, ReverseDigits
from lightning_lm.data.post_training.prompts import PromptStream, join_prompts, take_prompts
from lightning_lm.datamodules import PromptDataModule
from lightning_lm.datamodules.loader import DataShard
from lightning_lm.datamodules.prompts import PromptLoader, PromptValidationLoader
from lightning_lm.errors import ConfigurationError, DataError, FingerprintError
from lightning_lm.tokenizers import CharacterTokenizer, TrainCharacters

RECORDS = [{"prompt": f"{number}=", "answer": str(number), "note": "odd"} for number in range(10, 17)]


@pytest.fixture
def digits():
    return CharacterTokenizer("0123456789=")


def stream_of(digits, records=RECORDS, **settings):
    return PromptStream(records, digits, Plain(), **settings)


def data_of(digits, **settings):
    return PromptDataModule(RECORDS, 0, **{"tokenizer": digits, "batch_size": 4, **settings})


def test_a_batch_holds_ids_texts_and_columns(digits):
    batch = stream_of(digits, [*RECORDS[:1], {"prompt": "99="}], shuffle=False).batch(np.array([0, 1]))
    assert [ids.tolist() for ids in batch["prompt_ids"]] == [[12, 1, 0, 10], [12, 9, 9, 10]]  # behind an end of text
    assert batch["prompts"] == batch["texts"] == ["10=", "99="]
    assert batch["columns"] == {"answer": ["10", None], "note": ["odd", None]}
    assert batch["stop_ids"] == (12,)
    assert batch["counted"] == [True, True]


def test_conversations_are_written_by_the_template():
    characters = CharacterTokenizer(
        sorted(set("user\nassistanthello?")), ("<|end|>", "<|im_start|>", "<|im_end|>"), eos_token="<|end|>"
    )
    messages = [{"role": "user", "content": "hello?"}]
    batch = PromptStream([{"prompt": messages}], characters, ChatML()).batch(np.array([0]))
    assert batch["prompts"] == [messages]
    assert batch["texts"][0].endswith("<|im_start|>user\nhello?<|im_end|>\n<|im_start|>assistant\n")
    special = characters.special_tokens
    assert batch["stop_ids"] == (special["<|im_end|>"], special["<|end|>"])


def test_every_prompt_comes_once_an_epoch_in_a_new_order(digits):
    stream = stream_of(digits, seed=3)
    epochs = [stream.batch(np.arange(7) + 7 * epoch)["prompts"] for epoch in range(3)]
    assert all(sorted(epoch) == [record["prompt"] for record in RECORDS] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert stream_of(digits, seed=3).batch(np.array([9]))["prompts"] == [epochs[1][2]]
    assert stream_of(digits, seed=3).fingerprint == stream.fingerprint != stream_of(digits, seed=4).fingerprint


def test_spare_prompts_are_others_each_time(digits):
    stream = stream_of(digits)
    first, second = (stream.spare(np.arange(7), 8, number)["prompts"] for number in (1, 2))
    assert sorted(first) == sorted(second) == [record["prompt"] for record in RECORDS]
    assert first != second


def test_taking_and_joining(digits):
    batch = stream_of(digits, shuffle=False).batch(np.arange(3))
    joined = join_prompts(take_prompts(batch, [2, 0]), take_prompts(batch, [1]))
    assert joined["prompts"] == ["12=", "10=", "11="]
    assert joined["columns"]["answer"] == ["12", "10", "11"]
    assert [ids[2] for ids in joined["prompt_ids"]] == [2, 0, 1]


@pytest.mark.parametrize(
    ("records", "settings", "message"),
    [
        ([], {}, "no record"),
        ([{"question": "1="}], {}, r"the fields \['question'\]"),
        ([{"prompt": "1=", "completions": ""}], {}, "'completions', a name that rewards know otherwise"),
        ([{"prompt": "1="}], {"max_tokens": 2}, "All 1 prompts are longer than max_tokens=2"),
    ],
)
def test_records_that_cannot_be_used_are_refused(digits, records, settings, message):
    with pytest.raises(DataError, match=message):
        stream_of(digits, records, **settings)


def test_longer_prompts_are_left_out_and_counted(digits):
    data = PromptDataModule([*RECORDS, {"prompt": "123="}], 0, tokenizer=digits, max_prompt_tokens=4)
    with pytest.warns(UserWarning, match="1 prompts longer than 4 tokens are dropped"):
        data.setup()
    assert data._train.rows_per_epoch == 7


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_ranks_and_micro_batches_share_the_prompts_of_a_rollout(digits, micro_batches):
    whole = [batch["prompts"] for batch in PromptLoader(data_of(digits), stream_of(digits), DataShard(4))]
    shared = {}
    for rank in range(2):
        shard = DataShard(4, num_ranks=2, rank=rank, micro_batches=micro_batches)
        loader = PromptLoader(data_of(digits), stream_of(digits), shard)
        batches = list(loader)
        assert len(batches) == len(loader) == 2 * micro_batches
        for number, batch in enumerate(batches):
            shared.setdefault(number // micro_batches, []).extend(batch["prompts"])
    assert [sorted(prompts) for prompts in shared.values()] == [sorted(prompts) for prompts in whole]


def test_spare_prompts_differ_between_ranks(digits):
    spare = [
        PromptLoader(data_of(digits), stream_of(digits), DataShard(4, num_ranks=2, rank=rank)).spare(1, 3)["prompts"]
        for rank in range(2)
    ]
    assert not set(spare[0]) & set(spare[1])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_validation_counts_every_prompt_once(digits, ranks, monkeypatch):
    monkeypatch.setattr("lightning_lm.datamodules.prompts._VALIDATION_PROMPTS", 2)
    stream, counted, lengths = stream_of(digits, shuffle=False), [], set()
    for rank in range(ranks):
        loader = PromptValidationLoader(stream, DataShard(ranks, num_ranks=ranks, rank=rank))
        batches = list(loader)
        lengths.add((len(batches), len(loader), *(len(batch["prompts"]) for batch in batches)))
        for batch in batches:
            counted += [prompt for prompt, real in zip(batch["prompts"], batch["counted"], strict=True) if real]
    assert sorted(counted) == [record["prompt"] for record in RECORDS]
    assert len(lengths) == 1


class Reader(LightningModule):
    """Any module: it gets prompts, and notes them."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization, self.seen = False, []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["prompts"])

    def configure_optimizers(self):
        return None


def fit(data, tmp_path, steps, path=None):
    module = Reader()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=-1, limit_train_batches=steps, **quiet)
    trainer.fit_loop.max_epochs = 1 if path is None else 2
    trainer.fit(module, data, ckpt_path=path, weights_only=True)
    return module, trainer


def test_a_module_without_rollouts_gets_the_prompts_and_resumes(digits, tmp_path):
    data = data_of(digits)
    module, trainer = fit(data, tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert data.prompts_consumed == 4
    again, _ = fit(data_of(digits), tmp_path, 1, tmp_path / "one.ckpt")
    stream = stream_of(digits)
    assert module.seen + again.seen == [stream.batch(np.arange(4) + 4 * step)["prompts"] for step in range(2)]
    with pytest.raises(FingerprintError, match="seed was 0, is 1"):
        fit(data_of(digits, seed=1), tmp_path, 1, tmp_path / "one.ckpt")


def test_a_tokenizer_is_trained_on_the_records(tmp_path):
    data = PromptDataModule(ReverseDigits(num_examples=50), 0.2, tokenizer=TrainCharacters(), batch_size=4)
    data.setup()
    assert data.tokenizer.vocab_size == 13
    assert 0 < data._validation.rows_per_epoch < data._train.rows_per_epoch
    assert data._validation.rows_per_epoch + data._train.rows_per_epoch == 50


def test_what_cannot_work_is_refused(digits):
    with pytest.raises(ConfigurationError, match="batch_size must be at least 1, got 0"):
        data_of(digits, batch_size=0)
