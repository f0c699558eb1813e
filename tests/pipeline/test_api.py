"""Steps as functions, runs as data frames, parts of a loop: what docs/api.md promises to a notebook."""

from __future__ import annotations

import doctest
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

import pipeline
from models import zoo
from pipeline import Distiller, UserError, compose, curves, frames, parts, run_stages, runs
from pipeline.api import Finished
from pipeline.compose import keywords
from pipeline.errors import NonFinite
from pipeline.reporting import figures
from pipeline.training import losses, student
from pipeline.training.methods.asib import schedules
from tests.steps.lab import SIZE, At, Lab, ending, points, same_run, signal_at

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def no_pictures() -> Iterator[None]:
    """Drawing is a third of a step's time, and has tests of its own."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(figures, "png", lambda made, **_: b"")
        yield


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("api"))


def here(lab: Lab) -> dict[str, Any]:
    return {"cfg": lab.cfg, "output_dir": lab.runs}


@pytest.fixture(scope="module")
def first(lab: Lab) -> Finished:
    done = pipeline.distill(here(lab), "method.kd_alpha=0.4", seed=1)
    assert done is not None
    return done


# the façade ----------------------------------------------------------------------------------------------------------


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys; before = {*sys.modules}; import pipeline; print(*sorted({*sys.modules} - before))"
    found = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert [name for name in found if name.partition(".")[0] in {"torch", "numpy", "pydantic", "hydra"}] == []
    assert [name for name in found if name.startswith("pipeline")] == ["pipeline"]


@pytest.mark.parametrize("name", sorted(pipeline.FUNCTIONS))
def test_a_name_is_a_function_or_a_package_that_is_one(name: str) -> None:
    """Importing the folder of the same name may not take the function away."""
    assert callable(getattr(pipeline, name))
    assert name in dir(pipeline)


def test_a_package_that_was_imported_is_still_a_function(capsys: pytest.CaptureFixture[str]) -> None:
    import pipeline.distill.train  # puts the package where the function was

    assert pipeline.distill("--help") is None
    assert "python -m steps.distill" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "keys", "meant"),
    [
        (["cfg=quickstart"], {"seed": 1}, "cfg=quickstart seed=1"),
        ([{"method.tau": 2.0}, "seed=3"], {}, "method.tau=2.0 seed=3"),
        ([], {"method": {"kd_alpha": np.float64(0.3), "plus": ["kd"]}}, "method.kd_alpha=0.3 method.plus=[kd]"),
        ([], {"resume": None, "log_model": False, "cfg": Path("a.yaml")}, "resume=null log_model=false cfg=a.yaml"),
        ([{"seeds": range(2)}], {"rhos": np.array([0, 0.5])}, "seeds=[0,1] rhos=[0.0,0.5]"),
    ],
)
def test_keys_are_written_as_on_the_command_line(given: list[Any], keys: dict[str, Any], meant: str) -> None:
    assert keywords.words(given, keys) == meant.split()


def test_a_list_of_teachers_is_composed_as_it_was_given() -> None:
    teachers = [{"name": "cifar_resnet8", "pretrained": False}, {"name": "cifar_wrn_16_1"}]
    made = compose.compose.compose("quickstart", keywords.words([], {"model": {"teachers": teachers}}))
    assert [teacher.name for teacher in made.model.teachers] == ["cifar_resnet8", "cifar_wrn_16_1"]


# errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"method.tua": 2}, {"dataset.path": "/nowhere.npz"}, {"device": "cuda:9"}])
def test_a_refusal_is_one_exception_with_the_steps_line(lab: Lab, change: dict[str, Any]) -> None:
    with pytest.raises(UserError) as refused:
        pipeline.distill(here(lab), change)
    assert lab.refuses("distill", *keywords.words([change], {})) == str(refused.value)


def test_what_is_no_key_is_refused() -> None:
    with pytest.raises(UserError, match="3: give words"):
        pipeline.distill(3)
    with pytest.raises(UserError, match="distil: no such step"):
        pipeline.run("distil")


def test_a_run_that_fails_raises_what_ended_it(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge() -> None:
        raise NonFinite("by accident")

    monkeypatch.setattr("pipeline.distill.train.Loop", At(3, diverge).loop)
    before = set(lab.run_folders())
    with pytest.raises(NonFinite, match="by accident"):
        pipeline.distill(here(lab), seed=8)
    (folder,) = set(lab.run_folders()) - before
    assert ending(folder) == ("FAILED", "failed", 1)


def test_ctrl_c_is_pythons_again_and_the_run_is_killed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.distill.train.Loop", signal_at(3, signal.SIGINT).loop)
    before = set(lab.run_folders())
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            pipeline.distill(here(lab), seed=9)
    finally:
        signal.signal(signal.SIGINT, ignored)
    (folder,) = set(lab.run_folders()) - before
    assert ending(folder) == ("KILLED", "killed", 130)


# what a step leaves --------------------------------------------------------------------------------------------------


def state() -> list[Any]:
    import matplotlib

    log = logging.getLogger("asib")
    torch_s = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)]
    logged = log.handlers[:], log.level, log.propagate
    backend = dict.__getitem__(matplotlib.rcParams, "backend")
    return [torch_s, torch.get_rng_state().tolist(), dict(os.environ), handlers, logged, backend]


@pytest.fixture(scope="module")
def second(lab: Lab, first: Finished) -> tuple[Finished, list[Any], list[Any]]:
    """Another run, with the process's state before and after: it sets threads, determinism and random numbers."""
    change = {"method": {"kd_alpha": 0.8}, "threads": 1, "log_model": False}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    before = state()
    done = pipeline.distill(here(lab), change, "optim.deterministic=true", seed=2)
    after = state()
    torch.set_num_threads(threads)
    assert done is not None
    return done, before, after


