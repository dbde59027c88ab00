"""Hold a package against its checkpoint: weights, layers, states and next tokens."""
