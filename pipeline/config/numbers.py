"""The kinds of numbers that keys take: a range for each, and the sentence that says why nobody needs more.

The bounds are generous. They are there because a slip of the finger (workers=100000, an epoch too many zeros) otherwise
takes a machine down, or ends an hour later in an error of some library.
"""

import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from pipeline.errors import UserError
from pipeline.paths import printable

MILLION = 1_000_000
YEAR_S = 31_536_000
MOST_SEED = 2**63 - 1
MOST_TRIALS = 100_000
EXACT = 2**53
"""Studies keep numbers as floats, which skip whole numbers beyond."""

# floats
Fraction = Annotated[float, Field(ge=0, le=1)]
Percent = Annotated[float, Field(ge=0, le=100)]
Points = Annotated[float, Field(ge=-100, le=100), "accuracies are in percent"]
NonNegative = Annotated[float, Field(ge=0, le=MILLION, allow_inf_nan=False), "beyond that nothing else would count"]
Positive = Annotated[float, Field(gt=0, le=MILLION, allow_inf_nan=False), "beyond that nothing else would count"]
Scale = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False), "float32 cannot tell it from infinity in a loss"]
Exponent = Annotated[float, Field(ge=-20, le=20), "it is the logarithm of a temperature"]
LogVariance = Annotated[float, Field(gt=0, le=80), "float32 overflows at the exponential of 88"]
Seconds = Annotated[float, Field(gt=0, le=YEAR_S, allow_inf_nan=False), "more than a year"]
Minutes = Annotated[float, Field(gt=0, le=YEAR_S / 60, allow_inf_nan=False), "more than a year"]
Gigabytes = Annotated[float, Field(gt=0, le=MILLION, allow_inf_nan=False), "a petabyte"]
Real = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False), "floats skip whole numbers there"]

# whole numbers
Count = Annotated[int, Field(ge=0, le=MILLION), "nothing here is done a million times"]
AtLeastOne = Annotated[int, Field(ge=1, le=MILLION), "nothing here is done a million times"]
Epochs = Annotated[int, Field(ge=0, le=MILLION), "at a second each these are twelve days"]
Epoch = Annotated[int, Field(ge=1, le=MILLION), "at a second each these are twelve days"]
Stages = Annotated[int, Field(ge=1, le=1000), "each has epochs of its own"]
BatchSize = Annotated[int, Field(ge=1, le=2**20), "no memory holds a batch of a million images"]
Pixels = Annotated[int, Field(ge=1, le=8192), "one such image takes 200 MB"]
Processes = Annotated[int, Field(ge=0, le=1024), "each is a process with memory of its own"]
Group = Annotated[int, Field(ge=1, le=1024), "each is a process with a device of its own"]
JobMinutes = Annotated[int, Field(ge=1, le=YEAR_S // 60), "more than a year"]
Threads = Annotated[int, Field(ge=1, le=4096), "no machine has as many cores"]
Width = Annotated[int, Field(ge=1, le=65_536), "a layer as wide and as deep has 4 billion weights"]
InputWidth = Annotated[int, Field(ge=0, le=65_536), "a layer as wide and as deep has 4 billion weights"]
Index = Annotated[int, Field(ge=0, le=999), "there are not as many"]
Seed = Annotated[int, Field(ge=0, le=MOST_SEED), "random streams take 63 bits"]
ShortSeed = Annotated[int, Field(ge=0, le=2**32 - 1), "samplers take 32 bits"]
Trials = Annotated[int, Field(ge=1, le=MOST_TRIALS), "a study of more no longer answers in time"]
Parameters = Annotated[int, Field(ge=1, le=10**12), "no network has as many"]
Whole = Annotated[int, Field(ge=-EXACT, le=EXACT), "floats, in which studies keep numbers, skip some beyond"]

WORKERS = 10_000
VERSIONS = 10**9


def whole(key: str, text: str, low: int = 1, high: int = MILLION, why: str = "", where: str = "") -> int:
    """A whole number of a step's own key, or of a variable of the environment, that no schema checks.

    Args:
        why: there may not be more.
        where: behind the value in the error.

    Raises:
        UserError: no whole number, or out of range.

    Example:
        >>> whole("trials", "30", high=100_000)
        30
    """
    digits = text.strip()
    if re.fullmatch(r"[0-9]{1,25}", digits) and low <= int(digits) <= high:
        return int(digits)
    reason = f" ({why})" if why and re.fullmatch(r"[0-9]+", digits) else ""
    raise UserError(f"{key}={printable(text, 80)}{where}: give a whole number from {low} to {high}{reason}")


def processes(environment: Mapping[str, str]) -> tuple[int, int]:
    """This process's number and how many there are, as torchrun says it in RANK and WORLD_SIZE: 0 and 1 without it.

    Raises:
        UserError: a variable is no number, does not fit the others, or is missing beside them.
    """
    most = 100_000

    def read(name: str, default: str, low: int, high: int) -> int:
        text = environment.get(name, "").strip() or default
        return whole(name, text, low, high, "torchrun sets it; unset it otherwise", " in the environment")

    size = read("WORLD_SIZE", "1", 1, most)
    rank = read("RANK", "0", 0, most)
    read("LOCAL_RANK", "0", 0, most)
    if rank >= size:
        raise UserError(
            f"RANK={rank} with WORLD_SIZE={size} in the environment: processes are numbered from 0; start them with "
            "torchrun, or unset both"
        )
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if size > 1 and missing:
        raise UserError(
            f"WORLD_SIZE={size} in the environment, and {missing[0]} is not set: start the step with torchrun, or "
            "unset WORLD_SIZE"
        )
    if size > 1:
        read("MASTER_PORT", "0", 1, 65_535)
    return rank, size