def test_the_process_is_as_before(second: tuple[Finished, list[Any], list[Any]]) -> None:
    _, before, after = second
    assert after == before


def test_the_run_is_the_steps(lab: Lab, first: Finished) -> None:
    assert (first.exit_code, first.run_id, first.url) == (0, None, None)
    step = lab.step("distill", "method.kd_alpha=0.4", "seed=1")
    same_run(first.folder, step.folder)
    assert first.metrics["final/acc_last"] == points(step.folder)["final/acc_last", 3][-1]


def test_the_student_is_the_one_that_was_measured(lab: Lab, first: Finished) -> None:
    from timm.data import resolve_model_data_config

    shown = resolve_model_data_config(first.student)
    assert shown["input_size"] == (3, SIZE, SIZE)
    with np.load(lab.data) as arrays, np.load(first.folder / "predictions.npz") as stored:
        mean, std = (np.array(shown[name]) for name in ("mean", "std"))
        images = torch.tensor((arrays["x_test"] / 255 - mean) / std, dtype=torch.float32).permute(0, 3, 1, 2)
        predicted = first.student(images).argmax(dim=1).numpy()
        assert np.array_equal(predicted, stored["predictions"])
        assert 100 * np.mean(predicted == arrays["y_test"]) == first.metrics["final/acc_val_selected"]
    assert not first.student.training


def test_a_run_without_a_student_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="keeps no student"):
        _ = Finished(tmp_path, {}).student


# frames --------------------------------------------------------------------------------------------------------------


def test_a_frame_has_the_keys_that_differ(
    lab: Lab, first: Finished, second: tuple[Finished, list[Any], list[Any]]
) -> None:
    both = [first, second[0]]
    frame = runs([first, both[1].folder], output_dir=lab.runs)
    keys = [name for name in frame if "/" not in name]
    assert keys == ["run", "name", "step", "label", "status", "seed", "method.kd_alpha"]
    assert frame["seed"].tolist() == [1, 2]
    assert frame["method.kd_alpha"].tolist() == [0.4, 0.8]
    assert frame["final/acc_val_selected"].tolist() == [done.metrics["final/acc_val_selected"] for done in both]
    taught = runs(f"parent={first.folder}", output_dir=lab.runs)
    assert taught["name"].tolist() == ["teacher_0 resnet8 s1", "teacher_1 wrn_16_1 s1"]
    of_all = runs("experiment=asib", "tracking=offline", output_dir=lab.runs)
    assert {*frame["run"]} <= {*of_all["run"]}
    assert not {*taught["run"]} & {*of_all["run"]}


def test_curves_are_what_the_journal_holds(lab: Lab, first: Finished) -> None:
    long = first.curves()
    assert list(long) == ["run", "epoch", "metric", "value"]
    expected = points(first.folder)
    found = {(row.metric, row.epoch): [row.value] for row in long.itertuples()}
    assert {key: found[key] for key in expected} == expected
    assert curves(str(first.folder), output_dir=lab.runs).equals(long)


