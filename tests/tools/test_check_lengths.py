"""`tools/check_lengths.py`: exactly the limit passes, one line more is named."""

from pathlib import Path

import check_lengths
import pytest

FILE, FUNCTION = check_lengths.MAX_FILE_LINES, check_lengths.MAX_FUNCTION_LINES


def function(lines: int, indent: str = "", keyword: str = "def") -> str:
    return f"{indent}{keyword} long():\n" + f"{indent}    x = 1\n" * (lines - 1)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("x = 1\n" * FILE, []),
        ("x = 1\n" * (FILE + 1), [f"{FILE + 1} lines"]),
        (function(FUNCTION), []),
        (function(FUNCTION + 1), [f":1: long has {FUNCTION + 1} lines"]),
        (function(FUNCTION + 1, keyword="async def"), ["long has"]),
        ("class C:\n" + function(FUNCTION + 1, "    "), [":2: long has"]),
        ("def short():\n" + function(FUNCTION, "    "), [":1: short has"]),
        ("@one\n@two\n" + function(FUNCTION), []),
        (function(FUNCTION + 1) * 7, ["427 lines", *["long has"] * 7]),
    ],
)
def test_one_line_over_the_limit_is_named(tmp_path, capsys, text, named):
    (tmp_path / "part.py").write_text(text)
    assert check_lengths.main([str(tmp_path)]) == bool(named)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == max(len(named), 1)
    for expected in named:
        assert any(expected in line for line in lines)


def test_files_may_be_named_alone(tmp_path):
    (tmp_path / "long.py").write_text("x = 1\n" * (FILE + 1))
    (tmp_path / "short.py").write_text("x = 1\n")
    assert check_lengths.main([str(tmp_path / "short.py")]) == 0
    assert check_lengths.main([str(tmp_path / "long.py")]) == 1


def test_this_repository_keeps_its_limits(capsys):
    assert check_lengths.main([]) == 0, capsys.readouterr().out
    checked = int(capsys.readouterr().out.split()[0])
    root = Path(check_lengths.__file__).parents[1]
    assert checked == sum(len(list((root / folder).rglob("*.py"))) for folder in check_lengths.FOLDERS)
