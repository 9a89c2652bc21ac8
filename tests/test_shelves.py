"""experiments/shelf_*.py: each method's defining equality."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
import shelf_machines as machines


@pytest.fixture(scope="module")
def steps():
    rng = np.random.default_rng(7)
    return [machines.draw_step(rng) for _ in range(20)]


@pytest.mark.parametrize("gpus", machines.GPUS)
def test_no_way_beats_equal_work_and_own_degrees_never_lose(steps, gpus):
    """With eight GPUs there is nothing to wait for. Equality is within rounding."""
    for sequences in steps:
        times = {name: way(sequences, gpus) for name, way in machines.WAYS.items()}
        assert min(times.values()) >= times["equal"] * (1 - 1e-9)
        assert times["degrees"] <= min(times["drawn"], times["own"], times["sorted"]) * (1 + 1e-9)
        if gpus == machines.GROUP:
            assert max(times.values()) <= times["equal"] * (1 + 1e-9)


def test_a_step_by_hand():
    """Two groups: a document of 512K beside a pack of short ones, twice, or sorted like by like."""
    long, short = (machines.data.PackedSequence(np.empty(0, np.uint32), lens)
                   for lens in ((2**19,), (1024,) * 512))
    a, b = machines.cost(long.doc_lens) / 8, machines.cost(short.doc_lens) / 8
    assert machines.time_as_drawn([long, short, short, long], 16) == 2 * a
    assert machines.time_own([long, short, short, long], 16) == pytest.approx(b + a)
    assert machines.time_sorted([long, short, short, long], 16) == pytest.approx(b + a)


def test_what_is_sent_by_hand():
    """Llama-3-8B on 8 ranks, a layer: 65,536 tokens a rank, 7/8 of 80 heads of 256 bytes."""
    assert machines.gib_sent("ulysses", 8, 2**19) == 65_536 * 80 * 256 * 7 / 8 / 2**30
    assert machines.gib_sent("ring", 8, 2**19) == 7 * 65_536 * 16 * 256 / 2**30
    assert machines.idle("ring", 8) == 7 / 16 and machines.idle("zigzag", 8) == 0
