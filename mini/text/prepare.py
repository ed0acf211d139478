"""The corpus of --data as a folder of tokens, and the tokenizer that makes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mini.errors import UserError
from mini.flags import Checked, option
from mini.text import corpus, tokens
from mini.text.fetch import cache_folder
from mini.text.tokenizer import Tokenizer, load_tokenizer, make_tokenizer
from mini.text.tokens import TokenFolder

BPE_BYTES = 10_000_000  # of text, evenly spread over the corpus, are what a BPE is trained on


@dataclass
class DataConfig(Checked):
    """Where text comes from and how it becomes tokens."""

    data: str = option("python-docs", "text, .jsonl, .gz of either, a folder, a token folder, a known corpus")
    train: str | None = option(None, "training file of the tasks that fine-tune")
    valid: str | None = option(None, "validation file; without one, the end of --data is held out")
    valid_fraction: float = option(0.1, "share of --data held out for validation", low=1e-6, high=0.999999)
    separator: str | None = option(
        None, "what ends a document in a text file, such as \\n\\n; without it a file is one"
    )
    errors: str = option("strict", "bytes that are not UTF-8: refuse, or replace", ("strict", "replace"))
    tokenizer: str = option("bpe", "bpe (train one), bytes, gpt2, a .tiktoken file, a WordPiece vocab.txt, or a run")


def init_tokenizer(init: str, spec: str | None, special: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer of a run to start from. Published weights may come without one: then spec names it."""
    try:
        own = load_tokenizer(init)
    except UserError:
        if spec in (None, "bpe"):
            raise
        return make_tokenizer(spec, list, 0, special)
    if spec and (spec == "bpe" or make_tokenizer(spec, list, 0, special).fingerprint != own.fingerprint):
        raise UserError(f"--tokenizer {spec}: {init} brings a tokenizer of its own, on which its weights depend")
    return own


def prepare_tokens(
    config: DataConfig,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    given: set[str] = frozenset(),
    special: Sequence[str] = (),
) -> tuple[TokenFolder, Tokenizer]:
    """The corpus of --data as tokens: opened if it is a token folder, taken from the cache, or made now.

    tokenizer: that of the run to start from, if any. given: flags of the command line, of which a token folder
    refuses those that come too late for it. special: tokens that the model needs beside text.
    """
    if tokens.is_token_folder(config.data):
        if late := given & {"tokenizer", "vocab_size", "valid", "valid_fraction", "separator", "errors"}:
            raise UserError(f"--{min(late)}: {config.data} is made of tokens already; make it anew with that flag")
        made_with = load_tokenizer(config.data).with_special(special)
        if tokenizer and tokenizer.fingerprint != made_with.fingerprint:
            raise UserError(f"{config.data} was made with another tokenizer than the run of --init has")
        return tokens.open_tokens(config.data), made_with
    if not tokenizer and config.tokenizer != "bpe":
        tokenizer = make_tokenizer(config.tokenizer, list, vocab_size, special)
    text = corpus.fingerprint(config.data, config.valid, config.valid_fraction, config.separator, config.errors)
    trained = f"bpe{vocab_size}" + f"-{len(special)}" * bool(special)
    name = f"{tokenizer.kind}-{tokenizer.fingerprint[:12]}" if tokenizer else trained
    path = cache_folder() / "tokens" / f"{text[:24]}-{name}"
    if not tokens.is_token_folder(path):
        write_token_folder(config, vocab_size, tokenizer, path, special=special)
    return tokens.open_tokens(path), load_tokenizer(path)


def write_token_folder(
    config: DataConfig,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    out: Path,
    workers: int | None = None,
    special: Sequence[str] = (),
) -> TokenFolder:
    """Reads the corpus of --data and writes it as a token folder; trains or opens the tokenizer if none is given."""
    split = config.valid, config.valid_fraction, config.separator, config.errors
    train, valid = corpus.open_corpus(config.data, *split)
    if not tokenizer:
        tokenizer = make_tokenizer(config.tokenizer, lambda: train.texts(limit=BPE_BYTES), vocab_size, special)
    return tokens.write_tokens({"train": train, "valid": valid}, tokenizer, out, workers=workers)
