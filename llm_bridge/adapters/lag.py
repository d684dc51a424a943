"""Stale data on purpose: what a trainer generates waits in a queue until it is `lag` updates old.

A synchronous trainer generates with the parameters it is about to change. To see what an asynchronous one would see,
generate as ever, put the batch into a queue, and train on what comes out at the other end. While the queue fills
there is nothing old enough to train on. Serving the first batch again and again would make the first updates repeat
one another (an ESS of one batch where the log shows several); so these steps make *no* update:

    step            0  1  2  3  4  5        lag = 2
    generated at    0  0  0  1  2  3        version, the number of updates made so far
    trained on      -  -  0  0  0  1        the stamp of what comes out
    staleness       -  -  0  1  2  2        updates between generation and use: the lag from the lag-th update on
"""

from collections import deque
from typing import Any

from vcposim.errors import InputError


class LagQueue:
    """First in, first out, `lag` generations long. Raises `InputError` for a lag that is no integer >= 0."""

    def __init__(self, lag: int) -> None:
        if isinstance(lag, bool) or not isinstance(lag, int) or lag < 0:
            raise InputError(f"lag: {lag!r} is not an integer >= 0; it counts updates between generation and use")
        self.lag = lag
        self.waiting: deque[Any] = deque()

    def exchange(self, item: Any) -> tuple[Any, bool]:
        """Put in what was just generated, take out what was generated `lag` calls ago.

        (item itself, False) while there is no such thing: it stays in the queue, and nobody should learn from it yet.

        >>> queue = LagQueue(2)
        >>> [queue.exchange(x) for x in "abcd"]
        [('a', False), ('b', False), ('a', True), ('b', True)]
        """
        self.waiting.append(item)
        if len(self.waiting) <= self.lag:
            return item, False
        return self.waiting.popleft(), True
