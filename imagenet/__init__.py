"""ImageNet at 256²: the core's own code on SiT-sized networks, latents of a VAE, and the public checkpoints."""
