"""LDM4TS: latent diffusion over images of series (arXiv:2502.14887), made a forecaster of returns."""
