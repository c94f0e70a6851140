"""What a cartridge may begin as, by name; ``model.beginning`` computes it. Needs no torch."""

from __future__ import annotations

TEXT, SPANS, ATTENDED = "text", "spans", "attended"
BEGINNINGS = (TEXT, SPANS, ATTENDED)
"""Parts of a document; a cartridge may begin as noise or as another cartridge, too."""

IN_WORDS = {
    TEXT: "the first tokens",
    SPANS: "spans of 16 tokens, evenly over the whole",
    ATTENDED: "for each head the tokens that it needs to repeat the document",
}
