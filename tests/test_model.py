"""What model.py promises, as equalities: no trick of speed or memory may change a number.

Equalities of real arithmetic are tested in float64, where a mistake (1e-2 and up) and a different
order of summation (1e-15) can't be confused. Several processes are in test_parallel.py, weights on
disk in test_weights.py.
"""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
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
    """Several threads make tensors this small six times slower where other work runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_config(**changes) -> ModelConfig:
    """A Llama with everything that can be forgotten: GQA, and heads wider than dim / n_heads."""
    shape = ModelConfig(vocab_size=97, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16,
                        ffn_dim=48, max_seq_len=128)
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


# --- 1. Attention within documents ----------------------------------------------------------------

def attention_one_by_one(q, k, v, doc_lens):
    """The definition, in loops: every document, every head, every query with the keys before it."""
    groups, documents = q.shape[1] // k.shape[1], []
    lens = [length for length in doc_lens if length]
    for q_doc, k_doc, v_doc in zip(*(x.split(lens) for x in (q, k, v)), strict=True):
        heads = []
        for h in range(q.shape[1]):
            scores = q_doc[:, h] @ k_doc[:, h // groups].T / math.sqrt(q.shape[2])
            rows = [scores[i, :i + 1].softmax(0) @ v_doc[:i + 1, h // groups]
                    for i in range(len(q_doc))]
            heads.append(torch.stack(rows))
        documents.append(torch.stack(heads, dim=1))
    return torch.cat(documents)


def outputs_and_gradients(attend, n_heads, n_kv_heads, n_tokens, dtype):
    """The output of `attend(q, k, v)`, and the gradients of q, k, v for a random direction."""
    generator = torch.Generator().manual_seed(n_tokens)
    q, k, v, direction = (torch.randn(n_tokens, h, 16, generator=generator,
                                      dtype=torch.float64).to(dtype)
                          for h in (n_heads, n_kv_heads, n_kv_heads, n_heads))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad((out * direction).sum(), inputs)]


def check_backends_agree(doc_lens, n_heads, n_kv_heads, dtype=torch.float64, tolerance=EXACT):
    shape = (n_heads, n_kv_heads, sum(doc_lens), dtype)
    expected = outputs_and_gradients(partial(attention_one_by_one, doc_lens=doc_lens), *shape)
    attend = partial(m.document_attention, cu_seqlens=boundaries(doc_lens),
                     max_seqlen=max(doc_lens))
    for backend in ("reference", "sdpa", "auto"):
        found = outputs_and_gradients(partial(attend, backend=backend), *shape)
        torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("heads", [(8, 4), (8, 2), (8, 1), (4, 4)], ids=str)
@property_test
@given(doc_lens=st.lists(st.integers(1, 9), min_size=1, max_size=8))
@example((11,))
@example((1,))
@example((1, 1, 2, 5, 5, 5))  # ascending: no permutation
@example((3, 0, 2))  # a document without tokens
@example((5, 1, 3, 5, 2, 3, 1, 5, 7))  # equal lengths far apart: the permutation and its inverse
@example((4, 4, 4))  # one batch
def test_backends_equal_documents_one_by_one(heads, doc_lens):
    """Values and gradients of q, k and v, exact, for MHA and three kinds of GQA."""
    check_backends_agree(tuple(doc_lens), *heads)


def test_backends_agree_in_float32():
    """The same in float32, whose kernels are other ones."""
    check_backends_agree((5, 1, 33, 5, 2, 7), 8, 2, torch.float32, SINGLE)


def test_bfloat16_attention_is_as_good_as_its_rounding():
    """Against float64 on the same inputs: values within 2^-8 of the norm, gradients 2^-6."""
    doc_lens, generator = (70, 1, 200, 70), torch.Generator().manual_seed(0)
    q, k, v, direction = (torch.randn(sum(doc_lens), h, 16, generator=generator).bfloat16()
                          for h in (8, 2, 2, 8))
    results = []
    for backend, dtype in (("auto", torch.bfloat16), ("reference", torch.float64)):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = m.document_attention(*inputs, boundaries(doc_lens), max(doc_lens), backend)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, direction.to(dtype))])
    for found, expected, bound in zip(*results, (2**-8, 2**-6, 2**-6, 2**-6), strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.double() - expected).norm() < bound * expected.norm()


def test_backend_choice():
    """An unknown backend is refused with the choices; auto is varlen only on CUDA in 16 bit."""
    q = torch.zeros(2, 2, 4)
    with pytest.raises(ValueError, match=r"'flash' is unknown.*varlen, sdpa, reference"):
        m.document_attention(q, q, q, boundaries((2,)), 2, "flash")
    assert m.backend_for(torch.device("cpu"), torch.bfloat16) == "sdpa"
    assert m.backend_for(torch.device("cuda"), torch.float32) == "sdpa"
    assert m.backend_for(torch.device("cuda"), torch.bfloat16) == "varlen"


# --- 2. The whole Transformer ---------------------------------------------------------------------

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
    one_document = model.logits(ids, (sum(doc_lens),))  # the boundaries do matter, to all
    assert (one_document - alone)[7:].abs().amax(dim=1).min() > 0.1

    labels = torch.cat([F.pad(document[1:], (0, 1), value=IGNORE_INDEX)
                        for document in ids.split(doc_lens)])
    loss, valid_tokens, gradients = loss_gradients(model, ids, labels, doc_lens)
    assert valid_tokens == sum(doc_lens) - len(doc_lens)
    parts = [loss_gradients(model, i, label, (len(i),))
             for i, label in zip(ids.split(doc_lens), labels.split(doc_lens), strict=True)]
    torch.testing.assert_close(loss, sum(part[0] for part in parts), **EXACT)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, sum(part[2][name] for part in parts), rtol=1e-11,
                                   atol=1e-10)


def test_nothing_to_train_on():
    """A rank with only masked labels has loss 0 and a gradient of exact zeros, not none or NaN."""
    labels = torch.full((9,), IGNORE_INDEX)
    loss, valid_tokens, gradients = loss_gradients(random_model(), random_ids(9), labels, (4, 5))
    assert loss == 0 and valid_tokens == 0
    assert all(gradient is not None and torch.all(gradient == 0) for gradient in gradients.values())


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
            # 1 / sqrt(C), and what adds to the residual is smaller by sqrt(2 * 2 layers); 1,024
            # draws and up put the measured deviation within 2.2% (one sigma): 10% is four of them
            std = 32**-0.5 / (2 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1)
            assert weight.std() == pytest.approx(std, rel=0.1)


# --- 3. RoPE --------------------------------------------------------------------------------------

LONG_LLAMA3 = {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}  # Llama-3.2's
LONG_YARN = {**YARN, "factor": 16.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize("theta, head_dim", [(1e4, 16), (5e5, 64), (8e6, 128)])
@pytest.mark.parametrize("scaling", [
    {}, {"rope_type": "default"}, LINEAR, LLAMA3, LONG_LLAMA3, YARN, LONG_YARN,
    {**LONG_YARN, "beta_fast": 16, "beta_slow": 2}, {**LONG_YARN, "truncate": False}], ids=str)
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
    for a, b in zip((cos, sin), ours, strict=True):  # theirs repeats them for both halves
        torch.testing.assert_close(a[0, :, :head_dim // 2], b[:, 0], rtol=0, atol=50 * 2e-6)


def test_ntk_rope_theta_gives_the_papers_numbers():
    """Section B.1: 64K suggests about 4.1e6, and 512K from the paper's own 8e6 about 6.6e7."""
    assert m.ntk_rope_theta(5e5, 8192, 65_536, 128) == pytest.approx(4.1e6, rel=0.02)
    assert m.ntk_rope_theta(8e6, 65_536, 524_288, 128) == pytest.approx(6.6e7, rel=0.02)
    # what NTK is for: the slowest dimension turns as far over the new length as it did over the old
    theta = m.ntk_rope_theta(5e5, 8192, 65_536, 128)
    turned, before = (n * base ** (-2 * 63 / 128) for n, base in ((65_536, theta), (8192, 5e5)))
    assert turned == pytest.approx(before, rel=1e-12)


