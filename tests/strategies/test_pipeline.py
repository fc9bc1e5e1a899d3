"""Layers shared out over ranks against the same training on one process, and checkpoints between the two."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from optimizer_runs import make_trainer, weights_of
from torch import distributed
from torch.utils.data import DataLoader

from lightning_lm.distributed import data_rank, data_ranks
from lightning_lm.errors import ConfigurationError
from lightning_lm.functional.cross_entropy import TokenLoss
from lightning_lm.models import Attention, Layer, LearnedPositions, TransformerConfig
from lightning_lm.modules import CrossEntropy, GPipe, OneForwardOneBackward, PipelineModule, PretrainModule
from lightning_lm.optim import SGD, AdamW, Cosine, Muon
from lightning_lm.strategies import PipelineStrategy

STEPS, VOCAB = 10, 31


def config(num_layers=3, **options):
    layer = Layer(mixer=Attention(num_heads=4, num_kv_heads=2))
    options = {"vocab_size": VOCAB, "d_model": 24, "context_length": 16, **options}
    return TransformerConfig(num_layers=num_layers, layers=layer, **options)


def batches(part=0, parts=1):
    """Six rows a step, which is no multiple of four, with any number of targets, packed; the last has one target.

    Several pipelines take every other of them; the last step leaves all but one without any target.
    """
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        ids = torch.randint(VOCAB, (6, 13), generator=generator)
        labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < step / STEPS, -100)
        if step == STEPS - 1:
            labels = torch.full_like(ids, -100)
            labels[0, 7] = ids[0, 7]
        batch = {"input_ids": ids, "labels": labels, "document_ids": (ids % 5 == 0).cumsum(1)}
        yield {name: rows[part::parts] for name, rows in batch.items()}


class Losses(PretrainModule):
    """Keeps the loss of every step."""

    def on_fit_start(self):
        super().on_fit_start()
        self.losses = []

    def training_loss(self, batch):
        loss = super().training_loss(batch)
        self.losses.append(float(loss.nll_sum / loss.num_tokens))
        return loss


class PipelineLosses(PipelineModule):
    """Keeps the loss of every step."""

    def on_fit_start(self):
        super().on_fit_start()
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(float(loss))
        return loss


def train(
    pipeline, model, options, precision="64-true", *, steps=STEPS, resume=None, save=None, size="auto", seed=0, **clip
):
    """Train on one process if there is no pipeline."""
    torch.manual_seed(seed)
    options = {"schedule": Cosine(warmup=0.2, horizon_tokens=500), **options}
    settings = {"precision": precision, "max_epochs": 9, "max_steps": steps, "log_every_n_steps": 5}
    settings = {**settings, "num_sanity_val_steps": 0, **clip}
    if pipeline is None:
        settings.setdefault("gradient_clip_val", options.pop("gradient_clip_val", None))
        module, strategy = Losses(model, **options), "auto"
    else:
        module, strategy = PipelineLosses(model, pipeline=pipeline, **options), PipelineStrategy(size)
    trainer = make_trainer(strategy, **settings)
    start = 0 if resume is None else STEPS // 2
    rows = list(batches(data_rank(trainer), data_ranks(trainer)))
    data = DataLoader(rows[start:] + rows[:start], batch_size=None)  # a Trainer that goes on counts on from there
    trainer.fit(module, data, DataLoader(rows, batch_size=None), ckpt_path=resume)
    assert trainer.gradient_clip_val == settings.get("gradient_clip_val")
    if save is not None:
        trainer.save_checkpoint(save)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return weights_of(module), module.losses, metrics, trainer.global_step


def require_equal(stages, single, *, tolerance=1e-9):
    weights, losses, metrics, steps = single
    found = {name: value for stage in stages for name, value in stage[0].items()}
    assert sum(len(stage[0]) for stage in stages) == len(weights)
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)
    total, wanted = (sum(w.double().abs().sum() for w in kept.values()) for kept in (found, weights))
    assert abs(total / wanted - 1) < 1e-8
    for stage in stages:
        assert stage[3] == steps
        assert stage[1] == pytest.approx(losses, abs=2e-6)
        assert stage[2] == pytest.approx(metrics, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("size", "pipeline", "model", "options"),
    [
        (2, GPipe(micro_batches=4), config(), {"optimizer": AdamW(lr=1e-3, eps=1e-5)}),
        (2, OneForwardOneBackward(micro_batches=4), config(), {"gradient_clip_val": 0.05, "optimizer": Muon(lr=1e-3)}),
        (
            3,
            OneForwardOneBackward(micro_batches=3),
            config(4, positions=LearnedPositions(), embed_scale=5.0, output_scale=0.5, logit_softcap=4.0),
            {"optimizer": AdamW(lr=1e-3, eps=1e-5), "activation_checkpointing": "blocks", "gradient_clip_val": 0.05},
        ),
        (1, GPipe(micro_batches=6), config(), {"loss": CrossEntropy(z_loss=1e-3, label_smoothing=0.1)}),
    ],
)
def test_stages_together_are_one_process(ranks, size, pipeline, model, options):
    single = ranks(1).run(train, None, model, options)[0]
    require_equal(ranks(size).run(train, pipeline, model, options), single)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("algorithm", ["norm", "value", None])
def test_the_trainers_clipping_is_that_of_one_process(ranks, size, algorithm):
    limit = 0.003 if algorithm == "value" else 0.05  # which most gradients exceed
    options, clip = {"optimizer": SGD(lr=1.0)}, {"gradient_clip_val": limit, "gradient_clip_algorithm": algorithm}
    single = ranks(1).run(train, None, config(), options, **clip)[0]
    unclipped = ranks(1).run(train, None, config(), options)[0]
    assert max(abs(a - b) for a, b in zip(single[1], unclipped[1], strict=True)) > 0.01
    stages = ranks(size).run(train, GPipe(micro_batches=2), config(), options, size=2, **clip)
    for first, second in zip(stages[::2], stages[1::2], strict=True):
        for name, value in {**first[0], **second[0]}.items():
            torch.testing.assert_close(value, single[0][name], rtol=1e-9, atol=1e-9)


def accumulate():
    with pytest.raises(ConfigurationError, match=r"accumulate_grad_batches=4.*micro_batches") as caught:
        train(GPipe(micro_batches=2), config(), {}, accumulate_grad_batches=4)
    return str(caught.value)


def test_accumulation_is_refused_with_the_setting_that_takes_its_place(ranks):
    assert "4 times as large" in ranks(2).run(accumulate)[0]


def test_in_single_precision_too(ranks):
    options = {"optimizer": AdamW(lr=1e-3, eps=1e-5), "gradient_clip_val": 0.05}
    single = ranks(1).run(train, None, config(), options, "32-true")[0]
    stages = ranks(2).run(train, OneForwardOneBackward(), config(), options, "32-true")
    require_equal(stages, single, tolerance=2e-6)


@pytest.mark.parametrize("optimizer", [AdamW(lr=1e-3, eps=1e-5), Muon(lr=1e-3)])
def test_checkpoints_go_between_any_number_of_stages_and_one_process(ranks, tmp_path, optimizer):
    options, pipeline, half = {"optimizer": optimizer, "gradient_clip_val": 0.5}, OneForwardOneBackward(), STEPS // 2
    whole = ranks(1).run(train, None, config(), options)[0]
    ranks(1).run(train, None, config(), options, steps=half, save=tmp_path / "one.ckpt")
    ranks(2).run(train, pipeline, config(), options, steps=half, save=tmp_path / "two.ckpt")
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.ckpt", "two.ckpt"))
    assert one["state_dict"].keys() == two["state_dict"].keys()
    sizes = [len(kept["optimizer_states"][0]["state"]) for kept in (one, two)]
    assert sizes[0] == sizes[1] == len(whole[0])
    for name, size, reader in (("two", 1, None), ("two", 2, pipeline), ("two", 3, pipeline), ("one", 2, pipeline)):
        resumed = ranks(size).run(train, reader, config(), options, resume=tmp_path / f"{name}.ckpt")
        require_equal(resumed, (whole[0], whole[1][half:], whole[2], STEPS))


def test_several_pipelines_are_one_process(ranks, tmp_path):
    options = {"optimizer": AdamW(lr=1e-3, eps=1e-5), "gradient_clip_val": 0.05}
    single = ranks(1).run(train, None, config(), options)[0]
    pipelines = ranks(4).run(save_and_go_on, OneForwardOneBackward(micro_batches=2), options, tmp_path / "half.ckpt")
    for first, second in (pipelines[:2], pipelines[2:]):
        for stage in (first, second):  # each pipeline has its own losses, of its own rows
            assert stage[2] == pytest.approx(single[2], rel=1e-5, abs=1e-6)
        found = {**first[0], **second[0]}
        for name, value in single[0].items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)
    resumed = ranks(1).run(train, None, config(), options, resume=tmp_path / "half.ckpt")[0]
    assert resumed[1] == pytest.approx(single[1][STEPS // 2 :], abs=1e-9)


def save_and_go_on(pipeline, options, path):
    other = distributed.get_rank() // 2  # the second pipeline must take its first weights from the first
    train(pipeline, config(), options, steps=STEPS // 2, save=path, size=2, seed=other)
    return train(pipeline, config(), options, resume=path, size=2)


class Counted(CrossEntropy):
    """A part of the user's own works too."""

    def __call__(self, model, batch) -> TokenLoss:
        loss = super().__call__(model, batch)
        return loss._replace(loss_sum=2 * loss.loss_sum)


