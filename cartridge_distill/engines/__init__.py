"""Inference servers of others, made fit to serve a new version each step."""
