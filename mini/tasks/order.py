"""Everything random is a function of (seed, index): which examples a step has, and what is drawn for each.

Example number i of a run (i = step * batch_size + place in the batch) stands at place i % n of the order of epoch
i // n. So the batch of a step is the same however many processes share it, and resuming needs nothing but the step.
"""

import numpy as np


def mix(*values: int) -> int:
    """A 64-bit number that depends on every bit of every value (the finaliser of SplitMix64, Steele et al. 2014)."""
    h = 0
    for value in values:
        h = (h ^ value) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        h = (h ^ h >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        h ^= h >> 31
    return h


def permute(places: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where a pseudo-random permutation of 0..n-1, chosen by key, sends each place; stores nothing of size n.

    A Feistel network permutes the 2^(2k) >= n numbers; results of n or more are sent on until they are smaller
    ("cycle walking", Black & Rogaway 2002), fewer than four rounds of it on average.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)  # k bits on each side
    low = np.uint64((1 << half) - 1)
    keys = [np.uint64(mix(key, i)) for i in range(4)]

    def send(x: np.ndarray) -> np.ndarray:
        left, right = x >> np.uint64(half), x & low
        for k in keys:
            h = (right + k) * np.uint64(0x9E3779B97F4A7C15)  # wraps around, as it should
            h = (h ^ h >> np.uint64(29)) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ (h >> np.uint64(32)) & low
        return left << np.uint64(half) | right

    x = send(places.astype(np.uint64))
    while (beyond := x >= n).any():
        x[beyond] = send(x[beyond])
    return x.astype(np.int64)


def shuffled(indices: np.ndarray, n: int, seed: int) -> np.ndarray:
    """For example numbers of a run, which of the n examples each is: every epoch all of them, in a new order."""
    epochs, places = np.divmod(np.asarray(indices, dtype=np.int64), n)
    out = np.empty_like(places)
    for epoch in set(epochs.tolist()):
        here = epochs == epoch
        out[here] = permute(places[here], n, mix(seed, epoch))
    return out


class Grouped:
    """As shuffled(), but the examples of a batch are of similar lengths (n,): next to nothing of it is padding."""

    def __init__(self, lengths: np.ndarray, seed: int, batch_size: int):
        self.lengths, self.seed, self.batch_size = lengths, seed, batch_size
        self.orders: dict[int, np.ndarray] = {}  # of the epochs that were asked for last

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Which example each of these example numbers is."""
        epochs, places = np.divmod(np.asarray(indices, dtype=np.int64), len(self.lengths))
        wanted = np.unique(epochs).tolist()
        self.orders = {epoch: self.orders[epoch] if epoch in self.orders else self.order(epoch) for epoch in wanted}
        out = np.empty_like(places)
        for epoch in wanted:
            out[epochs == epoch] = self.orders[epoch][places[epochs == epoch]]
        return out

    def order(self, epoch: int) -> np.ndarray:
        """Stretches of 50 batches of a random order are sorted by length, and the batches shuffled again."""
        n, size = len(self.lengths), self.batch_size
        order = permute(np.arange(n), n, mix(self.seed, epoch))
        for start in range(0, n, 50 * size):
            stretch = order[start : start + 50 * size]  # a view
            stretch[:] = stretch[np.argsort(self.lengths[stretch], kind="stable")]
        first = -epoch * n % size  # examples that complete the last epoch's last batch
        whole = (n - first) // size
        if whole > 0:
            batches = order[first : first + whole * size].reshape(whole, size)  # a view
            batches[:] = batches[permute(np.arange(whole), whole, mix(self.seed, epoch, 1))]
        return order


def uniform(key: int, indices: np.ndarray, width: int) -> np.ndarray:
    """(B, width) numbers in [0, 1), a row for each example number: SplitMix64 with (key, index) as its seed."""
    with np.errstate(over="ignore"):  # wraps around, as it should
        rows = splitmix(indices.astype(np.uint64) + np.uint64(mix(key)))[:, None]  # (B, 1)
        bits = splitmix(rows + np.arange(1, width + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (bits >> np.uint64(11)) * 2.0**-53


def splitmix(h: np.ndarray) -> np.ndarray:
    """The finaliser of mix() for arrays of uint64."""
    h = (h ^ h >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ h >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return h ^ h >> np.uint64(31)
