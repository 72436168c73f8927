"""Every mlx-lm architecture as a tiny random model, and the table of what can be hooked in each."""
