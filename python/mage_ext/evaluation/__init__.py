"""Tasks with known answers, methods compared on one code path, and the demo."""
