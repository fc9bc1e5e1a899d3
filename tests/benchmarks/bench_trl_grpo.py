"""GRPO beside TRL's GRPOTrainer: time to 90 % held-out accuracy on reversing five digits, one thread, in one process.

Both start from the same checkpoint of `sft/reverse`, the same weights in two formats, and are given the same prompts in
the same order: 32 a rollout, 16 answers of at most 7 tokens to each, two updates of 256 answers. Loss (Dr. GRPO, clip
0.2), advantages (no scale), AdamW (1e-4, five steps of warm-up, no decay) and clipping are the same. TRL computes the
probabilities before the updates by another pass over all answers. Ours does so for the second update alone, whose
answers the first does not compute, and reads each prompt once for its answers; as ``lightning_lm_sampler`` it takes the
probabilities that sampling has recorded (``ratio_to="sampler"``), which in float32 are the same to 1e-5. After each
rollout the accuracy of greedy answers to 500 held-out numbers is taken, outside the time. Which begins changes from
round to round, and so does the seed.

    lightning-lm fit --config recipes/sft/reverse.yaml
    OMP_NUM_THREADS=1 python tests/benchmarks/bench_trl_grpo.py --output tests/benchmarks/results/trl_grpo.json
"""

import argparse
import functools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import tokenizers
import torch
import transformers
import trl
from lightning.pytorch import Callback, Trainer, seed_everything

sys.path.insert(0, str(Path(__file__).parent))
from record import write_record
from trl_peer import grpo_config

from lightning_lm.data import ReverseDigits
from lightning_lm.datamodules import PromptDataModule
from lightning_lm.functional import ConstantLength, GroupAdvantage
from lightning_lm.generation import Generator, Sampling
from lightning_lm.models import save_huggingface
from lightning_lm.modules import GRPOModule, Objective, RolloutPlan, load_model
from lightning_lm.optim import AdamW, Constant
from lightning_lm.rewards import ExactAnswer

PROMPTS, SAMPLES, NEW_TOKENS, UPDATES = 32, 16, 7, 2
LEARNING_RATE, WARMUP = 1e-4, 5
HELD_OUT = 500


def held_out() -> list[str]:
    """Numbers that neither trains on."""
    generator, found = random.Random(7), []
    while len(found) < HELD_OUT:
        number = "".join(generator.choices("0123456789", k=5))
        if number != number[::-1] and random.Random(number).random() < 0.1:
            found.append(number)
    return found


class Clock:
    """Wall and CPU seconds of training, without the measuring."""

    def __init__(self, accuracy: Callable[[], float]) -> None:
        self.accuracy, self.curve = accuracy, []
        self.wall_s = self.cpu_s = 0.0
        self.go()

    def go(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def measure(self) -> None:
        self.wall_s += time.perf_counter() - self._wall
        self.cpu_s += time.process_time() - self._cpu
        self.curve.append({"accuracy": self.accuracy(), "wall_s": round(self.wall_s, 2), "cpu_s": round(self.cpu_s, 2)})
        self.go()


def ours(checkpoint: Path, rollouts: int, seed: int, ratio_to: str = "policy") -> list[dict[str, float]]:
    seed_everything(seed, verbose=False)
    model, tokenizer = load_model(checkpoint)
    numbers = held_out()
    asked = [[tokenizer.eos_id, *tokenizer.encode(f"{number}=")] for number in numbers]

    def accuracy() -> float:
        answers = Generator(model, tokenizer).generate(
            asked, sampling=Sampling(temperature=0), max_new_tokens=NEW_TOKENS
        )
        right = [
            answer.text == number[::-1] and answer.finish_reason == "eos"
            for answer, number in zip(answers, numbers, strict=True)
        ]
        return sum(right) / len(right)

    class Measured(Callback):
        def on_train_start(self, trainer, module):
            self.clock = Clock(accuracy)

        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step % UPDATES == 0:
                self.clock.measure()

    measured = Measured()
    module = GRPOModule(
        model,
        rewards=[ExactAnswer()],
        plan=RolloutPlan(samples_per_prompt=SAMPLES, max_new_tokens=NEW_TOKENS, minibatches=UPDATES),
        advantage=GroupAdvantage(scale="none"),
        objective=Objective(reduction=ConstantLength(max_tokens=NEW_TOKENS), ratio_to=ratio_to),
        optimizer=AdamW(lr=LEARNING_RATE, weight_decay=0.0),
        schedule=Constant(warmup=WARMUP),
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=UPDATES * rollouts,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[measured],
    )
    data = PromptDataModule(ReverseDigits(), None, tokenizer=tokenizer, batch_size=PROMPTS, seed=seed)
    trainer.fit(module, datamodule=data)
    return measured.clock.curve


def theirs(checkpoint: Path, rollouts: int, seed: int) -> list[dict[str, float]]:
    source, tokenizer = load_model(checkpoint)
    records = prompts_in_our_order(tokenizer, rollouts, seed)
    with tempfile.TemporaryDirectory() as folder:
        save_huggingface(source, folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        processing = as_transformers(tokenizer)
        for settings in (model.config, model.generation_config):
            settings.bos_token_id, settings.eos_token_id, settings.pad_token_id = None, *[tokenizer.eos_id] * 2
        numbers = held_out()
        asked = torch.tensor([[tokenizer.eos_id, *tokenizer.encode(f"{number}=")] for number in numbers])
        wanted = torch.tensor([[*tokenizer.encode(number[::-1]), tokenizer.eos_id] for number in numbers])

        def accuracy() -> float:
            mask = torch.ones_like(asked)
            with torch.no_grad():
                found = model.generate(asked, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS)
            return (found[:, asked.shape[1] :][:, : wanted.shape[1]] == wanted).all(1).float().mean().item()

        class Measured(transformers.TrainerCallback):
            def on_train_begin(self, *_, **__):
                self.clock = Clock(accuracy)

            def on_step_end(self, arguments, state, *_, **__):
                if state.global_step % UPDATES == 0:
                    self.clock.measure()

        measured = Measured()
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, answer, **_: [
                float(completion == right) for completion, right in zip(completions, answer, strict=True)
            ],
            args=arguments_of(folder, rollouts, seed),
            train_dataset=datasets.Dataset.from_list(records),
            processing_class=processing,
            callbacks=[measured],
        )
        trainer.train()
    return measured.clock.curve


def prompts_in_our_order(tokenizer: object, rollouts: int, seed: int) -> list[dict[str, str]]:
    data = PromptDataModule(ReverseDigits(), None, tokenizer=tokenizer, batch_size=PROMPTS, seed=seed)
    data.setup("fit")
    records = []
    for _, batch in zip(range(rollouts), data.train_dataloader(), strict=False):
        answers = batch["columns"]["answer"]
        records += [
            {"prompt": f"<eos>{prompt}", "answer": answer}
            for prompt, answer in zip(batch["prompts"], answers, strict=True)
        ]
    return records


def as_transformers(tokenizer: object) -> transformers.PreTrainedTokenizerFast:
    """The same ids."""
    words = {character: tokenizer.encode(character)[0] for character in "0123456789="}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words | {"<eos>": tokenizer.eos_id}, unk_token="<eos>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>", padding_side="left"
    )


