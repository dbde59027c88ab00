"""The shipped reference model: its tasks, its vocabulary and its training."""
