"""Data as a function of the step."""

import numpy as np
import pytest
import torch

from mini.errors import UserError
from mini.tasks.base import IGNORE
from mini.tasks.lm import LanguageModelling, LMConfig
from mini.tasks.order import permute, shuffled
from mini.text.corpus import DataConfig
from mini.text.tokenizer_base import ByteTokenizer
from mini.text.tokens import TokenFile, prepare_tokens

TOKENIZER = ByteTokenizer()
EOT = TOKENIZER.eot


def token_file(n: int) -> TokenFile:
    none = np.zeros(1, dtype=np.uint64)
    return TokenFile((np.arange(n) % 251).astype(np.uint16), none, none, n, "")


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 1000, 4097])
def test_permute_is_a_permutation(n):
    places = np.arange(n)
    images = [permute(places, n, key) for key in (1, 2)]
    for image in images:
        assert sorted(image) == list(range(n))
    if n >= 16:
        assert not np.array_equal(*images)
        assert not np.array_equal(images[0], places)


def test_permute_spreads():
    """Neighbours end up far apart: no window is followed by the next one more often than by chance."""
    image = permute(np.arange(100_000), 100_000, 5)
    assert np.corrcoef(np.arange(100_000), image)[0, 1] == pytest.approx(0, abs=0.02)
    assert (np.diff(image) == 1).sum() < 10


def test_permute_of_a_huge_corpus_needs_no_memory():
    image = permute(np.arange(5), 10**12, 3)
    assert len(set(image)) == 5 and image.max() < 10**12


def test_each_epoch_visits_every_example_once_in_a_fresh_order():
    n = 37
    drawn = shuffled(np.arange(3 * n), n, seed=1).reshape(3, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in drawn)
    assert len({tuple(epoch) for epoch in drawn}) == 3
    assert np.array_equal(drawn[1], shuffled(np.arange(n, 2 * n), n, seed=1))  # no need to ask for the first epoch
    assert not np.array_equal(drawn[0], shuffled(np.arange(n), n, seed=2))


def test_windows_tile_the_text():
    data = LanguageModelling(token_file(1003), token_file(50), TOKENIZER, max_len=10, seed=0)
    assert data.n == 100
    batch = data.batch(np.arange(100))
    assert batch.counts == {"lm": 1000} and batch.n_tokens == 1000
    assert torch.equal(batch.inputs["targets"][:, :-1], batch.inputs["tokens"][:, 1:])
    text = np.sort(batch.inputs["tokens"].numpy(), axis=None)
    assert np.array_equal(text, np.sort(np.arange(1000) % 251))


def test_a_batch_does_not_depend_on_who_draws_it():
    data = LanguageModelling(token_file(1003), token_file(50), TOKENIZER, max_len=10, seed=0)
    whole = data.batch(np.arange(40, 48)).inputs["tokens"]
    parts = [data.batch(np.arange(start, start + 2)).inputs["tokens"] for start in range(40, 48, 2)]
    assert torch.equal(whole, torch.cat(parts))


def test_documents_of_a_window():
    starts = np.array([0, 13, 20], dtype=np.uint64)
    file = TokenFile(np.arange(41).astype(np.uint16), starts, starts, 41, "")
    data = LanguageModelling(file, file, TOKENIZER, max_len=10, seed=0, options=LMConfig(document_mask=True))
    batch = data.batch(np.arange(4)).inputs  # a token's number is its place
    expected = 1 + (batch["tokens"] >= 13).long() + (batch["tokens"] >= 20).long()
    assert torch.equal(batch["documents"], expected)
    (valid,) = data.validation(batch_size=5)
    assert valid.inputs["documents"].flatten()[:41].tolist() == [1] * 13 + [2] * 7 + [3] * 20
    with pytest.raises(UserError, match="--document_mask: the text is one document"):
        LanguageModelling(token_file(100), file, TOKENIZER, 10, 0, options=LMConfig(document_mask=True))


@pytest.mark.parametrize("n", [2, 11, 50, 53])
def test_validation_predicts_every_token_once(n):
    data = LanguageModelling(token_file(100), token_file(n), TOKENIZER, max_len=10, seed=0)
    targets = []
    for batch in data.validation(batch_size=2):
        kept = batch.inputs["targets"] != IGNORE
        assert batch.counts["lm"] == int(kept.sum()) == batch.n_bytes
        assert torch.equal(batch.inputs["targets"][kept], batch.inputs["tokens"][kept] + 1)
        targets += batch.inputs["targets"][kept].tolist()
    assert targets == list(range(1, n))


def test_validation_limit():
    data = LanguageModelling(token_file(100), token_file(90), TOKENIZER, max_len=10, seed=0)
    assert sum(batch.counts["lm"] for batch in data.validation(2, limit=35)) == 35


def test_text_shorter_than_a_window():
    with pytest.raises(UserError, match="10 tokens, but a window takes 11"):
        LanguageModelling(token_file(10), token_file(50), TOKENIZER, max_len=10, seed=0)


# ---------------------------------------------------------------- corpus -> tokens
def test_tokens_are_cached_and_made_again_when_the_text_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("MINI_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "a.txt"
    text.write_text("one two three. " * 50)
    config = DataConfig(data=str(text), tokenizer="bytes")
    first, tokenizer = prepare_tokens(config, 300, None)
    again, _ = prepare_tokens(config, 300, None)
    assert first.path == again.path and first.train.sha256 == again.train.sha256
    assert tokenizer.decode(first.train.tokens[1:].tolist()) + tokenizer.decode(first.valid.tokens[1:].tolist()) == (
        text.read_text()
    )
    text.write_text("other words. " * 50)
    assert prepare_tokens(config, 300, None)[0].train.sha256 != first.train.sha256
