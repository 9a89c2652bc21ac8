"""What is traded for memory changes no number, and saves what it says.

Gradients are compared in float64, to 1e-12 of their norm. Memory is counted, not timed: the peak of all live
tensors while one forward and backward run.
"""

from itertools import accumulate

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from model import (
    IGNORE_INDEX,
    Block,
    HostOffload,
    MemoryOptions,
    ModelConfig,
    RMSNorm,
    Transformer,
    apply_rope,
    cut_pack,
)

CONFIG = ModelConfig(vocab_size=61, dim=24, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=6, ffn_dim=40,
                     max_seq_len=64)
DOC_LENS = (5, 17, 1, 9, 9, 22)  # 63 tokens: no tile or chunk divides them
LEVERS = {
    "chunked loss": MemoryOptions(loss_chunk_tokens=10),
    "recompute": MemoryOptions(0, "recompute"),
    "tiles": MemoryOptions(0, "keep", 16),
    "recompute, tiles": MemoryOptions(10, "recompute", 16),
    "offload": MemoryOptions(0, "offload"),
    "all": MemoryOptions(10, "offload", 16),
}


def loss_and_gradients(levers, labels_kept=slice(None), compiled=False):
    """One forward and backward in float64: (loss, {name: gradient})."""
    model = Transformer(CONFIG).init_weights(0).double()
    model.set_memory_options(levers, torch.device("cpu"))
    if compiled:
        model.compile_blocks()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(CONFIG.vocab_size, (sum(DOC_LENS),), generator=generator)
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[labels_kept] = ids.roll(-1)[labels_kept]
    loss, valid = model.loss(ids, labels, DOC_LENS)
    (loss / valid).backward()
    return float(loss.detach()), {name: weight.grad for name, weight in model.named_parameters()}


def cut_into_spans(monkeypatch, most):
    """Spans of at most so many tokens, or one document."""
    monkeypatch.setattr("model.CPU_SPAN_BYTES", most * CONFIG.dim * 8)  # float64


def assert_same(found, wanted):
    assert found[0] == pytest.approx(wanted[0], rel=1e-12)
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-12 * gradient.norm(), name


@pytest.mark.parametrize("name", LEVERS)
@pytest.mark.parametrize("labels_kept", [slice(None), slice(45, 50)], ids=["all", "masked_chunks"])
def test_levers_change_no_number(name, labels_kept):
    """With labels in a single chunk, the others have nothing to add: exactly 0, not NaN."""
    assert_same(loss_and_gradients(LEVERS[name], labels_kept),
                loss_and_gradients(MemoryOptions(loss_chunk_tokens=0), labels_kept))


@pytest.mark.parametrize("most", [1, 10, 27, 62])
@pytest.mark.parametrize("name", ["recompute", "all"])
def test_spans_of_documents_change_no_number(monkeypatch, name, most):
    """Documents of 5, 17, 1, 9, 9, 22 tokens: spans of one each, some of several, the last alone."""
    whole = loss_and_gradients(MemoryOptions(loss_chunk_tokens=0))
    cut_into_spans(monkeypatch, most)
    assert_same(loss_and_gradients(MemoryOptions()), whole)
    assert_same(loss_and_gradients(LEVERS[name]), whole)


@pytest.mark.parametrize("tile, calls", [(0, 5), (16, 2 * 7), (60, 2 * 5), (63, 5)])
def test_tiles_are_recomputed_inside_spans(monkeypatch, tile, calls):
    """Spans of 5, 17, 10, 9, 22 tokens: 7 tiles of at most 16. A tile as long as the pack saves nothing."""
    cut_into_spans(monkeypatch, 10)
    seen, original = [], Block.after_attention
    monkeypatch.setattr(Block, "after_attention", lambda *args: seen.append(args) or original(*args))
    loss_and_gradients(MemoryOptions(0, "keep", tile))
    assert len(seen) == CONFIG.n_layers * calls


@pytest.mark.parametrize("most, wanted", [(1, (1,) * 6), (10, (1, 1, 2, 1, 1)), (23, (3, 2, 1)), (63, (6,))])
def test_a_pack_is_cut_between_documents(most, wanted):
    cu_seqlens = torch.tensor([0, *accumulate(DOC_LENS)], dtype=torch.int32)
    cuts = cut_pack(cu_seqlens, most)
    assert tuple(len(cut) - 1 for cut in cuts) == wanted
    assert torch.cat([cut.diff() for cut in cuts]).tolist() == list(DOC_LENS)
    assert all(cut[0] == 0 and cut.dtype == cu_seqlens.dtype for cut in cuts)


