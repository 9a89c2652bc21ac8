"""What is traded for memory (MemoryOptions) changes no number, and saves what it says."""

from collections import Counter

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode

from model import IGNORE_INDEX, Block, MemoryOptions, ModelConfig, Transformer

CONFIG = ModelConfig(vocab_size=61, dim=24, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=6,
                     ffn_dim=40, max_seq_len=64)
DOC_LENS = (5, 17, 1, 9, 9, 22)  # 63 tokens: no tile or chunk divides them
OPTIONS = {
    "chunked loss": MemoryOptions(loss_chunk_tokens=10),
    "attention": MemoryOptions(0, "attention"),
    "attention, tiles, chunks of heads": MemoryOptions(10, "attention", 16, 2),
    "recompute": MemoryOptions(0, "recompute"),
    "tiles": MemoryOptions(0, "keep", 16),
    "recompute, tiles": MemoryOptions(10, "recompute", 16),
    "offload": MemoryOptions(0, "offload"),
    "all": MemoryOptions(10, "offload", 16, 4),
}


def loss_and_gradients(options, labels_kept=slice(None), compiled=False):
    """One forward and backward in float64: (loss, {name: gradient})."""
    model = Transformer(CONFIG).init_weights(0).double()
    model.set_memory_options(options)
    if compiled:
        model.compile_blocks()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(CONFIG.vocab_size, (sum(DOC_LENS),), generator=generator)
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[labels_kept] = ids.roll(-1)[labels_kept]
    loss, valid = model.loss(ids, labels, DOC_LENS)
    (loss / valid).backward()
    return float(loss.detach()), {name: weight.grad for name, weight in model.named_parameters()}


def assert_same(found, wanted):
    """To 1e-12 of each gradient's norm."""
    assert found[0] == pytest.approx(wanted[0], rel=1e-12)
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-12 * gradient.norm(), name


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("labels_kept", [slice(None), slice(45, 50)], ids=["all", "masked_chunks"])
def test_options_change_no_number(name, labels_kept):
    """With labels in a single chunk, the others have nothing to add: exactly 0, not NaN."""
    assert_same(loss_and_gradients(OPTIONS[name], labels_kept),
                loss_and_gradients(MemoryOptions(loss_chunk_tokens=0), labels_kept))


@pytest.mark.parametrize("tile, calls", [(0, 1), (16, 2 * 4), (62, 2 * 2), (63, 1)])
def test_tiles_are_recomputed(monkeypatch, tile, calls):
    """Backward computes every tile again. A tile as long as the pack would save nothing."""
    seen, original = [], Block.after_attention
    monkeypatch.setattr(Block, "after_attention", lambda *args: seen.append(args)
                        or original(*args))
    loss_and_gradients(MemoryOptions(0, "keep", tile))
    assert len(seen) == CONFIG.n_layers * calls


@pytest.mark.parametrize("way, calls", [("keep", 1), ("attention", 1), ("recompute", 2)])
def test_attention_is_not_computed_again_where_it_is_kept(way, calls):
    """Counted where operators are computed, over a forward and a backward pass."""
    counts = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            counts[op.name().removeprefix("aten::")] += 1
            return op(*args, **(kwargs or {}))

    with Counting():
        loss_and_gradients(MemoryOptions(0, way))
    n_lengths = len(set(DOC_LENS))
    kernel = "_scaled_dot_product_flash_attention_for_cpu"
    assert counts[kernel] == CONFIG.n_layers * n_lengths * calls
    assert counts["silu"] == CONFIG.n_layers * (1 if way == "keep" else 2)


@pytest.mark.slow
def test_compiled_blocks_change_no_number():
    """Compiled, alone and recomputed: float64, where reordered sums agree to 1e-12."""
    plain = loss_and_gradients(MemoryOptions())
    assert_same(loss_and_gradients(MemoryOptions(), compiled=True), plain)
    for way in ("attention", "recompute"):
        assert_same(loss_and_gradients(MemoryOptions(10, way, 16), compiled=True), plain)


@pytest.mark.slow
def test_other_document_lengths_compile_nothing_anew():
    model = Transformer(CONFIG).init_weights(0)
    model.compile_blocks()
    compiled = []
    for doc_lens in (DOC_LENS, (40, 23), (1,) * 63, (63,), (64, 64)):  # the last: more tokens, too
        ids = torch.zeros(sum(doc_lens), dtype=torch.long)
        model.loss(ids, ids, doc_lens)[0].backward()
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert compiled[0] > 0 and compiled == compiled[:1] * len(compiled)


def test_offloading_keeps_block_inputs_alone(monkeypatch):
    """What autograd moves to the host is a block's input, and nothing else."""
    moved, original = [], torch.autograd.graph.save_on_cpu

    class Counting(original):
        def __init__(self, pin_memory):
            super().__init__(pin_memory)
            pack = self.pack_hook
            self.pack_hook = lambda x: moved.append(tuple(x.shape)) or pack(x)

    monkeypatch.setattr("model.save_on_cpu", Counting)
    loss_and_gradients(MemoryOptions(0, "offload"))
    assert moved == [(sum(DOC_LENS), CONFIG.dim)] * CONFIG.n_layers


def peak_mib(options, tokens=4096):
    """Peak of live tensors, counted, in a forward and backward, without weights and gradients."""
    config = ModelConfig(vocab_size=4096, dim=64, n_layers=8, n_heads=4, n_kv_heads=2, head_dim=16,
                         ffn_dim=1024, max_seq_len=tokens)
    model = Transformer(config).init_weights(0)
    model.set_memory_options(options)
    ids = torch.zeros(tokens, dtype=torch.long)
    weights = sum(p.numel() * 4 for p in model.parameters())
    with MemTracker() as tracker:
        loss, _ = model.loss(ids, ids, (512,) * (tokens // 512))
        loss.backward()
    return (tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] - weights) / 2**20


def test_each_option_saves_memory():
    """Logits and their gradients have 64 MiB each, a block's SwiGLU 64 MiB, its input 1 MiB."""
    plain = peak_mib(MemoryOptions(loss_chunk_tokens=0))
    chunked = peak_mib(MemoryOptions(loss_chunk_tokens=256))
    attention = peak_mib(MemoryOptions(256, "attention"))
    recomputed = peak_mib(MemoryOptions(256, "recompute"))
    tiled = peak_mib(MemoryOptions(256, "recompute", 512))
    assert plain - chunked > 128 and recomputed < chunked / 4 and tiled < recomputed / 2
    assert 4 < attention - recomputed < 12  # outputs of 1 MiB in 8 layers, and the log-sum-exps


def test_an_unknown_option_is_refused():
    with pytest.raises(ValueError, match="'disk' is unknown; choose one of keep, attention"):
        MemoryOptions(activations="disk")
    with pytest.raises(ValueError, match=r"head_chunks=3; choose one of \[1, 2, 4\]"):
        loss_and_gradients(MemoryOptions(head_chunks=3))
