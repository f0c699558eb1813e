"""Keys in words: their names, what they take, and validation errors as one line that says what to do."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from pipeline.paths import printable

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
    **{
        f"teacher{number}_{key}": f"method.teacher_{key}"
        for key in ("freeze_level", "freeze_bn", "bn_head_only", "freeze_scope")
        for number in (1, 2)
    },
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

MAX_PROBLEMS = 3
"""Problems that an error names; nobody reads more."""


def near_miss(given: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known word nearest to `given`, or None if none is near."""
    return next(iter(difflib.get_close_matches(given, list(known), n=1, cutoff=cutoff)), None)


def suggestion(given: str, known: Iterable[str]) -> str:
    """Return `did you mean <the nearest known word>? ` for an error, or nothing if none is near."""
    near = near_miss(given, known)
    return f"did you mean {near}? " if near else ""


def key_names(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a schema; keys of list items appear as `model.teachers.0.name` and `.1.name`."""
    for name, field in section.model_fields.items():
        inner = section_of(field)
        if inner is None:
            yield prefix + name
        else:
            for item in ("0.", "1.") if is_list_of_sections(field) else ("",):
                yield from key_names(inner, f"{prefix}{name}.{item}")


MEANT = {
    "epochs": "method.student_epochs_per_stage=[…] (the student's) or finetune.epochs (its teachers')",
    "lr": "optim.student_lr (the student's) or finetune.lr (its teachers')",
    "weight_decay": "optim.student_weight_decay (the student's) or finetune.weight_decay (its teachers')",
}
"""What is meant by keys of other programs that several of ours could be."""


def unknown_key(name: str, known: Iterable[str]) -> str:
    """Return the one-line message for a key that the schema does not have."""
    known = list(known)
    by_last = {key.rpartition(".")[2]: key for key in reversed(known)}  # the first of several
    last = name.rpartition(".")[2]
    if last in OLD_NAMES and (last == name or last not in by_last):  # finetune.small_input is misplaced, not old
        return f"{name}: this key is now {OLD_NAMES[last]}"
    if name in MEANT:
        return f"{name}: unknown key; give {MEANT[name]}"
    if last.startswith("mbm_"):
        return f"{name}: keys of the fusion begin with method.ib_mbm_"
    near = by_last.get(last) or near_miss(name, known, 0.75)
    near = near or by_last.get(near_miss(last, by_last) or "") or near_miss(name, known)
    hint = f"did you mean {near}?" if near else "--help all lists all keys"
    return f"{name}: unknown key; {hint}"


def field_at(path: Sequence[str | int], root: type[BaseModel]) -> tuple[FieldInfo, int] | None:
    """Find the field of a schema that a path leads to or into, and how many parts of the path name it; None if unknown.

    `("method", "tau_schedule", 1)` leads into `method.tau_schedule`, named by its first 2 parts.
    """
    section: type[BaseModel] | None = root
    found: tuple[FieldInfo, int] | None = None
    for depth, part in enumerate(path, start=1):
        if section is None:
            break
        if found is not None and is_list_of_sections(found[0]) and str(part).isdecimal():
            continue  # the number of a teacher
        if part not in section.model_fields:
            return None
        found = (section.model_fields[str(part)], depth)
        section = section_of(found[0])
    return found


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the section that a field holds, or holds a list of; None for a plain value."""
    candidates = (field.annotation, *get_args(field.annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def is_list_of_sections(field: FieldInfo) -> bool:
    """Whether a field is like `model.teachers`."""
    return get_origin(field.annotation) is tuple and section_of(field) is not None


def is_text(field: FieldInfo) -> bool:
    """Whether a field is free text (or null), whose value is taken literally."""
    return {a for a in (get_args(field.annotation) or (field.annotation,)) if a is not NoneType} == {str}


def expects(field: FieldInfo, full: bool = False) -> str:
    """Say what a key takes: `a number above 0, or null`; `full`: include bounds that only catch slips."""
    if is_list_of_sections(field):
        return "a list of {name: …, pretrained: …, checkpoint: …}"
    return _words(field.annotation, field.metadata, full)


def takes(problem: Any, field: FieldInfo) -> str:
    """Say what a key takes, for one of pydantic's errors; if a number was too large, also why it is bounded."""
    too_large = problem["type"] in ("less_than_equal", "less_than", "finite_number", "int_parsing_size")
    too_large = too_large and problem["input"] == problem["input"]  # not of nan
    reason = why(field) if too_large else ""
    return expects(field, too_large) + (f" ({reason})" if reason else "")


def why(field: FieldInfo) -> str:
    """Return the sentence beside a number's type that explains its upper bound; empty without one."""
    return next(_sentences(field.annotation, field.metadata), "")


def _sentences(annotation: Any, metadata: Iterable[Any] = ()) -> Iterator[str]:
    yield from (item for item in metadata if isinstance(item, str))
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        yield from _sentences(arguments[0], arguments[1:])
    elif get_origin(annotation) is not Literal:
        for argument in arguments:
            yield from _sentences(argument)


def _words(annotation: Any, metadata: Iterable[Any] = (), full: bool = False) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(args[0], _flat(args[1:]), full)
    if origin in (Union, UnionType):
        if set(args) == {float, str}:
            return "a fraction from 0 to 1, or like avg-0.02"
        return ", or ".join(_words(a, (), full) for a in args)
    if origin is Literal:
        return ("" if len(args) == 1 else "one of ") + ", ".join(map(str, args))
    if origin is tuple:
        if args[-1] is Ellipsis:
            return "a list of " + _words(args[0], (), full).replace("a whole number", "whole numbers").replace(
                "a number", "numbers"
            )
        return f"a list of {len(args)}: " + ", ".join(_words(a, (), full) for a in args)
    if annotation in (int, float):
        return ("a whole number" if annotation is int else "a number") + _range(list(metadata), full)
    return {bool: "true or false", str: "a text", NoneType: "null"}.get(annotation, "a group of keys")


def _flat(metadata: Iterable[Any]) -> list[Any]:
    """Collect constraints, including those of a `Field` inside `Annotated`."""
    return [inner for item in metadata for inner in (item.metadata if isinstance(item, FieldInfo) else [item])]


def _range(metadata: Sequence[Any], full: bool) -> str:
    bounds = {k: getattr(m, k) for m in metadata for k in ("ge", "gt", "le", "lt") if getattr(m, k, None) is not None}
    if not full and any(isinstance(item, str) for item in metadata):
        del bounds["le"]
        bounds = {k: b for k, b in bounds.items() if b >= -1000}
    shown = {name: str(b) if isinstance(b, int) else f"{b:.16g}" for name, b in bounds.items()}
    low = f" from {shown['ge']}" if "ge" in bounds else f" above {shown['gt']}" if "gt" in bounds else ""
    if "le" in bounds:
        return f"{low} and at most {shown['le']}" if "gt" in bounds and full else f"{low} to {shown['le']}"
    high = f" below {shown['lt']}" if "lt" in bounds else ""
    return low + (" and" if low and high else "") + high


def written(value: Any) -> str:
    """Write a value as in YAML and in an override: `null`, `true`, `[6,6]`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(written, value)) + "]"
    if isinstance(value, int) and value.bit_length() > 1000:  # Python refuses to write one of thousands of digits
        return f"{value:#x}"
    return repr(value) if isinstance(value, float) else str(value)


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """Explain a refused configuration in one line: key, value, what to do; at most three problems."""
    return one_line(_explain(problem, list(problem["loc"]), root) for problem in error.errors(include_url=False))


def one_line(problems: Iterable[tuple[str, str]]) -> str:
    """Join the first sentence about each key; at most three."""
    lines: dict[str, str] = {}
    for key, line in problems:
        lines.setdefault(key, line)  # a union gives one problem for each of its members
    more = len(lines) - MAX_PROBLEMS
    return "; ".join([*lines.values()][:MAX_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")


def _explain(problem: Any, path: list[str | int], root: type[BaseModel]) -> tuple[str, str]:
    if problem["type"] == "value_error":  # raised by a rule, whose message is complete
        message = str(problem["ctx"]["error"])
        return message, message
    if problem["type"] == "extra_forbidden":
        name = ".".join(map(str, path))
        return name, unknown_key(name, key_names(root))
    found = field_at(path, root)
    if found is None:  # the whole configuration is not a mapping
        return "", f"the configuration is {shown(problem['input'])}, not groups of keys"
    field, depth = found
    key, inside = ".".join(map(str, path[:depth])), path[depth:]
    value = problem["input"]
    if problem["type"] == "bool_for_number":
        value = value if isinstance(value, bool) else list(value)
    if problem["type"] == "no_text":
        return key, f"{key}: got {shown(value)}, which holds control characters or is not UTF-8; give a plain text"
    section = section_of(field)
    if section is not None and not is_list_of_sections(field):
        return (
            key,
            f"{key} is a group of keys, got {shown(value)}; "
            f"give for example {key}.{next(iter(section.model_fields))}=…",
        )
    where = f", entry {inside[-1]}" if inside and isinstance(inside[-1], int) and problem["type"] != "missing" else ""
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    near = near_miss(shown(value), map(str, choices)) if isinstance(value, str) or choices else None
    hint = f" (did you mean {near}?)" if near else ""
    return key, f"{key}: got {shown(value)}{where}; give {takes(problem, field)}{hint}"


def shown(value: Any) -> str:
    """A value in an error: texts in quotes, control characters escaped, at most 80 characters."""
    text = repr(value) if isinstance(value, str) else written(value)
    text = printable(text, 10_000)
    return text if len(text) <= 80 else text[:77] + "…"
