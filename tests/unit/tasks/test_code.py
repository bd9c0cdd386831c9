from __future__ import annotations

import asyncio
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_prorl.config.load import ConfigError, load_config
from megatron_prorl.config.schema import CodeConfig, TasksConfig, VerifierConfig
from megatron_prorl.errors import UserError
from megatron_prorl.tasks import VerifierError, code, prepare, sandbox, verify
from megatron_prorl.tasks.code import extract_code, output_matches, read_tests, returned_value_matches
from megatron_prorl.tasks.pool import VerifierPool
from megatron_prorl.types import Problem, Verdict

EXAMPLES = Path(__file__).parents[3] / "examples"
PLUS_ONE = {"type": "stdin_stdout", "inputs": ["1\n", "5\n", "41\n"], "outputs": ["2\n", "6\n", "42\n"]}
ADD = {"type": "function", "fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [3, 7]}
RIGHT = "```python\nprint(int(input()) + 1)\n```"


def problem_of(verification: dict[str, Any]) -> Problem:
    return Problem(id="c-1", domain="code", task="t", messages=[], verification=verification, source="hand-written")


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    code.configure(CodeConfig(timeout_seconds=5.0))
    yield
    code.configure(CodeConfig())


# --- the answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```python\na\n```", "a\n"),
        ("```py\na\n```\nand\n```Python3\nb\n```\n", "b\n"),
        ("```\na\n```", "a\n"),
        ("```python\na\n```\n```text\n2\n```", "a\n"),
        ("```python\na\n```\nFor 1 it prints\n```\n2\n```", "a\n"),
        ("```python\na\n```\n```cpp\nint x;\n```", "a\n"),
        ("<think>```python\na\n```</think>no code", None),
        ("<think>```python\na\n```", None),
        ("<think>```python\na\n```</think>```python\nb\n```", "b\n"),
        ("```python\na", None),
        ("a = 1", None),
        ("", None),
        ("1. so:\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y\n"),
        ("```python\nx = '```'\n```", "x = '```'\n"),
        ("````python\na\n````", "a\n"),
    ],
)
def test_the_answer_is_the_last_closed_python_block_outside_thoughts(text: str, expected: str | None):
    assert extract_code(text) == (expected and ("python", expected))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```cpp\na\n```", ("cpp", "a\n")),
        ("```C++\na\n```", ("cpp", "a\n")),
        ("```cpp\na\n```\n```python\nb\n```", ("python", "b\n")),
        ("```python\nb\n```\n```cpp\na\n```", ("cpp", "a\n")),
        ("```cpp\na\n```\n```\n3\n```", ("cpp", "a\n")),
        ("```\na\n```\n```\nb\n```", ("python", "b\n")),
        ("```java\na\n```", None),
    ],
)
def test_where_a_solution_may_be_in_two_languages_the_last_block_of_either_counts(
    text: str, expected: tuple[str, str] | None
):
    assert extract_code(text, ["python", "cpp"]) == expected


def test_a_hundred_thousand_fences_are_read_in_no_time():
    assert extract_code("```python\n" * 100_000) is None
    assert extract_code("`" * 1_000_000) is None


# --- comparison


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("2\n", "2", True),
        ("2  \n\n\n", "2\n", True),
        ("1 2\n3", "1  2 \n3\n", True),
        ("1 2 3", "1 2\n3", False),
        ("1\n\n2", "1\n2", False),
        ("", "2", False),
        ("", "", True),
        ("2\n2", "2", False),
        ("0.3333333333", "0.33333333", True),
        ("0.33334", "0.33333", False),
        ("1e3", "1000.0", True),
        ("1000000.0", "1000001", False),
        ("10000000", "10000001", False),
        ("nan", "nan", True),
        ("nan", "1.0", False),
        ("inf", "1e999", False),
        ("1_0.0", "10.0", False),
        ("0.0000000001", "0.0", True),
        ("-0.0", "0.0", True),
        ("YES", "yes", False),
        ("x 1.0", "x 1.0000000001", True),
    ],
)
def test_outputs_are_equal_by_line_and_token_and_numbers_by_a_relative_tolerance(
    output: str, expected: str, same: bool
):
    assert output_matches(output.encode(), expected) is same


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        (b"3", 3, True),
        (b"3", [3], True),
        (b"[3]", [3], True),
        (b"1", [1, 2], False),
        (b"[1, 2]", [1, 2], True),
        (b"[[1, 2]]", [1, 2], False),
        (b"0.1", 0.1000000001, True),
        (b"0.1", 0.2, False),
        (b'"a"', "a", True),
        (b'"3"', 3, False),
        (b'{"1": [2]}', {1: [2]}, True),
        (b"null", None, True),
        (b"", None, False),
        (b"NaN", 1.0, False),
        (b"[" * 100_000, [], False),
        (b"9" * 10_000, 9, False),
        (b"1" + b"0" * 400, 1.5, False),
        (b"\xff", 1, False),
    ],
)
def test_returned_values_are_equal_as_json_or_inside_a_list_of_one(output: bytes, expected: Any, same: bool):
    assert returned_value_matches(output, expected) is same


