"""Code: the last fenced block, run in a sandbox (`tasks.sandbox`) on the problem's tests; score = share of them passed.

`Problem.verification` holds the tests as in Eurus-2-RL (github.com/PRIME-RL/PRIME), of one of two types:

    {"type": "stdin_stdout", "inputs": [text, ...], "outputs": [text, ...]}
    {"type": "function", "fn_name": name, "inputs": [[argument, ...], ...], "outputs": [value, ...]}

As in that data, a text may be a list of lines, a function's inputs one text with a JSON value a line, and an expected
value may be wrapped in a list of its own. A function is looked up in the module, then in a class `Solution`; names of
common modules need no import. A test fails unless the program ends with status 0. All tests together have
`tasks.code.timeout_seconds` of wall time, starting the sandbox and compiling not counted; running out of it scores 0,
as in ProRL. Solutions have the standard library only.

They are in Python, or in C++ too (C++17, g++ -O2) where `tasks.code.languages` says so and the tests are of type
"stdin_stdout". Untagged blocks, which also show examples of output, are Python where no block is tagged.
"""

from __future__ import annotations

import contextlib
import json
import keyword
import math
import re
import textwrap
import time
from collections.abc import Sequence
from typing import Any

from megatron_prorl.config.schema import CodeConfig
from megatron_prorl.errors import UserError
from megatron_prorl.tasks.answers import spoken
from megatron_prorl.tasks.sandbox import COMPILERS, Ran, Sandbox, SandboxDied, choose_mode, why_not
from megatron_prorl.types import Problem, Verdict

# Tags of fenced blocks that hold a solution, by language. Compiled ones have their compilers in `tasks.sandbox`.
LANGUAGES = {"python": ("", "python", "python3", "py"), "cpp": ("cpp", "c++", "cc", "cxx")}

RELATIVE_TOLERANCE = 1e-6  # between numbers with a point or an exponent
_FENCE = re.compile(r"[ \t]*```+[ \t]*([^\s`]*)[^`]*")  # a whole line
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")

_cfg = CodeConfig()
_quiet = False


def configure(cfg: CodeConfig, *, quiet: bool = False) -> None:
    """Use these settings from now on in this process; `quiet` leaves the warning of a weaker mode to another process.

    Raises UserError if `cfg.isolation` is "required" or `cfg.languages` names a compiled one and that cannot be had.
    """
    global _cfg, _quiet
    _cfg, _quiet = cfg, quiet
    if cfg.isolation == "required":
        choose_mode("required")
    for language in cfg.languages:
        if language in COMPILERS and (trouble := why_not(language)):
            raise UserError(
                f"tasks.code.languages: {language} cannot be run here: {trouble}; mend that, or leave it out"
            )


def prepare(problem: Problem) -> None:
    """Check the tests and find out how to isolate. Raises ValueError for tests that no program could be judged by."""
    read_tests(problem.verification)
    choose_mode(_cfg.isolation, quiet=_quiet)


def verify(problem: Problem, text: str) -> Verdict:
    """Reasons: "correct", "partly correct", "wrong", "no answer" (no code block), "compile error", "timed out",
    "crashed" (no test passed, and each ended in an exception, a signal or another status than 0).
    """
    fn_name = problem.verification.get("fn_name")
    found = extract_code(text, ("python",) if fn_name else _cfg.languages)
    if found is None:
        return Verdict(score=0.0, reason="no answer")
    language, source = found
    tests, expected = read_tests(problem.verification)
    matches = returned_value_matches if fn_name else output_matches
    passed = crashed = 0
    with Sandbox(
        source,
        fn_name,
        mode=choose_mode(_cfg.isolation, quiet=_quiet),
        memory_mib=_cfg.memory_mib,
        timeout_seconds=_cfg.timeout_seconds,
        language=language,
        compile_seconds=_cfg.compile_seconds,
    ) as sandbox:
        if sandbox.compile_error:
            return Verdict(score=0.0, reason="compile error")
        deadline = time.monotonic() + _cfg.timeout_seconds
        for test, output in zip(tests, expected, strict=True):
            try:
                ran = sandbox.run(test, deadline)
            except TimeoutError:
                return Verdict(score=0.0, reason="timed out")
            except SandboxDied:
                ran = Ran(1, b"")
                crashed += len(tests) - passed - crashed
                break
            if ran.compile_error:
                return Verdict(score=0.0, reason="compile error")
            crashed += ran.status != 0
            passed += ran.status == 0 and matches(ran.output, output)
    if passed == len(tests):
        return Verdict(score=1.0, reason="correct")
    if passed:
        return Verdict(score=passed / len(tests), reason="partly correct")
    return Verdict(score=0.0, reason="crashed" if crashed == len(tests) else "wrong")


