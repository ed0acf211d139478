"""Texts as a model takes them."""

from mini.tasks.inputs import pad


def test_few_lengths_and_little_padding():
    widths = {n: pad([[1] * n, [2]], 0, 3000).size(1) for n in range(1, 3001)}
    assert all(n <= width <= max(n, min(3000, n * 17 / 16)) for n, width in widths.items())
    assert len(set(widths.values())) <= 31 + 16 * 7 and widths[3000] == 3000 and widths[2945] == 3000
    assert pad([[1] * 37], 0).size(1) == 37 and pad([[1] * 37], 0, 36).size(1) == 37  # as long as it is, at the least
