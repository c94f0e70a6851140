"""From a trained version to a served one: names, a shared directory, or an upload."""
