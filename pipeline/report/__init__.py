"""One self-contained HTML page about a trained model, and every picture in it as a function of its own."""
