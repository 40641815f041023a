"""README and docs/: commands fit the real parsers, links lead somewhere, no public name is missing.

Every command is run by a test: as shown (`AS_SHOWN`) or in another form (`IN_ANOTHER_FORM`). That
pages link rightly to each other is what `make docs` checks.
"""

import functools
import importlib
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from launchers import cli, scbert, sweep_commands
from launchers.completion_script import words_by_command
from launchers.flags import with_underscores
from tests.support.documents import ROOT, commands, inline_code, pages

OTHER_PROGRAMS = {"cd", "createdb", "curl", "export", "git", "make", "mlflow", "pg_dump", "pip"}
OTHER_PROGRAMS |= {"pg_restore", "rclone", "source", "sudo"}
OF_SBATCH = {
    "annotate_array.sbatch": ("annotate", "--part 0"),
    "finetune_array.sbatch": ("sweep run", "--row 1"),
    "ingest_array.sbatch": ("store build", "--array.tasks 2 --array.task 1 --array.job 7"),
    "pretrain.sbatch": ("pretrain", ""),
}
"""What each template calls before and behind the user's words."""

AS_SHOWN = {
    "README.md": "tests/launchers/test_readme.py::test_readme_commands_run",
    "docs/getting_started.md": "tests/launchers/test_readme.py::test_readme_commands_run",
    "docs/cluster.md": "tests/launchers/test_cluster_page.py::"
    "test_commands_of_the_cluster_guide_run",
}
"""Pages whose commands a test runs word for word."""
LAB = "tests/finetune/test_registry_lab.py::test_a_lab_registry_keeps_models_for_everybody"
SERVED = "tests/finetune/test_registry_server.py::test_a_registered_model_labels_cells_over_http"
ACCOUNTS = "tests/finetune/test_registry_accounts.py::test_trainers_write_and_everybody_reads"
IN_ANOTHER_FORM = {
    "curl -s localhost:5001/invocations": SERVED,
    "export AWS_": LAB,
    "export MLFLOW_S3": LAB,
    "export MLFLOW_TRACKING_URI": LAB,
    "export MLFLOW_AUTH_ADMIN_PASSWORD": ACCOUNTS,
    "export MLFLOW_FLASK_SERVER_SECRET_KEY": ACCOUNTS,
    "export MLFLOW_TRACKING_USERNAME": ACCOUNTS,
    "make quickstart": "tests/launchers/test_quickstart.py::"
    "test_quickstart_from_raw_counts_to_labels",
    "make test": ".ci/run::make",
    "mlflow models serve": SERVED,
    "mlflow server --app-name": ACCOUNTS,
    "mlflow server --host": LAB,
    "pg_dump": LAB,
    "pg_restore": LAB,
    # The extra dev has it, and its packages are those that the test runs with.
    "pip install 'mlflow[auth]'": ACCOUNTS,
    "pip install scbert-scale": "tests/launchers/test_wheel.py::"
    "test_the_wheel_brings_what_it_needs_and_nothing_else",
    "python benchmarks/annotation.py": "tests/benchmarks/test_shown.py::test_annotation",
    "python benchmarks/encoder_step.py": "tests/benchmarks/test_shown.py::test_encoder_step",
    "python benchmarks/ingest.py": "tests/benchmarks/test_shown.py::test_ingest",
    "python benchmarks/loader.py": "tests/benchmarks/test_loader.py::"
    "test_a_small_run_measures_all_that_needs_no_peer",
    "python benchmarks/finetune_ways.py": "tests/benchmarks/test_shown.py::test_finetune_ways",
    "python benchmarks/pretraining_worth.py": "tests/benchmarks/test_shown.py::"
    "test_pretraining_worth",
    "rclone sync": LAB,
    "scbert benchmark": "tests/launchers/test_json.py::test_a_benchmark",
    "sudo -u postgres": LAB,
    "sudo apt-get install postgresql": ".ci/run::postgresql",
}
"""First words of the other pages' commands, and what runs them on other data or in smaller size."""


class Understood(Exception):
    """A parser took a command line; nothing was begun."""


