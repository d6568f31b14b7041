"""Which settings share a side of a grid, and that the figures say what the cells hold."""

import re
from types import SimpleNamespace

import pytest
from matplotlib import rc_context

from attnscope.comparison.cells import compare
from attnscope.report.figures.canvas import STYLE
from attnscope.report.figures.sweeps import draw_loss_by_lr, draw_matrix, draw_phase
from tests.report.test_compare import cell

CLIPS = [("norm", "none"), ("norm", "1"), ("value", "0.01"), ("adaptive", "0.01")]


def grid(outcome="ttt"):
    """clip.mode and clip.threshold together, as arms have them, times two schemes, three gains and two scales."""
    subjects = []
    for mode, threshold in CLIPS:
        for scheme in ("xavier_uniform", "normal"):
            for gain in (0.5, 1.0, 2.0):
                for scale in ("none", "inverse_sqrt"):
                    subjects += cell(
                        outcome, clip__mode=mode, clip__threshold=threshold, init__scheme=scheme,
                        init__gain=gain, attention__scale=scale,
                    )  # fmt: skip
    return compare(subjects, baseline={"attention.scale": "none", "init.gain": "1"})


def drawn(draw, comparison):
    with rc_context(STYLE):
        return draw(SimpleNamespace(comparison=comparison))


def texts(figure):
    """Every text of the figure, as a reader meets them."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", figure.svg.decode())


def test_settings_that_an_arm_ties_together_are_one_side():
    figure = drawn(draw_phase, grid())
    assert "init.gain (across) and clip.mode, clip.threshold (down)" in figure.alt
    words = texts(figure)
    for mode, threshold in CLIPS:
        assert f"{mode} {threshold}" in words
    assert "value none" not in words and "adaptive 1" not in words, "no cell has them"
    assert "init.scheme = normal" in words and "attention.scale = inverse_sqrt" in words


def test_the_matrix_has_a_column_for_each_clipping_that_was_tried():
    figure = drawn(draw_matrix, grid("tts"))
    words = texts(figure)
    assert sum(words.count(f"{mode} {threshold}") for mode, threshold in CLIPS) in (4, 8)
    assert "norm 0.01" not in words
    assert words.count("2") >= 48 and words.count("1") >= 48, "the count of each outcome of a cell"


def test_a_learning_rate_goes_across_and_small_cells_keep_their_counts():
    subjects = [
        each
        for lr in [float(f"{10**-p:g}") for p in range(14)]
        for scale in ("none", "inverse_sqrt")
        for each in cell("tttdd", optimizer__lr=lr, attention__scale=scale)
    ]
    figure = drawn(draw_phase, compare(subjects, baseline={}))
    assert "optimizer.lr (across) and attention.scale (down)" in figure.alt
    assert texts(figure).count("3") == texts(figure).count("2") == 28


@pytest.mark.parametrize("draw", [draw_phase, draw_matrix, draw_loss_by_lr])
def test_where_nothing_varies_there_is_no_figure(draw):
    assert drawn(draw, None) is None
    assert drawn(draw, compare(cell("ttt"), baseline={})) is None
