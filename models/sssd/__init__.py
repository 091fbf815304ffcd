"""SSSD: a quantile map for every horizon, and a diffusion model of how the horizons move together."""
