"""Looking at all sources before anything is written, and going on without the broken ones."""

import json
import logging
import shutil
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from datastore.config import StoreConfig
from datastore.genes import read_panel
from datastore.manifest import ListedSource, list_sources
from datastore.raw_cells import ReadOptions
from datastore.recognition import TABLE_SUFFIX
from datastore.sources import BrokenSource, BrokenSources, Source, open_source, scan_listed
from datastore.workers import Compute

log = logging.getLogger(__name__)

_SCANNED_AT_ONCE: Final = 128
"""Sources whose gene names come together, packed; they are unpacked before more come."""
_FIRST_CELLS: Final = 512
"""Cells of each source that are looked at before any work is begun."""
_LARGE_BYTES: Final = 64 * 10**6
"""Sources of so many bytes take two workers about as long as starting processes does."""


def scan_sources(
    config: StoreConfig, compute: Compute, decoded: Path | None = None
) -> tuple[list[Source], list[BrokenSource]]:
    """Look at all sources; return them in the order of their digests, and those left out.

    Args:
        config: Which, and how to read them.
        compute: Where tasks run.
        decoded: Folder for the cells of sources that can only be decoded whole; emptied first.

    Raises:
        ValueError: If some cannot be used (and `skip_broken` is off), or two are one.
    """
    panel = read_panel(Path(config.panel.file)).names if config.panel.file is not None else ()
    options = ReadOptions(
        layer=config.layer,
        orientation=config.orientation,
        obs_columns=tuple(config.obs_columns),
        known_genes=frozenset(panel),
        recover_counts=config.recover_counts,
    )
    listed = list_sources(config.sources)
    if decoded is not None:
        shutil.rmtree(decoded, ignore_errors=True)  # what a killed ingest has left
    sources: list[Source] = []
    broken: list[BrokenSource] = []
    known: dict[tuple[str, ...], tuple[str, ...]] = {}
    tasks = [(_scan_one, source, _options_for(source, options), decoded) for source in listed]
    for start in range(0, len(tasks), _SCANNED_AT_ONCE):
        for result in compute("scan", tasks[start : start + _SCANNED_AT_ONCE]):
            if isinstance(result, BrokenSource):
                broken.append(result)
            else:
                source, packed = result
                sources.append(_with_names(source, packed, known))
    left_out: list[BrokenSource] = []
    if broken:
        sources, left_out = go_without(BrokenSources(broken), sources, left_out, config)
    sources = sorted(sources, key=lambda source: (source.sha256, source.path))
    _refuse_repeats(sources)
    _refuse_columns(sources, config)
    return sources, left_out


def wants_processes(config: StoreConfig) -> bool:
    """Tell whether several local workers are processes: as said, or if the sources are large."""
    if config.processes is not None:
        return config.processes
    num_bytes = 0
    for listed in list_sources(config.sources):
        files = listed.path.rglob("*") if listed.path.is_dir() else [listed.path]
        num_bytes += sum(file.stat().st_size for file in files if file.is_file())
        if num_bytes >= _LARGE_BYTES:
            return True
    return False


def go_without(
    found: BrokenSources,
    sources: list[Source],
    left_out: list[BrokenSource],
    config: StoreConfig,
) -> tuple[list[Source], list[BrokenSource]]:
    """Leave broken sources out if that is allowed, else raise."""
    paths = {source.path for source in found.sources}
    remaining = [source for source in sources if source.path not in paths]
    if not remaining:
        raise found
    if not config.skip_broken:
        raise ValueError(f"{found}; --skip_broken true goes on without what is broken") from found
    for source in found.sources:
        # A name that is not UTF-8 must not break whatever writes the log.
        log.warning("left out: %s", source.reason.encode(errors="backslashreplace").decode())
    return remaining, [*left_out, *found.sources]


def or_broken(path: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function that reads a source; what it refuses is returned, so that others go on."""
    try:
        return function(*arguments)
    except ValueError as error:
        return BrokenSource(path, str(error))


def usable(results: Sequence[Any]) -> list[Any]:
    """Results of `or_broken`, if all are usable.

    Raises:
        BrokenSources: If some are not.
    """
    broken = {result.path: result for result in results if isinstance(result, BrokenSource)}
    if broken:
        raise BrokenSources(list(broken.values()))
    return list(results)


def _options_for(listed: ListedSource, options: ReadOptions) -> ReadOptions:
    """Leave the panel's names out where no table is to be told by them: they are long."""
    if TABLE_SUFFIX.search(listed.path.name):
        return options
    return replace(options, known_genes=frozenset())


def _scan_one(
    listed: ListedSource, options: ReadOptions, decoded: Path | None
) -> tuple[Source, bytes] | BrokenSource:
    """Scan a source; its gene names come apart from it and packed."""
    try:
        source = scan_listed(listed, options, decoded)
        _look_at_first_cells(source)
        return replace(source, genes=()), zlib.compress(json.dumps(source.genes).encode(), 1)
    except OSError as error:
        text = f"{listed.path}: {error.strerror}" if error.strerror else str(error)
        return BrokenSource(str(listed.path), text)
    except ValueError as error:
        return BrokenSource(str(listed.path), str(error))


def _look_at_first_cells(source: Source) -> None:
    """Refuse what is plainly not counts now: found later, the work on all sources is done again."""
    if source.whole and source.decoded is None:
        return  # it would be decoded whole for this
    with open_source(source) as cells:
        cells.counts(0, min(source.num_cells, _FIRST_CELLS))


def _with_names(
    source: Source, packed: bytes, known: dict[tuple[str, ...], tuple[str, ...]]
) -> Source:
    """Unpack a source's gene names.

    Thousands of sources name the same genes, and many have the same list: each is kept once.
    """
    names = tuple(map(sys.intern, json.loads(zlib.decompress(packed))))
    return replace(source, genes=known.setdefault(names, names))


def _refuse_repeats(sources: Sequence[Source]) -> None:
    for former, latter in pairwise(sources):  # sorted by digest
        if former.sha256 == latter.sha256:
            raise ValueError(f"{former.path} and {latter.path} are the same file; name it once")
    paths: dict[str, str] = {}
    for source in sources:
        if source.name in paths:  # a cell is known by its source's name and its row
            raise ValueError(
                f"{paths[source.name]} and {source.path} have the same name; rename one of them, "
                "or link to it under another name"
            )
        paths[source.name] = source.path


def _refuse_columns(sources: Sequence[Source], config: StoreConfig) -> None:
    for name in config.obs_columns:
        if not any(name in source.options.obs_columns for source in sources):
            raise ValueError(
                f"obs_columns: no source has obs[{name!r}]; leave it out, or correct its name"
            )
        if any(name in dict(source.labels) for source in sources):
            raise ValueError(
                f"obs_columns: {name!r} comes from the table of sources already; leave it out"
            )
