"""From an annotated graph to what lies on disk: sites for loaders, predicted bytes, config, and the lowered graph."""
