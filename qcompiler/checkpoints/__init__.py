"""Checkpoints on disk: lazy reading, names against state dict paths, and crash-safe writing.

reader: `CheckpointReader`, `TensorSource`, `RawTensor`. memory: `LoadedTensors`. names: `NameMap`.
writer: `CheckpointWriter`, `write_safetensors`. hub: `resolve_model`. Modules are imported one by one: only `names` and
`memory` need Transformers, which takes seconds to load.
"""
