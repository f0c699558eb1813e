"""What training costs: multiply-accumulates of its networks and of all its passes."""

from collections.abc import Mapping

from pipeline.data.sources import ImageData
from pipeline.distill import networks
from pipeline.training import costs
from pipeline.training.student import Distillation


def macs_found(task: Distillation, data: ImageData, results: Mapping[str, float]) -> dict[str, float]:
    """`cost/macs_per_image/<network>`, and `cost/gmacs`: 10⁹ multiply-accumulates of the whole training.

    A forward pass counts once, a training pass three times (forward, and backward for inputs and for weights); backward
    passes cut short by partial freezing are counted in full, those beside updates as the method's settings say.
    Evaluation does not count, as for the images.
    """
    x = networks.blank(task.config, data)
    nets = {"student": task.student} | {f"teacher_{k}": t for k, t in enumerate(task.teachers)}
    found = {name: costs.macs(net, x) for name, net in nets.items()}
    found |= task.own_macs()
    total = sum(found[name] * results[f"cost/forward_images/{name}"] for name in found)
    epochs = {phase: sum(e.phase == phase for e in task.plan) for phase in task.phases}
    images = len(task.data.train.indices)
    for phase in task.phases:
        passes = images * epochs[phase] * task.phases[phase].repeats
        total += 2 * passes * sum(found[name] for name in task.trained_in(phase) if name in found)
    if beside := task.method.backward_beside_updates:
        others = results["cost/forward_images/student"] - images * epochs["b"] * task.phases["b"].repeats
        total += beside * others * found["student"]
    return {f"cost/macs_per_image/{name}": float(n) for name, n in found.items()} | {"cost/gmacs": total / 1e9}
