"""A seeded procedural town in CVUSA's raw layout: both views of one 3-D scene, rendered by geometry."""
