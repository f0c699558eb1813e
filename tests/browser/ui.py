"""The MLflow UI in a real Chromium: open the pages that people use, and photograph them for the README.

`python -m tests.browser.ui <tracking uri of a server> <folder>` writes ui_runs, ui_charts, ui_description and
ui_compare.png.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow import MlflowClient
from playwright.sync_api import Page, sync_playwright

from pipeline import urls
from pipeline.compare import report
from tests.steps.lab import Lab

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
SECONDS = 60_000.0  # a cold UI on two busy cores takes its time


@contextmanager
def chromium() -> Iterator[Page]:
    """A page in a fresh browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1440, "height": 820})
        page.set_default_timeout(SECONDS)
        yield page
        browser.close()


def tracked(server: str, folder: Path, experiment: str, step: str, *overrides: str) -> tuple[MlflowClient, str]:
    """Run a step in a workplace of its own, tracked to a server; a client, and the experiment's id."""
    where = ["tracking.mode=online", f"tracking.uri={server}", f"tracking.experiment={experiment}"]
    done = Lab(folder / "lab").step(step, *overrides, *where)
    assert done.code == 0, done.err
    client = MlflowClient(server)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return client, found.experiment_id


def close_assistant(page: Page) -> None:
    """The assistant's panel covers a third of the page."""
    page.locator("[data-component-id='mlflow.assistant.chat_panel.close']").click()


def open_runs(page: Page, server: str, experiment: str) -> None:
    """The experiment's saved view, in which nested runs are rows like others, the best student first."""
    page.goto(f"{server}/{urls.view_page(experiment)}")
    page.get_by_text("matching runs").wait_for()
    close_assistant(page)


def open_charts(page: Page, server: str, experiment: str, run: str) -> None:
    """A run's metric charts."""
    page.goto(f"{server}/{urls.run_page(experiment, run, '/model-metrics')}")
    page.locator(".js-plotly-plot").first.wait_for()


def open_picture(page: Page, server: str, experiment: str, run: str, name: str) -> None:
    """A picture among a run's artifacts."""
    page.goto(f"{server}/{urls.run_page(experiment, run, f'/artifacts/{name}')}")
    page.locator("img[src^='blob:'], img[src*='get-artifact']").first.wait_for()


def show_differences(page: Page) -> None:
    """On the page that compares runs: their names, and the parameters that differ.

    Not metrics: in MLflow 3.17 the names of metrics stay where they are when their values are scrolled.
    """
    page.get_by_text("Visualizations", exact=True).first.click()  # folds them away
    page.get_by_role("switch").first.click()


def photograph(server: str, folder: Path) -> None:
    """The pictures of docs/: the saved view, the newest distillation, and its comparison with the one before it."""
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("asib")
    assert experiment is not None
    number = experiment.experiment_id
    asib = "tags.`asib.step` = 'distill' and status = 'FINISHED' and params.`method.name` = 'asib'"
    distilled = client.search_runs([number], asib, max_results=2)
    with chromium() as page:

        def shot(address: str, name: str, first: Callable[[Page], None] = lambda page: None) -> None:
            page.goto(f"{server}/{address}")
            page.wait_for_timeout(8000)
            first(page)
            page.wait_for_timeout(1000)
            page.screenshot(path=folder / name)

        open_runs(page, server, number)
        page.get_by_text(str(distilled[0].info.run_name)).first.wait_for()
        page.screenshot(path=folder / "ui_runs.png")
        shot(f"{urls.view_page(number)}&compareRunsMode=CHART", "ui_charts.png")
        shot(
            urls.run_page(number, distilled[0].info.run_id),
            "ui_description.png",
            lambda page: page.get_by_text("Show more").click(),
        )
        page.set_viewport_size({"width": 1440, "height": 690})
        shot(report.link([run.info.run_id for run in distilled], number), "ui_compare.png", show_differences)


if __name__ == "__main__":
    photograph(sys.argv[1], Path(sys.argv[2]))
