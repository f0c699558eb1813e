"""Names of files: what others wrote down is a name inside a known folder, or it is refused."""

import os
from pathlib import Path, PurePosixPath

from pipeline.errors import UserError


def inside(folder: Path, name: object) -> Path:
    """The file of `folder` that `name` means, where `name` comes from JSON, YAML or a server.

    The file need not exist. Symbolic links are followed: one that leads out of the folder is refused too.

    Args:
        folder: trusted; it may itself be, or lie behind, a symbolic link.
        name: a relative POSIX path, such as `checkpoints/slot0.safetensors`.

    Raises:
        UserError: `name` is no text, empty, absolute, holds `..` or a NUL, or leads out of the folder.

    Example:
        >>> inside(Path("/runs/1"), "checkpoints/manifest.json").as_posix()
        '/runs/1/checkpoints/manifest.json'
    """
    refusal = UserError(f"{folder}: a file there names {name!r:.200}, which is no file inside this folder; refused")
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        raise refusal
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or pure == PurePosixPath("."):
        raise refusal
    path = folder / pure
    try:
        real = os.path.realpath(path)
        root = os.path.realpath(folder)
    except (OSError, ValueError):  # a name the file system does not take
        raise refusal from None
    if os.path.commonpath([root, real]) != root:
        raise refusal
    return path