@pytest.mark.slow
def test_compiled_blocks_change_no_number(monkeypatch):
    """Compiled, alone, recomputed, and in spans: float64, where reordered sums agree to 1e-12."""
    plain = loss_and_gradients(MemoryOptions())
    assert_same(loss_and_gradients(MemoryOptions(), compiled=True), plain)
    assert_same(loss_and_gradients(MemoryOptions(10, "recompute", 16), compiled=True), plain)
    cut_into_spans(monkeypatch, 10)
    assert_same(loss_and_gradients(MemoryOptions(10, "recompute", 16), compiled=True), plain)


@pytest.mark.slow
def test_other_document_lengths_compile_nothing_anew():
    model = Transformer(CONFIG).init_weights(0)
    model.compile_blocks()
    compiled = []
    for doc_lens in (DOC_LENS, (40, 23), (1,) * 63, (63,), (64, 64)):  # the last has more tokens, too
        ids = torch.zeros(sum(doc_lens), dtype=torch.long)
        model.loss(ids, ids, doc_lens)[0].backward()
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert compiled[0] > 0 and compiled == compiled[:1] * len(compiled)


def test_offloaded_inputs_come_back_whole_in_any_order():
    """Stored tensors of several shapes are fetched backwards, as backward does, and again out of order."""
    offload = HostOffload(torch.device("cpu"))
    for round in range(2):  # the second round uses the first one's buffers
        offload.saving()
        kept = [torch.randn(4, 3 + i) for i in range(3)]
        places = [offload._store(x) for x in kept]
        copies = [x.clone() for x in kept]
        for x in kept:
            x.fill_(round)  # what was saved is not a view of it
        for i in (2, 1, 0, 2):
            assert torch.equal(offload._fetch(places[i]), copies[i])
    assert len(offload.buffers) == 3


def peak_mib(levers, tokens=4096):
    """Peak of live tensors in a forward and backward, without weights and their gradients."""
    config = ModelConfig(vocab_size=4096, dim=64, n_layers=8, n_heads=4, n_kv_heads=2, head_dim=16,
                         ffn_dim=1024, max_seq_len=tokens)
    model = Transformer(config).init_weights(0)
    model.set_memory_options(levers, torch.device("cpu"))
    ids = torch.zeros(tokens, dtype=torch.long)
    weights = sum(p.numel() * 4 for p in model.parameters())
    with MemTracker() as tracker:
        loss, _ = model.loss(ids, ids, (512,) * (tokens // 512))
        loss.backward()
    return (tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] - weights) / 2**20


def test_each_lever_saves_memory():
    """Logits are 64 MiB, and their gradients; SwiGLU keeps 64 MiB a block; a block's input is 1 MiB."""
    plain = peak_mib(MemoryOptions(loss_chunk_tokens=0))
    chunked = peak_mib(MemoryOptions(loss_chunk_tokens=256))
    recomputed = peak_mib(MemoryOptions(256, "recompute"))
    tiled = peak_mib(MemoryOptions(256, "recompute", 512))
    print(f"\n{plain:.0f}; loss in chunks {chunked:.0f}; recompute {recomputed:.0f}; tiles {tiled:.0f} MiB")
    assert plain - chunked > 128 and recomputed < chunked / 4 and tiled < recomputed / 2


def test_an_unknown_lever_is_refused():
    with pytest.raises(ValueError, match="choose keep, recompute or offload"):
        MemoryOptions(activations="disk")


@pytest.mark.parametrize("shape", [(7, 24), (5, 3, 24)])
def test_norm_and_its_gradients_are_pytorchs(shape):
    """Ours keeps less; the function is the same, to 1e-12 in float64 and to rounding in bfloat16."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ours, theirs = RMSNorm(24, eps=1e-5).double(), torch.nn.RMSNorm(24, eps=1e-5).double()
    for norm in (ours, theirs):
        torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((ours(x) * weights).sum(), (x, ours.weight))
    wanted = torch.autograd.grad((theirs(x) * weights).sum(), (x, theirs.weight))
    for a, b in zip((ours(x), *found), (theirs(x), *wanted), strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()
    half = x.detach().bfloat16()
    assert torch.allclose(ours.bfloat16()(half), theirs.bfloat16()(half), rtol=2**-7)


def test_gradient_of_a_rotation_is_the_rotation_back():
    angles = torch.rand(7, 1, 3, dtype=torch.float64)
    x = torch.randn(7, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, angles.cos(), angles.sin()), (x,))
