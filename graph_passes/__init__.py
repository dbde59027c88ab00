"""Pure functions from model to model, one verb_noun a file. A target lists those it needs."""
