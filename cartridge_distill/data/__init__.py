"""From documents and records to prompts, training files and what is kept aside."""
