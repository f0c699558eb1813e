"""Names that come from other people's files, and paths that a user gives."""

import os
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.paths import inside, printable, user_path


@pytest.mark.parametrize("name", ["a", "a/b.txt", "a/./b", ".hidden", "ä/…", "..a", "a..b", "x" * 255])
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


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "empty"),
        ("a\0b", "NUL"),
        ("caf\udce9", "not valid UTF-8"),
        ("~nobody-of-this-name/runs", "no home folder for ~nobody-of-this-name"),
        ("x" * 300, "longer than 255 bytes"),
        ("missing/" + "ä" * 200, "longer than 255 bytes"),
        ("a/" * 2200 + "b", "too long"),
        ("{here}/loop", "circle"),
        ("{here}/loop/below", "circle"),
        ("{here}/dangling", "is not there"),
        ("{here}/dangling/below", "is not there"),
    ],
)
def test_a_path_that_the_file_system_does_not_take_is_one_printable_line(
    tmp_path: Path, given: str, words: str
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError) as refused:
        user_path(given.format(here=tmp_path), "output_dir")
    line = str(refused.value)
    assert line.startswith("output_dir=")
    assert words in line
    assert line.isprintable()
    line.encode()


def test_a_folder_that_may_not_be_searched_is_one_line(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o000)
    if os.geteuid() == 0:  # root may search everything
        os.chmod(tmp_path, 0o755)
        for above in list(tmp_path.parents)[:3]:
            os.chmod(above, 0o755)
        os.seteuid(65534)
    try:
        with pytest.raises(UserError, match="permission denied"):
            user_path(str(closed / "file"), "images")
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


def test_a_path_need_not_exist_and_home_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/runs", "output_dir") == tmp_path / "runs"
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert user_path(str(tmp_path / "file" / "below"), "output_dir") == tmp_path / "file" / "below"
    assert user_path(str(tmp_path / "link"), "dataset.path") == tmp_path / "link"


def test_what_is_printed_of_a_value_is_short_and_on_one_line() -> None:
    assert printable("a\nb\udcff\x1b[31m") == "a\\nb\\udcff\\x1b[31m"
    assert len(printable("x" * 10_000)) == 200
