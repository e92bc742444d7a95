"""Columns of text: what they are made of once all of their values are known, and text as numbers.

The type of a column of text (every column of a CSV file) depends on all of its rows and on none of their order.
"""

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rbm_dist.sources.pieces import At

NO_NUMBER = ("", "NA", "N/A", "n/a", "NaN", "nan", "-nan", "NULL", "null", "None", "<NA>", "#N/A")
"""How text says, in a column of numbers, that there is none."""
_NUMBER = r"^[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|(?i:inf|infinity))$"
_GROUPED = r"^[+-]?[0-9]{1,3}(%s[0-9]{3})+(%s[0-9]*)?$"
_LOOKS_LIKE_NUMBER = r"^[+-]?[0-9]{1,3}([,. '][0-9]{3})*([.,][0-9]*)?([eE][+-]?[0-9]+)?$|^[+-]?[0-9]+,[0-9]+$"


@dataclass(frozen=True)
class Words:
    """What words and marks a user's text has."""

    missing: tuple[str, ...] = NO_NUMBER
    thousands: str | None = None  # the mark between groups of three digits
    decimal: str = "."  # the mark before the fraction


def numbers(column: pa.Array, words: Words) -> tuple[pa.Array, np.ndarray | None]:
    """Text as numbers, float64 with null where one is missing, and which values are neither (bool; None: none is)."""
    if (found := plain_numbers(column, words)) is not None:
        return found, None
    text = pc.utf8_trim_whitespace(column.cast(pa.large_string()))
    if words.thousands:
        marks = re.escape(words.thousands), re.escape(words.decimal)
        grouped = pc.match_substring_regex(text, _GROUPED % marks)
        text = pc.if_else(grouped, pc.replace_substring(text, words.thousands, ""), text)
    if words.decimal != ".":
        text = pc.replace_substring(text, words.decimal, ".")
    text = pc.if_else(pc.is_in(text, pa.array(words.missing, pa.large_string())), None, text)
    try:
        return text.cast(pa.float64()), None
    except pa.ArrowInvalid:
        is_number = pc.match_substring_regex(text, _NUMBER)
        wrong = pc.fill_null(pc.invert(is_number), False).to_numpy(zero_copy_only=False)
        unsigned = pc.replace_substring_regex(text, r"^\+", "")
        return pc.if_else(is_number, unsigned, None).cast(pa.float64()), wrong if wrong.any() else None


def plain_numbers(column: pa.Array, words: Words) -> pa.Array | None:
    """Text as float64, if there is nothing else in it: not a mark, not a word, not a missing value; else None."""
    if words != Words() or column.null_count:  # a word may look like a number: -999
        return None
    try:
        found = column.cast(pa.float64())
    except pa.ArrowInvalid:
        return None
    return None if pc.any(pc.is_nan(found)).as_py() else found


def booleans(column: pa.Array, words: Words) -> pa.Array | None:
    """Text as uint8 with null where a value is missing, if all of it is `true` or `false` in any case; else None."""
    text = pc.utf8_trim_whitespace(column.cast(pa.large_string()))
    missing = pc.or_(pc.is_null(text), pc.is_in(text, pa.array(words.missing, pa.large_string())))
    found = pc.index_in(pc.utf8_lower(text), pa.array(["false", "true"], pa.large_string())).cast(pa.uint8())
    return found if pc.all(pc.or_(missing, found.is_valid())).as_py() is not False else None


class TextColumn:
    """What is to be known of a column of text, batch by batch."""

    def __init__(self, words: Words):
        self._words = words
        self.values = self.numbers = 0  # that are not missing; and that are numbers
        self._alike = 0  # that are none, but would be with other marks: 1.234,5
        self.all_booleans = self.plain = True  # plain: see `plain_numbers`
        self.first: str | None = None
        self.no_number: tuple[str, str] | None = None  # the first value that is none, and where it is

    def add(self, column: pa.Array, at: At) -> None:
        if not len(column):
            return
        found = plain_numbers(column, self._words) if self.plain else None
        wrong = None
        if found is None:
            self.plain = False
            found, wrong = numbers(column, self._words)
        is_number = len(column) - found.null_count
        others = 0 if wrong is None else int(wrong.sum())
        if wrong is not None and self.no_number is None:
            row = int(wrong.argmax())
            self.no_number = (column[row].as_py(), at(row))
        if wrong is not None:
            no_numbers = column.filter(pa.array(wrong))
            self._alike += pc.match_substring_regex(no_numbers, _LOOKS_LIKE_NUMBER).true_count
        self.values += is_number + others
        self.numbers += is_number
        if self.first is None and is_number + others:
            there = found.is_valid().to_numpy(zero_copy_only=False)
            self.first = column[int((there if wrong is None else there | wrong).argmax())].as_py()
        if is_number or (others and self.all_booleans and booleans(column, self._words) is None):
            self.all_booleans = False

    @property
    def kind(self) -> str:
        """`empty`, `number`, `bool`, `mixed` (half of the values look like numbers, but not all are) or `text`."""
        if not self.values:
            return "empty"
        if self.numbers == self.values:
            return "number"
        if self.all_booleans:
            return "bool"
        return "mixed" if 2 * (self.numbers + self._alike) >= self.values else "text"
