"""The four documents against the repository: links, paths, flags, metrics, messages, and both languages."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

from mindrlhf.configs.fields import keys_of
from mindrlhf.configs.keys import PPOConfig
from mindrlhf.utils.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TUTORIAL = "examples/qwen_ppo_tutorial"
PAIRS = [("README.md", "README_CN.md"), (f"{TUTORIAL}/README.md", f"{TUTORIAL}/README_CN.md")]
DOCUMENTS = [name for pair in PAIRS for name in pair]
SOURCE_FOLDERS = ("examples", "mindrlhf", "model_configs", "scripts", "tests")

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_PATH = re.compile(
    r"(?<![\w./$-])(?:\./)?((?:\.ci|examples|mindrlhf|model_configs|scripts|tests)/[\w./*-]*)", re.A
)
_FLAG = re.compile(r"(?<![\w-])(--[a-z]\w*)", re.A)
_OPTION_OF_HELP = re.compile(r"^\s+(?:-\w(?: \w+)?, )?(--[a-z]\w*)", re.A | re.M)
_FILE_NAME = re.compile(r"[\w.*-]+\.(?:py|sh|yaml)", re.A)


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str) -> list[tuple[str, str]]:
    """Language and content of each fenced block."""
    return _BLOCK.findall(text_of(document))


def prose(document: str) -> str:
    """The text without its fenced blocks."""
    return _BLOCK.sub("", text_of(document))


def commands(document: str) -> list[list[str]]:
    """The words of each command of the bash blocks."""
    lines = [
        line
        for language, content in blocks(document)
        if language == "bash"
        for line in content.replace("\\\n", " ").splitlines()
    ]
    return [words for line in lines if (words := shlex.split(line))]


def script_of(words: list[str]) -> int | None:
    """Place of the Python script among the words of a command."""
    return next((place for place, word in enumerate(words) if word.endswith(".py")), None)


def table_rows(document: str, first_header: str) -> list[list[str]]:
    """Cells of the body of every table whose first header cell is ``first_header``."""
    rows: list[list[str]] = []
    inside = False
    for line in prose(document).splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if inside and not set(cells[0]) <= set("- "):
            rows.append(cells)
        inside = inside or cells[0] == first_header
    return rows


@cache
def flags_by_script() -> dict[str, set[str]]:
    """Flags in the ``--help`` of every script that a document's command runs or a document may name."""
    scripts = [
        str(path.relative_to(ROOT))
        for folder in (TUTORIAL, "scripts")
        for path in sorted((ROOT / folder).glob("*.py"))
        if re.search(r"import argparse|new_parser|from mindrlhf\.cli\.", path.read_text(encoding="utf-8"))
    ]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(scripts, pool.map(_help_flags, scripts), strict=True))


