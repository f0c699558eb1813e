"""The model card of a published student: what it is, where it comes from, how good it is, how to load it.

Everything that comes from the run is text here: escaped in Markdown, quoted in YAML, never a path or a command.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from models import stem_timm
from models.small_input import is_patch_family
from pipeline.config.datasets import DATASETS
from pipeline.data.sources import ImageData
from pipeline.escape import code, markdown
from pipeline.publish.request import Request
from pipeline.reporting import statistics, tables
from pipeline.runs.records import Record

ACCURACY = "final/acc_val_selected"
METRICS = {
    ACCURACY: "this student",
    "final/acc_last": "this student after its last epoch",
    "final/val_acc": "this student, validation images",
    "final/student_alone_acc": "the same network without teachers",
    "final/teacher_avg_acc": "its teachers' mean prediction",
    "final/synergy_acc": "the fusion of its teachers",
}
TEACHER = re.compile(r"final/teacher_(\d+)_acc")
LINEAGE = {
    "asib.config_hash": "configuration (SHA-256)",
    "asib.data_digest": "data (SHA-256)",
    "asib.teachers": "teachers' weights (SHA-256)",
    "asib.weights": "weights (SHA-256)",
    "asib.git_sha": "sources (commit)",
}
SMOKE = "cifar100_sample"


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        given: how the student was named, `runs:/…` or `models:/…`.
        version: `models:/<name>/<version>`; "" for a run's.
        data: what it classifies; its images are not read.
        tags: of its run, with those of its version over them.
    """

    given: str
    version: str
    architecture: str
    small_input: bool
    data: ImageData
    record: Record
    tags: Mapping[str, str]

    @property
    def dataset(self) -> str:
        """The data set's name, if it is one of this project's; others are not repeated."""
        name = self.tags.get("asib.dataset") or self.record.config.get("dataset.name", "")
        return name if name in DATASETS else ""

    @property
    def method(self) -> str:
        """The method's name; empty for a student that learned from no teacher."""
        alone = self.tags.get("asib.teachers") == "none"
        return "" if alone else self.record.config.get("method.name", "")


def card(subject: Subject, request: Request) -> str:
    """README.md as a hub shows it: front matter, then Markdown."""
    title = request.push or " ".join(filter(None, (subject.architecture, subject.dataset)))
    parts = [
        f"---\n{_front(subject, request, title)}\n---",
        f"# {markdown(title)}",
        _summary(subject),
        "## How to load it\n\n" + "\n\n".join(_loading(subject, request)),
        "## Accuracy\n\n" + _accuracy(subject),
        "## Where it comes from\n\n" + tables.markdown(("", ""), _lineage(subject), left=2),
        "## Intended use and limits\n\n" + "\n".join(f"- {line}" for line in _limits(subject)),
        "## Licence\n\n" + _licence(request),
    ]
    return "\n\n".join(parts) + "\n"


def _front(subject: Subject, request: Request, title: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    found = subject.record.metrics.get(ACCURACY, math.nan)
    results = None
    if math.isfinite(found):
        name = subject.dataset or "images"
        results = [
            EvalResult("image-classification", name, name, "accuracy", round(found / 100, 6), dataset_split="test")
        ]
    data = ModelCardData(
        license=request.license,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "onnx", "knowledge-distillation"],
        datasets=[subject.dataset] if subject.dataset else None,
        metrics=["accuracy"] if results else None,
        model_name=title if results else None,
        eval_results=results,
    )
    return str(data.to_yaml()).strip()


def _summary(subject: Subject) -> str:
    data, teachers = subject.data, list(_teachers(subject.record.config))
    size = f"{data.image_size} × {data.image_size} × {data.in_chans}"
    how = "trained without teachers"
    if subject.method and teachers:
        how = f"distilled with the method {code(subject.method)} from {' and '.join(map(code, teachers))}"
    of = f" of {code(subject.dataset)}" if subject.dataset else ""
    return f"{code(subject.architecture)}, {how}. It sorts images of {size} into {data.num_classes} classes{of}."


def _teachers(config: Mapping[str, str]) -> Iterator[str]:
    index = 0
    while (name := config.get(f"model.teachers.{index}.name")) is not None:
        yield name
        index += 1


