"""What the images and manifests of deploy/ name exists, is locked, and serves: there is no docker or cluster here."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml
from packaging.requirements import Requirement

from pipeline.predict import serve
from pipeline.runs.step import Step
from steps import serve as serve_step
from steps import sweep as sweep_step
from tests.pipeline.served.test_bundle import CLASSES, network
from tests.servers import free_port

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
IMAGES = [DEPLOY / "Dockerfile", DEPLOY / "serve/Dockerfile", DEPLOY / "worker/Dockerfile"]
LOCKED = [DEPLOY, DEPLOY / "serve"]
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))


def pins(lock: Path) -> dict[str, tuple[str, ...]]:
    """`name==version` -> hashes, sorted."""
    found = {}
    for block in re.findall(r"^\S+==.*?(?=^\S|\Z)", lock.read_text(), re.MULTILINE | re.DOTALL):
        found[re.split(r"[\s;\\]", block)[0]] = tuple(sorted(re.findall(r"sha256:[0-9a-f]{64}", block)))
    return found


@pytest.mark.parametrize("folder", LOCKED, ids=lambda folder: folder.name)
def test_an_images_lock_is_part_of_the_projects(folder: Path) -> None:
    found, whole = pins(folder / "requirements.lock"), pins(ROOT / "requirements.lock")
    assert len(found) > 10
    assert [pin for pin, hashes in found.items() if not hashes] == []
    assert found.items() <= {pin.partition("[")[0] + pin[pin.index("==") :]: h for pin, h in whole.items()}.items() | (
        whole.items()
    )
    names = {re.split(r"[\[=]", pin)[0] for pin in found}
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert {Requirement(line).name for line in lines if not line.startswith("#")} <= names


@pytest.mark.parametrize("file", [*IMAGES, DEPLOY / "compose.yaml"], ids=lambda file: file.parent.name + file.suffix)
def test_images_of_others_are_named_by_digest(file: Path) -> None:
    named = re.findall(r"^(?:FROM| +image:) (\S+)", file.read_text(), re.MULTILINE)
    assert named
    assert [image for image in named if not re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*@sha256:[0-9a-f]{64}", image)] == []


@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.parent.name)
def test_an_image_installs_by_hash_and_copies_what_is_there(file: Path) -> None:
    text = file.read_text()
    (install,) = re.findall(r"pip install ((?:.*\\\n)*.*)", text)
    assert "--require-hashes" in install
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [name for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for name in line.split()[:-1]]
    assert copied
    for name in copied:
        assert list(ROOT.glob(name)), name
        assert any(fnmatch(name, pattern) or name == pattern for pattern in let_in), name


def documents(file: Path) -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(file.read_text())}


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_a_manifest_agrees_with_itself(file: Path) -> None:
    found = documents(file)
    workload = found.get("Job") or found["Deployment"]
    pod = workload["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    volumes = [volume["name"] for volume in pod["spec"]["volumes"]]
    assert [mount["name"] for mount in container["volumeMounts"]] == volumes
    assert pod["spec"]["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    image = next(path for path in IMAGES if f"asib-{path.parent.name}" == container["image"].partition(":")[0])
    assert f"USER {pod['spec']['securityContext']['runAsUser']}" in image.read_text()
    if service := found.get("Service"):
        labels = pod["metadata"]["labels"]
        assert workload["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
        assert {p["targetPort"] for p in service["spec"]["ports"]} == {p["name"] for p in container["ports"]}


def keys(step: Step) -> set[str]:
    return {*step.own, "output_dir", "tracking.uri", "dataset.root"}


def test_workers_join_with_keys_of_the_sweep() -> None:
    spec = documents(DEPLOY / "kubernetes/worker.yaml")["Job"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    given = dict(argument.split("=", 1) for argument in container["args"])
    assert given.keys() <= keys(sweep_step.STEP)
    known = {entry["name"] for entry in container["env"]} | {"MLFLOW_TRACKING_URI"}  # of the secret
    assert {name for text in given.values() for name in re.findall(r"\$\((\w+)\)", text)} <= known
    (rule, _) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # what a policy needs

    sky = yaml.safe_load((DEPLOY / "skypilot.yaml").read_text())
    assert sky.keys() == {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "setup", "run"}
    (line,) = sky["run"].splitlines()
    program, *arguments = line.split(" -m steps.sweep ")[-1].split()
    told = {argument.partition("=")[0] for argument in (program, *arguments)}
    assert told == given.keys()
    assert set(re.findall(r"\$(\w+)", line)) <= {*sky["envs"], *sky["secrets"], "HOME"}
    assert "--require-hashes --requirement requirements.lock" in sky["setup"]


def test_probes_ask_for_what_the_server_answers() -> None:
    (container,) = documents(DEPLOY / "kubernetes/serve.yaml")["Deployment"]["spec"]["template"]["spec"]["containers"]
    asked = {probe["httpGet"]["path"] for name, probe in container.items() if name.endswith("Probe")}
    answered = {getattr(route, "path", "") for route in serve.application(None, serve.Limits()).routes}  # type: ignore[arg-type]
    assert asked == {"/ready", "/ping"}
    assert asked | {"/metrics"} <= answered
    entry = json.loads(re.findall(r"^ENTRYPOINT (.+)$", (DEPLOY / "serve/Dockerfile").read_text(), re.MULTILINE)[0])
    given = dict(argument.split("=", 1) for argument in entry[3:])
    assert given.keys() <= serve_step.OWN.keys()
    assert int(given["port"]) == container["ports"][0]["containerPort"]
    assert given["model"] in [mount["mountPath"] for mount in container["volumeMounts"]]


def linked(to: Path, lock: Path) -> None:
    """What the lock names, out of this environment, and nothing else: what the image's site-packages will hold."""
    to.mkdir()
    for pin in pins(lock):
        name, _, version = pin.partition("==")
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # locked for another system or Python
            found = importlib.metadata.distribution(name)
            if found.version != version:
                continue
            for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
                source = Path(str(found.locate_file(top)))
                if not (to / top).exists():
                    (to / top).symlink_to(source)


