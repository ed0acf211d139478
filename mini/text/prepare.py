"""The corpus of --data as a folder of tokens, and the tokenizer that makes it."""

from collections.abc import Sequence
from pathlib import Path

from mini.errors import UserError
from mini.text.corpus import DataConfig, fingerprint, open_corpus
from mini.text.fetch import cache_folder
from mini.text.tokenizer import Tokenizer, load_tokenizer, make_tokenizer
from mini.text.tokens import TokenFolder, is_token_folder, open_tokens, write_tokens

BPE_BYTES = 10_000_000  # of text, evenly spread over the corpus, are what a BPE is trained on


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
    if is_token_folder(config.data):
        if late := given & {"tokenizer", "vocab_size", "valid", "valid_fraction", "separator", "errors"}:
            raise UserError(f"--{min(late)}: {config.data} is made of tokens already; make it anew with that flag")
        made_with = load_tokenizer(config.data).with_special(special)
        if tokenizer and tokenizer.fingerprint != made_with.fingerprint:
            raise UserError(f"{config.data} was made with another tokenizer than the run of --init has")
        return open_tokens(config.data), made_with
    if not tokenizer and config.tokenizer != "bpe":
        tokenizer = make_tokenizer(config.tokenizer, list, vocab_size, special)
    trained = f"bpe{vocab_size}" + f"-{len(special)}" * bool(special)
    name = f"{tokenizer.kind}-{tokenizer.fingerprint[:12]}" if tokenizer else trained
    path = cache_folder() / "tokens" / f"{fingerprint(config)[:24]}-{name}"
    if not is_token_folder(path):
        write_token_folder(config, vocab_size, tokenizer, path, special=special)
    return open_tokens(path), load_tokenizer(path)


def write_token_folder(
    config: DataConfig,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    out: Path,
    workers: int = 0,
    special: Sequence[str] = (),
) -> TokenFolder:
    """Reads the corpus of --data and writes it as a token folder; trains or opens the tokenizer if none is given."""
    train, valid = open_corpus(config)
    if not tokenizer:
        tokenizer = make_tokenizer(config.tokenizer, lambda: train.texts(limit=BPE_BYTES), vocab_size, special)
    return write_tokens({"train": train, "valid": valid}, tokenizer, out, workers=workers)
