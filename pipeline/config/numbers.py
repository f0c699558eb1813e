"""The kinds of numbers that keys take, each with a range and a sentence that explains its upper bound.

The bounds are generous. They catch slips (workers=100000, a zero too many) that would otherwise take a machine down, or
fail an hour later with an error of some library.
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
MOST_SEEDS = 100
EXACT = 2**53
"""Studies store numbers as floats, which skip whole numbers beyond this."""

# floats
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Deviation = Annotated[float, Field(gt=0, le=1)]
Percent = Annotated[float, Field(ge=0, le=100)]
Points = Annotated[float, Field(ge=-100, le=100), "accuracies are in percent"]
NonNegative = Annotated[float, Field(ge=0, le=MILLION, allow_inf_nan=False), "it would drown out all else"]
Positive = Annotated[float, Field(gt=0, le=MILLION, allow_inf_nan=False), "it would drown out all else"]
Scale = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False), "float32 cannot tell it from infinity in a loss"]
Exponent = Annotated[float, Field(ge=-20, le=20), "it is the logarithm of a temperature"]
LogVariance = Annotated[float, Field(gt=0, le=80), "float32 overflows at the exponential of 88"]
Seconds = Annotated[float, Field(gt=0, le=YEAR_S, allow_inf_nan=False), "more than a year"]
Minutes = Annotated[float, Field(gt=0, le=YEAR_S / 60, allow_inf_nan=False), "more than a year"]
Gigabytes = Annotated[float, Field(gt=0, le=MILLION, allow_inf_nan=False), "a petabyte"]
Real = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False), "floats skip whole numbers there"]

# whole numbers
Count = Annotated[int, Field(ge=0, le=MILLION), "nothing here happens a million times"]
AtLeastOne = Annotated[int, Field(ge=1, le=MILLION), "nothing here happens a million times"]
AtLeastTwo = Annotated[int, Field(ge=2, le=MILLION), "nothing here happens a million times"]
Epochs = Annotated[int, Field(ge=0, le=MILLION), "at a second each these are twelve days"]
Epoch = Annotated[int, Field(ge=1, le=MILLION), "at a second each these are twelve days"]
FreezeLevel = Annotated[int, Field(ge=-1, le=2)]
Stages = Annotated[int, Field(ge=1, le=1000), "each has epochs of its own"]
BatchSize = Annotated[int, Field(ge=1, le=2**20), "no memory holds a batch of a million images"]
Pixels = Annotated[int, Field(ge=1, le=8192), "one such image takes 200 MB"]
Processes = Annotated[int, Field(ge=0, le=1024), "each is a process with memory of its own"]
Group = Annotated[int, Field(ge=1, le=1024), "each is a process with a device of its own"]
JobMinutes = Annotated[int, Field(ge=1, le=YEAR_S // 60), "more than a year"]
Threads = Annotated[int, Field(ge=1, le=4096), "no machine has that many cores"]
Width = Annotated[int, Field(ge=1, le=65_536), "a square layer of that width has 4 billion weights"]
InputWidth = Annotated[int, Field(ge=0, le=65_536), "a square layer of that width has 4 billion weights"]
Index = Annotated[int, Field(ge=0, le=999), "no run has that many"]
Seed = Annotated[int, Field(ge=0, le=MOST_SEED), "random streams take 63 bits"]
ShortSeed = Annotated[int, Field(ge=0, le=2**32 - 1), "samplers take 32 bits"]
Seeds = Annotated[int, Field(ge=1, le=MOST_SEEDS), "each is a whole training"]
Trials = Annotated[int, Field(ge=1, le=MOST_TRIALS), "a larger study answers too slowly"]
Parameters = Annotated[int, Field(ge=1, le=10**12), "no network has that many"]
Whole = Annotated[int, Field(ge=-EXACT, le=EXACT), "floats, in which studies keep numbers, skip some beyond"]

WORKERS = 10_000
VERSIONS = 10**9


def whole(key: str, text: str, low: int = 1, high: int = MILLION, why: str = "", where: str = "") -> int:
    """Parse the whole number of a step's own key or an environment variable, which no schema checks.

    Args:
        why: the reason for the upper bound.
        where: text after the value in the error.

    Raises:
        UserError: not a whole number, or out of range.

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
    """Read this process's rank and the number of processes from torchrun's variables; 0 and 1 without them.

    Raises UserError: a variable is not a number, contradicts the others, or is missing.
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
