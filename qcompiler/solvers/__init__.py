"""Rounding a weight so that the layer's output changes least, given what its inputs look like."""