def save_best(folder):
    best = ModelCheckpoint(folder, "{step}", monitor="val/loss", save_top_k=1, save_last=True)
    torch.manual_seed(0)
    module = PipelineModule(config(), pipeline=GPipe(micro_batches=2), loss=Counted())
    trainer = make_trainer(PipelineStrategy(), callbacks=[best], enable_checkpointing=True, max_steps=4)
    data = list(batches())[:2]
    trainer.fit(module, DataLoader(data, batch_size=None), DataLoader(data, batch_size=None))
    before = float(best.best_model_score)
    trainer.validate(module, DataLoader(data, batch_size=None), ckpt_path="best")
    return before, float(trainer.callback_metrics["val/loss"]), best.best_model_path


def test_the_best_checkpoint_is_found_again(ranks, tmp_path):
    found = ranks(2).run(save_best, tmp_path)
    assert found[0] == found[1]
    assert found[0][0] == found[0][1]
    alone = PretrainModule.load_from_checkpoint(found[0][2], model=config())
    nll = [alone.evaluate_batch(batch) for batch in list(batches())[:2]]
    mean = sum(float(sums["nll_sum"]) for sums in nll) / sum(int(sums["num_tokens"]) for sums in nll)
    assert found[0][0] == pytest.approx(mean, rel=1e-5)


def fit_refused(module, strategy, message):
    trainer = make_trainer(strategy, max_steps=1)
    with pytest.raises(ConfigurationError, match=message):
        trainer.fit(module, DataLoader(list(batches()), batch_size=None))


def test_what_cannot_be_cut_is_refused(ranks):
    for module, strategy, message in (
        (PipelineModule(config(tie_embeddings=True)), PipelineStrategy(), "two ranks would train copies"),
        (PipelineModule(config(1)), PipelineStrategy(), "1 layers cannot be divided among 2 stages"),
        (PipelineModule(torch.nn.Linear(2, 2)), PipelineStrategy(), "got Linear"),
        (PipelineModule(config()), "ddp", "PipelineModule needs PipelineStrategy"),
        (PretrainModule(config()), PipelineStrategy(), "needs a PipelineModule, and got PretrainModule"),
        (PipelineModule(config(), pipeline=OneForwardOneBackward(micro_batches=1)), PipelineStrategy(), "at least 2"),
        (PipelineModule(config()), PipelineStrategy(3), "pipeline_parallel_size=3 does not divide the 2 processes"),
    ):
        ranks(2).run(fit_refused, module, strategy, message)
