"""``--help`` of the Trainer's verbs: one page each, written without importing torch or Lightning."""

import textwrap

__all__ = ["DATA_MODULES", "MODULES", "plan_page", "trainer_page"]

MODULES = (
    "PretrainModule",
    "MaskedLMModule",
    "Seq2SeqModule",
    "SFTModule",
    "RewardModule",
    "DPOModule",
    "KTOModule",
    "GRPOModule",
    "PPOModule",
)
"""Names that ``--model`` takes; the first is the default."""
DATA_MODULES = (
    "TextDataModule",
    "MaskedTextDataModule",
    "DenoisingDataModule",
    "PrefixTextDataModule",
    "Seq2SeqDataModule",
    "ChatDataModule",
    "PreferenceDataModule",
    "UnpairedDataModule",
    "PromptDataModule",
    "QualityDataModule",
)
"""Names that ``--data`` takes; the first is the default."""

_ABOUT = {
    "fit": "Train a model.",
    "validate": "Measure a checkpoint on the validation text.",
    "test": "Measure a checkpoint on the test text.",
    "predict": "Run a checkpoint over a data set.",
    "profile": "Train for a few batches as fit would, and print where their time goes.\nNothing is logged or saved.",
}
_CHECKPOINT = {
    "fit": "checkpoint to resume from; last: this recipe's newest",
    "profile": "checkpoint to start from",
}
_OWN = {
    "profile": """\
  --trainer.callbacks+=Profile --trainer.callbacks.steps 20
                          number of batches that are timed (10)
""",
    "predict": """\
  --return_predictions false
                          do not keep the predictions in memory
""",
}


def trainer_page(verb: str) -> str:
    """Return the help of ``fit``, ``validate``, ``test``, ``predict`` or ``profile``.

    Args:
        verb: Name of the verb.
    """
    command = f"lightning-lm {verb}"
    return f"""\
usage: {command} --config NAME [--KEY VALUE ...]

{_ABOUT[verb]}

  --config NAME           recipe or YAML file; may be repeated, later ones win
  --ckpt_path PATH        {_CHECKPOINT.get(verb, "checkpoint to measure; last: this recipe's newest")}
  --weights_only false    also load checkpoints that may run code of theirs
  --seed_everything N     seed of all that is random (1)
  --print_config          print the whole configuration, and stop
{_OWN.get(verb, "")}
  --trainer.KEY VALUE     Trainer's arguments: max_steps, devices, ...
  --model NAME            {MODULES[0]} (default),
{_listed(MODULES[1:])}
                          or the import path of a LightningModule
  --model.KEY VALUE       its arguments
  --data NAME             {DATA_MODULES[0]} (default),
{_listed(DATA_MODULES[1:])}
                          or the import path of a LightningDataModule
  --data.KEY VALUE        its arguments

A class as a value, one more item of a list, an argument of an item:
  --model.optimizer Muon --model.optimizer.lr 0.01
  --trainer.callbacks+=EMA --trainer.callbacks.decay 0.99
  --trainer.callbacks.SampleText.every_n_steps 500

More help:
  {command} --trainer.help
  {command} --model.help GRPOModule
  {command} --model.optimizer.help
  {command} --trainer.callbacks.help SampleText
  lightning-lm recipes
"""


def plan_page() -> str:
    """Return the help of ``plan``."""
    return """\
usage: lightning-lm plan --config NAME --gpus N --gpu NAME [--KEY VALUE ...]

Print what a recipe needs on GPUs that are not here: memory, communication and
speed under every strategy, and the options of the one to take. Nothing is
read but the configuration; a model of any size takes no memory.

  --config NAME           recipe or YAML file, as fit takes it
  --gpus N                GPUs in all (8)
  --nodes N               machines; or --gpus-per-node N (8)
  --gpu NAME              h100 (default), h200, b200, a100, l40s, mi300x, ...
  --batch ROWS            rows, pairs or prompts of an optimizer step
  --sequence-length N     tokens of a row
  --precision P           bf16-mixed (default), bf16-true, 32-true, ...
  --accumulate N          micro-batches of a step, at least
  --mfu F                 measured speed of one GPU, in place of a model of it
  --json                  print everything as JSON
  --model.KEY VALUE       and all other options of fit

Figures of a GPU, for one that is not known, or other links:
  --memory-gib N          memory, GiB
  --tflops N              peak of matmuls in the run's precision, TFLOP/s
  --memory-bandwidth N    GB/s
  --link-bandwidth N      to GPUs of the same machine, GB/s in each direction
  --network-bandwidth N   between machines, GB/s for each GPU (50)
"""


def _listed(names: tuple[str, ...]) -> str:
    return textwrap.fill(", ".join(names), 80, initial_indent=" " * 26, subsequent_indent=" " * 26)
