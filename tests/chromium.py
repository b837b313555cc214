"""A page as headless Chromium shows it. Debian's `chromium` is looked for, then the names others give it."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="there is no chromium here")
_OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars")

_SAID = """
addEventListener("load", () => setTimeout(() => {
  const page = document.documentElement.cloneNode(true);
  page.querySelectorAll("script, style").forEach((one) => one.remove());
  parent.postMessage(page.outerHTML, "*");
}, 900));
"""
_HEARD = """
addEventListener("message", (event) => {
  document.querySelector("pre").textContent = event.data;
  document.querySelector("iframe").remove();
});
"""


def opened(page: Path, *, width: int = 1300, dark: bool = False, script: str = "") -> tuple[str, list[str]]:
    """The document after a while, as HTML without scripts and styles, and what was said on the console.

    The page is in a frame of its own, since no window of Chromium's is narrower than 500 pixels; what is returned is
    the page's. script: run in a copy of the page after its own.
    """
    assert PROGRAM is not None
    copy = page.with_name(f"{page.stem}-copy.html")
    text = page.read_text(encoding="utf-8")
    copy.write_text(_with_scripts(text, [script, _SAID] if script else [_SAID]), encoding="utf-8")
    frame = page.with_name(f"{page.stem}-frame.html")
    inner = f"<iframe src='{copy.name}' style='width: {width}px; height: 900px; border: 0'></iframe>"
    frame.write_text(f"{inner}<pre></pre><script>{_HEARD}</script>", encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [PROGRAM, *_OPTIONS, scheme, "--enable-logging=stderr", "--virtual-time-budget=8000", "--dump-dom"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    done = subprocess.run(
        [*command, profile, frame.as_uri()], capture_output=True, text=True, timeout=120, errors="replace"
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    match = re.search(r"<pre>(.*)</pre>", done.stdout, re.DOTALL)
    assert match, done.stderr
    return _unescaped(match.group(1)), console


def _with_scripts(page: str, scripts: list[str]) -> str:
    """The page with scripts at its end that its policy allows too."""
    digests = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in scripts]
    allowed = "script-src" + "".join(f" 'sha256-{digest}'" for digest in digests)
    head, body, tail = page.partition("script-src")[0], page.partition("script-src")[2], "</body>"
    before, _, after = body.rpartition(tail)
    added = "".join(f"<script>{one}</script>" for one in scripts)
    return f"{head}{allowed}{before}{added}{tail}{after}"


def _unescaped(text: str) -> str:
    for code, character in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        text = text.replace(code, character)
    return text
