"""Words come back at once: heavy packages are imported when they are used."""

import resource
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        pytest.param(["-m", "launchers.scbert", "--help"], 0.6, id="scbert --help"),
        pytest.param(["-m", "launchers.scbert", "models", "--help"], 0.6, id="models"),
        pytest.param(["-m", "launchers.scbert", "sweep", "--help"], 0.6, id="sweep"),
        pytest.param(["-c", "import datastore"], 1.0, id="datastore"),
        pytest.param(["-c", "import datastore; datastore.open_store"], 1.0, id="open_store"),
        pytest.param(["-c", "import finetune, pretrain"], 1.0, id="finetune and pretrain"),
    ],
)
def test_cpu_seconds_of_a_start(words: list[str], seconds: float) -> None:
    used = []
    for _ in range(2):  # the first may have to write bytecode
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(used) < seconds