@pytest.mark.slow
def test_the_image_of_a_served_student_has_all_that_it_needs(tmp_path: Path) -> None:
    packages, code, model = tmp_path / "packages", tmp_path / "asib", tmp_path / "model"
    linked(packages, DEPLOY / "serve/requirements.lock")
    for name in ("conf", "pipeline", "steps"):
        shutil.copytree(ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    model.mkdir()
    onnx.save(network(), model / "student.onnx")
    (model / "meta.json").write_text(json.dumps({"classes": CLASSES, "image_size": 4, "in_chans": 3}))
    port = free_port()
    command = [sys.executable, "-S", "-m", "steps.serve", f"model={model}", f"port={port}"]
    # not even root may write into /proc/sys, as the image's user may not into /asib
    away = "/proc/sys"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{code}{os.pathsep}{packages}", "HOME": away}
    log = tmp_path / "log"
    with log.open("w") as file:
        server = subprocess.Popen(command, cwd=away, env=environment, stdout=file, stderr=file)
    try:
        end = time.monotonic() + 60
        while True:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as up,
            ):
                assert up.read() == b"ready\n"
                break
            time.sleep(0.1)
        body = json.dumps({"inputs": [[[[255] * 3] * 4] * 4]}).encode()
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=10) as answer:
            assert json.load(answer)["predictions"][0]["class"] == "light"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert "asib_images_total 1\n" in answer.read().decode()
        server.send_signal(signal.SIGTERM)
        server.wait(20)
        # ONNX Runtime's telemetry complains when its identifier cannot be stored at home
        assert "telemetry" not in log.read_text()
    finally:
        server.kill()
        server.wait()
