"""Running captured graphs: one partition at a time, on weights that are held only while they are needed."""
