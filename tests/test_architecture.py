"""The map of the repository: who may import whom, and what no package does.

Every rule is a function from a file to its offences, so that the last tests can see each one fail.
"""

import ast
import configparser
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Each package may import itself and what stands to its right.
LAYERS = ("launchers", "finetune", "pretrain", "datastore")

# Each heavy dependency and the only files that may import it.
DOORS = {
    "dask": {"datastore/workers.py", "datastore/array_workers.py"},
    "dask_jobqueue": {"datastore/workers.py"},
    "deepspeed": {"pretrain/engine.py", "pretrain/full_state.py"},
    "distributed": {"datastore/workers.py", "datastore/array_workers.py"},
    "gensim": {"datastore/gene2vec.py"},
    "jsonargparse": {"launchers/cli.py"},
    "mlflow": {
        "pretrain/mlflow_client.py",
        "pretrain/mlflow_records.py",
        "finetune/pyfunc.py",
        "finetune/registration.py",
        "finetune/registry.py",
        "finetune/registry_client.py",
        "finetune/registry_files.py",
        "finetune/sweep_delivery.py",
    },
    "performer_pytorch": {"pretrain/encoder.py", "pretrain/favor.py"},
    "tensorstore": {"datastore/reader.py", "datastore/storage.py"},
}

# Files of these modules run code of their author's choice when they are opened.
UNSAFE_LOADERS = {"cloudpickle", "dill", "joblib", "pickle"}

LONGEST_LAUNCHER = 80
LONGER_LAUNCHERS = {
    "launchers/cli.py",
    "launchers/fan_out.py",
    "launchers/quickstart.py",
    "launchers/scbert.py",
}


@dataclass(frozen=True)
class SourceFile:
    """One Python file: its path from the repository root and its text."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.path)

    @property
    def package(self) -> str:
        return self.path.split("/")[0]


def repository_files() -> list[SourceFile]:
    paths = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
    return [SourceFile(str(path.relative_to(ROOT)), path.read_text("utf-8")) for path in paths]


# --- what a file imports and calls ---

IMPORT_FUNCTIONS = {"__import__", "import_module", "importlib.import_module"}


def imports(file: SourceFile) -> Iterator[tuple[int, str]]:
    """Yield line and absolute dotted name of every import, wherever in the file it stands.

    ``from a import b`` yields ``a.b``: the rules look at leading parts, and ``b`` may be a module.
    """
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = imported_from(file, node)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and called_name(node) in IMPORT_FUNCTIONS and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


def imported_from(file: SourceFile, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parents = file.path.split("/")[: -node.level]
    return ".".join([*parents, node.module] if node.module else parents)


def called_name(call: ast.Call) -> str:
    return ast.unparse(call.func)


def calls(file: SourceFile) -> Iterator[ast.Call]:
    return (node for node in ast.walk(file.tree) if isinstance(node, ast.Call))


# --- the rules ---


def imports_to_the_left(file: SourceFile) -> Iterator[str]:
    to_the_left = LAYERS[: LAYERS.index(file.package)]
    for line, name in imports(file):
        if name.split(".")[0] in to_the_left:
            yield f"{file.path}:{line} imports {name}; pass the value in as an argument"


def imports_tests(file: SourceFile) -> Iterator[str]:
    for line, name in imports(file):
        if name.split(".")[0] in {"tests", "conftest", "pytest"}:
            yield f"{file.path}:{line} imports {name}; packages run without the tests"


def torch_in_datastore(file: SourceFile) -> Iterator[str]:
    for line, name in imports(file):
        if file.package == "datastore" and name.split(".")[0] == "torch":
            yield f"{file.path}:{line} imports {name}; datastore knows NumPy only"


def imports_past_the_door(file: SourceFile) -> Iterator[str]:
    for line, name in imports(file):
        library = name.split(".")[0]
        if library in DOORS and file.path not in DOORS[library]:
            doors = " or ".join(sorted(DOORS[library]))
            yield f"{file.path}:{line} imports {name}; {library} enters through {doors}"


def unsafe_loading(file: SourceFile) -> Iterator[str]:
    for line, name in imports(file):
        if set(name.split(".")) & UNSAFE_LOADERS:
            yield f"{file.path}:{line} imports {name}; its files can run code"
        if name == "torch.load":
            yield f"{file.path}:{line} imports torch.load by itself; call it as torch.load"
    for call in calls(file):
        options = {option.arg: option.value for option in call.keywords}
        if called_name(call) == "torch.load" and not is_true(options.get("weights_only")):
            yield f"{file.path}:{call.lineno} calls torch.load without weights_only=True"
        if "allow_pickle" in options and not is_false(options["allow_pickle"]):
            yield f"{file.path}:{call.lineno} allows pickled arrays"


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def prints_in_a_library(file: SourceFile) -> Iterator[str]:
    for call in calls(file):
        if file.package != "launchers" and called_name(call) in {"print", "builtins.print"}:
            yield f"{file.path}:{call.lineno} prints; log it"


def long_launcher(file: SourceFile) -> Iterator[str]:
    if file.package != "launchers" or file.path in LONGER_LAUNCHERS:
        return
    has_main = any(isinstance(n, ast.FunctionDef) and n.name == "main" for n in file.tree.body)
    num_lines = len(file.text.splitlines())
    if has_main and num_lines > LONGEST_LAUNCHER:
        yield f"{file.path} has {num_lines} lines; move work into a package"


Rule = Callable[[SourceFile], Iterator[str]]

RULES: list[Rule] = [
    imports_to_the_left,
    imports_tests,
    torch_in_datastore,
    imports_past_the_door,
    unsafe_loading,
    prints_in_a_library,
    long_launcher,
]


@pytest.mark.parametrize("rule", RULES)
def test_every_file_keeps_the_rule(rule: Rule) -> None:
    assert [offence for file in repository_files() for offence in rule(file)] == []


def test_every_package_is_looked_at() -> None:
    assert {file.package for file in repository_files()} == set(LAYERS)


def test_what_the_packages_import_is_declared() -> None:
    """In setup.cfg, and not only because something that we ask for asks for it, too."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = dict(setup["options.extras_require"])
    del extras["dev"]
    lines = "\n".join([setup["options"]["install_requires"], *extras.values()]).splitlines()
    declared = {named[0].lower() for line in lines if (named := re.match(r"[\w-]+", line))}
    homes = packages_distributions()
    for file in repository_files():
        for line, name in imports(file):
            library = name.split(".")[0]
            if library not in sys.stdlib_module_names and library not in LAYERS:
                found = {home.lower().replace("_", "-") for home in homes.get(library, [library])}
                assert found & declared, f"{file.path}:{line} imports {name}: declare it"


