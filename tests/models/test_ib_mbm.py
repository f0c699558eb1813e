"""The fusion against a loop-by-loop float64 restatement of its formulas, and against the research code's modules."""

import io
import math

import numpy as np
import pytest
import torch
from torch import nn

from models.adapter import DistillationAdapter
from models.ib_mbm import IBMBM, SynergyHead

Q, F, K, D, B = 6, 5, 3, 8, 4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


features = torch.randn


# --- reference in float64, one scalar at a time ---


def _linear(layer, x):
    w, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    return np.array([sum(w[o, i] * x[i] for i in range(len(x))) + b[o] for o in range(len(b))])


def _layer_norm(layer, x):
    mean = sum(x) / len(x)
    var = sum((v - mean) ** 2 for v in x) / len(x)
    w, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    return np.array([(v - mean) / math.sqrt(var + 1e-5) * w[i] + b[i] for i, v in enumerate(x)])


def _attend(attn, query, tokens):
    """Multi-head attention of one query over tokens, from the packed weights."""
    w, b = attn.in_proj_weight.detach().numpy(), attn.in_proj_bias.detach().numpy()
    d, heads = attn.embed_dim, attn.num_heads
    q = w[:d] @ query + b[:d]
    keys = [w[d : 2 * d] @ t + b[d : 2 * d] for t in tokens]
    values = [w[2 * d :] @ t + b[2 * d :] for t in tokens]
    out, size = np.zeros(d), d // heads
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        scores = np.array([q[part] @ k[part] / math.sqrt(size) for k in keys])
        weights = np.exp(scores) / np.exp(scores).sum()
        out[part] = sum(a * v[part] for a, v in zip(weights, values, strict=True))
    return attn.out_proj.weight.detach().numpy() @ out + attn.out_proj.bias.detach().numpy()


def _fuse(m, student, teachers, eps):
    """(z, μ, logvar) of one sample with one query token."""
    q = _layer_norm(m.q_norm, _linear(m.q_proj, student))
    kv = [_layer_norm(m.kv_norm, _linear(m.kv_proj, t)) for t in teachers]
    h = _layer_norm(m.out_norm, _attend(m.attn, q, kv) + q)
    mu = _linear(m.mu, h)
    logvar = np.clip(_linear(m.logvar, h), -m.logvar_clip, m.logvar_clip)
    sigma = np.maximum(np.exp(logvar / 2), m.min_std)
    return mu + sigma * eps, mu, logvar


@pytest.mark.parametrize("n_head", [1, 2, 4])
def test_forward_is_the_formula_computed_in_loops(n_head):
    m = IBMBM(Q, F, D, n_head=n_head, logvar_clip=0.4, min_std=0.9).double()  # clip and floor both bite
    for p in m.parameters():
        nn.init.normal_(p, std=0.7)
    s, t, eps = (features(*shape).double() for shape in ((B, Q), (B, K, F), (B, D)))
    got = m(s, t, sample="always", eps=eps)
    assert (got[2].abs() == 0.4).any()
    assert (got[2].abs() < 0.4).any()
    for i in range(B):
        for value, expected in zip(got, _fuse(m, s[i].numpy(), t[i].numpy(), eps[i].numpy()), strict=True):
            np.testing.assert_allclose(value[i].detach().numpy(), expected, rtol=0, atol=1e-12)


def test_query_tokens_are_fused_independently_and_keep_their_axis():
    m = IBMBM(Q, F, D, n_head=2).eval()
    s, t = features(B, 5, Q), features(B, K, F)
    _, mu, logvar = m(s, t)
    assert mu.shape == logvar.shape == (B, 5, D)
    for i in range(5):
        torch.testing.assert_close(mu[:, i], m(s[:, i], t)[1])


def test_a_query_of_one_token_is_a_plain_query():
    m = IBMBM(Q, F, D).eval()
    s, t = features(B, Q), features(B, K, F)
    z, mu, logvar = m(s.unsqueeze(1), t)
    assert z.shape == mu.shape == logvar.shape == (B, D)
    torch.testing.assert_close(mu, m(s, t)[1])
    assert m(s[:1], t[:1])[1].shape == (1, D)


# --- the bottleneck ---


def constant_logvar(value, **kwargs):
    m = IBMBM(Q, F, D, **kwargs)
    nn.init.zeros_(m.logvar.weight)
    nn.init.constant_(m.logvar.bias, value)
    return m


