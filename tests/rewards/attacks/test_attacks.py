"""Programs that try to leave the sandbox. Each must be refused, and leave the machine as it was."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_lm.rewards.sandbox import Sandbox

PREPARE = """
import ctypes, os, signal, socket, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    result = libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result
parent, outside = os.getppid() or 1, OUTSIDE
"""

ATTACKS = {
    "kill parent": "os.kill(parent, signal.SIGTERM)",
    "kill trainer": "os.kill(TRAINER, 0)",
    "kill everyone": "os.kill(-1, 9)",
    "tgkill": "call(234, TRAINER, TRAINER, 0)",
    "rt_sigqueueinfo": "call(129, TRAINER, 10, bytes(128))",
    "rt_tgsigqueueinfo": "call(297, TRAINER, TRAINER, 10, bytes(128))",
    "pidfd_open": "call(434, TRAINER, 0)",
    "pidfd_send_signal": "call(424, 3, 9, None, 0)",
    "prlimit cpu of the trainer": "import resource; resource.prlimit(TRAINER, resource.RLIMIT_CPU, (1, 1))",
    "prlimit file size of the trainer": "import resource; resource.prlimit(TRAINER, resource.RLIMIT_FSIZE, (0, 0))",
    "priority of the trainer": "call(141, 0, TRAINER, 19)",
    "fcntl owner": "import fcntl; fcntl.fcntl(0, 8, TRAINER)",
    "fcntl signal": "import fcntl; fcntl.fcntl(0, 10, 9)",
    "fcntl lease": "import fcntl; fcntl.fcntl(0, 1024, 1)",
    "ioctl to a terminal": "import fcntl; fcntl.ioctl(1, 0x5412, b'x')",
    "ptrace": "call(101, 16, TRAINER, 0, 0)",
    "process_vm_readv": "call(310, TRAINER, bytes(16), 1, bytes(16), 1, 0)",
    "process_vm_writev": "call(311, TRAINER, bytes(16), 1, bytes(16), 1, 0)",
    "kcmp": "call(312, TRAINER, TRAINER, 0, 0, 0)",
    "fork": "os.fork()",
    "vfork": "call(58)",
    "spawn": "import subprocess; subprocess.run(['/bin/true'])",
    "posix_spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "exec": "os.execv(sys.executable, ['python'])",
    "clone3": "call(435, bytes(88), 88)",
    "socket": "socket.socket()",
    "unix socket": "socket.socket(socket.AF_UNIX)",
    "socketpair": "socket.socketpair()",
    "netlink": "socket.socket(16, 3)",
    "io_uring": "call(425, 8, bytes(120))",
    "bpf": "call(321, 0, bytes(120), 120)",
    "perf": "call(298, bytes(120), 0, -1, -1, 0)",
    "userfaultfd": "call(323, 0)",
    "keyctl": "call(250, 0, -3, 0)",
    "unshare": "call(272, 0x10000000)",
    "setns": "call(308, 3, 0)",
    "mount": "call(165, b'tmpfs', b'/', b'tmpfs', 0, None)",
    "pivot_root": "call(155, b'.', b'.')",
    "chroot": "os.chroot('/')",
    "open_tree": "call(428, -100, b'/', 0)",
    "mknod of a disk": "os.mknod('disk', 0o60600, os.makedev(8, 0))",
    "setuid": "os.setuid(0)",
    "capset": "call(126, bytes(8), bytes(24))",
    "read outside": "open(outside).read()",
    "read shadow": "open('/etc/shadow').read()",
    "read environment": "open(f'/proc/{TRAINER}/environ').read()",
    "read own memory file": "open('/proc/self/mem', 'rb')",
    "list root": "os.listdir('/')",
    "write outside": "open(outside, 'w')",
    "truncate outside": "os.truncate(outside, 0)",
    "write tmp": "open('/tmp/escaped', 'w')",
    "unlink outside": "os.unlink(outside)",
    "rename outside": "os.rename(outside, 'here')",
    "hard link": "os.link(outside, 'here')",
    "chmod outside": "os.chmod(outside, 0o777)",
    "chown outside": "os.chown(outside, 1, 1)",
    "utime outside": "os.utime(outside, (0, 0))",
    "setxattr outside": "os.setxattr(outside, 'user.a', b'1')",
    "stat outside": "os.stat(outside)",
    "access outside": "os.access(outside, os.F_OK) or os.stat('/none')",
    "write the library": "open(os.__file__, 'a')",
    "shared memory": "call(29, 77, 4096, 0o1777)",
    "semaphores": "call(64, 77, 1, 0o1777)",
    "message queue": "call(68, 77, 0o1777)",
    "posix queue": "call(240, b'q', 0o102, 0o600, None)",
    "memfd": "os.memfd_create('x')",
    "set time": "call(227, 0, bytes(16))",
    "reboot": "call(169, 0, 0, 0, 0)",
    "swap": "call(167, b'/x', 0)",
    "host name": "call(170, b'x', 1)",
    "module": "call(175, b'', 0, b'')",
    "new seccomp filter": "call(317, 0, 0, None)",
    "dumpable": "call(157, 4, 1, 0, 0, 0) or call(101, 0)",
    "death signal": "call(157, 1, 9, 0, 0, 0) or call(101, 0)",
    "32-bit call numbers": "call(0x40000000 + 39)",
}
COLLECT = """
import json
outcomes = {}
for name, attack in ATTACKS.items():
    try:
        exec(attack)
        outcomes[name] = "done"
    except (OSError, ImportError) as error:
        outcomes[name] = f"refused {error.errno if isinstance(error, OSError) else ''}"
