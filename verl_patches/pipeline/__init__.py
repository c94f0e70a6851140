"""From a document to a cartridge in one go: the stages of `distill`, which the demo runs, too."""
