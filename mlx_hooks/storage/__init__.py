"""Activations in files."""
