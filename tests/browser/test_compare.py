"""A ladder in the MLflow UI: one click from the parent's description opens the comparison of all its rungs."""

import re
from pathlib import Path

import pytest
from mlflow import MlflowClient
from playwright.sync_api import Page, expect

from tests.browser.ui import chromium, close_assistant
from tests.servers import MlflowServer
from tests.steps.lab import Lab

pytestmark = pytest.mark.browser
RUNGS = ("l0_baseline", "l0k_aver", "l1d_deterministic", "l1_ib", "l4_full")
FOUR_STAGES = ["method.num_stages=4", "method.student_epochs_per_stage=[1,1,1,1]"]


def test_the_comparison_of_a_ladder_is_one_click_away_and_shows_all_rungs(
    mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    where = ["tracking.mode=online", f"tracking.uri={mlflow_server.uri}", "tracking.experiment=ladder"]
    done = Lab(tmp_path / "lab").step("ablate", f"rungs={','.join(RUNGS)}", *FOUR_STAGES, *where)
    assert done.code == 0, done.err
    client = MlflowClient(mlflow_server.uri)
    experiment = client.get_experiment_by_name("ladder")
    assert experiment is not None
    number = experiment.experiment_id
    (parent,) = client.search_runs([number], "tags.`asib.step` = 'ablate'")
    runs = client.search_runs([number], "tags.`asib.step` = 'distill'")
    assert {run.data.tags["asib.rung"] for run in runs} == set(RUNGS)
    with chromium() as page:
        page.goto(f"{mlflow_server.uri}/#/experiments/{number}/runs/{parent.info.run_id}")
        link = page.get_by_role("link", name="Compare these runs")
        link.wait_for()
        close_assistant(page)
        with page.context.expect_page() if link.get_attribute("target") == "_blank" else page.expect_navigation() as to:
            link.click()
        page = to.value if link.get_attribute("target") == "_blank" else page
        page.get_by_text("Comparing 5 Runs").wait_for()
        for name in RUNGS:
            expect(page.get_by_text(f"{name} seed 0").first).to_be_visible()
        text = "".join(page.locator("body").inner_text().split())  # lists are shown with an item per line
        for name in ("method.kd_target", "method.use_ib", "method.student_freeze_schedule", "[-1,-1,2,1]"):
            assert name in text
        for metric in ("cost/gmacs", "final/acc_val_selected", "final/val_acc"):
            values = [run.data.metrics[metric] for run in runs]
            scroll_to(page, metric, {f"{value:.3f}".rstrip("0").rstrip(".") for value in values})


def scroll_to(page: Page, metric: str, values: set[str]) -> None:
    """The table of metrics shows a dozen rows and scrolls in itself: down to where name and values are seen."""
    seen: set[str] = set()
    for _ in range(60):
        seen = set(page.locator("body").inner_text().split())
        if {metric, *values} <= seen:
            return
        page.get_by_text(re.compile("^(a_step|b_step|cost|final|gate|parameters)/")).last.hover()
        page.mouse.wheel(0, 120)
        page.wait_for_timeout(100)
    page.screenshot(path="/tmp/p.png"); Path("/tmp/page.html").write_text(page.content()); Path("/tmp/page.txt").write_text(page.locator("body").inner_text())
    raise AssertionError(f"{metric}: {values - seen} not seen")
