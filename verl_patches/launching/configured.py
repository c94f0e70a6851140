"""All of veRL's settings as a run has them, composed by Hydra before veRL is started."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from cartridge_distill.util.command_line import did_you_mean
from cartridge_distill.util.errors import ConfigError
from cartridge_distill.util.pasting import hydra_value
from verl_patches.launching.command import overrides
from verl_patches.launching.settings import CONFIG_FOLDER, CONFIG_NAME, Run
from verl_patches.manage import find_tree

if TYPE_CHECKING:
    from omegaconf import DictConfig

_UNKNOWN = re.compile(r"Could not override '([^']+)'")


@cache
def configuration(run: Run) -> DictConfig:
    """The settings, the run's own overrides among them. They are not to be changed.

    Raises:
        ConfigError: Hydra does not take them; its reason is in the message.
        PatchError: no veRL is there.
    """
    # Imported here: --help needs none of them.
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    theirs = find_tree().root / "verl" / "trainer" / "config"
    search = f"hydra.searchpath=[{hydra_value(f'file://{theirs}')}]"
    before: Any = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
            return compose(CONFIG_NAME, overrides=[search, *overrides(run)])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_what_is_wrong(str(error), run)) from error
    finally:
        GlobalHydra.instance().hydra = before


def _what_is_wrong(said: str, run: Run) -> str:
    """In one line; of a key that Hydra does not know, which one was probably meant."""
    listed = "`cartridge-distill train --show-config` lists them"
    match = _UNKNOWN.search(said) if run.overrides else None
    if match is None:
        return f"veRL's settings cannot be read: {' '.join(said.split())}; fix: {listed}"
    key = match[1].lstrip("+~")
    known = keys_of(configuration(replace(run, overrides=())))
    fix = did_you_mean(key, known, f"{listed}, and +{key}=... adds one that is not there")
    return f"{key}: veRL has no setting of this name; {fix}"


def keys_of(config: Any, before: str = "") -> list[str]:
    """All dotted keys of a configuration, of groups and of values."""
    from omegaconf import OmegaConf

    found: list[str] = []
    for key in config:
        name = f"{before}{key}"
        found.append(name)
        if not OmegaConf.is_missing(config, key) and OmegaConf.is_dict(config._get_node(key)):
            found += keys_of(config._get_node(key), f"{name}.")
    return found