def _loading(subject: Subject, request: Request) -> Iterator[str]:
    size, channels = subject.data.image_size, subject.data.in_chans
    mode = "RGB" if channels == 3 else "L"
    crop = subject.data.crop_pct
    imports, fitted = "Image", f".resize(({size}, {size}), Image.Resampling.BICUBIC)"
    if crop is not None:  # `bleed` is the share that is cut off at each edge
        bleed, imports = (1 - crop) / 2, "Image, ImageOps"
        fitted = f"\npicture = ImageOps.fit(picture, ({size}, {size}), Image.Resampling.BICUBIC, bleed={bleed:g})"
    fetch = (
        f'from huggingface_hub import hf_hub_download\n\nfile = hf_hub_download("{request.push}", "model.onnx")'
        if request.push
        else 'file = "model.onnx"  # of this folder'
    )
    yield (
        "With ONNX Runtime alone; the file prepares the images itself, uint8 of any number:\n\n```python\n"
        f"import numpy as np\nimport onnxruntime\nfrom PIL import {imports}\n{fetch}\n"
        f'picture = Image.open("picture.png").convert("{mode}"){fitted}\n'
        f"images = np.asarray(picture, dtype=np.uint8).reshape(1, {size}, {size}, {channels})\n"
        'probabilities, logits = onnxruntime.InferenceSession(file).run(["probabilities", "logits"], '
        '{"images": images})\n```'
    )
    where = f"hf-hub:{request.push}" if request.push else "local-dir:."
    first = _needs(subject)
    words = "With timm" + (" and the repository that trained it, for the module `models`" if first else "")
    yield (
        f"{words}; `config.json` has class names, mean and deviation:\n\n```python\nimport timm\n{first}"
        f'\nnet = timm.create_model("{where}", pretrained=True).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))\n```"
    )


def _needs(subject: Subject) -> str:
    """The import that makes timm know the network, if it is not timm's own."""
    from timm.models import model_entrypoint

    base = subject.architecture
    if base.startswith("cifar_"):
        return "import models.cifar  # makes timm know the CIFAR networks\n"
    if subject.small_input and not is_patch_family(model_entrypoint(base).__module__):
        return f"import models.stem_timm  # makes timm know {stem_timm.NAME}\n"
    return ""


def _accuracy(subject: Subject) -> str:
    """A table of top-1; the student's own with its interval over the test images."""
    record, rows = subject.record, []
    for name in sorted(record.metrics, key=lambda name: ([*METRICS, name].index(name), name)):
        found, teacher = record.metrics[name], TEACHER.fullmatch(name)
        words = f"teacher {teacher[1]}" if teacher else METRICS.get(name)
        if words and math.isfinite(found):
            rows.append((words, f"{found:.2f}", _interval(record, found) if name == ACCURACY else ""))
    if not rows:
        return "Its run recorded no accuracy."
    words = "Top-1 in percent, on test images unless said otherwise, with one seed."
    if any(interval for *_, interval in rows):
        words += " The interval is a bootstrap over the test images, and says nothing about other seeds."
    parts = [words, tables.markdown(("", "top-1", "95 % interval"), rows)]
    if subject.dataset == SMOKE:
        parts.append(f"{SMOKE} is a smoke test of 500 test images: it cannot rank methods.")
    return "\n\n".join(parts + list(_verdict(subject.tags)))


def _interval(record: Record, stated: float) -> str:
    """Of the predictions that the run has kept, if they are those of the stated accuracy."""
    if record.correct is None or not len(record.correct) or abs(100 * record.correct.mean() - stated) > 0.01:
        return ""
    found = statistics.interval(100.0 * record.correct[None].astype(float))
    return f"{found.low:.2f} to {found.high:.2f} (n = {len(record.correct)})"


def _verdict(tags: Mapping[str, str]) -> Iterator[str]:
    """What the gate said of a registered version."""
    verdict, reason = tags.get("asib.verdict"), tags.get("asib.verdict_reason", "")
    if verdict in ("promoted", "refused"):
        against = tags.get("asib.against", "no champion")
        yield f"A gate {verdict} it against {markdown(against)}{f' ({markdown(reason)})' if reason else ''}."


def _lineage(subject: Subject) -> Iterator[tuple[str, str]]:
    record, config = subject.record, subject.record.config
    yield "model", code(subject.version or subject.given)
    yield "run", code(record.id)
    for name, words in LINEAGE.items():
        if value := subject.tags.get(name, subject.data.digest if name == "asib.data_digest" else ""):
            dirty = subject.tags.get("asib.git_dirty") == "true" and name == "asib.git_sha"
            listed = ", ".join(map(code, value.split(","))) if value != "none" else "no teachers"
            yield words, listed + (", with changes that were not committed" if dirty else "")
    yield "method", code(subject.method) if subject.method else "cross-entropy alone"
    for index, name in enumerate(_teachers(config)):
        yield f"teacher {index}", code(name)
    for key in ("seed", "dataset.val_fraction"):
        if key in config:
            yield code(key), code(config[key])


def _limits(subject: Subject) -> Iterator[str]:
    data = subject.data
    shown = "squeezed to a square" if data.crop_pct is None else f"cropped to their centre ({data.crop_pct:g})"
    yield f"For images like those that it was trained on, {shown}; it was not tested on others."
    yield f"It always answers with one of its {data.num_classes} classes, also for images that show none of them."
    yield "Its probabilities are not calibrated unless somebody has measured that on images like yours."
    yield "No test for bias against groups of people was made; do not use it for decisions about people."
    yield "Pretrained teachers or weights pass on what they have learned, errors included."


def _licence(request: Request) -> str:
    if request.license == "unknown":
        return "Not stated. Ask whoever published these weights before you use them."
    words = f"The weights: {code(request.license)}."
    return f"{words} The data, and weights that training began with, have licences of their own."
