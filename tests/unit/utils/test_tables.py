"""Tables for a log and for Markdown."""

from __future__ import annotations

from mindrlhf.utils.tables import markdown_table, text_table


def test_a_log_table_wraps_its_cells_and_takes_them_literally() -> None:
    table = text_table(("a", "b"), [("[red]x[/red]", "word " * 20), ("两\n行", "y")], width=40)
    lines = table.splitlines()
    assert all(len(line) <= 40 for line in lines)
    assert "[red]x[/red]" in table
    assert table.count("word") == 20
    assert not any("两" in line and "行" in line for line in lines), "a line end is one"
    assert "\x1b" not in table
    assert not table.endswith("\n")


def test_a_markdown_cell_shows_what_it_holds() -> None:
    table = markdown_table(("one", "two"), [("a|b\n<|im_end|>", "*x* _y_ `z` [l](m) & $1$ \\ ~")])
    assert table.splitlines() == [
        "| one | two |",
        "| --- | --- |",
        r"| a\|b<br>&lt;\|im\_end\|&gt; | \*x\* \_y\_ \`z\` \[l\](m) &amp; \$1\$ \\ \~ |",
    ]
