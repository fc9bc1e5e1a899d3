"""A road: the stages from text to an aligned model as one YAML file, a recipe of recipes.

Each stage is a command that a user could type: ``lightning-lm fit --config RECIPE`` with settings, or another verb. A
stage of training starts from the one before it, unless it names another with ``from``::

    base: road/offline  # another road; what has the same name is changed, and null removes it
    title: A shorter road
    stages:
      pretrain: {settings: {trainer.max_steps: 100}}
      dpo: null
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_lm.cli.config.overlays import Overlay, Setting, check_command, plain, read_overlays
from lightning_lm.cli.recipes import find_recipe, road_names
from lightning_lm.cli.road.entries import check_keys, command_words, nearest, settings_of, text_of, value_of
from lightning_lm.errors import UsageError

__all__ = ["Road", "Score", "Stage", "nearest", "read_road"]

_KEYS = ("title", "prompts", "temperature", "stages", "scores")
_STAGE_KEYS = ("config", "command", "from", "settings", "expected_s")
_SCORE_KEYS = ("config", "command", "metrics", "settings")
_NAME = re.compile(r"[A-Za-z0-9][\w-]*")
_BEFORE = "the stage before"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage.

    Args:
        name: Its name, also of its runs.
        config: Recipe or YAML file of ``fit``; ``None`` for a stage of another verb.
        words: Words after ``lightning-lm`` of another verb; ``{output}`` is the folder of the road.
        start: Stage whose checkpoint the training starts from.
        settings: Options after the config, dotted; ``{output}`` in a text is the folder of the road.
        expected_s: Seconds that the stage takes on two free cores, for the time that is left.
    """

    name: str
    config: str | None = None
    words: tuple[str, ...] = ()
    start: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    expected_s: float = 60.0

    def command(self, output: Path, *, resume: bool = False, verb: str = "fit") -> list[str]:
        """Return the words after ``lightning-lm``.

        Args:
            output: Folder of the road.
            resume: Resume from the last checkpoint.
            verb: Verb of the Trainer, for a stage of training.
        """
        if self.config is None:
            return [word.replace("{output}", str(output)) for word in self.words]
        logger = ("--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", str(output / "runs"))
        words = [verb, "--config", self.config, *logger, "--trainer.logger.name", self.name]
        words += _checkpoint_words(None if self.start is None else output / "runs" / self.start)
        words += _option_words(self.settings, output)
        return [*words, "--ckpt_path", "last"] if resume else words

    def digest(self) -> str:
        """Return a digest of the command and of its configs, wherever the folder of the road is."""
        words = self.command(Path("{output}"))
        layers = [plain(layer.root) for config in _configs(words) for layer in read_overlays(config)]
        text = json.dumps([words, layers], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Score:
    """A measurement of every checkpoint: the validation of a recipe, or tasks of ``evaluate``.

    Args:
        name: Its name.
        config: Recipe or YAML file whose validation is run; ``None`` for tasks.
        words: Words after ``lightning-lm`` of an evaluation, without the checkpoint.
        metrics: Logged names that are reported; those of tasks are ``TASK/METRIC``.
        settings: Options after the config, dotted.
    """

    name: str
    config: str | None = None
    words: tuple[str, ...] = ()
    metrics: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def command(self, output: Path, checkpoint: Path | str) -> list[str]:
        """Return the words after ``lightning-lm`` that measure a checkpoint.

        Args:
            output: Folder of the road.
            checkpoint: Checkpoint, or folder of the runs of a stage.
        """
        if self.config is None:
            return [*self.evaluation(output), "--checkpoint", str(checkpoint)]
        words = ["validate", "--config", self.config, "--trainer.logger", "false", *_checkpoint_words(checkpoint)]
        return [*words, *self.options(output)]

    def evaluation(self, output: Path) -> list[str]:
        """Return the words of an evaluation, without the checkpoint.

        Args:
            output: Folder of the road.
        """
        return [word.replace("{output}", str(output)) for word in self.words]

    def options(self, output: Path) -> list[str]:
        """Return the settings as options.

        Args:
            output: Folder of the road.
        """
        return _option_words(self.settings, output)


@dataclass(frozen=True, kw_only=True)
class Road:
    """Stages in the order in which they run, and how their checkpoints are compared.

    Args:
        title: Heading of the report.
        stages: Stages.
        scores: Measurements after each stage of training.
        prompts: Texts that are continued after each stage of training.
        temperature: Sampling temperature of the samples.
    """

    title: str
    stages: tuple[Stage, ...]
    scores: tuple[Score, ...] = ()
    prompts: tuple[str, ...] = ()
    temperature: float = 0.8

    def stage(self, name: str) -> Stage:
        """Return the stage of a name.

        Args:
            name: Its name.

        Raises:
            UsageError: If there is none.
        """
        found = next((stage for stage in self.stages if stage.name == name), None)
        if found is None:
            names = [stage.name for stage in self.stages]
            raise UsageError(f"No stage is called {name!r}.{nearest(name, names)} The stages are: {', '.join(names)}.")
        return found

    def changed(self, options: Iterable[str]) -> "Road":
        """Return a road with other settings of stages.

        Args:
            options: ``STAGE.KEY=VALUE``, as ``pretrain.trainer.max_steps=100``.

        Raises:
            UsageError: If one has another form or names no stage.
        """
        stages = {stage.name: stage for stage in self.stages}
        for option in options:
            key, equals, value = option.partition("=")
            name, dot, setting = key.partition(".")
            if not equals or not dot or not setting:
                raise UsageError(f"--set takes STAGE.KEY=VALUE, as pretrain.trainer.max_steps=100; got {option!r}.")
            stage = self.stage(name)
            if stage.config is None:
                raise UsageError(f"--set {option}: the stage {name!r} is no training and has no settings.")
            stages[name] = replace(stages[name], settings={**stages[name].settings, setting: value})
        return replace(self, stages=tuple(stages.values()))

    def selected(self, first: str | None, last: str | None, only: Sequence[str]) -> set[str]:
        """Return the names of the stages to run.

        Args:
            first: First stage; ``None`` for that of the road.
            last: Last stage; ``None`` for that of the road.
            only: These stages alone.

        Raises:
            UsageError: If a name is that of no stage, or nothing is left.
        """
        if only and (first or last):
            raise UsageError("--only names the stages itself; leave out --from and --until.")
        if only:
            return {self.stage(name).name for name in only}
        begin = self.stages.index(self.stage(first)) if first else 0
        end = self.stages.index(self.stage(last)) if last else len(self.stages) - 1
        if begin > end:
            raise UsageError(f"--from {first} comes after --until {last}; exchange them.")
        return {stage.name for stage in self.stages[begin : end + 1]}


def read_road(name: str) -> Road:
    """Read a road, and before it those that it names as its base.

    Args:
        name: A path, or the name of a road of the package such as ``road/offline``.

    Raises:
        UsageError: If a file is missing or a key means nothing; the message has the line.
    """
    if not Path(name).is_file() and find_recipe(name) is None:
        roads = road_names()
        raise UsageError(
            f"--config {name!r} is neither a file nor a road.{nearest(name, roads)} The roads are: {', '.join(roads)}."
        )
    overlays = read_overlays(name)
    check_command(overlays, "stages")
    root = _merged(overlays)
    check_keys(root, _KEYS, "a road")
    stages = _stages(root)
    if not stages:
        raise UsageError(
            f"{name} has no stages. Start from a road that has: lightning-lm recipes show road/offline; one of your "
            "own may begin with `base: road/offline`."
        )
    values = {key: setting.value for key, setting in root.value.items()}
    prompts = plain(root.value["prompts"]) if values.get("prompts") is not None else []
    temperature = values.get("temperature", 0.8)
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise UsageError(f"prompts: in {root.value['prompts'].place} must be a list of texts.")
    if not isinstance(temperature, int | float) or isinstance(temperature, bool) or temperature < 0:
        raise UsageError(f"temperature: in {root.value['temperature'].place} must be 0 or more, got {temperature!r}.")
    return Road(
        title=str(values.get("title", name)),
        stages=stages,
        scores=tuple(_score(*item) for item in _entries(root, "scores")),
        prompts=tuple(prompts),
        temperature=float(temperature),
    )


def _merged(overlays: Sequence[Overlay]) -> Setting:
    root = Setting({})
    for overlay in overlays:
        root = _over(root, _located(overlay.root, overlay.path.parent))
    return root


def _located(root: Setting, folder: Path) -> Setting:
    """Name the configs that lie beside a file by their paths."""
    value = dict(root.value)
    for kind in ("stages", "scores"):
        entries = value.get(kind)
        if entries is None or not isinstance(entries.value, dict):
            continue
        changed = dict(entries.value)
        for name, entry in changed.items():
            config = entry.value.get("config") if isinstance(entry.value, dict) else None
            if config is not None and (folder / str(config.value)).is_file():
                path = Setting(str(folder / config.value), config.place)
                changed[name] = Setting({**entry.value, "config": path}, entry.place)
        value[kind] = Setting(changed, entries.place)
    return Setting(value, root.place)


def _over(below: Setting, above: Setting) -> Setting:
    if not isinstance(below.value, dict) or not isinstance(above.value, dict):
        return above
    merged = dict(below.value)
    for key, value in above.value.items():
        merged[key] = _over(merged[key], value) if key in merged else value
    return Setting(merged, above.place)


def _entries(root: Setting, key: str) -> list[tuple[str, Setting]]:
    entries = root.value.get(key, Setting({}))
    if entries.value is None:
        return []
    if not isinstance(entries.value, dict):
        raise UsageError(f"{key}: in {entries.place} must hold a name with settings below it for each.")
    kept = [(name, entry) for name, entry in entries.value.items() if entry.value is not None]
    for name, entry in kept:
        if not _NAME.fullmatch(name):
            raise UsageError(f"The name {name!r} in {entry.place} is also that of files; use letters, digits, - and _.")
        if not isinstance(entry.value, dict):
            raise UsageError(f"{key}.{name} in {entry.place} must hold keys such as config:, got {entry.value!r}.")
    return kept


def _stages(root: Setting) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    for name, entry in _entries(root, "stages"):
        check_keys(entry, _STAGE_KEYS, f"the stage {name!r}")
        config, command = (text_of(entry, key) for key in ("config", "command"))
        if (config is None) == (command is None):
            raise UsageError(
                f"The stage {name!r} in {entry.place} needs either config:, a recipe of fit, or command:, another verb."
            )
        expected_s = value_of(entry, "expected_s", 60.0)
        if not isinstance(expected_s, int | float) or isinstance(expected_s, bool) or not 0 < expected_s < 1e9:
            raise UsageError(f"expected_s of the stage {name!r} in {entry.place} must be seconds, got {expected_s!r}.")
        words = () if command is None else command_words(command, name, entry)
        start = None if config is None else _start(entry, name, stages)
        settings = settings_of(entry, name)
        if config is None and settings:
            raise UsageError(f"The stage {name!r} in {entry.place} has settings:, which belong to config:.")
        stages.append(
            Stage(name=name, config=config, words=words, start=start, settings=settings, expected_s=float(expected_s))
        )
    return tuple(stages)


def _start(entry: Setting, name: str, before: Sequence[Stage]) -> str | None:
    trained = [stage.name for stage in before if stage.config is not None]
    wanted = value_of(entry, "from", _BEFORE)
    if wanted == _BEFORE:
        return trained[-1] if trained else None
    if wanted is not None and wanted not in trained:
        raise UsageError(
            f"The stage {name!r} starts from {wanted!r}, which is no stage of training before it."
            f"{nearest(str(wanted), trained)}\n  Written in {entry.value['from'].place}. "
            f"Before it come: {', '.join(trained) or 'none'}."
        )
    return None if wanted is None else str(wanted)


def _score(name: str, entry: Setting) -> Score:
    check_keys(entry, _SCORE_KEYS, f"the score {name!r}")
    config, command, metrics = text_of(entry, "config"), text_of(entry, "command"), value_of(entry, "metrics", None)
    if (config is None) == (command is None) or not isinstance(metrics, list) or not metrics:
        raise UsageError(
            f"The score {name!r} in {entry.place} needs config:, a recipe, and metrics:, a list such as [val/pass@1]; "
            "or command:, as evaluate --tasks reverse, and metrics: [reverse/exact_match]."
        )
    names = tuple(str(plain(metric)) for metric in metrics)
    settings = settings_of(entry, name)
    if command is None:
        return Score(name=name, config=config, metrics=names, settings=settings)
    words = command_words(command, name, entry)
    if words[0] != "evaluate" or settings:
        raise UsageError(
            f"command: of the score {name!r} in {entry.place} must be evaluate --tasks A,B and its options, without "
            "settings: besides; the checkpoint is added."
        )
    return Score(name=name, words=words, metrics=names)


def _configs(words: Sequence[str]) -> list[str]:
    """Return the recipes and YAML files that a command names."""
    found = [after for word, after in itertools.pairwise(words) if word == "--config"]
    return found + [word.removeprefix("--config=") for word in words if word.startswith("--config=")]


def _checkpoint_words(checkpoint: Path | str | None) -> list[str]:
    if checkpoint is None:
        return []
    return ["--model.model", "CheckpointModel", "--model.model.checkpoint", str(checkpoint)]


def _option_words(settings: Mapping[str, Any], output: Path) -> list[str]:
    words = []
    for key, value in settings.items():
        text = value.replace("{output}", str(output)) if isinstance(value, str) else json.dumps(value)
        words += [f"--{key}", text]
    return words
