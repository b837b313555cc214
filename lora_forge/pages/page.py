"""A page of ours: the shell around it, its scripts, and how it is written.

Whatever is put on a page may come from anybody's file. Jinja escapes it, and a content security policy allows no
script but the two that are named by their digests, and nothing from any other place.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from lora_forge.output import Place, appearing

_TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:
    """A page from one of the templates, each of which fills in `shell.html`.

    values: what the template asks for; what it shows as charts comes from `figures`.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    scripts = [_plotly(), (_TEMPLATES / "page.js").read_text(encoding="utf-8")]
    return environment.get_template(template).render(
        css=(_TEMPLATES / "page.css").read_text(encoding="utf-8"),
        scripts=scripts,
        digests=[_digest(script) for script in scripts],
        **values,
    )


def write_page(path: Place, page: str, *, overwrite: bool) -> None:
    """Write a page, which appears whole or not at all. Raises OutputError as `appearing` does."""
    with appearing(path, overwrite=overwrite) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace", newline="\n")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    script: str = get_plotlyjs()
    return script.replace("\r\n", "\n").replace("</script", "<\\/script")


def _digest(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
