"""Training of compressed models, which stay compressed."""
