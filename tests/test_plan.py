"""How the code is laid out: no circles of files, no long functions, no retired words."""

import ast
import io
import re
import runpy
import tokenize
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CRATES = sorted(path.parent.name for path in (ROOT / "rust").glob("*/Cargo.toml"))
PACKAGE = ROOT / "python"
MOST_LINES = 60
RUST = sorted((ROOT / "rust").glob("*/**/*.rs"))
PYTHON = sorted(
    path for folder in ("python", "tests", "examples", ".ci") for path in (ROOT / folder).rglob("*.py")
)


def needs_in_rust(source):
    """Which files of a crate each of its files uses."""
    files = {}
    for path in source.rglob("*.rs"):
        parts = path.relative_to(source).with_suffix("").parts
        if "tests" not in parts:
            files["::".join(part for part in parts if part not in ("lib", "mod"))] = path

    exports = re.findall(r"^pub use ((?:\w+::)+)(?:\{([^;]*)\}|(\w+))", files[""].read_text(), re.MULTILINE)
    exported = {
        item.strip(): start[:-2] for start, group, one in exports for item in (group or one).split(",")
    }

    def home(item):
        """The file that has an item, by its path in the crate."""
        item = exported.get(item, item)
        while item and item not in files:
            item = item.rpartition("::")[0]
        return item

    needs = {}
    for name, path in files.items():
        code = path.read_text().partition("#[cfg(test)]")[0]
        found = {home(item) for item in re.findall(r"^[^/\n]*\bcrate::((?:\w+::)*\w+)", code, re.MULTILINE)}
        uses = re.findall(r"^use ((?:\w+::)*)(?:\{([^;]*)\}|(\w+));", code, re.MULTILINE)
        for start, group, single in uses:
            inside = start.removeprefix("crate::") if start.startswith("crate::") else f"{name}::{start}"
            found |= {home(inside + item.strip()) for item in (group or single).split(",")}
        needs[name] = found - {name, ""}
    return needs


