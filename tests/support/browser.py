"""Opens a page in headless Chromium, without a network, and reports what a reader would see."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from html import unescape
from pathlib import Path

__all__ = ["BROWSER", "Seen", "look"]

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
"""The path of a Chromium, ``None`` if the machine has none."""

_WATCH = """<script>
window.failures = [];
addEventListener("error", event => failures.push(event.message || "cannot load " + event.target.outerHTML), true);
addEventListener("unhandledrejection", event => failures.push(String(event.reason)));
</script>"""

_LOOK = """<script>
function canvases(root) {
  let count = root.querySelectorAll("canvas").length > 0 ? 1 : 0;
  for (const each of root.querySelectorAll("*")) if (each.shadowRoot) count += canvases(each.shadowRoot);
  return count;
}
addEventListener("load", () => setTimeout(() => {
  const wide = [...document.querySelectorAll("body *")].filter(each =>
    each.getBoundingClientRect().right > innerWidth + 1 && !each.closest(".wide")).map(each => each.outerHTML);
  const seen = {
    charts: [...document.querySelectorAll(".chart")].filter(each => [...each.children].some(
      child => child.shadowRoot ? canvases(child.shadowRoot) : canvases(child))).length,
    width: document.documentElement.scrollWidth,
    window: innerWidth,
    wide: wide.map(each => each.slice(0, 200)),
    paper: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
    loaded: performance.getEntriesByType("resource").map(each => each.name).filter(each => !each.startsWith("data:")),
    failures: failures,
  };
  parent.postMessage(JSON.stringify(seen), "*");
}, 1500));
</script>"""

# A window of Chromium has at least 500 pixels, so the page is in a frame, which may be narrower.
_FRAME = """<!doctype html><html><head><meta name="color-scheme" content="light dark"></head><body>
<iframe src="page.html" style="width: {width}px; height: 1200px; border: 0"></iframe>
<script>addEventListener("message", event => document.body.setAttribute("data-seen", event.data))</script>
</body></html>"""


@dataclass(frozen=True)
class Seen:
    """What a browser has shown.

    Attributes:
        charts: The number of charts that were drawn.
        width: The width of the whole page in pixels.
        window: The width of the window.
        wide: The elements that reach beyond the window.
        paper: The colour of the background.
        ink: The colour of texts.
        loaded: The addresses that the page has loaded beside itself.
        failures: The errors of scripts, and elements that could not be loaded.
    """

    charts: int
    width: int
    window: int
    wide: list[str]
    paper: str
    ink: str
    loaded: list[str]
    failures: list[str]


def look(page: Path, *, width: int = 1280, dark: bool = False, picture: Path | None = None) -> Seen:
    """Open a page, and return what is to be seen.

    Args:
        page: The file.
        width: The width of the window in pixels.
        dark: Whether the reader prefers dark colours.
        picture: A file for a picture of the page.
    """
    assert BROWSER is not None
    with tempfile.TemporaryDirectory() as scratch:
        watched = Path(scratch, "page.html")
        text = page.read_text("utf-8").replace("<head>", f"<head>{_WATCH}", 1)
        watched.write_text(text.replace("</body></html>", f"{_LOOK}</body></html>"), "utf-8")
        frame = Path(scratch, "frame.html")
        frame.write_text(_FRAME.format(width=width), "utf-8")
        done = subprocess.run(
            [
                BROWSER,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--host-resolver-rules=MAP * ~NOTFOUND",
                f"--user-data-dir={scratch}/profile",
                f"--window-size={width},{1300 if picture is None else 4000}",
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                "--virtual-time-budget=6000",
                *(["--dump-dom", frame.as_uri()] if picture is None else [f"--screenshot={picture}", watched.as_uri()]),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    if picture is not None:
        return Seen(0, 0, 0, [], "", "", [], [])
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, f"the page did not finish: {done.stderr[-2000:]}"
    return Seen(**json.loads(unescape(found[1])))
