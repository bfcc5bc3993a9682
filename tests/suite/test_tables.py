import math

from relic.suite.tables import Column, Table, cell, number, table_html

TABLE = Table(
    "Scores & more", "about", (Column("a/b", "b", "up"), Column("a/n", "n", "")), (("_floor", "floor"),)
)


def row(mean, low, high):
    return {"mean": mean, "low": low, "high": high, "cases": 4}


def test_a_cell_has_its_interval_where_there_is_one():
    assert cell(row(20.123, 18.0, 22.456)) == "20.12 <small>[18.00, 22.46]</small>"
    assert cell(row(0.1234567, 0.1, 0.2)).startswith("0.123 ")
    assert cell(row(5.0, 5.0, 5.0)) == "5" and cell(row(148.13, 148.13, 148.13)) == "148.1"
    assert cell({"sum": 7}) == "7" and cell(None) == "" and cell({"mean": None, "cases": 0}) == "–"
    assert number(math.inf) == "∞" and number(-math.inf) == "−∞"


def test_what_stands_beside_is_shown_once_where_it_is_the_same():
    one = {"a/b": row(1.0, 0.5, 1.5), "a/b_floor": row(0.2, 0.1, 0.3)}
    summary = {"truth": {"all": {"a/b": row(9.0, 9.0, 9.0)}}, "x<": {"all": one}, "y": {"all": one}}
    page = table_html(TABLE, summary, ["truth", "x<", "y"])
    assert page.count(">floor<") == 1 and page.count("<tr") == 5, "a head, three lines and the floor"
    assert "Scores &amp; more" in page and "x&lt;" in page and "b ↑" in page and "<th>n" not in page


def test_a_table_of_which_nothing_was_measured_is_left_out():
    empty = {"a/b": {"mean": None, "low": None, "high": None, "cases": 0}, "a/n": {"sum": 0}}
    assert table_html(TABLE, {"truth": {"all": empty}, "x": {"all": empty}}, ["truth", "x"]) == ""
    assert table_html(TABLE, {"truth": {}, "x": {}}, ["truth", "x"]) == ""
