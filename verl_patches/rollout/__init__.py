"""Rollout backends for veRL."""
