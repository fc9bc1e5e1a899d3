"""Real faults for everything that this package writes: kills, full disks, flipped bits.

A trial runs in a process of its own, forked from one that has everything imported. A kill ends it with SIGKILL in the
middle of a write or right before its n-th call that opens a file for writing, renames, removes or makes a folder; audit
hooks of Python see all of these. A limit on the size of files stands for a full disk. Nothing needs a compiler or root.
"""

import os
import re
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lightning_lm.errors import LightningLMError

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod"}


@dataclass(frozen=True)
class Writer:
    """One kind of files.

    Args:
        name: The kind.
        write: Writes the content of a version, 1 or 2, into a folder.
        read: Returns the version that a folder has, 0 if there is nothing; raises for anything else.
        optional: Files that are written but not the content: notes, locks.
    """

    name: str
    write: Callable[[Path, int], object]
    read: Callable[[Path], int]
    optional: tuple[str, ...] = ("lock", "compared.json", "SHA256SUMS")


def in_a_process(work: Callable[[], object]) -> int:
    """Return the exit status of some work in a forked process: 0, 1 after a named error, 2 after any other; or -9."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 2
    try:
        work()
        status = 0
    except LightningLMError:
        status = 1
    except OSError as error:
        status = 1 if error.filename is not None else 2
    finally:
        if status == 2:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)  # also after any other error


def killed_at(work: Callable[[], object], number: int, *, in_write: bool = False) -> bool:
    """Run some work, killed at its n-th change of a folder; return whether it came to its end before."""

    def run() -> None:
        calls = iter(range(number))

        def end(event: str, arguments: tuple[object, ...]) -> None:
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if (event in CHANGES or writes) and next(calls, None) is None:
                if not in_write:
                    os.kill(os.getpid(), signal.SIGKILL)
                # Files may grow by nothing from here on, and the system ends the process that tries.
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (1 + 37 * number, 1 + 37 * number))

        sys.addaudithook(end)
        work()

    status = in_a_process(run)
    assert status in (0, -signal.SIGKILL, -signal.SIGXFSZ), status
    return status == 0


def kill_everywhere(writer: Writer, folder: Path, *, step: int = 1, in_write: bool = False) -> int:
    """Replace version 1 by version 2, killed at each change; return the number of kills.

    What is left must be read as one of the two, or refused by a named error; the next write must succeed and leave no
    other file than a first write does.
    """
    template = folder / "template"
    writer.write(template, 1)
    clean = folder / "clean"
    writer.write(clean, 1)
    writer.write(clean, 2)
    names = _names(clean, writer)
    number = 0
    while True:
        place = folder / str(number)
        shutil.copytree(template, place)
        finished = killed_at(lambda place=place: writer.write(place, 2), number, in_write=in_write)
        try:
            version = writer.read(place)
        except LightningLMError:
            version = None
        assert version in ((2,) if finished else (1, 2, None)), f"{writer.name}, kill {number}: version {version}"
        if not finished:
            writer.write(place, 2)
            assert writer.read(place) == 2, f"{writer.name}, kill {number}: the next write"
            left = _names(place, writer) - names
            assert not left, f"{writer.name}, kill {number}: left behind {left}"
        shutil.rmtree(place)
        if finished:
            return -(-number // step)
        number += step


def fill_everywhere(writer: Writer, folder: Path, limits: tuple[int, ...]) -> int:
    """Replace version 1 by version 2 with less and less room; return the number of writes that failed.

    A failure is a named error, or one of the system with its path; version 1 stays.
    """
    template, failed = folder / "template", 0
    writer.write(template, 1)
    for limit in limits:
        place = folder / str(limit)
        shutil.copytree(template, place)

        def work(place: Path = place, limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            writer.write(place, 2)

        status = in_a_process(work)
        assert status in (0, 1), f"{writer.name}, {limit} bytes: an error without path or name"
        assert writer.read(place) == (2 if status == 0 else 1), f"{writer.name}, {limit} bytes"
        failed += status
        shutil.rmtree(place)
    return failed


def flip_everywhere(writer: Writer, folder: Path, flips: int, choose: Callable[[int], int]) -> tuple[int, int]:
    """Flip one bit of one file at a time; return how many were found and how many had no effect.

    What is read is version 1 or refused.
    """
    template, found, harmless = folder / "template", 0, 0
    writer.write(template, 1)
    files = sorted(path for path in template.rglob("*") if path.is_file() and path.stat().st_size)
    for number in range(flips):
        place = folder / f"flip-{number}"
        shutil.copytree(template, place)
        path = place / files[number % len(files)].relative_to(template)
        data, bit = bytearray(path.read_bytes()), choose(8 * path.stat().st_size)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            version = writer.read(place)
        except LightningLMError:
            found += 1
        else:
            assert version in (0, 1), f"{writer.name}: bit {bit} of {path.name} gives {version}"
            found, harmless = found + (version == 0), harmless + (version == 1)
        shutil.rmtree(place)
    return found, harmless


def _names(folder: Path, writer: Writer) -> set[str]:
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    # Shards of an export over another one have names of their own.
    return {re.sub("model-[0-9a-f]{8}-", "model-", name) for name in names if Path(name).name not in writer.optional}
