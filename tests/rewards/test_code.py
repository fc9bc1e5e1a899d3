"""Programs that try to get out, programs that try to win without solving anything, and honest ones."""

import json
import os
from pathlib import Path

import pytest

from lightning_lm.errors import DataError
from lightning_lm.rewards.code import CodeOutput, CodeTests, extract_code
from lightning_lm.rewards.sandbox import Sandbox

QUICK = Sandbox(time_s=10)


def test_an_honest_program_runs() -> None:
    result = QUICK.run("import json, math\nprint(json.dumps(math.gcd(12, 18)), input())", stdin="hello\n")
    assert result.stderr == ""
    assert result.stdout == "6 hello\n"
    assert result.ok


@pytest.mark.parametrize(
    "escape",
    [
        "import socket; socket.create_connection(('127.0.0.1', 80))",
        "import socket; socket.socketpair()",
        "import os; os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.kill(os.getppid(), 9)",
        "print(open('/etc/passwd').read())",
        "import os; print(os.listdir('/'))",
        "import os; print(open(f'/proc/{os.getppid()}/environ').read())",
        "open('/tmp/escaped', 'w')",
        "import os; os.link('/etc/hostname', 'here')",
        "import os; os.unlink('../stdin')",
        "import ctypes; assert ctypes.CDLL(None).syscall(425, 8, b'0' * 120) >= 0, 'PermissionError'",
    ],
)
def test_no_way_out(escape: str) -> None:
    result = QUICK.run(escape)
    assert not result.ok
    assert (
        any(f"[Errno {number}]" in result.stderr for number in (1, 2, 13))
        or "AssertionError: PermissionError" in result.stderr
    )


def test_the_environment_and_the_files_of_the_parent_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "token")
    (tmp_path / "key").write_text("private")
    assert "SECRET" not in QUICK.run("import os; print(dict(os.environ))").stdout
    assert "private" not in QUICK.run(f"print(open({str(tmp_path / 'key')!r}).read())").stdout


def test_threads_and_the_working_folder_may_be_used() -> None:
    program = (
        "import threading\nt = threading.Thread(target=lambda: open('note', 'w').write('x')); t.start(); t.join()\n"
    )
    result = QUICK.run(program + "print(open('note').read())")
    assert (result.stdout, result.stderr) == ("x\n", "")


def test_time_memory_and_output_are_limited() -> None:
    assert Sandbox(time_s=1).run("while True: pass").timed_out
    assert "MemoryError" in QUICK.run("x = bytearray(1 << 30)").stderr
    flood = QUICK.run("while True: print('x' * 1000)")
    assert not flood.ok
    assert len(flood.stdout) <= 1 << 20


def test_code_tests_reward_only_programs_that_reach_the_end() -> None:
    completions = [
        "Sure:\n```python\ndef add(a, b):\n    return a + b\n```\nDone.",
        "def add(a, b):\n    return a - b",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "def add(:",
        "anything",
    ]
    tests = ["assert add(1, 2) == 3"] * 5 + [None]
    rewards = CodeTests(sandbox=QUICK)(prompts=[""] * 6, completions=completions, tests=tests)
    assert rewards == [1.0, 0.0, 0.0, 0.0, 0.0, None]


def test_code_output_is_judged_outside() -> None:
    cases = [{"input": "2\n", "output": "4"}, {"input": "-3\n", "output": "9\n"}]
    completions = ["```py\nprint(int(input()) ** 2)\n```", "print(4)", "print('4\\n9')"]
    assert CodeOutput(sandbox=QUICK)(prompts=[""] * 3, completions=completions, cases=[cases] * 3) == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    "completion",
    [
        "x = 1\n",
        "a\n```python\ny = 2\n```\n```python\nx = 1\n```\nb",
        "```python3\nx = 1\n```",
        "```py\nx = 1\n```",
        "```Python title=a.py\nx = 1\n```",
        "```\nx = 1\n```",
        "~~~python\nx = 1\n~~~",
        "````python\nx = 1\n````",
        "```python\r\nx = 1\r\n```\r\n",
        "1. So:\n   ```python\n   x = 1\n   ```",
        "```python\nx = 1\n```\nOutput:\n```\n3\n```",
        "```\nx = 1\n```\nOutput:\n```\n[1, 2]\n```",
        "```python\nx = 1\n```\n```bash\npip install x\n```",
        "```python\nx = 1\n",
    ],
)
def test_extract_code(completion: str) -> None:
    assert extract_code(completion).strip() == "x = 1"


