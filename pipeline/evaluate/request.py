"""The request of `-e evaluate`: the step's own keys, read and checked before torch is imported."""

from dataclasses import dataclass

from pipeline.compose import cli
from pipeline.config import Config
from pipeline.config.places import is_uri
from pipeline.errors import UserError
from pipeline.paths import user_path

FORMS = "runs:/<id>[/path], models:/<name>@<alias>, models:/<name>/<version>, a run's folder or a weights file"
FUSIONS = "runs:/<id>, a run's folder, a folder with mbm.pth and synergy_head.pth, or fusion.safetensors"
MODES = ("single", "synergy", "average")
SPLITS = {"test": ("test",), "train": ("train",), "val": ("val",), "both": ("train", "test")}
TEACHERS = ("auto", "true", "false")
OWN = {
    "model": f"what to evaluate: {FORMS} (safetensors or torch.save's); student= is the same key",
    "mode": "single (the default: the model alone), synergy (teachers and fusion, the model as query), or average (the "
    "teachers' mean; no model)",
    "split": "test (the default), train (clean images, without validation), val, or both (train and test)",
    "fusion": f"mode=synergy: {FUSIONS}; by default what was saved beside the model",
    "teachers": "mode=single: also run model.teachers, and say how often they agree; auto (the default): where that "
    "needs no fine-tuning",
    "speed": "false leaves the latencies out",
}


@dataclass(frozen=True)
class Request:
    """The step's own keys except `model`, which becomes the configuration's `student`.

    `named`: the key that the model was given by, for errors.
    """

    mode: str = "single"
    split: str = "test"
    fusion: str | None = None
    teachers: str = "auto"
    speed: bool = True
    named: str = "student"

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that `split` names; the step's result is that of the last one."""
        return SPLITS[self.split]


def read(config: Config, command: cli.Command) -> tuple[Config, Request]:
    """Read the step's own keys; `model` becomes the configuration's student.

    Raises UserError: a value that a key does not take, or keys that do not go together.
    """
    own = command.own
    request = Request(
        mode=cli.choice(own, "mode", MODES),
        split=cli.choice(own, "split", tuple(SPLITS)),
        fusion=own.get("fusion") or None,
        teachers=cli.choice(own, "teachers", TEACHERS),
        speed=cli.flag(own, "speed", default=True),
        named="model" if own.get("model") else "student",
    )
    if model := own.get("model"):
        if config.student not in (None, model):
            raise UserError(f"model={model} and student={config.student} name the same thing: give one of them")
        config = config.model_copy(update={"student": model})
    check(request, config)
    return config, request


def check(request: Request, config: Config) -> None:
    """Raise UserError for what configuration and request cannot do together."""
    mode, fused = request.mode, request.mode == "synergy"
    needs_student = mode == "single" or (fused and not config.method.learnable_q)
    if config.student is None and needs_student:
        raise UserError(f"student is not set: give model={FORMS} (student= is the same key)")
    if (mode != "single" or request.teachers == "true") and not config.model.teachers:
        which = f"mode={mode}" if mode != "single" else "teachers=true"
        raise UserError(f"{which} needs teachers, and model.teachers is empty: choose model/teacher=…, or another cfg")
    if request.fusion and not fused:
        raise UserError(f"fusion={request.fusion} is for mode=synergy, and mode is {mode}")
    student = config.student if needs_student else None
    for key, given, forms in (("fusion", request.fusion, FUSIONS), (request.named, student, FORMS)):
        if given and not is_uri(given) and not user_path(given, key).exists():
            raise UserError(f"{key}={given}: no such file or folder; give {forms}")
    if "val" in request.splits and config.dataset.val_fraction == 0:
        raise UserError(
            "split=val: dataset.val_fraction=0 holds out no validation images; give the model's own val_fraction, "
            "or split=test"
        )
