"""``lightning-lm plan``: memory, communication and speed of a recipe on GPUs that are not here, for every strategy."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import rich

from lightning_lm.cli.numbers import COUNT, POSITIVE, UP_TO_ONE
from lightning_lm.cli.plan_module import PlannedCommandLine
from lightning_lm.cli.plan_strategies import Candidate, Cluster, Planner, best
from lightning_lm.cli.plan_table import memory_table, reasons, speed_table, summary
from lightning_lm.cli.trainer import prepare, print_class_help
from lightning_lm.errors import UsageError
from lightning_lm.scaling.gpus import GPUS, Gpu, find_gpu
from lightning_lm.scaling.training_time import COMPILED, EAGER, Rates

__all__ = ["add_arguments", "run"]

_FIGURES = {
    "memory_gib": ("memory_bytes", 2.0**30),
    "tflops": ("half_flops_per_s", 1e12),
    "memory_bandwidth": ("memory_bytes_per_s", 1e9),
    "link_bandwidth": ("link_bytes_per_s", 1e9),
    "network_bandwidth": ("network_bytes_per_s", 1e9),
}


def run(verb: str, words: Sequence[str]) -> None:
    """Print what every strategy would need, and how fast it would be.

    Args:
        verb: ``plan``.
        words: The command line after the verb: options of its own, and that of ``fit``.

    Raises:
        UsageError: If a key, a class or a value on the command line or in the YAML cannot be used.
        ConfigurationError: If the GPU is not known.
    """
    parser = argparse.ArgumentParser(prog=f"lightning-lm {verb}", add_help=False, allow_abbrev=False)
    add_arguments(parser)
    options, rest = parser.parse_known_args(words)
    rest = [*(word for name in options.config for word in ("--config", name)), *rest]
    prepare()
    if print_class_help("fit", rest):
        return
    if options.precision is not None:
        rest += ["--trainer.precision", options.precision]
    if options.accumulate is not None:
        rest += ["--trainer.accumulate_grad_batches", str(options.accumulate)]
    line = PlannedCommandLine(rest)
    batch = line.batch(options.batch, options.sequence_length)
    cluster = _cluster(options, compiles=line.compiles)
    planner = Planner(line, cluster, batch)
    candidates = planner.plan()
    chosen = best(candidates)
    command = None if chosen is None else " ".join([chosen.words, *_settings(chosen, cluster, options, line)])
    if options.json:
        print(json.dumps(_record(planner, candidates, chosen, command), indent=2))
        return
    console = rich.get_console()
    console.print(summary(planner), highlight=False)
    console.print(memory_table(candidates, cluster))
    console.print(speed_table(candidates))
    console.print(reasons(candidates), highlight=False, end="")
    if line.objective.note:
        console.print(line.objective.note, highlight=False)
    console.print(_recommendation(chosen, command), highlight=False, soft_wrap=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that ``lightning-lm plan`` adds to those of ``fit``; `pages.plan_page` explains them.

    Args:
        parser: The parser of the verb.
    """
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--gpus", type=COUNT, default=8)
    parser.add_argument("--nodes", type=COUNT)
    parser.add_argument("--gpus-per-node", type=COUNT)
    parser.add_argument("--gpu", default="h100")
    for name in _FIGURES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=POSITIVE)
    parser.add_argument("--batch", type=COUNT)
    parser.add_argument("--sequence-length", type=COUNT)
    parser.add_argument("--precision")
    parser.add_argument("--accumulate", type=COUNT)
    parser.add_argument("--mfu", type=UP_TO_ONE)
    parser.add_argument("--json", action="store_true")


def _cluster(options: argparse.Namespace, *, compiles: bool) -> Cluster:
    """Return the GPUs of the options.

    Raises:
        UsageError: If their numbers do not fit together.
    """
    node = options.gpus_per_node or (options.gpus // options.nodes if options.nodes else min(8, options.gpus))
    if options.gpus % max(node, 1) or (options.nodes or options.gpus // max(node, 1)) * node != options.gpus:
        raise UsageError(
            f"--gpus {options.gpus} are not {options.nodes or 'whole'} machines of {node}; give --gpus, and --nodes or "
            "--gpus-per-node, that fit together."
        )
    rates = Rates(fused=COMPILED if compiles else EAGER, whole_step=options.mfu)
    return Cluster(gpu=_gpu(options), gpus=options.gpus, gpus_per_node=node, rates=rates)


def _gpu(options: argparse.Namespace) -> Gpu:
    given = {field: getattr(options, name) * unit for name, (field, unit) in _FIGURES.items() if getattr(options, name)}
    known = len(given) < len(_FIGURES) - 1  # the network has a default
    if "half_flops_per_s" in given:  # in the run's precision, whichever that is
        given |= dict.fromkeys(("tf32_flops_per_s", "single_flops_per_s"), given["half_flops_per_s"])
    return replace(find_gpu(options.gpu) if known else next(iter(GPUS.values())), **given, name=_gpu_name(options))


def _gpu_name(options: argparse.Namespace) -> str:
    same = [name for name in GPUS if name.lower() == options.gpu.lower()]
    return same[0] if same else str(options.gpu)


def _settings(chosen: Candidate, cluster: Cluster, options: argparse.Namespace, line: PlannedCommandLine) -> list[str]:
    """Return the other options of ``fit`` that the plan is about."""
    nodes = cluster.gpus // cluster.gpus_per_node
    words = [] if cluster.gpus == 1 else [f"--trainer.devices {cluster.gpus_per_node}"]
    words += [f"--trainer.num_nodes {nodes}"] if nodes > 1 else []
    words += [f"--trainer.precision {line.settings.trainer.precision}"]
    words += [f"--trainer.accumulate_grad_batches {chosen.micro_batches}"] if chosen.micro_batches > 1 else []
    return words + ([f"--data.batch_size {options.batch}"] if options.batch else [])


def _recommendation(chosen: Candidate | None, command: str | None) -> str:
    if chosen is None:
        return "Nothing fits. The reasons above say what helps each strategy most."
    return f"Recommended: {chosen.name}\n  {command}"


def _record(planner: Planner, candidates: list[Candidate], chosen: Candidate | None, command: str | None) -> Any:
    def of(candidate: Candidate) -> dict[str, Any]:
        time = candidate.time
        return {
            "name": candidate.name,
            "options": candidate.words,
            "fits": not candidate.reason,
            "reason": candidate.reason or None,
            "micro_batch": candidate.micro_batch,
            "accumulate_grad_batches": candidate.micro_batches,
            "memory_bytes": candidate.memory and {**candidate.memory._asdict(), "total": candidate.memory.total},
            "communication": [one._asdict() for one in candidate.exchanged],
            "time": time and {**time._asdict(), "step_s": time.step_s},
        }

    return {
        "gpu": vars(planner.cluster.gpu),
        "gpus": planner.cluster.gpus,
        "batch": planner.batch._asdict(),
        "precision": planner.precision,
        "strategies": [of(candidate) for candidate in candidates],
        "recommended": chosen and chosen.name,
        "command": command,
    }
