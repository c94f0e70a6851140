"""The frozen model: prompts, packing, attention, the one forward.

The package as a whole may be installed beside an older transformers, for the gateway, which loads
no model. What is in here needs a newer one.
"""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from cartridge_distill.util.errors import ConfigError

OLDEST_TRANSFORMERS = "5.5.3"


def check_transformers(installed: str) -> None:
    """Refuses a release of transformers that is too old for models.

    Raises:
        ConfigError: with the installation that fits.
    """
    if Version(installed) < Version(OLDEST_TRANSFORMERS):
        raise ConfigError(
            f"transformers {installed} is installed; the gateway runs with it, but models need "
            f"{OLDEST_TRANSFORMERS} or newer; fix: pip install "
            f"'transformers>={OLDEST_TRANSFORMERS}'"
        )


try:
    check_transformers(version("transformers"))
except PackageNotFoundError:
    pass  # not installed but on the path, or not there at all: the first import of it tells
