"""docs/serving.md does what it says: its blocks, word for word, one after the other in one shell."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pandas
import pytest

ROOT = Path(__file__).resolve().parents[2]
PORT = "5001"
CUT = "---- next block ----"


def blocks() -> list[str]:
    """What the page has between ```bash and ```."""
    return re.findall(r"^```bash\n(.*?)^```$", (ROOT / "docs/serving.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_page_on_serving_runs_word_for_word(tmp_path: Path) -> None:
    """The port apart: 5001 may be taken."""
    for name in ("conf", "models", "pipeline", "steps", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / ".venv").symlink_to(sys.prefix)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = f"\necho '{CUT}'\n".join(block.replace(PORT, str(port)) for block in blocks())
    foreign = ("PYTHONPATH", "VIRTUAL_ENV", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID")
    environment = {k: v for k, v in os.environ.items() if k not in foreign}
    done = subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", script],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=1800,
        start_new_session=True,
    )
    assert done.returncode == 0
    _, _, picture, pixels, refusal, _, table, elsewhere = done.stdout.split(f"{CUT}\n")
    (answer,) = json.loads(picture)["predictions"]
    assert len(answer["probabilities"]) == 20
    best, probability = answer["class"], answer["probability"]
    first = pixels.splitlines()[0].split()
    assert (first[0], float(first[1])) == (best, pytest.approx(probability, abs=6e-4))
    assert "image 0 has shape (1, 2), expected (32, 32, 3)" in json.loads(refusal)["message"]
    predicted = pandas.read_csv(tmp_path / "predictions.csv")
    assert list(predicted["file"]) == ["apple.png", "bicycle.png", "cloud.png", "orchid.png"]
    assert (predicted["class"][0], predicted["probability"][0]) == (best, pytest.approx(probability, abs=1e-5))
    assert "4 pictures classified, 0 skipped: predictions.csv" in table
    name, value, difference = elsewhere.split()[-3:]
    assert (name, float(value)) == (best, pytest.approx(probability, abs=1e-4))
    assert float(difference) < 1e-4
    with socket.socket() as probe:
        probe.settimeout(5)
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "the server has ended"


def test_the_page_names_what_is_there() -> None:
    """Results apart, which a benchmark writes."""
    text = (ROOT / "docs/serving.md").read_text()
    for path in re.findall(r"(?:docs|tests|benchmarks(?!/results)|deploy)/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path
