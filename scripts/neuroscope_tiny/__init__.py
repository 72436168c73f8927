"""Text, tokenizer, training and evaluation of the bundled model, ``neuroscope-tiny``."""
