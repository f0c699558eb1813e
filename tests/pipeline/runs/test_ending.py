"""Every way out of a job has its end: the statuses, outcomes and exit codes that README and MLflow's users rely on."""

import signal
from typing import Any

import pytest

from pipeline.errors import Interrupted, NonFinite, Pruned, UserError
from pipeline.journal import check_end
from pipeline.runs.ending import ending_of


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (Interrupted(signal.SIGTERM), ("KILLED", "killed", 143, None, None)),
        (Interrupted(signal.SIGINT), ("KILLED", "killed", 130, None, None)),
        (
            Pruned(3, "it was poor"),
            ("KILLED", "pruned", 0, None, {"asib.pruned_epoch": "3", "asib.pruned_reason": "it was poor"}),
        ),
        (UserError("seed=x: give a number"), ("FAILED", "refused", 2, "seed=x: give a number", None)),
        (NonFinite("5 non-finite steps"), ("FAILED", "failed", 1, "5 non-finite steps", None)),
        (KeyError("w"), ("FAILED", "failed", 1, "KeyError: 'w'", None)),
    ],
)
def test_the_end_of_a_run_follows_from_what_its_job_raised(error: BaseException, end: tuple[Any, ...]) -> None:
    assert tuple(ending_of(error)) == end
    check_end(*end[:2])
