"""Numbers from activations: each analysis says how it computes them and needs nothing that was not captured."""
