"""The functions of the pinned Tokasaurus that are replaced or relied on, with their hashes.

Data only; :mod:`.guard` compares. When the pinned commit changes, read the functions that
``--check`` names, fix the replacements, then put the hashes that it prints here.
"""

from __future__ import annotations

from dataclasses import dataclass

COMMIT = "845f115f5bc38aee266821a094fba1cd702dafff"
"""Head of Tokasaurus' branch ``geoff/cartridges`` in August 2025."""


@dataclass(frozen=True)
class Known:
    """A function of the pinned commit.

    Attributes:
        module: below ``tokasaurus``.
        name: within the module, methods as ``Class.method``.
        sha256: of its source.
        replaced: False if it stays, and the replacements rely on what it does.
    """

    module: str
    name: str
    sha256: str
    replaced: bool = False

    @property
    def path(self) -> str:
        return f"tokasaurus.{self.module}.{self.name}"


def _replaced(module: str, name: str, sha256: str) -> Known:
    return Known(module, name, sha256, replaced=True)


KNOWN: tuple[Known, ...] = (
    # --- replaced
    _replaced(
        "manager.allocator",
        "pick_blocks_for_allocation",
        "41dc7c98b02b6d15942bc8e7f5947d18940536af66663076204274c178d6e806",
    ),
    _replaced(
        "manager.allocator",
        "BlockAllocator.allocate_with_prefix_match",
        "8ec45898a8563acb58089333cfa2ff8d90a9b2b07823061da899a67cca574c6e",
    ),
    _replaced(
        "manager.manager",
        "check_and_request_downloads",
        "8c7973f00593dd32cdb7ca0decf7c097493614ccfa71e64dbc3c9c8d25e6bacf",
    ),
    _replaced(
        "manager.manager",
        "send_cartridge_load_commands",
        "c43d6dd84b8ce890d5128a9c02faecc6985ecc99b6a40ddb76d5650725ec89a1",
    ),
    _replaced(
        "manager.types",
        "ManagerState.is_cartridge_loaded",
        "77e347d133d9608bc55db34586178fb671fce3c8fa00d460958ab6b45ffad542",
    ),
    _replaced(
        "manager.types",
        "ManagerState.mark_cartridge_loading",
        "8acf2022b232a11f7640cea1987aa8f04cb647cc57765189239df8f2c282a14c",
    ),
    _replaced(
        "manager.types",
        "ManagerState.reset_cartridge_loading_state",
        "f96ee6d798ec5e3348b9b256b8f6e3f58be7b26651088190e7e23274f32ff21f",
    ),
    _replaced(
        "model.types",
        "CartridgeManager.load_cartridge",
        "6419fc00aecb1184bd7069ab31bb06ec376821e1201d22221c380202eadf2f06",
    ),
    _replaced(
        "model.llama",
        "LlamaModel.forward",
        "709c2b1c5154b4f0e5383190411542dcfe50c0d87620dc8e89e804666b6b678f",
    ),
    _replaced(
        "server.utils",
        "generate_output",
        "3bf6d816aa7c0a86029f5f6b4a51c204d88b2022d3ce2e2d06a9e468d185a97a",
    ),
    # --- relied on: blocks
    Known(
        "manager.allocator",
        "Block.wipe",
        "5f069c4ac59ed5487aad7afe0acd9f6f3764a989c604a279db38ebeba5a56059",
    ),
    Known(
        "manager.allocator",
        "Block.is_root",
        "86e1b71a7a133cb06373354c4185c6efb1f4217d9dbfe13ae6846324dd7e2602",
    ),
    Known(
        "manager.allocator",
        "Block.__lt__",
        "ce2975ae17bd00eb3cddbed779b0a6c3cbd26172b763cab12eea0b3f5a431d2e",
    ),
    Known(
        "manager.allocator",
        "BlockAllocator.__init__",
        "f0a74aad72823f1249c5ff5c4f07d5a40bc4e0f374d233b2f21aecd1b056b814",
    ),
    Known(
        "manager.allocator",
        "BlockAllocator.add_floating",
        "70ece1e36205d18c59cb8ef2460f5a78e2575b6e4a7ea2989de6427ff6f65986",
    ),
    Known(
        "manager.allocator",
        "BlockAllocator.prefix_match",
        "304c943924bda2be115130d79d08fc71111f1a7e04981fb2c8f5852ee19a177e",
    ),
    Known(
        "manager.allocator",
        "BlockAllocator.update_prefix_tree",
        "ceb14fa43d15a4e9dc7e8b5f206e15daee0dbd7f81d4eb81aacf8be62e45982a",
    ),
    Known(
        "manager.allocator",
        "BlockAllocator.assign_block_to_seq",
        "49b4f5ff7d1f27585abcb2ac1acfc00b6b18a1a332bb671266a3de11dc4fabdc",
    ),
    Known(
        "manager.allocator",
        "BlockAllocator.allocate_up_to_length",
        "ce1e07509885c70bfe850dc9572d50f4280cd066eb338f36c51b84d357aa86c1",
    ),
    Known(
        "manager.allocator",
        "BlockAllocator.make_available_leaf_heap",
        "8d12a1a663e91fae81993050df6548674f982884d6f66e0b463f569eda080580",
    ),
    Known(
        "manager.allocator",
        "BlockAllocator.allocate_cartridge",
        "f850bb5f22674f5791fae1a6841755bf98c0d015ba2d37e8eb3873a870312f98",
    ),
    Known(
        "manager.allocator",
        "BlockAllocator.free_and_update",
        "41ee93ea3a1fa7ae229530b7e6d084b3df8372edcb49b76deccf5c7ea113c8b1",
    ),
    # --- relied on: from the request to the load command
    Known(
        "manager.manager",
        "handle_new_server_commands",
        "3b2997a4a4afd7f69221dd78090386dd565ef4bc3d07ab02cfa56d144d6917f3",
    ),
    Known(
        "manager.manager",
        "handle_download_completions",
        "ba0c3c476666861f964a7745e681c7c4c488bc20c6573d01a508568bbdb9e1bf",
    ),
    Known(
        "manager.manager",
        "can_schedule_sequence",
        "45c8eec5fbee940e5f07998ab0a020e8e86ab366136af251d1aa1796583598d6",
    ),
    Known(
        "manager.manager",
        "real_allocate",
        "f6c068fd7098b52f6863e00092ec0539d960bbc88f56690a4b94ee8057a820ea",
    ),
    Known(
        "manager.manager",
        "prepare_and_submit_to_model",
        "75a7f733cd10a35f7ac1c43054ada084ca395ca21685e3e94977fa494cf63942",
    ),
    Known(
        "manager.manager",
        "send_to_model",
        "c331f2454cca09792c9bed9e888d8eb46851c9fb08de380c586ad65e0685e7e6",
    ),
    Known(
        "manager.types",
        "ManagerState.load_cartridge_config",
        "4c7be0c8d9bee6fc163b6c892544c55411523b82c355ebad77123eca14bf3189",
    ),
    Known(
        "manager.types",
        "ManagerState.deallocate",
        "41b322274e162831760cd3ad2a4fa86e3e009cdfabbbcf4e03c907e42ec5b25e",
    ),
    Known(
        "manager.types",
        "Sequence.total_block_indices",
        "4cc38d7bd0c3c496d34e5df83af507285c691fa1e21f05c62c93687ee89f6c16",
    ),
    Known(
        "utils",
        "sanitize_cartridge_id",
        "5c93e17ce8d246645cb3cc6ebfa4d6f34c6778a510bd5b39e1f7d45f66b39062",
    ),
    # --- relied on: from the load command to the cache
    Known(
        "model.basic_worker",
        "basic_model_loop",
        "c9c25b917d367ed9794608fe5a761fe8a594a02d4dc4c031ece8f792589d7ffd",
    ),
    Known(
        "model.basic_worker",
        "start_fanout_worker",
        "9ae20cc743d9898c09575c3fa8d862d34059669cb642652ee5187f394804e92d",
    ),
    Known(
        "model.pipeline_worker",
        "pipeline_worker_model_loop",
        "c9ed5c14cbd28a84a670dc749d843d79d5f378f2951f9060760b73e8b165d9eb",
    ),
    Known(
        "model.types",
        "CartridgeManager.__init__",
        "8c7c4e2e200f2f84a98f74ffeb01af75b2a23c0f1636245bac34dd4fa5ed94e4",
    ),
    Known(
        "model.types",
        "CartridgeManager._write_to_kv_cache",
        "2a6ca816c3543a2a846236f85964d8700dcc5082cf224d92208156bac860854d",
    ),
    Known(
        "model.types",
        "CartridgeManager._write_layer_cache",
        "820675ffb736f39e4f25ad68fbcad7e1df00b6781ada32a4fe74ed04687f77f8",
    ),
    # --- relied on: processes
    Known(
        "entry", "make_engine", "b6f93a953c1a26bf8fe839c55c3e9ad0f3d9e04225ec02cd0614722f8f5aeb57"
    ),
    Known(
        "entry",
        "make_proc_dict",
        "4fceaa0cb91341e64db015bbe693c08a441098708651f791c6acaa4b146fde54",
    ),
    Known("entry", "start", "3e05eb39fcfbb7fc841f6305705446c6812aaed386944a5bb20e13820dca9b28"),
    Known(
        "common_types",
        "ProcessInfo.make_process",
        "8871d0a4f6777e4b855c79b2ed61ed3a305c612066aa4088300e77f67c94c483",
    ),
    Known(
        "model.entry",
        "get_model_process_dict",
        "4ab32182c05a1a679909704bf07650111708d6506c1d9932fe2f2ddb9267a0f6",
    ),
    Known(
        "manager.manager",
        "start_manager",
        "6e10a84c194b01a36c44b9129fa0236248a53d618175fdff97b3f2141ca7c488",
    ),
    Known(
        "manager.manager",
        "manager_loop",
        "84e2915603bbd47f27511ba73962d6840603326770bbc0553fe32edd4e7fd9b6",
    ),
    Known(
        "model.basic_worker",
        "start_basic_model_worker",
        "d946080ed97f3374dbc71e6f9e6b1519f96b68035324d34a38fdf1cbccef17c2",
    ),
    Known(
        "model.pipeline_worker",
        "start_pipeline_worker",
        "921ac7ecac6f165b719ca0325c99d20bee895a2164c787f15c731b0c6faca42b",
    ),
    Known(
        "manager.download_worker",
        "start_download_worker",
        "19b5197521663f9f3178882639ab90a8bdc3cfde2efbe7eb300253f254ca3dc7",
    ),
    Known(
        "server.endpoints",
        "start_server",
        "00d57bf7f8a0cc087495a6c93b48d6f1b0d8a5d9a9df5b04f288bd9e06019a17",
    ),
    Known(
        "server.utils",
        "receive_from_manager_loop",
        "c62aa53ace9de1ed2a2200554f3973df4819fc5e18e95292bbe5e5074dc22a14",
    ),
    Known(
        "server.utils",
        "submit_request",
        "63cfc10be80f9e463184f6bdc5b05cdcda103d4bac87314e0a2330ec13133314",
    ),
)
