"""The ladder: every rung changes what it states over its parent, over any configuration, and nothing else."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from pipeline.ablate.request import table
from pipeline.compose import rungs
from pipeline.compose.compose import compose
from pipeline.config import Config, config_hash
from pipeline.config.identity import computation
from pipeline.errors import UserError
from pipeline.paths import REPOSITORY

CFGS = ("base", "quickstart")
TOLD = (REPOSITORY / "docs" / "method.md").read_text().split("## 9.")[1].split("\n## ")[0]
OURS = [name for name in rungs.known() if f"`{name}`" in TOLD]
"""The rungs that the method describes; conf/experiment may hold a user's own."""


def over_cfg(cfg: str, names: list[str], seeds: Sequence[int] = (0,), overrides: Sequence[str] = ()) -> list[Config]:
    rungs.refuse_overrides(names, overrides)
    return rungs.configurations(compose(cfg, overrides), names, seeds)


@pytest.fixture(scope="module", params=CFGS)
def over(request: pytest.FixtureRequest) -> tuple[Config, dict[str, Config]]:
    """A configuration and all rungs over it."""
    cfg = compose(request.param)
    return cfg, dict(zip(OURS, rungs.configurations(cfg, OURS, [0]), strict=True))


def test_the_ladder_is_the_ten_rungs_of_the_method() -> None:
    """The table of docs/method.md section 9, and the side runs below it."""
    assert rungs.ladder() == re.findall(r"^\| L\w+ `(\w+)`", TOLD, re.MULTILINE)
    assert set(OURS) == {*rungs.ladder(), "l2_control", *re.findall(r"`(side_\w+)`", TOLD)}
    assert "asib_stage" not in rungs.known()


@pytest.mark.parametrize("name", OURS)
def test_a_rung_differs_from_its_parent_in_exactly_the_keys_of_its_file(
    over: tuple[Config, dict[str, Config]], name: str
) -> None:
    cfg, found = over
    rung = rungs.known()[name]
    parent, child = computation(found[rung.parent] if rung.parent else cfg), computation(found[name])
    body = yaml.safe_load((rungs.CONF / "experiment" / f"{name}.yaml").read_text())["method"]
    assert {k for k in child if child[k] != parent[k]} == {f"method.{key}" for key in body}
    assert found[name].rung == name


@pytest.mark.step  # Hydra composes every rung
def test_a_rung_over_the_base_is_its_file() -> None:
    for name, found in zip(OURS, over_cfg("base", OURS), strict=True):
        assert config_hash(found) == config_hash(compose(name)), name
    assert config_hash(compose("l3_adaptive")) == config_hash(compose("l3d_adaptive"))
    assert rungs.read_names("l3_adaptive") == ["l3d_adaptive"]


def test_the_lowest_rungs_run_neither_teachers_nor_fusion(over: tuple[Config, dict[str, Config]]) -> None:
    found = over[1]
    assert not found["l0_baseline"].method.distils
    assert found["l0k_aver"].method.distils
    assert not found["l0k_aver"].method.uses_fusion
    assert all(found[name].method.uses_fusion for name in rungs.ladder()[2:])


def test_values_that_follow_from_the_configuration_follow_it() -> None:
    names = ["l0k_aver", "l2_cccp", "l2_control", "side_two_view"]
    overrides = ["method.kd_alpha=0.4", "method.cccp_alpha=0.1", "method.student_epochs_per_stage=[2,2,2,2]"]
    aver, cccp, control, views = (c.method for c in over_cfg("quickstart", names, [0], overrides))
    assert aver.kd_alpha == cccp.kd_alpha == control.kd_alpha == 0.4
    assert (control.teacher_adapt_alpha_kd, control.use_cccp) == (cccp.cccp_alpha, False) == (0.1, False)
    assert (control.cccp_nt, control.cccp_ns) == (cccp.cccp_nt, cccp.cccp_ns) == (2, 1)
    assert (views.kd_two_view_start_epoch, views.kd_two_view_stop_epoch) == (2, 8)


def test_a_seed_is_all_that_two_runs_of_a_rung_differ_in() -> None:
    one, other = over_cfg("quickstart", ["l1_ib"], [3, 7])
    assert one.model_copy(update={"seed": 7}) == other


def test_weights_that_follow_from_the_rescaling_are_no_difference() -> None:
    zero, aver = over_cfg("quickstart", ["l0_baseline", "l0k_aver"], [0], ["method.renorm_ce_kd=true"])
    assert (zero.method.ce_alpha, zero.method.kd_alpha) == (1.0, 0.0)
    assert (aver.method.ce_alpha, aver.method.kd_alpha) == (0.5, 0.5)


