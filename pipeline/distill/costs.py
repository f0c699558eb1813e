"""What training costs: multiply-accumulates of its networks and of all its passes."""

from collections.abc import Mapping

from pipeline.data.sources import ImageData
from pipeline.distill import networks
from pipeline.training import costs
from pipeline.training.student import Distillation


def macs_found(task: Distillation, data: ImageData, results: Mapping[str, float]) -> dict[str, float]:
    """`cost/macs_per_image/<network>`, and `cost/gmacs`: 10⁹ multiply-accumulates of the whole training.

    A forward pass counts once, a training pass three times (forward, and backward for inputs and for weights); backward
    passes cut short, by partial freezing or a memory without weights, are counted in full, those beside updates as the
    method's settings say. Passes over the validation images count where selection or a gate needs them; other
    evaluation does not, nor does what a loss computes beside networks.
    """
    x = networks.blank(task.config, data)
    nets = {"student": task.student} | {f"teacher_{k}": t for k, t in enumerate(task.teachers)}
    found = {name: costs.macs(net, x) for name, net in nets.items()} | task.costs.macs | task.own_macs()
    seen = {name: results[f"cost/forward_images/{name}"] for name in found}
    total = sum(found[name] * seen[name] for name in found)
    if task.data.has_validation:
        passes_over = task.validation_passes().items()
        total += len(task.data.eval.labels) * sum(found[name] * passes for name, passes in passes_over)
    epochs = {phase: sum(e.phase == phase for e in task.plan) for phase in task.phases}
    images = len(task.data.train.order)
    for phase in task.phases:
        passes = images * epochs[phase] * task.phases[phase].repeats
        # own modules rest where nothing is distilled
        total += 2 * sum(found[name] * min(passes, seen[name]) for name in task.trained_in(phase) if name in found)
    if beside := task.method.backward_beside_updates:
        total += beside * found["student"] * (seen["student"] - images * epochs["b"] * task.phases["b"].repeats)
    return {f"cost/macs_per_image/{name}": float(n) for name, n in found.items()} | {"cost/gmacs": total / 1e9}
