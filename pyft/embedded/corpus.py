"""Text for the embedded model: the sources of Python's documentation, cleaned and split.

Cleaning is light: navigation and bookkeeping directives go, headings become `# Title`, roles and
literals become code spans. Code, prose and signatures stay as they are. The split is by whole
document, by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

LEFT_OUT = ("about", "bugs", "contents", "copyright", "license", "includes/", "whatsnew/changelog")
HELD_OUT = (
    "extending/embedding",
    "faq/design",
    "faq/general",
    "howto/pyporting",
    "howto/sockets",
    "howto/unicode",
    "tutorial/appetite",
    "tutorial/floatingpoint",
    "tutorial/interactive",
    "whatsnew/2.0",
    "whatsnew/3.9",
)
"""The documents the general text comes from; the model is never trained on them."""

_DROPPED = re.compile(
    r"^\s*\.\. (?:index|toctree|sectionauthor|moduleauthor|codeauthor|highlight|raw|image|figure"
    r"|currentmodule|contents|testsetup|testcleanup|rubric|include|productionlist"
    r"|table-of-contents|XXX|_[^:]+:)"
)
_COMMENT = re.compile(r"^\s*\.\.(?:\s+(?![\w:.+-]+::|\[|\|).*)?$")
_DIRECTIVE = re.compile(
    r"^(\s*)\.\. (?:doctest|code-block|sourcecode|testcode|testoutput|literalinclude)::.*$"
)
_ROLE = re.compile(r"(?<![\w`]):[a-zA-Z][\w:+-]*:`([^`]+)`")
_TARGET = re.compile(r"^(.*\S)\s*<[^<>]+>$", re.DOTALL)
_LINK = re.compile(r"`([^`<>]+?)\s*<[^<>`]+>`__?")
_ADORNMENT = re.compile(r"^([=\-~^\"'*+#.:`_])\1{2,}\s*$")


@dataclass(frozen=True)
class Document:
    """One cleaned document; `name` is its path below the sources, without the suffixes."""

    name: str
    text: str


def _role(match: re.Match[str]) -> str:
    body = match.group(1)
    titled = _TARGET.match(body)
    if titled:
        return titled.group(1)
    if body.startswith("~"):
        return f"`{body[1:].rsplit('.', 1)[-1]}`"
    return f"`{body.lstrip('!')}`"


def _without_blocks(lines: list[str]) -> list[str]:
    """The lines without comments and bookkeeping directives, each with its indented body."""
    kept: list[str] = []
    indent: int | None = None
    for line in lines:
        depth = len(line) - len(line.lstrip())
        if indent is not None:
            if not line.strip() or depth > indent:
                continue
            indent = None
        if _DROPPED.match(line) or _COMMENT.match(line):
            indent = depth
            continue
        if _DIRECTIVE.match(line):
            continue
        kept.append(line)
    return kept


def _with_headings(lines: list[str]) -> list[str]:
    """Underlined (and overlined) titles as `# Title`."""
    kept: list[str] = []
    for line in lines:
        if not _ADORNMENT.match(line):
            kept.append(line)
        elif kept and kept[-1].strip() and not kept[-1].startswith((" ", "#")):
            kept[-1] = f"# {kept[-1].strip()}"
    return kept


def clean(source: str) -> str:
    """The source with navigation removed and markup lightened; code and indentation unchanged."""
    lines = [line.rstrip() for line in source.expandtabs(8).splitlines()]
    text = "\n".join(_with_headings(_without_blocks(lines)))
    text = _LINK.sub(r"\1", _ROLE.sub(_role, text)).replace("``", "`")
    text = re.sub(r"[ \t]*::$", ":", text, flags=re.MULTILINE).replace("\u2581", "_")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def read_documents(docs: Path) -> tuple[list[Document], list[Document]]:
    """All documents below `docs` (`*.rst.txt`), cleaned: (training, held out), ordered by name.

    Raises FileNotFoundError when there is none.
    """
    train: list[Document] = []
    kept_aside: list[Document] = []
    for path in sorted(docs.rglob("*.rst.txt")):
        name = path.relative_to(docs).as_posix().removesuffix(".rst.txt")
        if name.startswith(LEFT_OUT):
            continue
        document = Document(name, clean(path.read_text(encoding="utf-8")))
        (kept_aside if name in HELD_OUT else train).append(document)
    if not train:
        raise FileNotFoundError(
            f"no *.rst.txt below {docs}: give the _sources directory of python3.11-doc"
        )
    return train, kept_aside


def _is_prose(paragraph: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    return (
        paragraph[0].isalpha()
        and "\n " not in paragraph
        and not paragraph.endswith(":")
        and letters > 0.85 * len(paragraph)
        and len(paragraph) > 80
    )


def passages(document: Document, shortest: int = 500, longest: int = 1500) -> list[str]:
    """Runs of prose paragraphs joined, each of `shortest` to `longest` characters."""
    found: list[str] = []
    current = ""
    for paragraph in [*document.text.split("\n\n"), ""]:
        paragraph = paragraph.strip("\n")
        prose = bool(paragraph) and _is_prose(paragraph)
        joined = f"{current}\n\n{paragraph}" if current else paragraph
        if prose and len(joined) <= longest:
            current = joined
            continue
        if shortest <= len(current) <= longest:
            found.append(current)
        current = paragraph if prose and len(paragraph) <= longest else ""
    return found


def general_text(
    documents: list[Document], training: list[Document], count: int = 128
) -> list[dict[str, str]]:
    """`count` passages spread evenly over the held-out documents, as rows `{"text", "source"}`.

    A passage with a paragraph that a training document has too is left out.
    """
    trained_on = {paragraph for document in training for paragraph in document.text.split("\n\n")}
    rows = [
        {"text": text, "source": document.name}
        for document in documents
        for text in passages(document)
        if trained_on.isdisjoint(text.split("\n\n"))
    ]
    if len(rows) <= count:
        return rows
    return [rows[index * len(rows) // count] for index in range(count)]
