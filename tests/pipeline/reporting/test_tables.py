"""Tables: read back by pandas, by MLflow and by an independent Markdown library."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from markdown_it import MarkdownIt

from pipeline.reporting import pages, tables


def test_a_csv_holds_no_formula_in_cells_index_and_header_and_keeps_its_numbers(tmp_path: Path) -> None:
    frame = pd.DataFrame({"=a": ["=x", "y"], "n": [-1.5, 2.0]}, index=pd.Index(["@i", "j"], name="label"))
    tables.write_csv(frame, tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text() == "label,'=a,n\n'@i,'=x,-1.5\nj,y,2.0\n"
    assert frame.loc["@i", "=a"] == "=x"


def test_tables_are_what_mlflow_shows(tmp_path: Path, sqlite_uri: str) -> None:
    """`mlflow.log_table` writes the same bytes and the same tag; numbers that are none are null."""
    from mlflow.tracking import MlflowClient

    table = pd.DataFrame({"class": ["ash", "fir"], "images": [3, 0], "accuracy": [100 / 3, np.nan]})
    tables.write_json(table, tmp_path / "per_class.json")
    client = MlflowClient(sqlite_uri)
    run = client.create_run("0").info.run_id
    client.log_table(run, table, "per_class.json")
    theirs = Path(client.download_artifacts(run, "per_class.json", str(tmp_path / "store")))
    assert (tmp_path / "per_class.json").read_bytes() == theirs.read_bytes()
    assert json.loads(theirs.read_text())["data"][1] == ["fir", 0, None]
    for name, value in tables.logged(["per_class.json"]).items():
        assert client.get_run(run).data.tags[name] == value


def test_a_table_for_the_terminal_has_numbers_flush_right() -> None:
    lines = tables.text("t", [("synergy", "7.25"), ("a", "61.50")]).splitlines()
    assert lines == ["t", "--------------", "synergy   7.25", "a        61.50"]


def test_a_markdown_table_is_one() -> None:
    rendered = MarkdownIt("gfm-like", {"linkify": False}).render(tables.markdown(["a", "b"], [["x", "1"], ["y", "2"]]))
    assert rendered.count("<tr>") == 3
    assert rendered.count('<td style="text-align:right">') == 2


def test_the_longest_note_that_a_tag_holds_is_taken() -> None:
    assert pages.first_that_fits(["x" * 8001, "y" * 7900, "z"]) == "y" * 7900
    assert pages.first_that_fits(["x" * 9000]) == "x" * 7900
