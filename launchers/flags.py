"""Flags as people write them, and what is wrong with them in one sentence.

jsonargparse takes a list as one YAML value and a switch only with its value. Here `--sources a b`
and a bare `--overwrite` come to mean the same; and its refusals, which show a usage line and the
types of Python, become a sentence with the remedy.
"""

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Final

_GIVE: Final = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
_SEVERAL: Final = (list, tuple)


def setting_types(config_type: Any, prefix: str = "") -> dict[str, Any]:
    """Name and type of every setting of a dataclass, those of groups as `group.name`."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            found |= setting_types(kind, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = kind
    return found


def with_underscores(word: str) -> str:
    """Spell a flag as settings are: `--min-genes=200` as `--min_genes=200`."""
    flag, equals, value = word.partition("=")
    if not flag.startswith("--"):
        return word
    return f"--{flag[2:].replace('-', '_')}{equals}{value}"


def spelled_out(arguments: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    """Give lists their brackets and bare switches their `true`."""
    words: list[str] = []
    rest = list(arguments)
    while rest:
        word = with_underscores(rest.pop(0))
        flag, has_value, value = word.partition("=")
        kinds = _parts(settings.get(flag.removeprefix("--"))) if flag.startswith("--") else []
        if of := [kind for kind in kinds if _plain(kind) in _SEVERAL]:
            values = [value] if has_value else _values(rest)
            listed = len(values) == 1 and values[0].startswith(("[", "null"))
            words += [flag, values[0] if listed else _list(values, of[0])] if values else [flag]
        elif bool in kinds and not has_value and (not rest or rest[0].startswith("--")):
            words += [word, "true"]
        else:
            words.append(word)
    return words


def sentence(message: str, settings: Mapping[str, Any], command: str) -> str:
    """Say what jsonargparse found wrong, by the setting's name and with the remedy."""
    text = " ".join(message.split())
    if match := re.search(r"arguments are required: (.+)", text):
        names = [f"--{name.strip()}" for name in match[1].split(",")]
        verb, them = ("is", "it") if len(names) == 1 else ("are", "them")
        return f"{' and '.join(names)} {verb} missing; give {them} here or in the --config file"
    if match := re.search(r"unrecognized arguments: (--)?([^\s=]+)", text, re.IGNORECASE):
        if match[1]:
            return _no_such("--", match[2], settings, command)
        return f"{match[2]!r} belongs to no setting; write --NAME VALUE ({command} --help)"
    if match := re.search(r"Group '(\S+)' does not accept option '(\S+)'", text):
        return _no_such("", f"{match[1]}.{match[2]}", settings, command)
    if match := re.search(r"argument --([^\s/:]+)\S*: expected", text):
        return f"--{match[1]} lacks its value; give {_wanted(settings.get(match[1]))}"
    if match := re.search(r'Parser key "config": (.*)', text):
        return f"--config: {match[1].removeprefix('File does not exist: ')} is no file to read"
    if match := re.search(r'Parser key "([^"]+)"', text):
        if match[1] not in settings:
            return f"--{match[1]} is a group; give its settings one by one, --{match[1]}.NAME VALUE"
        value = re.search(r"(?:Got value|Given value): (.*)", text)
        given = f" is {value[1]!r}" if value else ""
        return f"--{match[1]}{given}; give {_wanted(settings.get(match[1]))}"
    if match := re.search(r"(?:Problems parsing config|Unexpected config): (.*)", text):
        return f"the --config file is no YAML with settings by name ({match[1]}); correct it"
    return f"{text} ({command} --help lists the settings)"


def _list(values: Sequence[str], kind: Any) -> str:
    """Write values as one YAML list; only texts need quotes."""
    texts = str in typing.get_args(kind)
    return json.dumps(values) if texts else f"[{', '.join(values)}]"


def _values(rest: list[str]) -> list[str]:
    """Take the words up to the next flag."""
    taken = []
    while rest and not rest[0].startswith("--"):
        taken.append(rest.pop(0))
    return taken


def _no_such(dashes: str, name: str, settings: Mapping[str, Any], command: str) -> str:
    near = difflib.get_close_matches(name, settings, 1) or [
        known for known in settings if known.rpartition(".")[2] == name.rpartition(".")[2]
    ]
    hint = f"did you mean {dashes}{near[0]}?" if near else f"{command} --help lists them"
    return f"there is no setting {dashes}{name}; {hint}"


def _wanted(kind: Any) -> str:
    wanted = []
    for part in _parts(kind):
        if part is type(None):
            wanted.append("null")
        elif typing.get_origin(part) is typing.Literal:
            wanted.append(f"one of {', '.join(map(str, typing.get_args(part)))}")
        elif _plain(part) in _SEVERAL:
            (element, *_) = typing.get_args(part) or (str,)
            of = {int: " whole numbers", float: " numbers"}.get(element, "")
            wanted.append(f"one or more{of}, separated by spaces")
        else:
            wanted.append(_GIVE.get(part, f"a value of type {_plain(part).__name__}"))
    return " or ".join(wanted)


def _parts(kind: Any) -> list[Any]:
    """The members of a union of types, or the one type."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return list(typing.get_args(kind))
    return [] if kind is None else [kind]


def _plain(kind: Any) -> Any:
    return typing.get_origin(kind) or kind
