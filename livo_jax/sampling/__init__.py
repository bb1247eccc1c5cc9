"""Images of prompts: requests, conditioning, guidance, the sampler, and StableDiffusion, the class that users call."""
