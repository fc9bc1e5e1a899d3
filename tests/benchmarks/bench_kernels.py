"""Time, error and memory of every kernel beside torch, compiled torch, Liger-Kernel and cut-cross-entropy, and goals.

Ceilings come first: a large copy and a large product. Then the providers of an operation take turns in one process, in
rounds of fresh random inputs, with the L2 cache overwritten before each repetition; a time is the median of CUDA
events, of the forward pass and of forward and backward; scalar losses get an upstream gradient of a half, so that the
path that scales is taken. Beside it stand the largest error of results and gradients against float64 and the peak
memory beyond the inputs. A provider that fails is a line with its failure. Then come the goals: what was reached, and
whether that is enough.

Each finished operation is a line of ``<output>.jsonl``; ``--resume`` goes on after the last one. One size of every
operation comes before the second of any, so that a run that is cut has seen all. Without a GPU shapes are small and
times mean nothing: that is to see that everything runs.

``--correct`` compares with float64 alone: ours beside eager torch, once, and exit status 1 if a result or a gradient of
ours has failed, or is further off than one percent and twice what torch is.

    python tests/benchmarks/bench_kernels.py --output tests/benchmarks/results/kernels.json
    python tests/benchmarks/bench_kernels.py --correct
    python tests/benchmarks/bench_kernels.py --only "rms_norm*" "linear_*" --rounds 5
"""

import argparse
import json
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from kernel_cases import DEVICE, ON_GPU, Case, cases, randn
from kernel_goals import judged
from record import write_record
from torch import Tensor
from tqdm import tqdm

from lightning_lm import kernels
from lightning_lm.kernels.runtime.launch import is_installed
from lightning_lm.kernels.tuning import Stopwatch

FAILURES: tuple[type[Exception], ...] = (
    ImportError,
    RuntimeError,
    TypeError,
    AttributeError,
    ValueError,
    AssertionError,
)
"""What a provider that cannot do it here may raise."""
if is_installed():
    from triton.errors import TritonError

    FAILURES += (TritonError,)


def ceilings() -> dict[str, float]:
    """Return what the device can copy, and multiply in bfloat16."""
    size, side = (2**30, 8192) if ON_GPU else (2**20, 64)
    source, target = (torch.empty(size, dtype=torch.int8, device=DEVICE) for _ in range(2))
    a, b = randn(side, side).detach(), randn(side, side).detach()
    watch = Stopwatch(DEVICE, 10)
    return {
        "copy_tb_per_s": float(f"{2 * size / watch(lambda: target.copy_(source)) / 1e6:.4g}"),
        "product_tflop_per_s": float(f"{2 * side**3 / watch(lambda: a @ b) / 1e6:.4g}"),
    }


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return tuple(results) if isinstance(results, tuple | list) else (results,)


def upstream_of(results: tuple[Tensor, ...]) -> list[Tensor]:
    """Return a half for a loss, and noise that is the same for every provider for everything else."""
    generator = torch.Generator(device=DEVICE).manual_seed(1)
    noise = (torch.randn(x.shape, generator=generator, device=DEVICE) for x in results)
    return [torch.full_like(x, 0.5) if x.dim() == 0 else n.to(x) for x, n in zip(results, noise, strict=True)]


class Provider:
    """One implementation on one set of inputs: its own copies, because some write to what they are given."""

    def __init__(self, case: Case, function: Callable[..., Any], inputs: list[Tensor]) -> None:
        self.inputs = [x.detach().clone().requires_grad_(case.gradient) for x in inputs]
        self.function, self.gradient = function, case.gradient
        self.upstream: list[Tensor] | None = None

    def forward(self) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return as_tuple(self.function(*self.inputs))

    def both(self) -> tuple[Tensor, ...]:
        """Return results and gradients."""
        if not self.gradient:
            return self.forward()
        results = as_tuple(self.function(*self.inputs))
        if self.upstream is None:
            self.upstream = upstream_of(results)
        return *(x.detach() for x in results), *torch.autograd.grad(results, self.inputs, self.upstream)


def measure(case: Case, function: Callable[..., Any], inputs: list[Tensor], watch: Stopwatch) -> dict[str, float]:
    """Return milliseconds of both directions, and the peak memory of both beyond the inputs."""
    provider, found = Provider(case, function, inputs), {}
    if case.gradient:
        provider.both()  # compiles
    found["forward_ms"] = watch(provider.forward) / 1e3
    if case.gradient:
        found["forward_backward_ms"] = watch(provider.both) / 1e3
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        provider.both()
        found["peak_mib"] = (torch.cuda.max_memory_allocated() - held) / 2**20
    return found


