"""When no exchange is needed.                                                  about 15 minutes

The idea. The exchange of exercise 7 costs time in every layer. If no document lies on two ranks,
each rank can attend to its own tokens alone, and nothing needs to be sent.

    doc_lens (2, 2, 4) over 2 ranks       a a b b || c c c c       False: the border lies between
    doc_lens (1, 6, 1) over 2 ranks       a b b b || b b b c       True: b lies on both

Public code has asked whether a document is *longer* than a rank's share. Find a sequence in which
none is, and yet one lies on two ranks.

Shapes. doc_lens, which adds up to S, and P ranks with S/P tokens each -> bool.

Hints. There are P - 1 borders between ranks. At each of them a document must end.

Read: ProLong A.2. Grade: python teaching/grade.py 08
"""

from __future__ import annotations

from collections.abc import Sequence


def needs_exchange(doc_lens: Sequence[int], ranks: int) -> bool:
    """Whether any document lies on more than one of the equal shares."""
    raise NotImplementedError