@pytest.mark.parametrize("which", ["0123456789abcdef", "parent=0123456789abcdef", "experiment=nobodys"])
def test_a_run_that_is_not_there_is_refused(lab: Lab, which: str) -> None:
    with pytest.raises(UserError, match=which.rpartition("=")[2]):
        runs(which, "tracking=offline", output_dir=lab.runs)


@pytest.mark.slow
@pytest.mark.usefixtures("warm_deliveries")
def test_tracked_runs_end_with_their_deliveries_and_are_read_from_the_server(
    sqlite_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.tracking import pipe

    lab = Lab(tmp_path / "lab")

    started: list[Any] = []
    start = pipe.subprocess.Popen

    def noted(*given: Any, **more: Any) -> Any:
        started.append(start(*given, **more))
        return started[-1]

    monkeypatch.setattr(pipe.subprocess, "Popen", noted)
    where = {"tracking": {"mode": "online", "uri": sqlite_uri, "experiment": "notebook"}}
    done = [pipeline.distill(here(lab), where, seed=seed) for seed in (4, 5)]
    assert [each.run_id is not None and each.url is None for each in done] == [True, True]  # a file has no pages
    elsewhere = {"output_dir": tmp_path / "elsewhere", "tracking.uri": sqlite_uri}
    local, distant = (runs([d.run_id for d in done], place) for place in ({**here(lab), **where}, elsewhere))
    assert distant.drop(columns="name").equals(local.drop(columns="name"))  # offline runs are called by their folders
    assert runs("experiment=notebook", elsewhere)["run"].tolist() == [each.run_id for each in done]
    (mine, theirs) = (
        set(frame.itertuples(index=False)) for frame in (done[0].curves(), curves(done[0].run_id, elsewhere))
    )
    assert {tuple(row) for row in mine} == {tuple(row) for row in theirs}
    assert len(started) == 5
    assert [process.poll() for process in started] == [0] * 5


# parts ---------------------------------------------------------------------------------------------------------------


def test_a_distiller_needs_no_data_unless_its_method_reads_it() -> None:
    net = zoo.create_model("cifar_resnet8", 4, image_size=16)
    with pytest.raises(UserError, match="method=crd reads its training images"):
        Distiller(net, [net], method="crd", image_size=16)
    distiller = Distiller(net, [net], method="kd", image_size=16)
    with pytest.raises(UserError, match="phase=a: method=kd has b"):
        distiller(torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64), phase="a")


class Stripes(Dataset[Any]):
    """A bright column says the class; floats as torchvision's ToTensor makes them."""

    classes = ("left", "middle", "right")

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        noise = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(i)) * 0.5
        noise[:, :, 4 * (i % 3) : 4 * (i % 3) + 4] += 0.5
        return noise, i % 3


def test_a_torch_data_set_is_read_pixel_by_pixel() -> None:
    data = parts.image_data(Stripes(6), Stripes(3))
    assert (data.classes, data.train_y.tolist()) == (Stripes.classes, [0, 1, 2, 0, 1, 2])
    assert torch.allclose(data.train_x[4] / 255, Stripes(6)[4][0], atol=0.5 / 255 + 1e-6)
    nameless = Stripes(6)
    nameless.classes = None  # type: ignore[assignment]
    with pytest.raises(UserError, match="no attribute classes"):
        parts.image_data(nameless, Stripes(3))


# pages ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["docs/api.md", keywords, pipeline.api, frames, parts, losses, schedules, student])
def test_the_examples_are_true(where: Any) -> None:
    if isinstance(where, str):
        found = doctest.testfile(str(ROOT / where), module_relative=False, optionflags=doctest.ELLIPSIS)
        assert found.attempted > 30
    else:
        found = doctest.testmod(where)
    assert found.failed == 0


def test_stages_train_ones_own_networks() -> None:
    net, teacher = (zoo.create_model("cifar_resnet8", 3, image_size=12) for _ in range(2))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    method = {"kd_alpha": 0.5, "teacher_adapt_epochs": 1, "distill_out_dim": 8, "ib_mbm_out_dim": 8}
    brief = {"method": {**method, "student_epochs_per_stage": [1]}, "dataset": {"batch_size": 16}}
    metrics, history = run_stages(net, [teacher, teacher], Stripes(48), Stripes(12), brief, "method.kd_target=synergy")
    assert {"a_step/loss", "b_step/loss", "student/acc"} <= {name for _, name, _ in history}
    assert metrics["cost/updates/a"] == metrics["cost/updates/b"] == 3
    assert any(not torch.equal(before[name], value) for name, value in net.state_dict().items())
