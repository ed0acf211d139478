"""BERT's pretraining examples: pairs of segments, and what of them is masked."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mini import Bert, ModelConfig
from mini.errors import UserError
from mini.tasks.base import IGNORE
from mini.tasks.masked import MaskedLanguageModelling, MLMConfig, Sentences, fit
from mini.tasks.order import Grouped, uniform
from mini.text.tokenizer_base import ByteTokenizer
from mini.text.tokens import TokenFile
from mini.text.wordpiece import WordPieceTokenizer

TOKENIZER = ByteTokenizer().with_special(Bert.special_tokens)
CLS, SEP, MASK, PAD, EOT = TOKENIZER.cls, TOKENIZER.sep, TOKENIZER.mask, TOKENIZER.pad, TOKENIZER.eot
T, ROOM = 64, 61


def make_file(n_documents: int = 40, sentences: int = 12, seed: int = 0) -> TokenFile:
    """Document d consists of the byte d alone, so every token tells where it is from. Sentences have 3..20 tokens."""
    rng = np.random.default_rng(seed)
    tokens, documents, starts = [], [], []
    for d in range(n_documents):
        documents.append(len(tokens))
        for s in range(sentences):
            starts.append(len(tokens))
            tokens += [EOT] * (s == 0) + [d] * int(rng.integers(3, 21))
    arrays = (np.array(a, np.uint64) for a in (documents, starts))
    return TokenFile(np.array(tokens, np.uint16), *arrays, len(tokens), "")


FILE = make_file()


def examples(file: TokenFile = FILE, max_len: int = T, seed: int = 1, tokenizer=TOKENIZER, **options):
    return MaskedLanguageModelling(file, file, tokenizer, max_len, seed, options=MLMConfig(**options))


def unmasked(batch) -> torch.Tensor:
    """The tokens as they were."""
    tokens, places, targets = (batch.inputs[name] for name in ("tokens", "positions", "targets"))
    tokens = tokens.clone()
    rows = torch.arange(len(tokens))[:, None].expand_as(places)
    tokens[rows[targets != IGNORE], places[targets != IGNORE]] = targets[targets != IGNORE]
    return tokens


def test_form_of_a_pair():
    batch = examples(mask_rate=0.3).batch(np.arange(500))
    tokens, segments, lengths = unmasked(batch), batch.inputs["segments"], batch.inputs["lengths"]
    assert batch.n_tokens == int(lengths.sum()) and lengths.max() == T
    for row, segment, n in zip(tokens.tolist(), segments.tolist(), lengths.tolist(), strict=True):
        assert row[0] == CLS and row[n - 1] == SEP and row[n:] == [PAD] * (T - n)
        middle = row.index(SEP)
        assert row.count(SEP) == 2 and 1 < middle < n - 2 and EOT not in row
        assert segment == [0] * (middle + 1) + [1] * (n - middle - 1) + [0] * (T - n)
        assert len(set(row[1:middle])) == 1 and len(set(row[middle + 1 : n - 1])) == 1  # each from one document


def test_half_of_the_second_segments_follow_and_the_others_are_of_another_document():
    batch = examples().batch(np.arange(4000))
    tokens, unrelated = unmasked(batch), batch.inputs["unrelated"].bool()
    first = tokens[:, 1]
    second = tokens.gather(1, batch.inputs["lengths"][:, None] - 2)[:, 0]
    assert torch.equal(first != second, unrelated)
    assert abs(int(unrelated.sum()) - 2000) < 4 * (4000 * 0.25) ** 0.5


def test_a_second_segment_that_follows_begins_where_the_first_ends():
    """With consecutive numbers as tokens, the one after A's last is B's first, at a sentence's edge."""
    starts = np.arange(0, 2400, 12, dtype=np.uint64)
    file = TokenFile(np.arange(2400).astype(np.uint16), starts[::20], starts, 2400, "")
    text = Sentences(file, replace_eot(None))
    places, size = np.arange(0, 2300, 7), np.full(329, 50)
    begin, middle, end = text.stretch(places, size, uniform(3, places, 1)[:, 0])
    assert (begin % 12 == 0).all() and (middle % 12 == 0).all() and (end % 12 == 0).all()
    assert (begin < middle).all() and (middle < end).all() and (begin // 240 == (end - 1) // 240).all()
    full = end % 240 != 0  # not cut off by the document's end: as many sentences as fill the size, no more
    assert full.any() and ((end - begin)[full] >= 50).all() and ((end - begin)[full] < 62).all()
    b, e = text.elsewhere(middle, end - middle, *uniform(4, places, 2).T)
    assert (b // 240 != middle // 240).all() and (b % 12 == 0).all() and (e - b == end - middle).all()
    assert (b // 240 == (e - 1) // 240).all()


def replace_eot(eot):
    class Fake:
        pass

    fake = Fake()
    fake.eot = eot
    return fake


def test_a_document_of_one_sentence_is_split_within_it():
    starts = np.array([0, 100], np.uint64)
    file = TokenFile(np.zeros(200, np.uint16), starts, starts, 200, "")
    begin, middle, end = Sentences(file, replace_eot(None)).stretch(
        np.array([5, 150]), np.array([50, 20]), np.full(2, 0.5)
    )
    assert begin.tolist() == [0, 150] and end.tolist() == [100, 200] and middle.tolist() == [25, 160]


@pytest.mark.parametrize("file", [make_file(60, 12), make_file(250, 30)])
@pytest.mark.parametrize("short_rate", [0.0, 0.3])
def test_lengths_do_not_tell_which_segments_follow(file, short_rate):
    """A wrong second segment must not be shorter or longer than a right one, nor rows with it.

    (Where documents are shorter than a row, they do: of another, no more can be taken than it has.)
    """
    batch = examples(file, short_rate=short_rate).batch(np.arange(8000))
    unrelated = batch.inputs["unrelated"].bool()
    second = batch.inputs["segments"].sum(1)
    for values in (batch.inputs["lengths"], second):
        for cut in values.float().quantile(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])):
            shares = [(values[label] >= cut).float().mean() for label in (unrelated, ~unrelated)]
            assert abs(shares[0] - shares[1]) < 0.05


@pytest.mark.parametrize("nsp", [True, False])
@pytest.mark.parametrize("sentences", [[0, 10], [0, 990], [0]])
def test_every_token_of_a_document_is_seen(nsp, sentences):
    starts = np.array([*sentences, *(1000 + s for s in sentences)], np.uint64)
    file = TokenFile((np.arange(2000)).astype(np.uint16), starts[:: len(sentences)], starts, 2000, "")
    tokenizer = replace_eot(None)
    tokenizer.cls, tokenizer.sep, tokenizer.mask, tokenizer.pad = 3000, 3001, 3002, 3003
    tokenizer.vocab_size, tokenizer.special = 3004, {"[CLS]": 3000, "[SEP]": 3001, "[MASK]": 3002, "[PAD]": 3003}
    data = examples(file, nsp=nsp, tokenizer=tokenizer)
    seen = set(unmasked(data.batch(np.arange(40 * data.n))).unique().tolist())
    assert len(seen & set(range(2000))) > 1950


def test_fit_takes_from_the_longer():
    rng = np.random.default_rng(0)
    a, b, size = rng.integers(1, 100, 1000), rng.integers(1, 100, 1000), rng.integers(2, 100, 1000)
    for x, y, m, u, v in zip(a, b, size, *fit(a, b, size), strict=True):
        expected = [x, y]
        while sum(expected) > m:
            expected[int(expected[1] >= expected[0])] -= 1
        assert u + v == sum(expected) and {abs(u - expected[0]), abs(v - expected[1])} <= {0, 1} and min(u, v) >= 1


def test_rates_of_masking():
    batch = examples().batch(np.arange(3000))
    tokens, places, targets = (batch.inputs[name] for name in ("tokens", "positions", "targets"))
    chosen = targets != IGNORE
    n = int(chosen.sum())
    assert batch.counts == {"mlm": n, "nsp": 3000}
    text = batch.inputs["lengths"] - 3
    assert torch.equal(chosen.sum(1), (0.15 * text).round().clamp(min=1).long())  # of every sequence
    shown = tokens.gather(1, places)[chosen]
    was = targets[chosen]
    words = len(examples().ordinary)
    for count, p in (
        (int((shown == MASK).sum()), 0.8),
        (int((shown == was).sum()), 0.1 + 0.1 / words),  # left alone, or replaced by itself
        (int(((shown != was) & (shown != MASK)).sum()), 0.1 - 0.1 / words),
    ):
        assert abs(count - n * p) < 4 * (n * p * (1 - p)) ** 0.5


def test_special_tokens_and_padding_are_never_masked_and_places_are_spread():
    batch = examples(mask_rate=0.5).batch(np.arange(2000))
    places, targets, lengths = (batch.inputs[name] for name in ("positions", "targets", "lengths"))
    chosen = targets != IGNORE
    assert not torch.isin(targets[chosen], torch.tensor(list(TOKENIZER.special.values()))).any()
    assert (places < lengths[:, None] - 1)[chosen].all() and (places[chosen] > 0).all()
    for row, mine in zip(places.tolist(), chosen.tolist(), strict=True):
        used = [place for place, it in zip(row, mine, strict=True) if it]
        assert len(set(used)) == len(used)
    everything = batch.inputs["tokens"]
    replaced = everything[torch.arange(2000)[:, None].expand_as(places)[chosen], places[chosen]]
    assert not torch.isin(replaced, torch.tensor([CLS, SEP, PAD, EOT])).any()  # nor put in another's place
    share = chosen[places <= 30].sum() / chosen.sum()
    assert 0.4 < float(share) < 0.6


def test_every_epoch_masks_anew():
    data = examples(short_rate=0.0)
    n = data.n
    first, second = (data.make(data.train, np.arange(n), np.arange(n) + epoch * n, data.seed, 0.15) for epoch in (0, 1))
    same = (first.inputs["positions"].sort(1).values == second.inputs["positions"].sort(1).values).all(1)
    assert same.float().mean() < 0.05


def test_a_batch_does_not_depend_on_who_draws_it():
    data = examples()
    whole = data.batch(np.arange(48))
    parts = [examples().batch(np.arange(start, start + 12)) for start in range(0, 48, 12)]
    for name, tensor in whole.inputs.items():
        assert torch.equal(tensor, torch.cat([part.inputs[name] for part in parts])), name
    assert whole.counts["mlm"] == sum(part.counts["mlm"] for part in parts)
    assert not torch.equal(whole.inputs["tokens"], examples(seed=2).batch(np.arange(48)).inputs["tokens"])


def test_validation_is_always_the_same():
    drawn = [[b.inputs["tokens"] for b in examples(seed=seed).validation(16)] for seed in (1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    assert sum(map(len, drawn[0])) == len(FILE.tokens) // ROOM
    assert sum(len(b.inputs["tokens"]) for b in examples().validation(16, limit=10 * ROOM)) == 10


def test_short_sequences():
    lengths = examples(short_rate=0.4).batch(np.arange(3000)).inputs["lengths"]
    longest = examples(short_rate=0.0).batch(np.arange(3000)).inputs["lengths"]
    cut = (lengths < longest).float().mean()  # a short one may happen to have the full length
    assert 0.3 < float(cut) < 0.45 and lengths.min() < 12


def test_without_pairs_there_is_one_segment():
    data = examples(nsp=False)
    batch = data.batch(np.arange(300))
    assert set(batch.counts) == {"mlm"} and "unrelated" not in batch.inputs
    tokens, lengths = unmasked(batch), batch.inputs["lengths"]
    assert int(batch.inputs["segments"].sum()) == 0 and lengths.max() == T
    for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True):
        assert row[0] == CLS and row.count(SEP) == 1 and row[n - 1] == SEP and len(set(row[1 : n - 1])) == 1


def test_packed_examples_run_on_into_the_next_documents():
    data = examples(make_file(sentences=2), nsp=False, document_mask=True, short_rate=0.0)
    batch = data.batch(np.arange(200))
    tokens, documents, lengths = unmasked(batch), batch.inputs["documents"], batch.inputs["lengths"]
    assert (lengths == T).float().mean() > 0.9 and len(documents.unique()) > 30  # only the text's end is short
    for row, numbers, n in zip(tokens.tolist(), documents.tolist(), lengths.tolist(), strict=True):
        for token, number in zip(row[1 : n - 1], numbers[1 : n - 1], strict=True):
            assert token in (number - 1, EOT)  # document d, the number of which is d + 1, is made of d
        assert numbers[0] == numbers[1] and set(numbers[n - 1 :]) == {numbers[n - 2]}
    assert EOT in tokens and EOT not in batch.inputs["targets"]


def test_packed_documents_see_nothing_of_each_other():
    torch.manual_seed(0)
    shape = dict(n_layers=2, n_heads=2, d_model=16, max_len=T, vocab_size=TOKENIZER.vocab_size, zero_init=False)
    model = Bert(ModelConfig(**shape, causal=False, mlm=True, positions="rope", n_segments=2, window=3)).eval()
    inputs = examples(make_file(sentences=2), nsp=False, document_mask=True).batch(np.arange(4)).inputs
    logits = model.answers(inputs)["mlm"]
    for row in range(4):
        tokens, documents = inputs["tokens"][row], inputs["documents"][row]
        for i, place in enumerate(inputs["positions"][row].tolist()):
            own = (documents == documents[place]) & (torch.arange(T) < inputs["lengths"][row])
            first = int(own.int().argmax())
            alone, _ = model.predict(tokens[own][None], own.sum()[None], torch.tensor([[place - first]]))
            assert torch.allclose(logits[row, i], alone[0, 0], atol=1e-5)


def test_document_masks_are_refused_where_they_have_no_meaning():
    with pytest.raises(UserError, match=r"--document_mask packs .* needs --nsp false"):
        examples(document_mask=True)
    with pytest.raises(UserError, match="--document_mask: the text is one document"):
        examples(make_file(n_documents=1), nsp=False, document_mask=True)


def test_one_document_is_refused_for_pairs_only():
    with pytest.raises(UserError, match=r"one document.*--nsp false"):
        examples(make_file(n_documents=1))
    assert examples(make_file(n_documents=1), nsp=False).batch(np.arange(4)).n_tokens > 0
    with pytest.raises(UserError, match="--max_len 4"):
        examples(max_len=4)


def test_one_long_sentence_is_seen_whole():
    """text8 is one document of one sentence: examples begin anywhere in it."""
    start = np.zeros(1, np.uint64)
    file = TokenFile((np.arange(5000) % 250).astype(np.uint16), start, start, 5000, "")
    data = examples(file, nsp=False, short_rate=0.0)
    seen = np.zeros(250, dtype=bool)
    seen[unmasked(data.batch(np.arange(data.n))).flatten().clamp(max=249)] = True
    assert seen.all()


def test_words_are_masked_whole():
    rng = np.random.default_rng(0)
    text = b"".join(bytes(rng.integers(97, 123, rng.integers(1, 6)).tolist()) + b" " for _ in range(4000))
    tokens = np.frombuffer(text, np.uint8).astype(np.uint16)
    starts = np.arange(0, len(tokens), 500, dtype=np.uint64)
    file = TokenFile(tokens, starts[::2], starts, len(tokens), "")
    batch = examples(file, whole_word=True, short_rate=0.0).batch(np.arange(300))
    before, places, targets = unmasked(batch).numpy(), batch.inputs["positions"], batch.inputs["targets"]
    chosen = targets != IGNORE
    goes_on = TOKENIZER.continues_word(before)
    longer = 0
    for b in range(300):
        masked = set(places[b][chosen[b]].tolist())
        words = np.cumsum(~goes_on[b])
        for word in {words[p] for p in masked}:
            members = set(np.flatnonzero(words == word).tolist())
            assert members <= masked
            longer += len(members) > 1
    assert longer > 100
    assert 0.11 < int(chosen.sum()) / int((batch.inputs["lengths"] - 3).sum()) < 0.15


def test_uniform_numbers_are_uniform_and_a_function_of_their_place():
    u = uniform(7, np.arange(2000), 50)
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002 and 0 <= u.min() and u.max() < 1
    counts = np.bincount((u.ravel() * 100).astype(int), minlength=100)
    assert ((counts - 1000) ** 2 / 1000).sum() < 160  # chi square with 99 degrees of freedom
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.1 and abs(np.corrcoef(u[:, 0], u[:, 1])[0, 1]) < 0.1
    assert np.array_equal(uniform(7, np.array([1999, 3]), 10), u[[1999, 3], :10])
    assert not np.isin(uniform(8, np.arange(2000), 5), u).any()


def test_batches_of_similar_lengths():
    n, size = 1003, 16
    lengths = np.random.default_rng(0).integers(5, 100, n)
    order = Grouped(lengths, 1, size)(np.arange(3 * n))
    assert all(sorted(epoch) == list(range(n)) for epoch in order.reshape(3, n))
    spread = [np.ptp(lengths[order[i : i + size]]) for i in range(0, 3 * n - size, size)]
    assert np.median(spread) <= 4 and np.median(np.ptp(lengths[: n // size * size].reshape(-1, size), axis=1)) > 70
    assert not np.array_equal(order[:n], order[n : 2 * n])
    assert np.array_equal(order[500:700], Grouped(lengths, 1, size)(np.arange(500, 700)))
    means = [lengths[order[i : i + size]].mean() for i in range(0, n - size, size)]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.4  # batches of all lengths in a mixed order
    for small in (1, 5, 16):  # fewer examples than a batch
        assert sorted(Grouped(lengths[:small], 1, size)(np.arange(small))) == list(range(small))


def test_unknown_tokens_are_masked_and_count_in_the_baseline():
    """WordPiece has [UNK] in its text; the loss of guessing by frequency is that of the targets there are."""
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    tokenizer = WordPieceTokenizer(vocab)
    ids = np.random.default_rng(0).choice([1, 5, 6], 4000, p=[0.2, 0.5, 0.3]).astype(np.uint16)
    starts = np.arange(0, 4000, 10, dtype=np.uint64)
    file = TokenFile(ids, starts[::20], starts, 4000, "")
    data = examples(file, tokenizer=tokenizer)
    targets = torch.cat([b.inputs["targets"].flatten() for b in data.validation(16)])
    targets = targets[targets >= 0]
    assert 0.1 < (targets == 1).float().mean() < 0.3
    entropy = -sum(p * np.log(p) for p in (0.2, 0.5, 0.3))
    assert float(-data.log_frequency[targets].mean()) == pytest.approx(entropy, abs=0.05)


def test_validation_masks_at_one_rate_whatever_the_trainings():
    """So that runs that mask 15 % and 30 % can be compared: the same tokens are asked of both."""
    batches = [list(examples(mask_rate=rate).validation(16)) for rate in (0.15, 0.4)]
    for one, other in zip(*batches, strict=True):
        assert one.counts == other.counts and all(torch.equal(t, other.inputs[name]) for name, t in one.inputs.items())
    few, many = (examples(mask_rate=rate).batch(np.arange(64)).counts["mlm"] for rate in (0.15, 0.4))
    assert many > 2 * few


def test_options_are_checked():
    with pytest.raises(UserError, match="--mask_rate"):
        replace(MLMConfig(), mask_rate=0.0)
