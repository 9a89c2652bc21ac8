"""pack_long, and pack_short with the carried tail.                             about 60 minutes

The idea. A sequence has exactly seq_len tokens; documents have any number. Long documents are cut
into whole pieces, and what is too short is dropped: a long sequence should be one document. Short
ones are laid end to end, and what a cut leaves over begins the next sequence. Documents a (11
tokens), b (3), c (7) and d (4), in sequences of 8:

    long     a a a a a a a a                        doc_lens (8,); a's last 3, and b, c, d, are gone

    short    a a a a a a a a | a a a b b b c c | c c c c c d d d       the last d waits for more
             (8,)              (3, 3, 2)         (5, 3)

What still waits when the documents end is not a whole sequence, and is left out. A piece of a
document counts as a document in doc_lens: the model cannot see the part before the cut. No piece
is empty. A long document is cut from its begin: 0 to seq_len, seq_len to 2 seq_len, and so on.

Shapes. documents: lists of token ids. Returns a list (or yields) of (ids, doc_lens), where ids are
seq_len token ids, and doc_lens adds up to seq_len.

Hints. For pack_short keep the pieces of the sequence that you are filling, and the room that is
left. A document may be longer than several sequences. Do not look for begin-of-text tokens: a
carried tail has none.

Read: ProLong 3 and A.2. Grade: python teaching/grade.py 04
"""

from __future__ import annotations

from collections.abc import Iterable

Packed = tuple[list[int], tuple[int, ...]]  # ids of a sequence, and its doc_lens


def pack_long(documents: list[list[int]], seq_len: int) -> Iterable[Packed]:
    """Cut documents into pieces of exactly seq_len tokens, each a sequence of its own."""
    raise NotImplementedError


def pack_short(documents: list[list[int]], seq_len: int) -> Iterable[Packed]:
    """Lay documents end to end and cut every seq_len tokens; a tail begins the next sequence."""
    raise NotImplementedError
