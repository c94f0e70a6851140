"""What every room may use: errors, files, journals, processes. It knows nothing of cartridges."""
