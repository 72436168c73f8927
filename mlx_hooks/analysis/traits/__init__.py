"""Traits: directions of the residual stream that tell one kind of text from another, followed token by token."""