# --- the problem


def test_texts_may_be_lists_of_lines_and_arguments_lines_of_json():
    assert read_tests({"type": "stdin_stdout", "inputs": [["1", "2"]], "outputs": [["3"]]}) == (
        [{"stdin": "1\n2"}],
        ["3"],
    )
    by_line = {"type": "function", "fn_name": "f", "inputs": ['[1, 2]\n"x"'], "outputs": ["[1]"]}
    assert read_tests(by_line) == ([{"arguments": [[1, 2], "x"]}], [[1]])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"type": "stdio"}, "type"),
        ({"inputs": []}, "inputs"),
        ({"outputs": ["2"]}, "outputs"),
        ({"inputs": [1, 2, 3]}, "inputs"),
        ({"type": "function"}, "fn_name"),
        ({"type": "function", "fn_name": "a.b"}, "fn_name"),
        ({"type": "function", "fn_name": "f", "inputs": [1, 2, 3]}, "inputs"),
    ],
)
def test_a_problem_without_usable_tests_is_an_error_that_names_problem_and_field(change: dict[str, Any], field: str):
    with pytest.raises(VerifierError, match=f"'c-1'.*{field}"):
        prepare(problem_of(PLUS_ONE | change))


# --- the verdict


@pytest.mark.parametrize(
    ("text", "score", "reason"),
    [
        (RIGHT, 1.0, "correct"),
        ("<think>\nhm\n</think>\nHere:\n" + RIGHT, 1.0, "correct"),
        (f"<think>{RIGHT}</think>", 0.0, "no answer"),
        ("print(int(input()) + 1)", 0.0, "no answer"),
        ("```python\nprint(6)\n```", 1 / 3, "partly correct"),
        ("```python\nprint(7)\n```", 0.0, "wrong"),
        ("```python\nprint(2\n```", 0.0, "compile error"),
        ("```python\nimport nothing\n```", 0.0, "crashed"),
        ("```python\n1 / 0 if int(input()) > 1 else print(3)\n```", 0.0, "wrong"),
        ("```python\nn = int(input())\nif n == 41:\n    while True: pass\nprint(n + 1)\n```", 0.0, "timed out"),
    ],
)
def test_a_program_scores_the_share_of_tests_it_passes(text: str, score: float, reason: str):
    code.configure(CodeConfig(timeout_seconds=1.0))
    assert verify(problem_of(PLUS_ONE), text) == Verdict(score=score, reason=reason)


@pytest.mark.parametrize(
    ("body", "score", "reason"),
    [
        ("def add(a, b):\n    return a + b", 1.0, "correct"),
        ("class Solution:\n    def add(self, a, b):\n        return a + b", 1.0, "correct"),
        ("def add(a, b):\n    return 3", 0.5, "partly correct"),
        ("def add(a, b):\n    print(a + b)", 0.0, "wrong"),
        ("def plus(a, b):\n    return a + b", 0.0, "crashed"),
        ("def add(a, b):\n    return {a + b}", 0.0, "crashed"),
        ("def add(a: List[int], b):\n    return reduce(lambda x, y: x + y, deque([a, b]))", 1.0, "correct"),
    ],
)
def test_a_function_is_called_with_each_tests_arguments(body: str, score: float, reason: str):
    assert verify(problem_of(ADD), f"```python\n{body}\n```") == Verdict(score=score, reason=reason)


def test_tuples_are_the_lists_they_come_out_as():
    verification = {"type": "function", "fn_name": "f", "inputs": [[1]], "outputs": [[[1, 2], [3, 4]]]}
    assert verify(problem_of(verification), "```\ndef f(n):\n    return ((1, 2), (3, 4))\n```").score == 1.0


def test_megabytes_go_in_and_come_out():
    numbers = "\n".join(map(str, range(400_000)))
    verification = {"type": "stdin_stdout", "inputs": [numbers], "outputs": [numbers]}
    echo = "```\nimport sys\nsys.stdout.write(sys.stdin.read())\n```"
    assert verify(problem_of(verification), echo).reason == "correct"