def test_apply_rope_is_a_complex_product():
    """Dimensions i and i + D/2 are the two parts of a number that is multiplied by e^(i angle)."""
    config = tiny_config(rope_scaling=YARN)
    x = torch.randn(5, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0, 1, 2, 77, 100_000])
    frequencies, factor = m.rope_frequencies(config)
    angles = (positions[:, None] * frequencies)[:, None]  # (5, 1, 8)
    factors = torch.full_like(angles, factor)
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(factors, angles)
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


def test_a_bfloat16_model_knows_far_positions():
    """Moved 15,962 tokens on, a bfloat16 model sees the same text; not so by bfloat16 positions."""
    model, ids = random_model(torch.bfloat16), random_ids(40)

    def hidden(positions):
        return model.run_layers(ids, positions, lambda layer, q, k, v: m.document_attention(
            q, k, v, boundaries((40,)), 40)).float()

    positions = torch.arange(40)
    far = hidden(positions + 15_962)
    rounded = hidden((positions + 15_962).bfloat16())
    near = hidden(positions)  # of size 1; bfloat16 rounds each of some 30 steps to 2^-9
    assert (far - near).pow(2).mean().sqrt() < 0.03
    assert (rounded - near).pow(2).mean().sqrt() > 0.3


# --- 4. The loss ----------------------------------------------------------------------------------

