"""Lightning's verbs: ``fit``, ``validate``, ``test`` and ``predict``, from YAML and the command line."""

import errno
import importlib
import logging
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import Strategy

from lightning_lm import __version__
from lightning_lm.callbacks.formatting import number
from lightning_lm.cli.class_help import class_help, names_help
from lightning_lm.cli.config.check import Checker, command_line_settings, with_new_names
from lightning_lm.cli.config.class_paths import class_path
from lightning_lm.cli.config.defaults import defaults_of_changes, fast_precision
from lightning_lm.cli.config.explain import explain, is_a_users_mistake, with_place
from lightning_lm.cli.config.list_items import change_items
from lightning_lm.cli.config.overlays import check_command, expand_configs, in_fewer_configs, plain
from lightning_lm.cli.config.signatures import Argument, arguments_of
from lightning_lm.cli.run_folder import SaveConfig, newest_checkpoint, run_folder, sound_checkpoint
from lightning_lm.cli.run_record import own_folder, recorded
from lightning_lm.datamodules import TextDataModule
from lightning_lm.errors import CheckpointError, ConfigurationError, LightningLMError, RunStopped, UsageError
from lightning_lm.modules import PretrainModule
from lightning_lm.modules.checkpoint_files import reads_only_stock, refusal
from lightning_lm.modules.signal_stop import SignalStop
from lightning_lm.modules.signals import stop_signals
from lightning_lm.parts import Limit, check_numbers
from lightning_lm.storage import resolve_checkpoint
from lightning_lm.strategies import AtomicCheckpointIO
from lightning_lm.strategies.checkpoints.sharded import is_sharded
from lightning_lm.strategies.checkpoints.stock_folder import is_stock
from lightning_lm.tokenizers import TrainBPE

__all__ = ["CommandLine", "prepare", "print_class_help", "run"]

