"""Printing: nothing reaches a terminal that could steer it."""

import pytest

from stillroom.tools.render import number, plain, print_json, print_table, say


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("caf\u00e9 \u4e2d", "caf\u00e9 \u4e2d"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\rb\nc\td", "a\\rb\\nc\\td"),
        ("\u202eevil\u2066\u200b", "\\u202eevil\\u2066\\u200b"),
        ("\x9b31m\x7f\x00", "\\x9b31m\\x7f\\x00"),
        ("\ud800", "\\ud800"),
        ("\U000e0001", "\\U000e0001"),
    ],
)
def test_plain(text: str, expected: str) -> None:
    assert plain(text) == expected
    assert plain(text).isprintable()


def test_plain_keeps_what_it_is_told() -> None:
    assert plain("a\tb\n", keep="\t") == "a\tb\\n"


def test_say_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\nb")
    assert capsys.readouterr().out == "a\\nb\n"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "-"),
        (float("nan"), "-"),
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (2345.67, "2,345.7"),
    ],
)
def test_number(value: object, expected: str) -> None:
    assert number(value) == expected


def test_table_takes_no_markup_and_no_control(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(
        ("what", "n"), [["[red]x[/red]\x1b", 12], ["y" * 300, 3]], text=("what",), strong=[1]
    )
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["what", "n"]
    assert first.split() == ["[red]x[/red]\\x1b", "12"]
    assert second.split() == ["y" * 300, "3"]


def test_json_has_only_numbers_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({1: [float("nan"), -float("inf"), 0.5], "t": ("\x1b", {"a": None})})
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "".join(text.split()) == '{"1":[null,null,0.5],"t":["\\u001b",{"a":null}]}'
