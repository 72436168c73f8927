"""The Smalltalk packages in `smalltalk/` as Python reads them: Tonel files, chunk format, grammar."""
