"""The page of a run: read by a parser, and shown by a real browser."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from finetune.metrics import score
from finetune.page import report
from launchers import report as launcher
from tests.support.browser import chromium, measure_page

TYPES = ["alpha & co", "beta <b>", "a type with quite a long name that has to go somewhere"]


def _run_folder(folder: Path, num_cells: int = 60) -> Path:
    """What a fine-tuning leaves, with made-up numbers."""
    rng = np.random.default_rng(0)
    codes = np.arange(num_cells) % 3
    logits = rng.normal(0, 1, (num_cells, 3)) + 2 * np.eye(3)[codes]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels, truth = np.array(TYPES), np.array(TYPES)[codes]
    scores = score(list(truth), list(labels[probabilities.argmax(axis=1)]), TYPES)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(
        folder / "heldout.npz",
        truth=truth,
        labels=labels,
        probabilities=probabilities.astype(np.float32),
        embedding=rng.normal(0, 1, (num_cells, 5)).astype(np.float32),
        is_novel=rng.random(num_cells) < 0.1,
    )
    methods = [
        {"name": "scBERT", "accuracy": 0.9, "macro_f1": 0.8, "seconds": 3.25, "setting": ""},
        {"name": "majority", "accuracy": 0.3, "macro_f1": 0.1, "seconds": None, "setting": "x"},
    ]
    written = {"verdict": "Nobody <won>.", "ours": scores.as_json(), "methods": methods}
    written["metrics"] = {"calibration_error": 0.02, "calibration_error_uncalibrated": 0.1}
    (folder / "scores.json").write_text(json.dumps(written))
    (folder / "export").mkdir(exist_ok=True)
    export = {"provenance": {"pretrained": "models:/p/1", "cells_trained_on": 1234, "seed": 0}}
    (folder / "export" / "config.json").write_text(json.dumps(export))
    top = [
        {"cell_type": name, "rank": rank, "gene": f"G{code}{rank}", "specific": 3.0 / rank}
        for code, name in enumerate(TYPES)
        for rank in (1, 2)
    ]
    deletion = [
        {"removed": "logit", "drop": 0.4, "changed": 0.5, "p_value": 1e-6},
        {"removed": "random", "drop": 0.1, "changed": 0.05, "p_value": None},
    ]
    reasons = {"top_genes": {"logit": top}, "deletion": deletion, "genes_removed": 20}
    (folder / "reasons.json").write_text(json.dumps({**reasons, "sentence": "It hurts."}))
    return folder


class Page(HTMLParser):
    """Tags with their attributes, in order, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = _run_folder(tmp_path_factory.mktemp("page") / "my run")
    with pytest.MonkeyPatch.context() as patch:  # UMAP compiles for long, and is tested elsewhere
        patch.setattr("finetune.page.umap_embedding", lambda x, seed: x[:, :2])
        report(folder)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text())


def test_everything_is_told(page: Page, folder: Path) -> None:
    for words in ("Nobody <won>.", *TYPES, "models:/p/1", "1,234", "majority", "3.2", "G01, G02",
                  "It hurts.", "Expected calibration error 0.020, 0.100 before"):  # fmt: skip
        assert words in page.text
    names = {path.name for path in (folder / "figures").iterdir()}
    for name in ("methods", "confusion", "risk_coverage", "calibration", "umap", "top_genes"):
        assert {f"{name}.png", f"{name}.svg"} <= names


def test_it_needs_nothing_from_elsewhere(page: Page, folder: Path) -> None:
    text = (folder / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']?(https?:|//)|@import|url\(""", text)
    assert {str(image["src"]).split(":")[0] for image in page.all("img")} == {"data"}
    assert not page.all("script")


def test_its_structure_can_be_read_aloud(page: Page) -> None:
    assert page.all("html")[0]["lang"] == "en"
    counts = Counter(tag for tag, _ in page.tags)
    assert [counts[tag] for tag in ("header", "nav", "main", "footer", "h1", "title")] == [1] * 6
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert headings == [1] + [2] * (len(headings) - 1)
    assert counts["table"] == counts["caption"] == 4
    assert all(head.get("scope") in ("col", "row") for head in page.all("th"))
    assert all(len(image["alt"] or "") > 20 for image in page.all("img"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [str(link["href"]).removeprefix("#") for link in page.all("a")]
    assert set(targets) <= set(ids)
    regions = [part for part in page.all("div") if part.get("class") == "scroll"]
    assert all(part["tabindex"] == "0" and part["aria-label"] for part in regions)


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_it_at_any_width(folder: Path, tmp_path: Path, dark: bool) -> None:
    chromium()
    found = measure_page(folder / "report.html", tmp_path, dark)
    assert {name: part["width"] for name, part in found.items()} == {"phone": 390, "desktop": 1280}
    for part in found.values():
        assert part["texts"] > 50
        assert part["low"] == []
        assert 4.5 <= part["lowest"] < 22
        assert part["scroll"] <= part["width"]  # only tables scroll sideways, inside themselves
        assert (part["wide_images"], part["broken_images"]) == (0, 0)
        assert part["focusable"] > 10
        assert (sum(part["ground"]) < 200) == dark


def test_what_is_not_there_is_left_out(tmp_path: Path) -> None:
    folder = _run_folder(tmp_path / "run", num_cells=3)
    for name in ("heldout.npz", "reasons.json", "export/config.json"):
        (folder / name).unlink()
    page = Page(report(folder).read_text())
    assert [tag for tag, _ in page.tags].count("section") == 3
    assert "Cell types: run" in page.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("scores.json", None, "is not a finished fine-tuning", id="not finished"),
        pytest.param("scores.json", "{", "scores.json is damaged", id="torn scores"),
        pytest.param("scores.json", '{"verdict": 1}', "of another version", id="other scores"),
        pytest.param("heldout.npz", "PK", "heldout.npz is damaged", id="torn predictions"),
        pytest.param("reasons.json", "{}", "of another version", id="other reasons"),
    ],
)
def test_other_folders_are_refused(
    name: str,
    content: str | None,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = _run_folder(tmp_path / "run", num_cells=3)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    assert launcher.main([str(folder)]) == 2
    assert message in capsys.readouterr().err
    assert not list(folder.glob("report.html*"))


def test_launcher_says_where_the_page_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _run_folder(tmp_path / "run", num_cells=3)
    assert launcher.main([str(folder)]) == 0
    assert capsys.readouterr().out.strip().endswith("run/report.html")
    assert launcher.main([str(tmp_path / "none")]) == 2
    assert "no run folder" in capsys.readouterr().err
