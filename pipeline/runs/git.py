"""What git says of the sources that run: their commit, and what they differ in from it."""

import subprocess
from collections.abc import Mapping

from pipeline.paths import REPOSITORY


def difference() -> str:
    """From the commit; empty where there is none, and outside a repository."""
    return _git("diff", "HEAD")


def tags() -> Mapping[str, str]:
    """`asib.git_sha` and `asib.git_dirty`; none outside a repository."""
    sha = _git("rev-parse", "HEAD").strip()
    if not sha:
        return {}
    return {"asib.git_sha": sha, "asib.git_dirty": str(bool(_git("status", "--porcelain").strip())).lower()}


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
