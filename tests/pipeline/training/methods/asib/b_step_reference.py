"""What docs/method.md says of L_B, in float64 and sample by sample."""

import math
from typing import Any

import torch
from torch import Tensor

from pipeline.training.methods.asib.b_step import BLoss
from pipeline.training.methods.asib.task import AsibDistillation as Distillation
from pipeline.training.objective import Moment
from tests.pipeline.training.builders import double

MOMENT = Moment("b", 0, 1)


def blend(a: dict[str, Any], b: dict[str, Any], lam: float) -> dict[str, Any]:
    """Two views of one sample: everything by lambda, but a view that the label guard closes is not in the target."""
    left_a, left_b = lam * a["guard"], (1 - lam) * b["guard"]
    share = left_a / (left_a + left_b) if left_a + left_b > 0 else lam
    found: dict[str, Any] = {k: lam * a[k] + (1 - lam) * b[k] for k in ("avg", "weight", "mu", "cw") if k in a}
    found |= {name: share * a[name] + (1 - share) * b[name] for name in ("p", "sure")}
    return found | {"guard": left_a + left_b, "share": share, "views": (a, b)}


class Reference:
    """L_B of one batch; `loss` has a gradient, everything that teaches is constant."""

    def __init__(self, task: Distillation, batch: Any, w: BLoss) -> None:
        self.task, self.m, self.w, self.batch = task, task.method, w, batch
        self.student = double(task.student).train()
        self.teachers, self.fusion = [double(t).eval() for t in task.teachers], double(task.fusion)
        self.seen = self.student(batch.x_mixed.double())
        self.size, self.lam = len(batch.x), float(batch.lam)
        self.mixed = batch.partner is not None
        logits = self.seen.logits.detach()
        self.chosen = self._chosen(logits.softmax(1).amax(1).tolist())
        self.lessons = self._lessons()
        self.terms = self._terms()
        self.loss = self._loss()

    def _chosen(self, confidence: list[float]) -> list[int]:
        m, n = self.m, self.size
        if not m.kd_sample_gate:
            return list(range(n))
        ranked = sorted(range(n), key=lambda i: (confidence[i], i))
        least = math.ceil(m.kd_sample_min_ratio * n - 1e-6)
        most = max(least, math.floor(m.kd_sample_max_ratio * n + 1e-6))
        below = sum(c < m.kd_sample_thr for c in confidence)
        return sorted(ranked[: min(max(below, least), most)])

    def _query(self, x: Tensor) -> Tensor:
        # batch statistics have moved in the training pass, as they have in the task when it asks for a clean query
        mode = self.student.training
        found = self.student.eval()(x)
        self.student.train(mode)
        return found

    @torch.no_grad()
    def _lessons(self) -> list[dict[str, Any]]:
        m, b = self.m, self.batch
        view_is_mixed = self.mixed and m.kd_view == "mixed"
        x = (b.x_mixed if view_is_mixed else b.x).double()
        y = (b.y if self.lam >= 0.5 else b.y_b) if view_is_mixed else b.y
        seen = self.seen if view_is_mixed or not self.mixed else self._query(x)
        eps = None
        if not m.use_mu_for_kd and m.use_ib:
            eps = self.task.streams.normal((self.size, m.ib_mbm_out_dim), "kd_noise", *MOMENT).double()
        first = self._view(x, y, seen, eps)
        if b.x_second is not None:
            other = b.x_second.double()
            second = self._view(other, y, self._query(other), eps)
            first = [blend(p, q, 0.5) for p, q in zip(first, second, strict=True)]
        if not self.mixed or view_is_mixed:
            return first
        return [blend(first[i], first[int(k)], self.lam) for i, k in enumerate(b.partner)]

    def _view(self, x: Tensor, y: Tensor, student: Any, eps: Tensor | None) -> list[dict[str, Any]]:
        m, w = self.m, self.w
        seen = [t(x) for t in self.teachers]
        k = len(seen)
        share = [1.0] * k if m.teacher_weights == "equal" else list(m.teacher_weights)
        share = [v / sum(share) for v in share]
        syn = None
        if w.synergy and self.fusion is not None:
            tokens = torch.stack([a(t.feat_2d) for a, t in zip(self.fusion.adapters, seen, strict=True)], 1)
            query = None if m.learnable_q else getattr(student, m.ib_mbm_query_key).detach()
            _, mu, logvar = self.fusion.eval().ib_mbm(query, tokens, sample="never")
            z = mu if eps is None else mu + (logvar / 2).exp().clamp_min(m.ib_mbm_min_std) * eps
            syn = m.synergy_logit_scale * self.fusion.head(z)
        found = []
        for i in range(len(x)):
            rows = [t.logits[i] for t in seen]

            def average(tau: float, rows: list[Tensor] = rows) -> Tensor:
                weighted: Any = sum(v * r for v, r in zip(share, rows, strict=True))
                return (weighted / tau).softmax(0)

            def confident(tau: float, rows: list[Tensor] = rows) -> Any:
                ps = [(r / tau).softmax(0) for r in rows]
                return sum(p.max() * p for p in ps) / sum(p.max() for p in ps)

            label, tau_syn = int(y[i]), w.tau if m.tau_syn is None else m.tau_syn
            one: dict[str, Any] = {"avg": average(w.tau), "guard": 1.0}
            if m.kd_target == "weighted_conf":
                one |= {"p": confident(w.tau), "sure": confident(1.0)}
            elif m.kd_target == "avg" or syn is None:
                one |= {"p": average(w.tau), "sure": average(1.0)}
            elif m.kd_target == "auto_min":
                a, s = average(w.tau), (syn[i] / tau_syn).softmax(0)
                takes_synergy = -s[label].log() <= -a[label].log()
                one |= {"p": s if takes_synergy else a}
                one |= {"sure": syn[i].softmax(0) if takes_synergy else average(1.0)}
                one["guard"] = float(int(s.argmax()) == label or int(a.argmax()) == label)
            else:
                c = w.averaged_share
                one |= {"p": (1 - c) * (syn[i] / tau_syn).softmax(0) + c * average(w.tau)}
                one |= {"sure": (1 - c) * syn[i].softmax(0) + c * average(1.0)}
            if syn is not None:
                one["mu"] = mu[i]
                precision = float(torch.exp(-logvar[i]).mean())
                one["cw"] = min(max(precision, m.min_cw), m.max_cw) if m.use_ib else 1.0
            tops = {int(r.argmax()) for r in rows}
            differ = label not in tops if m.disagree_mode == "both_wrong" else len(tops) > 1
            one["weight"] = m.disagree_lambda_high if differ else m.disagree_lambda_low
            found.append(one)
        return found

    def _divergence(self, s: Tensor, p: Tensor) -> Any:
        log_q = s / self.w.tau - torch.logsumexp(s / self.w.tau, 0)
        return self.w.tau**2 * sum(p[c] * (p[c].log() - log_q[c]) for c in range(len(p)) if p[c] > 0)

    def _decoupled(self, s: Tensor, p: Tensor, label: int) -> Tensor:
        q = (s / self.w.tau).softmax(0)
        rest = [c for c in range(len(p)) if c != label]
        p_rest, q_rest = p[rest].sum(), q[rest].sum()
        tckd = p[label] * (p[label] / q[label]).log() + p_rest * (p_rest / q_rest).log()
        nckd = sum(p[c] / p_rest * ((p[c] / p_rest).log() - (q[c] / q_rest).log()) for c in rest)
        return self.w.dkd * self.w.tau**2 * (self.m.dkd_alpha * tckd + self.m.dkd_beta * nckd)

    def _cross_entropy(self, s: Tensor, label: int) -> Any:
        log_q, eps, n = s.log_softmax(0), self.m.ce_label_smoothing, len(s)
        return -sum(((1 - eps) * (c == label) + eps / n) * log_q[c] for c in range(n))

    def _terms(self) -> dict[str, Any]:
        m, b, n = self.m, self.batch, self.size
        zero = torch.zeros((), dtype=torch.float64)
        sums = {"ce": zero, "kd": zero, "feat": zero, "hybrid": zero}
        weight = n / max(len(self.chosen), 1) if m.kd_sample_gate and m.kd_sample_reweight else 1.0
        feature = getattr(self.seen, m.feat_kd_key)
        for i in range(n):
            s = self.seen.logits[i]
            ce = self._cross_entropy(s, int(b.y[i]))
            if self.mixed:
                ce = self.lam * ce + (1 - self.lam) * self._cross_entropy(s, int(b.y[int(b.partner[i])]))
            sums["ce"] = sums["ce"] + ce / n
            if i not in self.chosen:
                continue
            lesson = self.lessons[i]
            omega = lesson["weight"] if m.use_disagree_weight else 1.0
            if m.kd_uncertainty_weight:
                p = lesson["sure"]
                entropy = -sum(float(v) * math.log(float(v)) for v in p if v > 0)
                omega *= 1 - m.kd_uncertainty_weight * entropy / math.log(len(p))
            if m.kd_loss == "kl":
                kd = self._divergence(s, lesson["p"])
            elif self.mixed and m.kd_view == "clean":
                share, (first, second) = lesson["share"], lesson["views"]
                kd = share * self._decoupled(s, first["p"], int(b.y[i]))
                kd = kd + (1 - share) * self._decoupled(s, second["p"], int(b.y[int(b.partner[i])]))
            else:
                other = self.mixed and self.lam < 0.5
                kd = self._decoupled(s, lesson["p"], int((b.y_b if other else b.y)[i]))
            sums["kd"] = sums["kd"] + weight * omega * lesson["guard"] * kd / n
            sums["hybrid"] = sums["hybrid"] + weight * self._divergence(s, lesson["avg"]) / n
            if "mu" in lesson and feature is not None:
                f, mu = feature[i], lesson["mu"]
                if m.feat_kd_norm == "l2":
                    f, mu = f / f.norm(), mu / mu.norm()
                beta = m.feat_kd_huber_beta
                gaps = [(g * g / (2 * beta) if abs(g) < beta else abs(g) - beta / 2) for g in f - mu]
                value = sum(gaps)
                if m.feat_kd_clip is not None and value > m.feat_kd_clip:
                    value = torch.tensor(m.feat_kd_clip, dtype=torch.float64)
                sums["feat"] = sums["feat"] + weight * omega * lesson["cw"] * value / n
        return sums

    def _loss(self) -> Tensor:
        m, w, t = self.m, self.w, self.terms
        ce, kd = m.ce_alpha * t["ce"], w.scale * m.kd_alpha * t["kd"]
        if w.ratio is not None and kd.item() > w.ratio * ce.item():
            kd = kd * (w.ratio * ce.item() / kd.item())
        loss = ce + kd + w.scale * (m.feat_kd_alpha * t["feat"] + m.hybrid_beta * t["hybrid"])
        if w.bound is not None and loss.item() > w.bound:
            if m.loss_clamp_mode == "hard":
                return torch.tensor(w.bound, dtype=torch.float64, requires_grad=True)
            loss = w.bound + torch.log1p(loss - w.bound)
        return loss
