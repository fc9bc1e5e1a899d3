"""What a kernel is held to: a share of what the device can do, and ratios to other libraries."""

from dataclasses import dataclass
from typing import Any, Literal

Phase = Literal["forward", "backward", "forward_backward"]


@dataclass(frozen=True)
class Work:
    """What an operation cannot do without: bytes to move or products to compute, in each direction."""

    unit: Literal["bytes", "flops"]
    forward: float
    backward: float = 0.0

    def floor_ms(self, phase: Phase, ceilings: dict[str, float]) -> float:
        """Return the time that the device's own copies or products would take."""
        amount = {"forward": self.forward, "backward": self.backward}.get(phase, self.forward + self.backward)
        rate = ceilings["copy_tb_per_s" if self.unit == "bytes" else "product_tflop_per_s"]
        return amount / rate / 1e9


@dataclass(frozen=True)
class Floor:
    """Reach a share of the floor in one phase."""

    phase: Phase
    share: float

    def __str__(self) -> str:
        """Return the goal in words."""
        return f"{self.phase} >= {self.share:.0%} of the floor"

    def judge(self, found: dict[str, Any], work: Work, ceilings: dict[str, float]) -> tuple[float, bool]:
        """Return what was reached, and whether that is enough."""
        reached = work.floor_ms(self.phase, ceilings) / found["ours"][f"{self.phase}_ms"]
        return reached, reached >= self.share


@dataclass(frozen=True)
class Faster:
    """Be so many times as fast as somebody else in one phase."""

    phase: Phase
    than: str
    times: float

    def __str__(self) -> str:
        """Return the goal in words."""
        return f"{self.phase} >= {self.times:g}x as fast as {self.than}"

    def judge(self, found: dict[str, Any], work: Work, ceilings: dict[str, float]) -> tuple[float, bool]:
        """Return what was reached, and whether that is enough."""
        reached = found[self.than][f"{self.phase}_ms"] / found["ours"][f"{self.phase}_ms"]
        return reached, reached >= self.times


@dataclass(frozen=True)
class Smaller:
    """Need at most a share of somebody else's memory."""

    than: str
    share: float

    def __str__(self) -> str:
        """Return the goal in words."""
        return f"peak memory <= {self.share:.2f} of {self.than}'s"

    def judge(self, found: dict[str, Any], work: Work, ceilings: dict[str, float]) -> tuple[float, bool]:
        """Return what was reached, and whether that is enough."""
        reached = found["ours"]["peak_mib"] / found[self.than]["peak_mib"]
        return reached, reached <= self.share


@dataclass(frozen=True)
class Exact:
    """Stay below an error, over the norm of the float64 result; `of` counts results, then gradients."""

    of: int
    limit: float

    def __str__(self) -> str:
        """Return the goal in words."""
        return f"error of number {self.of} <= {self.limit:g}"

    def judge(self, found: dict[str, Any], work: Work, ceilings: dict[str, float]) -> tuple[float, bool]:
        """Return what was reached, and whether that is enough."""
        reached = found["ours"]["relative_errors"][self.of]
        return reached, reached <= self.limit


Goal = Floor | Faster | Smaller | Exact


def judged(
    goals: tuple[Goal, ...], found: dict[str, Any], work: Work, ceilings: dict[str, float], *, dry: bool = False
) -> list[dict[str, Any]]:
    """Return a verdict for each goal: pass, miss, or none in a dry run or where a number is missing."""
    verdicts: list[dict[str, Any]] = []
    for goal in goals:
        names = "ours", getattr(goal, "than", "ours")
        failed = [name for name in names if "failed" in found.get(name, {"failed": ""})]
        try:
            reached, passed = goal.judge(found, work, ceilings)
        except (KeyError, ZeroDivisionError) as missing:
            why = f"{failed[0]} failed" if failed else f"nothing was measured: {missing}"
            verdicts.append({"goal": str(goal), "verdict": f"not judged: {why}"})
            continue
        verdict = "dry run" if dry else "pass" if passed else "miss"
        verdicts.append({"goal": str(goal), "reached": float(f"{reached:.3g}"), "verdict": verdict})
    return verdicts
