"""Only Hydragen calls it, which stays off with cartridges."""
