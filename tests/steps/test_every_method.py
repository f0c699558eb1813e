"""Every method trains, and a run of it that kill -9 ended continues bit for bit."""

from __future__ import annotations

import pytest

from pipeline.config import methods
from tests.steps.lab import BATCHES, STUDENT, Lab, journal, points, same_tensors, until

pytestmark = pytest.mark.slow

OWN = {"crd": ["method.negatives=16"], "ft": ["method.paraphraser_epochs=1"]}
"""What the small data needs."""


def overrides(method: str) -> list[str]:
    """One teacher for a method of one; the batches of the workplace are mixed."""
    settings = methods.settings(method)
    found = [f"method={method}", "method.student_epochs_per_stage=[2,2]", *OWN.get(method, [])]
    if settings.teachers[1] == 1:
        found.append("model.teachers=[{name: cifar_resnet8, pretrained: false}]")
    if not settings.blends:
        found.append("method.kd_view=mixed")
    return found


@pytest.mark.parametrize("method", [name for name in methods.names() if name != "asib"])  # test_kill.py kills ASIB's
def test_a_killed_run_of_a_method_continued_equals_an_undisturbed_one(ready_lab: Lab, method: str) -> None:
    chosen = overrides(method)
    undisturbed = ready_lab.step("distill", *chosen)
    assert undisturbed.code == 0, undisturbed.err
    log = ready_lab.folder / "killed.log"
    process = ready_lab.start("distill", *chosen, "checkpoint.every_seconds=1e-6", log=log)
    until(lambda: len(ready_lab.run_folders()) == 2 or process.poll() is not None)
    (folder,) = set(ready_lab.run_folders()) - {undisturbed.folder}
    until(lambda: process.poll() is not None or sum(e.kind == "checkpoint" for e in journal(folder)) > BATCHES)
    process.kill()
    process.wait()
    assert journal(folder)[-1].kind != "end", log.read_text()
    continued = ready_lab.step("distill", *chosen, f"resume={folder}")
    assert continued.code == 0, continued.err
    assert same_tensors(folder / STUDENT, undisturbed.folder / STUDENT)
    assert points(folder) == points(undisturbed.folder)
    assert any(name.startswith(f"b_step/{method}") for name, _ in points(folder))