def test_the_hash_seed_is_the_same_every_time():
    text = "```\nprint(hash('x'))\n```"
    outputs = []
    for _ in range(2):
        with sandbox.Sandbox(
            extract_code(text)[1], None, mode=sandbox.choose_mode("auto"), memory_mib=1024, timeout_seconds=5.0
        ) as box:
            outputs.append(box.run({"stdin": ""}, deadline=time.monotonic() + 60).output)
    assert outputs[0] == outputs[1] != b""


STARTS_THREADS = """
import os, threading, time
threading.stack_size(32768)
for number in range(2000):
    try:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    except RuntimeError:
        break
os.write(1, b"%d" % number)
os._exit(0)
"""


@pytest.mark.skipif(sandbox.what_fails("namespaces") is not None, reason="no namespaces here")
@pytest.mark.skipif(os.geteuid() == 0, reason="the kernel exempts root from RLIMIT_NPROC")
def test_a_solution_starts_only_so_many_threads():
    with sandbox.Sandbox(STARTS_THREADS, None, mode="namespaces", memory_mib=1024, timeout_seconds=30.0) as box:
        ran = box.run({"stdin": ""}, deadline=time.monotonic() + 60)
    assert 0 < int(ran.output) < sandbox.MAX_THREADS


needs_cpp = pytest.mark.skipif(sandbox.why_not("cpp") is not None, reason=f"no C++ here: {sandbox.why_not('cpp')}")


@needs_cpp
@pytest.mark.parametrize(
    ("body", "score", "reason"),
    [
        ("int a; std::cin >> a; std::cout << a + 1 << std::endl;", 1.0, "correct"),
        ('int a, b; scanf("%d", &a); std::thread([&] { b = a + 1; }).join(); printf("%d", b);', 1.0, "correct"),
        ("std::vector<int> v(20'000'000); std::cin >> v[99]; std::cout << v[99] + 1;", 1.0, "correct"),
        ("std::cout << 2;", 1 / 3, "partly correct"),
        ("std::cout << 7;", 0.0, "wrong"),
        ("int a; std::cin >> a; std::cout << a + 1; return 3;", 0.0, "crashed"),
        ("throw 1;", 0.0, "crashed"),
        ("std::vector<int> v(1'000'000'000); std::cout << v[5] + 2;", 0.0, "crashed"),
        ("for (;;) {}", 0.0, "timed out"),
        ("return x;", 0.0, "compile error"),
    ],
)
def test_a_program_in_cpp_is_compiled_once_and_run_on_every_test(body: str, score: float, reason: str):
    code.configure(CodeConfig(languages=["python", "cpp"], timeout_seconds=3.0, compile_seconds=60.0))
    text = f"```cpp\n#include <bits/stdc++.h>\nint main() {{\n{body}\n}}\n```"
    assert verify(problem_of(PLUS_ONE), text) == Verdict(score=pytest.approx(score), reason=reason)


ATTACKS = """
#include <cstdio>
#include <fcntl.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>
int main() {
    rlimit more{RLIM_INFINITY, RLIM_INFINITY};
    int failed[] = {
        fork(), vfork(), socket(AF_INET, SOCK_STREAM, 0), socket(AF_UNIX, SOCK_STREAM, 0), kill(getppid(), SIGKILL),
        kill(-1, SIGKILL), (int)ptrace(PTRACE_ATTACH, getppid(), 0, 0), open("/etc/passwd", O_RDONLY),
        open("/proc/1/mem", O_RDWR), open("/usr/lib/x", O_CREAT | O_WRONLY, 0600), setrlimit(RLIMIT_AS, &more),
        chroot("/tmp"), setuid(0), execl("/bin/sh", "sh", "-c", "echo", nullptr), execl("/usr/bin/env", "env", nullptr),
    };
    for (int result : failed) printf("%d ", result);
    extern char** environ;
    printf("%d", *environ == nullptr);
}
"""


@needs_cpp
def test_a_program_in_cpp_gets_no_further_than_one_in_python():
    code.configure(CodeConfig(languages=["cpp"], compile_seconds=60.0))
    nothing = {"type": "stdin_stdout", "inputs": [""], "outputs": ["-1 " * 15 + "1"]}
    assert verify(problem_of(nothing), f"```cpp\n{ATTACKS}```").reason == "correct"


@needs_cpp
@pytest.mark.parametrize(
    "source",
    [
        '#include "/etc/passwd"',
        'asm(".incbin \\"/etc/passwd\\"");',
        '#include "/dev/zero"',
        "template <int n, int m> struct A { enum { x = A<n - 1, m>::x + A<n - 1, m + (1 << n)>::x }; };"
        "template <int m> struct A<0, m> { enum { x = m }; }; int x = A<24, 0>::x;",
    ],
)
def test_a_compiler_reads_no_file_and_has_its_limits(source: str):
    code.configure(CodeConfig(languages=["cpp"], compile_seconds=2.0))
    start = time.monotonic()
    assert verify(problem_of(PLUS_ONE), f"```cpp\n{source}\nint main() {{}}\n```").reason == "compile error"
    assert time.monotonic() - start < 20


