"""Starts the REAL server on a CPU, through our launcher; arguments as for that.

Stood in for are the model worker's device, two calls of torch.cuda, and flashinfer. All else (HTTP,
manager, allocator, queues, loader, model) is the branch's own code.
"""

from __future__ import annotations

import functools
from typing import Any

from cartridge_distill.engines.tokasaurus.__main__ import run


def start_worker_on_cpu(**options: Any) -> None:
    import torch
    from tokasaurus.model import basic_worker

    torch.set_num_threads(1)
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.is_current_stream_capturing = lambda: False
    basic_worker.setup_distributed = lambda *_, **__: (None, "cpu")
    basic_worker.start_basic_model_worker(**options)


def use_cpu() -> None:
    from tokasaurus import entry

    original = entry.make_proc_dict

    @functools.wraps(original)
    def make_proc_dict(*arguments: Any, **options: Any) -> Any:
        infos, barrier = original(*arguments, **options)
        infos["model_worker"].target = start_worker_on_cpu
        return infos, barrier

    entry.make_proc_dict = make_proc_dict


if __name__ == "__main__":
    use_cpu()
    run()
