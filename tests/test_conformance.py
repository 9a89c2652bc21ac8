"""teaching/conformance: the truth is true, our step agrees with it, and every pack catches."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from teaching.conformance import check, make, mistakes, ours, reference
from teaching.conformance.packs import KNOWN, load_packs, load_weights

PACKS, TRUTHS = load_packs()
BY_NAME, WEIGHTS = {pack.name: pack for pack in PACKS}, load_weights()


def test_files_are_small_and_made_by_make():
    """Tokens and weights are drawn again, bit for bit; one truth of three is computed again."""
    assert sum(path.stat().st_size for path in KNOWN.iterdir()) <= 2e6
    for name, weights in WEIGHTS.items():
        assert make.make_weights(name).config == weights.config
        for key, tensor in make.make_weights(name).tensors.items():
            assert torch.equal(tensor, weights.tensors[key])
    assert [pack.name for pack in PACKS] == list(make.PLANS)
    for seed, pack in enumerate(PACKS):
        made, truth = make.make_pack(pack.name, seed), TRUTHS[pack.name]
        assert made.catches == pack.catches and made.doc_lens == pack.doc_lens
        assert torch.equal(made.input_ids, pack.input_ids)
        assert torch.equal(made.loss_mask, pack.loss_mask)
        if seed % 3 == 0:
            again, _ = make.truth_of(pack, WEIGHTS[pack.weights])
            assert again["valid_tokens"] == truth.valid_tokens
            assert again["loss"] == pytest.approx(truth.loss, rel=1e-12)
            assert again["grad_norms"] == pytest.approx(truth.grad_norms, rel=1e-10)


@pytest.mark.parametrize("name", ["fewer_kv_heads", "sft_border"])
def test_gradients_are_finite_differences(name):
    """Along a random direction of each parameter, by a central difference."""
    weights, gradients = WEIGHTS[BY_NAME[name].weights], TRUTHS[name].gradients
    pieces, rng, h = reference.pieces_of(BY_NAME[name]), np.random.default_rng(0), 1e-6
    assert gradients.keys() == weights.tensors.keys()
    for key, gradient in gradients.items():
        way = torch.from_numpy(rng.normal(size=tuple(gradient.shape)))
        moved = [{**weights.tensors, key: weights.tensors[key] + x * way} for x in (h, -h)]
        with torch.no_grad():
            ahead, behind = (reference.loss_of(t, weights.config, pieces).item() for t in moved)
        assert (ahead - behind) / (2 * h) == pytest.approx((gradient * way).sum().item(), rel=1e-6)


@pytest.mark.parametrize("adapter", [ours.run, ours.over_two_ranks])
def test_ours_agrees(adapter):
    rows = check.check(adapter)
    assert all(row.verdict == "ok" for row in rows), check.format_table(rows)


def test_every_pack_catches_its_mistake():
    """Positions that run on are no mistake, and are caught nowhere."""
    assert {name for names in mistakes.CAUGHT_BY.values() for name in names} == BY_NAME.keys()
    for mistake, names in mistakes.CAUGHT_BY.items():
        rows = check.check(partial(mistakes.run, mistake), only=names or ("straddle",))
        for row in rows:
            assert (row.verdict == "WRONG") == bool(names), (mistake, row)
            assert not names or max(row.loss, row.norm) > 1e-4


def test_what_is_missing_is_no_success():
    rows = check.check(lambda *_: ({"ones": 1.0}, {"ones": {}}), only=("ones", "no_end"))
    assert [row.verdict[:11] for row in rows] == ["not run", "no gradient"]
    assert math.isinf(check.relative(math.nan, 1.0)) and "0 of 2" in check.format_table(rows)


def test_transformers_fails_where_the_table_says():
    """Its best way in any version; in the table's version the others as often as it says."""
    transformers = pytest.importorskip("transformers")
    from teaching.conformance import hf
    page = (KNOWN.parent / "README.md").read_text()
    same = f"transformers {transformers.__version__}" in page
    for way, adapter in hf.WAYS.items() if same else [("run", hf.run)]:
        agree = sum(row.verdict == "ok" for row in check.check(adapter, 5e-6))
        assert f"| `{way}` | {agree} of 14 |" in page
