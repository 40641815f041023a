"""The completion function of a shell, made from what each command says of itself."""

import contextlib
import io
import re
from typing import Final

FUNCTION: Final = """\
_scbert() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} said="" place
    for ((place = 1; place < COMP_CWORD; place++)); do
        case ${{COMP_WORDS[place]}} in
            -*) break ;;
            *) case "$said ${{COMP_WORDS[place]}}" in
{paths}
                    said="$said ${{COMP_WORDS[place]}}" ;;
                *) break ;;
            esac ;;
        esac
    done
    local words=""
    case $said in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    if [[ $word != -* ]]; then
        COMPREPLY+=($(compgen -f -- "$word"))
    fi
}}
complete -o filenames -F _scbert scbert
"""


def words_by_command() -> dict[str, list[str]]:
    """Return what may follow each command: from `` (nothing yet) to ` models show`."""
    from launchers.scbert import COMMANDS

    found: dict[str, list[str]] = {}
    for name in COMMANDS:
        path = ""
        for part in name.split():
            found.setdefault(path, []).append(part)
            path += f" {part}"
        _add_help(found, path)
    found[" sweep run"] += found[" finetune"]  # what all rows share
    return {path: sorted(set(words)) for path, words in found.items()}


def script(words: dict[str, list[str]]) -> str:
    """Write the completion function of bash, which zsh runs as well."""
    paths = "|\\\n".join(f'                "{path}"' for path in words if path) + ")"
    cases = "\n".join(
        f'        "{path}") words="{" ".join(choices)}" ;;' for path, choices in words.items()
    )
    return FUNCTION.format(paths=paths, cases=cases)


def _add_help(found: dict[str, list[str]], path: str) -> None:
    """Take flags, and further words with their flags, from what a command says of itself."""
    said = _help(path.split())
    found.setdefault(path, []).extend(re.findall(r"(?<![\w-])--[a-z][\w.]*", said))
    usage = re.search(r"(\w+(?: \| \w+)+) \.\.\.", " ".join(said.split()))
    for word in usage[1].split(" | ") if usage else []:
        found[path].append(word)
        _add_help(found, f"{path} {word}")


def _help(words: list[str]) -> str:
    from launchers import scbert

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        scbert.main([*words, "--help"])
    return printed.getvalue()
