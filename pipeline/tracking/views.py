"""How an experiment looks in MLflow's UI: its description, and a saved view with the columns and charts that matter.

The UI keeps a view that someone shares as compressed JSON in a tag of the experiment, and opens it by the tag's key.
The JSON is MLflow 3.17's (tests/browser opens it); a UI that cannot read it shows its own default.
"""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

from mlflow.tracking import MlflowClient

from pipeline import urls
from pipeline.tracking.faults import permitted

VIEW = f"mlflow.sharedViewState.{urls.VIEW}"
ABOUT = (
    "Runs of multi-teacher knowledge distillation. [**All runs**, with accuracies, methods, networks, seeds and cost]"
    "({here}). Each run's description begins with its result and the command that repeats it."
)
NAME = "attributes.`Run Name`"
STEP = "tags.`asib.step`"
"""It tells teachers, of step finetune, from students."""
BEST_FIRST = "metrics.`final/acc_val_selected`"
COLUMNS = (
    STEP,
    BEST_FIRST,
    "metrics.`final/val_acc`",
    "metrics.`final/synergy_acc`",
    "metrics.`final/teacher_avg_acc`",
    "params.`method.name`",
    "params.`model.student.name`",
    "params.`seed`",
    "metrics.`cost/gmacs`",
    "tags.`asib.outcome`",
)
CURVES = (
    ("student", ("student/acc", "student/loss")),
    ("synergy", ("synergy/acc", "a_step/loss", "a_step/kd", "a_step/ib")),
    ("B-step", ("b_step/loss", "b_step/ce", "b_step/kd")),
    ("schedules", ("schedule/lr", "schedule/kd_weight", "gate/open")),
)
"""Sections of the charts, and each one's metrics over epochs."""


def arrange(client: MlflowClient, experiment_id: str) -> None:
    """Give an experiment its description and saved view, unless it has them or may not be changed by this user."""
    tags = client.get_experiment(experiment_id).tags
    wanted = {
        VIEW: packed(state()),
        "mlflow.note.content": ABOUT.format(here=urls.view_page(experiment_id)),
        "mlflow.experimentKind": "custom_model_development",
    }
    for key, value in wanted.items():
        if VIEW not in tags and key not in tags:
            permitted(client.set_experiment_tag, experiment_id, key, value)


def packed(view: dict[str, Any]) -> str:
    """A view as the UI stores it, in fewer than the 5000 characters of an experiment's tag."""
    return "deflate;" + base64.b64encode(zlib.compress(json.dumps(view).encode(), 9)).decode()


def state() -> dict[str, Any]:
    """The view: runs with the best student first, and charts in the order in which they are looked at."""
    cards: list[dict[str, Any]] = [
        _card("student", "BAR", "final/acc_val_selected"),
        _card("student", "SCATTER", "cost/gmacs", "final/acc_val_selected"),
        *(_card(section, "LINE", metric) for section, metrics in CURVES for metric in metrics),
    ]
    order = [metric for _, metrics in CURVES for metric in metrics[:1]]
    cards.sort(key=lambda card: card["metricKey"] != order[0])  # the student's accuracy over epochs comes first
    return {
        "searchFilter": "",
        "orderByKey": BEST_FIRST,
        "orderByAsc": False,
        "selectedColumns": list(COLUMNS),
        "columnOrder": [NAME, *COLUMNS],
        "columnWidths": {**dict.fromkeys(COLUMNS, 120), NAME: 340, STEP: 80},
        "compareRunCharts": cards,
        "compareRunSections": [
            {"uuid": name, "name": name, "display": True, "isReordered": True, "deleted": False} for name, _ in CURVES
        ],
        "isAccordionReordered": True,
        "runsHiddenMode": "FIRST_20_RUNS",
        "hideEmptyCharts": True,
    }


def _card(section: str, kind: str, metric: str, other: str = "") -> dict[str, Any]:
    common = {"type": kind, "uuid": f"{kind}-{metric}", "metricSectionId": section, "deleted": False}
    common |= {"isGenerated": False, "runsCountToCompare": 20, "metricKey": metric}
    if kind == "SCATTER":
        axes = {"xaxis": {"key": metric, "type": "METRIC"}, "yaxis": {"key": other, "type": "METRIC"}}
        return {**common, **axes, "displayName": "accuracy against cost"}
    if kind == "BAR":
        return {**common, "displayName": "test top-1 of the student at the epoch that validation selected"}
    return {
        **common,
        "displayName": metric,
        "xAxisKey": "step",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "scaleType": "linear",
        "xAxisScaleType": "linear",
        "lineSmoothness": 0,
        "range": {},
        "selectedXAxisMetricKey": "",
        "ignoreOutliers": False,
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }
