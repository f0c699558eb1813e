"""Names that come from other people's files."""

import os
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.paths import inside


@pytest.mark.parametrize("name", ["a", "a/b.txt", "a/./b", ".hidden", "ä/…", "..a", "a..b"])
def test_a_name_inside_the_folder_is_taken(tmp_path: Path, name: str) -> None:
    assert inside(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../secret.txt", "a/../../b", "/etc/passwd", "a\0b", "..\\x", None, 3, ["a"], {"a": 1}, b"a"],
)
def test_any_other_name_is_refused_in_one_line(tmp_path: Path, name: object) -> None:
    with pytest.raises(UserError) as refused:
        inside(tmp_path, name)
    assert "\n" not in str(refused.value)
    assert str(tmp_path) in str(refused.value)


def test_a_link_that_leads_out_is_refused_and_a_folder_behind_a_link_is_not(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    (tmp_path / "secret").write_text("s")
    (runs / "link").symlink_to(tmp_path / "secret")
    (runs / "loop").symlink_to(runs / "loop")
    (runs / "here").symlink_to("file")
    (tmp_path / "alias").symlink_to(runs, target_is_directory=True)
    with pytest.raises(UserError):
        inside(runs, "link")
    assert inside(runs, "here") == runs / "here"
    assert inside(tmp_path / "alias", "file") == tmp_path / "alias" / "file"
    assert os.path.realpath(inside(tmp_path / "alias", "file")) == str(runs / "file")


def test_a_very_long_name_is_refused_or_a_path(tmp_path: Path) -> None:
    assert inside(tmp_path, "x" * 255).parent == tmp_path
