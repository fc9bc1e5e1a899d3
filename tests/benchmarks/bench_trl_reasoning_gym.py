"""GRPO on a published model beside TRL's GRPOTrainer: reward per CPU-second, one thread, in one process.

The model, prompts, reward and settings are those of `grpo/reasoning_gym`: SmolLM2-135M-Instruct, questions of Reasoning
Gym in the same order, 8 a rollout with 8 completions of at most 3 tokens each, one update of all 64 a rollout, Dr. GRPO
without scale, AdamW (2e-5, five steps of warm-up, no decay), clipping at 1. Both sample from one distribution, each
with its own generator, so that the reward rises alike and the cost of an update decides. TRL reads a prompt once for
each of its completions, ours once for all of them. Loading is outside the time. The record is written after each
update, so that a run that is cut keeps what it has measured; both are compared over the updates that both have done.

    lightning-lm demo smollm2 --output smollm2
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_trl_reasoning_gym.py --checkpoint smollm2 --updates 20 \
      --output tests/benchmarks/results/trl_reasoning_gym.json
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
import transformers
import trl
from lightning.pytorch import Callback, Trainer, seed_everything

sys.path.insert(0, str(Path(__file__).parent))
from record import write_record
from trl_peer import grpo_config

from lightning_lm.data import PromptedExamples, ReasoningGym
from lightning_lm.datamodules import PromptDataModule
from lightning_lm.functional import ConstantLength, GroupAdvantage
from lightning_lm.modules import GRPOModule, Objective, RolloutPlan, load_model
from lightning_lm.optim import AdamW, Constant
from lightning_lm.rewards import LastNumber, ReasoningGymAnswer

PROMPTS, SAMPLES, NEW_TOKENS, LEARNING_RATE, WARMUP = 8, 8, 3, 2e-5, 5
EXAMPLE = "Alice has 2 brothers and she also has 4 sisters. How many sisters does Alice's brother have?\nAnswer: 5"
SOURCE = PromptedExamples(
    ReasoningGym("aiw", config={"task_types": ["siblings"], "task_type_weights": [1.0], "max_entities": 4}),
    prompt=EXAMPLE + "\n\n{question}\nAnswer:",
)
REWARD = ReasoningGymAnswer(extractors=(LastNumber(),), sandbox=None)
Curve = list[dict[str, float]]


class Clock:
    """CPU and wall seconds of updates, with the mean reward of each; `done` gets the curve after an update."""

    def __init__(self, done: Callable[[Curve], None]) -> None:
        self.curve: Curve = []
        self.rewards: list[float] = []
        self._done = done

    def start(self) -> None:
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def reward(self, *, prompts, completions, **columns) -> list[float]:
        scores = REWARD(prompts=prompts, completions=completions, **columns)
        self.rewards.append(statistics.fmean(scores))
        return scores

    def update(self) -> None:
        cpu_s, wall_s = time.process_time() - self._cpu, time.perf_counter() - self._wall
        self.curve.append({"reward": self.rewards[-1], "cpu_s": round(cpu_s, 2), "wall_s": round(wall_s, 2)})
        self._done(self.curve)


def data_of(tokenizer: object, seed: int) -> PromptDataModule:
    return PromptDataModule(SOURCE, 0, tokenizer=tokenizer, batch_size=PROMPTS, seed=seed)


def ours(checkpoint: Path, updates: int, seed: int, clock: Clock) -> None:
    seed_everything(seed, verbose=False)
    model, tokenizer = load_model(checkpoint)

    class Timed(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            clock.update()

    def reward(*, prompts, completions, task, config, index, question):
        columns = {"task": task, "config": config, "index": index, "question": question}
        return clock.reward(prompts=prompts, completions=completions, **columns)

    module = GRPOModule(
        model,
        rewards=[reward],
        plan=RolloutPlan(samples_per_prompt=SAMPLES, max_new_tokens=NEW_TOKENS),
        advantage=GroupAdvantage(scale="none"),
        objective=Objective(reduction=ConstantLength(max_tokens=NEW_TOKENS)),
        optimizer=AdamW(lr=LEARNING_RATE, weight_decay=0.0),
        schedule=Constant(warmup=WARMUP),
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=updates,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Timed()],
    )
    clock.start()
    trainer.fit(module, datamodule=data_of(tokenizer, seed))


def theirs(checkpoint: Path, updates: int, seed: int, clock: Clock) -> None:
    data = data_of(load_model(checkpoint)[1], seed)
    data.setup("fit")
    records = []
    for _, batch in zip(range(updates), data.train_dataloader(), strict=False):
        columns = [batch["columns"][name] for name in ("task", "config", "index", "question")]
        for prompt, task, config, index, question in zip(batch["prompts"], *columns, strict=True):
            fields = {"task": task, "config": config, "index": index, "question": question}
            records.append({"prompt": f"<|im_end|>{prompt}", **fields})
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)

    class Timed(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            clock.update()

    def reward(*, prompts, completions, task, config, index, question, **_):
        columns = {"task": task, "config": config, "index": index, "question": question}
        return clock.reward(prompts=prompts, completions=completions, **columns)

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=grpo_config(
                folder,
                seed=seed,
                max_steps=updates,
                per_device_train_batch_size=PROMPTS * SAMPLES,
                steps_per_generation=1,
                num_generations=SAMPLES,
                max_completion_length=NEW_TOKENS,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=WARMUP,
                shuffle_dataset=False,
            ),
            train_dataset=datasets.Dataset.from_list(records),
            processing_class=tokenizer,
            callbacks=[Timed()],
        )
        clock.start()
        trainer.train()


def compared(curves: dict[str, Curve]) -> dict[str, float]:
    """How many times as much TRL takes, and reward per CPU-second of ours over its, for the updates both have done."""
    done = min(map(len, curves.values()))
    if not done:
        return {}
    cpu_s = {name: curve[done - 1]["cpu_s"] for name, curve in curves.items()}
    reward = {name: statistics.fmean(point["reward"] for point in curve[:done]) for name, curve in curves.items()}
    costs = cpu_s["trl"] / cpu_s["lightning_lm"]
    gains = reward["lightning_lm"] / max(reward["trl"], 1e-9)
    return {
        "updates_compared": done,
        "mean_reward_ours": round(reward["lightning_lm"], 4),
        "mean_reward_trl": round(reward["trl"], 4),
        "cpu_s_of_trl_over_ours": round(costs, 3),
        "reward_per_cpu_second_over_trls": round(costs * gains, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("smollm2"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    curves: dict[str, Curve] = {"lightning_lm": [], "trl": []}
    for name, run in (("lightning_lm", ours), ("trl", theirs)):

        def record(curve: Curve, name: str = name) -> None:
            curves[name] = curve
            print(name, len(curve), curve[-1], compared(curves), flush=True)
            results = {"curves": curves, "updates_asked": args.updates, "load": os.getloadavg()[0], **compared(curves)}
            write_record(args.output, command=" ".join(["python", *sys.argv]), results=results)

        run(args.checkpoint, args.updates, args.seed, Clock(record))


if __name__ == "__main__":
    main()
