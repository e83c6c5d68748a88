"""A seeded procedural town in CVUSA's raw layout: aerial images and panoramas of one 3-D scene, rendered by geometry."""
