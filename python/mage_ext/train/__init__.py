"""Training of block-diffusion models: packed two-stream rows, data from the task generators, one trainer."""
