"""Scale providers of activations and their configurations."""