print(json.dumps(outcomes))
"""
RUN = """
import json, sys
from lightning_lm.rewards.sandbox import Sandbox
print(json.dumps(vars(Sandbox(time_s=60).run(sys.stdin.read()))))
"""


def program_of(outside: Path) -> str:
    names = f"\nTRAINER = {os.getpid()}\nATTACKS = {ATTACKS!r}\n"
    return PREPARE.replace("OUTSIDE", repr(str(outside))) + names + COLLECT


@pytest.mark.parametrize("user", ["as it is", "ordinary"])
def test_every_attack_is_refused_and_leaves_nothing(user, tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("private")
    before = outside.stat()
    limits = {name: resource.getrlimit(name) for name in (resource.RLIMIT_CPU, resource.RLIMIT_FSIZE)}
    as_other = [shutil.which("unshare"), "--user", "--map-user=1000", "--map-group=1000"] if user == "ordinary" else []
    run = subprocess.run(
        [*as_other, sys.executable, "-c", RUN], input=program_of(outside), capture_output=True, text=True, check=True
    )
    result = json.loads(run.stdout)
    assert result["exit_code"] == 0, result
    outcomes = json.loads(result["stdout"])
    assert set(outcomes) == set(ATTACKS)
    assert {name: outcome for name, outcome in outcomes.items() if not outcome.startswith("refused")} == {}
    assert outside.read_text() == "private"
    after = outside.stat()
    same = ("st_mode", "st_uid", "st_gid", "st_mtime_ns", "st_nlink")
    assert [getattr(after, name) for name in same] == [getattr(before, name) for name in same]
    assert limits == {name: resource.getrlimit(name) for name in limits}
    assert not Path("/tmp/escaped").exists()


BOMBS = {
    "memory": "x = bytearray(1 << 34)",
    "threads": "import threading\nwhile True: threading.Thread(target=threading.Event().wait, daemon=True).start()",
    "disk": "for n in range(1000): open(str(n), 'wb').write(bytes(1 << 20))",
    "files": "for n in range(100_000): open(str(n), 'w').close()",
    "output": "while True: print('x' * 1000)",
    "time": "while True: pass",
    "sleep": "import time; time.sleep(1000)",
    "ignored signals": "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)",
    "crash": "import ctypes; ctypes.string_at(0)",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_end_and_leave_nothing(bomb, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = Sandbox(time_s=2).run(BOMBS[bomb])
    assert not result.ok
    assert list(tmp_path.iterdir()) == []


def test_nested_folders_do_not_stop_the_clean_up(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    Sandbox(time_s=20).run("import os\nfor n in range(900):\n    os.mkdir('d' * 200)\n    os.chdir('d' * 200)")
    assert list(tmp_path.iterdir()) == []


def test_the_program_cannot_be_read_again_from_standard_input():
    program = "import os\nos.lseek(0, 0, 0)\nassert b'SECRET' not in os.read(0, 10000)\nprint('SECRET'[:0] + 'ok')"
    assert Sandbox(time_s=20).run(program, stdin="given").stdout == "ok\n"
