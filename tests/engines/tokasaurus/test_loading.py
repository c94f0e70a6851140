"""When a cartridge is loaded, when it is loaded again, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cartridge_distill.engines.tokasaurus import loading
from cartridge_distill.engines.tokasaurus.allocator import BrokenAllocator
from tests.engines.tokasaurus.model_server import ModelServer


def use(server: ModelServer, seq_id: str, *names: str) -> None:
    server.start(seq_id, names, prompt=[1])
    server.finish(seq_id)
    server.work()
    server.account()


def check(server: ModelServer, *names: str, source: str = "local") -> None:
    wanted = [{"id": name, "source": source} for name in names]
    loading.check_request(server, wanted, lambda name: name)


def send(server: ModelServer, *sequences: Any) -> list[Any]:
    """The load commands that go out ahead of a batch of these sequences."""
    sent: list[Any] = []
    loading.send_load_commands(
        server,
        SimpleNamespace(decoding_seqs=[], prefill_seqs=[(seq, 1) for seq in sequences]),
        send=lambda _, command: sent.append(command),
        command=lambda **fields: fields,
        sanitize=lambda name: name,
    )
    return sent


def test_a_resident_cartridge_is_loaded_once(tmp_path: Path) -> None:
    server = ModelServer(16, tmp_path)
    server.publish("a", 4)
    for number in range(5):
        use(server, f"s{number}", "a")
    assert server.loads == 1 and loading.is_loaded(server, "a")


def test_an_evicted_one_is_loaded_again_and_only_then(tmp_path: Path) -> None:
    server = ModelServer(10, tmp_path)
    for name in ("a", "b", "c"):
        server.publish(name, 4)
        use(server, name, name)
    assert server.loads == 3
    assert [loading.is_loaded(server, name) for name in "abc"] == [False, True, True]
    use(server, "again", "a")
    assert server.loads == 4 and not loading.is_loaded(server, "b")
    use(server, "once more", "c")
    assert server.loads == 4


def test_a_file_that_changed_meanwhile_meets_no_page_of_the_old_one(tmp_path: Path) -> None:
    """Which must not happen; but if it does, the answer is all of the new weights."""
    server = ModelServer(10, tmp_path)
    for name in ("a", "b", "c"):
        server.publish(name, 4)
        use(server, name, name)
    server.weights["a"] = "other weights"
    seq = server.start("again", ["a"], prompt=[1])
    assert seq.cached_pages == 0
    server.work()


def test_a_load_that_was_not_sent_is_not_noted(tmp_path: Path) -> None:
    server = ModelServer(10, tmp_path)
    server.publish("a", 4)
    (tmp_path / "a" / "cartridge.pt").unlink()
    with pytest.raises(FileNotFoundError, match="cartridge.pt in .* went while a request"):
        server.start("s", ["a"])
    assert not loading.is_loaded(server, "a")


def test_one_command_for_many_sequences_with_the_blocks_in_order(tmp_path: Path) -> None:
    server = ModelServer(20, tmp_path)
    for name in ("a", "b"):
        server.publish(name, 3)
    sequences = [server.start("s0", ["a", "b"]), server.start("s1", ["b"]), server.start("s2")]
    for head in server.heads.values():
        del head.written_cartridge_id  # type: ignore[attr-defined]
    sent = send(server, *sequences)
    first, second = (command["block_indices"] for command in sent)
    assert [command["cartridge_id"] for command in sent] == ["a", "b"]
    assert sequences[0].cartridge_indices == first + second
    assert sequences[1].cartridge_indices == second
    assert all(command["cartridge_dir"] == str(tmp_path) for command in sent)
    assert send(server, *sequences) == []


@pytest.mark.parametrize("indices", [[0, 1], [], None, [0, 0, 0, 0]])
def test_a_sequence_with_other_blocks_than_its_cartridges_stops_the_manager(
    tmp_path: Path, indices: list[int] | None
) -> None:
    server = ModelServer(8, tmp_path)
    server.publish("a", 4)
    server.start("s", ["a"])
    seq = SimpleNamespace(id="t", prepended_cartridge_ids=("a",), cartridge_indices=indices)
    with pytest.raises(BrokenAllocator, match="sequence t would read blocks"):
        send(server, seq)


def test_a_sequence_whose_cartridge_is_gone_stops_the_manager(tmp_path: Path) -> None:
    server = ModelServer(8, tmp_path)
    seq = SimpleNamespace(id="t", prepended_cartridge_ids=("gone",), cartridge_indices=[1])
    with pytest.raises(BrokenAllocator, match="cartridges gone are in \\[\\]"):
        send(server, seq)
    with pytest.raises(BrokenAllocator, match="has no blocks"):
        loading.mark_loaded(server, "gone")


def test_requests_that_could_only_wait_or_break_something_are_refused(tmp_path: Path) -> None:
    server = ModelServer(8, tmp_path)
    for name in ("fine", "odd", "empty", "gone"):
        server.publish(name, 2)
    server.cartridge_id_to_config["odd"].num_tokens = 2047
    server.cartridge_id_to_config["empty"].num_tokens = 0
    (tmp_path / "gone" / "config.yaml").unlink()
    check(server, "fine")
    loading.check_request(server, None, lambda name: name)
    with pytest.raises(ValueError, match="odd has 2047 tokens; the server needs a multiple of 16"):
        check(server, "fine", "odd")
    with pytest.raises(ValueError, match="empty has 0 tokens"):
        check(server, "empty")
    with pytest.raises(FileNotFoundError, match="gone: no config.yaml in"):
        check(server, "gone")
    with pytest.raises(FileNotFoundError, match="no cartridge.pt and no config.yaml"):
        check(server, "never")
    with pytest.raises(ValueError, match="fine is named twice"):
        check(server, "fine", "fine", source="huggingface")
    check(server, "remote", source="huggingface")  # not downloaded yet


def test_a_file_with_unknown_keys_is_refused_before_its_first_use(tmp_path: Path) -> None:
    """Tokasaurus takes the lists that it knows, and attends to what the others call padding."""
    server = ModelServer(8, tmp_path)
    server.publish("padded", 2)
    lists = [torch.zeros(1, 2, 16, 4)] * 2
    parts = dict.fromkeys(("frozen_keys", "frozen_values", "trainable_keys"), lists)
    torch.save({**parts, "trainable_values": lists}, tmp_path / "padded" / "cartridge.pt")
    config = server.cartridge_id_to_config.pop("padded")
    server.load_cartridge_config = lambda _: config
    check(server, "padded")
    file = {**parts, "trainable_values": lists, "valid_lengths": [32, 20]}
    torch.save(file, tmp_path / "padded" / "cartridge.pt")
    with pytest.raises(ValueError, match="not known here: valid_lengths"):
        check(server, "padded")


def test_a_new_download_does_not_change_what_is_in_the_cache(tmp_path: Path) -> None:
    server = ModelServer(8, tmp_path)
    warnings: list[str] = []
    server.logger.warning = warnings.append
    for name in ("resident", "absent"):
        server.publish(name, 2)
    use(server, "s", "resident")
    for name in ("resident", "absent"):
        loading.forget_file(server, name)
    assert loading.is_loaded(server, "resident")
    assert list(server.cartridge_id_to_config) == ["resident"]
    assert len(warnings) == 1 and "New weights need a new id" in warnings[0]
