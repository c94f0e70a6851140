"""Fixtures for all tests: a tiny reference model, and embedded servers over copies of it.

What they need is imported where they need it: pytest's first process reads this file too, runs no
test, and lets the others begin when it has.
"""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from cartridge_distill.server.running import BackgroundServer
    from tests.gateway.rig import Rig


# Behind `nohup ... &` Ctrl-C is ignored, and whatever is started from there ignores it as well: no
# test could stop what it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)  # after `-m` has left some out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is long comes first for both of two workers, each of which begins with half of the list.

    At the end it would leave one of them without work. veRL's runs are the first's, servers and
    gateways, which tests share, the second's.
    """
    long = [item for item in items if item.get_closest_marker("integration")]
    short = [item for item in items if item not in set(long)]
    runs = [item for item in long if "verl" in item.path.parts]
    servers = [item for item in long if item not in set(runs)]
    cut = max(0, len(items) // 2 - len(runs))
    items[:] = [*runs, *short[:cut], *servers, *short[cut:]]


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    """The reference model; servers get a copy, for they replace the attention."""
    from tests.tiny import tiny_model

    return tiny_model()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    from tests.tiny import byte_tokenizer

    return byte_tokenizer()


StartServer = Callable[..., "BackgroundServer"]


@pytest.fixture
def start_server(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Iterator[StartServer]:
    """A function that starts a server over a copy of the tiny Llama; all are stopped at the end."""
    from cartridge_distill.server.running import BackgroundServer
    from cartridge_distill.server.settings import ServerSettings

    running: list[BackgroundServer] = []

    def start(**settings: Any) -> BackgroundServer:
        settings.setdefault("cartridge_dir", tmp_path)
        server = BackgroundServer(copy.deepcopy(llama), tokenizer, ServerSettings(**settings))
        running.append(server.__enter__())
        return server

    yield start
    for server in running:
        server.__exit__(None, None, None)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama and its byte tokenizer, as transformers saves them."""
    from tests.tiny import save_model, tiny_model

    folder = tmp_path_factory.mktemp("model")
    save_model(tiny_model(), folder)
    return folder


@pytest.fixture(scope="session")
def rig(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One gateway for all tests that leave its process as they found it; a start takes 15 s of CPU.

    Its versions are shared, too: a test names its own, and looks at nobody else's. The limits are
    small, so that they can be reached.
    """
    from tests.gateway.rig import Rig

    folder = tmp_path_factory.mktemp("gateway")
    with Rig(
        folder,
        model_folder,
        *("--max-inflight", 6, "--max-request-tokens", 400, "--max-request-bytes", 20_000),
        *("--max-choices", 4, "--max-cartridge-tokens", 64, "--keep-versions", 3),
    ) as running:
        yield running