_PARTS = ("callbacks", "data", "datamodules", "models", "modules", "optim", "strategies", "tokenizers")
_SEED = 1
_LIMITS = {  # a clip below zero would turn gradients round
    "gradient_clip_val": Limit.NON_NEGATIVE,
    "accumulate_grad_batches": Limit.COUNT,
    "log_every_n_steps": Limit.NON_NEGATIVE,
}
"""Ranges of numbers of the Trainer, which Lightning does not check."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CHATTER = ("💡 Tip", "TPU available", "Trainer already configured with model summary")
_DEFAULTS = {"model": PretrainModule, "data": TextDataModule}
_IMPLIED = {"data.tokenizer": TrainBPE}
_NOT_IN_YAML = {"self", "model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders"}


def run(verb: str, words: Sequence[str]) -> None:
    """Parse, build and run one of the Trainer's verbs.

    Args:
        verb: The name of a method of the Trainer.
        words: The command line after the verb.

    Raises:
        UsageError: If a key, a class or a value on the command line or in the YAML cannot be used.
    """
    prepare()
    if not print_class_help(verb, words):
        CommandLine(verb, words)


def print_class_help(verb: str, words: Sequence[str]) -> bool:
    """Print the help that ``--KEY.help`` or ``--KEY.help CLASS`` asks for; return whether one does.

    Args:
        verb: The name of a method of the Trainer.
        words: The command line after the verb.
    """
    index = next((index for index, word in enumerate(words) if word.partition("=")[0].endswith(".help")), None)
    if index is None:
        return False
    option, equals, name = words[index].partition("=")
    following = [word for word in words[index + 1 : index + 2] if not word.startswith("--")]
    name = name if equals else next(iter(following), "")
    expanded, overlays = change_items(*expand_configs([*words[:index], *words[index + 1 + len(following) :]]))
    checker = _checker(verb)
    for layer in (*(overlay.root for overlay in overlays), command_line_settings(expanded)):
        checker.check(layer)
    key = option.removeprefix("--").removesuffix(".help")
    argument, cls = checker.find(key)
    cls = checker.named(name, key) if name else cls
    parts = [class_help(cls, key, ours=cls is not Trainer)] if cls is not None else []
    if not name and cls is not Trainer:
        parts.append(names_help(argument, key))
    print("\n\n".join(parts))
    return True


def prepare() -> None:
    """Make short class names resolve, and Lightning say less, before a `CommandLine` is built."""
    _hush()
    for name in _PARTS:  # short class names resolve once their modules are imported
        importlib.import_module(f"lightning_lm.{name}")


class CommandLine(LightningCLI):
    """LightningCLI with this package's defaults: any module and data module, ours where none is named.

    Args:
        verb: The name of a method of the Trainer.
        words: The command line after the verb.
    """

    def __init__(self, verb: str, words: Sequence[str]) -> None:
        self._verb = verb
        expanded, overlays = change_items(*expand_configs(words))
        check_command(overlays, "trainer")
        self._layers = [*(overlay.root for overlay in overlays), command_line_settings(expanded)]
        expanded = self._checked(verb, expanded)
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            seed_everything_default=_SEED,
            auto_configure_optimizers=False,
            parser_kwargs={"exit_on_error": False, "dump_header": [f"lightning-lm {__version__}"]},
            args=[verb, *expanded],
        )

    def _checked(self, verb: str, words: list[str]) -> list[str]:
        """Check every layer; return the words with each new part's defaults in front of the layer that names it."""
        checker = _checker(verb)
        configs = [index for index, word in enumerate(words) if word.startswith("--config=")]
        after_configs = configs[-1] + 1 if configs else 0
        defaults: list[tuple[int, str | None]] = []
        has_old_names = False
        for layer, place in zip(self._layers, [*configs, after_configs], strict=True):
            defaults.append((place, defaults_of_changes(checker.check(layer))))
            has_old_names |= bool(checker.renamed)
        result = with_new_names(words, checker.renamed) if checker.renamed else list(words)
        if has_old_names:  # the layers have new ones now, and may have items of lists in common
            for layer, place in zip(self._layers, configs, strict=False):
                result[place] = f"--config={yaml.safe_dump(plain(layer), sort_keys=False, allow_unicode=True)}"
        for place, text in reversed(defaults):
            if text is not None:
                result.insert(place, f"--config={text}")
        return in_fewer_configs(result)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return this verb alone: a parser takes a tenth of a second to build, and the others are not asked."""
        return {self._verb: LightningCLI.subcommands()[self._verb]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Make `PretrainModule` and `TextDataModule` the defaults, so that YAML need not name them."""
        parser.set_defaults({key: {"class_path": class_path(cls)} for key, cls in _DEFAULTS.items()})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the expanded command line, and report a mistake in one block that starts with the mistake.

        The verb's own parser reads it: through the parser of all verbs, which prints, every value is checked once more.
        """
        assert isinstance(args, list)
        verb, *words = args
        prints = any(word.startswith("--print_config") for word in words)
        try:
            if prints:
                parser.parse_args(args)
            config = self._parser(verb).parse_args(words)
            self.config = Namespace({"subcommand": verb, verb: config})  # type: ignore[no-untyped-call]
        except ArgumentError as error:
            raise UsageError(explain(str(error), self._layers)) from error
        # LightningCLI would read the file here, without our checks, and put what it was trained with over the YAML.
        config = self.config[self.config.subcommand]
        self._checkpoint, config["ckpt_path"] = config.get("ckpt_path"), None
        try:
            _check_numbers(config)
        except ConfigurationError as error:
            raise UsageError(with_place(str(error), self._layers)) from error

    def before_instantiate_classes(self) -> None:
        """Settle which checkpoint to load, that loading one runs no code from it, and the precision."""
        config = self.config[self.subcommand]
        trainer = config["trainer"]
        if trainer.get("precision") is None and all(map(_only_saves, _listed(trainer.get("plugins")))):
            trainer["precision"] = fast_precision(str(trainer.get("accelerator")))
        if config.get("weights_only") is None:
            config["weights_only"] = True
        config["ckpt_path"] = self._checkpoint
        if self._checkpoint == "last":
            self._use_newest_checkpoint(config)
        elif self._checkpoint is not None and Path(self._checkpoint).is_dir():
            config["ckpt_path"] = str(resolve_checkpoint(self._checkpoint))

    def instantiate_classes(self) -> None:
        """Build Trainer, model and data; a value that a constructor refuses is reported with its place."""
        config = self.config[self.subcommand]
        # Written out once, for the folder of the run and as what the model was built from; the parser has validated it.
        text = self._parser(self.subcommand).dump(config, skip_unset=False, skip_validation=True)
        self.config_dump, self.save_config_kwargs["text"] = yaml.safe_load(text), text
        with own_folder(config["trainer"], str(self.subcommand)):
            self._instantiate()

    def _instantiate(self) -> None:
        try:
            super().instantiate_classes()
        except ConfigurationError as error:
            raise UsageError(with_place(str(error), self._layers)) from error
        except LightningLMError:
            raise
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            if not is_a_users_mistake(error):
                raise
            raise UsageError(explain(str(error), self._layers)) from error

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the verb; what Lightning refuses about its settings is reported as a mistake of the command line."""
        _require_readable(self.config_init[subcommand].get("ckpt_path"), self.trainer.strategy)
        try:
            super()._run_subcommand(subcommand)
        except OSError as error:
            if error.filename is not None or error.errno not in _NO_ROOM:
                raise
            # A write that fails has no path; checkpoints and caches name theirs, so these are the logs.
            folders = [getattr(logger, "log_dir", None) for logger in self.trainer.loggers]
            raise OSError(error.errno, error.strerror, folders[0] if folders else None) from error
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            if isinstance(error, LightningLMError) or not is_a_users_mistake(error):
                raise
            raise UsageError(explain(str(error), self._layers)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer; checkpoints are written atomically unless another plugin is asked for."""
        plugins = _listed(self.config_init[self.subcommand]["trainer"].get("plugins"))
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins = [*plugins, AtomicCheckpointIO()]
        return super().instantiate_trainer(plugins=plugins, **kwargs)

    def fit(self, **arguments: Any) -> None:
        """Train; signals end the set-up at once and training at the end of a step, see `SignalStop`."""
        SignalStop.attach(self.trainer)
        kill = getattr(self.trainer.strategy.launcher, "kill", None)
        with recorded(self.trainer), stop_signals.handled(kill=kill):
            self._fit(arguments)

    def _fit(self, arguments: dict[str, Any]) -> None:
        """Train; after a KeyboardInterrupt, to which Lightning responds with a plain exit, say how to resume."""
        try:
            self.trainer.fit(**arguments)
        except RunStopped:
            raise
        except SystemExit:
            if not self.trainer.interrupted:
                raise
            newest = newest_checkpoint(self.config[self.subcommand]["trainer"])
            how = "no checkpoint was saved" if newest is None else f"--ckpt_path last resumes from {newest}"
            raise KeyboardInterrupt(f"That was step {self.trainer.global_step:,}; {how}.") from None

    def validate(self, **arguments: Any) -> None:
        """Measure, and print whole names with as many digits as matter."""
        self._measure(self.trainer.validate, arguments)

    def test(self, **arguments: Any) -> None:
        """Measure, and print whole names with as many digits as matter."""
        self._measure(self.trainer.test, arguments)

    def _measure(self, verb: Callable[..., list[Mapping[str, float]]], arguments: dict[str, Any]) -> None:
        results = verb(**{**arguments, "verbose": False})
        if self.trainer.is_global_zero:
            values = {name: value for result in results for name, value in result.items()}
            width = max(map(len, values), default=0)
            for name, value in values.items():
                print(f"{name:<{width}}  {number(value)}")

    def _use_newest_checkpoint(self, config: Any) -> None:
        path, folder = newest_checkpoint(config["trainer"]), run_folder(config["trainer"])
        if path is None:
            if self.subcommand != "fit":
                raise CheckpointError(
                    f"--ckpt_path last: there is no last*.ckpt under {folder}; give the path of a file."
                )
            config["ckpt_path"] = None
            print(f"No checkpoint under {folder}: training starts from the beginning.", file=sys.stderr)
            return
        path, reports = sound_checkpoint(path)
        if reports and "LOCAL_RANK" not in os.environ:  # only the process that was started by hand reports
            print(*reports, f"Resuming from {path} instead.", sep="\n", file=sys.stderr)
        config["ckpt_path"] = str(path)
        logger = config["trainer"].get("logger")
        if hasattr(logger, "get") and folder in path.parents and logger["init_args"].get("version") is None:
            logger["init_args"]["version"] = path.relative_to(folder).parts[0]


def _check_numbers(config: Any) -> None:
    """Refuse numbers that Lightning takes and cannot use."""
    check_numbers(_LIMITS, {name: config["trainer"].get(name) for name in _LIMITS})
    seed = config.get("seed_everything")
    if not isinstance(seed, bool) and isinstance(seed, int) and not 0 <= seed < 2**32:
        raise ConfigurationError(f"seed_everything={seed} must be from 0 to {2**32 - 1}.")


def _require_readable(path: str | None, strategy: Strategy) -> None:
    """Refuse the folder of a sharded run where a strategy of Lightning would read it, which knows only its own.

    Raises:
        CheckpointError: If it would.
    """
    if path and reads_only_stock(strategy) and is_sharded(path) and not is_stock(path):
        raise refusal(path, strategy)


def _hush() -> None:
    """Drop what Lightning says at every start and a user can do nothing about."""
    for message in (r".*LeafSpec.*is deprecated", r"torch\.distributed\.nn\.functional\.all_gather is deprecated"):
        warnings.filterwarnings("ignore", message=message)  # Lightning 2.6 with torch 2.13
    # Here a part that replaces another has its own defaults, so what equals the other's was asked for.
    warnings.filterwarnings("ignore", message=".*LightningCLI keeps the values")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_news)
    logging.getLogger("jsonargparse_null_logger").setLevel(logging.CRITICAL)  # formats 2,000 records for no handler


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_CHATTER)


def _checker(verb: str) -> Checker:
    return Checker(_top_level(verb), {"trainer": Trainer, **_DEFAULTS}, _IMPLIED)


def _top_level(verb: str) -> dict[str, Argument]:
    arguments = arguments_of(getattr(Trainer, verb)) or {}
    own = {name: argument for name, argument in arguments.items() if name not in _NOT_IN_YAML}
    return {
        "seed_everything": Argument(bool | int),
        "trainer": Argument(Trainer),
        "model": Argument(LightningModule),
        "data": Argument(LightningDataModule),
        **own,
        "print_config": Argument(str),
    }


def _listed(plugins: Any) -> list[Any]:
    return plugins if isinstance(plugins, list) else [] if plugins is None else [plugins]


def _only_saves(plugin: Any) -> bool:
    """Return whether a parsed plugin only concerns checkpoints, so that the precision stays open."""
    cls = pkgutil.resolve_name(plugin["class_path"]) if hasattr(plugin, "get") else None
    return isinstance(cls, type) and issubclass(cls, CheckpointIO)
