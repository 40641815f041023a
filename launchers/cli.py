"""What all launchers share: configuration from file and flags, logging, errors, exit codes.

Exit codes: 0 done, 1 a bug of ours (with traceback), 2 wrong input or setting (one sentence).
"""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from jsonargparse import ArgumentParser, set_parsing_settings

T = TypeVar("T")
CONFIGS: Final = Path(__file__).parent / "configs"
LAUNCHER_FLAGS: Final = ("--hostfile", "-H", "--include", "--exclude", "--num_nodes", "--num_gpus")
"""Flags of the `deepspeed` command, which it silently ignores behind the script."""


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
        ValueError: If a value is refused, with the field's name and the remedy.
        SystemExit: After `--help` or `--print_config`, and for unknown flags (code 2).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _refuse_launcher_flags(arguments, launcher)
    presets = {path.stem: path for path in (CONFIGS / Path(launcher).stem).glob("*.yaml")}
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    choice = f" [--preset {{{','.join(sorted(presets))}}}]" if presets else ""
    parser = ArgumentParser(
        prog=f"launchers/{launcher}",
        allow_abbrev=False,
        usage=f"%(prog)s{choice} [--config FILE] [--FIELD VALUE ...]",
        description=f"{description} Settings: defaults < --preset < --config < flags. "
        f"Example: {example}",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the settings")
    parser.add_class_arguments(config_type, None)
    settings = parser.parse_args(_expand_preset(_without_local_rank(arguments), presets))
    values = vars(parser.instantiate(settings))
    values.pop("config", None)
    return config_type(**values)


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
        print(f"{prefix}: {_sentence(error)}", file=sys.stderr)
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
    print(text, flush=True)


def unwrap(value: Any) -> str:
    """Show a number or text in a result line."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
