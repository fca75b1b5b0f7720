"""Tables as markdown and comma-separated text."""

from __future__ import annotations

from rlkit.profiles.table import Table, csv_text, escaped, markdown


def test_markdown_rows() -> None:
    drawn = Table("title", ("a", "b"), (("1", "x|y"),))
    assert markdown(drawn) == "| a | b |\n| --- | --- |\n| 1 | x\\|y |"
    assert escaped("a\n <b>") == "a \\<b\\>"


def test_csv_quotes_and_leaves_unknown_fields_empty() -> None:
    assert csv_text(("a", "b"), [(1.5, None), ('x,"y"', "@x")]) == 'a,b\n1.5,\n"x,""y""",\'@x\n'
