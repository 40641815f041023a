"""What all launchers share: configuration from file and flags, logging, errors, exit codes.

Exit codes: 0 done, 1 a bug of ours (with traceback), 2 wrong input or setting (one sentence).
"""

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final, NoReturn, TextIO, TypeVar

from jsonargparse import ArgumentParser, set_parsing_settings

from launchers.flags import sentence, setting_types, spelled_out, with_underscores

T = TypeVar("T")
CONFIGS: Final = Path(__file__).parent / "configs"
LAUNCHER_FLAGS: Final = (
    *("--hostfile", "-H", "--include", "--exclude"),
    *("--num_nodes", "--num_gpus", "--num_accelerators"),
)
"""Flags of the `deepspeed` command, which it silently ignores behind the script."""
_called_as: ContextVar[str] = ContextVar("called_as", default="")


def parse(
    config_type: Callable[..., T],
    argv: Sequence[str] | None,
    *,
    launcher: str,
    description: str,
    example: str,
) -> T:
    """Make a configuration: defaults < `--preset` < `--config` file < flags.

    Args:
        config_type: Frozen dataclass to fill.
        argv: Command line without the program's name; none takes the process's.
        launcher: File name of the script; presets are in `configs/<its stem>/`.
        description: One sentence for `--help`.
        example: A command that works, for `--help`.

    Returns:
        The configuration.

    Raises:
        ValueError: If a flag or a value is refused, with its name and the remedy.
        SystemExit: After `--help` or `--print_config`.
    """
    arguments = _words(argv)
    command = _called_as.get() or f"launchers/{launcher}"
    _refuse_launcher_flags(arguments, launcher)
    presets = {path.stem: path for path in (CONFIGS / Path(launcher).stem).glob("*.yaml")}
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    choice = f" [--preset {{{','.join(sorted(presets))}}}]" if presets else ""
    settings = setting_types(config_type)
    parser = _Parser(
        prog=command,
        allow_abbrev=False,
        usage=f"%(prog)s{choice} [--config FILE] [--FIELD VALUE ...]",
        description=f"{description} Settings: defaults < --preset < --config < flags. "
        f"Example: {example.replace(f'python launchers/{launcher}', _spelled(launcher))}",
    )
    parser.refusal = lambda message: sentence(message, settings, command)
    parser.add_argument("--config", action="config", help="YAML file with any of the settings")
    parser.add_class_arguments(config_type, None)
    words = _expand_preset(_without_local_rank(arguments), presets)
    values = vars(parser.instantiate(parser.parse_args(spelled_out(words, settings))))
    values.pop("config", None)
    return config_type(**values)


def parse_for_scripts(
    config_type: Callable[..., T], argv: Sequence[str] | None, *, description: str, **named: str
) -> tuple[T, bool]:
    """As `parse`, of a launcher whose result a script may want: `--json` is no setting.

    Returns:
        The configuration, and whether `--json` was given.
    """
    words = _words(argv)
    settings = [word for word in words if word != "--json"]
    says = f"{description} --json prints the result as one line of JSON."
    config = parse(config_type, settings, description=says, **named)
    return config, len(settings) < len(words)


class CommandParser(argparse.ArgumentParser):
    """For launchers with subcommands; raises what argparse would print below a usage line."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("prog", _called_as.get() or None)
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Refuse a command line."""
        raise ValueError(f"{message} ({self.prog} --help says how)")

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse; flags may be spelled with dashes inside, too."""
        return self.parse_args([with_underscores(word) for word in _words(argv)])


class _Parser(ArgumentParser):
    """Raises what jsonargparse would print below a usage line."""

    refusal: Callable[[str], str] = str

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ValueError(self.refusal(message)) from ex


@contextmanager
def called_as(command: str) -> Iterator[None]:
    """Let help and refusals say another command than the launcher's script."""
    token = _called_as.set(command)
    try:
        yield
    finally:
        _called_as.reset(token)


