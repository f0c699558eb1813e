"""A ladder in the MLflow UI: one click from the parent's description opens the comparison of all its rungs."""

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from pipeline import urls
from tests.browser.ui import chromium, close_assistant, tracked
from tests.servers import MlflowServer

pytestmark = pytest.mark.browser
RUNGS = ("l0_baseline", "l0k_aver", "l1d_deterministic", "l1_ib", "l4_full")
SCROLL = """
top => [...document.querySelectorAll("*")]
    .filter(e => e.scrollHeight > e.clientHeight + 20)
    .filter(e => ["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowY))
    .forEach(e => { e.scrollTop = top })
"""
FOUR_STAGES = ["method.num_stages=4", "method.student_epochs_per_stage=[1,1,1,1]"]


def test_the_comparison_of_a_ladder_is_one_click_away_and_shows_all_rungs(
    mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    asked = f"rungs={','.join(RUNGS)}"
    client, number = tracked(mlflow_server.uri, tmp_path, "ladder", "ablate", asked, *FOUR_STAGES)
    (parent,) = client.search_runs([number], "tags.`asib.step` = 'ablate'")
    runs = client.search_runs([number], "tags.`asib.step` = 'distill'")
    assert {run.data.tags["asib.rung"] for run in runs} == set(RUNGS)
    with chromium() as page:
        page.goto(f"{mlflow_server.uri}/{urls.run_page(number, parent.info.run_id)}")
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
        seen = words_of_the_metrics(page)
        numbers = [float(word) for word in seen if word.replace(".", "", 1).isdecimal()]
        for metric in ("cost/gmacs", "final/acc_val_selected", "final/val_acc"):
            assert metric in seen
            for run in runs:  # four digits are shown
                value = run.data.metrics[metric]
                assert any(abs(number - value) <= 5e-4 * value for number in numbers), (run.info.run_name, metric)


def words_of_the_metrics(page: Page) -> set[str]:
    """The table of metrics holds only the rows in view: scroll through it."""
    seen: set[str] = set()
    for number in range(40):
        page.evaluate(SCROLL, 150 * number)
        page.wait_for_timeout(100)
        seen |= set(page.locator("body").inner_text().split())
    return seen
