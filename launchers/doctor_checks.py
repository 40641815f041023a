"""What `scbert doctor` looks at: each check finds one fact and says what to do about it.

Checks change nothing and take their surroundings as arguments, so that each can be seen failing.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

from pretrain.mlflow_client import resolve_tracking_uri, without_credentials

DISTRIBUTION: Final = "scbert-scale"
LEAST_MEMORY: Final = 8 * 2**30
LEAST_DISK: Final = 5 * 2**30
STALE_LOCK_SECONDS: Final = 600
"""DeepSpeed's slowest op compiles in a few minutes; an older lock belongs to nobody."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    name: str
    verdict: Literal["ok", "warning", "problem"]
    fact: str
    remedy: str = ""


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    """Whether the interpreter is one that the package is made for."""
    text = ".".join(map(str, version))
    if (3, 11) <= version[:2] < (3, 13):
        return Finding("python", "ok", f"{text} at {sys.executable}")
    return Finding("python", "problem", text, "use Python 3.11 or 3.12")


def check_packages(
    required: Iterable[str] | None = None,
    installed: Callable[[str], str] = metadata.version,
) -> Iterator[Finding]:
    """Whether every required package is there in a version of the range it is tested in."""
    from packaging.requirements import Requirement

    if required is None:
        try:
            required = metadata.requires(DISTRIBUTION) or []
        except metadata.PackageNotFoundError:
            yield Finding("packages", "problem", "not installed", "run `pip install .` or `make`")
            return
    wrong, num_fine = [], 0
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = installed(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            num_fine += 1
        else:
            wrong.append(f"{requirement.name} is {version}, needed is {requirement.specifier}")
    if wrong:
        remedy = f"pip install --upgrade {DISTRIBUTION}, or `make` in the repository"
        yield Finding("packages", "problem", "; ".join(wrong), remedy)
    else:
        yield Finding("packages", "ok", f"{num_fine} required packages in their ranges")


def check_cores(num_cores: int | None = None) -> Finding:
    """Cores this process may use."""
    number = len(os.sched_getaffinity(0)) if num_cores is None else num_cores
    if number >= 2:
        return Finding("cores", "ok", f"{number} for this process")
    return Finding("cores", "warning", "1", "training and reading share it; ask for two or more")


def check_memory(meminfo: Path = Path("/proc/meminfo"), limit: int | None = None) -> Finding:
    """Memory that is free now, or that a container is allowed."""
    lines = (line.split() for line in meminfo.read_text().splitlines())
    kilobytes = {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1}
    free = kilobytes["MemAvailable"] * 1024
    allowed = _cgroup_limit() if limit is None else limit
    free = min(free, allowed) if allowed else free
    text = f"{free / 2**30:.1f} GiB available"
    if free >= LEAST_MEMORY:
        return Finding("memory", "ok", text)
    remedy = "the quickstart needs 8 GiB; smaller batch.micro_size and reader buffers need less"
    return Finding("memory", "warning", text, remedy)


def check_disk(folder: Path, free: int | None = None) -> Finding:
    """Room where runs are written."""
    found = shutil.disk_usage(folder).free if free is None else free
    text = f"{found / 2**30:.1f} GiB free in {folder}"
    if found >= LEAST_DISK:
        return Finding("disk", "ok", text)
    return Finding("disk", "warning", text, "free some space, or work in another folder")


def check_compiler(environ: Mapping[str, str], which: Callable[..., str | None]) -> Finding:
    """What DeepSpeed, the attention kernel and the store's are compiled with on first use."""
    compiler = (environ.get("CXX", "").split() or ["c++"])[0]  # without its arguments
    missing = []
    if which(compiler) is None:
        missing.append(f"no compiler {compiler!r} (sudo apt-get install g++)")
    if which("ninja") is None:
        missing.append("no ninja on PATH (activate the environment, or pip install ninja)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        missing.append(f"no Python.h (sudo apt-get install {package})")
    if missing:
        return Finding("compiler", "problem", "; ".join(missing), "DeepSpeed needs all of them")
    return Finding("compiler", "ok", f"{compiler}, ninja and Python.h")


def check_deepspeed_ops(folder: Path, now: float | None = None) -> Finding:
    """Kernels that DeepSpeed has compiled here, and locks that a killed compilation left."""
    now = time.time() if now is None else now
    stale = [
        path
        for path in sorted(folder.glob("**/lock"))
        if now - path.stat().st_mtime > STALE_LOCK_SECONDS
    ]
    if stale:
        remedy = f"a start would wait for ever; remove it: rm {' '.join(map(str, stale))}"
        return Finding("deepspeed ops", "problem", f"{len(stale)} lock of a dead build", remedy)
    built = sorted({path.stem for path in folder.glob("**/*.so")})
    if built:
        return Finding("deepspeed ops", "ok", f"compiled: {', '.join(built)}")
    remedy = "nothing to do: the first training compiles them, which takes a minute or two"
    return Finding("deepspeed ops", "warning", f"none compiled yet in {folder}", remedy)


def check_torch() -> Finding:
    """The build of torch, and what it computes on."""
    try:
        import torch
    except ImportError as error:
        return Finding("torch", "problem", str(error), "install torch, see README")
    if torch.cuda.is_available():
        return Finding("torch", "ok", f"{torch.__version__}, {torch.cuda.device_count()} GPUs")
    if shutil.which("nvidia-smi"):
        remedy = 'there is a GPU driver: install a CUDA build, make TORCH="torch==2.13.0"'
        return Finding("torch", "warning", f"{torch.__version__}, no GPU used", remedy)
    from pretrain.products import multiplies_bf16

    narrow = "multiplies bf16" if multiplies_bf16() else "bf16 is no faster than float32 here"
    return Finding("torch", "ok", f"{torch.__version__}, on CPU; {narrow}")


def check_attention_kernel() -> Finding:
    """Whether this CPU runs the native attention, which is several times faster."""
    from pretrain.native import best_variant, missing

    if reason := missing("float32"):
        return Finding("attention kernel", "warning", reason, "attention runs in plain PyTorch")
    if reason := missing("bf16"):
        return Finding("attention kernel", "ok", f"native in float32; for bf16 {reason}")
    builds = f"{best_variant('float32')} and {best_variant('bf16')}"
    return Finding("attention kernel", "ok", f"native, in float32 and bf16 ({builds})")


def check_store_kernels() -> Finding:
    """Whether batches are cut and cells packed by native code, which is twice as fast."""
    from datastore.kernels import missing

    if reason := missing():
        return Finding("store kernels", "warning", reason, "NumPy does their work")
    return Finding("store kernels", "ok", "native")


def check_mlflow(uri: str | None, environ: Mapping[str, str], cwd: Path) -> Finding:
    """Whether runs and models can be kept where they are meant to be."""
    try:
        address = resolve_tracking_uri(uri, environ, cwd)
    except ValueError as error:
        return Finding("mlflow", "problem", str(error), "correct MLFLOW_TRACKING_URI")
    shown = without_credentials(address)
    if address.startswith("sqlite:///"):
        return _check_sqlite(Path(address.removeprefix("sqlite:///").partition("?")[0]), shown)
    if not address.startswith(("http://", "https://")):
        return Finding("mlflow", "ok", f"{shown} (not asked)")
    try:
        with urllib.request.urlopen(f"{shown.rstrip('/')}/health", timeout=5) as answer:
            return Finding("mlflow", "ok", f"{shown} answers ({answer.status})")
    except urllib.error.HTTPError as error:
        if error.code in (401, 403) and shown != address:
            return Finding("mlflow", "ok", f"{shown} answers and wants a login")
        remedy = "is it an MLflow server, and is this host among its --allowed-hosts?"
        return Finding("mlflow", "problem", f"{shown} answers with {error.code}", remedy)
    except OSError as error:
        reason = without_credentials(str(getattr(error, "reason", error)))
        remedy = "start it, or set MLFLOW_TRACKING_URI to yours; training keeps runs in files"
        return Finding("mlflow", "problem", f"{shown} does not answer: {reason}", remedy)


def check_store(place: str) -> Finding:
    """Whether a cell store opens, by its manifest."""
    from datastore.store import open_store

    shown = without_credentials(place)
    try:
        store = open_store(place)
    except (ValueError, OSError) as error:
        text = without_credentials(" ".join(str(error).split()))
        remedy = f"`scbert store verify {shown}` names damaged files"
        return Finding("store", "problem", text, remedy)
    return Finding(
        "store", "ok", f"{shown}: {store.num_cells:,} cells × {len(store.panel):,} genes"
    )


def check_cluster_tools(which: Callable[..., str | None]) -> Finding:
    """Programs that start a training on several machines."""
    found = [name for name in ("srun", "sbatch", "pdsh", "ssh") if which(name)]
    if "sbatch" in found:
        scripts = Path(__file__).parent / "slurm"
        return Finding("cluster", "ok", f"{', '.join(found)}; batch scripts: {scripts}")
    if "pdsh" in found:
        return Finding("cluster", "ok", ", ".join(found))
    fact = f"found: {', '.join(found) or 'nothing'}"
    return Finding("cluster", "ok", f"{fact}; several machines need Slurm, or pdsh with ssh")


def show(findings: Iterable[Finding]) -> Iterator[str]:
    """Show findings in lines, a remedy below its fact."""
    for finding in findings:
        mark = {"ok": " ok ", "warning": "note", "problem": "FAIL"}[finding.verdict]
        yield f"[{mark}] {finding.name:17} {finding.fact}"
        if finding.remedy:
            yield f"{'':25}→ {finding.remedy}"


def as_json(findings: Iterable[Finding]) -> str:
    """Show findings to a script."""
    lines: list[dict[str, Any]] = [finding.__dict__ for finding in findings]
    return json.dumps({"healthy": all(f["verdict"] != "problem" for f in lines), "checks": lines})


def extensions_folder(environ: Mapping[str, str]) -> Path:
    """Where torch keeps what it compiles."""
    return Path(environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")


def _check_sqlite(database: Path, shown: str) -> Finding:
    if not os.access(database if database.exists() else database.parent, os.W_OK):
        remedy = "set MLFLOW_TRACKING_URI to a file or server that you may write to"
        return Finding("mlflow", "problem", f"{shown} cannot be written", remedy)
    if _is_shared(database):
        remedy = "SQLite on a network disk may break: run `mlflow server`, see docs/operations.md"
        return Finding("mlflow", "warning", f"{shown} is on a network disk", remedy)
    return Finding(
        "mlflow", "ok", shown if database.exists() else f"{shown} (made by the first run)"
    )


def _is_shared(path: Path) -> bool:
    """Whether a path is on a network file system, as far as `stat` can say."""
    where = path if path.exists() else path.parent
    done = subprocess.run(
        ["stat", "--file-system", "--format=%T", str(where)],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() in {"nfs", "lustre", "gpfs", "cifs", "smb2", "fuseblk", "ceph"}


def _cgroup_limit() -> int:
    """Memory that a container may use; 0 if it is not limited."""
    path = Path("/sys/fs/cgroup/memory.max")
    text = path.read_text().strip() if path.is_file() else "max"
    return int(text) if text.isdigit() else 0
