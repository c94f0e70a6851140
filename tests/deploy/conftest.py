"""The folder ``modal/`` is no package; its modules import each other by their own names."""

from __future__ import annotations

import sys

from tests.deploy.recording import FOLDER

if str(FOLDER) not in sys.path:
    sys.path.append(str(FOLDER))