def test_reparametrised_gradients_are_those_of_the_closed_form():
    """∂Σz/∂μ-bias = B per dimension; ∂Σz/∂logvar-bias = Σ σε/2, and 0 where clamp or floor hold."""
    m = constant_logvar(-1.0).double()
    eps = features(B, D).double()
    m(features(B, Q).double(), features(B, K, F).double(), eps=eps)[0].sum().backward()
    torch.testing.assert_close(m.mu.bias.grad, torch.full((D,), float(B), dtype=torch.float64))
    torch.testing.assert_close(m.logvar.bias.grad, (0.5 * math.exp(-0.5) * eps).sum(0))
    for held in (constant_logvar(99.0), constant_logvar(-9.0, min_std=0.1)):
        held(features(B, Q), features(B, K, F))[0].sum().backward()
        assert (held.logvar.bias.grad == 0).all()


def test_gradients_through_the_whole_fusion():
    m = IBMBM(3, 2, 4, n_head=2).double()
    s = features(2, 3).double().requires_grad_()
    t = features(2, 3, 2).double().requires_grad_()
    eps = features(2, 4).double()
    assert torch.autograd.gradcheck(lambda a, b: m(a, b, sample="always", eps=eps), (s, t))


@pytest.mark.parametrize(
    ("training", "sample", "drawn"),
    [(True, "auto", True), (False, "auto", False), (False, "always", True), (True, "never", False)],
)
def test_the_argument_decides_whether_z_is_drawn(training, sample, drawn):
    m = IBMBM(Q, F, D).train(training)
    z, mu, _ = m(features(B, Q), features(B, K, F), sample=sample)
    assert torch.equal(z, mu) is not drawn


def test_drawn_z_has_mean_mu_and_deviation_sigma():
    m = constant_logvar(math.log(0.25))
    n = 20_000
    z, mu, _ = m(features(1, Q).expand(n, Q), features(1, K, F).expand(n, K, F))
    noise = (z - mu).detach()
    assert noise.mean().abs() < 5 * 0.5 / math.sqrt(n * D)
    assert abs(noise.std() - 0.5) < 0.005


