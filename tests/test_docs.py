"""README.md and docs/: their Python blocks run, print what they say, and links lead somewhere.

The blocks of a page run in order in one namespace. A comment in the line before a block is for this
test: `<!-- not run: REASON -->` leaves the block out, `<!-- needs: MODULE -->` runs it only where
the module is installed. What a line like `print(x)  # 0.5` prints is compared with its comment.
"""

import importlib.util
import io
import re
import sys
import types
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest

import fused_xent

pytestmark = pytest.mark.cpu("pages compute on the CPU")

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- (not run|needs):([^\n]*)-->\n)?```python\n(.*?)^```$", re.M | re.S)
PRINTS = re.compile(r"^ *print\(.*\)  # (.+)$")
LINK = re.compile(r"\]\(([^)\s]+)\)")


class Block(NamedTuple):
    line: int  # of the page, where the code begins
    code: str
    rule: str  # "not run", "needs" or ""
    value: str


def blocks_of(text):
    """Return the Python blocks of a page."""
    found = [
        Block(text.count("\n", 0, match.start(3)) + 1, match[3], match[1] or "", match[2] or "")
        for match in BLOCK.finditer(text)
    ]
    assert len(found) == len(re.findall(r"```py", text)), "a Python block begins in another way"
    return found


def is_run(block):
    """Return False for a block that is left out here."""
    value = block.value.strip()
    assert value or not block.rule, f"line {block.line}: a comment must say more than {block.rule}"
    if block.rule == "needs":
        return all(importlib.util.find_spec(name.strip()) for name in value.split(","))
    return block.rule == ""


def run_blocks(path, blocks, monkeypatch):
    """Run blocks in one namespace, as a module; return what each line of the page has printed."""
    printed = defaultdict(list)

    def record(*values, **options):
        out = io.StringIO()
        print(*values, **options, file=out)
        printed[sys._getframe(1).f_lineno].append(out.getvalue().rstrip("\n"))

    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    module.print = record
    for block in blocks:
        code = "\n" * (block.line - 1) + block.code  # tracebacks show lines of the page
        exec(compile(code, str(path), "exec"), vars(module))
    return printed


def check_page(path, monkeypatch):
    """Run the blocks of a page, and compare what they print with what the page says."""
    blocks = [block for block in blocks_of(path.read_text()) if is_run(block)]
    printed = run_blocks(path, blocks, monkeypatch)
    for block in blocks:
        for number, line in enumerate(block.code.splitlines(), block.line):
            if match := PRINTS.match(line):
                assert set(printed[number]) == {match[1]}, f"line {number} of {path.name}"


def name_of(path):
    return str(path.relative_to(ROOT))


# Of torch.compile and torch.export.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_blocks_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_page(path, monkeypatch)


FENCED = "```python\n{}\n```\n"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("Text.\n" + FENCED.format("x = 1") + FENCED.format("print(x + 1)  # 2"), None),
        (FENCED.format("x = 1\nassert x == 2"), AssertionError),
        (FENCED.format("x = y"), NameError),
        (FENCED.format("print(1)  # 2"), AssertionError),
        (FENCED.format("if False:\n    print(2)  # 2"), AssertionError),
        (FENCED.format("for x in 2, 3:\n    print(x)  # 2"), AssertionError),
        ("<!-- not run: two GPUs -->\n" + FENCED.format("x = y"), None),
        (
            2 * ("<!-- not run: two GPUs -->\n" + FENCED.format("x = y") + FENCED.format("z")),
            NameError,
        ),
        ("<!-- not run: -->\n" + FENCED.format("x = 1"), AssertionError),
        ("<!-- needs: no_such_module -->\n" + FENCED.format("x = y"), None),
        ("<!-- needs: torch -->\n" + FENCED.format("x = y"), NameError),
        ("<!-- needs: -->\n" + FENCED.format("x = 1"), AssertionError),
        ("- ```python\n  x = 1\n  ```\n", AssertionError),
    ],
)
def test_wrong_pages_are_found(text, error, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(text)
    if error is None:
        return check_page(page, monkeypatch)
    with pytest.raises(error):
        check_page(page, monkeypatch)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_to_files(path):
    text = re.sub(r"^```.*?^```$|`[^`\n]+`", "", path.read_text(), flags=re.M | re.S)
    for target in LINK.findall(text):
        if not re.match(r"https?://|#", target):
            assert (path.parent / target.partition("#")[0]).exists(), target


def test_every_page_is_in_the_navigation():
    entries = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(entries) == sorted(str(path.relative_to(ROOT / "docs")) for path in PAGES[1:])


def test_every_public_name_is_in_the_api():
    text = (ROOT / "docs/api.md").read_text()
    assert sorted(re.findall(r"^::: fused_xent\.(\w+)$", text, re.M)) == sorted(fused_xent.__all__)


def test_every_environment_variable_is_documented():
    files = [ROOT / "setup.py", ROOT / "tests/conftest.py", *ROOT.glob("csrc/*/*")]
    files += (ROOT / "fused_xent").rglob("*.py")
    text = "".join(path.read_text() for path in files)
    names = set(re.findall(r'"(FUSED_XENT_[A-Z_]+)"', text))
    documented = (ROOT / "docs/support.md").read_text()
    assert len(names) == 5
    assert not [name for name in sorted(names) if f"| `{name}` |" not in documented]
