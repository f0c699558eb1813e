"""A distillation's fusion for `mode=synergy`: what `fusion=` names, filled into the configuration's modules."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from models.adapter import DistillationAdapter
from models.ib_mbm import IBMBM
from models.weights import ADAPTER, fill, read_metadata, read_state
from pipeline.compose.settings import read_data
from pipeline.config import Config
from pipeline.config.words import written
from pipeline.data.sources import ImageData
from pipeline.distill import networks, teachers
from pipeline.errors import UserError
from pipeline.evaluate.request import FUSIONS
from pipeline.evaluate.source import Source, fetch
from pipeline.paths import user_path
from pipeline.runs import records
from pipeline.runs.folders import FUSION
from pipeline.runs.run import Run
from pipeline.training.methods.asib.fusion import Fusion

logger = logging.getLogger("asib")
MBM, HEAD, OURS = "mbm.pth", "synergy_head.pth", "fusion.safetensors"
GATE = "gate/open"
"""A metric of every B-epoch in runs with a fusion, and in no other runs."""
DECIDING = (
    "ib_mbm_query_key",
    "ib_mbm_n_head",
    "ib_mbm_feature_norm",
    "learnable_q",
    "synergy_logit_scale",
    "use_distillation_adapter",
)
"""Keys of `method` that change what a fusion computes, without changing its weights' shapes (all of them)."""


def find(run: Run, given: str | None, student: Source | None) -> Source:
    """What `fusion=` names (our file, or the folder of the research code's two); by default what is beside the student.

    Raises UserError.
    """
    key = f"fusion={given}"
    if given is None:
        if student is not None and student.folder is not None:
            return _local(student.folder, f"fusion beside student={student.path}")
        if student is not None and student.made_by is not None:
            given, key = f"runs:/{student.made_by}", f"fusion of the run that made student={run.config.student}"
        else:
            raise UserError(f"mode=synergy needs fusion={FUSIONS}")
    if given.startswith("runs:/"):
        run_id, _, path = given.removeprefix("runs:/").strip("/").partition("/")
        try:
            return Source(fetch(run, f"runs:/{run_id}/{path or FUSION}", key), run_id)
        except UserError as error:
            if not path and not _had_fusion(run, run_id):
                raise _without(key) from error
            raise
    return _local(user_path(given, key), key)


def _had_fusion(run: Run, run_id: str) -> bool:
    """Whether a run trained with a fusion; assumed true if that cannot be looked up."""
    try:
        return run.delivery is None or GATE in run.delivery.run_info(run_id)["metrics"]
    except UserError:
        return True


def _without(key: str) -> UserError:
    return UserError(
        f"{key}: that run has no fusion; mode=single and mode=average work without one, mode=synergy needs "
        "fusion=runs:/<id> of a run that was distilled through one"
    )


def _local(path: Path, key: str) -> Source:
    if path.is_file():
        path = path.parent if path.name in (MBM, HEAD) else path
    for file in (path, path / FUSION, path / OURS):
        if file.is_file():
            own = [folder for folder in list(file.absolute().parents)[:2] if (folder / "journal.jsonl").exists()]
            return Source(file, None, own[0] if own else None)
    missing = [name for name in (MBM, HEAD) if not (path / name).is_file()]
    if missing and (path / "journal.jsonl").exists() and GATE not in records.from_folder(path).metrics:
        raise _without(key)
    if missing:
        raise UserError(f"{key}: no {' and no '.join(missing)} there; give runs:/<id>, {OURS} or a folder with both")
    return Source(path)


def load(run: Run, place: Source, fusion: Fusion, hashes: Sequence[str], data: ImageData) -> None:
    """Load the fusion's weights; it will fuse the teachers with these hashes.

    Raises UserError: it belongs to another configuration, or was trained with other teachers or on other classes.
    """
    _check_origin(run, place, hashes)
    key = f"fusion={place.path}"
    with networks.user_error(key):
        if place.path.is_file():
            record = read_metadata(place.path)
            if record.get("classes", list(data.classes)) != list(data.classes):
                raise ValueError("it was trained on other classes, or on these in another order; choose its data set")
            networks.check_prepared(record, data)
            fill(fusion, read_state(place.path), "it is not a fusion of this configuration")
        else:
            _load_research_code(run, place.path, fusion)


