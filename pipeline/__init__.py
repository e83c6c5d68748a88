"""From raw image pairs to batches, from weights to a registered model and a report."""
