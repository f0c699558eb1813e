"""A method for one's own networks and one's own loop: its losses on a batch, or all of its stages (docs/api.md)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from models.adapter import DistillationAdapter
from models.features import FeatureNet
from pipeline.compose import cli
from pipeline.compose.keywords import Given, words
from pipeline.config import Config
from pipeline.data import arrays, sources
from pipeline.data.batches import Batch
from pipeline.data.sources import ImageData
from pipeline.errors import UserError
from pipeline.journal import NullJournal
from pipeline.runs.step import configuration
from pipeline.training.loop import Loop, Verdict
from pipeline.training.objective import Moment
from pipeline.training.optim import Precision
from pipeline.training.student import Distillation, task_of

Losses = dict[str, Tensor]


class Labelled(Protocol):
    """A torch data set of (image, label) with the names of its classes, as torchvision's and timm's have them."""

    classes: Sequence[str]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Any, int]: ...


class Distiller(nn.Module):
    """The losses of one method on a batch, for a loop of one's own.

    `parameters()` are those of the student, and of what the method trains beside it. `fusion`: ASIB's, or None.

    Args:
        student, teachers: networks with timm's interface, as `zoo.create_model` gives them.
        image_size: of the images, pixels per side.
        given, keys: the configuration, such as `method="asib"` or {"method.tau": 2}.

    Raises:
        UserError: a configuration that is refused, or a method that reads the training data.
    """

    def __init__(
        self, student: nn.Module, teachers: Iterable[nn.Module], *given: Given, image_size: int = 32, **keys: Any
    ) -> None:
        super().__init__()
        config, net, taught = _own(student, teachers, {"dataset.val_fraction": 0}, *given, keys)
        if config.method.reads_data:
            raise UserError(f"method={config.method.name} reads its training images: use run_stages, which has them")
        self.task = _task(config, net, taught, _black(net, image_size))
        self.student, self.own = net, self.task.b_step.own
        self.fusion = self.task.fusion
        self._at = ("", -1)
        self._batches = 0

    def forward(self, x: Tensor, y: Tensor, epoch: int = 0, phase: str = "b") -> Losses:
        """`loss`, its named terms, and `output`, the logits, for normalised images (b, C, H, W) and labels (b,).

        Args:
            epoch: of this phase, from 0: schedules follow it.
            phase: "b" trains the student; "a" trains ASIB's fusion, and should come first: until then the teachers'
                average is what is taught.
        """
        if phase not in self.task.phases:
            raise UserError(f"phase={phase}: method={self.task.method.name} has {', '.join(sorted(self.task.phases))}")
        objective = self.task.phases[phase].objective
        if self._at != (phase, epoch):
            plan = [each for each in self.task.plan if each.phase == phase]
            planned = plan[min(epoch, len(plan) - 1)]
            self.task.begin_phase(planned)
            self.task.begin_epoch(planned)
            self._at, self._batches = (phase, epoch), 0
        objective.train()
        n, one = len(y), torch.ones((), device=x.device)
        index = torch.arange(n, device=x.device)
        batch = Batch(x, x, y, y, one, index, slice(0, n), n, partner=None, views=None)
        self._batches += 1
        found: Losses = objective(batch, Moment(phase, epoch, self._batches - 1))
        return found


class _History:
    """Keeps what a loop's epochs found."""

    reason = ""

    def __init__(self) -> None:
        self.rows: list[tuple[int, str, float]] = []

    def __call__(self, epoch: int, metrics: Mapping[str, float]) -> Verdict:
        self.rows += [(epoch, name, value) for name, value in metrics.items()]
        return Verdict.GO_ON

    def still_ours(self) -> bool:
        return True


def run_stages(
    student: nn.Module,
    teachers: Iterable[nn.Module],
    train: "Labelled | Dataset[Any]",
    test: "Labelled | Dataset[Any]",
    *given: Given,
    **keys: Any,
) -> tuple[dict[str, float], list[tuple[int, str, float]]]:
    """Train one's own networks through all stages of a method, without a run: nothing is tracked or written.

    The student holds the selected weights afterwards; a fusion is trained on the way.

    Args:
        student, teachers: as `Distiller` takes them; teachers are trained already.
        train, test: data sets of (image, label), where `train` has `classes`. Images are PIL's, uint8, or float in
            [0, 1] (torchvision's ToTensor), square and of one size; cropping, flipping and normalising are done here.
        given, keys: the configuration.

    Returns:
        The final metrics, and (epoch, metric, value) of every epoch.
    """
    config, net, taught = _own(student, teachers, *given, keys)
    task = _task(config, net, taught, image_data(train, test))
    history = _History()
    recorder: Any = NullJournal()
    with torch.random.fork_rng():
        Loop(task, recorder, None, {}, Precision(config.optim, task.device), task.device, watch=history).run()
        return task.results(), history.rows


def image_data(train: Any, test: Any) -> ImageData:
    """Two torch data sets of (image, label) as training reads them. Raises UserError: they are no classification."""
    found: dict[str, Any] = {}
    for split, data in (("train", train), ("test", test)):
        pairs = [data[i] for i in range(len(data))]
        found[f"x_{split}"] = np.stack([_pixels(image) for image, _ in pairs])
        found[f"y_{split}"] = np.array([int(label) for _, label in pairs])
    names = getattr(train, "classes", None)
    if names is None:
        raise UserError("train has no attribute classes: give it the names of its classes, in the order of its labels")
    checked = arrays.check(found, "train, test", tuple(map(str, names)))
    return sources.image_data("own", checked, arrays.statistics(checked.x_train), type(train).__name__)


def _pixels(image: Any) -> np.ndarray[Any, Any]:
    """uint8 (H, W, C), or (H, W) where grey."""
    if isinstance(image, Tensor):
        image = image.movedim(0, -1).numpy() if image.dim() == 3 else image.numpy()
    found = np.asarray(image)
    return (found * 255).round().astype(np.uint8) if found.dtype.kind == "f" else found


def _black(student: FeatureNet, size: int) -> ImageData:
    """Two black images of each class: all that a task needs to know of data that it never reads."""
    labels = np.arange(2 * student.num_classes) % student.num_classes
    weight = next(p for p in student.parameters() if p.dim() == 4)  # the first convolution
    images = np.zeros((len(labels), size, size, weight.shape[1]), np.uint8)
    both: dict[str, Any] = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    checked = arrays.check(both, "image_size")
    return sources.image_data("own", checked, arrays.statistics(checked.x_train), "none")


def _own(
    student: nn.Module, teachers: Iterable[nn.Module], *given: Given
) -> tuple[Config, FeatureNet, list[FeatureNet]]:
    net, *taught = [each if isinstance(each, FeatureNet) else FeatureNet(each) for each in (student, *teachers)]
    named = [{"name": each.architecture} for each in taught]
    config = configuration(cli.parse(words(({"model.teachers": named}, *given), {})))
    width = config.method.adapter_dim
    if width is not None and net.distillation_adapter is None:
        net.distillation_adapter = DistillationAdapter(net.feature_dim, width).to(next(net.parameters()).device)
    return config, net, taught


def _task(config: Config, student: FeatureNet, teachers: list[FeatureNet], data: ImageData) -> Distillation:
    return task_of(config.method)(config, data, student, teachers, next(student.parameters()).device)
