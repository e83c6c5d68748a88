"""Runs and registered models in MLflow; nothing outside this package imports it."""