def test_cpp_is_no_answer_unless_asked_for_and_never_a_function():
    text = "```cpp\nint main() {}\n```"
    assert verify(problem_of(PLUS_ONE), text).reason == "no answer"
    code._cfg = CodeConfig(languages=["python", "cpp"])
    assert verify(problem_of(ADD), text).reason == "no answer"


@needs_cpp
def test_without_a_compiler_cpp_is_one_line_not_a_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "bwrap").symlink_to(shutil.which("bwrap") or "bwrap")
    monkeypatch.setenv("PATH", str(tmp_path))

    async def judge() -> list[Verdict]:
        tasks = TasksConfig(code=CodeConfig(languages=["python", "cpp"]))
        with VerifierPool(VerifierConfig(workers=1, timeout_seconds=30), tasks) as pool:
            return await pool.verify_many(problem_of(PLUS_ONE), [RIGHT])

    with pytest.raises(UserError) as caught:
        asyncio.run(judge())
    assert str(caught.value) == (
        "tasks.code.languages: cpp cannot be run here: not installed: g++, as, ld; mend that, or leave it out"
    )


@pytest.mark.usefixtures("refusing_kernel")
def test_without_namespaces_there_is_no_cpp(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(code, "why_not", sandbox.why_not.__wrapped__)
    with pytest.raises(UserError, match="cpp cannot be run here: this machine gives no namespaces .bwrap: No perm"):
        code.configure(CodeConfig(languages=["cpp"]))


def test_the_pool_verifies_code_inside_its_fence():
    async def judge() -> list[Verdict]:
        with VerifierPool(VerifierConfig(workers=1, timeout_seconds=30), TasksConfig()) as pool:
            return await pool.verify_many(problem_of(PLUS_ONE), [RIGHT, "```\nprint(2)\n```"])

    assert [verdict.reason for verdict in asyncio.run(judge())] == ["correct", "partly correct"]


# --- isolation


@pytest.fixture
def refusing_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A bwrap that says what it says where user namespaces are off."""
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(fake.stat().st_mode | stat.S_IEXEC)
    caches = (sandbox.choose_mode, sandbox.what_fails, sandbox._bubblewrap)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("refusing_kernel")
def test_without_namespaces_seccomp_takes_over_and_a_warning_says_so_once(caplog: pytest.LogCaptureFixture):
    assert [verify(problem_of(PLUS_ONE), RIGHT).reason for _ in range(2)] == ["correct", "correct"]
    assert [record.message for record in caplog.records] == [
        "code runs without namespaces (bwrap: No permissions to create new namespace), confined by seccomp and "
        "resource limits alone: solutions cannot open files; tasks.code.isolation: required refuses to run like this"
    ]


@pytest.mark.usefixtures("refusing_kernel")
def test_required_isolation_that_cannot_be_had_is_one_line_not_a_zero():
    with pytest.raises(UserError, match=r"^tasks\.code\.isolation: required.*No permissions.*install bubblewrap"):
        code.configure(CodeConfig(isolation="required"))
    with pytest.raises(UserError, match="isolation: required"):
        verify(problem_of(PLUS_ONE), RIGHT)

    async def judge() -> None:
        with VerifierPool(VerifierConfig(workers=1), TasksConfig(code=CodeConfig(isolation="required"))) as pool:
            await pool.verify_many(problem_of(PLUS_ONE), [RIGHT])

    with pytest.raises(UserError, match="isolation: required"):
        asyncio.run(judge())


def test_a_verdict_may_take_longer_than_its_tests():
    with pytest.raises(ConfigError, match="tasks.code.timeout_seconds: 10 must be below verifier.timeout_seconds"):
        load_config(EXAMPLES / "quickstart.yaml", ["tasks.code.timeout_seconds=10"])
    with_compiler = ["tasks.code.languages=[python, cpp]", "tasks.code.compile_seconds=5"]
    with pytest.raises(ConfigError, match="tasks.code.compile_seconds: with timeout_seconds 10, must be below verif"):
        load_config(EXAMPLES / "quickstart.yaml", with_compiler)
    assert load_config(EXAMPLES / "quickstart.yaml", [*with_compiler, "verifier.timeout_seconds=11"])


def test_without_bubblewrap_the_reason_is_that(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda _: None)
    sandbox.what_fails.cache_clear()
    assert sandbox.what_fails("namespaces") == "bwrap is not installed"
    sandbox.what_fails.cache_clear()