def _load_research_code(run: Run, folder: Path, fusion: Fusion) -> None:
    """`mbm.pth` and `synergy_head.pth`; the teachers' adapters lie in the teachers' own checkpoints there."""
    mbm, head = read_state(folder / MBM), read_state(folder / HEAD)
    if not any(name.startswith("net.") for name in head):  # shared by all names, so taken for a wrapper's prefix
        head = {f"net.{name}": value for name, value in head.items()}
    fusion.ib_mbm = _as_wide_as(mbm, fusion.ib_mbm, len(fusion.adapters), run.config)
    fill(fusion.ib_mbm, mbm, f"{MBM} is not an IB-MBM of this configuration")
    fill(fusion.head, head, f"{HEAD} is not a synergy head of this configuration")
    for index, adapter in enumerate(fusion.adapters):
        if isinstance(adapter, DistillationAdapter):
            state = _adapter(run, index)
            fill(adapter, state, f"model.teachers.{index}.checkpoint: its distillation adapter does not fit")


def _as_wide_as(state: Mapping[str, Tensor], module: IBMBM, count: int, config: Config) -> IBMBM:
    """An IB-MBM that takes the teachers' features as one token, if the checkpoint's does."""
    weight = state.get("kv_proj.weight")
    if weight is None or weight.dim() != 2 or weight.shape[1] != count * module.kv_dim:
        return module
    m = config.method
    made = IBMBM(
        module.q_dim,
        count * module.kv_dim,
        module.d_emb,
        m.ib_mbm_n_head,
        m.ib_mbm_logvar_clip,
        m.ib_mbm_min_std,
        m.learnable_q,
        m.ib_mbm_feature_norm,
    )
    return made.to(module.kv_proj.weight.device)


def _adapter(run: Run, index: int) -> dict[str, Tensor]:
    checkpoint, name = run.config.model.teachers[index].checkpoint, f"model.teachers.{index}.checkpoint"
    found: dict[str, Tensor] = {}
    if checkpoint is not None:
        path, _ = teachers.locate(run, checkpoint, teachers.WEIGHTS, f"{name}={checkpoint}")
        found = {k.removeprefix(ADAPTER): v for k, v in read_state(path).items() if k.startswith(ADAPTER)}
    if not found:
        raise ValueError(
            f"{MBM} reads the teachers through adapters, which the research code keeps with each teacher: "
            f"{name} has none; give a checkpoint with {ADAPTER}*, or method.use_distillation_adapter=false"
        )
    return found


def _check_origin(run: Run, place: Source, hashes: Sequence[str]) -> None:
    """Check that the run that trained the fusion computed with it what is computed here, and from these teachers."""
    method, trained_with = _origin(run, place)
    ours = run.config.method
    for name in DECIDING:
        if name in method and written(method[name]) != written(getattr(ours, name)):
            raise UserError(
                f"method.{name}={written(getattr(ours, name))}: the run that trained the fusion had "
                f"{written(method[name])}; evaluate with its configuration, cfg=runs:/<id>/config.yaml"
            )
    if method.get("use_teacher_finetuning"):
        logger.warning("that run also trained its teachers in A-steps, and kept only what they were before")
    if trained_with and trained_with != ",".join(hashes):
        raise UserError(
            f"model.teachers: the fusion was trained with teachers {_short(trained_with.split(','))}, these are "
            f"{_short(hashes)}; give their checkpoints, model.teachers.<k>.checkpoint=…"
        )


def _origin(run: Run, place: Source) -> tuple[dict[str, Any], str]:
    """The `method` section and the teachers' hashes of the run that trained a fusion; empty where not known."""
    if place.folder is not None:
        config, tags = place.folder / "config.yaml", records.from_folder(place.folder).tags
    elif place.made_by is not None and run.delivery is not None:
        tags = run.delivery.run_info(place.made_by)["tags"]
        config = fetch(run, f"runs:/{place.made_by}/config.yaml", f"fusion=runs:/{place.made_by}")
    else:
        return {}, ""
    content = read_data(config, str(config)) if config.is_file() else {}
    hashes = tags.get("asib.teachers", "")
    return dict((content or {}).get("method", {})), "" if hashes == "none" else hashes


def _short(hashes: Sequence[str]) -> str:
    return ", ".join(text[:12] for text in hashes)
