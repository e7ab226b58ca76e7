"""HTML pages in one file: no network, no other file, whatever the text in them is.

A page forbids itself everything that is not in it (Content-Security-Policy), so a mistake shows up as an error in the
browser's console instead of a request. Data for scripts are JSON in an element that is not executed.

Test: pytest tests/python/test_inspection.py tests/python/test_report.py
"""

import html
import json
import unicodedata
from pathlib import Path
from typing import Any

from mage_ext._files import write_text

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_STYLE = """
:root { --ink: #1c1c1c; --dim: #6a6a6a; --paper: #ffffff; --line: #d8d8d8; --blue: #1f77b4; --orange: #e07b00; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  padding: 0 1.2em 3em; max-width: 75em; }
h1 { font-size: 1.35em; margin: 0.8em 0 0.2em; } h2 { font-size: 1.1em; margin: 1.6em 0 0.3em; }
.dim { color: var(--dim); font-size: 0.9em; }
"""


def page(title: str, body: str, *, style: str = "", script: str = "", data: Any = None) -> str:
    """A whole HTML document.

    Args:
        title: plain text. body: HTML; whoever makes it escapes what it quotes. style: CSS, after the common rules.
        script: JavaScript that runs at the end; it may not hold "</script". data: what JSON can hold; the script finds
            it in the element with the id "data". None: no such element.
    Raises:
        ValueError: script or style would end its own element.
    """
    for name, text in (("script", script), ("style", style)):
        if "</" + name in text.lower():
            raise ValueError(f"page: {name} must not hold </{name}, which ends it")
    held = "" if data is None else f'<script type="application/json" id="data">{json_for_script(data)}</script>\n'
    run = f"<script>\n{script}</script>\n" if script else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style></head>\n<body>\n{body}\n{held}{run}</body></html>\n"
    )


def escape(value: object) -> str:
    """Text for elements and attributes: markup has no effect, control characters can be seen."""
    return html.escape(visible(str(value)))


def json_for_script(data: Any) -> str:
    """JSON in ASCII that no HTML parser can take for markup. Raises ValueError for NaN and infinities."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def visible(text: str) -> str:
    """The text with control characters that can be seen; the line breaks that stand for some of them stay, too.

    Controls become their pictures, a newline one and a newline. What is invisible or turns the direction of the text
    around it (Unicode categories Cf, Zl, Zp, Cs, Co, Cn) becomes its code point in brackets, but for the joiners that
    emoji and some scripts are written with.
    """
    return "".join(character if character.isprintable() else _visible(character) for character in text)


def _visible(character: str) -> str:
    code = ord(character)
    if character == "\n":
        return "\u21b5\n"
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if code in (0x200C, 0x200D) or unicodedata.category(character) == "Zs":
        return character
    return f"\u27e8U+{code:04X}\u27e9"


def write_page(path: str | Path, text: str) -> None:
    """Writes a page as UTF-8, whole or not at all."""
    write_text(path, text)
