"""The files of a cartridge in the native format, for those who only look whether they are there.

The format's own module imports torch, which takes seconds.
"""

from __future__ import annotations

WEIGHTS_FILE = "cartridge.safetensors"
META_FILE = "cartridge.json"
FILES = (WEIGHTS_FILE, META_FILE)
