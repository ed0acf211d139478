"""Text that is changed before a classifier sees it: what changes, how much, and from the key alone."""

import unicodedata
from collections import Counter

import pytest

from mini.errors import UserError
from mini.text.words import AUGMENTATIONS, NORMALIZATIONS, STOPWORDS, augment, normalize, parse_steps

TEXT = " ".join(f"w{i}" for i in range(20))
WORDS = ["x", "x", "x", "y"]  # none of them in TEXT
KEYS = range(2000)


def bounds(n: int, p: float) -> pytest.approx:
    """What a count of n independent draws of probability p may be: five standard deviations either way."""
    return pytest.approx(n * p, abs=5 * (n * p * (1 - p)) ** 0.5)


# ---------------------------------------------------------------- normalisation
def test_each_step_does_its_own_thing():
    text = "The Café,  isn't\tGOOD!"
    assert normalize(text, []) == "The Café, isn't GOOD!"
    assert normalize(text, ["lower"]) == "the café, isn't good!"
    assert normalize(text, ["accents"]) == "The Cafe, isn't GOOD!"
    assert normalize(text, ["punctuation"]) == "The Café isn't GOOD"
    assert normalize(text, ["stopwords"]) == "Café, isn't GOOD!"
    assert normalize(text, NORMALIZATIONS) == "cafe isn't good"


def test_the_order_of_the_steps_given_does_not_matter():
    text = "“It’s THE Ápple,” she said; ‘not a’ Pear"
    want = normalize(text, NORMALIZATIONS)
    assert want == "apple said not pear"
    assert normalize(text, NORMALIZATIONS[::-1]) == want
    assert normalize(text, [*NORMALIZATIONS, "lower", "stopwords"]) == want


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents_go_from_composed_and_from_decomposed_letters(form):
    text = unicodedata.normalize(form, "Ångström naïve Çà ś ḗ 한국 ø")
    assert normalize(text, ["accents"]) == "Angstrom naive Ca s e 한국 ø"  # Hangul is composed again, ø is a letter


def test_punctuation_is_a_space_but_for_apostrophes_inside_words():
    assert normalize("well-made,but_slow... don't/don’t", ["punctuation"]) == "well made but slow don't don't"
    assert normalize("'twas the dogs' ''quoted'' ‘n’ ' end", ["punctuation"]) == "twas the dogs quoted n end"
    assert normalize("$5 = a+b — «oui» ¿sí? 。", ["punctuation"]) == "5 a b oui sí"
    assert normalize("great 👍 हिन्दी", ["punctuation"]) == "great 👍 हिन्दी"  # emoji and vowel signs are no punctuation


def test_stop_words_keep_negations_and_what_weighs():
    kept = "not no nor never neither none nothing nobody without cannot n't but very too only more most"
    kept += " don't isn't wasn't can't won't couldn't doesn't shouldn't haven't"
    assert normalize(kept, ["stopwords"]) == kept
    assert normalize(kept.replace("'", "’"), NORMALIZATIONS) == kept
    assert not [word for word in STOPWORDS if word.endswith("n't")]
    assert normalize("It is NOT the best of films", ["stopwords"]) == "NOT best films"
    assert normalize("I'm sure it’s one it does n't", ["stopwords"]) == "sure one n't"


def test_a_text_is_never_emptied():
    assert normalize("To be, or to BE?", NORMALIZATIONS) == "to be or to be"
    assert normalize(" :) ", NORMALIZATIONS) == ":)"
    assert normalize("\u0301", NORMALIZATIONS) == "\u0301"
    assert normalize("", NORMALIZATIONS) == normalize(" \n", NORMALIZATIONS) == ""


def test_normalize_twice_is_normalize_once():
    # Each character of the first planes that have cases, marks and punctuation, between letters.
    texts = [f"A{chr(c)}b {chr(c)} The" for c in [*range(0x3100), *range(0xA640, 0xAC10), *range(0xF900, 0x10400)]]
    for steps in ([name] for name in NORMALIZATIONS):
        once = [normalize(text, steps) for text in texts]
        assert [normalize(text, steps) for text in once] == once
    once = [normalize(text, NORMALIZATIONS) for text in texts]
    assert [normalize(text, NORMALIZATIONS) for text in once] == once


# ---------------------------------------------------------------- augmentation
@pytest.mark.parametrize(("rate", "n"), [(0.01, 1), (0.1, 2), (0.33, 7), (1.0, 20)])
def test_as_many_words_change_as_the_rate_says(rate, n):
    words = TEXT.split()
    for key in range(50):
        out = augment(TEXT, "insert", rate, WORDS, key).split()
        assert len(out) == 20 + n
        assert [word for word in out if word not in WORDS] == words  # the others in their order
        for operation, new in (("replace", set(WORDS)), ("mask", {"[MASK]"})):
            out = augment(TEXT, operation, rate, WORDS, key).split()
            changed = [(a, b) for a, b in zip(words, out, strict=True) if a != b]
            assert len(changed) == n
            assert {b for _, b in changed} <= new


