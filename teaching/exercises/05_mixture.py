"""The mixture's order.                                                         about 45 minutes

The idea. A stage mixes domains: 30% code, 30% books, and so on. To draw them at random would hold
the shares only on average, and a run that stops and goes on would need the random state. We want
an order that anybody can compute, in which after *every* draw each domain has had its share, to
within one: after n draws a domain with share s has had more than s * n - 1 and less than s * n + 1.

One such rule, for draw number n: among the domains that have had less than s * n, take the one
whose next sequence is due first. The k-th sequence of a domain is due at draw k / s.

    shares a 3/4, b 1/4

    draw   had        behind (had < s * draw)          next is due at      taken
    1      a 0, b 0   a (0 < 0.75), b (0 < 0.25)       a 1.33, b 4         a
    2      a 1, b 0   a (1 < 1.5),  b (0 < 0.5)        a 2.67, b 4         a
    3      a 2, b 0   a (2 < 2.25), b (0 < 0.75)       a 4, b 4            a, named first
    4      a 3, b 0   b (0 < 1); a is not: 3 = 3       b 4                 b

The whole state is `drawn`: with it the order goes on where it stopped.

Shapes. shares {name: share}, which need not add up to 1; drawn {name: how many it has given}.

Hints. Compare with a little tolerance (1e-9), since 0.1 + 0.2 is not 0.3 in floating point. A share
may be 0. The grader takes every order that keeps the shares to within one, not only this one.

Read: ProLong 3.2 and A.2. Grade: python teaching/grade.py 05
"""

from __future__ import annotations


def next_domains(shares: dict[str, float], drawn: dict[str, int], n: int) -> list[str]:
    """The names of the next n draws, if `drawn` says what has been drawn before."""
    raise NotImplementedError
