"""What each word of `scbert models` does: options in, lines to print out."""

import argparse
import errno
import json
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from finetune import registry
from launchers import cli


def list_(options: argparse.Namespace) -> Iterable[str]:
    """Show every version with its aliases."""
    refs = registry.list_models(options.tracking_uri)
    if options.json:
        return [json.dumps([{"reference": ref.uri, **asdict(ref)} for ref in refs])]
    return [" ".join([ref.uri, *(f"@{alias}" for alias in ref.aliases)]) for ref in refs]


def show_(options: argparse.Namespace) -> Iterable[str]:
    """Show all that the registry knows of a version."""
    facts = registry.describe_model(options.reference, uri=options.tracking_uri)
    if options.json:
        return [json.dumps(facts)]
    card = str(facts.pop("card"))
    del facts["files"]  # the card lists them
    return [*cli.table(facts), "", card.rstrip()]


def register_(options: argparse.Namespace) -> Iterable[str]:
    """Make a version of an export."""
    from finetune.registration import (
        LICENCE_TAG,
        LINEAGE_TAG,
        provenance_run_id,
        register_export,
    )

    uri = options.tracking_uri
    run = options.run_id or provenance_run_id(options.export, uri=uri)
    given = {LINEAGE_TAG: options.lineage, LICENCE_TAG: options.licence}
    tags = {key: value for key, value in given.items() if value}
    ref = register_export(
        options.export, options.name, uri=uri, alias=options.alias, run_id=run, tags=tags
    )
    return [json.dumps({"reference": ref.uri}) if options.json else ref.uri]


def promote_(options: argparse.Namespace) -> Iterable[str]:
    """Move an alias to a version that is no worse."""
    from finetune.promotion import promote

    done = promote(options.reference, options.alias, uri=options.tracking_uri, force=options.force)
    if options.json:
        return [json.dumps(asdict(done))]
    lines = [
        f"{name.replace('_', ' ')} {own:.4f}, before {champion:.4f}"
        for name, (own, champion) in done.scores.items()
    ]
    if done.objection:
        lines.append(f"forced, although {done.objection}")
    return [*lines, f"@{done.alias} is {done.challenger}, before {done.former or 'no version'}"]


def pull_(options: argparse.Namespace) -> Iterable[str]:
    """Fetch a version; print its folder."""
    if options.to is not None and options.to.exists():
        raise ValueError(f"--to {options.to} exists; name a folder that does not")
    offline = True if options.offline else None
    model = registry.resolve_model(options.reference, uri=options.tracking_uri, offline=offline)
    if options.to is not None:
        _copy(model.path, options.to)
    folder = str(options.to or model.path)
    return [json.dumps({"reference": model.uri, "folder": folder}) if options.json else folder]


def _copy(folder: Path, target: Path) -> None:
    """Copy the files of a model into a new folder: all of them, or there is no such folder."""
    parent = target.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=parent) as scratch:
            copy = Path(scratch) / "copy"
            copy.mkdir()
            for path in folder.iterdir():
                shutil.copyfile(path, copy / path.name)
            copy.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"the disk of --to {target} is full; free some space, or name a folder on another disk"
        ) from error


def verify_(options: argparse.Namespace) -> Iterable[str]:
    """Read every byte where it is kept."""
    num_files = registry.verify_model(options.reference, uri=options.tracking_uri)
    if options.json:
        return [json.dumps({"reference": options.reference, "whole": True, "files": num_files})]
    return [f"{options.reference} is whole: {num_files} files are as they were registered"]
