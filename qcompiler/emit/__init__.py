"""Emission: the config that tells loaders what was quantized how, and the proof that they read it alike."""
