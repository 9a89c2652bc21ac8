"""What model.py promises, as equalities: no trick of speed or memory may change a number.

    attention     the fast backend = the written-out mask = every document alone, gradients too
    Transformer   a pack = its documents one by one, and the pack's gradient = the sum of theirs
    RoPE          every way of stretching = its formula = Hugging Face's; only distance matters
    loss          in chunks = all logits at once; masked tokens add exactly nothing
    layout        positions, cu_seqlens and "does a document cross a rank" = counting by hand
    presets       parameters and FLOPs = the published numbers

Equalities of real arithmetic are tested in float64, where a mistake (1e-2 and up) and a different order
of summation (1e-15) can't be confused. Ulysses and FSDP need several processes and are tested elsewhere, and
so are weights on disk (test_weights.py).
"""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import model as m
from model import IGNORE_INDEX, ModelConfig, Transformer

EXACT = {"rtol": 0, "atol": 1e-11}  # float64, values up to 160, summed in another order: 6e-14 seen
SINGLE = {"rtol": 0, "atol": 1e-5}  # float32, values up to 11, sums of some 40 terms: 2e-6 seen

LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SCALINGS = [None, LINEAR, LLAMA3, YARN]

property_test = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small only lose by being shared: six times slower where other work runs beside us."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_config(**changes) -> ModelConfig:
    """A Llama with everything that can be forgotten: GQA, and heads wider than dim / n_heads."""
    shape = ModelConfig(vocab_size=97, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=48,
                        max_seq_len=128)
    return replace(shape, **changes)


