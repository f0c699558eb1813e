"""From nothing to an answer, word for word: the blocks of docs/serving.md, in one shell."""

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

from tests.pages import ROOT, WRITTEN, blocks
from tests.servers import free_port

PORT = "5001"
CUT = "---- next block ----"


@pytest.mark.slow
def test_demo_evaluate_promote_serve_and_ask_word_for_word(tmp_path: Path) -> None:
    """The port apart, since 5001 may be taken, and the epochs, which are no words of the page."""
    for name in ("conf", "models", "pipeline", "steps", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("Makefile", "MLproject", "conda.yaml", "requirements.lock"):
        shutil.copy2(ROOT / name, tmp_path)
    recipe = tmp_path / "conf/experiment/quickstart.yaml"
    fewer = {" epochs: 12": " epochs: 1", "stages: 4": "stages: 1", "[3, 3, 3, 3]": "[2]", "t_epochs: 2": "t_epochs: 1"}
    for usual, less in fewer.items():
        assert usual in recipe.read_text()
        recipe.write_text(recipe.read_text().replace(usual, less))
    (tmp_path / ".venv").symlink_to(sys.prefix)
    port, page = free_port(), blocks("docs/serving.md")
    script = f"\necho '{CUT}'\n".join(block.text.replace(PORT, str(port)) for block in page if not block.not_run)
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
    demo, judged, _, picture, pixels, refusal, _, table, elsewhere = done.stdout.split(f"{CUT}\n")
    accuracy = re.search(r"^distilled student .* (\S+)$", demo, re.MULTILINE)
    assert accuracy is not None
    assert re.search(rf"^test/acc +{float(accuracy[1]):.4f}$", judged, re.MULTILINE), "evaluated as the main job did"
    assert "quickstart: version 1 promoted: the only criterion holds" in judged
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


def test_the_pages_name_what_is_there() -> None:
    """Results apart, which a benchmark writes."""
    for page in WRITTEN:
        text = (ROOT / page).read_text()
        for path in re.findall(r"(?<![\w/])(?:docs|tests|benchmarks(?!/results)|deploy)/[\w./-]*+(?![<*])", text):
            assert (ROOT / path.rstrip("./")).exists(), f"{page}: {path}"
