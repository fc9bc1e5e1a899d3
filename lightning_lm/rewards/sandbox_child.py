"""The inside of the sandbox: gives up every right it can, then runs the program it is handed. Standard library only.

It is started as a script by `lightning_lm.rewards.sandbox`, with its settings as JSON in the first argument, and ends
with the program. In this order:

* namespaces, if the kernel gives them: a user without privileges, no other process, no network, no System V IPC, and a
  root folder of its own that has the standard library, read-only, and an empty work folder in memory of 16 MiB;
* rlimits: CPU seconds, memory, size of files, open files, processes;
* no capability, and no way to get one;
* Landlock: the library may be read, the work folder written; no TCP, no signal to processes outside;
* seccomp: the system calls that a Python program needs, and no other.

Source: Linux's ``user_namespaces(7)``, ``landlock(7)`` and ``seccomp(2)``.
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import struct
import sys
from typing import Any, NamedTuple

__all__ = ["main"]


class _Machine(NamedTuple):
    audit: int
    allowed: tuple[int, ...]
    clone: int
    ioctl: int
    fcntl: int
    prctl: int
    prlimit: int
    pivot_root: int
    capset: int


# The calls are: files below the Landlock rules (open, read, write, stat, rename, unlink, mkdir, ...), memory, time,
# threads (futex, rseq, ...), own signal handlers, pipes and polling, and questions about the process itself.
_MACHINES = {
    "x86_64": _Machine(
        0xC000003E,
        (
            *(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 18, 19, 20, 21, 22, 23, 24, 25, 28, 32, 33, 35),
            *(36, 37, 38, 39, 60, 63, 74, 75, 76, 77, 79, 80, 81, 82, 83, 84, 87, 89, 95, 96, 97, 98, 99, 100, 102),
            *(104, 107, 108, 110, 131, 158, 186, 201, 202, 204, 213, 217, 218, 228, 229, 230, 231, 232, 233, 257, 258),
            *(262, 263, 264, 267, 269, 270, 271, 273, 274, 281, 290, 291, 292, 293, 316, 318, 324, 332, 334, 439),
        ),
        *(56, 16, 72, 157, 302, 155, 126),
    ),
    "aarch64": _Machine(
        0xC00000B7,
        (
            *(17, 19, 20, 21, 22, 23, 24, 34, 35, 38, 45, 46, 48, 49, 50, 56, 57, 59, 61, 62, 63, 64, 65, 66, 67, 68),
            *(72, 73, 78, 79, 80, 82, 83, 93, 94, 96, 98, 99, 100, 101, 102, 103, 113, 114, 115, 123, 124, 132, 134),
            *(135, 139, 153, 160, 163, 165, 166, 169, 172, 173, 174, 175, 176, 177, 178, 179, 214, 215, 216, 222, 226),
            *(233, 276, 278, 283, 291, 293, 439),
        ),
        *(220, 29, 25, 167, 261, 41, 91),
    ),
}
_IOCTLS = (0x5401, 0x5413, 0x5450, 0x5451, 0x541B)  # terminal size and settings, close-on-exec, bytes to read
_FCNTLS = (0, 1, 2, 3, 4, 1030)  # duplicate, flags: not the owner of a signal, no lease
_PRCTLS = (15, 16, 0x53564D41)  # names of threads and mappings
_CLONE3, _CLONE_THREAD, _X32 = 435, 0x00010000, 0x40000000
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_EXECUTE, _READ_FILE, _LIST = 1 << 0, 1 << 2, 1 << 3
_READ = _EXECUTE | _READ_FILE | _LIST
_FIRST_RIGHTS, _REFER, _TRUNCATE, _IOCTL = (1 << 13) - 1, 1 << 13, 1 << 14, 1 << 15
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_FILTER, _PR_CAPBSET_DROP, _PR_SET_PDEATHSIG = 38, 22, 2, 24, 1
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS = 1, 38
_NEW_USER, _NEW_REST = 0x10000000, 0x00020000 | 0x08000000 | 0x20000000 | 0x40000000 | 0x04000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_NOBODY = 65534
_WORK = "/sandbox-work"

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _call(number: int, *arguments: object) -> int:
    return _checked(int(_libc.syscall(ctypes.c_long(number), *arguments)), f"system call {number}")


# --- namespaces ---


def _separate() -> bool:
    """Enter namespaces as a user without a name; tell whether the kernel gave them."""
    user, group = os.getuid(), os.getgid()
    if _libc.unshare(_NEW_USER | _NEW_REST) < 0:
        return False
    maps = (("setgroups", "deny"), ("uid_map", f"{_NOBODY} {user} 1"), ("gid_map", f"{_NOBODY} {group} 1"))
    for name, text in maps:
        with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def _has_own_root(readable: list[str], folder: str) -> bool:
    try:
        _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
        _own_root(readable, folder)
    except OSError:
        return False
    return True


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _checked(_libc.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]), f"mount {target}")


def _own_root(readable: list[str], root: str) -> None:
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=64k,nr_inodes=512,mode=755")
    for path in dict.fromkeys([*readable, *map(os.path.realpath, readable)]):
        target = root + path
        if os.path.lexists(target):
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.mkdir(target)
        else:
            open(target, "w").close()
        _mount(path, target, None, _MS_BIND | _MS_REC)
        with contextlib.suppress(OSError):  # flags of the mount below may be locked; Landlock refuses writing too
            _mount(None, target, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    work = f"{root}{_WORK}"
    os.mkdir(work)
    _mount("tmpfs", work, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=16m,nr_inodes=1024,mode=700")
    os.chdir(root)
    _call(_MACHINES[platform.machine()].pivot_root, b".", b".")
    _checked(_libc.umount2(b".", 2), "umount")  # detaches the old root
    os.chdir(_WORK)


def _fork_into_own_processes() -> None:
    """Continue as process 1 of the new namespace; the outer process passes its end on."""
    child = os.fork()
    if child == 0:
        _libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(9))
        return
    for descriptor in range(3, 16):
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


# --- limits, privileges, files, system calls ---


def _limit(limits: dict[str, Any], separate: bool) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_s"], limits["cpu_s"]))
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory_bytes"], limits["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits["file_bytes"], limits["file_bytes"]))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if separate:  # else all processes of the user would count
        resource.setrlimit(resource.RLIMIT_NPROC, (64, 64))


def _drop_privileges() -> None:
    zero = ctypes.c_ulong(0)
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero), "PR_SET_NO_NEW_PRIVS")
    for capability in range(64):
        _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), zero, zero, zero)
    _call(_MACHINES[platform.machine()].capset, struct.pack("Ii", 0x20080522, 0), bytes(24))


def _restrict_files(readable: list[str], writable: str | None) -> bool:
    try:
        version = _call(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    except OSError:
        return False
    rights = _FIRST_RIGHTS | (_REFER if version >= 2 else 0)
    rights |= (_TRUNCATE if version >= 3 else 0) | (_IOCTL if version >= 5 else 0)
    attributes = struct.pack("QQQ", rights, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _call(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    rules = [(path, _READ) for path in readable] + ([(writable, rights & ~_IOCTL)] if writable else [])
    for path, allowed in rules:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed &= -1 if os.path.isdir(path) else ~_LIST
        _call(_LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", allowed, folder), ctypes.c_uint32(0))
        os.close(folder)
    _call(_LANDLOCK_RESTRICT, ruleset, ctypes.c_uint32(0))
    os.close(ruleset)
    return True


_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06


def _instruction(code: int, true: int, false: int, value: int) -> bytes:
    return struct.pack("HBBI", code, true, false, value)


def _only_with(call: int, argument: int, values: tuple[int, ...]) -> list[bytes]:
    """Allow a call if its argument is one of the values, and refuse it otherwise."""
    checks = [_instruction(_EQUAL, len(values) - place, 0, value) for place, value in enumerate(values)]
    block = [_instruction(_LOAD, 0, 0, 16 + 8 * argument), *checks, _instruction(_RETURN, 0, 0, _ERRNO | _EPERM)]
    block.append(_instruction(_RETURN, 0, 0, _ALLOW))
    return [_instruction(_EQUAL, 0, len(block), call), *block]


def _filter(machine: str) -> bytes:
    """Return the BPF program: allow the calls of the table, threads alone of clone, and refuse everything else."""
    table = _MACHINES[machine]
    deny, allow = _instruction(_RETURN, 0, 0, _ERRNO | _EPERM), _instruction(_RETURN, 0, 0, _ALLOW)
    program = [
        _instruction(_LOAD, 0, 0, 4),  # architecture
        _instruction(_EQUAL, 1, 0, table.audit),
        _instruction(_RETURN, 0, 0, _KILL),
        _instruction(_LOAD, 0, 0, 0),  # number of the call
        _instruction(_AT_LEAST, 0, 1, _X32),
        deny,
        _instruction(_EQUAL, 0, 1, _CLONE3),  # its flags are behind a pointer; the C library falls back to clone
        _instruction(_RETURN, 0, 0, _ERRNO | _ENOSYS),
        _instruction(_EQUAL, 0, 4, table.clone),
        _instruction(_LOAD, 0, 0, 16),  # its first argument: the flags
        _instruction(_ANY_BIT, 1, 0, _CLONE_THREAD),
        deny,
        allow,
        *_only_with(table.ioctl, 1, _IOCTLS),
        *_only_with(table.fcntl, 1, _FCNTLS),
        *_only_with(table.prctl, 0, _PRCTLS),
        *_only_with(table.prlimit, 0, (0,)),
    ]
    for call in table.allowed:
        program += [_instruction(_EQUAL, 0, 1, call), allow]
    return b"".join([*program, deny])


def _restrict_calls() -> None:
    program = _filter(platform.machine())
    buffer = ctypes.create_string_buffer(program)
    descriptor = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    zero = ctypes.c_ulong(0)
    _checked(_libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_FILTER), descriptor, zero, zero), "PR_SET_SECCOMP")


# --- the program ---


def _read_all(descriptor: int) -> bytes:
    with open(descriptor, "rb") as file:
        return file.read()


def main() -> None:
    """Give up all rights, say which could be given up, then run the program as ``__main__``."""
    settings = json.loads(sys.argv[1])
    program = _read_all(settings["program_fd"]).decode("utf-8", "surrogatepass")
    readable = [path for path in settings["readable"] if os.path.exists(path)]
    separate = _separate()
    own_root = separate and _has_own_root(readable, settings["root"])
    if separate:
        _fork_into_own_processes()
    _limit(settings, separate)
    _drop_privileges()
    landlock = _restrict_files([path for path in readable if os.path.exists(path)], _WORK if own_root else None)
    _restrict_calls()
    os.write(settings["report_fd"], json.dumps({"namespaces": own_root, "landlock": landlock}).encode())
    os.close(settings["report_fd"])
    if not (landlock or own_root) or os.getuid() == 0:
        os._exit(125)  # not a box: the parent refuses the machine
    sys.argv = ["program.py"]
    scope = {"__name__": "__main__", "__builtins__": __builtins__}
    exec(compile(program, "program.py", "exec"), scope)


if __name__ == "__main__":
    main()