@pytest.fixture
def parsers_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let every launcher stop behind its parser, where the pages' settings lie."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrain.yaml").write_text("store: cells.zarr\noutput: runs/pretrain\n")

    def stopping(parse: Any) -> Any:
        def parse_and_stop(*arguments: Any, **named: Any) -> None:
            raise Understood(parse(*arguments, **named))

        return parse_and_stop

    def stop(*arguments: Any) -> None:
        raise Understood

    monkeypatch.setattr(cli, "parse", stopping(cli.parse))
    monkeypatch.setattr(cli.CommandParser, "parse", stopping(cli.CommandParser.parse))
    # Its words are partly another launcher's.
    monkeypatch.setattr(sweep_commands, "run", stop)


def as_scbert(command: str) -> list[str] | None:
    """The words behind `scbert` that come to the same; none for other programs."""
    words = [word for word in shlex.split(command) if "=" not in word or word.startswith("-")]
    scripts = [place for place, word in enumerate(words) if re.match(r"launchers/.*\.", word)]
    if words[0] == "scbert":
        return words[1:]
    if not scripts:
        return None
    script, rest = Path(words[scripts[-1]]), words[scripts[-1] + 1 :]
    assert (ROOT / script).is_file(), f"there is no {script}"
    if script.suffix == ".sbatch":
        before, behind = OF_SBATCH[script.name]
        return [*before.split(), *rest, *behind.split()]
    module = f"launchers.{script.stem}"
    for name, (home, *more) in scbert.COMMANDS.items():
        if home == module and not more:
            return [*name.split(), *rest]
    return None


SHOWN = [
    pytest.param(command, id=f"{page.relative_to(ROOT)}: {command}"[:90])
    for page in pages()
    for command in commands(page)
]


def test_there_are_commands_to_look_at() -> None:
    assert len(SHOWN) > 50