def arguments_of(folder: str, rollouts: int, seed: int) -> trl.GRPOConfig:
    return grpo_config(
        folder,
        seed=seed,
        max_steps=UPDATES * rollouts,
        per_device_train_batch_size=PROMPTS * SAMPLES // UPDATES,
        steps_per_generation=UPDATES,
        num_generations=SAMPLES,
        max_completion_length=NEW_TOKENS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=WARMUP,
        shuffle_dataset=False,
        logging_steps=UPDATES,
    )


def time_to(curve: list[dict[str, float]], accuracy: float) -> dict[str, float | None]:
    reached = next((number for number, point in enumerate(curve) if point["accuracy"] >= accuracy), None)
    if reached is None:
        return {"rollouts": None, "wall_s": None, "cpu_s": None}
    return {"rollouts": reached + 1, **{name: curve[reached][name] for name in ("wall_s", "cpu_s")}}


def compared(rounds: list[dict], name: str, clock: str, point: str) -> float | None:
    """Median over rounds of our time to TRL's, to the accuracy or to the end of the curve."""
    pairs = [(entry[point][name], entry[point]["trl"]) for entry in rounds]
    ends = [[part[-1] if isinstance(part, list) else part for part in pair] for pair in pairs]
    ratios = [mine[clock] / its[clock] for mine, its in ends if mine[clock] is not None and its[clock] is not None]
    return round(statistics.median(ratios), 3) if ratios else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/sft_reverse/version_0/checkpoints/last.ckpt"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rollouts", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--accuracy", type=float, default=0.9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    by_sampler = functools.partial(ours, ratio_to="sampler")
    contenders = {"lightning_lm": ours, "lightning_lm_sampler": by_sampler, "trl": theirs}
    rounds = []
    for index in range(args.rounds):
        order = list(contenders) if index % 2 == 0 else list(reversed(contenders))
        curves = {name: contenders[name](args.checkpoint, args.rollouts, index + 1) for name in order}
        summary = {name: time_to(curve, args.accuracy) for name, curve in curves.items()}
        rounds.append({"seed": index + 1, "time_to_accuracy": summary, "curves": curves})
        print(summary, flush=True)
    results = {"accuracy": args.accuracy, "rounds": rounds}
    for name in list(contenders)[:-1]:
        results[name] = {
            f"median_ratio_to_trl_of_{clock}{suffix}": compared(rounds, name, clock, point)
            for clock in ("wall_s", "cpu_s")
            for suffix, point in (("", "time_to_accuracy"), ("_for_all_rollouts", "curves"))
        }
    print({name: value for name, value in results.items() if name != "rounds"})
    write_record(args.output, command=" ".join(["python", *sys.argv]), results=results)


if __name__ == "__main__":
    main()
