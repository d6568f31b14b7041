"""Rows of numbers that stay on the device until they are taken."""

import torch

from attnscope.watch.kept import Kept


def test_rows_come_back_in_their_order_and_only_once():
    kept = Kept(columns=2, most=3)
    assert kept.take() is None
    for n in range(2):
        kept.add(torch.tensor(float(n)), torch.tensor(10.0 + n))
    taken = kept.take()
    kept.add(torch.tensor(-1.0), torch.tensor(-2.0))
    assert taken.tolist() == [[0, 10], [1, 11]], "what comes later does not change it"
    assert kept.take().tolist() == [[-1, -2]] and kept.take() is None


def test_it_is_full_until_its_rows_are_taken():
    kept = Kept(columns=1, most=2)
    for n in range(2):
        assert not kept.is_full
        kept.add(torch.tensor(float(n)))
    assert kept.is_full
    kept.take()
    assert not kept.is_full
