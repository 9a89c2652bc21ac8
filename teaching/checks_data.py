"""The checks of what happens to data: exercises 01, 02, 04, 05, 08 and 10."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from teaching.parts import (
    LETTERS,
    Exercise,
    Function,
    Part,
    Raised,
    compare_rows,
    compositions,
    draw_documents,
    each,
    packs,
    random_doc_lens,
    show,
    side_by_side,
    with_bars,
)

# --- 01: positions, labels, cu_seqlens --------------------------------------------------

Layout = tuple[tuple[int, ...], tuple[int, ...]]  # doc_lens; places that are not trained on


def layout_cases() -> list[Layout]:
    rng = random.Random(1)
    masked = [(lens, tuple(sorted(rng.sample(range(sum(lens)), sum(lens) // 3))))
              for lens in packs() if sum(lens) > 2]
    return [(lens, ()) for lens in packs()] + masked


def tokens_of(doc_lens: tuple[int, ...]) -> Tensor:
    return torch.arange(10, 10 + sum(doc_lens))  # (S,)


def call_layout(function: Function, case: Layout) -> tuple[Any, ...]:
    doc_lens, untrained = case
    loss_mask = None
    if untrained:
        loss_mask = torch.ones(sum(doc_lens), dtype=torch.bool)
        loss_mask[list(untrained)] = False
    positions, labels, cu_seqlens = function(tokens_of(doc_lens), doc_lens, loss_mask)
    return positions, labels, cu_seqlens


def draw_layout(case: Layout) -> str:
    doc_lens, untrained = case
    ids = with_bars(tokens_of(doc_lens).tolist(), doc_lens)
    text = f"{draw_documents(doc_lens)}\nids       {ids}"
    if untrained:
        trained = ["-" if i in untrained else "x" for i in range(sum(doc_lens))]
        text += f"\nloss_mask {with_bars(trained, doc_lens)}"
    return text


def layout_part(asks: str, points: int, index: int) -> Part:
    rows = index < 2  # positions and labels have a cell for each token
    return Part(asks, "layout", points, layout_cases,
                each(lambda function, case: call_layout(function, case)[index]), draw_layout,
                (lambda case, *both: compare_rows(case[0], *both)) if rows else side_by_side)


Share = tuple[tuple[int, ...], int, int]  # doc_lens, rank, ranks


def share_cases() -> list[Share]:
    lens = [*compositions(2), *compositions(4), *compositions(6),
            *(random_doc_lens(random.Random(i), 24) for i in range(6))]
    return [(each, rank, ranks) for each in lens for ranks in (2, 4) if sum(each) % ranks == 0
            for rank in range(ranks)]


def draw_share(case: Share) -> str:
    doc_lens, rank, ranks = case
    owner = [i * ranks // sum(doc_lens) for i in range(sum(doc_lens))]
    ids = with_bars(tokens_of(doc_lens).tolist(), doc_lens)
    return (f"{draw_documents(doc_lens)}\nids       {ids}\nrank      {with_bars(owner, doc_lens)}\n"
            f"asked     rank {rank} of {ranks}: ids, labels, positions")


def compare_share(case: Share, yours: Any, right: Any) -> str:
    """Ids, labels and positions below each other."""
    rows = zip(("ids", "labels", "positions"), yours, right, strict=False)
    return "\n".join(f"{name:<10}yours {show(a)}, right {show(b)}" for name, a, b in rows)


LAYOUT = Exercise("01", "positions, labels and cu_seqlens", (
    layout_part("positions begin again at 0 in every document", 2, 0),
    layout_part("labels are the next token of the same document, where it is trained on", 3, 1),
    layout_part("cu_seqlens has every document's end", 2, 2),
    Part("a rank's share of ids, labels and positions is cut from the whole", "share", 3,
         share_cases, each(lambda function, case: list(function(tokens_of(case[0]), *case))),
         draw_share, compare_share)))

# --- 02: the document mask --------------------------------------------------------------


def ends_of(doc_lens: tuple[int, ...]) -> Tensor:
    return torch.tensor((0, *doc_lens)).cumsum(0).int()  # (N + 1,)


def compare_masks(case: Any, yours: Any, right: Tensor) -> str:
    """Both masks as squares: the row looks at the column."""
    yours = torch.as_tensor(yours)
    if yours.shape != right.shape:
        return f"yours  has shape {tuple(yours.shape)}\nright  has shape {tuple(right.shape)}"
    width, lines = max(5, 2 * len(right) - 1), []
    for row, wanted in zip(yours.tolist(), right.tolist(), strict=True):
        squares = [" ".join("x" if x else "." for x in cells) for cells in (row, wanted)]
        lines.append(f"{squares[0]:<{width}}    {squares[1]}")
    return "\n".join([f"{'yours':<{width}}    right", *lines])


MASK = Exercise("02", "the document mask", (
    Part("a token looks at itself and what stands before it in its document", "document_mask", 10,
         packs, each(lambda function, lens: torch.as_tensor(function(ends_of(lens))).bool()),
         draw_documents, compare_masks),))

# --- 04: packing ------------------------------------------------------------------------

Packing = tuple[tuple[int, ...], int]  # lengths of documents, seq_len


def packing_cases() -> list[Packing]:
    lengths = [lens for n in (1, 2, 3) for lens in itertools.product((1, 2, 3, 5), repeat=n)]
    small = [(lens, seq_len) for lens in lengths for seq_len in (2, 3, 4)]
    rng = random.Random(4)
    large = [(tuple(rng.randint(1, 40) for _ in range(12)), rng.randint(4, 16)) for _ in range(6)]
    small.sort(key=lambda case: (sum(case[0]), len(case[0]), case[1]))
    return [*small, ((11, 3, 7, 4), 8), *large]


def call_packing(function: Function, case: Packing) -> list[tuple[list[int], tuple[int, ...]]]:
    lens, seq_len = case
    documents = [list(range(100 * i, 100 * i + n)) for i, n in enumerate(lens)]
    return [(torch.as_tensor(ids).tolist(), tuple(int(n) for n in doc_lens))
            for ids, doc_lens in function(documents, seq_len)]


def letter(token: int) -> str:
    name = LETTERS[token // 100 % len(LETTERS)]
    return name if token % 100 else name.upper()


def draw_packed(sequences: Any) -> str:
    return " || ".join(" ".join(letter(i) for i in ids) + f" {lens}" for ids, lens in sequences)


def draw_ids(sequences: Any) -> str:
    return " || ".join(" ".join(letter(i) for i in ids) for ids in sequences)


def draw_packing(case: Packing) -> str:
    lens, seq_len = case
    documents = [" ".join(letter(100 * i + j) for j in range(n)) for i, n in enumerate(lens)]
    return (f"documents  {' , '.join(documents)}      (a capital is a document's first token)\n"
            f"seq_len    {seq_len}")


def packing_part(function: str, asks: str, points: int, index: int | None = None) -> Part:
    def compare(case: Packing, yours: Any, right: Any) -> str:
        draw = (draw_packed, draw_ids, str)[0 if index is None else index + 1]
        return "\n".join(f"{name}      {draw(found) if found else '(no sequence)'}"
                         for name, found in (("yours", yours), ("right", right)))

    def look(answer: Function, case: Packing) -> Any:
        found = call_packing(answer, case)
        return found if index is None else [sequence[index] for sequence in found]

    return Part(asks, function, points, packing_cases, each(look), draw_packing, compare)


PACKING = Exercise("04", "pack_long, and pack_short with the carried tail", (
    packing_part("pack_long", "whole pieces of long documents, and nothing else", 4),
    packing_part("pack_short", "every token in its order, and a cut tail begins the next", 3, 0),
    packing_part("pack_short", "doc_lens of what is in the sequence, tails too", 3, 1)))

# --- 05: the mixture --------------------------------------------------------------------

Mix = tuple[dict[str, float], dict[str, int], int]  # shares, drawn, n


def fresh_mixes() -> list[Mix]:
    shares = [{"a": 1.0}, {"a": 1.0, "b": 1.0}, {"a": 3.0, "b": 1.0}, {"a": 1.0, "b": 0.0},
              {"a": 0.5, "b": 0.3, "c": 0.2}]
    rng = random.Random(5)
    shares += [{LETTERS[i]: rng.random() ** 4 for i in range(n)} for n in (4, 8, 12, 16, 20, 26)]
    return [(each, dict.fromkeys(each, 0), n) for each in shares for n in (1, 2, 5, 100)]


def begun_mixes() -> list[Mix]:
    """States that the right order passes through."""
    from teaching import reference

    mixes = []
    for shares, drawn, n in fresh_mixes():
        for begun in (1, 3, 50):
            given = Counter(reference.next_domains(shares, drawn, begun))
            mixes.append((shares, {name: given[name] for name in shares}, n))
    return mixes


def first_unfair(case: Mix, names: list[str]) -> str:
    """The first draw after which a domain has not had its share to within one, in words."""
    shares, drawn, n = case
    total, given, before = sum(shares.values()), Counter(drawn), sum(drawn.values())
    for i, name in enumerate(names, 1):
        given[name] += 1
        for domain, share in shares.items():
            due = share / total * (before + i)
            if abs(given[domain] - due) >= 1 + 1e-6:
                return (f"after draw {before + i}: {domain} has had {given[domain]}, "
                        f"its share is {due:.2f}")
            if share == 0 and given[domain]:
                return f"draw {before + i} is {domain}, whose share is 0"
    return "" if len(names) == n else f"{len(names)} names, where {n} were asked for"


def draw_mix(case: Mix) -> str:
    shares, drawn, n = case
    wanted = "  ".join(f"{name} {share:.3g}" for name, share in shares.items())
    before = "  ".join(f"{name} {drawn[name]}" for name in shares)
    return f"shares  {wanted}\ndrawn   {before}\nn       {n}"


def mix_part(asks: str, points: int, cases: Any) -> Part:
    def compare(case: Mix, yours: Any, right: Any) -> str:
        return (f"yours   {' '.join(yours[:30])}\nright   {' '.join(right[:30])} (or as fair)\n"
                + first_unfair(case, yours))

    def accept(case: Mix, yours: Any, right: Any) -> bool:
        names = isinstance(yours, list) and set(yours) <= set(case[0])
        return names and not first_unfair(case, yours)

    return Part(asks, "next_domains", points, cases,
                each(lambda function, case: function(dict(case[0]), dict(case[1]), case[2])),
                draw_mix, compare, accept)


MIXTURE = Exercise("05", "the mixture's order", (
    mix_part("after every draw each domain has had its share, to within one", 6, fresh_mixes),
    mix_part("it goes on where `drawn` says", 4, begun_mixes)))

# --- 08: when no exchange is needed -----------------------------------------------------

Crossing = tuple[tuple[int, ...], int]  # doc_lens, ranks


def crossing_cases() -> list[Crossing]:
    rng = random.Random(8)
    lens = [lens for n in (2, 3, 4, 6, 8) for lens in compositions(n)]
    lens += [(6, 4, 6), *(random_doc_lens(rng, 24) for _ in range(20))]
    return [(each, ranks) for each in lens for ranks in (1, 2, 3, 4, 8) if sum(each) % ranks == 0]


def draw_crossing(case: Crossing) -> str:
    doc_lens, ranks = case
    owner = [i * ranks // sum(doc_lens) for i in range(sum(doc_lens))]
    return f"{draw_documents(doc_lens)}\nrank      {with_bars(owner, doc_lens)}"


CROSSING = Exercise("08", "when no exchange is needed", (
    Part("true exactly if some document lies on two ranks", "needs_exchange", 10, crossing_cases,
         each(lambda function, case: bool(function(*case))), draw_crossing),))

# --- 10: sorting a step -----------------------------------------------------------------

Step = tuple[tuple[tuple[int, ...], ...], int, int]  # doc_lens of each sequence, dp_size, per_batch


def step_cases() -> list[Step]:
    four, one, two = (1, 1, 1, 1), (4,), (2, 2)
    cases: list[Step] = [((four, one), 2, 1), ((one, four, one, four), 2, 1),
                         ((one, four, one, four), 1, 2), ((two, (3, 1), four, one), 2, 1),
                         ((one, two, four, one, two, four, one, four), 2, 2)]
    rng = random.Random(10)
    for dp, per_batch, micro in ((2, 1, 4), (4, 1, 4), (2, 2, 3), (4, 2, 2)):
        lens = tuple(random_doc_lens(rng, 32) for _ in range(dp * per_batch * micro))
        cases.append((lens, dp, per_batch))
    return cases


def waiting(case: Step, dealt: Any) -> int:
    """What the slowest rank of every micro-step costs, added up."""
    costs = [sum(n * n for n in lens) for lens in case[0]]
    return sum(max(sum(costs[i] for i in part) for part in ranks) for ranks in dealt)


def well_dealt(case: Step, dealt: Any) -> bool:
    """Whether [micro-step][rank] holds per_batch sequences each, and every sequence once."""
    lens, dp_size, per_batch = case
    parts = [part for ranks in dealt for part in ranks]
    return (all(len(ranks) == dp_size for ranks in dealt)
            and all(len(part) == per_batch for part in parts)
            and sorted(i for part in parts for i in part) == list(range(len(lens))))


def draw_step(case: Step) -> str:
    lines = [f"{i:>3}  {lens!s:<24} cost {sum(n * n for n in lens)}"
             for i, lens in enumerate(case[0])]
    return "\n".join([*lines, f"dp_size {case[1]}, per_batch {case[2]}"])


def compare_steps(case: Step, yours: Any, right: Any) -> str:
    def row(name: str, dealt: Any) -> str:
        cost = f"   waits for {waiting(case, dealt)}" if well_dealt(case, dealt) else ""
        return f"{name}  {dealt}{cost}"
    return f"{row('yours', yours)}\n{row('right', right)}"


def step_part(asks: str, points: int, accept: Any) -> Part:
    return Part(asks, "arrange", points, step_cases,
                each(lambda function, case: [[[int(i) for i in part] for part in ranks]
                                             for ranks in function(list(case[0]), *case[1:])]),
                draw_step, compare_steps,
                lambda case, yours, right: not isinstance(yours, Raised | Exception)
                and well_dealt(case, yours) and accept(case, yours, right))


SORTING = Exercise("10", "sorting a step", (
    step_part("every sequence once, dealt to [micro-step][rank]", 4, lambda *_: True),
    step_part("ranks side by side have like costs", 6,
              lambda case, yours, right: waiting(case, yours) <= waiting(case, right))))

EXERCISES = [LAYOUT, MASK, PACKING, MIXTURE, CROSSING, SORTING]
