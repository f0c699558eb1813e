"""What is measured: pairs of teachers and student, precision and batch size, as configurations of the real pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch

from pipeline.compose.compose import compose
from pipeline.config import Config, configure
from pipeline.data.sources import ImageData, load

FEW_TEST_IMAGES = 64
"""Evaluation is not part of a step: `benchmarks.overhead` measures it."""


@dataclass(frozen=True)
class Pair:
    """Teachers and the student that learns from them."""

    name: str
    teachers: tuple[str, ...]
    student: str


PAIRS = {
    pair.name: pair
    for pair in (
        Pair("resnet56-resnet20", ("cifar_resnet56",), "cifar_resnet20"),
        Pair("resnet32x4+wrn_40_2-resnet8x4", ("cifar_resnet32x4", "cifar_wrn_40_2"), "cifar_resnet8x4"),
        Pair("resnet50+convnext_tiny-mobilenetv2", ("resnet50", "convnext_tiny"), "mobilenetv2_100"),
    )
}
TWO_TEACHERS = "resnet32x4+wrn_40_2-resnet8x4"
LARGE_BATCH = 256
ONE_TEACHER = Pair("resnet32x4-resnet8x4", ("cifar_resnet32x4",), "cifar_resnet8x4")
METHODS = {
    "asib": None,
    **dict.fromkeys(("kd", "at", "crd"), ONE_TEACHER),
    "ca_mkd": PAIRS[TWO_TEACHERS],
}
"""The methods that are measured; all but ASIB in fp32, on one pair of the published tables."""


@dataclass(frozen=True)
class Case:
    """One line of the tables."""

    pair: Pair
    precision: str
    """fp32 or bf16."""
    batch: int = 64
    method: str = "asib"

    @property
    def name(self) -> str:
        return f"{self.method} {self.pair.name} {self.precision} {self.batch}"

    @property
    def steps(self) -> tuple[str, ...]:
        """A-steps train ASIB's fusion, which needs two teachers (docs/method.md section 1)."""
        return ("a", "b") if self.method == "asib" and len(self.pair.teachers) > 1 else ("b",)

    @property
    def images(self) -> int:
        """Training images at the least: CRD's cost depends on their number, so methods have those of CIFAR-100."""
        return 0 if self.method == "asib" else 50_000

    @property
    def dtype(self) -> torch.dtype | None:
        """The type that autocast uses; None: off."""
        return torch.bfloat16 if self.precision == "bf16" else None

    def config(self, folder: Path, rounds: int, more: Sequence[str] = ()) -> Config:
        """`rounds` stages of one A- and one B-epoch: ASIB is the ladder's common base with its weights at full
        strength, other methods follow the recipe of the published tables.

        Teachers come from checkpoints of untrained networks: what they have learned does not change how fast they are.
        Nothing is held out, so that the gate is open once the fusion has been trained at all, whatever its accuracy.

        Args:
            folder: for runs and their tracking store; teachers' weights are used where they lie there.
            more: further overrides.
        """
        asib = (
            *("method.teacher_adapt_epochs=1", "method.teacher_eval_every=1", "method.synergy_only_epochs=0"),
            *("method.kd_warmup_epochs=0", "method.ib_beta_warmup_epochs=0", "schedule.lr_warmup_epochs=0"),
            f"method.kd_target={'synergy' if len(self.pair.teachers) > 1 else 'avg'}",
        )
        composed = compose(
            "base" if self.method == "asib" else "kd_cifar100",
            [
                *(f"output_dir={folder / 'runs'}", f"tracking.uri=sqlite:///{folder / 'mlflow.db'}"),
                *(f"dataset.batch_size={self.batch}", "dataset.val_fraction=0", "log_model=false"),
                *(f"method.num_stages={rounds}", f"method.student_epochs_per_stage={[1] * rounds}"),
                *(asib if self.method == "asib" else (f"method={self.method}",)),
                *(f"optim.use_amp={str(self.dtype is not None).lower()}", "optim.amp_dtype=bfloat16"),
                *more,
            ],
        )
        # unset keys left out: derived values, such as widths for small students, then follow from this pair
        sections: dict[str, Any] = composed.model_dump(exclude_unset=True)
        teachers: list[dict[str, Any]] = [{"name": name, "pretrained": False} for name in self.pair.teachers]
        for k, teacher in enumerate(teachers):
            if (path := weights(folder, k)).exists():
                teacher["checkpoint"] = str(path)
        sections["model"] = {"student": {"name": self.pair.student, "pretrained": False}, "teachers": teachers}
        return configure(sections)


def weights(folder: Path, index: int) -> Path:
    """Where a teacher's weights lie for the runs of `folder`."""
    return folder / f"teacher_{index}.safetensors"


def cases(methods: list[str], pairs: list[str], precisions: list[str], large: list[str]) -> list[Case]:
    """ASIB with every pair in every precision, and the two-teacher pair with the large batch in the precisions `large`;
    the other methods.
    """
    found = [Case(PAIRS[pair], precision) for pair in pairs for precision in precisions]
    if TWO_TEACHERS in pairs:
        found += [Case(PAIRS[TWO_TEACHERS], precision, LARGE_BATCH) for precision in large]
    others = [Case(pair, "fp32", method=method) for method, pair in METHODS.items() if pair and method in methods]
    return others + (found if "asib" in methods else [])


def real_images(root: Path) -> ImageData:
    """CIFAR-100 below `root` (torchvision's layout), or the bundled sample of it if that is missing."""
    if (root / "cifar-100-python").is_dir():
        return load(compose(None, ["dataset=cifar100", f"dataset.root={root}"]).dataset)
    return load(compose(None, ["dataset=cifar100_sample"]).dataset)


def by_class(data: ImageData) -> ImageData:
    """The training images in rounds of one per class, so that any slice has all classes about equally."""
    rank = pandas.Series(range(len(data.train_y))).groupby(data.train_y.numpy()).cumcount()
    order = torch.from_numpy(np.lexsort((data.train_y, rank)))
    return replace(data, train_x=data.train_x[order], train_y=data.train_y[order])


def first_images(data: ImageData, count: int) -> ImageData:
    """The first `count` training images, repeated where there are fewer, and a few test images."""
    at = torch.arange(count) % len(data.train_x)
    test = slice(0, FEW_TEST_IMAGES)
    return replace(
        data,
        train_x=data.train_x[at],
        train_y=data.train_y[at],
        test_x=data.test_x[test],
        test_y=data.test_y[test],
        digest=f"{data.digest[:48]}-{count:015d}",
    )
