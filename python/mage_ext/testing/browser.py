"""Pages opened in headless Chromium: the document after its scripts ran, and what its console said.

Test: pytest tests/python/test_inspection.py
"""

import html.parser
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

_VOID = {"meta", "input", "img", "br", "hr", "link"}


def chromium() -> str | None:
    """The program, None where there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@dataclass
class Element:
    """An element of a page. Fields: tag, attributes, text (its own and that of what it holds)."""

    tag: str
    attributes: dict[str, str]
    text: str = ""

    @property
    def classes(self) -> set[str]:
        return set(self.attributes.get("class", "").split())


@dataclass
class Opened:
    """A page after its scripts ran. Fields: elements in document order; console: one line per message or error."""

    elements: list[Element] = field(default_factory=list)
    console: list[str] = field(default_factory=list)

    def find(self, tag: str, class_name: str | None = None) -> list[Element]:
        """Elements of a tag, of a class if one is given."""
        return [e for e in self.elements if e.tag == tag and (class_name is None or class_name in e.classes)]

    def by_id(self, name: str) -> Element:
        """The element with an id. Raises KeyError if there is none."""
        for element in self.elements:
            if element.attributes.get("id") == name:
                return element
        raise KeyError(name)


class _Parser(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.elements: list[Element] = []
        self._open: list[Element] = []

    def handle_starttag(self, tag, attributes):
        self.elements.append(Element(tag, {name: value or "" for name, value in attributes}))
        if tag not in _VOID:
            self._open.append(self.elements[-1])

    def handle_startendtag(self, tag, attributes):
        self.elements.append(Element(tag, {name: value or "" for name, value in attributes}))

    def handle_endtag(self, tag):
        while self._open and self._open.pop().tag != tag:
            pass

    def handle_data(self, data):
        for element in self._open:
            element.text += data


def parse(text: str) -> list[Element]:
    """The elements of a document, in order."""
    parser = _Parser()
    parser.feed(text)
    parser.close()
    return parser.elements


def open_page(path: Path, profile: Path, address: str = "") -> Opened:
    """Opens a local page and waits until its scripts are done.

    A request that the page's policy forbids, an uncaught error and whatever a script logs are in `console`.

    Args:
        path: of the page. profile: an empty folder for the browser. address: behind the path, such as "#step=2".
    Raises:
        RuntimeError: the browser failed, with the end of what it said.
    """
    command = [chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [
        "--enable-logging=stderr",
        f"--user-data-dir={profile}",
        "--virtual-time-budget=10000",
        "--dump-dom",
        path.as_uri() + address,
    ]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False, timeout=120)
    if result.returncode or not result.stdout.strip():
        raise RuntimeError(f"chromium: status {result.returncode}: {result.stderr[-2000:]}")
    console = re.findall(r"^\[[^\]]*\bCONSOLE[^\]]*\] (.*)$", result.stderr, re.MULTILINE)
    return Opened(parse(result.stdout), console)
