"""Reading a sweep: its file with the command line's `sweep.…=` settings on top."""

from collections.abc import Mapping
from types import MappingProxyType

from pipeline.compose.groups import locate
from pipeline.compose.settings import read_section
from pipeline.sweep.space.config import SweepConfig, short_forms


def load(name_or_path: str, settings: Mapping[str, str] = MappingProxyType({})) -> SweepConfig:
    """A sweep of conf/sweep, or of a YAML file anywhere, with the command line's settings.

    Args:
        settings: by key of the sweep, as texts: `{"trials": "10", "space.method.tau.high": "6", "pruner": "none"}`.
            Another `sampler.name`, `pruner.name` or `type` drops the file's knobs that it does not have; a dimension
            set to null leaves the space.

    Raises:
        UserError: one line with the key, its value and what to give instead.
    """
    file = locate("sweep", name_or_path)
    found: SweepConfig = read_section(SweepConfig, "sweep", name_or_path, file, settings, short_forms, name=file.stem)
    return found
