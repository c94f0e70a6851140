"""The embedded server, whose forwards fail while a file is there. Started as a gateway's server."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from cartridge_distill.server.__main__ import main
from cartridge_distill.server.engine import Engine

FAIL_WHILE = "FAIL_WHILE"
_forward = Engine._forward


def _failing(self: Engine, *arguments: Any) -> Any:
    if Path(os.environ[FAIL_WHILE]).exists():
        raise RuntimeError("the device has no memory left")
    return _forward(self, *arguments)


if __name__ == "__main__":
    Engine._forward = _failing  # type: ignore[method-assign]
    sys.exit(main())
