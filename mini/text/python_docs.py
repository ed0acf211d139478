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

import numpy as np

from mini.errors import UserError

SKIPPED = {"encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tests", "turtledemo"}
TOPICS = "pydoc_data/topics.py"
NO_SOURCES = "python-docs: this Python came without sources; give --train and --valid files"
LONG = 60  # characters from which a paragraph that stands in two places is a copy and no coincidence


def documents(library: Path | None = None) -> list[str]:
    """The texts: one per module with its docstrings, one per topic of Python's help.

    They are ordered by a hash of their names, so the last ones are like the others. No long paragraph stands
    in two of them: what is held out, in whole documents, is not seen in training.
    library: the folder of a standard library's sources; this Python's by default. Raises UserError without sources.
    """
    return [*named_documents(library or standard_library()).values()]


def named_documents(library: Path) -> dict[str, str]:
    """The same by name, "topic .." and "module ..", in that order."""
    texts: dict[str, str] = {}
    seen: set[str] = set()
    topics = read_topics(library)
    # Many a topic is also a section of a longer one. The longest come first; their sections are left out.
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        long = long_paragraphs(topics[name])
        if len(long & seen) <= len(long) / 2:
            texts[f"topic {name}"] = without_copies(topics[name], seen)
    for name, docstring, found in docstrings(library):
        entries = [(name, docstring), *found]
        entries = [(heading, without_copies(text, seen)) for heading, text in entries]
        texts[f"module {name}"] = "\n\n".join(f"{heading}\n\n{text}" for heading, text in entries if text)
    names = sorted((name for name in texts if texts[name]), key=name_hash)
    if not names:
        raise UserError(f"python-docs: this Python came without sources ({library}); give --data a text file")
    return {name: texts[name] + "\n" for name in names}


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


@functools.cache  # of files that do not change while a program runs; reading them takes seconds
def docstrings(library: Path) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(name, docstring, definitions) of each module, in the order of the files."""
    parsed = ((name, parse(path)) for name, path in modules(library).items())
    return [(name, ast.get_docstring(tree) or "", [*definitions(tree, name)]) for name, tree in parsed]


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
    described = descriptions(library or standard_library())
    sizes = Counter(full.split(".")[0] for full, _, _ in described)
    held_out: set[str] = set()
    for module in sorted(sizes, key=name_hash):
        if sum(sizes[name] for name in held_out) < len(described) / 10:
            held_out.add(module)
    chosen = [entry for entry in described if (entry[0].split(".")[0] in held_out) == (split == "valid")]
    if not chosen:
        raise UserError(NO_SOURCES)
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


def descriptions(library: Path) -> list[tuple[str, str, str]]:
    """(full name, name, first sentence of its docstring) of what is public, in the order of the sources.

    Only sentences of 4 to 25 words that do not tell the name, and each sentence once: so none stands for two names,
    and none of the validation's is in training.
    """
    found = {}
    for _, _, entries in docstrings(library):
        for heading, docstring in entries:
            full = heading.removeprefix("class ").split("(")[0]
            name = full.split(".")[-1]
            sentence = re.split(r"(?<=[.!?]) (?=[A-Z])", one_line(docstring.split("\n\n")[0]))[0]
            plain = sentence.lower()
            public = not name.startswith("_") and sentence[:1].isalpha()
            if public and 4 <= len(sentence.split()) <= 25 and name.lower() not in plain:
                found.setdefault(plain, (full, name, sentence))
    return [*found.values()]


# ---------------------------------------------------------------- summaries
def summaries(split: str, library: Path | None = None) -> list[tuple[str, str, str]]:
    """(full name, the body of a docstring, its first line) of what is defined in the library.

    The first line stands alone, as PEP 257 asks; bodies have 10 words or more, and no body and no line occurs twice.
    split: "train", or "valid": the modules in the last tenth of `documents`, which pretraining holds out as well.
    """
    library = library or standard_library()
    texts = named_documents(library)
    ends = np.cumsum([len(text.encode()) for text in texts.values()])
    first = 1 + int(np.abs(ends[:-1] - 0.9 * ends[-1]).argmin())  # the nearest border, as corpus.choose_cut has it
    held_out = {name.removeprefix("module ") for name in [*texts][first:]}
    found, seen = [], set()
    for module, _, entries in docstrings(library):
        for heading, docstring in entries:
            line, _, body = docstring.partition("\n\n")
            line, body = line.strip(), body.strip()
            new = not {line.lower(), body} & seen
            if new and "\n" not in line and len(line.split()) >= 3 and len(body.split()) >= 10:
                seen |= {line.lower(), body}
                if (module in held_out) == (split == "valid"):
                    found.append((heading.removeprefix("class ").split("(")[0], body, line))
    if not found:
        raise UserError(NO_SOURCES)
    return found
