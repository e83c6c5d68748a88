"""A search over Ray Tune: its specification, its space, its trials, and the journal in which they are written down."""