def errors(case: Case, inputs: list[Tensor], provider: Callable[..., Any], exact: tuple[Tensor, ...]) -> list[float]:
    """Return the error of each result and gradient over the norm of the exact one."""
    found = Provider(case, provider, inputs).both()
    pairs = ((a.double(), b) for a, b in zip(found, exact, strict=True))
    return [float(f"{((a - b).norm() / b.norm().clamp(min=1e-30)).item():.3g}") for a, b in pairs]


def fits_in_float64(inputs: list[Tensor]) -> bool:
    """Return whether float64 of everything stays within some tens of GB."""
    return sum(tensor.numel() for tensor in inputs) < 1.1e9


def run(case: Case, *, rounds: int, repetitions: int, bar: Any) -> dict[str, dict[str, Any]]:
    """Let the providers take turns; return the summary of each."""
    torch.compiler.reset()  # what was compiled for other shapes would soon be too much, and this run eagerly
    watch = Stopwatch(DEVICE, max(repetitions // 4, 1) if case.slow else repetitions)
    series: dict[str, list[dict[str, float]]] = {name: [] for name in case.providers}
    found: dict[str, dict[str, Any]] = {name: {} for name in case.providers}
    for number in range(rounds):
        inputs = case.make()
        exact: tuple[Tensor, ...] = ()
        if number == 0 and fits_in_float64(inputs):
            exact = Provider(case, case.oracle, [x.double() for x in inputs]).both()
        for name in (*case.providers,) if number % 2 == 0 else (*reversed(case.providers),):
            bar.set_postfix_str(f"{case.name}, {name}", refresh=True)
            bar.update()
            if "failed" in found[name]:
                continue
            try:
                series[name].append(measure(case, case.providers[name], inputs, watch))
                if exact and name not in case.unchecked:
                    found[name]["relative_errors"] = errors(case, inputs, case.providers[name], exact)
            except FAILURES as failure:
                found[name] = {"failed": f"{type(failure).__name__}: {failure}"[:200]}
    return {name: one if "failed" in one else summary(series[name]) | one for name, one in found.items()}


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Return medians of times, and the largest peak."""
    together = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    if "peak_mib" in together:
        together["peak_mib"] = max(one["peak_mib"] for one in rounds)
    if "forward_backward_ms" in together:
        together["backward_ms"] = max(together["forward_backward_ms"] - together["forward_ms"], 0.0)
    return {key: float(f"{value:.4g}") for key, value in together.items()}


def table(case: Case, found: dict[str, dict[str, Any]], ceiling: dict[str, float], verdicts: list[dict]) -> str:
    """Return what is printed for a case."""
    lines = [f"\n{case.name}"]
    lines += [f"  {'':<18}{'forward ms':>11}{'backward ms':>12}{'of floor':>9}{'peak MiB':>10}  largest error"]
    phase = "forward_backward" if case.gradient else "forward"
    for name, one in found.items():
        if "failed" in one:
            lines.append(f"  {name:<18}{one['failed'][:100]}")
            continue
        share = case.work.floor_ms(phase, ceiling) / one[f"{phase}_ms"]
        worst = f"{max(one['relative_errors']):.1e}" if "relative_errors" in one else "-"
        backward = f"{one['backward_ms']:>12.4g}" if "backward_ms" in one else f"{'-':>12}"
        peak = f"{one['peak_mib']:>10.0f}" if "peak_mib" in one else f"{'-':>10}"
        lines.append(f"  {name:<18}{one['forward_ms']:>11.4g}{backward}{share:>9.0%}{peak}  {worst}")
    for one in verdicts:
        reached = f": {one['reached']:.3g}" if "reached" in one else ""
        lines.append(f"    goal {one['goal']}{reached}  [{one['verdict']}]")
    return "\n".join(lines)


def kept(path: Path | None) -> dict[str, Any]:
    """Return the operations that an earlier run on such a device finished, by name."""
    if path is None or not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["case"]: line["found"] for line in lines if line["device"] == device_name()}


def device_name() -> str:
    return torch.cuda.get_device_name() if ON_GPU else "cpu"


def chosen(arguments: argparse.Namespace, done: dict[str, Any]) -> list[Case]:
    patterns = [pattern if "*" in pattern else f"{pattern} *" for pattern in arguments.only]
    every = sizes_in_turn(case for case in cases() if any(fnmatchcase(case.name, pattern) for pattern in patterns))
    if arguments.correct:
        every = [replace(case, providers=ours_and_torch(case), goals=()) for case in every]
    if not every:
        names = ", ".join(sorted({case.name.split()[0] for case in cases()}))
        raise SystemExit(f"--only {' '.join(arguments.only)} names no operation; there are {names}.")
    return [case for case in every if case.name not in done]


def sizes_in_turn(every: Iterable[Case]) -> list[Case]:
    """Return the first size of each operation, then the second of each, and so on."""
    seen: Counter[str] = Counter()
    turns = []
    for case in every:
        operation = case.name.rpartition(" ")[0]
        turns.append((seen[operation], case))
        seen[operation] += 1
    return [case for _, case in sorted(turns, key=lambda turn: turn[0])]


def ours_and_torch(case: Case) -> dict[str, Callable[..., Any]]:
    return {name: function for name, function in case.providers.items() if name in ("ours", "torch")}


TOLERANCE = 0.01
"""Error over the norm of the exact result that rounding to bfloat16 explains; torch's own may be larger."""


def wrong(found: dict[str, dict[str, Any]]) -> str | None:
    """Return what is wrong with ours beside float64 and torch, or ``None``."""
    ours, limits = found["ours"], found.get("torch", {}).get("relative_errors", [])
    if "failed" in ours:
        return str(ours["failed"])
    for number, error in enumerate(ours.get("relative_errors", ())):
        limit = max(TOLERANCE, 2 * limits[number] if number < len(limits) else 0.0)
        if not error <= limit:
            return f"number {number} is off by {error:g}, allowed {limit:g}"
    return None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where the record goes; printed only where left out")
    parser.add_argument("--only", nargs="+", default=["*"], help="names of operations, or patterns of whole names")
    parser.add_argument("--resume", action="store_true", help="skip what is in <output>.jsonl")
    parser.add_argument("--correct", action="store_true", help="compare with float64 only, once; fail if ours is wrong")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=20 if ON_GPU else 1)
    arguments = parser.parse_args()
    if arguments.resume and not arguments.output:
        parser.error("--resume needs --output.")
    if arguments.correct:
        arguments.rounds = arguments.repetitions = 1
    return arguments


def main() -> int:
    arguments = parse()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch.manual_seed(0)
    kernels.report()
    ceiling = ceilings()
    print(ceiling, "" if ON_GPU else "No GPU: a dry run in small; times, floors and goals mean nothing.", sep="\n")
    lines = arguments.output and arguments.output.with_suffix(".jsonl")
    results: dict[str, Any] = kept(lines) if arguments.resume else {}
    work = chosen(arguments, results)
    if lines and not arguments.resume:
        lines.parent.mkdir(parents=True, exist_ok=True)
        lines.write_text("", encoding="utf-8")
    with tqdm(total=sum(len(case.providers) for case in work) * arguments.rounds, disable=None, unit="turn") as bar:
        for case in work:
            found = run(case, rounds=arguments.rounds, repetitions=arguments.repetitions, bar=bar)
            verdicts = judged(case.goals, found, case.work, ceiling, dry=not ON_GPU)
            results[case.name] = {**found, "goals": verdicts}
            bar.write(table(case, found, ceiling, verdicts))
            if lines:
                with lines.open("a", encoding="utf-8") as file:
                    file.write(
                        json.dumps({"case": case.name, "device": device_name(), "found": results[case.name]}) + "\n"
                    )
    verdicts = [one["verdict"].split(":")[0] for found in results.values() for one in found["goals"]]
    print("\nGoals:", ", ".join(f"{verdicts.count(kind)} {kind}" for kind in ("pass", "miss", "dry run", "not judged")))
    if arguments.output:
        dry = {} if ON_GPU else {"dry_run": True}
        write_record(
            arguments.output, command=shlex.join(["python", *sys.argv]), results={**dry, "ceilings": ceiling, **results}
        )
    faults = {case.name: wrong(results[case.name]) for case in work} if arguments.correct else {}
    for name, fault in faults.items():
        print(f"{name}: {'correct' if fault is None else f'WRONG: {fault}'}")
    return int(any(faults.values()))


if __name__ == "__main__":
    sys.exit(main())
