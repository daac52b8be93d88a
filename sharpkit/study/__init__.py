"""Many checkpoints: load them, score them, correlate the scores with generalization."""
