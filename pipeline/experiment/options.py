"""The groups of conf/ and their options, read from the folders; needs no Hydra, so that `--help` answers at once."""

from pathlib import Path

CONF = Path(__file__).resolve().parents[2] / "conf"


def groups() -> dict[str, list[str]]:
    """Options by group: `{"model/teacher": ["none", …], …}`."""
    found: dict[str, list[str]] = {}
    for file in sorted(CONF.glob("*/**/*.yaml")):
        found.setdefault(file.parent.relative_to(CONF).as_posix(), []).append(file.stem)
    return found
