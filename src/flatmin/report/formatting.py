"""Numbers, lists and counts as a reader wants to see them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, in plain notation where that is readable.

    >>> [significant(v) for v in (0.012345, -1234.5, 2e-7, float("nan"))]
    ['0.0123', '−1234', '2.00e-07', 'nan']
    """
    if not math.isfinite(value) or value == 0:
        return minus(f"{value:g}")
    if not 1e-4 <= abs(value) < 1e6:
        return minus(f"{value:.{digits - 1}e}")
    return minus(f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}")


def supported(value: float, *errors: float) -> str:
    """A number with the digits that the first known error supports, two of the error's own and at most six in all.

    >>> supported(0.735055, 1.2e-7, 0.08), supported(0.000678, float("nan"), 0.00022), supported(3.14159)
    ('0.735055', '0.00068', '3.14')
    """
    error = next((e for e in errors if math.isfinite(e) and e > 0), 0.0)
    if not (math.isfinite(value) and value and error):
        return significant(value)
    digits = math.floor(math.log10(abs(value))) - math.floor(math.log10(error)) + 2
    return significant(value, min(max(digits, 1), 6))


def error_of(value: float) -> str:
    """A standard error or a residual, with two digits; "" where there is none."""
    return significant(value, 2) if math.isfinite(value) else ""


def with_error(value: float, error: float) -> str:
    """``value ± error``; the value alone where there is no error.

    >>> with_error(0.0331, 0.11), with_error(0.145, 0.0)
    ('0.03 ± 0.11', '0.145')
    """
    return supported(value, error) + (f" ± {error_of(error)}" if error > 0 and math.isfinite(error) else "")


def signed(text: str) -> str:
    """A number that is a difference, with its sign also where it rises."""
    return text if text == "0" or text[0] in "−n" else f"+{text}"


def minus(text: str) -> str:
    """A minus sign in front of a negative number, not a hyphen."""
    return "−" + text[1:] if text.startswith("-") else text


def total(parts: Sequence[str]) -> str:
    """Numbers as a sum.

    >>> total(["0.008", "−0.0001"])
    '0.008 − 0.0001'
    """
    return " + ".join(parts).replace("+ −", "− ")


def joined(items: Sequence[str]) -> str:
    """A list in words."""
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else "".join(items)


def count(n: int, noun: str) -> str:
    """A number of things.

    >>> count(1, "seed"), count(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{n} {noun}{'' if n == 1 else 's'}"


def printable(text: object) -> str:
    """Text without control characters."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "�" for c in str(text))