def _help_flags(script: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    return set(_OPTION_OF_HELP.findall(done.stdout))


@cache
def shell_flags() -> set[str]:
    """Flags in the usage lines of the shell scripts."""
    usages = [
        line
        for path in sorted((ROOT / "scripts").glob("*.sh"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith('usage="')
    ]
    return {flag for line in usages for flag in _FLAG.findall(line)}


@cache
def msrun_flags() -> set[str]:
    """Flags of ``msrun``, from its source: importing MindSpore takes seconds."""
    spec = importlib.util.find_spec("mindspore")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "parallel" / "cluster" / "run.py"
    return set(re.findall(r'"(--\w+)"', source.read_text(encoding="utf-8")))


@cache
def source_text() -> str:
    """The library's and scripts' source with string literals joined, so that a message can be searched."""
    paths = [path for top in ("mindrlhf", "scripts", TUTORIAL) for path in sorted((ROOT / top).rglob("*.py"))]
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    return re.sub(r'"\s*\n\s*f?"', "", text) + str(ConfigError(["a fault"]))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    links = [link for link in _LINK.findall(prose(document)) if "://" not in link]
    assert links
    base = (ROOT / document).parent
    assert [link for link in links if not (base / link.partition("#")[0]).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_exist(document: str) -> None:
    paths = {path.rstrip(".") for path in _PATH.findall(text_of(document))}
    assert len(paths) > 10
    missing = [path for path in paths if not any(ROOT.glob(path.rstrip("/")))]
    assert sorted(missing) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_file_names_exist(document: str) -> None:
    """Names without a folder; an X in a name stands for any."""
    known = {path.name for top in SOURCE_FOLDERS for path in (ROOT / top).rglob("*") if path.is_file()}
    named = {code for code in _INLINE.findall(prose(document)) if _FILE_NAME.fullmatch(code)}
    patterns = {name: name.replace("_X.", "_*.") for name in named}
    missing = [
        name
        for name, pattern in patterns.items()
        if not any(fnmatch(one, pattern) for one in known) and not (ROOT / name).exists()
    ]
    assert sorted(missing) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_run_scripts_with_flags_they_have(document: str) -> None:
    faults, checked = [], 0
    for words in commands(document):
        place = script_of(words)
        if place is None:
            continue
        script = words[place].removeprefix("./")
        for position, word in enumerate(words):
            flag = word.partition("=")[0]
            if not flag.startswith("--"):
                continue
            checked += 1
            known = flags_by_script().get(script, set()) if position > place else msrun_flags()
            if flag not in known:
                faults.append(f"{script if position > place else 'msrun'}: {flag}")
    assert faults == []
    assert checked > 20 or document.startswith("README")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_in_the_text_exist(document: str) -> None:
    known = (msrun_flags() | shell_flags()).union(*flags_by_script().values(), {"--help"})
    named = {flag for code in _INLINE.findall(prose(document)) for flag in _FLAG.findall(code)}
    # "--load_..." stands for every flag that starts so
    wrong = [
        flag for flag in named - known if not (flag.endswith("_") and any(k.startswith(flag) for k in known))
    ]
    assert sorted(wrong) == []
    keys = re.findall(r"--set (\w+)=", text_of(document), re.A)
    assert keys
    assert [key for key in keys if key not in keys_of(PPOConfig)] == []


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_both_languages_say_the_same(english: str, chinese: str) -> None:
    """Equal blocks, structure and code words; links lead to the same place in the reader's language."""
    assert blocks(english) == blocks(chinese)
    outlines = [re.findall(r"^(#+) ", prose(document), re.M) for document in (english, chinese)]
    assert outlines[0] == outlines[1]
    rows = [len(re.findall(r"^\|", prose(document), re.M)) for document in (english, chinese)]
    assert rows[0] == rows[1]
    words = [set(_INLINE.findall(prose(document))) for document in (english, chinese)]
    assert words[0] ^ words[1] == set()
    links = [sorted(link.replace("_CN", "") for link in _LINK.findall(prose(d))) for d in (english, chinese)]
    assert links[0] == links[1]
    to_english = [link for link in _LINK.findall(prose(chinese)) if link.endswith("README.md")]
    assert to_english == ["README.md"], "only the language switch leads from the Chinese text to the English"


@pytest.mark.parametrize("document", PAIRS[0])
def test_readme_opens_with_the_two_commands(document: str) -> None:
    language, content = blocks(document)[0]
    assert (language, content) == ("bash", "bash scripts/quickstart.sh\nbash scripts/run_tests.sh\n")
    opening = text_of(document).partition("\n## ")[0].splitlines()
    assert "bash scripts/quickstart.sh" in opening[:20]


@pytest.mark.parametrize(("document", "header"), zip(PAIRS[0], ("path", "路径"), strict=True))
def test_file_map_is_true_and_short(document: str, header: str) -> None:
    """Each folder of the library has a short row, and the files it names are in that folder."""
    rows = dict(table_rows(document, header))
    assert len(rows) <= 25
    assert [cell for cell in rows.values() if len(_FILE_NAME.findall(cell)) > 9] == []
    for folders, cell in rows.items():
        for folder in _INLINE.findall(folders):
            names = [word for word in _INLINE.findall(cell) if _FILE_NAME.fullmatch(word)]
            assert [name for name in names if not any((ROOT / folder).glob(name))] == [], folder
    packages = {
        f"`{path.parent.relative_to(ROOT)}/`" for path in (ROOT / "mindrlhf").glob("*/**/__init__.py")
    }
    assert packages - rows.keys() == set()


@pytest.mark.parametrize("document", PAIRS[0])
def test_loop_is_the_code(document: str) -> None:
    loops = [content for language, content in blocks(document) if language == "python"]
    source = textwrap.dedent(
        (ROOT / "mindrlhf/trainer/loop.py").read_text(encoding="utf-8").rpartition('"""')[2]
    )
    assert loops == [source.lstrip("\n")]


@pytest.mark.parametrize("document", PAIRS[0])
def test_advantages_and_critics_are_named(document: str) -> None:
    for name in ("advantage", "critic"):
        assert f"`{name}: {' | '.join(keys_of(PPOConfig)[name].choices)}`" in text_of(document)


@pytest.mark.parametrize(("document", "header"), zip(PAIRS[1], ("name", "名称"), strict=True))
def test_glossary_has_every_metric(document: str, header: str) -> None:
    trainer = ROOT / "mindrlhf/trainer"
    source = (trainer / "metrics.py").read_text(encoding="utf-8")
    recipe = (trainer / "recipes/rl.py").read_text(encoding="utf-8")
    step = recipe.partition("def step(")[2].partition("def evaluate(")[0]
    result = recipe.partition("metrics: dict[str, float] =")[2].partition("samples =")[0]
    written = set(re.findall(r'"([\w/]+)":', source + result))
    written |= set(re.findall(r'metrics\["([\w/]+)"\] =', source))
    written |= {f"time/{phase}" for phase in re.findall(r'timer\.phase\("(\w+)"', step)}
    written |= {"iteration", "time/iteration", "tokens_per_second"}  # of the run, for every recipe
    documented = {name for row in table_rows(document, header) for name in _INLINE.findall(row[0])}
    assert len(documented) > 30
    assert documented == written


@pytest.mark.parametrize(("document", "header"), zip(PAIRS[1], ("message", "消息"), strict=True))
def test_messages_are_those_of_the_code(document: str, header: str) -> None:
    messages = [code for row in table_rows(document, header) for code in _INLINE.findall(row[0])]
    assert len(messages) > 15
    assert [message for message in messages if message not in source_text()] == []