def needs_in_python():
    """Which files of the package each of its files imports, at once or when called."""
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(part for part in parts if part != "__init__")] = path
    needs = {}
    for name, path in names.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {item.name for item in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: relative import"
                inside = {f"{node.module}.{item.name}" for item in node.names}
                found |= (inside & names.keys()) or {node.module}
        needs[name] = found & names.keys() - {name}
    return needs


def circles(needs):
    """What is left without files that need no other one, and then without those that no other one needs."""
    left = dict(needs)
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    while free := left.keys() - set().union(*left.values()):
        for name in free:
            del left[name]
    return set(left)


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == {"b", "c"}
    assert needs_in_rust(ROOT / "rust/sssd-core/src")["predictor::mix"] == {
        *("predictor::arena", "predictor::overlay", "predictor::weights", "sources")
    }
    assert {"sssd.errors", "sssd._core"} - needs_in_python()["sssd"] == {"sssd._core"}


@pytest.mark.parametrize("crate", CRATES)
def test_no_files_of_a_crate_need_each_other_in_a_circle(crate):
    assert circles(needs_in_rust(ROOT / "rust" / crate / "src")) == set()


def test_no_files_of_the_package_need_each_other_in_a_circle():
    assert circles(needs_in_python()) == set()


def rust_functions(path):
    """Lines of each function, by the indentation that rustfmt gives its end."""
    lines = path.read_text().split("\n")
    for at, line in enumerate(lines):
        if head := re.match(r"^( *)(?:pub(?:\(\w+\))? )?(?:(?:const|unsafe|async) )*fn (\w+)", line):
            end = next(n for n, text in enumerate(lines[at:]) if re.match(rf"{head[1]}(?=\S).*[}};]$", text))
            yield end + 1, head[2]


def python_functions(path):
    """Lines of each function without its docstring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            said = ast.get_docstring(node, clean=False)
            yield node.end_lineno - node.lineno + 1 - (said.count("\n") + 1 if said else 0), node.name


def test_no_function_is_longer_than_a_screen():
    found = [(*function, path.name) for path in RUST for function in rust_functions(path)]
    found += [(*function, path.name) for path in PYTHON for function in python_functions(path)]
    assert len(found) > 1500
    assert not [function for function in sorted(found) if function[0] > MOST_LINES]


RETIRED = {
    "crew": "thread pool",
    "hired": "helpers",
    "scout": "lookahead",
    "ledger": "memory pool",
    "charge": "reservation",
    "soften": "feedback",
    "soft": "feedback",
}
"""Words of names that are gone, and what is said instead. ``soft_bytes`` is older, and public."""

RETIRED_NAMES = {"ending": "shutdown, or suffix", "stay": "shutdown"}
"""The same where the word alone is the name."""


def names_of(path):
    """Every name in code, not in comments and strings."""
    text = path.read_text()
    if path.suffix != ".rs":
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        return {token.string for token in tokens if token.type == tokenize.NAME}
    return set(re.findall(r"[A-Za-z_]\w*", re.sub(r"//.*|'\"'|\"(?:\\[\s\S]|[^\"\\])*\"", "", text)))


def words(name):
    """The parts of snake_case and CamelCase, and the name as a whole."""
    name = re.sub("soft_(bytes|wrap|prompts)", "", name, flags=re.IGNORECASE).strip("_")
    return {name.lower(), *re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().split("_")}


def test_retired_words_name_nothing():
    assert words("SoftTable") == {"softtable", "soft", "table"}
    names = {(name, path.name) for path in [*RUST, *PYTHON] for name in names_of(path)}
    assert len(names) > 5000
    assert not {(name, file) for name, file in names if words(name) & RETIRED.keys()}
    assert not {(name, file) for name, file in names if name.lower().strip("_") in RETIRED_NAMES}


def test_the_text_has_none_of_them_either():
    unknown = re.compile(r"\b(crew|hired|scouts?|ledgers?|soften\w*)\b", re.IGNORECASE)
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *RUST, *PYTHON]
    texts = {path: path.read_text() for path in pages if path != Path(__file__)}
    assert not [(path.name, found[0]) for path, text in texts.items() if (found := unknown.search(text))]


def test_every_file_has_its_place_in_the_architecture():
    text = (ROOT / "docs/architecture.md").read_text()
    for crate in CRATES:
        for path in (ROOT / "rust" / crate / "src").rglob("*.rs"):
            inside = path.relative_to(ROOT / "rust" / crate / "src").as_posix()
            if path.name != "lib.rs" and not inside.startswith("tests/"):
                folder, _, name = inside.rpartition("/")
                assert re.search(rf"`(\.\. )?({folder}/)?{re.escape(name)}`", text), inside
    for path in (ROOT / "python/sssd").rglob("*.py*"):
        described = path.parent.name in ("cli", "hardware", "__pycache__") or path.name.startswith("__")
        assert described or f"{path.name}`" in text, path


def test_every_mutant_of_a_promise_can_be_made():
    """The line that it breaks is there once, and its promise and test are."""
    mutants = tomllib.loads((ROOT / "benches/promises.toml").read_text())["mutant"]
    promises = set(re.findall(r"^\| ([A-Z]\d+) \|", (ROOT / "docs/guarantees.md").read_text(), re.M))
    parts = runpy.run_path(str(ROOT / "benches/mutants.py"))["PARTS"].values()
    named = {mutant.what: vars(mutant) for part in parts for mutant in part.mutants}
    for mutant in [*mutants, *({"what": what} for what in named)]:
        assert mutant.get("promise") in {None, *promises}, mutant
        if "file" not in mutant:
            mutant = {**mutant, **named[mutant["what"]]}
        assert (ROOT / mutant["file"]).read_text().count(mutant["line"]) == 1, mutant
        path, *names = mutant.get("test", "").split(" ")[0].split("::")
        if path.endswith(".py"):
            text = (ROOT / path).read_text()
            assert all(re.search(rf"(def|class) {name.split('[')[0]}\b", text) for name in names), mutant
    # where a line that breaks it would be artificial
    assert promises - {mutant["promise"] for mutant in mutants} <= {"D10", "D19", "V6", "V7"}


def test_every_part_can_be_switched_off(monkeypatch):
    """The lines of ``benches/ablations.py`` are there once."""
    monkeypatch.syspath_prepend(ROOT / "benches")
    for part in runpy.run_path(str(ROOT / "benches/ablations.py"))["PARTS"].values():
        for edit in part.edits:
            assert (ROOT / edit.file).read_text().count(edit.line) == 1, edit
