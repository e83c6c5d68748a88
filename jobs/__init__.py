"""Entry points: `python -m jobs.NAME` or `cvft NAME`."""
