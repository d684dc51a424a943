"""What a user sees when an input is wrong: one line, the name, the value, the remedy.

Every check of this project raises `InputError`. The command line prints its message alone and exits with code 2;
a library user catches it as the `ValueError` it is.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """An argument, a field or a file is not what the formula needs; the message says which, and what to do."""


FEW = 12
"""so many names can be read at a glance; of more, only the nearest are shown"""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a misspelled name: it suggests the nearest three, and lists all where they are few.

    >>> print(unknown_name("baseline", "oppb", ["zero", "opob"]))
    baseline: unknown name 'oppb'; did you mean 'opob'? known: opob, zero
    >>> print(unknown_name("letter", "ab", [x + y for x in "abc" for y in "vwxyz"]))
    letter: unknown name 'ab'; did you mean 'bz', 'by' or 'bx'? (15 are known)
    """
    options = sorted(known)
    if not options:
        return InputError(f"{kind}: unknown name {name!r}; there are none")
    near = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    near = near or [x for x in options if x.lower() == name.lower()]
    hint = f"did you mean {either(near)}? " if near else ""
    if len(options) <= FEW:
        return InputError(f"{kind}: unknown name {name!r}; {hint}known: {', '.join(options)}")
    if not near:
        hint = f"nearest: {either(difflib.get_close_matches(name, options, n=3, cutoff=0.0))} "
    return InputError(f"{kind}: unknown name {name!r}; {hint}({len(options)} are known)")


def either(names: Iterable[str]) -> str:
    """Names in quotes, as a choice.

    >>> print(either(["a", "b", "c"]))
    'a', 'b' or 'c'
    """
    *rest, last = map(repr, names)
    return f"{', '.join(rest)} or {last}" if rest else last
