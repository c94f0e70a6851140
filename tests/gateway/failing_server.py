"""The embedded server, which fails while a file is there. Started as a gateway's server.

While ``$FAIL_WHILE`` is there its forwards fail; while ``$FAIL_WHILE.reads`` is, the disk does not
give it a cartridge's weights.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

from cartridge_distill.cartridge.formats import hazyresearch
from cartridge_distill.server.__main__ import main
from cartridge_distill.server.engine import Engine

FAIL_WHILE = "FAIL_WHILE"
_forward, _fetch = Engine._forward, hazyresearch.fetch_from_disk


def _failing(self: Engine, *arguments: Any) -> Any:
    if Path(os.environ[FAIL_WHILE]).exists():
        raise RuntimeError("the device has no memory left")
    return _forward(self, *arguments)


def _failing_fetch(file: BinaryIO) -> None:
    if Path(os.environ[FAIL_WHILE] + ".reads").exists():
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    _fetch(file)


if __name__ == "__main__":
    Engine._forward = _failing  # type: ignore[method-assign]
    hazyresearch.fetch_from_disk = _failing_fetch
    sys.exit(main())
