"""experiments/neighbours.py: a transform moves tokens; it loses none, and makes those it names."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import model
from data import Document, Mixture, PackedDataset, PackReport
from experiments import neighbours
from support import toy

TOKENIZER = data.load_tokenizer()
HEAD, NAMES = TOKENIZER.special_id(neighbours.HEAD), TOKENIZER.special_id(neighbours.NAMES)


def documents_of(rng, lengths):
    """Random bytes, every document with a random mask."""
    return [Document(rng.integers(256, size=n).astype(np.uint32), rng.random(n) < 0.5)
            for n in lengths]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(8, 60), min_size=1, max_size=5), st.integers(0, 2**32))
def test_a_knot_holds_its_documents(lengths, seed):
    """A document's tokens stand in the knot in order, with their masks; all else are names."""
    rng = np.random.default_rng(seed)
    documents = documents_of(rng, lengths)
    for i, document in enumerate(documents):  # no letters; the last three bits say whose they are
        document.input_ids[:] = 128 + i + 8 * rng.integers(16, size=len(document))
    tied = neighbours.knot(documents, TOKENIZER, rng)
    for i, document in enumerate(documents):
        mine = (tied.input_ids >= 128) & (tied.input_ids < 256) & ((tied.input_ids - 128) % 8 == i)
        assert (tied.input_ids[mine] == document.input_ids).all()
        assert (tied.loss_mask[mine] == document.loss_mask).all()
    cut = [tied.input_ids == HEAD, tied.input_ids == NAMES]
    letters = (tied.input_ids >= ord("a")) & (tied.input_ids <= ord("z"))
    assert letters.sum() == 4 * cut[0].sum()  # each name twice: at its chunk and at the end
    assert len(tied) == sum(lengths) + cut[0].sum() + cut[1].sum() + letters.sum()
    assert not tied.loss_mask[cut[0] | cut[1]].any()


def test_a_knot_names_its_chunks_in_order():
    """Where a document ends, the names of its chunks stand in their order, and they are trained."""
    document = Document(np.full(100, 200, np.uint32))
    tied = neighbours.knot([document], TOKENIZER, np.random.default_rng(1))
    ids = tied.input_ids.tolist()
    heads = [i for i, token in enumerate(ids) if token == HEAD]
    names = [token for i in heads for token in ids[i + 1:i + 3]]
    assert len(heads) > 1 and ids[ids.index(NAMES) + 1:] == names
    assert tied.loss_mask[ids.index(NAMES) + 1:].all()
    assert not tied.loss_mask[[h + 1 for h in heads]].any()


def test_chunks_are_shuffled():
    """Chunks of two documents come in different orders, and others come between those of one."""
    rng = np.random.default_rng(0)
    documents = [Document(np.full(50, i, np.uint32)) for i in range(2)]
    seen = Counter()
    for _ in range(100):
        ids = neighbours.knot(documents, TOKENIZER, rng).input_ids
        ids = ids[ids < 2]
        seen[int((np.diff(ids.astype(int)) != 0).sum())] += 1  # how often the document changes
    assert len(seen) >= 4 and max(seen) >= 3


def test_knots_fill_the_length_and_hold_one_that_asks():
    rng = np.random.default_rng(0)
    asked = iter([Document(np.full(10, 300, np.uint32))] * 20)
    others = (Document(np.full(rng.integers(1, 90), 7, np.uint32), None) for _ in range(1000))
    made = neighbours.knots(asked, others, 256, TOKENIZER, rng)
    for _ in range(20):
        tied = next(made)
        assert len(tied) == 256 and (tied.input_ids == 300).sum() == 10  # nothing of it is lost
    sequence = neighbours.make_knots(TOKENIZER, 2048, 7, 0)[6]  # recall of 512, after 128s and 256s
    questions = sequence.input_ids == toy.QUESTION
    assert questions.sum() == 16 and 4 * 16 <= sequence.loss_mask.sum() <= 4 * 16 + 2 * 4
    assert not sequence.loss_mask[questions].any()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(0, 4))
def test_decomposed_pieces_are_the_document(n, k):
    document = Document(np.arange(n, dtype=np.uint32))
    pieces = list(neighbours.decompose(document, 2**k, 64))
    whole = np.concatenate([p.input_ids for p in pieces]) if pieces else np.zeros(0, np.uint32)
    assert (whole == np.arange(len(whole))).all() and n - len(whole) < 2**k
    assert all(len(p).bit_count() == 1 and 2**k <= len(p) <= 64 for p in pieces)
    below = Counter(len(p) for p in pieces if len(p) < 64)
    assert set(below.values()) <= {1}  # of each smaller size one at most, as in a binary number


