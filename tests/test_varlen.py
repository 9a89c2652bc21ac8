"""The backend of GPUs, on a CPU: an exact kernel stands in for the flash kernel that it calls."""

import pytest
import torch
from test_levers import CONFIG, DOC_LENS, assert_same
from torch.nn.attention import varlen

import model as m
from model import MemoryOptions, Transformer

CALLS: list[str] = []


def exact(q, k, v, cu_seqlens, window):
    """The definition, with the mask that a window of (-1, 0) means: nothing of what follows."""
    assert tuple(window) == (-1, 0)
    return m.attention_reference(q, k, v, cu_seqlens, 0)


@varlen._varlen_attn.register_kernel("cpu")
def _(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, scale=None, window_size=None,
      enable_gqa=False, *more, **others):
    assert torch.equal(cu_q, cu_k) and cu_q.dtype == torch.int32 and max_q == max_k
    assert max_q == int(cu_q.diff().max()) and enable_gqa == (q.shape[1] != k.shape[1])
    CALLS.append("forward")
    lse = torch.zeros(q.shape[1], q.shape[0])
    return exact(q, k, v, cu_q, window_size), lse, torch.zeros(2, dtype=torch.uint64)


@varlen._varlen_attn_backward.register_kernel("cpu")
def _(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, is_causal, rng, scale=None,
      window_size=None):
    """By hand, as there is no autograd below an operator: softmax' = P (dP - sum of P dP)."""
    CALLS.append("backward")
    groups, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    wide_k, wide_v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    index = torch.arange(len(q))
    document = torch.bucketize(index, cu_q[1:], right=True)
    allowed = (document[:, None] == document) & (index[:, None] >= index)
    scores = torch.einsum("qhd,khd->hqk", q, wide_k) * scale
    p = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
    dp = torch.einsum("qhd,khd->hqk", grad, wide_v)
    ds = p * (dp - (p * dp).sum(dim=-1, keepdim=True)) * scale
    dk, dv = torch.einsum("hqk,qhd->khd", ds, q), torch.einsum("hqk,qhd->khd", p, grad)
    return (torch.einsum("hqk,khd->qhd", ds, wide_k),
            *(x.unflatten(1, (-1, groups)).sum(dim=2) for x in (dk, dv)))


def loss_and_gradients(backend, doc_lens, activations="keep"):
    """In float64, with fewer KV heads than query heads."""
    CALLS.clear()
    model = Transformer(CONFIG, backend).init_weights(0).double()
    model.set_memory_options(MemoryOptions(activations=activations))
    ids = torch.arange(sum(doc_lens)) % CONFIG.vocab_size
    loss, valid = model.loss(ids, ids.roll(-1), doc_lens)
    (loss / valid).backward()
    return float(loss.detach()), {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("activations, forwards",
                         [("keep", 1), ("attention", 1), ("recompute", 2)])
def test_varlen_is_the_reference(activations, forwards):
    """Loss and gradients to 1e-12; what attention gave is not computed again where it is kept."""
    found = loss_and_gradients("varlen", DOC_LENS, activations)
    assert CALLS.count("forward") == CONFIG.n_layers * forwards
    assert CALLS.count("backward") == CONFIG.n_layers
    assert_same(found, loss_and_gradients("reference", DOC_LENS))


def test_a_document_that_fills_the_pack_goes_to_the_dense_kernels():
    found = loss_and_gradients("varlen", (63,))
    assert not CALLS
    assert_same(found, loss_and_gradients("reference", (63,)))
