"""GRPO beside TRL's GRPOTrainer with 10.6M parameters and ragged completions: CPU-seconds, set-up, peak memory.

Both start from the same random weights (a Llama for TRL) and are given the same prompts of 17 tokens: 8 a rollout, 8
completions of at most 256 tokens to each, two updates of 32 completions. Among 258 ids the end of text is about as
likely as any, so that the lengths spread from 1 to 256 (mean 160 to 180, a third or more cut). The reward is the share
of digits in the completion; loss (Dr. GRPO, clip 0.2), advantages (no scale), AdamW (1e-4, no decay) and clipping are
the same. Each trains in a process of its own, one thread, which is where set-up (from before the trainer is made until
its first step) and peak resident memory are taken. Sampling differs, so costs are compared by the trained token.

    export OMP_NUM_THREADS=1
    python tests/benchmarks/bench_trl_grpo_ragged.py --output tests/benchmarks/results/trl_grpo_ragged.json
"""

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from record import write_record
from trl_peer import grpo_config

PROMPTS, SAMPLES, NEW_TOKENS, UPDATES = 8, 8, 256, 2
CHARACTERS = [chr(code) for code in range(0x21, 0x121)]
DIGITS = frozenset("0123456789")
LEARNING_RATE = 1e-4


def prompts(rollouts: int) -> list[str]:
    generator = random.Random(11)
    return ["".join(generator.choices(CHARACTERS, k=16)) for _ in range(PROMPTS * rollouts)]


def share_of_digits(completion: str) -> float:
    return sum(character in DIGITS for character in completion) / max(len(completion), 1)


def small_model():
    from lightning_lm.models import GLU, Attention, Layer, TransformerConfig

    torch.manual_seed(0)
    layers = Layer(mixer=Attention(num_heads=6), ffn=GLU())
    config = TransformerConfig(
        vocab_size=len(CHARACTERS) + 2,
        d_model=384,
        num_layers=6,
        layers=layers,
        context_length=512,
        tie_embeddings=True,
    )
    return config.build()


def our_tokenizer():
    from lightning_lm.tokenizers import CharacterTokenizer

    return CharacterTokenizer(CHARACTERS)


class Clock:
    """CPU-seconds of set-up and of each rollout with its updates."""

    def __init__(self) -> None:
        self.times = [time.process_time()]
        self.tokens = 0

    def tick(self) -> None:
        self.times.append(time.process_time())

    def result(self) -> dict[str, float]:
        rollouts = [end - begin for begin, end in zip(self.times[1:], self.times[2:], strict=False)]
        return {
            "set_up_cpu_s": self.times[1] - self.times[0],
            "rollouts_cpu_s": sum(rollouts),
            "tokens": self.tokens,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }


def ours(rollouts: int, seed: int) -> dict[str, float]:
    from lightning.pytorch import Callback, Trainer, seed_everything

    from lightning_lm.datamodules import PromptDataModule
    from lightning_lm.functional import ConstantLength, GroupAdvantage
    from lightning_lm.modules import GRPOModule, Objective, RolloutPlan
    from lightning_lm.optim import AdamW, Constant

    seed_everything(seed, verbose=False)
    model, tokenizer = small_model(), our_tokenizer()
    clock = Clock()

    class Measured(Callback):
        def on_train_start(self, trainer, module):
            clock.tick()

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step % UPDATES == 0:
                clock.tick()

    def reward(completion: str) -> float:
        clock.tokens += len(completion)
        return share_of_digits(completion)

    module = GRPOModule(
        model,
        rewards=[reward],
        plan=RolloutPlan(samples_per_prompt=SAMPLES, max_new_tokens=NEW_TOKENS, minibatches=UPDATES),
        advantage=GroupAdvantage(scale="none"),
        objective=Objective(reduction=ConstantLength(max_tokens=NEW_TOKENS)),
        optimizer=AdamW(lr=LEARNING_RATE, weight_decay=0.0),
        schedule=Constant(warmup=0),
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
        callbacks=[Measured()],
    )
    records = [{"prompt": prompt} for prompt in prompts(rollouts)]
    trainer.fit(module, datamodule=PromptDataModule(records, 0, tokenizer=tokenizer, batch_size=PROMPTS, seed=seed))
    return clock.result()


def theirs(rollouts: int, seed: int) -> dict[str, float]:
    import datasets
    import tokenizers
    import transformers
    import trl

    from lightning_lm.models import save_huggingface

    transformers.set_seed(seed)
    inner_tokenizer, eos = our_tokenizer(), our_tokenizer().eos_id
    words = {character: inner_tokenizer.encode(character)[0] for character in CHARACTERS}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words | {"<unk>": 256, "<eos>": eos}, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    processing = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>", padding_side="left"
    )
    with tempfile.TemporaryDirectory() as folder:
        save_huggingface(small_model(), folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for settings in (model.config, model.generation_config):
            settings.bos_token_id, settings.eos_token_id, settings.pad_token_id = None, eos, eos
        clock = Clock()

        class Measured(transformers.TrainerCallback):
            def on_train_begin(self, *_, **__):
                clock.tick()

            def on_step_end(self, arguments, state, *_, **__):
                if state.global_step % UPDATES == 0:
                    clock.tick()

        def reward(completions: list[str], **_: object) -> list[float]:
            clock.tokens += sum(map(len, completions))
            return [share_of_digits(completion) for completion in completions]

        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=grpo_config(
                folder,
                seed=seed,
                max_steps=UPDATES * rollouts,
                per_device_train_batch_size=PROMPTS * SAMPLES // UPDATES,
                steps_per_generation=UPDATES,
                num_generations=SAMPLES,
                max_completion_length=NEW_TOKENS,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                logging_steps=UPDATES,
            ),
            train_dataset=datasets.Dataset.from_list([{"prompt": f"<eos>{text}"} for text in prompts(rollouts)]),
            processing_class=processing,
            callbacks=[Measured()],
        )
        trainer.train()
    return clock.result()


def in_a_process(name: str, rollouts: int, seed: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", name, "--rollouts", str(rollouts), "--seed", str(seed)]
    lines = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout.splitlines()
    return json.loads(lines[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rollouts", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=["lightning_lm", "trl"])
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    contenders = {"lightning_lm": ours, "trl": theirs}
    if args.one:
        print(json.dumps(contenders[args.one](args.rollouts, args.seed)))
        return
    rounds = []
    for index in range(args.rounds):
        order = list(contenders) if index % 2 == 0 else list(reversed(contenders))
        found = {name: in_a_process(name, args.rollouts, index + 1) for name in order}
        for entry in found.values():
            entry["cpu_ms_per_token"] = 1000 * entry["rollouts_cpu_s"] / entry["tokens"]
        rounds.append({name: {key: round(value, 3) for key, value in entry.items()} for name, entry in found.items()})
        print(rounds[-1], flush=True)
    ratios = {
        f"median_ratio_to_trl_of_{key}": round(
            statistics.median(entry["lightning_lm"][key] / entry["trl"][key] for entry in rounds), 3
        )
        for key in ("cpu_ms_per_token", "set_up_cpu_s", "peak_mib")
    }
    print(ratios)
    if args.output:
        write_record(args.output, command=" ".join(["python", *sys.argv]), results={"rounds": rounds, **ratios})


if __name__ == "__main__":
    main()
