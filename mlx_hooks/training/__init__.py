"""Capture while a model trains, and what was captured looked at afterwards."""
