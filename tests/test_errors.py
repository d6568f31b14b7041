"""How exceptions are put into words."""

import pytest

from attnscope.errors import error_in_a_line, error_in_words


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("error", "words", "line"),
    [
        (ValueError("the data is broken"), "ValueError: the data is broken", "ValueError: the data is broken"),
        (RuntimeError("\nno\nreally "), "RuntimeError: no\nreally", "RuntimeError: no"),
        (MemoryError(), "MemoryError", "MemoryError"),
        (Mute(), "Mute", "Mute"),
    ],
)
def test_an_exception_is_named_by_its_class_and_what_it_says(error, words, line):
    assert error_in_words(error) == words
    assert error_in_a_line(error) == line
