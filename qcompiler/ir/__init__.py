"""The intermediate representation: an fx graph of a model's forward pass, with typed annotations and stages."""
