"""Published accuracies of pairs and methods, with their sources: conf/published.yaml."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from pipeline.compose.groups import CONF
from pipeline.compose.settings import read_data

FILE = CONF / "published.yaml"
DATASET = "cifar100"


class Published(NamedTuple):
    """Test top-1 in %, the epoch that it is of, where it stands, and the lowest and highest number that is known."""

    value: float
    epoch: str
    source: str
    low: float
    high: float


def find(dataset: str, teachers: Sequence[str], student: str, method: str) -> Published | None:
    """What was published for teachers, student and method; without teachers, in whichever pair the student stands.

    Names of networks may begin with `cifar_`. None: nothing that is known here.
    """
    if dataset != DATASET:
        return None
    if teachers:
        return _all().get((pair(teachers, student), method))
    ending = pair([""], student)
    return next((found for (of, name), found in _all().items() if name == method and of.endswith(ending)), None)


def pair(teachers: Sequence[str], student: str) -> str:
    """`resnet32x4+wrn_40_2-resnet8x4`, as tables and conf/published.yaml write a pair.

    Example:
        >>> pair(["cifar_resnet56"], "cifar_resnet20")
        'resnet56-resnet20'
    """
    return "-".join(["+".join(name.removeprefix("cifar_") for name in teachers), student.removeprefix("cifar_")])


@cache
def _all() -> dict[tuple[str, str], Published]:
    found: dict[tuple[str, str], Published] = {}
    for table in read_data(FILE, str(FILE)):
        for method, values in table["values"].items():
            for of, cell in zip(table["pairs"], values, strict=True):
                if cell is None:
                    continue
                value, deviation = cell if isinstance(cell, list) else (cell, 0.0)
                low, high = value - deviation, value + deviation
                known = found.setdefault((of, method), Published(value, table["epoch"], table["source"], low, high))
                found[of, method] = known._replace(low=min(known.low, low), high=max(known.high, high))
    return found
