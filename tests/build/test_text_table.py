"""Tables and lines of text on a narrow terminal."""

from build_tasks.text_table import format_table, wrap

ROWS = [["net", "HTTP", "1 ms", "2 ms"], ["net", "gRPC", "3 ms", "4 ms"]]


def test_a_table_that_is_too_wide_goes_on_below_with_the_columns_that_tell_its_rows_apart() -> None:
    table = format_table(["model", "protocol", "median", "slowest"], ROWS, width=30, keys=2)
    first, second = table.split("\n\n")
    assert [line.split() for line in first.splitlines()[2:]] == [["net", "HTTP", "1", "ms"], ["net", "gRPC", "3", "ms"]]
    assert [line.split()[:2] for line in second.splitlines()[2:]] == [["net", "HTTP"], ["net", "gRPC"]]
    assert max(map(len, table.splitlines())) <= 30


def test_a_path_that_is_longer_than_a_line_goes_on_after_a_slash() -> None:
    text = "✓ weights  net   1.0 s  package://some_package/models/weights-0123456789.pth, parameters: 7"
    assert wrap(text, 40).splitlines() == [
        "✓ weights  net   1.0 s",
        "                 package://some_package/",
        "                 models/",
        "                 weights-0123456789.pth,",
        "                 parameters: 7",
    ]
    assert wrap("put it at models/net/w.pth", 20).splitlines() == ["put it at", "    models/net/w.pth"]