# what is refused -----------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The rungs' files, to be tampered with."""
    for name in OURS:
        (tmp_path / "conf" / "experiment").mkdir(parents=True, exist_ok=True)
        shutil.copy(rungs.CONF / "experiment" / f"{name}.yaml", tmp_path / "conf" / "experiment")
    monkeypatch.setattr(rungs, "CONF", tmp_path / "conf")
    return tmp_path / "conf" / "experiment"


def tamper(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  - l1d_deterministic\n", "  - l1d_deterministic\n  - override /optim: sgd\n"),
        ("rung: l1_ib", "rung: l1"),
        ("method:\n", "method: [\n"),
    ],
)
def test_a_file_that_is_no_rung_is_refused_where_it_is_needed(files: Path, old: str, new: str) -> None:
    tamper(files / "l1_ib.yaml", old, new)
    assert rungs.read_names("l1d_deterministic") == ["l1d_deterministic"]
    for name in ("l1_ib", "ladder"):
        with pytest.raises(UserError, match=r"^rungs=\w+: .*: write rung: \w+, defaults: \["):
            rungs.read_names(name)


def test_a_rung_is_added_by_adding_its_file(files: Path) -> None:
    text = "defaults: [l1_ib, _self_]\nrung: mine\nmethod: {tau: 2}\noptim: {student_lr: 0.01}\n"
    (files / "mine.yaml").write_text(text)
    (files / "unreadable.yaml").write_text("a: [")
    below, mine = over_cfg("quickstart", ["l1_ib", "mine"])
    assert rungs.known()["mine"].parent == "l1_ib"
    assert (below.method.tau, mine.method.tau, mine.optim.student_lr) == (4.0, 2.0, 0.01)


def test_any_other_difference_from_the_parent_is_refused_by_its_name() -> None:
    cfg = compose("quickstart")
    parent, child = rungs.configurations(cfg, ["l1d_deterministic", "l1_ib"], [0])
    rungs.check(rungs.known()["l1_ib"], parent, child)
    other = child.model_copy(update={"method": child.method.model_copy(update={"tau": 2.0})})
    with pytest.raises(UserError, match=r"^rung l1_ib differs from l1d_deterministic in method\.tau \(4\.0 -> 2\.0\)"):
        rungs.check(rungs.known()["l1_ib"], parent, other)


@pytest.mark.parametrize(
    ("cfg", "names", "overrides", "said"),
    [
        ("asib_stage", ["l3b_gate"], [], "rung l3b_gate changes nothing over l3a_auto"),
        ("l2_cccp", ["l2_cccp"], [], "rung l2_cccp changes nothing over l1_ib"),
        ("l0_baseline", ["l1_ib"], [], "method.kd_alpha=0"),
        ("quickstart", ["l4_full"], ["method={num_stages: 2, student_epochs_per_stage: [6,6]}"], "num_stages=4"),
        ("quickstart", ["l3d_adaptive"], ["method.kd_uncertainty_weight=0.2"], "rung l3d_adaptive sets it"),
        ("quickstart", ["l1_ib"], ["model/teacher=resnet56"], "fuses teachers and needs two"),
    ],
)
def test_what_a_rung_cannot_stand_over_is_refused(cfg: str, names: list[str], overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        over_cfg(cfg, names, [0], overrides)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_names_and_seeds_are_read_as_people_write_them() -> None:
    assert rungs.read_names("[l1_ib, ladder]") == ["l1_ib", *(n for n in rungs.ladder() if n != "l1_ib")]
    assert rungs.read_names("all") == list(rungs.known())
    assert rungs.read_seeds("[2, 0,2]") == [2, 0]
    for text, said in (("l1", "no such rung"), ("l1_bi", "did you mean l1_ib"), (" ", "empty")):
        with pytest.raises(UserError, match=said):
            rungs.read_names(text)
    for text in ("", "a", "-1", "1.5"):
        with pytest.raises(UserError, match="seeds="):
            rungs.read_seeds(text)


@pytest.mark.usefixtures("files")
def test_the_table_states_every_rung() -> None:
    lines = table(compose("quickstart")).splitlines()
    assert len(lines) == 2 + len(OURS)
    assert "| `l0k_aver` | `l0_baseline` | `kd_alpha=0.5`, `kd_target=avg` |" in lines
