"""A real browser: Debian's Chromium, without a window."""

import json
import os
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

WIDTHS = {"phone": 390, "desktop": 1280}

# Measured inside frames of the page, so that its media queries see the frame's width.
_PROBE = """
const luminance = rgb => { const part = rgb.map(v => { v /= 255;
  return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; });
  return .2126 * part[0] + .7152 * part[1] + .0722 * part[2]; };
const colour = text => text.match(/[\\d.]+/g).map(Number);
function measure(frame) {
  const page = frame.contentDocument, view = frame.contentWindow, low = [];
  const ground = at => { for (; at; at = at.parentElement) {
    const found = colour(view.getComputedStyle(at).backgroundColor);
    if (found.length < 4 || found[3] === 1) return found.slice(0, 3); } return [255, 255, 255]; };
  let texts = 0, lowest = 99;
  for (const at of page.body.querySelectorAll('*')) {
    if (![...at.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    texts += 1;
    const [a, b] = [luminance(colour(view.getComputedStyle(at).color).slice(0, 3)),
                    luminance(ground(at))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    lowest = Math.min(lowest, ratio);
    if (ratio < 4.5) low.push(at.tagName + ' ' + at.textContent.slice(0, 30));
  }
  const wide = [...page.images].filter(i => i.getBoundingClientRect().right > view.innerWidth + 1);
  return { texts, lowest, low, width: view.innerWidth, scroll: page.documentElement.scrollWidth,
    wide_images: wide.length, broken_images: [...page.images].filter(i => !i.naturalWidth).length,
    ground: colour(view.getComputedStyle(page.body).backgroundColor).slice(0, 3),
    focusable: [...page.querySelectorAll('a[href], [tabindex="0"]')].length };
}
window.onload = () => { const found = {};
  for (const frame of document.querySelectorAll('iframe')) found[frame.id] = measure(frame);
  document.getElementById('found').textContent = JSON.stringify(found); };
"""


def chromium() -> str:
    """Path of the browser; where SCBERT_REQUIRE_CHROMIUM is set, as in CI, it must be there."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        problem = "Chromium is missing: apt-get install chromium"
        if os.environ.get("SCBERT_REQUIRE_CHROMIUM"):
            pytest.fail(problem)
        pytest.skip(problem)
    return program


def measure_page(page: Path, folder: Path, dark: bool) -> dict[str, dict[str, Any]]:
    """Show a page at both widths and measure it: widths, contrast, images."""
    frames = "".join(
        f'<iframe id="{name}" style="width:{width}px;height:900px;border:0" '
        f'srcdoc="{escape(page.read_text(), quote=True)}"></iframe>'
        for name, width in WIDTHS.items()
    )
    probe = folder / f"probe_{'dark' if dark else 'light'}.html"
    probe.write_text(
        '<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f'<pre id="found"></pre>{frames}<script>{_PROBE}</script>'
    )
    text = _run(folder, dark, "--window-size=1900,1000", "--dump-dom", probe.as_uri())
    found = re.search(r'<pre id="found">(.*?)</pre>', text, re.DOTALL)
    assert found is not None
    assert found[1], text[:500]
    measured: dict[str, dict[str, Any]] = json.loads(unescape(found[1]))
    return measured


def screenshot(page: Path, target: Path, dark: bool, width: int, height: int) -> None:
    """Take a picture of the page."""
    size = f"--window-size={width},{height}"
    _run(target.parent, dark, size, f"--screenshot={target}", page.as_uri())


def _run(folder: Path, dark: bool, *options: str) -> str:
    done = subprocess.run(
        [
            chromium(),
            *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND"),
            f"--user-data-dir={folder / 'chromium'}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            *options,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout
