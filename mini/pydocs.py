"""The default corpus: the English documentation that comes with every Python, about two megabytes.

It is read from the standard library's source files, of which nothing is imported. So it is there without a
network, and the same in every process. Another version of Python has another text.
"""

import ast
import hashlib
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from mini.config import UserError

SKIPPED = {"encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tests", "turtledemo"}
LONG = 60  # characters from which a paragraph that stands in two places is a copy and no coincidence


def documents(library: Path | None = None) -> list[str]:
    """Returns the texts: one per module with its docstrings, one per topic of Python's help.

    They are ordered by a hash of their names, so the last ones are like the others. No long paragraph stands
    in two of them: what is held out, in whole documents, is not seen in training.

    library: a folder with the standard library's sources; this Python's, if none is given.
    Raises UserError where there are no sources.
    """
    library = library or standard_library()
    texts: dict[str, str] = {}
    seen: set[str] = set()
    topics = read_topics(library)
    # Many a topic is also a section of a longer one. The longest come first; their sections are left out.
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        long = long_paragraphs(topics[name])
        if len(long & seen) <= len(long) / 2:
            texts[f"topic {name}"] = without_copies(topics[name], seen)
    for path in source_files(library):
        name = ".".join(path.relative_to(library).with_suffix("").parts).removesuffix(".__init__")
        entries = [(heading, without_copies(text, seen)) for heading, text in read_docstrings(path, name)]
        texts[f"module {name}"] = "\n\n".join(f"{heading}\n\n{text}" for heading, text in entries if text)
    names = sorted((name for name in texts if texts[name]), key=lambda n: hashlib.sha256(n.encode()).digest())
    if not names:
        raise UserError(f"python-docs: this Python came without sources ({library}); give --data a text file")
    return [texts[name] + "\n" for name in names]


def fingerprint() -> str:
    """Returns a SHA-256 of this Python's version and the files that `documents` reads."""
    library = standard_library()
    digest = hashlib.sha256(sys.version.encode())
    for path in [topics_file(library), *source_files(library)]:
        if path.is_file():
            digest.update(f"\n{path.relative_to(library)} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def topics_file(library: Path) -> Path:
    return library / "pydoc_data" / "topics.py"


def source_files(library: Path) -> list[Path]:
    """The library's modules in the order of their names; distributions may have left some of them out."""
    paths = []
    for folder, subfolders, files in os.walk(library):
        # Only what can be imported: site-packages may be huge. What is taken out here is not entered.
        subfolders[:] = [name for name in subfolders if name.isidentifier() and name not in SKIPPED]
        paths += [Path(folder, name) for name in files if name.endswith(".py") and name[:-3].isidentifier()]
    return sorted(paths)


def parse(path: Path) -> ast.Module:
    """Returns a file's syntax tree, an empty one where it has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in the library's own strings
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ast.Module([], [])


def read_topics(library: Path) -> dict[str, str]:
    """The texts behind help("topics"); in their file stands `topics = {"name": "text", ...}`."""
    for node in parse(topics_file(library)).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "topics":
            return ast.literal_eval(node.value)
    return {}


def read_docstrings(path: Path, name: str) -> Iterator[tuple[str, str]]:
    """Yields (heading, docstring) of a module and all that is defined in it, in the order of the file."""
    module = parse(path)
    yield name, ast.get_docstring(module) or ""
    yield from definitions(module, name)


def definitions(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            if docstring := ast.get_docstring(child):
                yield f"{name}.{child.name}({ast.unparse(child.args)})", docstring
        elif isinstance(child, ast.ClassDef):
            bases = f"({', '.join(map(ast.unparse, child.bases))})" if child.bases else ""
            yield f"class {name}.{child.name}{bases}", ast.get_docstring(child) or ""
            yield from definitions(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt | ast.ExceptHandler):  # definitions under an `if` or a `try`
            yield from definitions(child, name)


def one_line(paragraph: str) -> str:
    return " ".join(paragraph.split())


def long_paragraphs(text: str) -> set[str]:
    return {one_line(paragraph) for paragraph in text.split("\n\n") if len(one_line(paragraph)) >= LONG}


def without_copies(text: str, seen: set[str]) -> str:
    """Returns a text without the long paragraphs that are in `seen`, and adds its own to them."""
    long = long_paragraphs(text)
    if long and long <= seen:  # what is left are the headings and examples of a text that stands elsewhere
        return ""
    kept = [paragraph for paragraph in text.split("\n\n") if one_line(paragraph) not in seen]
    seen |= long
    return "\n\n".join(kept).strip("\n")