MBPP = ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]


@pytest.mark.parametrize("tests", [MBPP, tuple(MBPP), json.dumps(MBPP), "\n".join(MBPP), "\r\n".join(MBPP)])
def test_tests_may_be_a_list(tests: object) -> None:
    completions = ["def add(a, b):\n    return a + b", "def add(a, b):\n    return 3", ""]
    columns = {"prompts": [""] * 3, "completions": completions, "test_list": [tests] * 3}
    assert CodeTests(sandbox=QUICK, column="test_list")(**columns) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("tests", [[], "", "[]", 3, [1], {"a": 1}])
def test_what_is_no_test_is_refused(tests: object) -> None:
    with pytest.raises(DataError, match=r"[Tt]ests"):
        CodeTests(sandbox=QUICK)(prompts=[""], completions=["x = 1"], tests=[tests])


def test_the_password_file_is_there() -> None:
    assert os.path.exists("/etc/passwd")  # what the escape above asked for is really there


GOOD = "def f(x):\n    return sorted(x)\n"
TRICKS = {
    "equal to everything": "class A:\n    def __eq__(self, other): return True\ndef f(x): return A()",
    "int that equals everything": "class A(list):\n    def __eq__(self, other): return True\ndef f(x): return A()",
    "other sorted": "import builtins\nbuiltins.sorted = lambda x: [1, 2]\nsorted = builtins.sorted\ndef f(x): return x",
    "frames": "import sys\ndef f(x): return sys._getframe(1).f_code.co_consts",
    "exit before the asserts": "import os\ndef f(x): os._exit(0)",
    "exit at once": "raise SystemExit(0)",
    "printed verdict": "print('passed')\nimport os\nos._exit(0)",
    "forged records": "print('[]')\nimport os\nos._exit(0)",
    "assertion error": "def f(x): raise AssertionError",
    "standard input": "import os\nos.lseek(0, 0, 0)\ndef f(x): return os.read(0, 1000)",
    "json replaced": "import json\njson.dumps = lambda *a: '[]'\ndef f(x): return 1",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_no_trick_passes_a_test(trick: str) -> None:
    tests = ["assert f([2, 1]) == [1, 2]", "assert sorted(f([3, 1])) == [1, 3]"]
    found = CodeTests(sandbox=QUICK)(prompts=[""], completions=[TRICKS[trick]], tests=[tests])
    assert found == [0.0]


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        (GOOD, "def check(candidate):\n    for n in range(3):\n        assert candidate([n, 0]) == [0, n]\ncheck(f)"),
        (GOOD, "x = f([2, 1])\nassert x == [1, 2] and len(x) == 2"),
        ("def f(x):\n    x.sort()", "a = [2, 1]\nf(a)\nassert a == [1, 2]"),
        (
            "def f(x):\n    return x / 3",
            "import math\nassert math.isclose(f(1), 0.333333, abs_tol=1e-4)\nassert f(0) == 0",
        ),
        ("def f(x):\n    raise ValueError", "try:\n    f(1)\n    assert False\nexcept ValueError:\n    pass"),
        ("def f(x):\n    return {1: (2, {3})}", "assert f(0) == {1: (2, {3})}"),
        ("def f(n):\n    yield from range(n)", "assert list(f(3)) == [0, 1, 2]"),
        ("def sum(a, b):\n    return a + b", "assert sum(10, 15) == 25"),
        ("class Stack(list):\n    pass", "s = Stack()\ns.append(1)\nassert s.pop() == 1"),
    ],
)
def test_honest_programs_pass_every_form_of_test(program: str, tests: str) -> None:
    changes = {"sorted(x)": "x", "x.sort()": "pass", "x / 3": "x", "ValueError": "KeyError", "{3}": "{4}"}
    wrong = program
    for before, after in {**changes, "range(n)": "[]", "a + b": "a", "Stack": "Queue"}.items():
        wrong = wrong.replace(before, after)
    found = CodeTests(sandbox=QUICK)(prompts=[""] * 2, completions=[program, wrong], tests=[tests] * 2)
    assert found == [1.0, 0.0]
