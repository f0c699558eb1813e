"""The commit of the running sources, and how they differ from it."""

import subprocess
from collections.abc import Mapping

from pipeline.paths import REPOSITORY


def difference() -> str:
    """The sources' diff from their commit; empty without changes, and outside a repository."""
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
