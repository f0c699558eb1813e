"""The names of the keys: all of the schema's, those of the research code, and the nearest to a misspelt one."""

import difflib
from collections.abc import Collection, Iterable, Iterator

from pydantic import BaseModel

from pipeline.errors import UserError

OLD_NAMES = {
    "student_iters": "method.student_epochs_per_stage",
    "student_epochs_schedule": "method.student_epochs_per_stage",
    "teacher_iters": "method.teacher_adapt_epochs",
    "teacher1_type": "model.teachers.0.name",
    "teacher2_type": "model.teachers.1.name",
    "student_type": "model.student.name",
    "teacher1_ckpt": "model.teachers.0.checkpoint",
    "teacher2_ckpt": "model.teachers.1.checkpoint",
    "finetune_ckpt1": "model.teachers.0.checkpoint",
    "finetune_ckpt2": "model.teachers.1.checkpoint",
    "teacher1_freeze_level": "method.teacher_freeze_level",
    "teacher2_freeze_level": "method.teacher_freeze_level",
    "teacher1_freeze_bn": "method.teacher_freeze_bn",
    "teacher2_freeze_bn": "method.teacher_freeze_bn",
    "teacher1_bn_head_only": "method.teacher_bn_head_only",
    "teacher2_bn_head_only": "method.teacher_bn_head_only",
    "teacher1_freeze_scope": "method.teacher_freeze_scope",
    "teacher2_freeze_scope": "method.teacher_freeze_scope",
    "teacher_lr": "optim.a_step_lr",
    "teacher_weight_decay": "optim.a_step_weight_decay",
    "train_distill_adapter_only": "method.use_teacher_finetuning (adapters always train with the fusion)",
    "ib_mbm_dropout": "method.synergy_head_dropout",
    "mbm_dropout": "method.synergy_head_dropout",
    "mbm_out_dim": "method.ib_mbm_out_dim",
    "mbm_query_dim": "method.ib_mbm_query_dim",
    "mbm_n_head": "method.ib_mbm_n_head",
    "mbm_learnable_q": "method.learnable_q",
    "mbm_type": "nothing: the fusion is always the IB-MBM",
    "mbm_r": "nothing: the fusion is always the IB-MBM",
    "synergy_eval_use_all_teachers": "method.synergy_eval_teacher_indices (null: all that the fusion was trained with)",
    "data_aug": "augment.crop_flip",
    "small_input": "dataset.small_input",
    "finetune_epochs": "finetune.epochs",
    "finetune_lr": "finetune.lr",
    "finetune_use_cutmix": "finetune.cutmix_alpha",
    "cl_mode": "the entry point «continual»",
    "exp_id": "run_name",
    "results_dir": "output_dir",
}
"""Names of the research code, and what they are called here."""


def near_miss(given: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word nearest to `given`, or None where nothing is near."""
    return next(iter(difflib.get_close_matches(given, list(known), n=1, cutoff=cutoff)), None)


def suggestion(given: str, known: Iterable[str]) -> str:
    """`did you mean <the nearest known word>? ` for an error; empty where nothing is near."""
    near = near_miss(given, known)
    return f"did you mean {near}? " if near else ""


def known_names() -> list[str]:
    """Every dotted key of the schema; keys of list items appear as `model.teachers.0.name` and `.1.name`."""
    from pipeline.config.schema import Config

    return list(_names(Config, ""))


def _names(section: type[BaseModel], prefix: str) -> Iterator[str]:
    from pipeline.config.schema import TeacherConfig

    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _names(field.annotation, f"{prefix}{name}.")
        elif f"{prefix}{name}" == "model.teachers":
            for i in (0, 1):
                yield from _names(TeacherConfig, f"{prefix}{name}.{i}.")
        else:
            yield prefix + name


def unknown_key(name: str, known: Iterable[str]) -> str:
    """The one-line message for a key that the schema does not have."""
    known = list(known)
    last = name.rsplit(".", 1)[-1]
    same_last = [k for k in known if k.rsplit(".", 1)[-1] == last]
    if not same_last:  # `finetune.small_input` is a misplaced key, not an old one
        for old in (name, last):
            if old in OLD_NAMES:
                return f"{name}: this key is now {OLD_NAMES[old]}"
    elif "." not in name and name in OLD_NAMES:
        return f"{name}: this key is now {OLD_NAMES[name]}"
    if last.startswith("mbm_"):
        return f"{name}: keys of the fusion begin with method.ib_mbm_"
    near = next(iter(same_last), None) or near_miss(name, known, 0.75)
    if near is None:
        lasts = {k.rsplit(".", 1)[-1]: k for k in known}
        best = near_miss(last, lasts)
        near = lasts[best] if best else near_miss(name, known)
    hint = f"did you mean {near}?" if near else "--help all lists all keys"
    return f"{name}: unknown key; {hint}"


class UnknownKey(UserError):
    """A key that is not the schema's; said with the nearest one of the schema and of `own`.

    Args:
        own: keys of the step alone, and prefixes of such keys that end with a dot.
    """

    def __init__(self, name: str, own: Collection[str] = ()) -> None:
        self.name = name
        first, dot, rest = name.partition(".")
        near = [key + rest for key in own if dot and key.endswith(".") and near_miss(first, [key[:-1]], 0.75)]
        super().__init__(unknown_key(name, [*near, *known_names(), *(key for key in own if not key.endswith("."))]))
