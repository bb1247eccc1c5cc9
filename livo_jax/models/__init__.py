"""Networks of Stable Diffusion; attribute paths are the published names."""
