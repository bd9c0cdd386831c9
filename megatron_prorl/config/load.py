"""Read a run's configuration: YAML, then `key=value` overrides, then the schema. Every mistake is one line.

Imports neither torch, Megatron nor vLLM, so a mistake is told within a fraction of a second.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from megatron_prorl.config.schema import Config, Section
from megatron_prorl.errors import UserError


class ConfigError(UserError):
    """One or more mistakes in a configuration; shown one a line as `config error: where: what`."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(f"config error: {problem}" for problem in problems))
        self.problems = list(problems)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the YAML file `path`, with `overrides` on top, such as "data.tasks.0.weight=2".

    `extends: FILE`, or a list of files, relative to the file that says so, puts theirs below its own options.
    Raises ConfigError for a missing file, bad YAML, unknown or missing keys, wrong types and options that do not fit.
    """
    document = _with_bases(Path(path))
    for override in overrides:
        _apply(override, document)
    try:
        return Config.model_validate(document, strict=True)
    except ValidationError as error:
        raise ConfigError([problem for detail in error.errors() for problem in describe(detail)]) from None


def dump_config(cfg: Config, *, given_only: bool = False) -> str:
    """Every option (or those that were given) with its value, as YAML that `load_config` reads back to the same one."""
    options = cfg.model_dump(exclude_unset=given_only)
    return yaml.dump(options, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises ConfigError where `yaml.safe_load` would keep the last of two equal keys."""
    try:
        document = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError([f"{path}: {(error.strerror or str(error)).lower()}"]) from None
    except UnicodeDecodeError:
        raise ConfigError([f"{path}: not UTF-8 text"]) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"{path}{_where_and_what(error)}"]) from None
    if not isinstance(document, dict):
        raise ConfigError([f"{path}: expected `key: value` lines, got {_show(document)}"])
    return document


def _with_bases(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's options on top of those of the files that it extends; `above` are those that extend it."""
    document = read_yaml(path)
    bases = document.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError([f"{path}: extends: expected a file or a list of files, got {_show(bases)}"])
    above = (*above, path.resolve())
    merged: dict[str, Any] = {}
    for base in (path.parent / base for base in bases):
        if base.resolve() in above:
            raise ConfigError([f"{path}: extends: {base} extends this file itself"])
        merged = _merged(merged, _with_bases(base, above))
    return _merged(merged, document)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Section by section; lists and everything else of `above` as a whole."""
    both = {
        key: _merged(below[key], above[key]) for key in below.keys() & above.keys() if _are_sections(below, above, key)
    }
    return below | above | both


def _are_sections(below: dict[str, Any], above: dict[str, Any], key: str) -> bool:
    return isinstance(below[key], dict) and isinstance(above[key], dict)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key may appear once, keys are text, and 1e-4 is a number as in YAML 1.2."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError:  # PyYAML goes by the look of 2026-13-01 and 0x_ and lets out what Python says of them
            kind = node.tag.rpartition(":")[2]
            problem = f"{node.value} looks like YAML's {kind} and is none; put quotes around a text"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag not in (_TEXT, _MERGE):
                raise yaml.MarkedYAMLError(problem="a key must be text", problem_mark=key.start_mark)
            if key.value in lines:
                problem = f"{key.value} is given twice, first in line {lines[key.value]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[key.value] = line
        return super().construct_mapping(node, deep)


_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


class _Dumper(yaml.SafeDumper):
    """Puts quotes around a text that `_Loader` would read as a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def _where_and_what(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f": {' '.join(str(error).split())}"
    return f" line {mark.line + 1}: {getattr(error, 'problem', None) or 'not YAML'}"


def _apply(override: str, document: dict[str, Any]) -> None:
    """Set one `dotted.key=value` in place; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError([f"{override}: expected key=value, as in optimizer.learning_rate=1e-6"])
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError([f"{override}: the value{_where_and_what(error)}"]) from None
    set_option(document, key, value, override)


def set_option(document: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set `dotted.key` in place, with the sections above it. Raises ConfigError, which begins with `where`."""
    *parents, last = key.split(".")
    place: Any = document
    walked: list[str] = []
    for part in parents:
        if isinstance(place, dict) and place.get(part) is None:
            place[part] = {}
        place = place[_index(place, part, walked, where)]
        walked.append(part)
    place[_index(place, last, walked, where)] = value


def _index(place: Any, part: str, walked: list[str], key: str) -> Any:
    """`part` as a key of the mapping or an index of the list at `walked`."""
    if isinstance(place, dict) and part:
        return part
    section = ".".join(walked)
    if isinstance(place, list):
        if part.isdecimal() and int(part) < len(place):
            return int(part)
        raise ConfigError([f"{key}: {section} is a list of {len(place)}; expected an index from 0 to {len(place) - 1}"])
    raise ConfigError(
        [f"{key}: {section} is {_show(place)}, not a section" if part else f"{key}: empty name in the key"]
    )


def describe(detail: Any, root: type[Section] = Config) -> list[str]:
    """The problems of one pydantic error about a document of the form `root`, each `where: what`."""
    kind, context, location = detail["type"], detail.get("ctx", {}), detail["loc"]
    if kind == "problems":
        return list(context["problems"])
    where = ".".join(str(part) for part in location)
    if kind == "extra_forbidden":
        return [f"{where}: no such option; {_suggestion(location, root)}"]
    if kind == "missing":
        return [f"{where}: required, but not given"]
    bounds = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    expected = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "string_type": "text",
        "string_too_short": "text that is not empty",
        "list_type": "a list",
        "dict_type": "`key: value` lines",
        "model_type": "a section of `key: value` lines",
        "literal_error": context.get("expected"),
        "too_short": f"a list of at least {context.get('min_length')}",
    }.get(kind) or next((f"{words} {context[bound]:g}" for bound, words in bounds.items() if bound in context), None)
    return [f"{where}: expected {expected}, got {_show(detail['input'])}" if expected else f"{where}: {detail['msg']}"]


def _suggestion(location: Sequence[str | int], root: type[Section]) -> str:
    """The nearest option of the same section, else the same name in another section, else what the section has."""
    *parents, unknown = location
    section = root
    for part in parents:
        section = section if isinstance(part, int) else _section_type(section.model_fields[part].annotation) or section
    prefix = "".join(f"{part}." for part in parents)
    name = str(unknown)
    nearest = min(section.model_fields, key=lambda option: _edit_distance(name, option))
    if _edit_distance(name, nearest) <= max(2, len(name) // 3):
        return f"did you mean {prefix}{nearest}?"
    elsewhere = [option for option in _all_options(root) if option.rpartition(".")[2] == name]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"{prefix.removesuffix('.') or 'the file'} has {', '.join(section.model_fields)}"


def _section_type(annotation: Any) -> type[Section] | None:
    """The Section in an annotation such as `Section`, `Section | None` or `list[Section]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section_type(inner))), None)


def _all_options(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        inner = _section_type(field.annotation)
        if inner and not str(field.annotation).startswith("list"):
            yield from _all_options(inner, f"{prefix}{name}.")


def _edit_distance(left: str, right: str) -> int:
    """Fewest insertions, deletions, substitutions and swaps of neighbours (optimal string alignment)."""
    before: list[int] = []
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        before, last, row = row, before, [i]
        for j, b in enumerate(right, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == right[j - 2] and left[i - 2] == b:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]


def _show(value: Any) -> str:
    """A value as the user wrote it, on one line and not long."""
    if value is None:
        return "nothing"
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
