"""The default corpus: the English documentation that comes with every Python, about two megabytes.

It is read from the standard library's source files, of which nothing is imported: there without a network, and the
same in every process. Another version of Python has another text. `questions` makes questions and answers of it,
`summaries` prompts and answers.
"""

import ast
import functools
import hashlib
import os
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mini.errors import UserError

SKIPPED = {"encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tests", "turtledemo"}
TOPICS = "pydoc_data/topics.py"
LONG = 60  # characters from which a paragraph that stands in two places is a copy and no coincidence


def documents(library: Path | None = None) -> list[str]:
    """The texts: one per module with its docstrings, one per topic of Python's help.

    They are ordered by a hash of their names, so the last ones are like the others. No long paragraph stands
    in two of them: what is held out, in whole documents, is not seen in training.
    library: the folder of a standard library's sources; this Python's by default. Raises UserError without sources.
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
    for name, path in modules(library).items():
        module = parse(path)
        entries = [(name, ast.get_docstring(module) or ""), *definitions(module, name)]
        entries = [(heading, without_copies(text, seen)) for heading, text in entries]
        texts[f"module {name}"] = "\n\n".join(f"{heading}\n\n{text}" for heading, text in entries if text)
    names = sorted((name for name in texts if texts[name]), key=name_hash)
    if not names:
        raise UserError(f"python-docs: this Python came without sources ({library}); give --data a text file")
    return [texts[name] + "\n" for name in names]


def name_hash(name: str) -> bytes:
    """By it things are put in an order that has nothing to do with what they are."""
    return hashlib.sha256(name.encode()).digest()


def fingerprint() -> str:
    """A SHA-256 of this Python's version and the files that `documents` reads."""
    library = standard_library()
    digest = hashlib.sha256(sys.version.encode())
    for path in [library / TOPICS, *modules(library).values()]:
        if path.is_file():
            digest.update(f"\n{path.relative_to(library)} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def modules(library: Path) -> dict[str, Path]:
    """{name: file} of the library's modules, sorted by file; distributions may have left some of them out."""
    paths = []
    for folder, subfolders, files in os.walk(library):
        # Only what can be imported: site-packages may be huge. What is taken out here is not entered.
        subfolders[:] = [name for name in subfolders if name.isidentifier() and name not in SKIPPED]
        paths += [Path(folder, name) for name in files if name.endswith(".py") and name[:-3].isidentifier()]
    named = [(".".join(path.relative_to(library).with_suffix("").parts), path) for path in sorted(paths)]
    return {name.removesuffix(".__init__"): path for name, path in named}


def parse(path: Path) -> ast.Module:
    """A file's syntax tree, an empty one where it has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in the library's own strings
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ast.Module([], [])


def read_topics(library: Path) -> dict[str, str]:
    """The texts behind help("topics"); in their file stands `topics = {"name": "text", ...}`."""
    for node in parse(library / TOPICS).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "topics":
            return ast.literal_eval(node.value)
    return {}


def definitions(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(heading, docstring) of all that is defined in a module or class of this name, in the order of the file."""
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
    """A text without the long paragraphs that are in `seen`, and adds its own to them."""
    long = long_paragraphs(text)
    if long and long <= seen:  # what is left are the headings and examples of a text that stands elsewhere
        return ""
    kept = [paragraph for paragraph in text.split("\n\n") if one_line(paragraph) not in seen]
    seen |= long
    return "\n\n".join(kept).strip("\n")


# ---------------------------------------------------------------- questions
def questions(split: str, library: Path | None = None) -> dict:
    """A data set in the form of SQuAD v1.1 (Rajpurkar et al. 2016): which name has this description?

    A context lists six or seven neighbouring functions, methods and classes as `name: description`, in an order
    drawn by their hashes. A question is one of the descriptions, its id the full name, its answer the name.
    split: "train", or "valid": a tenth or more of the questions, in whole top-level modules, drawn by their hashes.
    """
    chosen = part(descriptions(library or standard_library()), split)
    n = max(1, len(chosen) // 6)
    paragraphs = []
    for i in range(n):
        group = chosen[i * len(chosen) // n : (i + 1) * len(chosen) // n]
        context, qas = "", []
        for full, name, description in sorted(group, key=lambda entry: name_hash(entry[0])):
            answer = {"text": name, "answer_start": len(context)}
            qas.append({"id": full, "question": description, "answers": [answer]})
            context += f"{name}: {description}\n"
        paragraphs.append({"context": context, "qas": qas})
    return {"version": "1.1", "data": [{"title": f"python-docs {split}", "paragraphs": paragraphs}]}


def part(entries: tuple[tuple[str, ...], ...], split: str) -> list[tuple[str, ...]]:
    """Of (full name, ..) those of a split: "valid" has the top-level modules that `questions` tells of."""
    sizes = Counter(entry[0].split(".")[0] for entry in entries)
    held_out: set[str] = set()
    for module in sorted(sizes, key=name_hash):
        if sum(sizes[name] for name in held_out) < len(entries) / 10:
            held_out.add(module)
    chosen = [entry for entry in entries if (entry[0].split(".")[0] in held_out) == (split == "valid")]
    if not chosen:
        raise UserError("python-docs: this Python came without sources; give --train and --valid files")
    return chosen


@functools.cache  # of files that do not change while a program runs; reading them takes seconds
def descriptions(library: Path) -> tuple[tuple[str, str, str], ...]:
    """(full name, name, first sentence of its docstring) of what is public, in the order of the sources.

    Only sentences of 4 to 25 words that do not tell the name, and each sentence once: so none stands for two names,
    and none of the validation's is in training.
    """
    found = {}
    for module, path in modules(library).items():
        for heading, docstring in definitions(parse(path), module):
            full = heading.removeprefix("class ").split("(")[0]
            name = full.split(".")[-1]
            sentence = re.split(r"(?<=[.!?]) (?=[A-Z])", one_line(docstring.split("\n\n")[0]))[0]
            plain = sentence.lower()
            public = not name.startswith("_") and sentence[:1].isalpha()
            if public and 4 <= len(sentence.split()) <= 25 and name.lower() not in plain:
                found.setdefault(plain, (full, name, sentence))
    return tuple(found.values())


# ---------------------------------------------------------------- summaries
def summaries(split: str, library: Path | None = None) -> list[tuple[str, str, str]]:
    """(full name, the body of a docstring, its first line) of what is defined in the library, split as `questions` is.

    The first line stands alone, as PEP 257 asks; bodies have 10 words or more, and no body and no line occurs twice.
    """
    return part(bodies(library or standard_library()), split)


@functools.cache
def bodies(library: Path) -> tuple[tuple[str, str, str], ...]:
    found, seen = [], set()
    for module, path in modules(library).items():
        for heading, docstring in definitions(parse(path), module):
            first, _, body = docstring.partition("\n\n")
            first, body = first.strip(), body.strip()
            new = not {first.lower(), body} & seen
            if new and "\n" not in first and len(first.split()) >= 3 and len(body.split()) >= 10:
                found.append((heading.removeprefix("class ").split("(")[0], body, first))
                seen |= {first.lower(), body}
    return tuple(found)