# --- the rules themselves ---

TOO_LONG = "def main():\n" + "    pass\n" * LONGEST_LAUNCHER

OFFENCES = [
    (imports_to_the_left, "datastore/a.py", "import pretrain"),
    (imports_to_the_left, "datastore/a.py", "import numpy, pretrain.config as config"),
    (imports_to_the_left, "pretrain/a.py", "def f():\n    from finetune.train import train"),
    (imports_to_the_left, "finetune/a.py", "if TYPE_CHECKING:\n    from launchers import cli"),
    (imports_to_the_left, "pretrain/a.py", "importlib.import_module('launchers.cli')"),
    (imports_tests, "pretrain/a.py", "from tests.support.ranks import run_ranks"),
    (torch_in_datastore, "datastore/a.py", "def f():\n    from torch.utils import data"),
    (imports_past_the_door, "pretrain/train.py", "import deepspeed"),
    (imports_past_the_door, "pretrain/train.py", "from deepspeed.ops import adam"),
    (imports_past_the_door, "finetune/train.py", "from mlflow import log_metric"),
    (imports_past_the_door, "finetune/a.py", "class A:\n    import performer_pytorch"),
    (imports_past_the_door, "datastore/store.py", "import tensorstore as ts"),
    (imports_past_the_door, "datastore/sub/ingest.py", "import dask.array"),
    (imports_past_the_door, "launchers/a.py", "from distributed import Client"),
    (imports_past_the_door, "launchers/pretrain.py", "from jsonargparse import CLI"),
    (unsafe_loading, "datastore/a.py", "import pickle"),
    (unsafe_loading, "finetune/a.py", "from joblib import load"),
    (unsafe_loading, "finetune/a.py", "from sklearn.externals import joblib"),
    (unsafe_loading, "pretrain/a.py", "torch.load(path)"),
    (unsafe_loading, "pretrain/a.py", "torch.load(path, weights_only=False)"),
    (unsafe_loading, "pretrain/a.py", "from torch import load"),
    (unsafe_loading, "datastore/a.py", "np.load(path, allow_pickle=True)"),
    (prints_in_a_library, "pretrain/a.py", "def f():\n    print('loss')"),
    (long_launcher, "launchers/annotate.py", TOO_LONG),
]

FINE = [
    (imports_to_the_left, "launchers/a.py", "import finetune, pretrain, datastore"),
    (imports_to_the_left, "finetune/a.py", "from . import launchers"),
    (imports_to_the_left, "pretrain/a.py", "from .train import train\nimport pretrain.launchers"),
    (torch_in_datastore, "pretrain/a.py", "import torch"),
    (torch_in_datastore, "datastore/a.py", "import torchless"),
    (imports_past_the_door, "pretrain/engine.py", "import deepspeed"),
    (imports_past_the_door, "pretrain/a.py", "from torch import distributed"),
    (imports_past_the_door, "pretrain/a.py", "from . import distributed"),
    (unsafe_loading, "pretrain/a.py", "torch.load(path, weights_only=True)"),
    (unsafe_loading, "datastore/a.py", "np.load(path, allow_pickle=False)"),
    (prints_in_a_library, "launchers/a.py", "print('done')"),
    (prints_in_a_library, "pretrain/a.py", "'''print(x)'''"),
    (long_launcher, "launchers/quickstart.py", TOO_LONG),
    (long_launcher, "launchers/annotate.py", TOO_LONG.removesuffix("    pass\n")),
]


@pytest.mark.parametrize(("rule", "path", "text"), OFFENCES)
def test_rule_reports_the_offence_once(rule: Rule, path: str, text: str) -> None:
    offences = list(rule(SourceFile(path, text)))

    assert len(offences) == 1
    assert offences[0].startswith(path)


@pytest.mark.parametrize(("rule", "path", "text"), FINE)
def test_rule_accepts_what_is_allowed(rule: Rule, path: str, text: str) -> None:
    assert list(rule(SourceFile(path, text))) == []


def test_every_rule_is_seen_failing() -> None:
    assert {rule for rule, _, _ in OFFENCES} == set(RULES)