@pytest.mark.parametrize("chunk_tokens", [1, 7, 20, 1000])
@pytest.mark.parametrize("masked", ["none", "some", "a chunk", "all"])
def test_chunked_loss_equals_plain_loss(chunk_tokens, masked):
    """Value and the gradients of hidden and weight, whatever is masked."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, dtype=torch.float64, generator=generator).requires_grad_()
                      for n in (20, 31))
    labels = random_ids(20, vocab_size=31)
    mask = {"none": slice(0), "some": slice(1, None, 3), "a chunk": slice(7, 14),
            "all": slice(None)}[masked]
    labels[mask] = IGNORE_INDEX

    plain = F.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    losses = m.chunked_cross_entropy(hidden, weight, labels, chunk_tokens)
    assert not losses[labels == IGNORE_INDEX].any()
    loss = losses.sum()
    torch.testing.assert_close(loss, plain, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)),
                               torch.autograd.grad(plain, (hidden, weight)), **EXACT)


# --- 6. Layout: positions, boundaries, ranks ------------------------------------------------------

@property_test
@given(doc_lens=st.lists(st.integers(1, 6), min_size=1, max_size=8),
       sp_size=st.sampled_from([1, 2, 3, 4]))
@example([6, 4, 6], 2)  # the longest is no longer than a share, and yet the 4 lies on both ranks
@example([8, 4, 4], 4)  # on ranks 0 and 1; every other boundary is a document's
def test_layout_equals_counting(doc_lens, sp_size):
    """Every rank's positions, boundaries and need to exchange, token by token."""
    if rest := sum(doc_lens) % sp_size:
        doc_lens = [*doc_lens, sp_size - rest]
    share = sum(doc_lens) // sp_size
    positions = [i for length in doc_lens for i in range(length)]
    starts = [i for i, position in enumerate(positions) if position == 0]
    crosses = any(positions[share * r] != 0 for r in range(1, sp_size))
    assert m.crosses_ranks(doc_lens, sp_size) == crosses
    for r in range(sp_size):
        rank = SimpleNamespace(sp_size=sp_size, sp_rank=r, sp_group="the ranks")
        pack = m.layout_pack(doc_lens, share, torch.device("cpu"), rank)
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


# --- 7. Presets -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name, parameters", [
    ("smollm2-135m", 134_515_008), ("llama3.2-1b", 1_235_814_400),
    ("llama3.2-3b", 3_212_749_824), ("llama3-8b", 8_030_261_248)])
def test_presets_have_the_published_number_of_parameters(name, parameters):
    """Counted on the meta device, where weights have shapes and take no memory."""
    with torch.device("meta"):
        model = Transformer(m.preset_config(name, vocab_size=1000))
    assert sum(weight.numel() for weight in model.parameters()) == parameters


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
    # none across documents
    assert m.flops_per_step(config, (s, s)) == 2 * m.flops_per_step(config, (s,))


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
