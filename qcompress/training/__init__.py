"""Training a compressed model that stays compressed."""