def run(function: Callable[[], int | None]) -> int:
    """Run a launcher's work; what the user can cure becomes one sentence and exit code 2."""
    configure_logging(int(os.environ.get("RANK", "0")))
    try:
        return function() or 0
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error).__name__ != "DistNetworkError":
            raise  # torch raises this one when the ranks cannot meet; any other is a bug
        logging.getLogger(__name__).debug("refused", exc_info=True)
        rank = os.environ.get("RANK", "0")
        prefix = "error" if rank == "0" else f"error (rank {rank})"
        print(_printable(f"{prefix}: {_sentence(error)}", sys.stderr), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def configure_logging(rank: int) -> None:
    """Show the first rank's messages, and of the others only what went wrong."""
    level = os.environ.get("SCBERT_LOG", "INFO" if rank == 0 else "ERROR").upper()
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S"
    )
    warnings.filterwarnings("ignore", "`torch.", FutureWarning)  # DeepSpeed's, not the user's
    for package in ("datastore", "pretrain", "finetune", "launchers"):
        logging.getLogger(package).setLevel(level)


def _words(argv: Sequence[str] | None) -> list[str]:
    words = list(sys.argv[1:] if argv is None else argv)
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{word!r} is not UTF-8; rename what it names") from error
    return words


def _spelled(launcher: str) -> str:
    return _called_as.get() or f"python launchers/{launcher}"


def _refuse_launcher_flags(arguments: Sequence[str], launcher: str) -> None:
    for argument in arguments:
        flag = argument.split("=")[0]
        if flag in LAUNCHER_FLAGS:
            raise ValueError(
                f"{flag} belongs before the script, behind it DeepSpeed would ignore it: "
                f"deepspeed {flag} ... launchers/{launcher} ..."
            )


def _without_local_rank(arguments: Sequence[str]) -> list[str]:
    """Drop what DeepSpeed's launcher adds; the environment's LOCAL_RANK is what counts."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--local_rank", "--local-rank", type=int)
    return parser.parse_known_args(list(arguments))[1]


def _expand_preset(arguments: Sequence[str], presets: dict[str, Path]) -> list[str]:
    """Turn `--preset NAME` into `--config FILE`, in its place."""
    expanded: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument != "--preset" and not argument.startswith("--preset="):
            expanded.append(argument)
            continue
        name = argument.partition("=")[2] if "=" in argument else next(rest, "")
        if name not in presets:
            raise ValueError(f"there is no preset {name!r}; there are {sorted(presets)}")
        expanded += ["--config", str(presets[name])]
    return expanded


def _sentence(error: Exception) -> str:
    if "EADDRINUSE" in str(error):
        return (
            "the port at which the ranks meet is in use, probably by another training; "
            "choose one: deepspeed --master_port 29501 ... launchers/pretrain.py ..."
        )
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def echo(text: str = "") -> None:
    """Print a result line for the person at the terminal (libraries only log)."""
    print(_printable(text, sys.stdout), flush=True)


def _printable(text: str, stream: TextIO) -> str:
    """Spell out what a stream's encoding does not have, as a file's name may."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def echo_json(facts: Any) -> None:
    """Print a result as one line of JSON; a path becomes text, a dataclass its fields."""
    echo(json.dumps(facts, default=lambda x: str(x) if isinstance(x, Path) else vars(x)))


def show(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print facts as one line of JSON, or as a table."""
    if as_json:
        echo_json(facts)
    else:
        echo("\n".join(table(facts)))


def table(facts: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Show facts in lines, `name  value`; records in a list become rows."""
    for name, value in facts.items():
        label = f"{indent}{name.replace('_', ' ')}"
        if isinstance(value, Mapping):
            yield label
            yield from table(value, f"{indent}  ")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield label
            for record in value:
                shown = (f"{key.replace('_', ' ')} {_shown(item)}" for key, item in record.items())
                yield f"{indent}  {', '.join(shown)}"
        else:
            yield f"{label:34} {_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else unwrap(value)


def unwrap(value: Any) -> str:
    """Show a number or text in a result line."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
