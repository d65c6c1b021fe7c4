"""Look at what the compiler thinks: one document read from a graph, a pipeline or a checkpoint, and views of it."""
