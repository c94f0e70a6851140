"""One thing has one name: the names that were given up stay given up.

The glossary of docs/architecture.md has the names that are used. Every line of every file counts.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]

MASKS = ("cartridge_distill/model/", "cartridge_distill/distill/", "verl_patches/actor/")
VERL = ("verl_patches/actor/", "verl_patches/trainer/", "verl_patches/rollout/", "tests/verl/")

# retired name -> (the name that is used, the folders where the old one may not stand; () is all)
RETIRED: dict[str, tuple[str, tuple[str, ...]]] = {
    r"\bChoiceTokens\b": ("Completion", ()),
    r"\bGenerated\b(?! |:)": ("Completion", ()),
    r"\bclass Answer\b|import Answer\b": (
        "Completion",
        ("cartridge_distill/", "verl_patches/"),
    ),
    r"\bwanted\b": ("response_mask, or say what is counted", MASKS),
    r"\bwanted: list\[int\]": ("logits_to_keep", ("cartridge_distill/server/",)),
    r"\bkeep\b(?=[:=,)]| =)": ("response_mask or logit_mask", MASKS),
    r"(?i)(?<![a-z])stamp(s|ed)?(?![a-z])": ("labels", (*VERL, "tests/training/")),
    r"\bsources\b|[\"']source[\"'](?=\]|,|: (TEACHER|STUDENT))": (
        "author",
        ("verl_patches/actor/", "verl_patches/trainer/", "tests/verl/"),
    ),
    r"\bfor who, |\bwho ==": ("author", VERL),
    r"\bcheck_same_recipe\b|\brecipe_of\b": ("check_same_settings, settings_of", ()),
    r"(?<!_)\brecipe: str|options\.recipe\b": ("prompt_recipe", ("cartridge_distill/data/",)),
    r"(?i)\bmend(s|ed|ing|able)?\b": ("fix", ()),
    r"\bheat\b": ("temperature", ()),
    r"\bimport tell\b|\bdef tell\b": ("add_training_record", ()),
    r"\bin_words\b": ("kind_and_message", ()),
    r"\bbuilding\.py\b|\bimport building\b": ("initial_state", ()),
    r"\bdistill[./]agreement\b|\bclass Agreement\b|bf16_agreement": (
        "distill/rounding, LogprobDifferences, bf16_rounding",
        (),
    ),
    r"\bkept_apart\b": ("decontamination, _evaluation_texts", ()),
    r"\bOneEach\b": ("what does it do?", ()),
    r"\bTeacherDesk\b|\bteacher_desk\b|\bdesk\b": ("RolloutTeacher, rollout_teacher", ()),
    r"formats[./]own\b|formats[./]stored\b|--to own\b": ("native, stored_cartridge", ()),
    r"\bmake_equal\b": ("copy_from_rank_0", ()),
    r"\bdecoder_config\b|(?<!def )\bget_text_config\(": ("kv_shape.text_config", ()),
    r"\bPAGE_SIZE\b": ("PAGE_TOKENS", ()),
    r"\bRunningGateway\b|\bgateway_rig\b": ("Rig, tests/gateway/rig.py", ()),
    r"\bstored: StoredCartridge|\bstored = |\bstored\.[a-z]": (
        "cartridge",
        ("cartridge_distill/cartridge/",),
    ),
    # An installed package has no such script.
    r"training/prepare_data\.py": (
        "`cartridge-distill prepare`",
        ("cartridge_distill/", "verl_patches/config/checks", "verl_patches/actor/"),
    ),
    r"\bour own format\b": ("the native format", ("cartridge_distill/", "docs/")),
}

# file -> why it may use a retired name
ALLOWED = {
    "tests/test_names.py": "it lists them",
    "CHANGELOG.md": "it says what was called how before",
    "LICENSE": "it is not ours to word",
    "cartridge_distill/cartridge/kv_shape.py": "the one call of transformers' get_text_config",
}
READ = {".py", ".md", ".sh", ".yaml", ".yml", ".toml", ".patch", ".txt", ".js", ".html", ".css"}


def files() -> list[str]:
    done = subprocess.run(
        ["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("not a git checkout: which files are the project's is not known")
    names = [name for name in done.stdout.splitlines() if (PROJECT / name).is_file()]
    return [name for name in names if Path(name).suffix in READ or name in {"LICENSE", "Makefile"}]


def found(text: str, name: str) -> list[str]:
    """What is retired in the text of a file."""
    return [
        f"{name}:{number}: {line.strip()!r}; the name is {used}"
        for pattern, (used, folders) in RETIRED.items()
        if not folders or name.startswith(folders)
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_no_file_uses_a_retired_name() -> None:
    names = files()
    assert len(names) > 300
    problems = [
        problem
        for name in names
        if name not in ALLOWED
        for problem in found((PROJECT / name).read_text(encoding="utf-8"), name)
    ]
    assert not problems, "\n".join(problems)


def test_who_is_allowed_still_needs_it() -> None:
    unused = [
        name
        for name in ALLOWED
        if not found((PROJECT / name).read_text(encoding="utf-8"), name)
        and name not in {"LICENSE", "CHANGELOG.md"}
    ]
    assert not unused, f"no retired name is left in {unused}; take them out of ALLOWED"


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("    mend = 'do it'", "cartridge_distill/cli/doctor.py"),
        ("tokens: ChoiceTokens", "tests/any.py"),
        ("def f(wanted: Tensor) -> None:", "cartridge_distill/model/forward.py"),
        ("forward(keep=mask)", "cartridge_distill/model/forward.py"),
        ("version stamp; with", "verl_patches/rollout/tokasaurus_rollout/test_rollout.py"),
        ("def test_it_is_stamped_with_it() -> None:", "tests/verl/test_rollout_proxy.py"),
        ('label = {"source": TEACHER}', "verl_patches/trainer/mixing.py"),
        ("text = config.get_text_config(decoder=True)", "benchmarks/ways.py"),
    ],
)
def test_the_patterns_find_what_they_are_for(line: str, name: str) -> None:
    assert found(line, name)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("we recommend an amendment", "README.md"),
        ("def choose(wanted: Sequence[str])", "cartridge_distill/data/documents/source.py"),
        ("### Generated answers", "docs/evaluation.md"),
        ("timestamp = now()", "verl_patches/trainer/x.py"),
        ('ref = {"id": "a", "source": "local"}', "verl_patches/trainer/x.py"),
    ],
)
def test_the_patterns_leave_the_rest_alone(line: str, name: str) -> None:
    assert not found(line, name)
