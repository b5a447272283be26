"""One page about a run: self-contained, offline, safe to show whatever the record holds."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..errors import RunFolderError
from ..files import replace_file
from ..training.log import read_log
from . import compare_page, measure_page, train_page
from .fields import section
from .figures import DARK, LIGHT, line_style
from .formatting import printable

PAGES = {"compare": compare_page.contents, "measure": measure_page.contents, "train": train_page.contents}
SPACE = "\N{NO-BREAK SPACE}"


def write(folder: str | Path) -> Path:
    """Read ``record.json`` in a run folder and write ``report.html`` beside it, whole or not at all.

    Raises:
        RunFolderError: there is no readable record, or the page cannot be written; an earlier page stays as it was.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{folder} holds no record.json that can be read ({error}); give the folder that flatmin "
                             f"train, compare or measure wrote") from error
    if not isinstance(record, dict):
        raise RunFolderError(f"{folder / 'record.json'} is not the record of a run")
    record = {"log": read_log(folder), **record}
    target = folder / "report.html"
    text = page(record).encode("utf-8", "replace")
    try:
        replace_file(target, lambda temporary: temporary.write_bytes(text))
    except OSError as error:
        raise RunFolderError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def page(record: Mapping[str, Any]) -> str:
    """The whole HTML page of a record; parts whose data are missing are left out.

    That of a training run has its curves from ``record["log"]``, the rows of ``log.jsonl``.
    """
    kind = str(record.get("kind")) if record.get("kind") in PAGES else "compare"
    shown = PAGES[kind](record)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
                                     autoescape=True, finalize=_finalize, undefined=jinja2.StrictUndefined,
                                     trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    colors = [line_style(i).color for i in range(max(4, len(shown.get("methods", []))))]
    return environment.get_template(f"{kind}.html").render(
        shown, kind=kind, policy=Markup(policy(shown["surfaces"])), light=LIGHT, dark=DARK, colors=colors,
        created=str(record.get("created")),
        versions=" · ".join(f"{k} {v}" for k, v in section(record, "versions").items()))


def _finalize(value: Any) -> Any:
    """Text without control characters, and never broken inside a number with its spread or its unit."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    value = re.sub(r"(ρ) = (\d)", rf"\1{SPACE}={SPACE}\2", printable(value))
    return re.sub(r"(\d) %", rf"\1{SPACE}%", re.sub(r"(\d) ± (\d)", rf"\1{SPACE}±{SPACE}\2", value))


def policy(surfaces: Sequence[str]) -> str:
    """A page's content security policy: no request, styles inline, and the scripts of its surfaces by their hashes."""
    scripts = dict.fromkeys(s for text in surfaces for s in re.findall(r"<script>(.*?)</script>", text, re.S))
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = "".join(f" 'sha256-{h}'" for h in hashes)
    return "default-src 'none'; style-src 'unsafe-inline'" + (f"; script-src{allowed}" if allowed else "")
