"""Names of files: others' names must lie inside a known folder, and the user's paths must be usable; anything else
is refused.
"""

import errno
import os
from pathlib import Path, PurePosixPath

from pipeline.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
"""The running checkout: it holds conf/, and the sources that identify a result."""


def inside(folder: Path, name: object) -> Path:
    """The file of `folder` that `name` refers to, where `name` comes from JSON, YAML or a server.

    The file need not exist. Symbolic links are followed: one that leads out of the folder is refused too.

    Args:
        folder: trusted; it may itself be, or lie behind, a symbolic link.
        name: a relative POSIX path, such as `checkpoints/slot0.safetensors`.

    Raises:
        UserError: `name` is not a text, is empty, absolute, holds `..` or a NUL, or leads out of the folder.

    Example:
        >>> inside(Path("/runs/1"), "checkpoints/manifest.json").as_posix()
        '/runs/1/checkpoints/manifest.json'
    """
    refusal = UserError(f"{folder}: a file there names {name!r:.200}, which is not a file inside this folder; refused")
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        raise refusal
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or pure == PurePosixPath("."):
        raise refusal
    path = folder / pure
    try:
        if _leads_out(path, folder):
            raise refusal
    except (OSError, ValueError):  # a name that the file system does not accept
        raise refusal from None
    return path


def _leads_out(path: Path, folder: Path) -> bool:
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def tree_inside(folder: Path, name: object) -> Path:
    """As `inside`, for a file or folder that is to be sent: nothing below it leads out of `folder` either.

    Raises UserError: as `inside`; or something there is neither a file nor a folder (a pipe would be read forever).
    """
    path = inside(folder, name)
    below = [Path(top, one) for top, folders, files in os.walk(path) for one in (*folders, *files)]
    for one in (path, *below) if path.exists() else ():
        if _leads_out(one, folder) or not (one.is_file() or one.is_dir()):
            raise UserError(f"{one} leads out of {folder}, or is neither a file nor a folder; refused")
    return path


LONGEST_NAME = 255
"""Bytes that Linux file systems allow in one part of a path."""


def user_path(given: str, key: str) -> Path:
    """The file or folder that the user names under `key`, with `~` expanded; it need not exist.

    The path can be inspected: its `exists`, `is_file` and `is_dir` do not raise.

    Raises:
        UserError: `given` is empty, is not UTF-8, holds a NUL, is too long for the file system, names the home of an
            unknown user, leads through a dangling or circular link, or through a folder that may not be searched.

    Example:
        >>> user_path("runs/kd", "output_dir").as_posix()
        'runs/kd'
    """

    def refuse(reason: str) -> UserError:
        return UserError(f"{key.partition('=')[0]}={printable(given)}: {reason}")

    if not given.strip():
        raise refuse("the path is empty; give a file or folder")
    if "\0" in given:
        raise refuse("a path cannot hold a NUL character; give another one")
    if not is_utf8(given):
        raise refuse("this name is not valid UTF-8; rename the file or folder")
    try:
        path = Path(given).expanduser()
    except RuntimeError:
        user = Path(given).parts[0]
        raise refuse(f"there is no home folder for {user}; write the path in full") from None
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in path.parts):
        raise refuse(f"a name in it is longer than {LONGEST_NAME} bytes; give a shorter one")
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        dangling = next((p for p in (path, *path.parents) if p.is_symlink() and not os.path.exists(p)), None)
        if dangling is not None:
            target = printable(os.readlink(dangling))
            raise refuse(f"{dangling} is a link to {target}, which is not there; repair or remove the link") from None
    except OSError as error:
        reasons = {
            errno.ELOOP: "its links lead in a circle; name the file or folder itself",
            errno.ENAMETOOLONG: "the path is too long for the file system; give a shorter one",
            errno.EACCES: "a folder on the way may not be searched (permission denied); ask its owner, or name another",
        }
        raise refuse(reasons.get(error.errno or 0, f"cannot be looked up ({error.strerror})")) from None
    return path


def is_utf8(text: str) -> bool:
    """Whether the text can be written as UTF-8: names of files in other encodings reach Python with surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_plain(text: str) -> bool:
    """Whether records and names can hold it: UTF-8, and no control characters except tabs and line breaks."""
    return is_utf8(text) and not any(c < " " and c not in "\t\n\r" for c in text)


def printable(text: str, length: int = 200) -> str:
    """The text on one line of a message: unprintable characters are escaped, long texts are cut.

    Example:
        >>> printable("caf\\udce9\\n")
        'caf\\\\udce9\\\\n'
    """
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    return escaped if len(escaped) <= length else f"{escaped[: length - 1]}…"