def random_model(dtype=torch.float64, seed=0, **changes) -> Transformer:
    """A model with weights so large that attention is sharp: then a wrong angle or mask shows."""
    model = Transformer(tiny_config(**changes)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.copy_(1 + 0.1 * noise if name.endswith("norm.weight") else 0.25 * noise)
    return model


def random_ids(n: int, seed=0, vocab_size=97) -> torch.Tensor:
    return torch.randint(vocab_size, (n,), generator=torch.Generator().manual_seed(seed))


def boundaries(doc_lens) -> torch.Tensor:
    return torch.tensor([0, *doc_lens]).cumsum(0).to(torch.int32)


# --- 1. Attention within documents ------------------------------------------------------------------


def attention_one_by_one(q, k, v, doc_lens):
    """The definition, in loops: every document alone, every head, every query with the keys before it."""
    groups, documents = q.shape[1] // k.shape[1], []
    lens = [length for length in doc_lens if length]
    for q_doc, k_doc, v_doc in zip(*(x.split(lens) for x in (q, k, v)), strict=True):
        heads = []
        for h in range(q.shape[1]):
            scores = q_doc[:, h] @ k_doc[:, h // groups].T / math.sqrt(q.shape[2])
            rows = [scores[i, :i + 1].softmax(0) @ v_doc[:i + 1, h // groups] for i in range(len(q_doc))]
            heads.append(torch.stack(rows))
        documents.append(torch.stack(heads, dim=1))
    return torch.cat(documents)


def outputs_and_gradients(attend, n_heads, n_kv_heads, n_tokens, dtype):
    """The output of `attend(q, k, v)`, and the gradients of q, k, v for a fixed random direction."""
    generator = torch.Generator().manual_seed(n_tokens)
    q, k, v, direction = (torch.randn(n_tokens, h, 16, generator=generator, dtype=torch.float64).to(dtype)
                          for h in (n_heads, n_kv_heads, n_kv_heads, n_heads))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad((out * direction).sum(), inputs)]


def check_backends_agree(doc_lens, n_heads, n_kv_heads, dtype, tolerance):
    shape = (n_heads, n_kv_heads, sum(doc_lens), dtype)
    expected = outputs_and_gradients(partial(attention_one_by_one, doc_lens=doc_lens), *shape)
    attend = partial(m.document_attention, cu_seqlens=boundaries(doc_lens), max_seqlen=max(doc_lens))
    for backend in ("reference", "sdpa", "auto"):
        found = outputs_and_gradients(partial(attend, backend=backend), *shape)
        torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("heads", [(8, 4), (8, 2), (8, 1), (4, 4)], ids=str)
@pytest.mark.parametrize("doc_lens", [
    (11,),                        # one document
    (1,),
    (1, 1, 2, 5, 5, 5),           # ascending: no permutation
    (3, 0, 2),                    # a document without tokens
    (5, 1, 3, 5, 2, 3, 1, 5, 7),  # equal lengths far apart: the permutation and its inverse
    (4, 4, 4),                    # one batch
    (9, 1),
], ids=str)
def test_backends_equal_documents_one_by_one(doc_lens, heads):
    """Values and gradients of q, k and v, exact, for MHA and three kinds of GQA."""
    check_backends_agree(doc_lens, *heads, torch.float64, EXACT)


def test_backends_agree_in_float32():
    """The same in float32, whose kernels are other ones."""
    check_backends_agree((5, 1, 33, 5, 2, 7), 8, 2, torch.float32, SINGLE)


@pytest.mark.parametrize("has_amx", [True, False], ids=["with AMX", "without"])
@pytest.mark.parametrize("head_dim", [16, 32, 128])
def test_bfloat16_attention_is_as_good_as_its_rounding(head_dim, has_amx, monkeypatch):
    """Against float64 on the same inputs: values within 2^-8 of their norm, gradients within 2^-7 (2^-9 and
    6e-3 seen; a whole model's gradient is off by 1.7e-2, for all that it rounds). High scores, a scale of
    1/sqrt(D) that bfloat16 can't hold, and values that are not 0 on average: each has its own rounding."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    monkeypatch.setattr(m, "_tiled_backward", calls := Mock(side_effect=m._tiled_backward))
    doc_lens, generator = (70, 1, 200, 70), torch.Generator().manual_seed(0)
    q, k, v, direction = (torch.randn(sum(doc_lens), h, head_dim, generator=generator) for h in (8, 2, 2, 8))
    q, k, v, direction = (x.bfloat16() for x in (4 * q, k, v + 0.5, direction + 0.5))
    results = []
    for backend, dtype in (("auto", torch.bfloat16), ("reference", torch.float64)):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = m.document_attention(*inputs, boundaries(doc_lens), max(doc_lens), backend)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, direction.to(dtype))])
    for found, expected, bound in zip(*results, (2**-8, 2**-7, 2**-7, 2**-7), strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.double() - expected).norm() < bound * expected.norm()
    assert calls.call_count == 1 and calls.call_args.args[0].dtype == (
        torch.bfloat16 if has_amx else torch.float32)


def attention_by_hand(doc_lens, n_heads, n_kv_heads, scale):
    """q, k, v, a direction for the output, the output, each query's log-sum-exp, and the three gradients."""
    generator, T = torch.Generator().manual_seed(0), sum(doc_lens)
    q, k, v, direction = (torch.randn(T, h, 16, generator=generator, dtype=torch.float64)
                          for h in (n_heads, n_kv_heads, n_kv_heads, n_heads))
    inputs = [(q * scale).requires_grad_(), k.requires_grad_(), v.requires_grad_()]
    out = m.attention_reference(*inputs, boundaries(doc_lens), max(doc_lens))
    gradients = list(torch.autograd.grad(out, inputs, direction))
    scores = torch.einsum("qhd,khd->qhk", inputs[0], k.repeat_interleave(n_heads // n_kv_heads, dim=1)) / 4
    allowed = torch.block_diag(*(torch.ones(n, n).tril() for n in doc_lens)) > 0  # (T, T)
    lse = scores.masked_fill(~allowed[:, None], -math.inf).logsumexp(-1, keepdim=True)  # (T, H, 1)
    return *(x.detach() for x in inputs), direction, out.detach(), lse.detach(), gradients


@pytest.mark.parametrize("tile_weights", [1, 2**21], ids=["pair by pair", "many pairs at once"])
@pytest.mark.parametrize("doc_lens", [
    (3,),
    (5, 0, 3),             # less than a tile; a document without tokens
    (70, 1, 200, 70, 30),  # tiles of 64: within documents and across them
    (600, 3),              # tiles of 128, the last one not full
    (256, 256),            # documents of whole tiles
], ids=str)
def test_tiled_backward_is_the_gradient(doc_lens, tile_weights, monkeypatch):
    """Exact in float64, with GQA: what runs in bfloat16 on a CPU is the gradient of attention_reference."""
    monkeypatch.setattr(m, "TILE_WEIGHTS", tile_weights)
    cu_seqlens, T = boundaries(doc_lens), sum(doc_lens)
    q, k, v, direction, out, lse, expected = attention_by_hand(doc_lens, 4, 2, scale=1.0)
    monkeypatch.setattr(torch, "baddbmm", scores := Mock(side_effect=torch.baddbmm))
    found = m._tiled_backward(direction, q, k, v, out, lse, cu_seqlens)
    sizes = [call.args[0].numel() for call in scores.call_args_list]
    one_pair = 4 * scores.call_args.args[0].shape[-1] ** 2  # H * tile * tile
    assert max(sizes) <= max(tile_weights, one_pair)
    assert tile_weights == 1 or len(sizes) <= 2  # pairs that need a mask, and others
    assert [x.shape for x in found] == [(T, 4, 16), (T, 2, 16), (T, 2, 16)]
    torch.testing.assert_close(list(found), expected, **EXACT)


def test_tile_pairs_are_those_of_the_picture():
    """Documents of 5 and 3 tokens, tiles of 2: only (2 3) sees all of (0 1); (6 7) sees no other document."""
    start, i, j, partly = m._tile_pairs(boundaries((5, 3)), 2)
    assert start.tolist() == [[0, 0], [0, 0], [0, 5], [5, 5]]
    assert (i.tolist(), j.tolist()) == ([0, 1, 1, 2, 2, 2, 3, 3], [0, 0, 1, 0, 1, 2, 2, 3])
    assert [pair for pair in range(8) if not partly[pair]] == [1]


def test_tiled_backward_hides_what_would_overflow():
    """A score that nobody may see can be so high that its weight is infinite; no gradient is."""
    q, k, v, direction, out, lse, expected = attention_by_hand((40, 24), 2, 2, scale=400.0)
    scores = torch.einsum("qhd,khd->hqk", q, k) / 4 - lse.permute(1, 0, 2)
    assert scores.max() > 710  # exp(710) is infinite in float64
    found = m._tiled_backward(direction, q, k, v, out, lse, boundaries((40, 24)))
    torch.testing.assert_close(list(found), expected, **EXACT)


@property_test
@given(doc_lens=st.lists(st.integers(1, 9), min_size=1, max_size=8).map(tuple),
       heads=st.sampled_from([(2, 2), (2, 1), (4, 2)]))
def test_backends_agree_for_any_documents(doc_lens, heads):
    """Whatever the lengths and their order."""
    check_backends_agree(doc_lens, *heads, torch.float64, EXACT)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_no_gradient_crosses_a_boundary_or_the_future(backend):
    """The output of token i depends on tokens j <= i of its own document: on all, and no other."""
    doc_lens, T = (3, 1, 4), 8
    x = torch.randn(T, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    jacobian = torch.autograd.functional.jacobian(
        lambda v: m.document_attention(x, x, v, boundaries(doc_lens), 4, backend), x)
    looks_at = jacobian.abs().amax(dim=(1, 2, 4, 5)) > 0  # (T, T)
    assert torch.equal(looks_at, torch.block_diag(*(torch.ones(n, n).tril() for n in doc_lens)) > 0)


def test_backend_choice():
    """An unknown backend is refused with the choices; auto is varlen only on CUDA in 16 bit."""
    q = torch.zeros(2, 2, 4)
    with pytest.raises(ValueError, match=r"'flash' is unknown.*auto.*varlen, sdpa, reference"):
        m.document_attention(q, q, q, boundaries((2,)), 2, "flash")
    assert m.backend_for(torch.device("cpu"), torch.bfloat16)[0] == "sdpa"
    assert m.backend_for(torch.device("cuda"), torch.float32)[0] == "sdpa"
    assert m.backend_for(torch.device("cuda"), torch.bfloat16)[0] == "varlen"


# --- 2. The whole Transformer ---------------------------------------------------------------------


def next_token_labels(input_ids, doc_lens):
    """Each token's successor; the last one of a document has none."""
    return torch.cat([F.pad(document[1:], (0, 1), value=IGNORE_INDEX)
                      for document in input_ids.split(doc_lens)])


def loss_gradients(model, input_ids, labels, doc_lens):
    model.zero_grad()
    loss, valid_tokens = model.loss(input_ids, labels, doc_lens)
    loss.backward()
    return loss.detach(), valid_tokens, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("scaling", [None, YARN], ids=["rope", "yarn"])
def test_pack_equals_documents_alone(tie, scaling):
    """Logits of a pack are those of its documents; its loss and gradient are the sums of theirs."""
    doc_lens = (7, 1, 12, 7, 5)
    model = random_model(tie_embeddings=tie, rope_scaling=scaling)
    ids = random_ids(sum(doc_lens))
    alone = torch.cat([model.logits(part, (len(part),)) for part in ids.split(doc_lens)])
    torch.testing.assert_close(model.logits(ids, doc_lens), alone, **EXACT)
    one_document = model.logits(ids, (sum(doc_lens),))
    assert (one_document - alone)[7:].abs().amax(dim=1).min() > 0.1  # the boundaries do matter, to all

    labels = next_token_labels(ids, doc_lens)
    loss, valid_tokens, gradients = loss_gradients(model, ids, labels, doc_lens)
    assert valid_tokens == sum(doc_lens) - len(doc_lens)
    parts = [loss_gradients(model, i, label, (len(i),))
             for i, label in zip(ids.split(doc_lens), labels.split(doc_lens), strict=True)]
    torch.testing.assert_close(loss, sum(part[0] for part in parts), **EXACT)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, sum(part[2][name] for part in parts), rtol=1e-11, atol=1e-10)


def test_reference_backend_gives_the_same_logits():
    """The backend is an attribute of the model, and no other number depends on it."""
    fast, doc_lens = random_model(), (6, 3, 6)
    plain = Transformer(fast.config, backend="reference").to(torch.float64)
    plain.load_state_dict(fast.state_dict())
    ids = random_ids(15)
    torch.testing.assert_close(plain.logits(ids, doc_lens), fast.logits(ids, doc_lens), **EXACT)


def test_nothing_to_train_on():
    """A rank with only masked labels has loss 0 and a gradient of exact zeros, not none and not NaN."""
    labels = torch.full((9,), IGNORE_INDEX)
    loss, valid_tokens, gradients = loss_gradients(random_model(), random_ids(9), labels, (4, 5))
    assert loss == 0 and valid_tokens == 0
    assert all(gradient is not None and torch.all(gradient == 0) for gradient in gradients.values())


def test_set_rope_is_a_new_config_with_the_old_weights():
    """Moving to another theta gives the logits of a model that was built with it."""
    model, ids = random_model(), random_ids(50)
    before = model.logits(ids, (50,))
    built = Transformer(replace(model.config, rope_theta=8e6, max_seq_len=512)).to(torch.float64)
    built.load_state_dict(model.state_dict())
    model.set_rope(8e6, 512)
    assert model.config == built.config
    assert torch.equal(model.logits(ids, (50,)), built.logits(ids, (50,)))
    assert (model.logits(ids, (50,)) - before).abs().max() > 0.1


@pytest.mark.parametrize("changes, complaint", [
    ({"n_kv_heads": 3}, "n_heads=4 is not divisible by n_kv_heads=3"),
    ({"head_dim": 15}, "head_dim=15 is odd"),
    ({"vocab_size": 0}, "vocab_size=0 must be a positive integer"),
    ({"dim": 32.0}, "dim=32.0 must be a positive integer"),
    ({"rope_theta": 1.0}, "rope_theta=1.0 must be greater than 1"),
    ({"rope_theta": math.inf}, "rope_theta=inf must be greater than 1"),
    ({"rope_theta": "1e4"}, "rope_theta='1e4' must be greater than 1"),
])
def test_impossible_shapes_are_refused(changes, complaint):
    """The message names the field and its value."""
    with pytest.raises(ValueError, match=complaint):
        tiny_config(**changes)


@pytest.mark.parametrize("tie", [False, True])
def test_init_weights_depends_on_the_seed_alone(tie):
    """The same seed gives the same bits, another seed other ones, and the global generator none."""
    states = []
    for seed, disturbance in ((1, 0), (1, 7), (2, 0)):
        torch.manual_seed(disturbance)
        states.append(Transformer(tiny_config(tie_embeddings=tie)).init_weights(seed).state_dict())
    same, again, other = states
    for name, weight in same.items():
        assert torch.equal(weight, again[name])
        if name.endswith("norm.weight"):
            assert torch.all(weight == 1)
        else:
            assert not torch.equal(weight, other[name])
            # 1 / sqrt(C), and what adds to the residual stream is smaller by sqrt(2 * 2 layers); 1,024
            # draws and up put the measured deviation within 2.2% (one sigma): 10% is four of them
            std = 32**-0.5 / (2 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1)
            assert weight.std() == pytest.approx(std, rel=0.1)


# --- 3. RoPE ----------------------------------------------------------------------------------------


def turns(i, theta, head_dim, original):
    """How many full turns dimension pair i makes over the original context."""
    return original * theta ** (-2 * i / head_dim) / (2 * math.pi)


def expected_frequency(i, theta, head_dim, scaling):
    """Radians per token of dimension pair i, each case written as in its source."""
    plain = theta ** (-2 * i / head_dim)
    kind, factor = scaling.get("rope_type", "default"), scaling.get("factor")
    if kind == "default":
        return plain
    if kind == "linear":  # 2306.15595: positions are divided
        return plain / factor
    original = scaling["original_max_position_embeddings"]
    if kind == "llama3":  # the released code: three bands of wavelength
        wavelength = 2 * math.pi / plain
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        if wavelength < original / high:
            return plain
        if wavelength > original / low:
            return plain / factor
        smooth = (original / wavelength - low) / (high - low)
        return (1 - smooth) * plain / factor + smooth * plain
    # 2309.00071, the released code: whole dimensions, from the last one with beta_fast turns ...
    fast, slow = scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)
    first = max((j for j in range(head_dim) if turns(j, theta, head_dim, original) >= fast), default=0)
    # ... to the first one with no more than beta_slow
    last = min(j for j in range(4 * head_dim) if turns(j, theta, head_dim, original) <= slow)
    ramp = min(max((i - first) / (min(last, head_dim - 1) - first), 0), 1)
    return plain / factor * ramp + plain * (1 - ramp)


LONG_LLAMA3 = {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}  # Llama-3.2's own
LONG_YARN = {**YARN, "factor": 16.0, "original_max_position_embeddings": 4096}
ROPE_CASES = [(theta, head_dim, scaling) for theta, head_dim in ((1e4, 16), (5e5, 64), (8e6, 128))
              for scaling in ({}, {"rope_type": "default"}, LINEAR, LLAMA3, LONG_LLAMA3, YARN, LONG_YARN,
                              {**LONG_YARN, "beta_fast": 16, "beta_slow": 2})]


@pytest.mark.parametrize("theta, head_dim, scaling", ROPE_CASES, ids=str)
def test_frequencies_equal_their_formulas(theta, head_dim, scaling):
    """Each of the four ways to stretch RoPE, dimension by dimension, to float64 rounding."""
    config = tiny_config(rope_theta=theta, head_dim=head_dim, rope_scaling=scaling or None)
    found, factor = m.rope_frequencies(config)
    expected = [expected_frequency(i, theta, head_dim, scaling) for i in range(head_dim // 2)]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    yarn = scaling.get("rope_type") == "yarn"
    assert factor == pytest.approx(0.1 * math.log(scaling["factor"]) + 1 if yarn else 1, rel=1e-15)


def test_older_names_and_given_numbers():
    """`type` is an older name of `rope_type`; a written attention_factor replaces YaRN's; None is absent."""
    def both(scaling):
        frequencies, factor = m.rope_frequencies(tiny_config(rope_scaling=scaling, max_seq_len=32))
        return frequencies.tolist(), factor

    assert both({"type": "linear", "factor": 4}) == both(LINEAR)
    assert both({"rope_type": "yarn", "factor": 4}) == both(YARN)  # the original length: max_seq_len
    assert both({**YARN, "attention_factor": None, "beta_fast": None}) == both(YARN)
    assert both({**YARN, "attention_factor": 1.5})[1] == 1.5


@pytest.mark.parametrize("theta, head_dim, scaling", [
    *ROPE_CASES, (5e5, 64, {**LONG_YARN, "truncate": False})], ids=str)
def test_frequencies_equal_hugging_face(theta, head_dim, scaling):
    """Frequencies, and cos and sin with their factor, as transformers has them in float32."""
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaRotaryEmbedding(LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=131_072,
        rope_theta=theta, rope_scaling=dict(scaling) or None))
    config = tiny_config(rope_theta=theta, head_dim=head_dim, rope_scaling=scaling or None,
                         max_seq_len=131_072)
    found, factor = m.rope_frequencies(config)
    # a float32 power carries some 10 roundings of 6e-8
    torch.testing.assert_close(theirs.inv_freq.double(), found, rtol=2e-6, atol=0)
    assert theirs.attention_scaling == pytest.approx(factor, rel=1e-12)
    positions = torch.arange(50)
    cos, sin = theirs(torch.zeros(1), positions[None])
    ours = m.rope_cos_sin(config, positions, torch.float32)
    for a, b in zip((cos, sin), ours, strict=True):  # theirs repeats the frequencies for both halves
        torch.testing.assert_close(a[0, :, :head_dim // 2], b[:, 0], rtol=0, atol=50 * 2e-6)


def test_ntk_rope_theta_gives_the_papers_numbers():
    """Section B.1: 64K suggests about 4.1e6, and 512K from the paper's own 8e6 about 6.6e7."""
    assert m.ntk_rope_theta(5e5, 8192, 65_536, 128) == pytest.approx(4.1e6, rel=0.02)
    assert m.ntk_rope_theta(8e6, 65_536, 524_288, 128) == pytest.approx(6.6e7, rel=0.02)
    # what NTK is for: the slowest dimension turns as far over the new length as it did over the old
    theta = m.ntk_rope_theta(5e5, 8192, 65_536, 128)
    assert turns(63, theta, 128, 65_536) == pytest.approx(turns(63, 5e5, 128, 8192), rel=1e-12)


@pytest.mark.parametrize("scaling, complaint", [
    ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic' is not supported.*linear, llama3 or yarn"),
    ({"rope_type": "linear"}, "needs a number for 'factor', got None"),
    ({"rope_type": "linear", "factor": "4"}, "needs a number for 'factor', got '4'"),
    ({"rope_type": "linear", "factor": True}, "needs a number for 'factor', got True"),
    ({"rope_type": "linear", "factor": math.nan}, "needs a number for 'factor', got nan"),
    ({"rope_type": "linear", "factor": 0.5}, "'factor' is 0.5, the least allowed is 1"),
    ({**LLAMA3, "low_freq_factor": None}, "needs a number for 'low_freq_factor'"),
    ({**LLAMA3, "high_freq_factor": 1.0}, "high_freq_factor=1.0 must be above low_freq_factor=1.0"),
    ({**YARN, "original_max_position_embeddings": 0}, "'original_max_position_embeddings' is 0"),
    ({**YARN, "attention_factor": "big"}, "needs a number for 'attention_factor'"),
    ({**YARN, "beta_fast": 0}, "beta_fast=0.0 must be above beta_slow=1.0"),
    ({**YARN, "beta_fast": 1, "beta_slow": 32}, "beta_fast=1.0 must be above beta_slow=32.0"),
    ({**YARN, "mscale": 0.7}, "an entry 'mscale', which is not one of attention_factor, beta_fast"),
    ("linear", "rope_scaling='linear' must be an object"),
])
def test_bad_scaling_is_refused_with_the_config(scaling, complaint):
    """A wrong entry fails when the config is made, naming what is wrong."""
    with pytest.raises(ValueError, match=complaint):
        tiny_config(rope_scaling=scaling)


def test_apply_rope_is_a_complex_product():
    """Dimensions i and i + D/2 are the two parts of a number that is multiplied by e^(i angle)."""
    config = tiny_config(rope_scaling=YARN)
    x = torch.randn(5, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 2, 77, 100_000])
    frequencies, factor = m.rope_frequencies(config)
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(
        torch.full((5, 1, 8), factor, dtype=torch.float64), (positions[:, None] * frequencies)[:, None])
    rotated = m.apply_rope(x, *m.rope_cos_sin(config, positions, torch.float64))
    torch.testing.assert_close(rotated, torch.cat((turned.real, turned.imag), dim=-1), **EXACT)


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_only_the_distance_counts(scaling):
    """The product of a query and a key is the same wherever the two stand, if equally far apart."""
    config = tiny_config(rope_theta=5e5, rope_scaling=scaling)
    q, k = torch.randn(2, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def product(q_position, k_position):
        positions = torch.tensor([q_position, k_position])
        q_turned, k_turned = m.apply_rope(
            torch.cat((q, k)), *m.rope_cos_sin(config, positions, torch.float64))
        return float((q_turned * k_turned).sum())

    for distance in (0, 1, 5000):
        near = product(distance, 0)
        for start in (1, 777, 500_000):  # float64 angles of 5e5 are good to 6e-11
            assert product(start + distance, start) == pytest.approx(near, abs=1e-8)
    assert abs(product(5000, 0) - product(0, 0)) > 0.1


def test_a_bfloat16_model_has_float32_angles():
    """At position 15,962 the cosine of the fastest pair is -0.908; bfloat16 would round to -0.268."""
    assert math.cos(float(torch.tensor(15_962.0).bfloat16())) == pytest.approx(-0.268, abs=1e-3)
    frequencies, _ = m.rope_frequencies(tiny_config(rope_theta=5e5))
    cos, sin = m.rope_cos_sin(tiny_config(rope_theta=5e5), torch.tensor([15_962]), torch.bfloat16)
    assert cos.dtype == sin.dtype == torch.float32
    assert float(cos[0, 0, 0]) == pytest.approx(-0.908, abs=1e-3)
    for i, frequency in enumerate(frequencies.tolist()):
        angle = 15_962 * frequency  # computed in float64, so only the result is rounded
        assert float(cos[0, 0, i]) == pytest.approx(math.cos(angle), abs=1e-7)
        assert float(sin[0, 0, i]) == pytest.approx(math.sin(angle), abs=1e-7)


def test_a_bfloat16_model_knows_far_positions():
    """Moved 15,962 tokens on, a bfloat16 model sees the same text; with bfloat16 positions it does not."""
    model, ids = random_model(torch.bfloat16), random_ids(40)

    def hidden(positions):
        return model.run_layers(ids, positions, [(40, lambda layer, q, k, v: m.document_attention(
            q, k, v, boundaries((40,)), 40))]).float()

    positions = torch.arange(40)
    far = hidden(positions + 15_962)
    rounded = hidden((positions + 15_962).bfloat16())
    near = hidden(positions)  # of size 1; bfloat16 rounds each of some 30 steps to 2^-9
    assert (far - near).pow(2).mean().sqrt() < 0.03
    assert (rounded - near).pow(2).mean().sqrt() > 0.3


# --- 4. The loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_tokens", [1, 7, 20, 1000])
@pytest.mark.parametrize("masked", ["none", "some", "a chunk", "all"])
def test_chunked_loss_equals_plain_loss(chunk_tokens, masked):
    """Value, count and the gradients of hidden and weight, whatever is masked."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, dtype=torch.float64, generator=generator).requires_grad_()
                      for n in (20, 31))
    labels = random_ids(20, vocab_size=31)
    mask = {"none": slice(0), "some": slice(1, None, 3), "a chunk": slice(7, 14), "all": slice(None)}[masked]
    labels[mask] = IGNORE_INDEX

    plain = F.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    loss, valid_tokens = m.chunked_cross_entropy(hidden, weight, labels, chunk_tokens)
    assert valid_tokens == (labels != IGNORE_INDEX).sum()
    torch.testing.assert_close(loss, plain, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)),
                               torch.autograd.grad(plain, (hidden, weight)), **EXACT)


def test_loss_of_a_bfloat16_model_is_summed_in_float32():
    """A sum of 4,096 equal cross-entropies of log 31 is exact to float32, not to bfloat16's 3 digits."""
    hidden, weight = torch.zeros(4096, 6, dtype=torch.bfloat16), torch.ones(31, 6, dtype=torch.bfloat16)
    loss, _ = m.chunked_cross_entropy(hidden, weight, torch.zeros(4096, dtype=torch.long), 256)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(4096 * math.log(31), rel=1e-5)


# --- 6. Layout: positions, boundaries, ranks ----------------------------------------------------------


def rank_of(sp_size, sp_rank):
    """As much of a `Parallel` as the layout asks for."""
    return SimpleNamespace(sp_size=sp_size, sp_rank=sp_rank, sp_group="the ranks")


def test_layout_of_the_file_header():
    """The picture at the top of model.py."""
    pack = m.layout_pack((3, 1, 4), 8, torch.device("cpu"))
    assert pack.positions.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert pack.cu_seqlens.tolist() == [0, 3, 4, 8] and pack.cu_seqlens.dtype == torch.int32
    assert pack.max_seqlen == 4 and pack.group is None


@pytest.mark.parametrize("doc_lens, sp_size, crosses", [
    ((16,), 1, False),
    ((16,), 2, True),
    ((8, 8), 2, False),
    ((3, 5, 8), 2, False),
    ((6, 4, 6), 2, True),   # the longest is 6 <= 8, and yet the 4 lies on both ranks
    ((4, 4, 4, 4), 4, False),
    ((8, 4, 4), 4, True),   # on ranks 0 and 1; every other boundary is a document's
    ((19, 28, 24, 29), 4, True),  # a user's case, 25 tokens a rank
])
def test_crosses_ranks(doc_lens, sp_size, crosses):
    """Hand-made cases."""
    assert m.crosses_ranks(doc_lens, sp_size) is crosses


@property_test
@given(doc_lens=st.lists(st.integers(1, 6), min_size=1, max_size=8), sp_size=st.sampled_from([1, 2, 3, 4]))
def test_layout_equals_counting(doc_lens, sp_size):
    """Every rank's positions, boundaries and need to exchange, token by token, for any documents."""
    if rest := sum(doc_lens) % sp_size:
        doc_lens = [*doc_lens, sp_size - rest]
    share = sum(doc_lens) // sp_size
    positions = [i for length in doc_lens for i in range(length)]
    starts = [i for i, position in enumerate(positions) if position == 0]
    crosses = any(positions[share * r] != 0 for r in range(1, sp_size))
    assert m.crosses_ranks(doc_lens, sp_size) == crosses
    for r in range(sp_size):
        pack = m.layout_pack(doc_lens, share, torch.device("cpu"), rank_of(sp_size, r))
        mine = positions[share * r:share * (r + 1)]
        assert pack.positions.tolist() == mine
        assert pack.group == ("the ranks" if crosses else None)
        if crosses:  # all tokens of some heads: the whole sequence's documents
            assert pack.cu_seqlens.tolist() == [*starts, len(positions)]
            assert pack.max_seqlen == max(doc_lens)
        else:
            assert pack.cu_seqlens.tolist() == [*(i for i in range(share) if mine[i] == 0), share]
            assert pack.max_seqlen == max(mine) + 1


@pytest.mark.parametrize("doc_lens", [(), (3, 4), (3, 6), (8, 0), (9, -1)], ids=str)
def test_wrong_doc_lens_are_refused(doc_lens):
    """Documents must fill the 8 tokens exactly and none may be empty."""
    with pytest.raises(ValueError, match=f"doc_lens adds up to {sum(doc_lens)}.*1 x 8 tokens"):
        m.layout_pack(doc_lens, 8, torch.device("cpu"))


def test_doc_lens_are_of_the_whole_sequence():
    """A rank that passes only its own documents is told so."""
    with pytest.raises(ValueError, match=r"adds up to 8.*2 x 8 tokens"):
        m.layout_pack((3, 5), 8, torch.device("cpu"), rank_of(2, 0))


# --- 7. Presets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, parameters", [
    ("smollm2-135m", 134_515_008),
    ("llama3.2-1b", 1_235_814_400),
    ("llama3.2-3b", 3_212_749_824),
    ("llama3-8b", 8_030_261_248),
])
def test_presets_have_the_published_number_of_parameters(name, parameters):
    """Counted on the meta device, where weights have shapes and take no memory."""
    with torch.device("meta"):
        model = Transformer(m.preset_config(name, vocab_size=1000))
    assert sum(weight.numel() for weight in model.parameters()) == parameters


def test_the_tiny_preset_takes_the_tokenizers_vocabulary():
    """And its 8 query and 4 KV heads of 16 are what the 8-rank command needs."""
    config = m.preset_config("tiny", vocab_size=261)
    assert (config.vocab_size, config.n_heads, config.n_kv_heads, config.head_dim) == (261, 8, 4, 16)


def test_wrong_presets_are_refused():
    """An unknown name with the choices, and a tokenizer with more ids than the model has."""
    with pytest.raises(ValueError, match=r"'llama4' is unknown.*tiny, smollm2-135m, .*llama3-8b"):
        m.preset_config("llama4", 261)
    with pytest.raises(ValueError, match=r"'smollm2-135m' has 49152 token ids.*uses 49153"):
        m.preset_config("smollm2-135m", 49_153)


@pytest.mark.parametrize("s", [1024, 65_536, 524_288])
def test_flops_of_llama3_8b(s):
    """Per token 6 x 7.505e9 for the weights, and 786,432 x s for causal attention over s tokens."""
    config = m.preset_config("llama3-8b", 1000)
    per_token = 6 * 7.505e9 + 786_432 * s  # 7.505e9 is rounded: 0.1% covers it
    assert m.flops_per_step(config, (s,)) / s == pytest.approx(per_token, rel=1e-3)
    assert m.flops_per_step(config, (s, s)) == 2 * m.flops_per_step(config, (s,))  # none across documents


def test_flops_equal_what_pytorch_counts():
    """The weights' share, against PyTorch's own counter over a forward and backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    model = random_model(torch.float32)
    with FlopCounterMode(display=False) as counter:
        loss_gradients(model, random_ids(30), random_ids(30), (1,) * 30)
    counts = counter.get_flop_counts()["Global"]
    matmuls = sum(n for op, n in counts.items() if "attention" not in str(op))
    attention = 6 * 2 * 4 * 16 * 30  # n_layers * n_heads * head_dim, 30 documents of length 1
    assert matmuls == m.flops_per_step(model.config, (1,) * 30) - attention
