"""The inside of the sandbox: gives up every right it can, then runs the program it is handed. Standard library only.

It is started as a script by `lightning_lm.rewards.sandbox`, with the limits as JSON in its first argument and the
program on standard input, and ends with the program.

* Landlock: files may be read where Python lives and written in the working folder; nothing else can be opened.
* seccomp: no sockets, no second process, no signals to others, no tracing, no io_uring, no namespaces.
* rlimits: CPU seconds, memory, size of files, number of open files.

Both filters need no privileges and cannot be taken back. Source: Linux's ``landlock(7)`` and ``seccomp(2)``.
"""

import ctypes
import json
import os
import platform
import resource
import struct
import sys
from typing import NamedTuple

__all__ = ["main"]


# System calls that reach out of the process, by machine. The numbers are the kernel's.
class _Machine(NamedTuple):
    audit: int
    clone: int
    clone3: int
    denied: tuple[int, ...]


_MACHINES = {
    # socket connect socketpair | fork vfork | kill tkill tgkill pidfd_send_signal | ptrace process_vm_* |
    # mount unshare setns bpf perf_event_open keyctl io_uring_*
    "x86_64": _Machine(
        0xC000003E,
        56,
        435,
        (41, 42, 53, 57, 58, 62, 200, 234, 424, 101, 310, 311, 165, 272, 308, 321, 298, 250, 425, 426, 427),
    ),
    "aarch64": _Machine(
        0xC00000B7,
        220,
        435,
        (198, 203, 199, 129, 130, 131, 424, 117, 270, 271, 40, 97, 268, 280, 241, 219, 425, 426, 427),
    ),
}
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_EXECUTE, _READ_FILE, _LIST = 1 << 0, 1 << 2, 1 << 3
_READ = _EXECUTE | _READ_FILE | _LIST
_FIRST_RIGHTS, _REFER, _TRUNCATE, _IOCTL = (1 << 13) - 1, 1 << 13, 1 << 14, 1 << 15
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_FILTER = 38, 22, 2
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS = 1, 38
_CLONE_THREAD = 0x00010000
_X32 = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}: {os.strerror(ctypes.get_errno())}")
    return result


def _limit(limits: dict[str, int]) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_s"], limits["cpu_s"]))
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory_bytes"], limits["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits["file_bytes"], limits["file_bytes"]))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _restrict_files(readable: list[str], writable: str) -> None:
    version = _call(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    rights = _FIRST_RIGHTS | (_REFER if version >= 2 else 0)
    rights |= (_TRUNCATE if version >= 3 else 0) | (_IOCTL if version >= 5 else 0)
    ruleset = _call(_LANDLOCK_CREATE, struct.pack("Q", rights), ctypes.c_size_t(8), ctypes.c_uint32(0))
    for path, allowed in [*((path, _READ) for path in readable), (writable, rights & ~_IOCTL)]:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed &= -1 if os.path.isdir(path) else ~_LIST
        _call(_LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", allowed, folder), ctypes.c_uint32(0))
        os.close(folder)
    _call(_LANDLOCK_RESTRICT, ruleset, ctypes.c_uint32(0))
    os.close(ruleset)


def _instruction(code: int, true: int, false: int, value: int) -> bytes:
    return struct.pack("HBBI", code, true, false, value)


def _filter(machine: str) -> bytes:
    """Return the BPF program: refuse other machines, deny the calls of the table, allow only threads to be made."""
    table = _MACHINES[machine]
    load, equal, above, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    deny, absent = _instruction(answer, 0, 0, _ERRNO | _EPERM), _instruction(answer, 0, 0, _ERRNO | _ENOSYS)
    program = [
        _instruction(load, 0, 0, 4),  # architecture
        _instruction(equal, 1, 0, table.audit),
        _instruction(answer, 0, 0, _KILL),
        _instruction(load, 0, 0, 0),  # number of the call
        _instruction(above, 0, 1, _X32),
        deny,
        _instruction(equal, 0, 1, table.clone3),  # its flags are behind a pointer; the C library falls back to clone
        absent,
    ]
    for call in table.denied:
        program += [_instruction(equal, 0, 1, call), deny]
    program += [
        _instruction(equal, 0, 3, table.clone),
        _instruction(load, 0, 0, 16),  # its first argument: the flags
        _instruction(any_bit, 1, 0, _CLONE_THREAD),
        deny,
        _instruction(answer, 0, 0, _ALLOW),
    ]
    return b"".join(program)


def _restrict_calls() -> None:
    program = _filter(platform.machine())
    buffer = ctypes.create_string_buffer(program)
    descriptor = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    zero = ctypes.c_ulong(0)
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero):
        raise OSError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS")
    if _libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_FILTER), descriptor, zero, zero):
        raise OSError(ctypes.get_errno(), "PR_SET_SECCOMP")


def _read(size: int) -> bytes:
    """Read the program and not a byte more: what follows on standard input is the program's own to read."""
    chunks = []
    while size and (chunk := os.read(0, size)):
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def main() -> None:
    """Give up all rights, then run the program on standard input as ``__main__``."""
    limits = json.loads(sys.argv[1])
    program = _read(limits["program_bytes"]).decode()
    _limit(limits)
    zero = ctypes.c_ulong(0)
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero)
    _restrict_files([path for path in limits["readable"] if os.path.exists(path)], os.getcwd())
    _restrict_calls()
    sys.argv = ["program.py"]
    scope = {"__name__": "__main__", "__builtins__": __builtins__}
    exec(compile(program, "program.py", "exec"), scope)


if __name__ == "__main__":
    main()
