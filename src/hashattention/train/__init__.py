"""Training hash maps for one model: `run.train` is the whole of it, `recipe.Recipe` every knob."""
