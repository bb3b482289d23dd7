"""What the repository promises about itself: its commands, pins, examples and texts."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from imagemill.config import load_settings
from imagemill.inputs import LORAS
from imagemill.models import KNOWN
from imagemill.sources import open_source

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
DIRECT = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
READMES = ("README.md", "README.zh-CN.md")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return {
        canonicalize_name(name): version
        for name, _, version in (line.partition("==") for line in lines if line and not line.startswith("#"))
    }


def code_blocks(name: str, language: str) -> list[str]:
    text = (ROOT / name).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def without_comments(block: str) -> list[str]:
    return [line.split("  #")[0].split(" # ")[0].rstrip() for line in block.splitlines()]


def our_files() -> list[Path]:
    """Tracked and new files, without what git ignores; every file of an unpacked archive that is no repository."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize("name", READMES)
def test_the_readme_begins_with_the_two_commands(name: str) -> None:
    lines = (ROOT / name).read_text("utf-8").splitlines()
    assert lines[:3] == ["# imagemill", "", "```bash"]
    assert [line.split("#")[0].strip() for line in lines[3:5]] == ["make demo", "make test"]
    assert lines[5] == "```"


@pytest.mark.parametrize("language", ["bash", "python", "yaml"])
def test_both_readmes_hold_the_same_code(language: str) -> None:
    english, chinese = ([without_comments(block) for block in code_blocks(name, language)] for name in READMES)
    assert english
    assert english == chinese


def test_both_readmes_describe_the_same_options() -> None:
    english, chinese = (
        re.findall(r"^\| (`--.*?) \|", (ROOT / name).read_text("utf-8"), re.MULTILINE) for name in READMES
    )
    assert [option.replace("`、`", "`, `") for option in chinese] == english


@pytest.mark.parametrize("requirement", DIRECT)
def test_every_direct_dependency_is_pinned_within_its_bounds(requirement: str) -> None:
    wanted = Requirement(requirement)
    assert pins()[canonicalize_name(wanted.name)] in wanted.specifier


def test_every_installed_transitive_dependency_is_pinned() -> None:
    pinned, seen = pins(), set[str]()
    todo = [Requirement(line).name for line in DIRECT]
    while todo:
        name = canonicalize_name(todo.pop())
        # torch pins its own CUDA packages and triton exactly, and only some machines have them.
        if name in seen or (name not in pinned and name.startswith(("nvidia-", "cuda-", "triton"))):
            continue
        seen.add(name)
        try:
            needed = [Requirement(line) for line in distribution(name).requires or []]
        except PackageNotFoundError:
            continue
        todo += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    assert sorted(seen - set(pinned)) == []


def test_the_torch_pin_fits_any_build() -> None:
    assert "+" not in pins()["torch"]


def test_the_changelog_names_the_version() -> None:
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_contributing_fits_on_one_screen() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text("utf-8").splitlines()) <= 50


def test_the_licence_is_whole_and_what_comes_from_others_is_named() -> None:
    licence = (ROOT / "LICENSE").read_text("utf-8")
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    notice = (ROOT / "NOTICE").read_text("utf-8")
    assert "Fluent Emoji" in notice
    assert "Permission is hereby granted, free of charge" in notice
    assert all(name in notice for name in ("chelsea", "coffee", "rocket", "china", "flower", "DreamBooth"))


def test_the_tweet_example_has_a_hint_in_each_tweet() -> None:
    batch = json.loads((ROOT / "examples/tweets.json").read_text("utf-8"))
    assert batch["persona"]["name"]
    assert batch["persona"]["lora"] == {"model_path": "pixel-art", "strength": 1.0}
    assert len(batch["tweets"]) == 8
    assert all(tweet["image_generation"]["scene_hint"] for tweet in batch["tweets"])


def test_the_prompt_example_shows_every_size_and_look_of_the_embedded_model() -> None:
    lines = (ROOT / "examples/prompts.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len({row["id"] for row in rows}) == len(rows) == 12
    assert {(row.get("width", 128), row.get("height", 128)) for row in rows} == set(KNOWN["tiny"].sizes)
    looks = [row.get("lora", row.get("lora_path")) for row in rows]
    assert (
        set(looks) == {None, *(path.stem for path in LORAS.glob("*.safetensors"))} == {None, "pixel-art", "line-icon"}
    )
    assert any("lora_strength" in row for row in rows)


@pytest.mark.parametrize("place", ["README.md", "README.zh-CN.md", "examples/config.yaml"])
def test_every_settings_file_shown_is_taken(place: str, tmp_path: Path) -> None:
    text = (ROOT / place).read_text("utf-8") if place.endswith(".yaml") else code_blocks(place, "yaml")[0]
    (tmp_path / "config.yaml").write_text(text, "utf-8")
    settings = load_settings(tmp_path / "config.yaml")
    assert (settings.model, settings.size, settings.steps) == ("tiny", (128, 128), 8)


@pytest.mark.parametrize(("name", "count"), [("tweets.json", 8), ("prompts.jsonl", 12), ("bench_tiny/bench.jsonl", 50)])
def test_every_row_of_the_examples_is_a_task(name: str, count: int) -> None:
    rows = list(open_source(ROOT / "examples" / name))
    assert [row.problems for row in rows if row.task is None] == []
    assert len(rows) == count


def test_the_yaml_of_the_readme_and_of_the_example_have_the_same_keys() -> None:
    def keys(tree: object, above: str = "") -> set[str]:
        if not isinstance(tree, dict):
            return set()
        return {above + name for name in tree} | {key for name in tree for key in keys(tree[name], f"{above}{name}.")}

    example = yaml.safe_load((ROOT / "examples/config.yaml").read_text("utf-8"))
    assert keys(example) == keys(yaml.safe_load(code_blocks("README.md", "yaml")[0]))


def test_links_between_the_texts_lead_somewhere() -> None:
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")]
    broken = [
        f"{text.name}: {target}"
        for text in texts
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text.read_text("utf-8"))
        if "://" not in target and not (text.parent / target).exists()
    ]
    assert broken == []


def test_no_file_names_a_path_of_one_persons_machine() -> None:
    homes = rb"(?<![\w.$~/-])/(?:root|home/\w+|Users/\w+)/\w"
    here = re.escape(f"{ROOT}/".encode()) if len(ROOT.parts) > 2 else homes
    private = re.compile(homes + b"|" + here)
    found = []
    for path in our_files():
        content = path.read_bytes()
        if b"\0" not in content[:1024]:
            found += [f"{path.relative_to(ROOT)}: {match.group().decode()}" for match in private.finditer(content)]
    assert found == []
