"""Tables of labelled texts: .tsv and .csv with a header, .jsonl."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

from mini.errors import UserError


def read_rows(path: str | Path, columns: list[str], optional: tuple[str, ...] = ()) -> list[tuple[str, dict]]:
    """Rows of a .tsv or .csv file with a header or of a .jsonl file, as (place, {column: text}).

    place is 'file:line', for messages. Raises UserError for a missing file, column or value.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix not in (".tsv", ".csv", ".jsonl"):
        raise UserError(f"{path}: expected .tsv or .csv with a header, or .jsonl")
    try:
        text = path.read_bytes().decode("utf-8-sig")  # with or without a byte-order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start:,} is not UTF-8: convert the file") from None
    if path.suffix == ".jsonl":
        places = ((f"{path}:{n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
        rows = [(place, parse_json_row(line, place)) for place, line in places]
    else:
        rows = read_table(text, path, columns)
    for place, row in rows:
        for name in columns:
            if row.get(name) is None:
                raise UserError(f"{place}: no {name!r} (expected {', '.join(columns)})")
    if not rows:
        raise UserError(f"{path}: no rows")
    return [(place, {k: str(row[k]) for k in (*columns, *optional) if row.get(k) is not None}) for place, row in rows]


def text_columns(rows: list[tuple[str, dict]]) -> list[str]:
    """text, or text and text_b, whichever all of these rows have. Raises UserError where they differ."""
    pairs = "text_b" in rows[0][1]
    for place, row in rows:
        if ("text_b" in row) != pairs:
            raise UserError(f"{place}: {'no' if pairs else 'a'} 'text_b', unlike in {rows[0][0]}")
    return ["text", "text_b"] if pairs else ["text"]


def read_table(text: str, path: Path, columns: list[str]) -> list[tuple[str, dict]]:
    # A tab-separated file quotes nothing: a quotation mark in it is text.
    form = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if path.suffix == ".tsv" else {}
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), **form, strict=True)
    rows = []
    try:
        for name in columns:
            if name not in (reader.fieldnames or []):
                found = ", ".join(reader.fieldnames or ["nothing"])
                raise UserError(f"{path}:1: the header has no column {name!r} (it has {found[:80]})")
        for row in reader:
            if None in row:
                raise UserError(f"{path}:{reader.line_num}: more columns than the header has")
            rows.append((f"{path}:{reader.line_num}", row))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}") from None
    return rows


def parse_json_row(text: str, place: str, lists: bool = False) -> dict:
    """Its texts and numbers, and lists, if they are wanted."""
    try:
        row = json.loads(text)
        json.dumps(row, ensure_ascii=False).encode()  # JSON can spell half a character, "\ud83d"; UTF-8 cannot
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON, or not UTF-8 ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected an object {{...}}")
    kinds = (str, int, float, list) if lists else (str, int, float)
    return {name: value for name, value in row.items() if isinstance(value, kinds)}


def column_texts(path: str, columns: list[str], optional: tuple[str, ...] = ()) -> Iterator[str]:
    """All texts in these columns of a file."""
    for _, row in read_rows(path, columns, optional):
        yield from row.values()


def as_file(rows: list[dict], suffix: str) -> str:
    """Rows as read_rows reads them."""
    rows = [{name: row[name] for name in ("text", "text_b", "label") if name in row} for row in rows]
    if suffix == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    text = io.StringIO()
    form = dict(delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None) if suffix == ".tsv" else {}
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n", **form)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def rows_checksum(*examples: list) -> str:
    """Tells whether two runs learnt from the same encoded examples."""
    return hashlib.sha256(json.dumps(examples).encode()).hexdigest()
