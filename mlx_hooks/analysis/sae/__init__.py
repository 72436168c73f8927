"""Sparse autoencoders: rows of activations as sums of few learned directions.

``autoencoder.py`` is the thing itself, ``files.py`` SAELens' folders, ``training.py`` how it is learned from captured
rows (``objective.py``: what is minimised), ``measures.py`` how good it is, ``effects.py`` what it does in the model,
``analysis.py`` all of these at once, ``pictures.py`` their drawings.
"""
