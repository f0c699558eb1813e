"""Everything that depends on the epoch: the plan of stages, temperature, weights of the bottleneck and of distillation.

Counters (docs/method.md): a = A-epochs so far, b = B-epochs so far, e = a + b, all from 0.
"""

from pipeline.config.methods.asib.settings import AsibConfig
from pipeline.training.phases import Epoch


def beta(method: AsibConfig, a: int, a_in_stage: int) -> float:
    """Weight of the bottleneck's KL term in A-epoch `a` of the run, the `a_in_stage`-th of its stage (section 2).

    `beta_schedule` [start, end, total]: start + (end - start) min(a' / total, 1), else ib_beta min(a' / warm-up, 1),
    with a' = A-epochs after `synergy_only_epochs`; 0 in those, without a bottleneck, and after `ib_epochs_per_stage`.
    """
    after = a - method.synergy_only_epochs
    if not method.use_ib or after < 0:
        return 0.0
    if method.ib_epochs_per_stage is not None and a_in_stage >= method.ib_epochs_per_stage:
        return 0.0
    if method.beta_schedule is not None:
        start, end, total = method.beta_schedule
        return start + (end - start) * min(after / total, 1.0)
    if method.ib_beta_warmup_epochs == 0:
        return method.ib_beta
    return method.ib_beta * min(after / method.ib_beta_warmup_epochs, 1.0)


def tau(method: AsibConfig, e: int, total: int) -> float:
    """Temperature in epoch `e` of `total`: `tau_schedule` linear in t = e / (total - 1), else `tau` (section 2)."""
    if method.tau_schedule is None:
        return method.tau
    start, end = method.tau_schedule
    return start + (end - start) * (e / (total - 1) if total > 1 else 0.0)


def make_plan(method: AsibConfig, a_steps: bool) -> list[Epoch]:
    """The run's epochs: `num_stages` times an A-step (skipped at 0 epochs, or without fusion), then a B-step.

    An A-step followed only by B-epochs without distillation (`kd_cooldown_epochs`) is skipped: nothing would use it.
    """
    plan: list[Epoch] = []
    counts = {"a": 0, "b": 0}
    distils_until = sum(method.student_epochs_per_stage) - method.kd_cooldown_epochs
    for stage, b_epochs in enumerate(method.student_epochs_per_stage):
        used = counts["b"] < distils_until
        for phase, epochs in (("a", method.teacher_adapt_epochs if a_steps and used else 0), ("b", b_epochs)):
            for i in range(epochs):
                plan.append(Epoch(phase, stage, i, counts[phase], len(plan), i == 0, i == epochs - 1))
                counts[phase] += 1
    return plan
