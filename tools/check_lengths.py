"""Name the Python files and functions that are too long: above these lengths the design of a part is wrong."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
FOLDERS = ("ldm_train", "hydra_plugins", "tools", "tests")


def too_long(path: Path) -> Iterator[str]:
    """One line of text for the file and for each function in it that is over its limit."""
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    if lines > MAX_FILE_LINES:
        yield f"{path}: {lines} lines; at most {MAX_FILE_LINES}"
    for node in ast.walk(ast.parse(text, str(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{path}:{node.lineno}: {node.name} has {lines} lines; at most {MAX_FUNCTION_LINES}"


def main(arguments: list[str]) -> int:
    """Check the files and folders given, or this repository's; 1 if anything is too long."""
    root = Path(__file__).resolve().parents[1]
    given = [Path(argument) for argument in arguments] or [root / folder for folder in FOLDERS]
    files = [file for path in given for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    findings = [finding for file in files for finding in too_long(file)]
    print("\n".join(findings) or f"{len(files)} files, none too long")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
