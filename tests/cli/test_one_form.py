"""What is refused is refused in one form: what is wrong, ``; fix: ``, what to do.

Every ``raise`` of an error of this project is read. What a person cannot do anything about, or
never sees as it stands, is listed below with the reason.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from cartridge_distill.util import errors
from cartridge_distill.util.errors import with_fix

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cartridge_distill", "verl_patches")
_OURS = {name for name, found in vars(errors).items() if isinstance(found, type)}
_REFUSALS = {*_OURS, "FileExistsError", "NotReady", "NotTheFile", "PatchError"}

# Whole files and folders.
_NOT_READ = {
    "cartridge_distill/cartridge/formats": "what is wrong in a file; read_local adds the fix",
    "cartridge_distill/cartridge/kv_shape.py": "shapes; who knows the file adds the fix",
    "cartridge_distill/cartridge/prefix.py": "shapes; who knows the file adds the fix",
    "cartridge_distill/cartridge/snapshot.py": "shapes; who knows the file adds the fix",
    "cartridge_distill/cli/doctor.py": "its findings have a form, and fixes, of their own",
    "cartridge_distill/distill/on_policy.py": "a proof that failed: nothing is set wrong",
    "cartridge_distill/engines/vllm/connector.py": "the shapes of a cartridge on one rank",
    "cartridge_distill/gateway/model_shape.py": "an answer to a program that uploads",
    "cartridge_distill/gateway/receiving.py": "an answer to a program that uploads",
    "cartridge_distill/gateway/uploads.py": "an answer to a program that uploads",
    "cartridge_distill/gateway/verifying.py": "an answer to a program that uploads",
    "cartridge_distill/gateway/version_info.py": "a file that no person writes",
    "cartridge_distill/rollout/answers.py": "an answer that is not the protocol's",
    "cartridge_distill/rollout/fingerprint.py": "an answer that is not the protocol's",
    "cartridge_distill/sync/upload.py": "an answer to a program that uploads",
    "verl_patches/actor/kept_versions.py": "a proof that failed: nothing is set wrong",
    "verl_patches/rollout/tokasaurus_rollout/adapter.py": "what veRL hands over",
    "verl_patches/rollout/tokasaurus_rollout/server.py": "the order of versions, which nobody sets",
    "verl_patches/trainer/mixing.py": "a proof that failed: nothing is set wrong",
    "verl_patches/trainer/replay.py": "the trainer adds the causes",
}
# The fix comes in with what these repeat, or each line of their list has its own.
_PASSED_ON = (
    *("with_fix(", "about(", "_not_a_run(folder)", "str(error)", "how_to_serve(run)"),
    *("_what_is_wrong(", "_refused_kind(path)", "nearest(", "how_to_go_on(", "_what_to_do(run)"),
    *("*problems", "HOW_TO_START", "CREDENTIALS", "_HOW", "_FIX", "_WRITE_IT", "{fix}"),
    *("guard.unknown(", "self._dead", "self._message(", "_rollout_errors()"),
)
# Messages, by their beginning.
_ALONE = {
    "nothing was changed": "its lines have their own",
    "git apply failed": "git's own words",
    "cannot {what} {repo}: {said}": "the Hub's own words, which name the fix",
    "veRL is not ready for cartridges: {error}": "each line of the error has its own",
    "{error}; or leave --server out": "the error has one, and this is another",
    "{error}\\n{len(journal.rows)} generations": "the client's own, with what is kept",
    "{where}: {error}": "a question's, which has one",
    "{parameter!r}, {name!r}: a name must not": "of a module in the code",
    "it makes keys and values of": "the caller adds it",
    "{self.url}/v1/models: {first_problem(error)}": "an answer that is not the protocol's",
    "POST {self.url}{path}: {error}": "an answer that is not the protocol's",
    "the embedded server did not stop": "nothing to do",
    "version {version} was not published: ": "each failure has its own",
    "version {version} was published before": "a proof that failed: nothing is set wrong",
    "{version!r} is no version id": "ids come from the code",
    "rollouts labelled step {self._asked} were made": "a proof that failed: nothing is set wrong",
    "sample {row}: prompt {prompt} + response": "a proof that failed: nothing is set wrong",
    "the step has {len(batch.keys)} rollouts": "a proof that failed: nothing is set wrong",
    "the {what} is gone": "the run's end says how to go on",
}


def refusals(module: Path) -> Iterator[tuple[int, str]]:
    """Line and source of each refusal that a module raises."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            if getattr(node.exc.func, "attr", getattr(node.exc.func, "id", "")) in _REFUSALS:
                yield node.lineno, ast.unparse(node.exc)


def _modules(package: str) -> list[Path]:
    listed = [ROOT / name for name in _NOT_READ]
    return [
        module
        for module in sorted((ROOT / package).rglob("*.py"))
        if not any(module == place or place in module.parents for place in listed)
    ]


def _said_by(source: str) -> str:
    """The beginning of what a refusal says, as it is written."""
    return source.partition("(")[2].lstrip("f").lstrip("'\"")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_refusal_names_its_fix(package: str) -> None:
    read = [(module, line, said) for module in _modules(package) for line, said in refusals(module)]
    assert len(read) > 80
    without = [
        f"{module.relative_to(ROOT)}:{line}: {said}"
        for module, line, said in read
        if "fix: " not in said
        and not any(passed in said for passed in _PASSED_ON)
        and not _said_by(said).startswith(tuple(_ALONE))
    ]
    assert not without, "\n".join(without)


def test_the_exceptions_are_there() -> None:
    assert not [name for name in _NOT_READ if not (ROOT / name).exists()]
    said = [
        _said_by(source)
        for package in PACKAGES
        for module in _modules(package)
        for _, source in refusals(module)
    ]
    assert not [begin for begin in _ALONE if not any(one.startswith(begin) for one in said)]


def test_a_fix_is_added_once() -> None:
    assert with_fix("x.json is empty.", "write it") == "x.json is empty; fix: write it"
    assert with_fix("x is empty; fix: fill it", "write it") == "x is empty; fix: fill it"
