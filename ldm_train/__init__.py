"""Train latent diffusion models: the autoencoder, the diffusion model in its latent space, and LoRA adapters.

Read the house from the bottom up: `diffusion` and `nn` hold the mathematics, `conditioning` and `metrics` surround
them, `stages` and `data` arrange them in time, `callbacks` watch, `config` and `train` wire it all from `conf/`.
"""

__version__ = "0.1.0"
