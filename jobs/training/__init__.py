"""A training: one rank's parts and their checkpoints, alone or by Ray Train on nodes that come and go."""