def test_mu_and_logvar_stay_float32_under_autocast():
    m = IBMBM(Q, F, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = m(features(B, Q), features(B, K, F))
    assert [v.dtype for v in out] == [torch.float32] * 3


# --- forms of the inputs ---


def test_teacher_features_in_every_documented_form():
    flat = IBMBM(Q, K * F, D).eval()
    s, t = features(B, Q), features(B, K, F)
    expected = flat(s, t.reshape(B, K * F))[1]
    torch.testing.assert_close(flat(s, t)[1], expected)
    torch.testing.assert_close(flat(s, t.reshape(B, K, F, 1))[1], expected)
    torch.testing.assert_close(flat(s, t.reshape(B, 1, K * F))[1], expected)
    per_token = IBMBM(Q, F, D).eval()
    assert not torch.allclose(per_token(s, t)[1], per_token(s, t[:, :1])[1])
    torch.testing.assert_close(per_token(s, t)[1], per_token(s, t.flip(1))[1])  # a set of teachers has no order


def test_l2_norm_removes_the_length_of_every_input_vector():
    m, plain = IBMBM(Q, F, D, feature_norm="l2").eval(), IBMBM(Q, F, D).eval()
    plain.load_state_dict(m.state_dict())
    s, t = features(B, Q), features(B, K, F)
    lengths = torch.tensor([0.1, 3.0, 20.0]).reshape(1, K, 1)
    torch.testing.assert_close(m(7 * s, lengths * t)[1], m(s, t)[1])
    unit = (s / s.norm(dim=-1, keepdim=True), t / t.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(m(s, t)[1], plain(*unit)[1])


def test_learnable_query_replaces_the_student():
    m = IBMBM(0, F, D, learnable_q=True).eval()
    assert m.q_token.shape == (D,)
    assert not any(k.startswith("q_proj") for k in m.state_dict())
    t = features(B, K, F)
    z, mu, _ = m(None, t)
    assert z.shape == (B, D)
    assert torch.equal(m(features(B, 99), t)[1], mu)
    # The token stands for q_proj's output: a projection with weight 0 and this bias is the same network.
    other = IBMBM(Q, F, D).eval()
    other.load_state_dict(m.state_dict(), strict=False)
    with torch.no_grad():
        other.q_proj.weight.zero_()
        other.q_proj.bias.copy_(m.q_token)
    torch.testing.assert_close(other(features(B, Q), t)[1], mu)


@pytest.mark.parametrize(
    ("student", "teachers", "named"),
    [
        ((B, Q), (B, K, F + 1), ["(4, 3, 6)", "(B, 5)"]),
        ((B, Q), (B, F + 1), ["(4, 6)", "(B, 5)"]),
        ((B, Q), (B, 2, 2, 2), ["(4, 2, 2, 2)", "C·h·w = 5"]),
        ((B, Q), (F,), ["(5,)"]),
        ((B, Q + 1), (B, K, F), ["(4, 7)", "(4, 6)", "(4, 3, 5)"]),
        ((B + 1, Q), (B, K, F), ["(5, 6)", "(4, 3, 5)"]),
        ((B, 1, 1, Q), (B, K, F), ["(4, 1, 1, 6)"]),
    ],
)
def test_shapes_that_do_not_fit_are_named(student, teachers, named):
    with pytest.raises(ValueError, match="IB-MBM") as caught:
        IBMBM(Q, F, D)(features(*student), features(*teachers))
    assert all(text in str(caught.value) for text in named)
    assert "\n" not in str(caught.value)


def test_a_fusion_without_a_query_is_refused():
    with pytest.raises(ValueError, match="learnable_q"):
        IBMBM(Q, F, D)(None, features(B, K, F))


# --- synergy head and adapter ---


def test_head_is_norm_gelu_linear():
    head = SynergyHead(D, 10).double()
    z = features(B, D).double()
    x = (z - z.mean(1, keepdim=True)) / (z.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    torch.testing.assert_close(head(z), x @ head.net[3].weight.T + head.net[3].bias)


@pytest.mark.parametrize(("log_temp", "temperature"), [(0.0, 1.0), (math.log(3.0), 3.0), (-20.0, 1e-4)])
def test_learnable_temperature_divides_with_a_floor(log_temp, temperature):
    head = SynergyHead(D, 10, learnable_temp=True, temp_init=log_temp)
    z = features(B, D)
    torch.testing.assert_close(head(z), head.net(z) / temperature)
    assert set(head.state_dict()) == {"net.0.weight", "net.0.bias", "net.3.weight", "net.3.bias", "log_temp"}


def test_keep_mask_takes_the_place_of_the_dropout_draw():
    head = SynergyHead(D, 10, p=0.25)
    z = features(B, D)
    torch.manual_seed(3)
    drawn = head(z)
    torch.manual_seed(3)
    keep = (nn.functional.dropout(torch.ones(B, D), 0.25) > 0).float()
    assert 0 < keep.mean() < 1
    torch.testing.assert_close(head(z, keep), drawn)
    head.eval()
    torch.testing.assert_close(head(z, keep), head(z))


def test_adapter_is_linear_norm_gelu_linear():
    adapter = DistillationAdapter(5, 3)
    x = features(B, 5)
    h = nn.functional.layer_norm(x @ adapter[0].weight.T + adapter[0].bias, (3,))
    torch.testing.assert_close(adapter(x), nn.functional.gelu(h) @ adapter[3].weight.T + adapter[3].bias)


# --- checkpoints of the research code ---


class ResearchFusion(nn.Module):
    """What the research documents say of their module: names of the layers, order of the operations."""

    def __init__(self, q_dim, kv_dim, d, heads):
        super().__init__()
        self.q_proj, self.kv_proj = nn.Linear(q_dim, d), nn.Linear(kv_dim, d)
        self.q_norm, self.kv_norm, self.out_norm = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = nn.MultiheadAttention(d, heads, batch_first=True)
        self.mu, self.logvar = nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, student, teachers):
        q, kv = self.q_norm(self.q_proj(student))[:, None], self.kv_norm(self.kv_proj(teachers))
        h = self.out_norm(self.attn(q, kv, kv)[0] + q)[:, 0]
        return self.mu(h), self.logvar(h).clip(-10, 10)


class ResearchHead(nn.Module):
    def __init__(self, d, classes):
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(d), nn.GELU(), nn.Dropout(0.1), nn.Linear(d, classes))
        self.log_temp = nn.Parameter(torch.tensor(0.3))

    def forward(self, z):
        return self.net(z) / self.log_temp.exp()


def test_checkpoints_of_the_research_code_load_strictly():
    theirs = nn.ModuleList([ResearchFusion(Q, F, D, 2), ResearchHead(D, 10)]).eval()
    file = io.BytesIO()
    torch.save([m.state_dict() for m in theirs], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    fusion, head = IBMBM(Q, F, D, n_head=2).eval(), SynergyHead(D, 10, p=0.1, learnable_temp=True).eval()
    fusion.load_state_dict(states[0], strict=True)
    head.load_state_dict(states[1], strict=True)
    s, t = features(B, Q), features(B, K, F)
    z, mu, logvar = fusion(s, t)
    expected = theirs[0](s, t)
    torch.testing.assert_close((mu, logvar), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(head(z), theirs[1](expected[0]), rtol=0, atol=1e-5)
