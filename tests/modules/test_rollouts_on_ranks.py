"""GRPO and PPO on two processes: the windows and gradients of one, as many decoding steps on each rank."""

import dataclasses

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from post_training_runs import WrittenBackend

from lightning_lm.functional import KLPenalty, RolloutTokenMean, SequenceMean, TokenMean
from lightning_lm.generation import Sampling
from lightning_lm.modules import Critic, GRPOModule, KLReward, Objective, PPOModule, RolloutPlan
from lightning_lm.optim import OptimizerPart

TOLERANCE = 1e-6


class Recorder(torch.optim.SGD):
    """Keeps the gradients that it is given, and moves, so that later ones depend on earlier ones."""

    def __init__(self, named):
        super().__init__([parameter for _, parameter in named], lr=0.3)
        self.names, self.seen = [name for name, _ in named], []

    def step(self, closure=None):
        assert closure is None  # the combined optimizer has called it
        parameters = self.param_groups[0]["params"]
        grads = {name: value.grad.clone() for name, value in zip(self.names, parameters, strict=True)}
        self.seen.append(grads)
        super().step()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record(OptimizerPart):
    def children(self, parameters):
        return [Recorder([(entry.name, entry.parameter) for entry in parameters])]


class Diary:
    """Leaves what its rank saw in a file, since the ranks of a test are other processes."""

    folder = None

    def collect(self, prompts, *args, **settings):
        rows = super().collect(prompts, *args, **settings)
        self.diary = [*getattr(self, "diary", []), prompts["prompts"]]
        return rows

    def on_fit_end(self):
        children = self.trainer.optimizers[0].children
        grads = [
            {name.removeprefix("module."): value for child in step for name, value in child.items()}
            for step in zip(*(child.seen for child in children), strict=True)
        ]
        torch.save({"prompts": self.diary, "grads": grads}, self.folder / f"{self.global_rank}.pt")


class GRPODiary(Diary, GRPOModule):
    pass


class PPODiary(Diary, PPOModule):
    pass


def value_of(*, completions, **columns):
    return [completion.count("1") - 0.1 * len(completion) for completion in completions]


def two_processes():
    return {"devices": 2, "strategy": DDPStrategy(start_method="fork", process_group_backend="gloo")}


@pytest.fixture
def windows(policy, prompt_data, make_trainer, tmp_path, monkeypatch):
    """Train for two rollouts of one step each, and return each rank's prompts and gradients."""

    def run(kind, ranks, accumulate, **settings):
        folder = tmp_path / f"{ranks}-{accumulate}"
        folder.mkdir()
        monkeypatch.setattr(Diary, "folder", folder)
        plan = RolloutPlan(samples_per_prompt=4, max_new_tokens=7, mask_truncated=True, backend=WrittenBackend())
        module = kind(policy(), rewards=[value_of], plan=plan, optimizer=Record(), **settings)
        processes = two_processes() if ranks == 2 else {}
        trainer = make_trainer(max_steps=2, accumulate_grad_batches=accumulate, limit_val_batches=0, **processes)
        trainer.fit(module, prompt_data())
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]

    return run


def distance(found, wanted):
    assert found.keys() == wanted.keys()
    difference = sum((found[name].double() - wanted[name].double()).square().sum() for name in wanted)
    return (difference / sum(value.double().square().sum() for value in wanted.values())).sqrt().item()


KINDS = {
    "tokens": (GRPODiary, {"objective": Objective(reduction=TokenMean(), kl=KLPenalty(coefficient=0.3))}),
    "answers": (GRPODiary, {"objective": Objective(reduction=SequenceMean())}),
    "rollout": (GRPODiary, {"objective": Objective(reduction=RolloutTokenMean(), entropy_coefficient=0.1)}),
    "ppo": (PPODiary, {"critic": Critic(lr_scale=1.0), "kl": KLReward(coefficient=0.3, target=0.01, horizon=10)}),
}


@pytest.mark.parametrize("name", KINDS)
def test_two_processes_take_the_windows_and_gradients_of_one(windows, name):
    """From prompts to gradients, with ragged answers of which some are masked; micro-batches of 16, 4, 4 and 2 rows."""
    kind, settings = KINDS[name]
    (alone,) = windows(kind, 1, 1, **settings)
    assert len(alone["grads"]) == 2
    for ranks, accumulate in ((1, 4), (2, 2), (2, 4)):
        found = windows(kind, ranks, accumulate, **settings)
        for window, prompts in enumerate(alone["prompts"]):
            together = [prompt for rank in found for prompt in rank["prompts"][window]]
            assert sorted(together) == sorted(prompts)
        for rank in found:
            for step, wanted in zip(rank["grads"], alone["grads"], strict=True):
                assert distance(step, wanted) < TOLERANCE


class Counting(GRPOModule):
    """Notes the passes of each rank through the model while it samples, and its longest answer."""

    folder = None

    def collect(self, prompts, *args, **settings):
        self.passes = 0
        rows = super().collect(prompts, *args, **settings)
        longest = max(len(answer.token_ids) for answer in self.last_rollout[0].completions)
        self.diary = [*getattr(self, "diary", []), (self.passes, longest)]
        return rows

    def on_fit_end(self):
        torch.save(self.diary, self.folder / f"{self.global_rank}.pt")


def test_every_rank_decodes_as_many_steps_as_the_slowest(policy, prompt_data, make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(Counting, "folder", tmp_path)
    plan = RolloutPlan(samples_per_prompt=2, max_new_tokens=40, sampling=Sampling(temperature=1.0))
    model = policy()
    module = Counting(model, rewards=[value_of], plan=plan, optimizer=Record())
    forward = model.forward

    def counted(*args, **settings):
        module.passes += 1
        return forward(*args, **settings)

    model.forward = counted
    make_trainer(max_steps=6, max_epochs=-1, limit_val_batches=0, **two_processes()).fit(
        module, prompt_data(24, batch_size=2)
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert sum(mine[1] != other[1] for mine, other in zip(first, second, strict=True)) >= 3  # else it shows nothing
    for (passes, longest), (other_passes, other_longest) in zip(first, second, strict=True):
        # The prompt does not go through forward, and the last token of an answer is not read.
        assert passes == other_passes == max(longest, other_longest) - 1