@pytest.mark.usefixtures("parsers_only")
@pytest.mark.parametrize("command", SHOWN)
def test_shown_commands_fit_the_parsers(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    program = shlex.split(command)[0]
    words = as_scbert(command)
    if words is None:
        script = next((word for word in command.split() if word.endswith(".py")), None)
        assert script or program in OTHER_PROGRAMS or "=" in program, f"what is {program}?"
        assert script is None or (ROOT / script).is_file(), f"there is no {script}"
        return
    code: int | str | None = 0
    try:
        code = scbert.main(words)
        understood = False
    except Understood:
        understood = True
    except SystemExit as ended:  # --help, --print_config
        understood = not ended.code
    assert understood, f"exit code {code}: {capsys.readouterr().err}"


def test_every_shown_command_is_run_by_a_test() -> None:
    others = [page for page in pages() if str(page.relative_to(ROOT)) not in AS_SHOWN]
    shown = {command for page in others for command in commands(page)}
    used = set()
    for command in shown:
        words = " ".join(command.split())
        found = [first for first in IN_ANOTHER_FORM if words.startswith(first)]
        assert found, f"no test is known to run {command!r}: add one"
        used.update(found)
    assert used == set(IN_ANOTHER_FORM), "these are not shown any more"
    for place in {*AS_SHOWN.values(), *IN_ANOTHER_FORM.values()}:
        file, _, name = place.partition("::")
        assert name in (ROOT / file).read_text(encoding="utf-8"), place


# --- commands within running text: often beginnings, without all that a command needs ---

INLINE = [
    pytest.param(code, id=f"{page.relative_to(ROOT)}: {code}"[:90])
    for page in pages()
    for code in dict.fromkeys(inline_code(page))
    if re.match(r"(scbert|make|deepspeed|sbatch|python|mlflow|launchers/\S+) \S", code)
]
MLFLOW = re.compile(r"mlflow (server|gc|models serve|db upgrade)\b")
SBATCH = {"--array", "--cpus-per-task", "--gpus-per-node", "--nodes", "--ntasks-per-node"}


def flags(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def unknown_to_scbert(words: list[str]) -> set[str]:
    """Words and flags that no parser behind `scbert` knows, of a command or its beginning."""
    after, path = words_after(), ""
    while words and f"{path} {words[0]}" in after:
        path, words = f"{path} {words[0]}", words[1:]
    chooses = any(f"{path} {word}" in after for word in after[path])
    wrong = set(words[:1]) if chooses and words and not words[0].startswith("-") else set()
    known = {with_underscores(word) for word in [*after[path], "--help"]}
    return wrong | {flag for flag in flags(words) if with_underscores(flag) not in known}


@functools.cache
def words_after() -> dict[str, list[str]]:
    return words_by_command()


def unknown_to_script(words: list[str], script: Path) -> set[str]:
    """Flags that a file which makes its own parser does not have."""
    text = script.read_text(encoding="utf-8")
    return {flag for flag in flags(words) if not re.search(f"[\"']{flag}[\"']", text)}


def unknown(code: str) -> set[str]:
    """What a command names that does not exist."""
    program, *words = shlex.split(code)
    if program == "scbert":
        return unknown_to_scbert(words)
    if program == "make":
        text = (ROOT / "Makefile").read_text(encoding="utf-8")
        return set(words) - set(re.findall(r"^([a-z-]+):", text, re.MULTILINE))
    if program == "mlflow":
        return set() if MLFLOW.match(code) else {code}
    if words[0] == "-m":
        return set() if importlib.util.find_spec(words[1]) else {words[1]}
    place, script = 0, program  # what is run last: `python fan_out.py … pretrain.py …`
    wrong: set[str] = set()
    for number, word in enumerate([program, *words]):
        if re.fullmatch(r"(launchers|benchmarks)/.*\.(py|sbatch)", word):
            wrong |= unknown_of_one(script, words[place : number - 1] if number else [])
            place, script = number, word
    return wrong | unknown_of_one(script, words[place:])


def unknown_of_one(program: str, words: list[str]) -> set[str]:
    """The same for one program or script, and what stands behind it."""
    script = ROOT / program
    if program == "sbatch":
        return flags(words) - SBATCH
    if program == "deepspeed":
        found = importlib.util.find_spec("deepspeed")  # not imported: that takes seconds
        assert found is not None
        assert found.origin is not None
        return unknown_to_script(words, Path(found.origin).parent / "launcher" / "runner.py")
    if program == "python":
        return flags(words)
    if not script.is_file():
        return {program}
    if script.suffix == ".sbatch":
        return unknown_to_scbert([*OF_SBATCH[script.name][0].split(), *words])
    ours = as_scbert(program)
    return unknown_to_script(words, script) if ours is None else unknown_to_scbert([*ours, *words])


@pytest.mark.parametrize("code", INLINE)
def test_commands_in_running_text_exist(code: str) -> None:
    assert unknown(code) == set()


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("scbert modles list", {"modles"}),
        ("scbert models lits", {"lits"}),
        ("scbert store verify --quick", {"--quick"}),
        ("scbert pretrain --optim.rl 1", {"--optim.rl"}),
        ("make check tests", {"tests"}),
        ("mlflow serve", {"mlflow serve"}),
        ("python -m no_module", {"no_module"}),
        ("python benchmarks/no.py --quick", {"benchmarks/no.py"}),
        ("python benchmarks/loader.py --quickly", {"--quickly"}),
        ("launchers/finetune.py --epoch 5", {"--epoch"}),
        ("deepspeed --hosts h launchers/pretrain.py --stor s", {"--hosts", "--stor"}),
        ("sbatch --node 4 launchers/slurm/ingest_array.sbatch --source s", {"--node", "--source"}),
    ],
)
def test_what_does_not_exist_is_found(code: str, wrong: set[str]) -> None:
    assert unknown(code) == wrong


def test_there_is_code_in_running_text() -> None:
    assert len(INLINE) > 50


def anchors(page: Path) -> set[str]:
    """Names of the page's headings, as GitHub and MkDocs make them of plain ones."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    words = [re.sub(r"[^\w\s-]", "", head.lower()) for head in heads]
    return {re.sub(r"\s+", "-", word.strip()) for word in words}


def test_links_of_the_readme_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 5
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = ROOT / path if path else ROOT / "README.md"
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_api_page_shows_every_public_name_and_no_other() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = {
        heading: path
        for path, heading in re.findall(r'^::: (\S+)\n.*\n +heading: "(\S+)"', page, re.MULTILINE)
    }
    public = {
        f"{package}.{name}"
        for package in ("datastore", "pretrain", "finetune")
        for name in importlib.import_module(package).__all__
    }
    assert public - set(shown) == {"finetune.pl"}
    assert "\n::: finetune.pl\n" in page
    for short, path in shown.items():
        home, _, name = path.rpartition(".")
        package, _, attribute = short.rpartition(".")
        ours = getattr(importlib.import_module(home), name)
        if short in public:
            assert getattr(importlib.import_module(package), attribute) is ours