def test_swap_exchanges_two_different_places():
    words = TEXT.split()
    moved = Counter()
    for key in KEYS:
        out = augment(TEXT, "swap", 0.05, [], key).split()
        i, j = [place for place in range(20) if out[place] != words[place]]
        assert (out[i], out[j]) == (words[j], words[i])
        moved.update([i, j])
        assert sorted(augment(TEXT, "swap", 0.5, [], key).split()) == sorted(words)
    assert [moved[i] for i in range(20)] == [bounds(len(KEYS), 2 / 20)] * 20
    assert augment("one two", "swap", 0.1, [], 0) == "two one"


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_delete_drops_each_word_with_the_rate(rate):
    kept = Counter(word for key in KEYS for word in augment(TEXT, "delete", rate, [], key).split())
    assert [kept[word] for word in TEXT.split()] == [bounds(len(KEYS), 1 - rate)] * 20
    assert kept.total() == bounds(20 * len(KEYS), 1 - rate)


def test_delete_leaves_one_word():
    left = Counter(augment("a b c d", "delete", 1.0, [], key) for key in KEYS)
    assert [left[word] for word in "abcd"] == [bounds(len(KEYS), 1 / 4)] * 4
    assert left.total() == sum(left[word] for word in "abcd")


def test_places_and_words_are_uniform():
    places, masked, new = Counter(), Counter(), Counter()
    for key in KEYS:
        out = augment(TEXT, "insert", 0.05, WORDS, key).split()
        (place,) = [i for i, word in enumerate(out) if word in WORDS]
        places[place] += 1
        new[out[place]] += 1
        masked.update(i for i, word in enumerate(augment(TEXT, "mask", 0.2, [], key).split()) if word == "[MASK]")
        new.update(word for word in augment(TEXT, "replace", 0.05, WORDS, key).split() if word in WORDS)
    assert [places[i] for i in range(21)] == [bounds(len(KEYS), 1 / 21)] * 21  # before each word and after the last
    assert [masked[i] for i in range(20)] == [bounds(len(KEYS), 4 / 20)] * 20
    assert new["x"] == bounds(2 * len(KEYS), 3 / 4)  # as often as it is in the list


@pytest.mark.parametrize("operation", AUGMENTATIONS)
def test_the_key_alone_decides(operation):
    first = [augment(TEXT, operation, 0.3, WORDS, key) for key in range(20)]
    assert [augment(TEXT, operation, 0.3, WORDS, key) for key in reversed(range(20))] == first[::-1]
    assert len(set(first)) > 15
    assert isinstance(augment(TEXT, operation, 0.3, WORDS, 2**64 - 1), str)


@pytest.mark.parametrize("operation", AUGMENTATIONS)
def test_short_texts_and_rate_zero(operation):
    one = {"insert": {"x one", "one x", "y one", "one y"}, "replace": {"x", "y"}, "mask": {"[MASK]"}}
    for rate in (0.1, 1.0):
        assert {augment(" one\n", operation, rate, WORDS, key) for key in range(100)} == one.get(operation, {"one"})
        assert augment("", operation, rate, WORDS, 0) == augment(" \n", operation, rate, WORDS, 0) == ""
    assert augment(TEXT, operation, 0.0, WORDS, 0) == TEXT


# ---------------------------------------------------------------- flags
def test_parse_steps():
    assert parse_steps("normalize", "lower,accents", NORMALIZATIONS) == ["lower", "accents"]
    assert parse_steps("augment", "swap, delete,swap", AUGMENTATIONS) == ["swap", "delete"]
    assert parse_steps("augment", "", AUGMENTATIONS) == parse_steps("augment", "none", AUGMENTATIONS) == []
    assert parse_steps("augment", "all", AUGMENTATIONS) == list(AUGMENTATIONS)


def test_a_misspelt_step_is_named_with_the_nearest():
    with pytest.raises(UserError) as error:
        parse_steps("normalize", "lower,acents", NORMALIZATIONS)
    want = "--normalize 'acents': choose any of lower, accents, punctuation, stopwords, all, none"
    assert str(error.value) == f"{want} (did you mean accents?)"
    for value in ("lower,", "lower,none"):
        with pytest.raises(UserError, match="--normalize"):
            parse_steps("normalize", value, NORMALIZATIONS)


def test_an_unknown_operation_is_an_error_not_another_one():
    with pytest.raises(ValueError, match="synonym"):
        augment(TEXT, "synonym", 0.1, WORDS, 0)
    with pytest.raises(ValueError, match="Lower"):
        normalize(TEXT, ["Lower"])
