"""Point an alias at a better version: the challenger against the champion on the same cells.

Scores are those that fine-tuning (or pretraining) wrote into the exports; their hashes are checked
before they are read. Which cells were held out is recorded there too, so that two models are never
compared on different ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from finetune.export_files import read_config
from finetune.registry import ResolvedModel, resolve_model
from finetune.registry_client import check_name, explained, find_model, open_registry

SCORES: Final = {
    "classifier": ("macro_f1", "accuracy"),
    "encoder": ("validation_masked_accuracy",),
}
"""What decides, by kind of model: the first that differs."""


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """An alias and the version that it now points at."""

    alias: str
    challenger: str
    former: str | None
    """Version that had the alias before."""
    scores: Mapping[str, tuple[float, float]]
    """Challenger's and champion's, by name; empty if there was nothing to compare."""
    objection: str | None
    """Why it would have been refused without force."""


def promote(
    reference: str,
    alias: str = "champion",
    *,
    uri: str | None = None,
    cache: Path | None = None,
    force: bool = False,
) -> Promotion:
    """Point ``alias`` at a version unless it is worse than the one that has it.

    The version gets tags that say when, instead of which version, with which scores, and whether
    it was forced.

    Args:
        reference: The challenger, ``models:/name@challenger`` or ``models:/name/3``.
        alias: The alias to move.
        uri: Tracking server or store; None as in ``resolve_tracking_uri``.
        cache: As in ``resolve_model``.
        force: Promote even if it is worse or cannot be compared.

    Raises:
        ValueError: If it is worse, or was scored on other cells, and ``force`` is not given.
    """
    check_name(alias)
    challenger = resolve_model(reference, uri=uri, cache=cache, offline=False)
    if challenger.name is None:
        raise ValueError(f"{reference!r} is a folder; register it, then promote models:/name/1")
    client, address = open_registry(uri)
    with explained(address):
        holders = find_model(client, challenger.name).aliases
    former = None
    if alias in holders and int(holders[alias]) != challenger.version:
        former = resolve_model(
            f"models:/{challenger.name}/{holders[alias]}", uri=uri, cache=cache, offline=False
        )
    scores, objection = _compare(challenger, former)
    if objection is not None and not force:
        raise ValueError(f"{challenger.uri} is not promoted: {objection}")
    promotion = Promotion(
        alias=alias,
        challenger=challenger.uri,
        former=None if former is None else former.uri,
        scores=scores,
        objection=objection,
    )
    with explained(address):
        version = str(challenger.version)
        for key, value in _record(promotion).items():
            client.set_model_version_tag(challenger.name, version, f"promoted.{key}", value)
        client.set_registered_model_alias(challenger.name, alias, version)
    return promotion


def _compare(
    challenger: ResolvedModel, former: ResolvedModel | None
) -> tuple[dict[str, tuple[float, float]], str | None]:
    """Return both scores by name, and what speaks against the challenger."""
    if former is None:
        return {}, None
    ours, theirs = read_config(challenger.path), read_config(former.path)
    if ours["kind"] != theirs["kind"]:
        return {}, f"it is of the kind {ours['kind']}, {former.uri} of the kind {theirs['kind']}"
    if _split(ours) is None or _split(ours) != _split(theirs):
        return {}, (
            f"it was not scored on the same held-out cells as {former.uri}; fine-tune both on the "
            "same split, or use --force"
        )
    names = SCORES[ours["kind"]]
    try:
        scores = {name: (_score(ours, name), _score(theirs, name)) for name in names}
    except (KeyError, TypeError, ValueError):
        return {}, f"one of the two has no {' and '.join(names)}; use --force to do without"
    for name, (own, champion) in scores.items():
        if own > champion:
            break
        if not own >= champion:  # a score that is no number is worse, too
            return scores, (
                f"its {name.replace('_', ' ')} is {own:.4f}, that of {former.uri} is "
                f"{champion:.4f} on the same cells; use --force to promote it all the same"
            )
    return scores, None


def _split(config: Mapping[str, Any]) -> object:
    """What two models must share for their scores to be compared; None if it was not recorded."""
    evaluation = config.get("evaluation")
    if isinstance(evaluation, Mapping) and evaluation.get("split"):
        return evaluation["split"]
    if config["kind"] != "encoder":
        return None
    provenance = config.get("provenance") or {}
    parts = [provenance.get("store_id"), provenance.get("seed"), config.get("panel_digest")]
    return None if None in parts else [*parts, config.get("binning")]


def _score(config: Mapping[str, Any], name: str) -> float:
    return float(config["metrics"][name])


def _record(promotion: Promotion) -> dict[str, str]:
    compared = "; ".join(
        f"{name} {own:.6f} against {champion:.6f}"
        for name, (own, champion) in promotion.scores.items()
    )
    return {
        "alias": promotion.alias,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "instead_of": promotion.former or "none",
        "scores": compared or "not compared",
        "forced": promotion.objection or "no",
    }
