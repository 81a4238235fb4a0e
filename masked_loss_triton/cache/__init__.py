"""Masks in the latent caches of the trainers: the trainer's dataset file, its caches, and the weights written into them."""