def test_curriculum_goes_from_short_to_long():
    rng = np.random.default_rng(0)
    lengths = [size for size in (4, 8, 16, 32, 64) for _ in range(3840 // size)]  # 60 packs of each
    documents = documents_of(rng, rng.permutation([n + int(rng.integers(4)) for n in lengths]))
    order = neighbours.length_curriculum(documents, 64, 4, 2, np.random.default_rng(1))
    sizes = [s.doc_lens[0] for s in order]
    assert [set(s.doc_lens) for s in order] == [{size} for size in sizes]
    assert {size: sizes.count(size) for size in sizes} == dict.fromkeys((4, 8, 16, 32, 64), 60)
    for cycle in (sizes[:150], sizes[150:]):
        assert np.mean(cycle[:50]) < 0.5 * np.mean(cycle[-50:])


def test_a_mixture_draws_a_pack_in_the_order_given(tmp_path):
    sequences = [data.PackedSequence(np.full(8, i, np.uint32), (8,)) for i in range(20)]
    placed = neighbours.in_drawing_order(sequences, "ordered", seed=3)
    data.write_packed(tmp_path / "ordered", placed, TOKENIZER, 8, "ordered", 3, PackReport())
    mixture = Mixture({"ordered": PackedDataset(tmp_path / "ordered")}, {"ordered": 1.0}, seed=3)
    assert [int(s.input_ids[0]) for s in mixture.draw(20)] == list(range(20))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 2**32))
def test_skipped_positions(lens, seed):
    """In each document positions grow by 1 but for one jump at most, and stay below the target."""
    positions = torch.cat([torch.arange(n) for n in lens])
    skipped = neighbours.skip_positions(positions, 64, np.random.default_rng(seed))
    for n, part in zip(lens, skipped.split(lens), strict=True):
        steps = part.diff()
        assert part.max() < 64 and (steps >= 1).all() and (steps > 1).sum() <= 1
        assert n < 2 or part[0] == 0


def test_skipped_positions_reach_the_target():
    """Over many documents every distance up to the target is met."""
    positions = torch.arange(16).repeat(2000)
    skipped = neighbours.skip_positions(positions, 64, np.random.default_rng(0)).view(2000, 16)
    spans = skipped[:, -1] - skipped[:, 0]
    assert spans.min() == 15 and spans.max() == 63 and len(spans.unique()) == 49


def small_model():
    return model.Transformer(model.preset_config("tiny", 300)).init_weights(0).double()


@pytest.mark.parametrize("what, groups", [("documents", (3, 5, 4, 12)), ("sequences", (12, 12))])
def test_averages(what, groups):
    """Loss and gradients of the formula: the mean, over groups with a label, of each one's mean."""
    torch.manual_seed(0)
    doc_lens = (3, 5, 4, 12)
    ids, labels = torch.randint(300, (24,)), torch.randint(300, (24,))
    # the first document has no label at all
    labels[:3] = labels[5:8] = labels[14:] = data.IGNORE_INDEX
    net = small_model()
    loss_sum, valid = neighbours.average_by(what, 12)(net, ids, labels, doc_lens)
    (loss_sum / valid).backward()
    found = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    losses = F.cross_entropy(net.logits(ids, doc_lens), labels, reduction="none")
    means = [part[target >= 0].mean() for part, target in
             zip(losses.split(groups), labels.split(groups), strict=True) if (target >= 0).any()]
    wanted = sum(means) / len(means)
    wanted.backward()
    assert valid == (labels >= 0).sum()
    assert (loss_sum / valid).item() == pytest.approx(wanted.item(), rel=1e-12)
    for p, grad in zip(net.parameters(), found, strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-9, atol=1e-12)


def test_average_without_a_label_is_zero_and_has_a_gradient():
    net = small_model()
    ids, labels = torch.arange(12), torch.full((12,), data.IGNORE_INDEX)
    loss_sum, valid = neighbours.average_by("documents")(net, ids, labels, (12,))
    loss_sum.backward()
    assert loss_sum.item() == 0 and int(valid) == 0
    with pytest.raises(ValueError, match="documents or sequences"):
        neighbours.average_by("tokens")
