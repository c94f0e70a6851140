"""The engine: a frozen model and a cartridge, in veRL's training worker."""
