"""From an annotated graph to what lies on disk, and back: sites for loaders, bytes, config, and the lowered graph."""
