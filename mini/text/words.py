"""Text for fine-tuning classifiers, changed before it becomes tokens: normalised the same everywhere, or at random.

Normalise first and augment after: the punctuation step would take the brackets off [MASK].
"""

import functools
import string
import unicodedata
from collections.abc import Sequence

import numpy as np

from mini.flags import UserError, nearest

NORMALIZATIONS = ("lower", "accents", "punctuation", "stopwords")
AUGMENTATIONS = ("insert", "replace", "swap", "delete", "mask")

# Function words that say little about a text's class. Negations (not, no, never, without, words in n't) and words that
# weigh or contrast (but, very, too, only) are not among them: "not good" must not become "good".
FUNCTION_WORDS = """
    a an the this that these those who whom whose which what when where why how
    i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself
    she her hers herself it its itself they them their theirs themselves
    am is are was were be been being have has had having do does did doing will would shall should can could
    and or if then than as because while so here there again once also some any each both other
    of at by for with about between into through during before after to from in on upon within
    i'm you're he's she's it's we're they're that's there's what's who's
    i've you've we've they've i'll you'll he'll she'll it'll we'll they'll
    's 're 've 'll s re ve ll
"""  # the last line is what is left of "it's" in corpora that cut words apart
STOPWORDS = frozenset(FUNCTION_WORDS.split())


def normalize(text: str, steps: Sequence[str]) -> str:
    """The text after those of NORMALIZATIONS that steps names, in their order there, with single spaces.

    A step that would leave nothing is not taken: "To be or not" keeps its "not", but "It is what it is" is all stop
    words and ":)" all punctuation, and each is an example with a label, which an empty text could not stand for.
    """
    if unknown := set(steps) - set(NORMALIZATIONS):
        raise ValueError(f"unknown normalisation {min(unknown)!r}")
    text = " ".join(text.split())
    if "lower" in steps:
        text = text.lower()
    if "accents" in steps:
        text = strip_accents(text) or text
    if "punctuation" in steps:
        text = strip_punctuation(text) or text
    if "stopwords" in steps:
        text = " ".join(w for w in text.split() if w.lower().replace("’", "'") not in STOPWORDS) or text
    return text


def strip_accents(text: str) -> str:
    """Letters without their combining marks (category Mn), as in uncased BERT: é, in one character or two, is e."""
    kept = (c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
    return " ".join(unicodedata.normalize("NFC", "".join(kept)).split())


def strip_punctuation(text: str) -> str:
    """Each punctuation mark becomes a space, but an apostrophe inside a word stays, as ': don’t is don't."""
    spaced = "".join(" " if is_punctuation(c) and c != "'" else c for c in text.replace("’", "'"))
    return " ".join(" ".join(word.strip("'") for word in spaced.split()).split())


@functools.cache
def is_punctuation(c: str) -> bool:
    """Unicode's punctuation and, as in BERT's tokenizer, ASCII's symbols ($ + < = > ^ ` | ~); no emoji."""
    return c in string.punctuation or unicodedata.category(c).startswith("P")


def augment(text: str, operation: str, rate: float, words: Sequence[str], key: int) -> str:
    """The text with about `rate` (0..1) of its words changed by one of AUGMENTATIONS; at rate 0 with none.

    "Easy data augmentation" (EDA: Wei & Zou 2019, §2), and mask. Of N words, n = max(1, round(rate N)):

        insert   n times, a random one of `words` at a random place
        replace  n different places get a random one of `words` (by chance, perhaps the word that was there)
        swap     n times, the words at two random places change places
        delete   each word goes with probability rate; if all would, one stays
        mask     n different places get [MASK]

    Where EDA has WordNet's synonyms, insert and replace use `words`, all of the training texts, repeats included: that
    needs no thesaurus and no certain language, but a new word need not mean what the old one did.
    key: a number >= 0, from which alone the randomness comes.
    """
    out = text.split()
    N = len(out)
    if not N:
        return ""
    rng = np.random.Generator(np.random.Philox(key=key))
    n = max(1, round(rate * N)) if rate else 0
    if operation == "insert":
        for _ in range(n):
            out.insert(rng.integers(len(out) + 1), words[rng.integers(len(words))])
    elif operation == "replace":
        for i in rng.permutation(N)[:n]:
            out[i] = words[rng.integers(len(words))]
    elif operation == "swap":
        for _ in range(n if N > 1 else 0):
            i = rng.integers(N)
            j = (i + rng.integers(1, N)) % N  # any other place
            out[i], out[j] = out[j], out[i]
    elif operation == "delete":
        kept = [word for word, u in zip(out, rng.random(N), strict=True) if u >= rate]
        out = kept or [out[rng.integers(N)]]
    elif operation == "mask":
        for i in rng.permutation(N)[:n]:
            out[i] = "[MASK]"
    else:
        raise ValueError(f"unknown augmentation {operation!r}")
    return " ".join(out)


def parse_steps(flag: str, value: str, allowed: tuple[str, ...]) -> list[str]:
    """The names in a flag's comma-separated value, each once; "all" is all of them, "none" or nothing is none."""
    if value in ("", "none", "all"):
        return list(allowed) if value == "all" else []
    choices = (*allowed, "all", "none")
    names = list(dict.fromkeys(name.strip() for name in value.split(",")))
    for name in names:
        if name not in allowed:
            raise UserError(f"--{flag} {name!r}: choose any of {', '.join(choices)}{nearest(name, choices)}")
    return names