def extract_code(text: str, languages: Sequence[str] = ("python",)) -> tuple[str, str] | None:
    """(language, source) of the last closed fenced block outside the model's thoughts that is tagged as one of
    `languages`; without any, of the last untagged one, as Python.
    """
    by_tag = {tag: language for language in languages for tag in LANGUAGES[language]}
    tagged = untagged = None
    tag: str | None = None  # of the open block
    body: list[str] = []
    for line in spoken(text).split("\n"):
        fence = _FENCE.fullmatch(line)
        if fence is None:
            body.append(line)
        elif tag is None or fence[1]:  # a tag inside a block: the one before was never closed
            tag, body = fence[1].lower(), []
        else:
            if tag in by_tag:
                found = by_tag[tag], textwrap.dedent("\n".join([*body, ""]))
                tagged, untagged = (found, untagged) if tag else (tagged, found)
            tag = None
    return tagged or untagged


def read_tests(verification: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    """(what the sandbox is told, what is expected), one entry a test. Raises ValueError naming the field at fault."""
    kind, inputs, outputs = (verification.get(key) for key in ("type", "inputs", "outputs"))
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs or len(inputs) != len(outputs):
        raise ValueError("inputs, outputs: two lists of the same length, at least 1, are needed")
    if kind == "stdin_stdout":
        return [{"stdin": _text(given, "inputs")} for given in inputs], [_text(out, "outputs") for out in outputs]
    if kind != "function":
        raise ValueError(f"type: {kind!r} is neither 'stdin_stdout' nor 'function'")
    fn_name = verification.get("fn_name")
    if not isinstance(fn_name, str) or not fn_name.isidentifier() or keyword.iskeyword(fn_name):
        raise ValueError(f"fn_name: {fn_name!r} is no function's name")
    tests, expected = [], []
    for given, output in zip(inputs, outputs, strict=True):
        if isinstance(given, str):  # LiveCodeBench's layout
            given, output = [json.loads(line) for line in given.splitlines()], json.loads(output)
        if not isinstance(given, list):
            raise ValueError("inputs: a function's arguments are a list, or a text with a JSON value a line")
        tests.append({"arguments": given})
        expected.append(output)
    return tests, expected


def _text(value: Any, field: str) -> str:
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        value = "\n".join(value)
    if not isinstance(value, str):
        raise ValueError(f"{field}: a test's text is a string or a list of lines, not {type(value).__name__}")
    return value


def output_matches(output: bytes, expected: str) -> bool:
    """Equal line by line and token by token; blank lines at the end do not count, numbers are within the tolerance."""
    lines, expected_lines = (_lines(text) for text in (output.decode("utf-8", "replace"), expected))
    if len(lines) != len(expected_lines):
        return False
    for line, expected_line in zip(lines, expected_lines, strict=True):
        if line == expected_line:
            continue
        tokens, expected_tokens = line.split(), expected_line.split()
        if len(tokens) != len(expected_tokens) or not all(map(_token_matches, tokens, expected_tokens)):
            return False
    return True


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _token_matches(token: str, expected: str) -> bool:
    if token == expected:
        return True
    # Integers are exact; a limit on the length keeps the pattern and float() from being fed megabytes.
    if max(len(token), len(expected)) > 400 or expected.lstrip("+-").isdigit():
        return False
    return bool(_NUMBER.fullmatch(token) and _NUMBER.fullmatch(expected)) and _close(float(token), float(expected))


def returned_value_matches(output: bytes, expected: Any) -> bool:
    """Whether JSON text says what is expected, or what a list of one holds; tuples came out as lists."""
    with contextlib.suppress(ValueError, RecursionError, MemoryError):  # JSON that is none, or nested without end
        value = json.loads(output)
        expected = json.loads(json.dumps(expected))
        if _value_matches(value, expected):
            return True
        return isinstance(expected, list) and len(expected) == 1 and _value_matches(value, expected[0])
    return False


def _value_matches(value: Any, expected: Any) -> bool:
    if isinstance(expected, list):
        return isinstance(value, list) and len(value) == len(expected) and all(map(_value_matches, value, expected))
    if isinstance(expected, dict):
        return (
            isinstance(value, dict)
            and value.keys() == expected.keys()
            and all(_value_matches(value[key], expected[key]) for key in expected)
        )
    if isinstance(expected, float) and isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer that no float holds
            return _close(float(value), expected)
        return False
    return bool(value == expected)


def _close(value: float, expected: float) -> bool:
    # The absolute part is for an expected 0, printed with so many digits.
    return value == expected or math.isclose(value, expected, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-9)
