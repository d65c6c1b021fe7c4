"""Moving scales between layers before they are rounded: which scales, and how weights take them."""
