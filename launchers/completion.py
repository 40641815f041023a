"""Print what makes a shell complete the words and flags of `scbert`.

scbert completion bash > ~/.local/share/bash-completion/completions/scbert
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from typing import Final

from launchers import cli
from launchers.completion_script import script, words_by_command

SHELLS: Final = ("bash", "zsh")
ZSH: Final = "autoload -U +X bashcompinit && bashcompinit\n"


def main(argv: list[str] | None = None) -> int:
    """Print the script of a shell."""
    return cli.run(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    parser = cli.CommandParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="Example: source <(scbert completion bash)",
    )
    parser.add_argument("shell", choices=SHELLS)
    shell = parser.parse(argv).shell
    cli.echo((ZSH if shell == "zsh" else "") + script(words_by_command()).rstrip())


if __name__ == "__main__":
    sys.exit(main())
