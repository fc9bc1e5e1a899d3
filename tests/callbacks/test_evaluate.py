"""Evaluations come when they should, are right, change nothing and keep to their share of the time."""

import json
import random
import time

import numpy as np
import pytest
import torch
from evaluation_stand_ins import Echo, NextLetter
from split_runs import Rows, model_config, trainer_for, weights_of

from lightning_lm.callbacks import Evaluate, ScalingLaw, evaluate
from lightning_lm.errors import ConfigurationError
from lightning_lm.evals import LocalModel, evaluate_tasks
from lightning_lm.modules import PretrainModule
from lightning_lm.optim import AdamW, Constant
from lightning_lm.scaling import RunLedger
from lightning_lm.tokenizers import CharacterTokenizer

TOKENIZER = CharacterTokenizer("abcdefghijklmnopqrstuvwxyzAS \n0123456789")
TASKS = (NextLetter(count=6), Echo())


class Kept(Evaluate):
    """Keeps the steps at which it ran."""

    def _run(self, trainer, pl_module, limit):
        if limit not in (1, 5):
            self.steps = [*getattr(self, "steps", []), trainer.global_step]
        return super()._run(trainer, pl_module, limit)


def fit(*callbacks, steps=5, dropout=0.5):
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    config = model_config(context_length=64, dropout=dropout)
    module = PretrainModule(config, optimizer=AdamW(lr=1e-2), schedule=Constant())
    trainer = trainer_for(callbacks=list(callbacks), max_steps=steps)
    trainer.fit(module, Rows(trainer, steps, 96))
    return trainer, module


def test_a_run_is_bit_equal_with_and_without_and_the_scores_are_those_of_the_weights(capsys):
    watched = Kept(TASKS, every=2, max_share=0.99, tokenizer=TOKENIZER)
    trainer, module = fit(watched)
    after = random.random(), np.random.rand(), torch.rand(1)
    _, plain = fit()
    assert (random.random(), np.random.rand(), torch.rand(1)) == after
    for name, weight in weights_of(plain).items():
        assert torch.equal(weights_of(module)[name], weight)
    assert watched.steps == [2, 4, 5]
    expected = evaluate_tasks(TASKS, LocalModel(module.model, TOKENIZER))
    assert watched.results.tasks == expected.tasks
    found = trainer.callback_metrics["eval/next_letter/acc"]
    assert float(found) == pytest.approx(expected["next_letter"].main.value)
    assert "eval at step 4: next_letter acc" in capsys.readouterr().out


def test_validate_evaluates_and_needs_no_fit():
    watched = Kept(TASKS[:1], tokenizer=TOKENIZER)
    module = PretrainModule(model_config(context_length=64), optimizer=AdamW(), schedule=Constant())
    trainer = trainer_for(callbacks=[watched])
    trainer.validate(module, Rows(trainer, 1, 96))
    assert watched.steps == [0]
    assert watched.results["next_letter"].main.num_items == 6


def test_what_would_take_too_long_is_skipped_and_said_once(monkeypatch):
    watched = Kept(TASKS[:1], every=1, max_share=0.2, tokenizer=TOKENIZER)
    monkeypatch.setattr(Evaluate, "_estimate_s", lambda self, *_: 1000.0)
    with pytest.warns(UserWarning, match=r"skips step 1.*max_share=0\.2") as caught:
        fit(watched)
    assert watched.steps == [5]
    assert sum("skips step" in str(entry.message) for entry in caught) == 1


def test_evaluations_keep_to_their_share(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(evaluate.Evaluate, "_estimate_s", lambda self, *_: 1.0)

    class Slow(Kept):
        def _run(self, *args):
            now[0] += 1.0
            return super()._run(*args)

        def on_train_batch_end(self, *args):
            now[0] += 1.0  # a step
            super().on_train_batch_end(*args)
            if self._spent_s:
                assert self._spent_s <= 0.25 * now[0]

    watched = Slow(TASKS[:1], every=1, max_share=0.25, tokenizer=TOKENIZER)
    with pytest.warns(UserWarning, match="skips"):
        fit(watched, steps=12)
    assert watched.steps == [3, 6, 9, 12]


def test_an_error_ends_the_evaluations_and_not_the_run():
    class Broken(NextLetter):
        def score(self, item, answers):
            raise KeyError("gold")

    watched = Evaluate([Broken(name="broken")], every=1, max_share=0.9, tokenizer=TOKENIZER)
    with pytest.warns(UserWarning, match=r"does nothing more in this run: it failed \(KeyError: 'gold'\)"):
        trainer, _ = fit(watched)
    assert trainer.global_step == 5


def test_what_is_missing_is_refused_before_training():
    with pytest.raises(ConfigurationError, match="no tokenizer"):
        fit(Evaluate(TASKS))
    with pytest.raises(ConfigurationError, match="no tasks"):
        fit(Evaluate([], tokenizer=TOKENIZER))
    with pytest.raises(ConfigurationError, match="max_share"):
        Evaluate(TASKS, max_share=1.5)


def test_the_ledger_has_the_scores_of_the_final_weights(tmp_path):
    ledger = RunLedger(tmp_path / "ledger.jsonl")
    watched = Evaluate(TASKS[:1], every=2, max_share=0.99, tokenizer=TOKENIZER)
    fit(
        ScalingLaw(ledger.path, name="small"), watched, steps=3
    )  # before Evaluate: the run is recorded after its last score
    (run,) = ledger.read()
    assert run.tasks == {"next_letter": json.loads(json.dumps(watched.results["next_letter"].summary))}
    assert run.tasks["next_letter"]["scores"]["acc"] == watched.results["next_letter"].main.value
    assert run.tasks["next_letter"]["num_items"] == 6
