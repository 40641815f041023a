"""Write the page of a fine-tuning run and say where it is.

scbert report runs/finetune --open
"""

import sys
import webbrowser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launchers import cli


def main(argv: list[str] | None = None) -> int:
    """Write the page."""
    return cli.run(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    options = _parser().parse(argv)
    from finetune.page import report

    page = report(options.run)
    if options.json:
        cli.echo_json({"page": page})
    else:
        cli.echo(str(page))
    if options.open:
        webbrowser.open(page.resolve().as_uri())


def _parser() -> cli.CommandParser:
    parser = cli.CommandParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="Example: scbert report runs/finetune",
    )
    parser.add_argument("run", type=Path, help="folder that `scbert finetune` wrote")
    parser.add_argument("--open", action="store_true", help="show it in the browser")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
